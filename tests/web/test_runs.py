"""Checks from the page: one at a time, never two of the same, stopped by an interrupt, whatever the browser does."""

import os
import signal
import sys
import time

import pytest

from counterproof.errors import UserError
from counterproof.web.runs import Busy, Checks
from web.conftest import form_token, sign_in

STAND_IN = """
import json, signal, sys, time
print("begun", *sys.argv[1:], file=sys.stderr, flush=True)
if "{how}" == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    if "{how}" in ("waits", "deaf"):
        time.sleep(60)
    if "{how}" == "fails":
        print("counterproof: no such thing", file=sys.stderr)
        sys.exit(2)
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
print(json.dumps({{"paper": "modpo", "claim": "main", "verdict": "holds", "seeds": 6, "interval": [1, 2]}}))
"""


@pytest.fixture
def checks():
    made = []

    def make(how):
        made.append(Checks(command=(sys.executable, "-c", STAND_IN.format(how=how))))
        return made[-1]

    yield make
    for one in made:
        one.close(1)


def until(true, seconds=15):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_check_runs_and_says_what_came_out(checks):
    some = checks("quick")
    check = some.start("modpo", "", "quick", "operator")
    until(lambda: check.finished)
    assert check.state == "done"
    assert check.lines[0] == "begun check modpo --budget quick --json"
    assert check.as_json()["verdicts"][0]["verdict"] == "holds"
    assert some.current is None
    assert some.start("modpo", "", "quick", "operator").number == 2


def test_one_at_a_time(checks):
    some = checks("waits")
    check = some.start("modpo", "", "quick", "operator")
    until(lambda: check.lines)
    for slug in ("modpo", "curry-dpo"):
        with pytest.raises(Busy, match="modpo is running"):
            some.start(slug, "", "quick", "operator")
    assert not some.stop(7)
    assert check.state == "running"
    assert some.stop(check.number)
    assert not some.stop()
    until(lambda: check.finished)
    assert (check.state, check.code) == ("stopped", 130)
    assert "interrupted" in check.lines


def test_one_that_does_not_listen_is_ended(checks, monkeypatch):
    monkeypatch.setattr("counterproof.web.runs.PATIENCE", 0.3)
    some = checks("deaf")
    check = some.start("modpo", "", "quick", "operator")
    until(lambda: check.lines)
    some.stop()
    until(lambda: check.finished)
    assert (check.state, check.code) == ("stopped", -signal.SIGKILL)


def test_one_that_fails_is_said_so(checks):
    check = checks("fails").start("modpo", "", "quick", "operator")
    until(lambda: check.finished)
    assert (check.state, check.code) == ("failed", 2)
    assert check.lines[-1] == "counterproof: no such thing"


def test_the_end_of_the_server_is_its_end(checks):
    some = checks("waits")
    check = some.start("modpo", "", "quick", "operator")
    until(lambda: check.lines)
    process = some._process
    some.close(10)
    assert process.poll() is not None
    until(lambda: check.finished)
    assert (check.state, check.code) == ("stopped", 130)  # interrupted, so that what is finished is kept
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize(
    ("paper", "claim", "budget", "says"),
    [
        ("nope", "", "quick", "nope"), ("modpo", "nope", "quick", "no claim"), ("modpo", "", "forever", "no budget"),
        ("lan-hdr", "", "quick", "planned"), ("--help", "", "quick", "--help"), ("modpo", "--all", "quick", "no claim"),
    ],
)  # fmt: skip
def test_only_what_is_there_is_started(checks, paper, claim, budget, says):
    some = checks("quick")
    with pytest.raises(UserError, match=says):
        some.start(paper, claim, budget, "operator")
    assert some._process is None


def test_from_the_page(make, checks):
    page = make(checks=checks("waits"))
    web = sign_in(page.web)
    token = form_token(web, "/runs")
    start = {"csrf": token, "target": "modpo", "budget": "quick"}
    assert web.post("/runs/start", data=start).status_code == 303
    refused = web.post("/runs/start", data=start)
    assert refused.status_code == 409
    until(lambda: page.checks.current.lines)
    shown = page.browser().get("/runs")  # anybody may look
    assert "begun check modpo" in shown.text
    assert 'http-equiv="refresh"' in shown.text
    assert "Stop it" not in shown.text
    assert "A check is running" in page.browser().get("/").text
    assert page.web.get("/api/v1/runs").json()["checks"][0]["state"] == "running"
    assert web.post("/runs/stop", data={"csrf": token, "number": "1"}).status_code == 303
    until(lambda: page.checks.current is None)
    assert "stopped" in web.get("/runs").text
    assert web.post("/runs/start", data={**start, "target": "modpo/nope"}).status_code == 400


def test_where_it_is_not_allowed(page):
    web = sign_in(page.web)
    assert "serve --allow-runs" in web.get("/runs").text
    done = web.post("/runs/start", data={"csrf": form_token(web, "/latest"), "target": "modpo"})
    assert done.status_code == 403
    assert web.get("/runs/events").status_code == 404
