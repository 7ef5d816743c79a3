"""The report in Chromium: layout, network, script, and accessibility by axe-core."""

import pytest

from counterproof.page.report import render, write
from lab.browser import violations
from page.test_report import MADE, showcase

WIDTHS = (360, 768, 1440)
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The showcase with a few planned papers, as a file."""
    out = tmp_path_factory.mktemp("report") / "page.html"
    with pytest.MonkeyPatch.context() as patch:
        papers, ours, local = showcase(patch.setitem)
        running = [paper for paper in papers if paper.status == "runs"]
        planned = [paper for paper in papers if paper.status == "planned"][:6]
        write(render([*running, *planned], ours, local, **MADE), out)
    return out.as_uri()


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "empty.html"
    write(render([], {}, {}, **MADE), out)
    return out.as_uri()


@pytest.mark.parametrize("width", WIDTHS)
def test_no_sideways_scrolling_with_everything_open(open_page, width):
    page = open_page(width, details=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    out = page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(node => {
            const box = node.getBoundingClientRect();
            return box.width && (box.right > innerWidth + 1 || box.left < -1)
                && !node.closest(".scroll, pre, .skip");
        }).map(node => node.outerHTML.slice(0, 120))"""
    )
    assert out == []


@pytest.mark.parametrize("width", WIDTHS)
def test_labels_of_an_axis_do_not_collide(open_page, width):
    page = open_page(width, details=True)
    collisions = page.evaluate(
        """() => [...document.querySelectorAll(".ticks, .ylabels")].flatMap(axis => {
            const boxes = [...axis.children].map(node => node.getBoundingClientRect()).filter(box => box.width);
            return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b =>
                a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom
            ).map(() => axis.textContent));
        })"""
    )
    assert collisions == []


@pytest.mark.parametrize("width", WIDTHS)
def test_a_failure_is_not_written_over_the_arm_that_finished(open_page, width):
    page = open_page(width, details=True)
    failures = page.locator(".failed")
    assert failures.count() >= 5
    covered = failures.evaluate_all(
        """spans => spans.filter(span => {
            const box = span.getBoundingClientRect(), area = span.parentElement.getBoundingClientRect();
            const dots = [...span.parentElement.querySelectorAll("path.baseline, path.method")]
                .flatMap(path => path.getAttribute("d").match(/[0-9]+ [0-9]+/g)).map(point => point.split(" "));
            return dots.some(([x, y]) => {
                const left = area.left + x / 1000 * area.width, top = area.top + Number(y);
                return left > box.left - 5 && left < box.right + 5 && top > box.top && top < box.bottom;
            });
        }).length"""
    )
    assert covered == 0


def test_nothing_is_asked_of_the_network_and_nothing_is_complained_about(open_page, address):
    page = open_page(details=True)
    page.wait_for_load_state("networkidle")
    assert [url for url in page.requests if not url.startswith("data:")] == [address]
    assert page.messages == []


def test_it_reads_without_a_script(open_page):
    page = open_page(java_script_enabled=False)
    assert page.locator("h1").is_visible()
    assert not page.locator("form.filter").is_visible()
    for article in page.locator("article.paper").all():
        assert article.locator("h3").is_visible()
    table = page.locator("table.numbers").first
    assert not table.is_visible()
    page.locator(".claim summary").first.click()
    assert table.is_visible()


def test_the_filter(open_page):
    page = open_page()
    shown = page.locator("article.paper:visible")
    everything = shown.count()
    said = page.locator("form.filter output")
    assert said.inner_text() == f"{everything} of {everything} papers"
    page.get_by_label("Find").fill("NEVER published")
    assert [a.get_attribute("id") for a in shown.all()] == ["waxed-paper"]
    assert said.inner_text() == f"1 of {everything} papers"
    assert page.locator("section.room:visible").count() == 1
    page.get_by_label("Find").fill("harder order of pairs")
    assert shown.count() == 0
    page.get_by_label("Find").fill("easy-to-hard order of pairs")
    assert [a.get_attribute("id") for a in shown.all()] == ["dry-point"]
    page.get_by_label("Find").fill("")
    page.get_by_label("only papers that run").check()
    assert shown.count() == page.locator("article.paper.runs").count() < everything
    page.locator("select[name=room]").select_option("incentives")
    assert {a.get_attribute("id") for a in shown.all()} == {"chine-colle", "plate-tone"}


def test_the_keyboard_reaches_the_results_first(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    skip = page.locator("a.skip")
    assert skip.evaluate("node => node === document.activeElement")
    assert skip.bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == ".main"


def test_print_opens_what_is_folded_and_is_dark_on_white(open_page):
    page = open_page(scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("table.numbers").first.bounding_box()["height"] > 100
    assert not page.locator("form.filter").is_visible()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 1440])
def test_axe_finds_nothing(open_page, axe, width, scheme):
    found = violations(open_page(width, scheme, details=True), axe)
    assert found == []


@pytest.mark.parametrize("scheme", SCHEMES)
def test_axe_finds_nothing_on_a_folded_and_on_an_empty_page(open_page, axe, empty, scheme):
    assert violations(open_page(1440, scheme), axe) == []
    assert violations(open_page(1440, scheme, at=empty), axe) == []
