"""Tools for assistants: in-process by the SDK's own client, and over standard input and output."""

import asyncio
import os
import sys

import pytest

mcp = pytest.importorskip("mcp", reason="the extra page is not installed")

from counterproof.web.mcp_server import tools  # noqa: E402
from counterproof.web.site import Site  # noqa: E402
from web.conftest import NOW, Plain  # noqa: E402


@pytest.fixture
def site(tmp_path, filled):
    path = tmp_path / "page.sqlite"
    path.write_bytes(filled)
    made = Site(path, clock=lambda: NOW, encoder=Plain())
    yield made
    made.close()


def ask(server, *calls):
    async def go():
        async with mcp.Client(server) as client:
            listed = await client.list_tools()
            return listed.tools, [await client.call_tool(name, given) for name, given in calls]

    return asyncio.run(go())


def test_search_show_and_compare_status(site):
    listed, (found, shown, card, status, one) = ask(
        tools(site, "1"),
        ("search", {"words": "sparrows", "limit": 3}),
        ("show", {"paper": "2611.20003v2"}),
        ("show", {"paper": "modpo"}),
        ("search", {"words": "preference", "runnable": True, "room": "preference"}),
        ("compare-status", {"paper": "modpo"}),
    )
    assert [tool.name for tool in listed] == ["search", "show", "compare-status"]
    assert all(tool.description and tool.input_schema["properties"] for tool in listed)
    assert len(found.structured_content["papers"]) == 3
    assert shown.structured_content["key"] == "arxiv:2611.20003"
    assert card.structured_content["claims"][0]["measured"][0]["verdict"]
    assert all("slug" in paper for paper in status.structured_content["papers"])
    claims = one.structured_content["claims"]
    assert {claim["paper"] for claim in claims} == {"modpo"}
    assert claims[0]["measured"][0]["interval"]


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("search", {"words": '"'}, "no word|what the paper is about"),
        ("search", {"words": "a", "room": "kitchen"}, "no room"),
        ("search", {"words": "a", "how": "magic"}, "how"),
        ("show", {"paper": "nope"}, "nope"),
        ("compare-status", {"paper": "nope"}, "nope"),
    ],
)
def test_what_does_not_work_is_said(site, name, given, says):
    import re

    _, (done,) = ask(tools(site, "1"), (name, given))
    assert done.is_error
    assert re.search(says, done.content[0].text)


def test_without_a_store_the_cards_are_shown(tmp_path):
    site = Site(tmp_path / "none" / "page.sqlite", encoder=Plain())
    _, (shown, found) = ask(tools(site, "1"), ("show", {"paper": "lan-hdr"}), ("search", {"words": "x"}))
    assert shown.structured_content["status"] == "planned"
    assert found.is_error
    assert "feed import" in found.content[0].text


def test_over_standard_input_and_output(own_home):
    command = "from counterproof.web.commands import commands; commands(['mcp'])"
    parameters = mcp.StdioServerParameters(command=sys.executable, args=["-c", command], env=dict(os.environ))
    _, (found,) = ask(parameters, ("search", {"words": "group-detr", "limit": 1}))
    assert found.structured_content["papers"][0]["slug"] == "group-detr"
