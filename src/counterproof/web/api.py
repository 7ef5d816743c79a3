"""The interface for programs: what the pages show as JSON, with an OpenAPI document that is made of the routes.

Reading needs nothing; a vote needs the operator's token as ``Authorization: Bearer``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from counterproof.errors import MissingExtra, UserError, extra
from counterproof.page.catalogue import ROOMS, find_paper, papers
from counterproof.page.history_views import roots_json
from counterproof.page.subscribers import TooMany
from counterproof.page.views import Page, Query, saved_view, saved_views
from counterproof.web.pages import Pages, limit_of, query_of
from counterproof.web.runs import Busy
from counterproof.web.security import Refused
from counterproof.web.site import Closed, Site, claims_json, show_json

with extra("page"):
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

__all__ = ["Interface", "failure", "found_json"]

Schema = Mapping[str, Any]
TEXT: Schema = {"type": "string"}
MAYBE: Schema = {"type": ["string", "null"]}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def record(required: Mapping[str, Schema], optional: Mapping[str, Schema] | None = None) -> Schema:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


ENTRY = {
    "abstract": TEXT,
    "authors": listed(TEXT),
    "arxiv": TEXT,
    "doi": TEXT,
    "slug": TEXT,
    "published": TEXT,
    "updated": TEXT,
    "venue": TEXT,
    "categories": listed(TEXT),
    "links": {"type": "object", "additionalProperties": TEXT},
    "signals": {"type": "object", "additionalProperties": NUMBER},
    "extra": {"type": "object", "additionalProperties": TEXT},
}
INTERVAL = {"type": ["array", "null"], "items": {"type": ["number", "null"]}, "minItems": 2, "maxItems": 2}
SCHEMAS: Mapping[str, Schema] = {
    "Error": record({"error": TEXT}),
    "Paper": record({"key": TEXT, "path": TEXT, "day": TEXT, "changed": TEXT, "title": TEXT}, ENTRY),
    "Item": {
        "allOf": [
            ref("Paper"),
            record(
                {
                    "votes": COUNT,
                    "place": {"type": ["integer", "null"]},
                    "score": {"type": ["number", "null"]},
                    "parts": {"type": "object", "additionalProperties": NUMBER},
                    "says": TEXT,
                }
            ),
        ]
    },
    "List": record(
        {
            "title": TEXT,
            "query": {"type": "object"},
            "items": listed(ref("Item")),
            "cursor": MAYBE,
            "formula": TEXT,
            "notes": listed(TEXT),
            "moment": TEXT,
            "earlier": MAYBE,
            "later": MAYBE,
        }
    ),
    "Measurement": record(
        {
            "by": {"enum": ["the project", "this machine"]},
            "verdict": {"enum": ["holds", "absent", "reversed", "open"]},
            "effect": {"type": ["number", "null"]},
            "interval": INTERVAL,
            "seeds": COUNT,
            "seconds": NUMBER,
            "budget": TEXT,
        }
    ),
    "Claim": record(
        {
            "paper": TEXT,
            "claim": TEXT,
            "says": TEXT,
            "reported": MAYBE,
            "task": TEXT,
            "metric": TEXT,
            "better": {"enum": ["higher", "lower"]},
            "baseline": TEXT,
            "method": TEXT,
            "command": TEXT,
            "measured": listed(ref("Measurement")),
        }
    ),
    "Shown": {
        "allOf": [
            ref("Paper"),
            record(
                {
                    "aliases": listed(TEXT),
                    "votes": COUNT,
                    "sources": listed(record({"source": TEXT, "fetched": TEXT})),
                    "card": {"type": ["object", "null"]},
                    "claims": listed(ref("Claim")),
                    "similar": listed(record({"key": TEXT, "title": TEXT})),
                    "similar_by": TEXT,
                    "runnable_relatives": listed(record({"slug": TEXT, "title": TEXT, "reason": TEXT})),
                }
            ),
        ]
    },
    "Claims": record({"claims": listed(ref("Claim")), "complete": {"type": "boolean"}}),
    "Rooms": record({"rooms": listed(record({"name": TEXT, "says": TEXT, "papers": listed(TEXT)}))}),
    "Views": record({"views": {"type": "object", "additionalProperties": {"type": "object"}}}),
    "Roots": record({"id": TEXT, "title": TEXT, "roots": listed(record({"id": TEXT, "credit": NUMBER}))}),
    "Check": {
        "type": ["object", "null"],
        "properties": {"number": COUNT, "target": TEXT, "state": TEXT, "lines": listed(TEXT)},
    },
    "Runs": record({"allowed": {"type": "boolean"}, "checks": listed(ref("Check"))}),
    "Vote": record({"key": TEXT, "votes": COUNT, "voted": {"type": "boolean"}}),
    "Status": record(
        {"version": TEXT, "papers": {"type": ["integer", "null"]}, "problem": MAYBE, "measured": {"type": "boolean"}}
    ),
}
FILTERS: Mapping[str, str] = {
    "since": "first day, YYYY-MM-DD",
    "until": "last day",
    "source": "name of a source that listed it",
    "room": "cards of a room",
    "runnable": "1: only cards whose method is here",
    "limit": "most papers, 1 to 500; default 50",
    "cursor": "of the page before",
}


@dataclass(frozen=True)
class Endpoint:
    """A route and what the document says of it.

    Attributes:
        path: with parameters in braces; ``:path`` after those that may hold slashes.
        says: a line.
        gives: name of the schema of what it answers.
        handler: takes the request.
        query: parameters and what they mean.
        method: GET or POST.
        body: schema of what is sent.
    """

    path: str
    says: str
    gives: str
    handler: Callable[[Request], Any]
    query: Mapping[str, str] = field(default_factory=dict)
    method: str = "GET"
    body: Schema | None = None


def found_json(site: Site, query: Query, *, limit: int = 50, cursor: str | None = None) -> dict[str, Any]:
    """A page of a list as JSON values."""
    notes = site.prepare(query.words) if query.view == "search" and query.how != "words" else []
    with site.reading() as reader:
        page: Page = reader.views.page(query, limit=limit, cursor=cursor)
        items = [
            {
                **item.paper.as_json(),
                "votes": reader.store.votes(item.paper.id),
                "place": item.place,
                "score": item.score,
                "parts": dict(item.parts),
                "says": item.says,
            }
            for item in page.items
        ]
    return {**page.as_json(), "items": items, "notes": [*notes, *page.notes]}


def failure(wrong: Exception) -> Response:
    """What a program is told when something does not work."""
    status = 500
    if isinstance(wrong, Refused):
        return JSONResponse({"error": wrong.why}, wrong.status, dict(wrong.headers or {}))
    for kind, code in ((Closed, 503), (TooMany, 429), (Busy, 409), (UserError, 400), (MissingExtra, 400)):
        if isinstance(wrong, kind):
            return JSONResponse({"error": str(wrong)}, code)
    return JSONResponse({"error": "something went wrong; the operator finds what in the server's log"}, status)


class Interface:
    """The routes under ``/api``.

    Args:
        pages: whose papers, guard and checks these are.
    """

    def __init__(self, pages: Pages) -> None:
        self.pages, self.site, self.guard = pages, pages.site, pages.guard
        whose = {"view": "latest, trending, day, week, month or room", "at": "which day, week, month or room"}
        words = {"q": "words", "how": "both, words or meaning"}
        v1 = "/api/v1"
        self.endpoints: Sequence[Endpoint] = (
            Endpoint(f"{v1}/papers", "A list of papers.", "List", self.papers, {**whose, **FILTERS}),
            Endpoint(f"{v1}/papers/{{key:path}}", "All that is known of a paper.", "Shown", self.paper),
            Endpoint(f"{v1}/search", "Papers by words and by meaning.", "List", self.search, {**words, **FILTERS}),
            Endpoint(f"{v1}/similar/{{key:path}}", "Papers like one.", "List", self.similar, FILTERS),
            Endpoint(f"{v1}/trending", "What people vote for now.", "List", self.trending,
                     {"half_life": "days", **FILTERS}),
            Endpoint(f"{v1}/views", "Saved views.", "Views", self.views),
            Endpoint(f"{v1}/views/{{name}}", "The papers of a saved view.", "List", self.view,
                     {"limit": FILTERS["limit"], "cursor": FILTERS["cursor"]}),
            Endpoint(f"{v1}/claims", "Every claim and what was measured of it.", "Claims", self.claims,
                     {"room": "of a room"}),
            Endpoint(f"{v1}/claims/{{paper}}", "The claims of a card.", "Claims", self.claims_of),
            Endpoint(f"{v1}/rooms", "Rooms and their cards.", "Rooms", self.rooms),
            Endpoint(f"{v1}/history/{{name}}", "What a card or an event builds on.", "Roots", self.roots),
            Endpoint(f"{v1}/runs", "Checks that were started from the page.", "Runs", self.runs),
            Endpoint(f"{v1}/status", "Whether all is well.", "Status", self.status),
            Endpoint(f"{v1}/votes", "Vote for a paper, or take it back.", "Vote", self.vote, method="POST",
                     body=record({"paper": TEXT, "value": {"enum": [0, 1]}})),
        )  # fmt: skip

    def routes(self) -> list[Route]:
        made = [Route("/api/openapi.json", self.document, methods=["GET"])]
        for one in self.endpoints:
            made.append(Route(one.path, one.handler, methods=[one.method]))
        return [*made, Route("/api/{rest:path}", self.nowhere, methods=["GET", "POST"])]

    # answers

    def papers(self, request: Request) -> Response:
        asked = request.query_params
        query = query_of(asked.get("view", "latest"), asked.get("at", ""), asked)
        return self.found(request, query)

    def search(self, request: Request) -> Response:
        return self.found(request, query_of("search", "", request.query_params))

    def similar(self, request: Request) -> Response:
        with self.site.reading() as reader:
            paper = self.pages.named(reader, request.path_params["key"])
        if paper is None:
            raise Refused(404, f"no paper {request.path_params['key'][:80]!r}")
        return self.found(request, query_of("similar", paper.key, request.query_params))

    def trending(self, request: Request) -> Response:
        return self.found(request, query_of("trending", "", request.query_params))

    def view(self, request: Request) -> Response:
        with self.site.reading() as reader:
            name = request.path_params["name"]
            if name not in saved_views(reader.store):
                raise Refused(404, f"no saved view {name[:80]!r}")
            query = saved_view(reader.store, name)
        return self.found(request, query)

    def found(self, request: Request, query: Query) -> Response:
        asked = request.query_params
        said = found_json(self.site, query, limit=limit_of(asked, 50), cursor=asked.get("cursor"))
        return self.kept(request, said)

    def kept(self, request: Request, said: Any) -> Response:
        text = json.dumps(said, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return self.pages.kept(request, text, "application/json")

    def paper(self, request: Request) -> Response:
        with self.site.reading() as reader:
            paper = self.pages.named(reader, request.path_params["key"])
            if paper is None:
                raise Refused(404, f"no paper {request.path_params['key'][:80]!r}")
            return self.kept(request, show_json(self.site, reader, paper))

    def views(self, request: Request) -> Response:
        with self.site.reading() as reader:
            found = saved_views(reader.store)
        return self.kept(request, {"views": {name: json.loads(query.to_json()) for name, query in found.items()}})

    def claims(self, request: Request) -> Response:
        room = request.query_params.get("room")
        if room is not None and room not in ROOMS:
            raise UserError(f"no room {room[:60]!r}; rooms: {', '.join(ROOMS)}")
        runnable = [card for card in papers().values() if card.status == "runs" and room in (None, card.room)]
        complete = self.site.measured.ready
        known = [card for card in runnable if complete or card.slug in self.site.measured.ours]
        said = [claim for card in known for claim in claims_json(self.site, card)]
        return self.kept(request, {"claims": said, "complete": complete})

    def claims_of(self, request: Request) -> Response:
        slug = request.path_params["paper"]
        if slug not in papers():
            raise Refused(404, f"no card {slug[:80]!r}")
        return self.kept(request, {"claims": claims_json(self.site, find_paper(slug)), "complete": True})

    def rooms(self, request: Request) -> Response:
        cards = papers().values()
        said = [
            {"name": room, "says": says, "papers": [card.slug for card in cards if card.room == room]}
            for room, says in ROOMS.items()
        ]
        return self.kept(request, {"rooms": said})

    def roots(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self.pages.shipped.events:
            raise Refused(404, f"the history knows no {name[:80]!r}")
        return self.kept(request, roots_json(self.pages.shipped, name, samples=100))

    def runs(self, request: Request) -> Response:
        checks = self.pages.checks
        past = [] if checks is None else [one.as_json() for one in reversed(checks.past)]
        return JSONResponse({"allowed": checks is not None, "checks": past})

    def status(self, request: Request) -> Response:
        number: int | None = None
        problem: str | None = None
        try:
            with self.site.reading() as reader:
                number = reader.store.count()
        except Closed as wrong:
            problem = str(wrong)
        ready = self.site.measured.ready
        return JSONResponse({"version": self.pages.version, "papers": number, "problem": problem, "measured": ready})

    async def vote(self, request: Request) -> Response:
        body = await request.body()
        who = self.guard.person(request)
        if who.name is None or who.session:  # what a browser sends by itself is no permission here
            raise Refused(401, "send the operator's token: Authorization: Bearer TOKEN", {"www-authenticate": "Bearer"})
        try:
            said = json.loads(body)
        except ValueError:
            said = None
        if not isinstance(said, dict) or not isinstance(said.get("paper"), str) or said.get("value") not in (0, 1):
            raise UserError('expected {"paper": KEY, "value": 1}, or 0 to take it back')
        name = who.name

        def do() -> Response:
            with self.site.writing() as store:
                paper = store.find(said["paper"])
                if paper is None:
                    raise Refused(404, f"no paper {said['paper'][:80]!r}")
                store.vote(paper.id, name, int(said["value"]))
                votes = store.votes(paper.id)
            return JSONResponse({"key": paper.key, "votes": votes, "voted": bool(said["value"])})

        return await run_in_threadpool(do)

    def nowhere(self, request: Request) -> Response:
        raise Refused(404, "there is no such thing here; see /api/openapi.json")

    # the document

    def document(self, request: Request) -> Response:
        return self.kept(request, self.openapi())

    def openapi(self) -> dict[str, Any]:
        paths: dict[str, Any] = {}
        for one in self.endpoints:
            path = one.path.replace(":path", "")
            parts = [part[1:-1] for part in path.split("/") if part.startswith("{")]
            operation: dict[str, Any] = {
                "operationId": one.method.lower() + one.path.split("v1/")[1].split("/{")[0] + ("_one" if parts else ""),
                "summary": one.says,
                "parameters": [
                    *({"name": part, "in": "path", "required": True, "schema": TEXT} for part in parts),
                    *(
                        {"name": name, "in": "query", "description": says, "schema": TEXT}
                        for name, says in one.query.items()
                    ),
                ],
                "responses": {
                    "200": {"description": "done", "content": {"application/json": {"schema": ref(one.gives)}}},
                    "default": {
                        "description": "not done, and why",
                        "content": {"application/json": {"schema": ref("Error")}},
                    },
                },
            }
            if one.body is not None:
                operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": one.body}}}
                operation["security"] = [{"token": []}]
            paths.setdefault(path, {})[one.method.lower()] = operation
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "Counterproof",
                "version": self.pages.version,
                "description": "Papers, what was measured of their claims, and what is new. Reading is free.",
            },
            "paths": paths,
            "components": {
                "schemas": dict(SCHEMAS),
                "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            },
        }
