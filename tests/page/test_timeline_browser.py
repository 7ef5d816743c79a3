"""The timeline in Chromium: layout, network, filters without script, and accessibility by axe-core."""

from dataclasses import replace
from itertools import pairwise

import pytest

from counterproof.page import History
from lab.browser import violations

WIDTHS = (360, 768, 1440)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The timeline as it ships."""
    out = tmp_path_factory.mktemp("timeline") / "whole.html"
    History.shipped().to_html(out, samples=10)
    return out.as_uri()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The part of it that two papers rest on: everything a page can hold, and a third of the events."""
    history = History.shipped()
    roots = ["arena-hard", "group-detr"]
    names = {row.id for name in roots for row in history.ancestors(name, samples=0)} | set(roots)
    part = replace(
        history,
        events={name: event for name, event in history.events.items() if name in names},
        edges=tuple(edge for edge in history.edges if {edge.later, edge.earlier} <= names),
    )
    out = tmp_path_factory.mktemp("timeline") / "part.html"
    part.to_html(out, samples=10)
    return out.as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_sideways_scrolling_with_everything_open(open_page, whole, width):
    page = open_page(width, details=True, at=whole)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    out = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(node => {
            const box = node.getBoundingClientRect();
            return box.width && (box.right > innerWidth + 1 || box.left < -1) && !node.closest(".scroll, .skip");
        }).map(node => node.outerHTML.slice(0, 120))"""
    )
    assert out == []


def test_labels_of_the_axis_do_not_collide(open_page):
    page = open_page()
    for scale in ("logarithmic", "linear"):
        page.get_by_role("radio", name=scale).check()
        boxes = page.locator(f".drawing.{scale} .tick").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.right])"
        )
        assert len(boxes) >= 6
        assert all(a[1] < b[0] for a, b in pairwise(boxes))


def test_filters_and_scales_work_without_script(open_page):
    page = open_page(java_script_enabled=False)
    everything = page.locator(".event:visible").count()
    assert everything >= 40
    assert page.locator(".drawing:visible").count() == 1
    page.get_by_role("radio", name="linear").check()
    assert page.locator(".drawing.linear").is_visible()
    assert not page.locator(".drawing.logarithmic").is_visible()
    page.get_by_role("radio", name="hardware").check()
    assert [one.get_attribute("id") for one in page.locator(".event:visible").all()] == ["zuse-1941", "gpu-nets-2010"]
    page.get_by_role("radio", name="everything").check()
    page.get_by_role("checkbox", name="in dispute").check()
    disputed = page.locator(".event:visible").count()
    assert 3 <= disputed < everything
    assert page.locator(".event:visible .dispute").count() >= disputed


def test_a_dot_leads_to_its_event_and_the_event_to_its_roots(open_page):
    page = open_page()
    page.locator(".drawing.logarithmic a[href='#backpropagation-1986'] circle").click()
    event = page.locator("#backpropagation-1986")
    assert page.evaluate("location.hash") == "#backpropagation-1986"
    assert event.bounding_box()["y"] < 800
    event.get_by_role("link", name="Reverse accumulation of derivatives").first.click()
    assert page.locator("#reverse-mode-1970").bounding_box()["y"] < 800


def test_nothing_is_asked_of_the_network_and_nothing_is_complained_about(open_page, whole):
    page = open_page(details=True, at=whole)
    page.wait_for_load_state("networkidle")
    assert [url for url in page.requests if not url.startswith("data:")] == [whole]
    assert page.messages == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_nothing(open_page, axe, width, scheme):
    assert violations(open_page(width, scheme, details=True), axe) == []
