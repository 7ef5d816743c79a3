"""Progress of comparisons on stderr: bars on a terminal, a line per seed elsewhere."""

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from counterproof.page.text import effect_text, interval_text, number

if TYPE_CHECKING:
    from counterproof.bench.comparison import Progress

SAY_EVERY = 15.0  # seconds between lines about trials that are still running


class Lines:
    """For logs and pipes: what has happened, once."""

    def __init__(self, claims: int) -> None:
        self._left = claims
        self._said = time.monotonic()
        self._pairs: tuple[str, int] = ("", 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def __call__(self, progress: "Progress") -> None:
        claim = progress.claim
        name = f"{claim.paper}/{claim.name}"
        if progress.latest is not None and self._pairs != (name, progress.pairs):
            self._pairs = (name, progress.pairs)
            found, pair = progress.assessment, progress.latest
            values = ", ".join(
                f"{record.arm} {number(record.value(claim.metric)) if record.outcome == 'ok' else record.outcome}"
                for record in (pair.baseline, pair.method)
            )
            text = (
                f"{name}: {claim.task.sample} {pair.seed}: {values}; so far {effect_text(claim, found.effect)} "
                f"{interval_text(claim, found.interval)}, e = {number(found.e_value)}"
            )
        elif progress.running and time.monotonic() - self._said > SAY_EVERY:
            text = f"{name}: running " + ", ".join(f"{trial} {share:.0%}" for trial, share in progress.running.items())
        else:
            return
        self._said = time.monotonic()
        click.echo(text, err=True)

    def say(self, text: str) -> None:
        click.echo(text)


class Bars:
    """For a terminal: the claim at hand, its seeds, and how far its running trials are, with an estimate."""

    def __init__(self, claims: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._claims = claims
        self._begun: list[str] = []

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, progress: "Progress") -> None:
        name = f"{progress.claim.paper}/{progress.claim.name}"
        if name not in self._begun:
            self._begun.append(name)
            place = f" {len(self._begun)}/{self._claims}" if self._claims > 1 else ""
            for row in self._bars.task_ids:
                self._bars.remove_task(row)
            self._bars.add_task(f"{name}{place}", total=progress.most, state="")
        done = progress.pairs + sum(progress.running.values()) / 2
        found = progress.assessment
        seeds = f"{progress.pairs} of at most {progress.most} {progress.claim.task.sample}s"
        self._bars.update(
            self._bars.task_ids[0],
            completed=min(done, progress.most),
            state=f"{seeds}, e = {number(found.e_value)}",
        )

    def say(self, text: str) -> None:
        self._bars.stop()
        click.echo(text)
        self._bars.start()
