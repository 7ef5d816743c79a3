"""The interface answers as its own document says."""

import pytest

from counterproof.page.store import Entry
from counterproof.page.views import Query, save_view
from web.conftest import TOKEN, sign_in

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")

ASKED = {
    "/api/v1/papers": ["?", "?view=day&at=2026-11-22", "?view=room&at=preference&limit=3", "?source=web"],
    "/api/v1/papers/{key}": ["arxiv/2611.20003", "slug/modpo", "10.1000/odd.json", "math.GT/0309136v1"],
    "/api/v1/search": ["?q=sparrows", "?q=preference&runnable=1&how=words"],
    "/api/v1/similar/{key}": ["arxiv/2611.20003", "slug/modpo?limit=3"],
    "/api/v1/trending": ["?", "?half_life=7&limit=5"],
    "/api/v1/views": [""],
    "/api/v1/views/{name}": ["birds"],
    "/api/v1/claims": ["?room=preference"],
    "/api/v1/claims/{paper}": ["modpo", "lan-hdr"],
    "/api/v1/rooms": [""],
    "/api/v1/history/{name}": ["group-detr"],
    "/api/v1/runs": [""],
    "/api/v1/status": [""],
}


@pytest.fixture(scope="module")
def document(tmp_path_factory, filled):
    from starlette.testclient import TestClient

    from counterproof.web.app import Settings, build

    built = build(Settings(path=tmp_path_factory.mktemp("none") / "x"), warm=False)
    yield TestClient(built.app, base_url="http://127.0.0.1").get("/api/openapi.json").json()
    built.site.close()


def valid(document, schema, value):
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(value)


def test_the_document_is_whole(document):
    assert document["openapi"] == "3.1.0"
    assert set(document["paths"]) == {*ASKED, "/api/v1/votes"}
    names = [one["operationId"] for methods in document["paths"].values() for one in methods.values()]
    assert len(names) == len(set(names))
    for path, methods in document["paths"].items():
        for operation in methods.values():
            asked = {one["name"] for one in operation["parameters"] if one["in"] == "path"}
            assert {part[1:-1] for part in path.split("/") if part.startswith("{")} == asked
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(("path", "question"), [(path, one) for path, several in ASKED.items() for one in several])
def test_answers_are_as_described(page, document, path, question):
    store = page.store()
    save_view(store, "birds", Query("search", words="sparrows"))
    store.close()
    address = path.partition("{")[0] + question if "{" in path else path + question.rstrip("?")
    response = page.web.get(address)
    assert response.status_code == 200, response.text
    schema = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    valid(document, schema, response.json())
    if path not in ("/api/v1/runs", "/api/v1/status"):
        assert page.web.get(address, headers={"if-none-match": response.headers["etag"]}).status_code == 304


def test_a_schema_that_is_not_met_is_noticed(document):
    with pytest.raises(jsonschema.ValidationError):
        valid(document, {"$ref": "#/components/schemas/Item"}, {"key": "x"})


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("/api/v1/papers/arxiv/9999.99999", 404), ("/api/v1/similar/nope", 404), ("/api/v1/views/nope", 404),
        ("/api/v1/claims/nope", 404), ("/api/v1/history/nope", 404), ("/api/v1/nope", 404), ("/api/v2/papers", 404),
        ("/api/v1/papers?view=magic", 400), ("/api/v1/papers?limit=9999", 400), ("/api/v1/search", 400),
        ("/api/v1/search?q=%22", 400), ("/api/v1/claims?room=kitchen", 400), ("/api/v1/papers?cursor=x", 400),
        ("/api/v1/votes", 404), ("/api/v1/search?q=" + "a" * 50_000, 414),
    ],
)  # fmt: skip
def test_refusals_are_json_with_a_line(page, document, address, status):
    response = page.web.get(address)
    assert response.status_code in (status, 405 if address.endswith("votes") else status)
    valid(document, {"$ref": "#/components/schemas/Error"}, response.json())


def test_pages_of_a_list_follow_each_other(page):
    keys, cursor = [], None
    while True:
        said = page.web.get("/api/v1/trending", params={"limit": 7, **({"cursor": cursor} if cursor else {})}).json()
        keys += [item["key"] for item in said["items"]]
        assert [item["place"] for item in said["items"]] == list(
            range(len(keys) - len(said["items"]) + 1, len(keys) + 1)
        )
        cursor = said["cursor"]
        if cursor is None:
            break
    assert len(keys) == len(set(keys)) == 42


def test_a_paper_says_all(page):
    said = page.web.get("/api/v1/papers/slug/modpo").json()
    assert said["card"]["status"] == "runs"
    claim = said["claims"][0]
    assert claim["command"] == f"counterproof check modpo/{claim['claim']}"
    measured = claim["measured"][0]
    assert measured["by"] == "the project"
    assert measured["interval"][0] is None or measured["interval"][0] < measured["interval"][1]
    pulled = page.web.get("/api/v1/papers/10.1000/odd.json").json()
    assert pulled["card"] is None
    assert {one["slug"] for one in pulled["runnable_relatives"]} >= {"modpo"}
    assert pulled["runnable_relatives"][0]["reason"].startswith("both: ")


def test_votes_need_the_token_in_the_header(page, document):
    body = {"paper": "arxiv:2611.20003", "value": 1}
    assert page.web.post("/api/v1/votes", json=body).status_code == 401
    assert page.web.post("/api/v1/votes", json=body, headers={"authorization": "Bearer x"}).status_code == 401
    signed = sign_in(page.browser())
    assert signed.post("/api/v1/votes", json=body).status_code == 401  # a cookie is sent by any page's script
    own = {"authorization": f"Bearer {TOKEN}"}
    for _ in range(2):
        done = page.web.post("/api/v1/votes", json=body, headers=own)
        assert done.json() == {"key": "arxiv:2611.20003", "votes": 1, "voted": True}
        valid(document, {"$ref": "#/components/schemas/Vote"}, done.json())
    assert page.web.post("/api/v1/votes", json={**body, "value": 0}, headers=own).json()["votes"] == 0
    for wrong in ({}, [], {"paper": 1, "value": 1}, {**body, "value": 2}, {**body, "value": "1"}):
        assert page.web.post("/api/v1/votes", json=wrong, headers=own).status_code == 400
    assert page.web.post("/api/v1/votes", content=b"\xff", headers=own).status_code == 400
    assert page.web.post("/api/v1/votes", json={**body, "paper": "nope"}, headers=own).status_code == 404


def test_an_answer_changes_when_the_paper_does(page):
    first = page.web.get("/api/v1/papers/arxiv/2611.20003")
    store = page.store()
    store.add(Entry(title="Renamed", arxiv="2611.20003"), source="arxiv")
    store.close()
    again = page.web.get("/api/v1/papers/arxiv/2611.20003", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 200
    assert again.json()["title"] == "Renamed"
