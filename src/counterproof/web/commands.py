"""counterproof serve and mcp: the page for browsers, programs and assistants."""

import sys
from importlib.metadata import version
from pathlib import Path

import click

__all__ = ["commands"]


@click.group()
def commands() -> None:
    """The page, served: for browsers, programs and assistants."""


@commands.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; by default this machine only.")
@click.option("--port", default=8642, show_default=True, type=click.IntRange(0, 65535), help="0: any that is free.")
@click.option("--page", metavar="URL", envvar="COUNTERPROOF_PAGE_URL", help="The page's address as readers see it.")
@click.option("--also", "names", multiple=True, metavar="NAME", help="Another host name that it answers to.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The operator's token, made when the file is not there; default a new one at each start.",
)
@click.option(
    "--trust-proxy-user",
    "user_header",
    metavar="HEADER",
    help="Header in which a reverse proxy on this machine names the user; it must replace what clients send.",
)
@click.option("--allow-runs", is_flag=True, help="Let who is signed in start and stop checks.")
@click.option("--jobs", type=click.IntRange(1), help="Trials at a time of such a check; default one per core.")
@click.option(
    "--send-mail",
    is_flag=True,
    help="Send the mails that wait, with the environment's settings of: counterproof feed send.",
)
@click.option(
    "--rate", default=10.0, show_default=True, type=click.FloatRange(0.1), help="Requests a second of a client."
)
def serve(
    host: str,
    port: int,
    page: str | None,
    names: tuple[str, ...],
    token_file: Path | None,
    user_header: str | None,
    allow_runs: bool,
    jobs: int | None,
    send_mail: bool,
    rate: float,
) -> None:
    """Serve the page: lists, search, papers, feeds, and a JSON interface.

    Whoever has the token may vote, save views and, with --allow-runs, start checks; everybody may read. Mails with
    confirmation links leave with --send-mail, or by: counterproof feed send
    """
    from counterproof.web.app import Settings, serve
    from counterproof.web.security import read_token

    token, new = read_token(token_file)
    settings = Settings(
        host=host,
        port=port,
        page=page or None,
        names=names,
        token=token,
        user_header=user_header,
        allow_runs=allow_runs,
        jobs=jobs,
        send_mail=send_mail,
        reads=rate,
    )

    def ready(page: str) -> None:
        click.echo(f"the page is at {page}; Ctrl-C ends it", err=True)
        if new:
            click.echo(f"the operator's token, shown this once: {token}", err=True)

    serve(settings, ready=ready)


@commands.command()
def mcp() -> None:
    """Serve tools for assistants over standard input and output: search, show, compare-status."""
    from counterproof.web.mcp_server import tools
    from counterproof.web.site import Site

    if sys.stdin.isatty():
        click.echo("waiting for an assistant on standard input; Ctrl-C ends it", err=True)
    site = Site()
    site.add_cards()
    try:
        tools(site, version("counterproof")).run()
    finally:
        site.close()
