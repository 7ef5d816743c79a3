"""The probe's area under the curve against scikit-learn's, and a whole trial of few steps."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from counterproof.bench.task import Trial
from counterproof.detection.claims.encoder_tokens import ENCODER_TOKENS, probe_auc, run_encoder_tokens
from counterproof.detection.task import BASELINE


def test_the_probe_ranks_as_scikit_learns_does():
    rng = np.random.default_rng(0)
    tokens, others = rng.normal(size=(300, 6)) * 3 + 1, rng.normal(size=(200, 6)) * 3 + 1
    direction = rng.normal(size=6)
    inside = tokens @ direction + rng.normal(size=300) * 5 > 0
    truth = others @ direction + rng.normal(size=200) * 5 > 0
    mean, spread = tokens.mean(0), tokens.std(0) + 1e-6
    ridge = Ridge(alpha=1e-3 * 300).fit((tokens - mean) / spread, np.where(inside, 1.0, -1.0))
    expected = roc_auc_score(truth, ridge.predict((others - mean) / spread))
    assert probe_auc(tokens, inside, others, truth) == pytest.approx(expected, abs=2e-3)


def test_a_straight_line_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(2000, 4))
    inside = tokens[:, 2] > 0.3
    assert probe_auc(tokens[:1000], inside[:1000], tokens[1000:], inside[1000:]) > 0.99
    noise = rng.normal(size=(2000, 4))
    assert probe_auc(noise[:1000], inside[:1000], noise[1000:], inside[1000:]) == pytest.approx(0.5, abs=0.06)
    constant = np.zeros((20, 4))
    assert probe_auc(constant, inside[:20], constant, inside[:20]) == 0.5  # ties count half
    assert probe_auc(tokens, inside, tokens[:5], np.zeros(5, dtype=bool)) == 0.5


def test_a_trial_measures_what_the_task_declares():
    settings = ENCODER_TOKENS.budgets["quick"].settings
    few = {**settings, "scenes": 40, "evaluated": 20, "steps": 3, "warmup": 1}
    found = run_encoder_tokens(BASELINE, Trial(seed=1000, settings=few))
    assert found.keys() == ENCODER_TOKENS.metrics.keys()
    assert 0.3 < found["token_auc"] <= 1
