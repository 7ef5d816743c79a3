import io
import os
import re
import signal
import sqlite3
import time
from dataclasses import replace

import pytest

from counterproof.bench.comparison import belonging, compare, from_records, survivors
from counterproof.bench.journal import Journal, read_record
from counterproof.bench.task import Arm, Budget, Claim
from counterproof.errors import UserError
from lab.claims import make_claim
from lab.task import TASK


def executions(folder):
    return sorted(map(int, (folder / "executions").read_text().split()))


def test_a_clear_effect_settles_at_once_and_is_answered_from_the_journal_afterwards(settle, tmp_path):
    first = settle("counts", folder=str(tmp_path))
    assert first.assessment.verdict == "holds"
    assert first.assessment.seeds == len(first.pairs) < 8
    ran = executions(tmp_path)
    again = settle("counts", folder=str(tmp_path))
    assert again.cached
    assert not first.cached
    assert executions(tmp_path) == ran
    assert again.pairs == first.pairs


def test_trials_that_two_papers_share_are_exported_with_both(journal):
    first = make_claim("gain")
    second = replace(make_claim("gain", by=2.0), paper="other")
    for claim in (first, second):
        list(compare([claim], journal, jobs=2, seeds=(3, 3)))
    assert {record.paper for record in journal.trials() if record.arm == "none"} == {"lab"}  # they were run once
    alone, whole = io.StringIO(), io.StringIO()
    assert journal.export(alone, "other") == 3
    assert journal.export(whole, "other", also=belonging([second])) == 6
    records = [read_record(line, "f") for line in whole.getvalue().splitlines()]
    assert from_records(second, records, "quick").assessment.seeds == 3
    assert all(belonging([second])(record) for record in records)
    assert not any(belonging([make_claim("counts")])(record) for record in records if record.arm != "none")


def test_the_arms_are_paired(settle):
    found = settle(by=0.0)
    assert found.assessment.correlation > 0.9


def test_fresh_runs_again_and_gives_the_same(settle):
    first, again = settle(), settle(options={"fresh": True})
    assert not again.cached
    assert [p.method.metrics for p in first.pairs] == [p.method.metrics for p in again.pairs]
    assert {r.uid for r in first.records}.isdisjoint(r.uid for r in again.records)


def test_seeds_are_added_until_the_most(settle):
    assert settle(by=0.0).assessment.seeds == 8
    assert settle(by=0.0, options={"seeds": (2, 3)}).assessment.seeds == 3


def test_the_same_trials_end_at_the_same_seed_however_many_there_are(settle):
    """A journal that holds more seeds than were needed, or pairs that come in together, change no verdict."""
    few = settle()
    many = settle(options={"seeds": (8, 8)})
    assert len(many.pairs) == 8
    again = settle()
    assert again.assessment == few.assessment
    assert again.pairs == few.pairs


def test_the_budget_of_minutes_ends_a_comparison(journal):
    claim = make_claim("works", seconds=0.2)
    task = replace(TASK, budgets={"quick": Budget(seeds=(2, 100), minutes=0.02)})
    claim = replace(claim, task=task, smallest=1.0)
    (found,) = compare([claim], journal, jobs=1)
    assert 2 <= found.assessment.seeds < 30
    (again,) = compare([claim], journal, jobs=1)
    assert again.cached
    assert again.assessment == found.assessment


def test_claims_with_the_same_arms_share_their_trials(journal, tmp_path):
    one = make_claim("counts", folder=str(tmp_path))
    other = replace(one, name="another", says="it gains more", smallest=0.5)
    first, second = compare([one, other], journal, jobs=2)
    shared = min(len(first.pairs), len(second.pairs))
    assert second.pairs[:shared] == first.pairs[:shared]
    assert len(executions(tmp_path)) == len(set(executions(tmp_path)))


def test_a_failing_arm_stops_at_the_fewest_seeds(settle):
    found = settle("imports_by_name")
    assert found.assessment.seeds == 4
    assert found.assessment.verdict == "open"


def test_a_trial_killed_from_outside_is_tried_again(settle, journal, tmp_path):
    found = settle("dies_once", folder=str(tmp_path))
    assert all(record.outcome == "ok" for record in found.records)
    assert [r.outcome for r in journal.trials() if r.seed == 1 and r.arm == "dies_once"] == ["killed", "ok"]


def test_a_resume_after_kill_9_repeats_no_finished_trial(driver, tmp_path):
    code = (
        f"claim = make_claim('counts', folder={str(tmp_path)!r}, seconds=0.3)\n"
        "found, = compare([claim], Journal(), jobs=1, seeds=(8, 8))\nprint(found.assessment.seeds)"
    )
    first = driver(code)
    journal = Journal()
    while len([r for r in journal.trials() if r.arm == "counts"]) < 3:
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    finished = {record.seed for record in journal.trials() if record.arm == "counts"}
    second = driver(code)
    out, err = second.communicate(timeout=120)
    assert out.strip() == "8", err
    ran = executions(tmp_path)
    assert all(ran.count(seed) == 1 for seed in finished)
    assert set(ran) == set(range(8))
    assert len(ran) <= 8 + 1  # at most the trial in flight was begun twice


def test_two_drivers_on_one_journal_share_the_work(driver, tmp_path):
    code = (
        f"claim = make_claim('counts', folder={str(tmp_path)!r}, seconds=0.3)\n"
        "found, = compare([claim], Journal(), jobs=1, seeds=(6, 6))\n"
        "print(found.assessment.seeds, found.assessment.effect)"
    )
    both = [driver(code), driver(code)]
    answers = [process.communicate(timeout=120) for process in both]
    assert answers[0][0] == answers[1][0] != "", answers
    assert executions(tmp_path) == list(range(6))
    assert len({r.key for r in Journal().trials()}) == len(list(Journal().trials())) == 12


def test_an_interrupt_gives_back_leases_and_keeps_what_is_finished(driver, tmp_path):
    # A shell that runs the tests in the background has them ignore interrupts, and the driver would inherit that.
    process = driver(
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"claim = make_claim('counts', folder={str(tmp_path)!r}, seconds=0.5)\n"
        "try:\n    list(compare([claim], Journal(), jobs=2, seeds=(8, 8)))\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    )
    journal = Journal()
    while not list(journal.trials()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out.strip() == "interrupted", err
    with sqlite3.connect(journal.path) as db:
        assert db.execute("SELECT count(*) FROM leases").fetchone() == (0,)


PACKAGE = {
    "__init__": "",
    "task": "from counterproof.bench.task import *\nfrom mine import helper\n"
    "def run(arm, trial):\n    method = arm.load()\n"
    "    return {'score': helper.BASE + (method() if method else 0) + 0.1 * trial.rng(arm.name).normal()}\n"
    "TASK = Task(name='mine', says='', run='mine.task:run', metrics={'score': Metric('higher')}, plug='',\n"
    "            budgets={'quick': Budget(seeds=(4, 4))})\n",
    "helper": "BASE = 1.0",
    "one": "def method():\n    return 1.0",
    "two": "def method():\n    return 2.0",
}
DRIVE = """
from counterproof.bench.task import Arm, Claim
from mine.task import TASK
for name in ("one", "two"):
    claim = Claim(paper=name, says="", task=TASK, baseline=Arm("none"), method=Arm(name, f"mine.{name}:method"),
                  metric="score", better="higher")
    found, = compare([claim], Journal(), jobs=2)
    print(name, [round(p.method.metrics["score"] - p.baseline.metrics["score"]) for p in found.pairs])
"""


def test_a_changed_method_file_invalidates_exactly_its_own_trials(driver, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()

    def drive(**changes):
        for name, text in changes.items():
            (folder / f"{name}.py").write_text(text)
        before = {r.uid for r in Journal().trials()}
        out, err = driver(DRIVE, path=[tmp_path]).communicate(timeout=120)
        assert out, err
        return out, [(r.arm, r.seed) for r in Journal().trials() if r.uid not in before]

    out, ran = drive(**PACKAGE)
    assert len(ran) == 12  # both methods, and the baseline they share
    assert drive() == (out, [])
    changed, ran = drive(one="def method():\n    return 3.0")
    assert "one [3, 3, 3, 3]" in changed
    assert {arm for arm, _ in ran} == {"one"}
    assert len(ran) == 4
    _, ran = drive(helper="BASE = 5.0")
    assert len(ran) == 12
    _, ran = drive(helper="BASE = 5.0  # a comment changes nothing")
    assert ran == []
    back, ran = drive(helper="BASE = 1.0", one=PACKAGE["one"])
    assert (back, ran) == (out, [])  # the first answers are still there


FIELDS = """paper claim says task metric better unit effect_kind baseline method effect interval level e_value seeds
verdict reported seconds budget device cached"""


def test_json_has_every_field_and_no_infinity(settle):
    import json

    few = settle(by=0.0, options={"seeds": (2, 2)}).as_json()
    json.dumps(few, allow_nan=False)
    assert few["interval"] == [None, None]
    found = settle().as_json()
    for field in FIELDS.split():
        assert field in found
    assert found["baseline"]["arm"] == "none"
    assert len(found["method"]["values"]) == found["seeds"]
    assert found["unit"] == "points"


def test_survivors_are_marked_over_many_claims(settle):
    strong, weak = settle(by=5.0, options={"seeds": (6, 6)}), settle()
    assert [c.survives for c in survivors([strong, weak])] == [True, True]
    barely = replace(weak, assessment=replace(weak.assessment, e_value=21.0))
    empty = [replace(weak, assessment=replace(weak.assessment, verdict="open", e_value=1.0)) for _ in range(5)]
    marked = survivors([barely, *empty])
    assert marked[0].survives is False
    assert {c.survives for c in marked[1:]} == {None}


def test_claims_asked_together_get_the_evidence_to_stand_together(journal):
    """Two verdicts of eight claims at e >= 20 would not survive e-BH, which wants 80 of each: more seeds are added."""
    claims = [replace(make_claim(by=gain), name=f"gain-{gain}") for gain in (0.45, 0.46, *(k / 1e6 for k in range(6)))]
    found = {}
    for comparison in compare(claims, journal, jobs=2, seeds=(4, 10)):
        found[comparison.claim.name] = comparison
    marked = {c.claim.name: c for c in survivors(list(found.values()))}
    verdicts = [c for c in marked.values() if c.assessment.verdict != "open"]
    assert {c.claim.name for c in verdicts} >= {"gain-0.45", "gain-0.46"}
    assert all(c.survives for c in verdicts)
    assert min(c.assessment.e_value for c in verdicts) * 0.05 * len(verdicts) >= 8


def test_exported_trials_give_the_same_comparison(settle, journal):
    found = settle()
    counted = [record for record in journal.trials() if record.seed < len(found.pairs)]  # trials run ahead of a verdict
    read = from_records(found.claim, counted, "quick")
    assert read.pairs == found.pairs
    assert read.assessment == found.assessment
    assert read.stale == ()
    assert from_records(make_claim("hangs"), journal.trials(), "quick") is None


def test_trials_of_earlier_code_are_said_to_be_stale(settle, journal):
    settle()
    changed = []
    for record in journal.trials():
        code = {**record.parts["code"], "lab.scale": "0" * 16}
        changed.append(replace(record, parts={**record.parts, "code": code}))
    assert from_records(make_claim(), changed, "quick").stale == ("module lab.scale has changed",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "huge"}, "no budget 'huge'; it has: quick, standard"),
        ({"seeds": (5, 4)}, "5:4"),
        ({"seeds": (1, 4)}, "1:4"),
        ({"seeds": (-3, -1)}, "-3:-1"),
        ({"jobs": 0}, "at least 1"),
        ({"engine_name": "cloud"}, "unknown engine 'cloud'"),
    ],
)
def test_options_that_make_no_sense_are_named(settle, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        settle(options=options)


def test_settings_that_are_not_json_are_named(journal):
    with pytest.raises(TypeError, match=r"arm 'gain'.*JSON"):
        list(compare([make_claim("gain", by=object())], journal))


def test_a_ratio_of_values_that_are_not_positive_is_an_error_that_names_the_claim(journal):
    claim = Claim(
        paper="lab", name="ratio", says="", task=TASK, baseline=Arm("none"), method=Arm("gain", "lab.methods:gain"),
        metric="score", better="higher", effect="ratio",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"lab/ratio: a ratio needs positive values"):
        list(compare([claim], journal))
