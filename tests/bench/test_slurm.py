"""The Slurm engine on submitit's local executor: the same calls, jobs as processes of this machine."""

import os
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest

from counterproof.bench.engine import engine
from counterproof.bench.trials import Record
from counterproof.errors import UserError

pytest.importorskip("submitit")
from counterproof.bench.slurm import Slurm

TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", TESTS)  # the nodes' environment is the driver's
    return Slurm(4, folder=tmp_path / "jobs", cluster="local")


def collect(slurm, count):
    records = []
    end = time.monotonic() + 120
    while len(records) < count and time.monotonic() < end:
        records += [event for event in slurm.poll(1.0) if isinstance(event, Record)]
    return {record.seed: record for record in records}


def test_trials_give_what_they_give_locally(slurm, spec, settle):
    for seed in range(2):
        slurm.submit(spec("gain", seed))
    records = collect(slurm, 2)
    here = {pair.seed: pair.method for pair in settle("gain").pairs}
    for seed in range(2):
        assert records[seed].outcome == "ok"
        assert records[seed].metrics == here[seed].metrics
        assert records[seed].key == here[seed].key
        assert [point["step"] for point in records[seed].curve] == [0, 1, 2]


def test_an_exception_is_a_result_and_a_death_is_told(slurm, spec):
    slurm.submit(spec("raises", 1))
    slurm.submit(spec("leaves", 0))
    records = collect(slurm, 2)
    assert records[1].outcome == "raised"
    assert "unlucky" in records[1].message
    assert records[0].outcome == "ok"


def test_a_job_that_is_killed_is_reported_as_killed(slurm, spec, tmp_path):
    slurm.submit(spec("counts", 0, folder=str(tmp_path), seconds=60))
    while not (tmp_path / "executions").exists():
        time.sleep(0.05)
    (run,) = slurm._running.values()
    controller = psutil.Process(int(run.job.job_id))
    for process in [*controller.children(recursive=True), controller]:
        os.kill(process.pid, signal.SIGKILL)
    (record,) = collect(slurm, 1).values()
    assert record.outcome == "killed"
    assert record.outcome in slurm.retries


def test_cancelled_jobs_are_forgotten(slurm, spec):
    one = spec("gain", 0)
    slurm.submit(one)
    assert slurm.cancel() == [one.key]
    assert slurm.poll(0.1) == []


def test_without_slurm_the_error_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="sbatch is not on the PATH"):
        engine("slurm", 1, [])
