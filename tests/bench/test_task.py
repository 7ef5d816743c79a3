import time

import numpy as np
import pytest

from counterproof.bench.task import Arm, Claim, Trial, resolve
from lab.task import TASK


def claim(**changes):
    given = {
        "paper": "lab",
        "says": "it gains",
        "task": TASK,
        "baseline": Arm("none"),
        "method": Arm("gain", "lab.methods:gain"),
        "metric": "score",
        "better": "higher",
    }
    return Claim(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "speed"}, "no metric 'speed'"),
        ({"better": "lower"}, "better higher"),
        ({"method": Arm("none")}, "both arms are called 'none'"),
        ({"smallest": -0.1}, "a number >= 0"),
        ({"smallest": 0.9, "effect": "ratio"}, "side that is better higher"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused_where_it_is_written(changes, message):
    with pytest.raises(ValueError, match=message):
        claim(**changes)


def test_streams_are_shared_between_arms_and_independent_between_purposes():
    one, two = Trial(seed=3), Trial(seed=3)
    one.rng("noise").normal(size=100)
    assert np.array_equal(one.rng("data").normal(size=5), two.rng("data").normal(size=5))
    draws = np.array([Trial(seed=s).rng(p).normal(size=2000) for s in (0, 1) for p in ("a", "b", "ab")])
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 0.1


def test_torch_stream_repeats():
    torch = pytest.importorskip("torch")
    first = torch.randn(4, generator=Trial(seed=1).torch_generator("init"))
    assert torch.equal(first, torch.randn(4, generator=Trial(seed=1).torch_generator("init")))
    assert not torch.equal(first, torch.randn(4, generator=Trial(seed=2).torch_generator("init")))


def test_what_is_off_the_clock_costs_nothing():
    trial = Trial(seed=0)
    with trial.off_clock():
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    assert trial.cost() < 0.05


def test_log_tells_the_listener():
    heard = []
    Trial(seed=0, listener=heard.append).log(0.5, loss=2.0)
    assert heard[0]["progress"] == 0.5
    assert heard[0]["loss"] == 2.0
    assert heard[0]["cost"] >= 0


def test_settings_cannot_be_changed_by_an_arm():
    with pytest.raises(TypeError):
        Trial(seed=0, settings={"steps": 1}).settings["steps"] = 2


@pytest.mark.parametrize("reference", ["lab.methods", ":gain", "lab.methods:"])
def test_a_reference_has_two_parts(reference):
    with pytest.raises(ValueError, match=r"package\.module:name"):
        resolve(reference)
