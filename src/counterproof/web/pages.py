"""The pages for readers: lists, papers, search, timeline, claims, subscriptions, checks; all read without script."""

import asyncio
import hashlib
import json
import re
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from markupsafe import Markup

import counterproof.page
from counterproof.errors import MissingExtra, UserError, extra
from counterproof.page import History
from counterproof.page.catalogue import ROOMS, Paper, papers
from counterproof.page.feed import list_sources
from counterproof.page.formats import FORMATS, Place, published_at, safe_link
from counterproof.page.history_views import roots_json, timeline_html
from counterproof.page.plots import forest
from counterproof.page.report import paper_view
from counterproof.page.store import Listed, arxiv_id
from counterproof.page.subscribers import ASKED, TooMany, check, confirm, subscribe, unsubscribe
from counterproof.page.typeset import VERDICTS, capital, number, seconds
from counterproof.page.views import Page, Query, forget_view, present, save_view, saved_view, saved_views
from counterproof.web.mailing import Mailing
from counterproof.web.runs import Busy, Checks
from counterproof.web.security import Guard, Refused
from counterproof.web.site import Closed, Reader, Site, card_of, show_json
from counterproof.web.tex import typeset

with extra("page"):
    from jinja2 import ChoiceLoader, Environment, FunctionLoader, StrictUndefined
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
    from starlette.routing import Route

__all__ = ["Pages", "query_of"]

HERE = Path(__file__).parent
PAGE = Path(counterproof.page.__file__).parent / "templates"
ON_A_PAGE, IN_A_FEED = 30, 50
STREAMS = 64  # followers of checks at a time
SUFFIXES = {form.suffix: form for form in FORMATS.values()}
FILTERS = ("q", "how", "since", "until", "source", "room", "runnable", "half_life")
TYPES = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
ABSTRACT = 330  # letters of an abstract in a list
LONGEST = 20_000  # letters of an abstract on its page


class Assets:
    """Files that browsers keep: their address holds a digest of what they say."""

    def __init__(self) -> None:
        self._fixed: dict[str, bytes] = {}
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._names: dict[str, str] = {}
        for name, files in {
            "page.css": (PAGE / "report.css", HERE / "static" / "site.css"),
            "page.js": (HERE / "static" / "site.js",),
        }.items():
            content = b"\n".join(file.read_bytes() for file in files)
            hashed = self._hashed(name, content)
            self._fixed[hashed] = content
            self._names[name] = f"/static/{hashed}"

    @staticmethod
    def _hashed(name: str, content: bytes) -> str:
        stem, _, suffix = name.partition(".")
        return f"{stem}.{hashlib.sha256(content).hexdigest()[:16]}.{suffix}"

    def address(self, name: str) -> str:
        return self._names[name]

    def keep(self, css: str) -> str:
        """The address of a style sheet that belongs to one page."""
        content = css.encode()
        hashed = self._hashed("part.css", content)
        self._made[hashed] = content
        self._made.move_to_end(hashed)
        if len(self._made) > 300:
            self._made.popitem(last=False)
        return f"/static/{hashed}"

    def get(self, name: str) -> bytes | None:
        return self._fixed.get(name) or self._made.get(name)


def without_styles(html: str) -> tuple[Markup, str]:
    """HTML of the report with its ``style`` attributes made rules of a style sheet, as the page's policy wants it.

    Headings below the fourth level are said to be two levels higher, where they stand on a paper's own page.
    """
    rules: dict[str, str] = {}

    def classed(found: re.Match[str]) -> str:
        name, before, style, after = found.groups()
        rule = rules.setdefault(style, "s" + hashlib.sha256(style.encode()).hexdigest()[:10])
        rest = before + after
        if 'class="' in rest:
            return "<{}{}>".format(name, rest.replace('class="', f'class="{rule} ', 1))
        return f'<{name} class="{rule}"{rest}>'

    html = re.sub(r'<([a-z]+)((?:\s[^<>]*?)?)\sstyle="([^"]*)"([^<>]*)>', classed, html)
    html = re.sub(r"<h([56])(?=[ >])", lambda found: f'<h{found[1]} aria-level="{int(found[1]) - 2}"', html)
    return Markup(html), "".join(f".{name}{{{style}}}" for style, name in rules.items())


def query_of(view: str, at: str, asked: Mapping[str, str]) -> Query:
    """A list as an address asks for it.

    Raises:
        UserError: what is asked makes no sense.
    """
    half_life = None
    if asked.get("half_life"):
        try:
            half_life = float(asked["half_life"])
        except ValueError:
            raise UserError(f"half_life: expected days, not {asked['half_life'][:60]!r}") from None
    return Query(
        view=view,  # type: ignore[arg-type]  # it is checked there
        at=at,
        words=asked.get("q", "") if view == "search" else "",
        how=asked.get("how") or "both",  # type: ignore[arg-type]
        since=asked.get("since") or None,
        until=asked.get("until") or None,
        source=asked.get("source") or None,
        room=asked.get("room") or None,
        runnable=asked.get("runnable", "") not in ("", "0", "false"),
        half_life=half_life,
    )


def limit_of(asked: Mapping[str, str], default: int) -> int:
    text = asked.get("limit", "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,3}", text) or not 1 <= int(text) <= 500:
        raise UserError(f"limit: expected a number from 1 to 500, not {text[:40]!r}")
    return int(text)


def path_of(query: Query, name: str | None = None) -> str:
    """The address of a list, without what filters it."""
    if name is not None:
        return f"/view/{name}"
    return f"/{query.view}/{quote(query.at.replace(':', '/', 1))}" if query.at else f"/{query.view}"


def shortened(text: str, most: int) -> str:
    """The beginning of a text, to a whole word and no open formula."""
    if len(text) <= most:
        return text
    cut = text[:most].rsplit(" ", 1)[0]
    if cut.count("$") % 2:
        cut = cut[: cut.rindex("$")]
    return cut.rstrip(" ,.;:") + " …"


def own_path(given: str) -> str:
    """Where to go back to: a path of this site, whatever a form says."""
    parts = urlsplit(given) if re.fullmatch(r"/[!-\[\]-~]{0,2000}", given) else None
    if parts is None or parts.scheme or parts.netloc or given.startswith(("//", "/\\")):
        return "/"
    return given


async def form_of(request: Request) -> dict[str, str]:
    """What a form says; of several values of a name, one a line."""
    body = (await request.body()).decode("utf-8", "replace")
    try:
        pairs = parse_qsl(body, keep_blank_values=True, max_num_fields=200)
    except ValueError:
        raise Refused(413, "too many fields were sent") from None
    form: dict[str, str] = {}
    for name, value in pairs:
        form[name] = f"{form[name]}\n{value}" if name in form else value
    return form


class Pages:
    """The routes of the pages.

    Args:
        site: papers and what was measured.
        guard: who may change something.
        checks: started from the page; None: the operator does not allow it.
        mailing: sends what waits; None: another program does.
        base: the site's address as its readers see it; None: as they ask for it.
        version: of Counterproof.
    """

    def __init__(
        self,
        site: Site,
        guard: Guard,
        checks: Checks | None,
        mailing: Mailing | None = None,
        *,
        base: str | None,
        version: str,
    ) -> None:
        self.site, self.guard, self.checks, self.mailing = site, guard, checks, mailing
        self.base, self.version = base, version
        self.assets = Assets()
        self.closing = False
        self._streams = 0
        self._claims: tuple[str, str, Counter[str | None]] | None = None
        self._cards: OrderedDict[tuple[Any, ...], tuple[Any, ...]] = OrderedDict()
        self._roots: dict[str, list[dict[str, Any]]] = {}
        folders = (HERE / "templates", PAGE)

        def load(folder: Path) -> FunctionLoader:
            def text(name: str) -> str | None:
                file = folder / name
                # The templates' own indentation would be a tenth of the page.
                return re.sub(r"(?m)^ +", "", file.read_text(encoding="utf-8")) if file.exists() else None

            return FunctionLoader(text)

        self.templates = Environment(
            loader=ChoiceLoader([load(folder) for folder in folders]),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
        )
        self.templates.filters |= {
            "capital": capital,
            "tex": lambda text: typeset(text),
            "short": lambda text: typeset(shortened(text, ABSTRACT)),
            "number": number,
            "seconds": seconds,
            "link": safe_link,
        }
        self.templates.globals |= {
            "asset": self.assets.address,
            "rooms": ROOMS,
            "version": version,
            "verdict_words": VERDICTS,
            "published_at": published_at,
            "may_sign_in": guard.token is not None,
            "may_check": checks is not None,
            "card_of": card_of,
            "verdicts_of": self.verdicts_of,
            "quote": quote,
        }

    def routes(self) -> list[Route]:
        get = ["GET"]
        return [
            Route("/", self.front, methods=get),
            Route("/static/{name}", self.static, methods=get),
            Route("/favicon.ico", self.nothing, methods=get),
            Route("/robots.txt", self.robots, methods=get),
            Route("/paper/{path:path}", self.paper, methods=get),
            Route("/history", self.history, methods=get),
            Route("/history/{name}", self.roots, methods=get),
            Route("/claims", self.claims, methods=get),
            Route("/rooms", self.rooms, methods=get),
            Route("/views", self.views, methods=get),
            Route("/views", self.change_views, methods=["POST"]),
            Route("/vote", self.vote, methods=["POST"]),
            Route("/sign-in", self.sign_in_page, methods=get),
            Route("/sign-in", self.sign_in, methods=["POST"]),
            Route("/sign-out", self.sign_out, methods=["POST"]),
            Route("/subscribe", self.subscribe_page, methods=get),
            Route("/subscribe", self.subscribe, methods=["POST"]),
            Route("/confirm/{token}", self.link_page, methods=get),
            Route("/confirm/{token}", self.use_link, methods=["POST"]),
            Route("/unsubscribe/{token}", self.link_page, methods=get),
            Route("/unsubscribe/{token}", self.use_link, methods=["POST"]),
            Route("/runs", self.runs, methods=get),
            Route("/runs/events", self.events, methods=get),
            Route("/runs/start", self.start, methods=["POST"]),
            Route("/runs/stop", self.stop, methods=["POST"]),
            Route("/view/{name}", self.saved, methods=get),
            Route("/{view}", self.listing, methods=get),
            Route("/{view}/{at:path}", self.listing, methods=get),
        ]

    # answering

    def html(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        who = self.guard.person(request)
        needs_form = {"csrf": lambda: self.guard.form_token(request)}
        here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        said: dict[str, Any] = {"who": who, "here": here, "path": request.url.path, "alternates": (), "styles": ()}
        text = self.templates.get_template(template).render(**{**said, **needs_form, **values})
        response = HTMLResponse(text, status)
        self.guard.finish(request, response)
        return response

    def say(self, request: Request, status: int, title: str, *lines: str) -> Response:
        """A page that says one thing."""
        return self.html(request, "message.html", status, title=title, lines=lines)

    def problem(self, request: Request, wrong: Exception) -> Response:
        """What is shown when something does not work; never how the program is made."""
        if isinstance(wrong, Refused):
            response = self.say(request, wrong.status, "Not done", wrong.why)
            response.headers.update(wrong.headers or {})
            return response
        if isinstance(wrong, Closed):
            return self.say(request, 503, "The papers cannot be read", str(wrong))
        if isinstance(wrong, TooMany):
            return self.say(request, 429, "Too often", capital(str(wrong)))
        if isinstance(wrong, Busy):
            return self.say(request, 409, "Not now", capital(str(wrong)))
        if isinstance(wrong, UserError | MissingExtra):
            return self.say(request, 400, "That does not work", capital(str(wrong)))
        return self.say(request, 500, "Something went wrong", "The operator finds what in the server's log.")

    def missing(self, request: Request) -> Response:
        return self.say(request, 404, "Not here", "There is no such page. The search looks through all papers.")

    def address(self, request: Request) -> str:
        return self.base or f"{request.url.scheme}://{request.headers['host']}"

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        content = self.assets.get(name)
        if content is None:
            return Response("not here\n", 404, media_type="text/plain")
        headers = {"cache-control": "public, max-age=31536000, immutable"}
        return Response(content, headers=headers, media_type=TYPES[name.rpartition(".")[2]])

    async def nothing(self, request: Request) -> Response:
        return Response(status_code=204, headers={"cache-control": "public, max-age=86400"})

    async def robots(self, request: Request) -> Response:
        text = "User-agent: *\nDisallow: /confirm/\nDisallow: /unsubscribe/\nDisallow: /search\nDisallow: /similar/\n"
        return Response(text, media_type="text/plain")

    # lists

    def front(self, request: Request) -> Response:
        today = self.site.clock().astimezone(UTC).strftime("%Y-%m-%d")
        values: dict[str, Any] = {
            "today": today,
            "closed": None,
            "day": None,
            "latest": None,
            "trending": None,
            "papers_in_all": len(papers()),
            "cards": list(papers().values()),
            "running": self.checks.current if self.checks else None,
        }
        try:
            with self.site.reading() as reader:
                day = reader.views.page(Query("day", today), limit=10)
                trending = reader.views.page(Query("trending"), limit=8)
                values |= {"day": day, "trending": trending, "papers_in_all": reader.store.count()}
                if not day.items:
                    values["latest"] = reader.views.page(Query("latest"), limit=10)
                listed = [*day.items, *trending.items, *(values["latest"].items if values["latest"] else ())]
                values["votes"] = self.votes(request, reader, [item.paper.id for item in listed])
        except Closed as problem:
            values["closed"] = str(problem)
        values["counts"] = self.claims_view()[2] if self.site.measured.ready else None
        values["alternates"] = self.alternates("/latest", "")
        return self.html(request, "front.html", **values)

    def listing(self, request: Request) -> Response:
        view, at = request.path_params["view"], request.path_params.get("at", "")
        last, dot, suffix = (at or view).rpartition(".")
        form = SUFFIXES.get(suffix) if dot else None
        if form is not None:
            view, at = (view, last) if at else (last, "")
        if view not in ("latest", "trending", "day", "week", "month", "search", "room", "similar"):
            return self.missing(request)
        if view in ("latest", "trending", "search") and at:
            return self.missing(request)
        asked = request.query_params
        if view == "similar":
            whole = request.path_params["at"]
            with self.site.reading() as reader:
                # A DOI may end like a format.
                found = self.named(reader, whole) if form else None
                form, found = (None, found) if found else (form, self.named(reader, at))
            if found is None:
                return self.missing(request)
            at = found.key
        if view == "search" and not re.search(r"\w", asked.get("q", "")):
            if form is not None:
                raise UserError("q: what the papers are about")
            with self.site.reading() as reader:
                return self.html(request, "search.html", page=None, asked=asked, sources=self.sources(reader))
        return self.show(request, query_of(view, at, asked), None, form)

    def saved(self, request: Request) -> Response:
        name, dot, suffix = request.path_params["name"].rpartition(".")
        form = SUFFIXES.get(suffix) if dot else None
        if form is None:
            name = request.path_params["name"]
        with self.site.reading() as reader:
            try:
                query = saved_view(reader.store, name)
            except UserError:
                return self.missing(request)
        return self.show(request, query, name, form)

    def show(self, request: Request, query: Query, name: str | None, form: Any) -> Response:
        asked = request.query_params
        notes: list[str] = []
        limit = limit_of(asked, ON_A_PAGE if form is None else IN_A_FEED)
        if query.view == "search" and query.how != "words":
            notes = self.site.prepare(query.words)
        with self.site.reading() as reader:
            page = reader.views.page(query, limit=limit, cursor=asked.get("cursor"))
            page = replace(page, notes=(*notes, *(note for note in page.notes if not notes or note not in notes)))
            path = path_of(query, name)
            kept = [(key, asked[key]) for key in FILTERS if asked.get(key)] if name is None else []
            if form is not None:
                return self.feed(request, page, path, kept, form)
            votes = self.votes(request, reader, [item.paper.id for item in page.items])
            shown = [one for one in kept if one[0] != "limit"]
            values: dict[str, Any] = {
                "page": page,
                "query": query,
                "name": name,
                "asked": asked,
                "votes": votes,
                "following": f"{path}?{urlencode([*shown, ('cursor', page.cursor)])}" if page.cursor else None,
                "first": f"{path}{'?' + urlencode(shown) if shown else ''}" if asked.get("cursor") else None,
                "alternates": self.alternates(path, urlencode(kept)),
                "present": {view: present(view, page.moment[:10]) for view in ("day", "week", "month")},
                "paper": reader.store.find(query.at) if query.view == "similar" else None,
                "room": query.at if query.view == "room" else None,
            }
            if query.view == "search":
                values["sources"] = self.sources(reader)
                template = "found.html" if asked.get("part") else "search.html"
                return self.html(request, template, **values)
            return self.html(request, "list.html", **values)

    def feed(self, request: Request, page: Page, path: str, kept: Sequence[tuple[str, str]], form: Any) -> Response:
        said = urlencode(list(kept))
        feed = f"{path}.{form.suffix}"
        extra = [("limit", request.query_params["limit"])] if request.query_params.get("limit") else []
        more = [*kept, *extra, ("cursor", page.cursor)] if page.cursor else None
        cursor = [("cursor", request.query_params["cursor"])] if request.query_params.get("cursor") else []
        own = urlencode([*kept, *extra, *cursor])
        place = Place(
            f"Counterproof: {page.title}",
            self.address(request),
            path + (f"?{said}" if said else ""),
            feed + (f"?{own}" if own else ""),
            f"{feed}?{urlencode(more)}" if more else None,
        )
        return self.kept(request, form.write([item.paper for item in page.items], place), form.media_type)

    def kept(self, request: Request, text: str, media_type: str) -> Response:
        """Something programs ask for again and again: with an ETag, and without content where they have it."""
        content = text.encode()
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        headers = {"etag": tag, "cache-control": "public, max-age=60", "vary": "host"}
        asked = request.headers.get("if-none-match", "")
        if asked.strip() == "*" or tag in [one.strip().removeprefix("W/") for one in asked.split(",")]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    def alternates(self, path: str, said: str) -> list[tuple[str, str, str]]:
        names = {"atom": "Atom", "json": "JSON Feed", "bib": "BibTeX", "ris": "RIS", "jsonl": "JSON lines"}
        end = f"?{said}" if said else ""
        return [
            (names[suffix], f"{path}.{suffix}{end}", form.media_type.partition(";")[0])
            for suffix, form in SUFFIXES.items()
        ]

    def votes(self, request: Request, reader: Reader, listed: Sequence[int]) -> dict[int, tuple[int, bool]]:
        """Votes of papers, and whether the one who asks gave one."""
        who = self.guard.person(request).name
        own: dict[int, int] = {}
        if who is not None:
            rows = reader.store.db.execute(
                "SELECT paper, value FROM votes WHERE voter = ? AND paper IN (SELECT value FROM json_each(?)) "
                "ORDER BY id",
                (who, json.dumps(list(listed))),
            )
            own = {row[0]: row[1] for row in rows}
        return {paper: (reader.store.votes(paper), bool(own.get(paper))) for paper in set(listed)}

    @staticmethod
    def sources(reader: Reader) -> list[str]:
        """Names to choose from; an imported file's is not among them, but may be asked for."""
        return ["card", *(source.name for source in list_sources(reader.store)[:50])]

    def verdicts_of(self, card: Paper) -> list[tuple[str, int]]:
        """What came out for a card's claims, where that has been read."""
        found = Counter(one.assessment.verdict for one in self.site.measured.ours.get(card.slug, ()))
        return [(verdict, found[verdict]) for verdict in VERDICTS if found[verdict]]

    # a paper

    def named(self, reader: Reader, path: str) -> Listed | None:
        """The paper of an address: ``arxiv/2207.13085``, ``doi/10.1000/182``, ``slug/group-detr``, or a bare name."""
        return reader.store.find(path.replace("/", ":", 1)) or reader.store.find(path)

    def paper(self, request: Request) -> Response:
        path = request.path_params["path"].strip("/")[:500]
        last, dot, suffix = path.rpartition(".")
        form = SUFFIXES.get(suffix) if dot else None
        try:
            with self.site.reading() as reader:
                found = self.named(reader, path)
                if found is not None:
                    form = None
                elif form is not None:
                    found = self.named(reader, last)
                if found is None:
                    return self.unlisted(request, path)
                if form is not None:
                    if form.suffix == "json":
                        said = json.dumps(show_json(self.site, reader, found), ensure_ascii=False, allow_nan=False)
                        return self.kept(request, said, "application/json")
                    own = f"/paper/{quote(found.path)}"
                    place = Place(found.entry.title, self.address(request), own, f"{own}.{form.suffix}")
                    return self.kept(request, form.write([found], place), form.media_type)
                if path != found.path:
                    return RedirectResponse(f"/paper/{quote(found.path)}", 302)
                return self.show_paper(request, reader, found)
        except Closed:
            return self.unlisted(request, path)

    def unlisted(self, request: Request, path: str) -> Response:
        """A card whose paper is not in the store, as when there is none yet."""
        kind, _, rest = path.partition("/")
        asked = arxiv_id(rest if kind == "arxiv" else path)
        for card in papers().values():
            if (kind == "slug" and rest == card.slug) or path == card.slug or (asked and card.arxiv == asked):
                return self.html(request, "paper.page.html", **self.card_values(card), paper=None, votes={})
        return self.missing(request)

    def card_values(self, card: Paper) -> dict[str, Any]:
        """What of a card's page costs something to make: kept until the measurements change."""
        measured = self.site.measured.of(card)
        state = tuple(id(one) for several in measured.values() for one in several)
        key = (card.slug, state, self.site.measured.ready)
        if key not in self._cards:
            view = paper_view(card, measured)
            made = self.templates.get_template("claims.part.html").render(entry=view)
            claims, css = without_styles(made)
            sections = [(name, without_styles(text)[0]) for name, text in view["sections"]]
            # The comparisons are kept with it, so that their ids stay theirs.
            self._cards[key] = (view, claims, css, sections, measured)
            if len(self._cards) > 200:
                self._cards.popitem(last=False)
        view, claims, css, sections, _ = self._cards[key]
        return {
            "card": card,
            "view": view,
            "claims": claims,
            "sections": sections,
            "styles": (self.assets.keep(css),) if css else (),
            "reruns": self.site.measured.reruns(card),
            "roots": self.roots_of(card.slug),
            "check": self.checks.current if self.checks else None,
        }

    def show_paper(self, request: Request, reader: Reader, found: Listed) -> Response:
        card = card_of(found)
        similar, relatives, by = self.site.near(reader, found)
        values: dict[str, Any] = {"card": None, "claims": None, "roots": None, "styles": (), "check": None}
        if card is not None:
            values = self.card_values(card)
        links = {name: address for name, raw in found.entry.links.items() if (address := safe_link(raw))}
        records = reader.store.records(found.id)
        sources = list(dict.fromkeys((source, fetched[:10]) for source, fetched, _, _ in records))
        return self.html(
            request,
            "paper.page.html",
            **values,
            paper=found,
            abstract=typeset(found.entry.abstract[:LONGEST]),
            links=links,
            sources=sources[:20],
            similar=similar,
            relatives=relatives,
            by=by,
            votes=self.votes(request, reader, [found.id]),
            alternates=[
                (name, f"/paper/{quote(found.path)}.{suffix}", SUFFIXES[suffix].media_type.partition(";")[0])
                for name, suffix in (("BibTeX", "bib"), ("RIS", "ris"), ("JSON", "json"))
            ],
        )

    # what was measured

    def claims_view(self) -> tuple[str, str, "Counter[str | None]"]:
        """The forest of every claim the project measured, its style, and how many have which verdict."""
        if self._claims is None:
            everything = [
                claim
                for card in papers().values()
                if card.status == "runs"
                for claim in paper_view(card, {"us": self.site.measured.ours.get(card.slug, []), "here": []})["claims"]
            ]
            plot = forest([claim for claim in everything if claim["sheets"]])
            text = self.templates.get_template("forest.part.html").render(forest=plot)
            text = re.sub(r'href="#([\w-]+)/', r'href="/paper/slug/\1#\1/', text)
            html, css = without_styles(text)
            self._claims = (html, css, Counter(claim["verdict"] for claim in everything))
        return self._claims

    def claims(self, request: Request) -> Response:
        if not self.site.measured.ready:
            return self.html(request, "claims.html", forest=None, counts=None)
        html, css, counts = self.claims_view()
        return self.html(request, "claims.html", forest=html, counts=counts, styles=(self.assets.keep(css),))

    def rooms(self, request: Request) -> Response:
        inside = {room: [card for card in papers().values() if card.room == room] for room in ROOMS}
        return self.html(request, "rooms.html", inside={room: cards for room, cards in inside.items() if cards})

    # the timeline

    @cached_property
    def shipped(self) -> History:
        return History.shipped()

    @cached_property
    def timeline(self) -> tuple[Markup, str]:
        """What is between the timeline's head and foot, and its style sheet."""
        whole = timeline_html(self.shipped, self.shipped.credit_of(None, samples=200), samples=200)
        style = whole[whole.index("<style>") + 7 : whole.index("</style>")]
        begin = whole.index(">", whole.index("<main")) + 1
        inside, css = without_styles(whole[begin : whole.index("</main>")])
        style = style[style.index("/* Timeline") :] if "/* Timeline" in style else style
        return inside, style + css

    def warm(self) -> None:
        """Make what takes seconds before somebody asks for it; meant for a thread."""
        self.site.measured.warm()
        self.claims_view()
        _ = self.timeline

    def roots_of(self, slug: str) -> list[dict[str, Any]]:
        """The strongest roots of a card, if the history knows it."""
        if slug not in self._roots:
            known = slug in self.shipped.events
            self._roots[slug] = roots_json(self.shipped, slug, top=6, samples=50)["roots"] if known else []
        return self._roots[slug]

    def history(self, request: Request) -> Response:
        inside, style = self.timeline
        return self.html(request, "timeline.page.html", inside=inside, styles=(self.assets.keep(style),))

    def roots(self, request: Request) -> Response:
        name, dot, suffix = request.path_params["name"].partition(".")
        if name not in self.shipped.events:
            return self.missing(request)
        found = roots_json(self.shipped, name, samples=100)
        if dot and suffix == "json":
            return self.kept(request, json.dumps(found, ensure_ascii=False, allow_nan=False), "application/json")
        return self.html(request, "roots.html", event=self.shipped.events[name], found=found, name=name)

    # opinions

    async def vote(self, request: Request) -> Response:
        form = await form_of(request)
        who = self.guard.require(request, form)

        def do() -> tuple[int, bool] | None:
            with self.site.writing() as store:
                paper = store.find(form.get("paper", ""))
                if paper is None:
                    return None
                store.vote(paper.id, who.name or "", 1 if form.get("value") == "1" else 0)
                return store.votes(paper.id), form.get("value") == "1"

        done = await run_in_threadpool(do)
        if done is None:
            return await run_in_threadpool(self.missing, request)
        if "application/json" in request.headers.get("accept", ""):
            return Response(json.dumps({"votes": done[0], "voted": done[1]}), media_type="application/json")
        return RedirectResponse(own_path(form.get("back", "/")), 303)

    def views(self, request: Request) -> Response:
        with self.site.reading() as reader:
            return self.html(request, "views.html", saved=saved_views(reader.store), path_of=path_of)

    async def change_views(self, request: Request) -> Response:
        form = await form_of(request)
        self.guard.require(request, form)

        def do() -> str:
            with self.site.writing() as store:
                if form.get("forget"):
                    forget_view(store, form["forget"])
                    return "/views"
                name = form.get("name", "").strip()
                save_view(store, name, Query.from_json(form.get("query", "")))
                return f"/view/{name}"

        return RedirectResponse(await run_in_threadpool(do), 303)

    # signing in

    def sign_in_page(self, request: Request) -> Response:
        back = own_path(request.query_params.get("back", "/"))
        return self.html(request, "sign_in.html", back=back, problem=None)

    async def sign_in(self, request: Request) -> Response:
        form = await form_of(request)
        self.guard.check_form(request, form.get("csrf", ""))
        back = own_path(form.get("back", "/"))
        if not self.guard.is_token(form.get("token", "").strip()):
            values = {"back": back, "problem": "That is not the operator's token."}
            return await run_in_threadpool(lambda: self.html(request, "sign_in.html", 403, **values))
        response = RedirectResponse(back, 303)
        self.guard.sign_in(response)
        return response

    async def sign_out(self, request: Request) -> Response:
        form = await form_of(request)
        self.guard.check_form(request, form.get("csrf", ""))
        response = RedirectResponse("/", 303)
        self.guard.sign_out(response)
        return response

    # the digest

    def subscribe_page(
        self, request: Request, problem: str | None = None, form: Mapping[str, str] | None = None
    ) -> Response:
        try:
            with self.site.reading() as reader:
                names = list(saved_views(reader.store))
        except Closed:
            names = []
        asked = form or {"topics": request.query_params.get("topic", ""), "views": request.query_params.get("view", "")}
        return self.html(request, "subscribe.html", 400 if problem else 200, names=names, problem=problem, form=asked)

    async def subscribe(self, request: Request) -> Response:
        form = await form_of(request)
        self.guard.check_form(request, form.get("csrf", ""))

        def do() -> Response:
            try:
                with self.site.writing() as store:
                    subscribe(
                        store,
                        form.get("email", ""),
                        rhythm=form.get("rhythm", "daily"),
                        topics=[line.strip() for line in form.get("topics", "").splitlines() if line.strip()],
                        views=[line for line in form.get("views", "").splitlines() if line],
                        caller=request.scope["client_name"],
                    )
            except (Closed, TooMany):
                raise
            except UserError as wrong:
                return self.subscribe_page(request, capital(str(wrong)), form)
            if self.mailing is not None:
                self.mailing.wake()
            return self.say(request, 200, "Look into your mail", ASKED)

        return await run_in_threadpool(do)

    def link_page(self, request: Request) -> Response:
        purpose = request.url.path.split("/")[1]
        with self.site.reading() as reader:
            link = check(reader.store, request.path_params["token"][:200])
        if link is None or link.purpose != purpose:
            return self.say(request, 404, "Not a link of ours", "It may have been cut off: copy all of it.")
        response = self.html(request, "link.html", link=link, purpose=purpose)
        response.headers["referrer-policy"] = "no-referrer"
        response.headers["x-robots-tag"] = "noindex"
        return response

    async def use_link(self, request: Request) -> Response:
        purpose, token = request.url.path.split("/")[1], request.path_params["token"][:200]
        await request.body()

        def do() -> Response:
            with self.site.writing() as store:
                done = confirm(store, token) if purpose == "confirm" else unsubscribe(store, token)
            title, line, status = {
                "confirmed": ("You will get the digest", "Every issue has a link that stops it.", 200),
                "unsubscribed": ("You will get no more mail", "That is done at once; nothing else is needed.", 200),
                "used": ("Used already", "This link was used before; nothing was changed.", 200),
                "expired": ("Too late", "This link is older than two days; subscribe again.", 410),
                "unknown": ("Not a link of ours", "It may have been cut off: copy all of it.", 404),
            }[done]
            return self.say(request, status, title, line)

        return await run_in_threadpool(do)

    # checks

    def runs(self, request: Request) -> Response:
        runnable = [card for card in papers().values() if card.status == "runs"]
        return self.html(
            request,
            "runs.html",
            checks=self.checks,
            current=self.checks.current if self.checks else None,
            past=[one.as_json() for one in reversed(self.checks.past)] if self.checks else [],
            runnable=runnable,
            chosen=request.query_params.get("paper", ""),
        )

    async def events(self, request: Request) -> Response:
        checks = self.checks
        if checks is None:
            return Response("not here\n", 404, media_type="text/plain")
        if self._streams >= STREAMS:
            raise Refused(503, "too many follow the checks at once; load the page again for what it says now")
        self._streams += 1

        async def follow() -> AsyncIterator[str]:
            said, quiet = -1, 0.0
            try:
                while not self.closing and not await request.is_disconnected():
                    if checks.version != said:
                        said, quiet = checks.version, 0.0
                        latest = checks.past[-1].as_json() if checks.past else None
                        yield f"data: {json.dumps(latest)}\n\n"
                    elif quiet > 15:
                        quiet = 0.0
                        yield ": still here\n\n"
                    await asyncio.sleep(0.5)
                    quiet += 0.5
            finally:
                self._streams -= 1

        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(follow(), headers=headers, media_type="text/event-stream")

    async def start(self, request: Request) -> Response:
        form = await form_of(request)
        who = self.guard.require(request, form)
        checks = self.allowed()
        paper, _, claim = form.get("target", "").partition("/")
        name = who.shown
        await run_in_threadpool(lambda: checks.start(paper, claim, form.get("budget", "quick"), name))
        return RedirectResponse("/runs", 303)

    async def stop(self, request: Request) -> Response:
        form = await form_of(request)
        self.guard.require(request, form)
        checks = self.allowed()
        number = form.get("number", "")
        await run_in_threadpool(checks.stop, int(number) if re.fullmatch(r"\d{1,9}", number) else None)
        return RedirectResponse("/runs", 303)

    def allowed(self) -> Checks:
        if self.checks is None:
            raise Refused(403, "checks are not started from this page; the operator can allow it: serve --allow-runs")
        return self.checks
