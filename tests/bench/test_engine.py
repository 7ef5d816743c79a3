"""What can happen to a trial is recorded as its outcome, and the comparison goes on."""

import os
import time

import psutil
import pytest

from counterproof.bench.engine import Local, Point, engine
from counterproof.bench.trials import Record
from counterproof.errors import UserError


@pytest.mark.parametrize(
    ("method", "outcome", "message"),
    [
        ("raises", "raised", "RuntimeError: the second seed is unlucky"),
        ("not_a_number", "diverged", "score is nan"),
        ("diverges", "diverged", "the loss is infinite"),
        ("hangs", "time", "stopped after 6 s"),
        ("hoards", "memory", "GiB"),
        ("hoards_in_a_child", "memory", "GiB"),
        ("cannot_allocate", "memory", "allocate"),
        ("dies", "killed", "SIGKILL"),
        ("leaves", "raised", "exited with 3"),
        ("imports_by_name", "raised", "lab.hidden by a computed name"),
    ],
)
def test_a_trial_that_goes_wrong_is_recorded_and_the_comparison_goes_on(settle, journal, method, outcome, message):
    found = settle(method)
    never_works = method == "imports_by_name"
    assert found.assessment.seeds == (4 if never_works else 8)
    record = found.pairs[1].method
    assert record.outcome == outcome
    assert message in record.message
    assert record.metrics == {}
    assert record.cost["wall_seconds"] > 0
    if not never_works:
        assert [r.outcome for r in found.records].count("ok") == 15
        assert found.assessment.failed == (0, 1)
    assert journal.find([record.key])[record.key].outcome == outcome


def test_what_is_recorded_of_a_trial(settle):
    record = settle().pairs[0].method
    assert [point["step"] for point in record.curve] == [0, 1, 2]
    assert {"wall_seconds", "cpu_seconds", "peak_memory_bytes"} == set(record.cost)
    assert record.cost["peak_memory_bytes"] > 1e6
    assert record.versions["python"].startswith("3.")
    assert {"name", "system", "processor", "cores", "memory_bytes", "load"} == set(record.host)
    assert record.started <= record.finished


def test_global_generators_are_seeded_by_the_trial(settle):
    first = [pair.method.metrics["score"] for pair in settle("draws_globally").pairs]
    again = [pair.method.metrics["score"] for pair in settle("draws_globally", {"fresh": True}).pairs]
    assert first == again


def test_a_trial_that_answers_but_keeps_a_thread_is_ended(settle):
    found = settle("lingers", {"seeds": (2, 2)})
    assert [record.outcome for record in found.records] == ["ok"] * 4


def test_trials_run_at_once_up_to_the_number_of_jobs(spec, tmp_path):
    local = Local(2, prepare=[spec("counts", folder=str(tmp_path), seconds=0.5)])
    local.submit(spec("gain"))
    collect(local, 1)  # the process that trials are forked from is up
    for seed in range(2):
        local.submit(spec("counts", seed=seed, folder=str(tmp_path), seconds=0.5))
    begun = time.monotonic()
    collect(local, 2)
    assert time.monotonic() - begun < 0.95


def collect(local, count):
    records = []
    end = time.monotonic() + 60
    while len(records) < count and time.monotonic() < end:
        records += [event for event in local.poll(0.2) if isinstance(event, Record)]
    return records


def test_points_arrive_while_the_trial_runs(spec):
    local = Local(1)
    local.submit(spec("hangs", seed=0))
    events = []
    while not any(isinstance(event, Record) for event in events):
        events += local.poll(0.5)
    assert [event.values["progress"] for event in events if isinstance(event, Point)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_a_trial_may_end_before_it_can_be_watched(spec, monkeypatch):
    def gone(pid):
        raise psutil.NoSuchProcess(pid)

    local = Local(1)
    monkeypatch.setattr(psutil, "Process", gone)
    local.submit(spec("gain"))
    (record,) = collect(local, 1)
    assert record.outcome == "ok"


def test_a_cancelled_trial_is_gone(spec):
    local = Local(1)
    one = spec("hangs", seed=1)
    local.submit(one)
    process = next(run.process for run in local._running.values())
    assert local.cancel() == [one.key]
    assert not psutil.pid_exists(process.pid)
    assert local.poll(0.1) == []


def test_an_unknown_engine_is_named():
    with pytest.raises(UserError, match=r"'slurmm'.*local, slurm"):
        engine("slurmm", 1, [])


def test_trials_end_with_a_driver_that_is_killed(driver, tmp_path):
    """Killed with -9, a driver leaves no trial behind that keeps computing."""
    process = driver(
        f"claim = make_claim('counts', folder={str(tmp_path)!r}, seconds=60)\n"
        "list(compare([claim], Journal(), jobs=1, budget='standard'))\n"
    )
    while not (tmp_path / "executions").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    os.kill(process.pid, 9)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
