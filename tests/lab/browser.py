"""Chromium and axe-core for the tests of pages."""

import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

AXE = "4.14.1"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def axe():
    """axe-core's source, by npm; kept between runs."""
    folder = Path(tempfile.gettempdir()) / f"counterproof-axe-core-{AXE}"
    source = folder / "axe.min.js"
    if not source.exists():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed, so axe-core cannot be fetched")
        with tempfile.TemporaryDirectory() as scratch:
            command = ["npm", "pack", "--silent", f"axe-core@{AXE}"]
            try:
                subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True, timeout=120)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
                pytest.skip(f"npm cannot fetch axe-core: {str(problem.stderr or problem)[-200:]}")
            with tarfile.open(next(Path(scratch).glob("*.tgz"))) as archive:
                text = archive.extractfile("package/axe.min.js").read()
        folder.mkdir(exist_ok=True)
        half = folder / "half"
        half.write_bytes(text)
        half.replace(source)
    return source.read_text(encoding="utf-8")


@pytest.fixture
def open_page(browser, address):
    """Pages of the module's fixture `address`, which note their requests and messages."""
    contexts = []

    def open_page(width=1440, scheme="light", at=address, details=False, **options):
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.requests, page.messages = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("console", lambda message: page.messages.append(message.text))
        page.on("pageerror", lambda error: page.messages.append(str(error)))
        page.goto(at)
        if details:
            page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        return page

    yield open_page
    for context in contexts:
        context.close()


def violations(page, axe):
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [(one["id"], one["help"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]
