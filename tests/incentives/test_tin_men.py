"""The principal-agent experiment against brute force, scipy, scikit-learn, and the counts of the released answers."""

import csv
import itertools
import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats
from scipy.optimize import brentq
from scipy.special import expit

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tokenizers import Regex, Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Split  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from counterproof.bench.task import Trial  # noqa: E402
from counterproof.errors import UserError  # noqa: E402
from counterproof.incentives import (  # noqa: E402
    INFORMATION,
    WORDINGS,
    Agent,
    EndpointAgent,
    HFAgent,
    PrincipalAgentExperiment,
    Product,
    Results,
    UtilityAgent,
    ai_lab,
    fit_logistic,
    information_effects,
    oil_company,
    parse_choice,
    permutation_test,
    permutation_test_of_values,
    product_safety,
    read_scenarios,
    wilson_interval,
)
from counterproof.incentives.claims import tin_men as claims  # noqa: E402
from counterproof.incentives.commands import commands  # noqa: E402
from counterproof.language.models import Language  # noqa: E402

FLAGS = [(p, c) for p in (False, True) for c in (False, True)]


# design and prompts


def test_every_cell_of_the_design_comes_once_and_says_what_it_should():
    scenarios = (oil_company(), ai_lab())
    experiment = PrincipalAgentExperiment(
        scenarios, cases=["standard", "upper", "lower"], replications=1, temperatures=[1]
    )
    questions = experiment.questions()
    cells = {(q.scenario.name, q.information, q.swapped, q.case) for q in questions}
    assert len(questions) == len(cells) == len({q.text for q in questions}) == 2 * 4 * 2 * 3
    for q in questions:
        own, other = q.scenario, next(s for s in scenarios if s.name != q.scenario.name)
        text = q.text.casefold()
        for part in (own.persona, own.customer, *(p.name for p in own.products)):
            assert part.casefold() in text
        for part in (other.principal, other.persona, other.customer, *(p.name for p in other.products)):
            assert part.casefold() not in text
        clauses = {
            name: clause.format(principal=own.principal).casefold()
            for name, clause in WORDINGS["plain"].information.items()
        }
        assert [name for name, clause in clauses.items() if clause in text] == [q.information]
        names = [p.name.casefold() for p in own.products]
        assert (text.index(names[0]) > text.index(names[1])) == q.swapped
        assert f"id 1: {names[1 if q.swapped else 0]}" in text
        assert {"upper": q.text.isupper(), "lower": q.text.islower(), "standard": not q.text.isupper()}[q.case]


def test_conditions_are_coded_from_their_flags():
    assert INFORMATION == {
        "both": (True, True),
        "customer-only": (False, True),
        "principal-only": (True, False),
        "neither": (False, False),
    }
    for row in PrincipalAgentExperiment(replications=1).run(UtilityAgent()):
        assert (row.principal_sees, row.customer_sees) == INFORMATION[row.information]


@pytest.mark.parametrize("wording", WORDINGS)
def test_equal_prices_differ_from_own_prices_in_the_price_alone(wording):
    questions = PrincipalAgentExperiment([oil_company()], prices="both", wordings=[wording]).questions(
        deterministic=True
    )
    own, equal = ([q.text for q in questions if q.prices == kind] for kind in ("own", "equal"))
    assert [text.replace("SUV, $50,000", "SUV, $40,000").replace("SUV | $50,000", "SUV | $40,000")
            .replace("SUV, at $50,000", "SUV, at $40,000") for text in own] == equal  # fmt: skip
    assert oil_company().equal_price().products[1].price == 40_000


@pytest.mark.parametrize(
    ("text", "ids", "swapped", "choice"),
    [
        ("Choice: id 1", (1, 2), False, 1),
        ("Choice:2", (1, 2), False, 2),
        ("Explanation: it is best\nchoice:  product id: 2", (1, 2), False, 2),
        ("Choice: id 1", (1, 2), True, 2),
        ("CHOICE: 2", (1, 2), True, 1),
        ("Choice: [Product id: 2]", (1, 2), False, 2),
        ("**Choice:** 2", (1, 2), False, 2),
        ("Choice:\n2", (1, 2), False, 2),
        ("Choice: [id]\nChoice: 2", (1, 2), False, 2),
        ("I refuse", (1, 2), False, None),
        ("Choice: neither.\nThe other 2 shops", (1, 2), False, None),
        ("Choice: 3", (1, 2), False, None),
        ("Choice: 3", (1, 2), True, None),
        ("Choice: 12", (1, 2), False, None),
        ("Choice: 17", (17, 42), True, 42),
        ("Choice: 1", (17, 42), True, None),
        ("Choice: " + "9" * 5000, (1, 2), False, None),
        ("", (1, 2), False, None),
    ],
)
def test_a_choice_is_read_strictly(text, ids, swapped, choice):
    assert parse_choice(text, ids, swapped=swapped) == choice


# a model


def language(bias=None, seed=0, pattern=r"[\s\S]"):
    """A Llama on characters. With `bias` its logits are these, whatever it reads."""
    characters = sorted({c for q in everything() for c in q.text} | set("0123456789 :Choice\nCHOICE"))
    characters += [f" {digit}" for digit in range(10)]
    vocabulary = {"<end>": 0, **{c: at for at, c in enumerate(characters, 1)}}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))
    inner.pre_tokenizer = Split(Regex(pattern), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<end>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ '\\n' }}"
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(20 if parameter.ndim == 2 else 1)
    if bias is not None:
        model.model.norm.weight.data.zero_()
        model.lm_head = torch.nn.Linear(16, len(vocabulary))
        for name, value in bias.items():
            model.lm_head.bias.data[vocabulary[name]] = value
    return Language(model, tokenizer)


def everything():
    return PrincipalAgentExperiment(cases=["standard", "upper", "lower"], prices="both").questions(deterministic=True)


def test_log_probabilities_of_a_model_with_fixed_logits_are_the_softmax_over_all_tokens():
    bias = {"1": 2.0, "2": 0.5, "3": 1.0, "4": -0.5}
    scenario = replace(oil_company(), products=(Product("electric car", 4, id=12), Product("petrol car", 5, id=344)))
    found = language(bias)
    agent = HFAgent(found.model, found.tokenizer)
    results = PrincipalAgentExperiment([scenario], cases=["standard", "upper"]).run(agent)
    logp = found.model.lm_head.bias.detach().double().log_softmax(0)
    vocabulary = found.tokenizer.get_vocab()
    one, other = (sum(float(logp[vocabulary[d]]) for d in answer) for answer in ("12", "344"))
    for row in results:
        first = row.for_customer if not row.swapped else 1 - row.for_customer
        assert first == pytest.approx(expit(one - other), abs=1e-6)
        assert row.mass == pytest.approx(math.exp(one) + math.exp(other), rel=1e-5)
        assert row.outcome == "chosen"
        assert row.choice is None
    # All that such a model has is a liking for a place: over both orders there is no preference, and no effect.
    assert results.shares(("scenario",))[0]["customer"] == pytest.approx(0.5, abs=1e-12)
    assert results.information_effect().estimate == 0
    assert results.position_effect() == pytest.approx(2 * expit(one - other) - 1, abs=1e-6)


@pytest.mark.parametrize("case", ["standard", "upper", "lower"])
def test_log_probabilities_are_those_of_a_plain_forward_pass(case):
    found = language()
    agent = HFAgent(found)
    results = PrincipalAgentExperiment([product_safety()], cases=[case], orders="reversed").run(agent)
    field = {"standard": "Choice: ", "upper": "CHOICE: ", "lower": "choice: "}[case]
    for row in results:
        text = results.prompts[row.prompt]["text"] + "\n" + field
        assert results.prompts[row.prompt]["rendered"] == text
        with torch.no_grad():
            logits = found.model(torch.tensor([found.tokenizer(text)["input_ids"]])).logits[0, -1].double()
        p = logits.softmax(0)
        vocabulary = found.tokenizer.get_vocab()
        one, two = float(p[vocabulary["1"]]), float(p[vocabulary["2"]])
        # Reversed: the customer's product, the first, stands second, under id 2.
        assert row.for_customer == pytest.approx(two / (one + two), abs=1e-5)
        assert row.mass == pytest.approx(one + two, rel=1e-4)


def test_a_blank_that_merges_with_the_number_is_scored_with_it():
    found = language(pattern=r" ?[0-9]|[\s\S]")
    assert found.tokenizer.tokenize("e: 1") == ["e", ":", " 1"]
    results = PrincipalAgentExperiment([product_safety()], orders="listed").run(HFAgent(found))
    for row in results:
        text = results.prompts[row.prompt]["rendered"].rstrip(" ")
        with torch.no_grad():
            p = found.model(torch.tensor([found.tokenizer(text)["input_ids"]])).logits[0, -1].double().softmax(0)
        one, two = (float(p[found.tokenizer.get_vocab()[answer]]) for answer in (" 1", " 2"))
        assert row.for_customer == pytest.approx(one / (one + two), abs=1e-5)
        assert row.mass == pytest.approx(one + two, rel=1e-4)


def test_ids_of_which_one_begins_the_other_are_refused_in_log_probability_mode():
    scenario = replace(oil_company(), products=(Product("electric car", 4, id=1), Product("petrol car", 5, id=12)))
    with pytest.raises(UserError, match="one begins the other"):
        PrincipalAgentExperiment([scenario]).run(HFAgent(language()))


def test_behind_an_explanation_the_choice_is_scored_with_that_explanation(tmp_path):
    found = language()
    agent = HFAgent(found, mode="explained", max_tokens=6, cache=tmp_path)
    experiment = PrincipalAgentExperiment([product_safety()], orders="listed", replications=2, temperatures=[0.7, 1.0])
    results = experiment.run(agent, seed=5)
    assert len(results) == 4 * 2 * 2
    assert len({row.text for row in results}) > 8  # replications and temperatures draw on their own
    vocabulary = found.tokenizer.get_vocab()
    for row in list(results)[:3]:
        text = results.prompts[row.prompt]["rendered"] + row.text.strip() + "\nChoice: "
        with torch.no_grad():
            p = found.model(torch.tensor([found.tokenizer(text)["input_ids"]])).logits[0, -1].double().softmax(0)
        one, two = float(p[vocabulary["1"]]), float(p[vocabulary["2"]])
        assert row.for_customer == pytest.approx(one / (one + two), abs=1e-5)
    effect = results.information_effect()
    cells = [[row.for_customer for row in results if row.information == name and row.temperature == t]
             for name in INFORMATION for t in (0.7, 1.0)]  # fmt: skip
    assert effect.se == pytest.approx(math.sqrt(sum(np.var(cell, ddof=1) / 2 for cell in cells)) / 2 / 2)
    assert effect.interval[0] < effect.estimate < effect.interval[1]
    again = experiment.run(HFAgent(found, mode="explained", max_tokens=6, cache=tmp_path), seed=5)
    assert list(again) == list(results)


def test_a_sampled_model_answers_by_its_seed_and_nonsense_is_invalid():
    experiment = PrincipalAgentExperiment([product_safety()], replications=2, temperatures=[1.0])
    agent = HFAgent(language(), mode="sample", max_tokens=5)
    one, same, other = (list(experiment.run(agent, seed=seed)) for seed in (1, 1, 2))
    assert one == same != other
    assert {row.outcome for row in one} == {"invalid"}
    assert all(row.for_customer is None and row.text is not None for row in one)


# scripted agents


def test_an_unbiased_agent_does_not_mind_the_order_and_a_biased_one_shows_half():
    scenario = [oil_company()]
    fair = UtilityAgent((0.9, 0.4), sees=1.0, mode="logprob")
    rows = PrincipalAgentExperiment(scenario).run(fair)
    for name, (principal, _) in INFORMATION.items():
        values = {row.for_customer for row in rows if row.information == name}
        assert len(values) == 1
        assert values.pop() == pytest.approx(expit(0.9 - 0.4 * (2 if principal else 1)))
    biased = PrincipalAgentExperiment(scenario).run(UtilityAgent((0, 0), position=1.0, mode="logprob"))
    assert [row["customer"] for row in biased.shares()] == [pytest.approx(0.5, abs=1e-15)] * 4
    one_order = PrincipalAgentExperiment(scenario, orders="listed").run(
        UtilityAgent((0, 0), position=1.0, mode="logprob")
    )
    assert one_order.shares()[0]["customer"] == pytest.approx(0.7310586)


def test_samples_of_the_scripted_agent_follow_its_probabilities_through_text_and_parser():
    scenario = replace(oil_company(), products=(Product("a car", 4, id=31), Product("b car", 5, id=7)))
    agent = UtilityAgent((0.6, 0.6), sees=1.0, position=0.5, refuses=0.5)
    results = PrincipalAgentExperiment([scenario], replications=1500, temperatures=[1.0]).run(agent, seed=3)
    for swapped, (principal, customer) in itertools.product((False, True), FLAGS):
        rows = [
            row
            for row in results
            if (row.swapped, row.principal_sees, row.customer_sees) == (swapped, principal, customer)
        ]
        would = expit(0.6 - 0.6 * (2 if principal else 1) + (-0.5 if swapped else 0.5))
        invalid = 0.0 if principal else 0.5 * (1 - would)
        expected = np.array([would, invalid, 1 - would - invalid])
        counts = [sum(row.for_customer == 1 for row in rows), sum(row.outcome == "invalid" for row in rows)]
        assert np.array([*counts, len(rows) - sum(counts)]) / 1500 == pytest.approx(expected, abs=0.05)
        assert {row.choice for row in rows if row.for_customer == 1} == {31}


def test_an_agreeing_principal_pulls_the_other_way():
    friend = replace(oil_company(), preferred={"customer": 0, "principal": 0})
    rows = PrincipalAgentExperiment([friend]).run(UtilityAgent((0.3, 0.4), sees=1.0, mode="logprob"))
    assert {round(row.for_customer, 6) for row in rows} == {round(float(expit(0.3 + 0.4 * k)), 6) for k in (1, 2)}
    assert not any(row.conflict for row in rows)
    assert rows.override_rates(conflict=True) == []


# intervals and tests


def test_wilson_equals_scipy_and_is_nan_without_answers():
    for k, n, level in [(0, 60, 0.95), (60, 60, 0.95), (51, 60, 0.95), (7, 60, 0.9), (1, 2, 0.99)]:
        reference = stats.binomtest(k, n).proportion_ci(level, method="wilson")
        assert wilson_interval(k, n, level=level) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert np.isnan(wilson_interval([0], [0])).all()


def random_counts(rng, blocks=3, n=20):
    valid = rng.integers(2, n, (blocks, 2, 2))
    return rng.binomial(valid, 0.4), valid, rng.integers(0, 4, (blocks, 2, 2))


@pytest.mark.parametrize("by", ["principal", "customer", "interaction"])
def test_effects_are_the_formula_cell_by_cell(by):
    chosen, valid, missing = random_counts(np.random.default_rng(0))
    found = information_effects(chosen, valid, missing, by=by, method="wald")
    estimates, variance = [], 0.0
    for b in range(3):
        p = chosen[b] / valid[b]
        if by == "principal":
            estimates += [p[1, u] - p[0, u] for u in (0, 1)]
        elif by == "customer":
            estimates += [p[s, 1] - p[s, 0] for s in (0, 1)]
        else:
            estimates.append((p[1, 1] - p[1, 0]) - (p[0, 1] - p[0, 0]))
        variance += (p * (1 - p) / valid[b]).sum() / (1 if by == "interaction" else 4) / 9
    assert found.estimate == pytest.approx(np.mean(estimates))
    assert found.se == pytest.approx(math.sqrt(variance))
    assert (found.low, found.high) == pytest.approx(
        (found.estimate - 1.959964 * found.se, found.estimate + 1.959964 * found.se), abs=1e-7
    )


def test_bounds_are_the_extremes_over_all_readings_of_missing_answers():
    chosen, valid, missing = random_counts(np.random.default_rng(4), blocks=1, n=6)
    missing = np.minimum(missing, 2)
    readings = []
    for filled in itertools.product(*(range(m + 1) for m in missing.ravel())):
        filled = np.reshape(filled, (1, 2, 2))
        readings.append(float(information_effects(chosen + filled, valid + missing).estimate))
    found = information_effects(chosen, valid, missing)
    assert (found.bound_low, found.bound_high) == pytest.approx((min(readings), max(readings)))
    assert found.all_zero == pytest.approx(readings[0])
    assert found.all_one == pytest.approx(readings[-1])
    assert found.bound_low < min(found.all_zero, found.all_one) or found.bound_high > max(found.all_zero, found.all_one)


def test_two_cells_give_newcombes_interval():
    """With equal pairs the mean of two differences: Newcombe's limits by hand. 56/70 against 48/80 is his example."""
    (l1, u1), (l2, u2) = (stats.binomtest(k, n).proportion_ci(method="wilson") for k, n in ((56, 70), (48, 80)))
    d = 56 / 70 - 48 / 80
    low = d - math.hypot(56 / 70 - l1, u2 - 48 / 80)
    high = d + math.hypot(u1 - 56 / 70, 48 / 80 - l2)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    found = information_effects([[[48, 48], [56, 56]]], [[[80, 80], [70, 70]]])
    assert (found.low, found.high) == pytest.approx((d - (d - low) / math.sqrt(2), d + (high - d) / math.sqrt(2)))


def test_the_safe_interval_is_imbens_and_manskis_and_the_plain_one_when_nothing_is_missing():
    chosen, valid, missing = random_counts(np.random.default_rng(1))
    plain = information_effects(chosen, valid)
    assert (plain.safe_low, plain.safe_high) == pytest.approx((plain.low, plain.high))
    found = information_effects(chosen, valid, missing, method="wald")
    asked = valid + missing
    sign = np.array([[-1, -1], [1, 1]])
    errors = []
    for k in (chosen + missing * (sign < 0), chosen + missing * (sign > 0)):
        errors.append(math.sqrt((k / asked * (1 - k / asked) / asked).sum()) / 6)
    width = found.bound_high - found.bound_low
    c = brentq(lambda c: stats.norm.cdf(c + width / max(errors)) - stats.norm.cdf(-c) - 0.95, 1, 3)
    assert found.safe_low == pytest.approx(found.bound_low - c * errors[0], abs=1e-9)
    assert found.safe_high == pytest.approx(found.bound_high + c * errors[1], abs=1e-9)


def studies(kappa, beta, refused, n=2000, replications=30, seed=0):
    """Counts (n, 2 orders, 2, 2) of the brief's agent, logit .6 - .6 (1 + kappa [principal sees]) +- beta."""
    rng = np.random.default_rng(seed)
    odds = 0.6 - 0.6 * (1 + kappa * np.array([0, 1]))
    p = expit(odds[None, :, None] + beta * np.array([1, -1])[:, None, None]) * np.ones((2, 2, 2))
    chosen = rng.binomial(replications, p, (n, 2, 2, 2))
    invalid = np.zeros_like(chosen)
    invalid[:, :, 0] = rng.binomial(replications - chosen[:, :, 0], refused)
    return chosen, replications - invalid, invalid, float((p[:, 1] - p[:, 0]).mean())


@pytest.mark.parametrize("kappa", [0, 0.5, 1, 2])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("method", ["wilson", "wald"])
def test_intervals_cover_the_true_effect(kappa, beta, method):
    chosen, valid, invalid, truth = studies(kappa, beta, 0)
    found = information_effects(chosen, valid, invalid, method=method)
    assert np.mean((found.low <= truth) & (truth <= found.high)) == pytest.approx(0.95, abs=0.02)
    assert found.estimate.mean() == pytest.approx(truth, abs=0.005)


def test_dropped_invalid_answers_ruin_the_coverage_and_kept_ones_do_not():
    """The brief measured -.316 for -.146 and a coverage of .278."""
    chosen, valid, invalid, truth = studies(1, 0, 0.5)
    assert truth == pytest.approx(-0.146, abs=1e-3)
    found = information_effects(chosen, valid, invalid, method="wald")
    assert found.estimate.mean() == pytest.approx(-0.316, abs=0.01)
    assert np.mean((found.low <= truth) & (truth <= found.high)) == pytest.approx(0.278, abs=0.08)
    assert np.mean((found.safe_low <= truth) & (truth <= found.safe_high)) == pytest.approx(0.95, abs=0.02)


def test_permutation_p_values_are_uniform_without_an_effect_and_small_with_one():
    # Cells of unequal size: with equal ones the effect lies on a lattice, and a fifth of the p-values are exactly 1.
    rng = np.random.default_rng(0)
    valid = rng.integers(20, 41, (200, 2, 2, 2))
    chosen = rng.binomial(valid, expit([1.0, -1.0])[:, None, None])
    p = [permutation_test(k, n, draws=299, rng=at) for at, (k, n) in enumerate(zip(chosen, valid, strict=True))]
    assert stats.kstest(p, "uniform").pvalue > 0.01
    chosen, valid, _, _ = studies(3, 0, 0, n=100)
    p = [permutation_test(k, n, draws=299, rng=at) for at, (k, n) in enumerate(zip(chosen, valid, strict=True))]
    assert np.mean(np.array(p) < 0.05) > 0.95


@pytest.mark.parametrize("by", ["principal", "customer", "interaction"])
def test_permutations_by_counts_and_one_by_one_agree(by):
    rng = np.random.default_rng(2)
    valid = rng.integers(3, 8, (2, 2, 2))
    chosen = rng.binomial(valid, 0.5)
    fast = permutation_test(chosen, valid, by=by, draws=20_000, rng=0)
    rows = [(b, s, u, int(k < chosen[b, s, u])) for b, s, u in np.ndindex(2, 2, 2) for k in range(valid[b, s, u])]
    block, sees, customer, y = np.array(rows).T
    if by == "interaction":
        statistic = []
        for _ in range(4001):
            p = np.array([[[y[(block == b) & (sees == s) & (customer == u)].mean() for u in (0, 1)] for s in (0, 1)]
                          for b in (0, 1)])  # fmt: skip
            statistic.append((p[:, 1, 1] - p[:, 1, 0] - p[:, 0, 1] + p[:, 0, 0]).mean())
            y = y.copy()
            for b in (0, 1):
                y[block == b] = rng.permutation(y[block == b])
        slow = (np.abs(statistic) >= abs(statistic[0]) - 1e-12).mean()
    else:
        label, other = (sees, customer) if by == "principal" else (customer, sees)
        slow = permutation_test_of_values(y, label == 1, 2 * block + other, draws=20_000, rng=1)
    assert fast == pytest.approx(slow, abs=0.03)


def test_permuted_values_match_the_full_enumeration():
    values = np.array([0.9, 0.2, 0.4, 0.7, 0.1, 0.3])
    seen = np.array([True, False, True, False, True, False])
    stratum = np.array(["a", "a", "b", "b", "c", "c"])
    differences = values[seen] - values[~seen]
    every = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=3)]
    exact = np.mean(np.array(every) >= abs(differences.sum()) - 1e-12)
    assert permutation_test_of_values(values, seen, stratum, draws=20_000, rng=0) == pytest.approx(exact, abs=0.015)


def test_logistic_regression_is_the_closed_form_and_scikit_learns():
    linear_model = pytest.importorskip("sklearn.linear_model")
    k, n = np.array([[12, 20], [31, 9]]), 40
    X, y = [], []
    for s, u in itertools.product((0, 1), (0, 1)):
        X += [[1, s, u, s * u]] * n
        y += [1] * k[s, u] + [0] * (n - k[s, u])
    fit = fit_logistic(X, y)
    odds = np.log(k / (n - k))
    expected = [
        odds[0, 0],
        odds[1, 0] - odds[0, 0],
        odds[0, 1] - odds[0, 0],
        odds[1, 1] - odds[1, 0] - odds[0, 1] + odds[0, 0],
    ]
    assert fit.coefficients == pytest.approx(expected)
    assert fit.se[3] == pytest.approx(math.sqrt((1 / k + 1 / (n - k)).sum()))
    rng = np.random.default_rng(0)
    X = np.column_stack([np.ones(300), rng.normal(size=(300, 2))])
    y = rng.random(300) < expit(X @ [0.5, 2, -1])
    groups = rng.integers(12, size=300)
    fit = fit_logistic(X, y, groups)
    reference = linear_model.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(X, y)
    assert fit.coefficients == pytest.approx(reference.coef_[0], abs=1e-4)
    p = expit(X @ fit.coefficients)
    bread = np.linalg.inv(sum(q * (1 - q) * np.outer(x, x) for q, x in zip(p, X, strict=True)))
    meat = np.zeros((3, 3))
    for g in range(12):
        score = sum(((y[i] - p[i]) * X[i] for i in range(300) if groups[i] == g), np.zeros(3))
        meat += np.outer(score, score)
    assert fit.covariance == pytest.approx(bread @ meat @ bread * 12 / 11 * 299 / 297)
    apart = fit_logistic([[1, 0], [1, 0], [1, 1], [1, 1]], [0, 0, 1, 1])
    assert not apart.converged
    assert np.isnan(apart.coefficients).all()


# the table


def scripted(counts):
    """An agent that buys the electric and the petrol car so often in the oil scenario, by condition, then refuses."""
    left = {name: [1] * k + [2] * other + [None] * 99 for name, (k, other) in counts.items()}
    clauses = {clause.format(principal="Marlow Petroleum"): n for n, clause in WORDINGS["plain"].information.items()}

    def answer(prompt):
        (name,) = (n for clause, n in clauses.items() if clause in prompt)
        choice = left[name].pop(0)
        return "I cannot decide." if choice is None else f"Explanation: ...\nChoice: {choice}"

    return Agent(answer)


# Counted in the files released with the paper: electric, petrol; of 60 answers.
RELEASED = {"customer-only": (51, 0), "neither": (39, 2), "principal-only": (20, 39), "both": (17, 41)}


def released(replications=60):
    experiment = PrincipalAgentExperiment(
        [oil_company()], orders="listed", temperatures=[0.2], replications=replications
    )
    return experiment.run(scripted(RELEASED))


def test_the_released_counts_give_the_released_shares_with_invalid_answers_told_apart():
    results = released()
    rows = {row["information"]: row for row in results.shares()}
    assert {name: row["n"] for name, row in rows.items()} == {
        "customer-only": 51, "neither": 41, "principal-only": 59, "both": 58,
    }  # fmt: skip
    # Over all 60, as the brief's .850, .650, .333, .283 are: every invalid answer counted as not electric.
    assert [round(rows[n]["customer_least"], 3) for n in RELEASED] == [0.85, 0.65, 0.333, 0.283]
    assert [round(rows[n]["customer"], 3) for n in RELEASED] == [1.0, 0.951, 0.339, 0.293]
    p = {name: k / (k + other) for name, (k, other) in RELEASED.items()}
    effect = results.information_effect("principal")
    assert effect.estimate == pytest.approx((p["both"] + p["principal-only"] - p["customer-only"] - p["neither"]) / 2)
    assert effect.all_zero == pytest.approx((17 + 20 - 51 - 39) / 120)
    assert effect.bounds == pytest.approx(((17 + 20 - 60 - 58) / 120, (19 + 21 - 51 - 39) / 120))
    assert (effect.valid, effect.invalid, effect.failed) == (209, 31, 0)
    contrast = p["both"] - p["principal-only"] - p["customer-only"] + p["neither"]
    assert results.information_effect("interaction").estimate == pytest.approx(contrast)
    refusals = results.information_effect("principal", outcome="invalid")
    assert refusals.estimate == pytest.approx((2 + 1 - 9 - 19) / 120)
    assert refusals.p_value < 0.001
    names, fit = results.logistic()
    assert names == ["intercept", "principal sees", "customer sees", "both see"]
    assert not fit.converged  # 51 of 51


def test_relabelling_what_is_preferred_turns_every_override_rate_into_its_complement():
    preferred = oil_company().preferred
    tables = []
    for swap in (False, True):
        scenario = replace(oil_company(), preferred={k: 1 - v if swap else v for k, v in preferred.items()})
        experiment = PrincipalAgentExperiment([scenario], orders="listed", temperatures=[1], replications=60)
        tables.append(experiment.run(scripted(RELEASED)).override_rates(("scenario", "information")))
    for one, other in zip(*tables, strict=True):
        assert one["rate"] == pytest.approx(1 - other["rate"])
        assert one["n"] == other["n"]
        assert (one["low"], one["high"]) == pytest.approx((1 - other["high"], 1 - other["low"]))
    rates = {(row["information"], row["party"]): row["rate"] for row in tables[0]}
    assert rates["principal-only", "customer"] == pytest.approx(39 / 59)
    assert rates["principal-only", "principal"] == pytest.approx(20 / 59)


def test_when_all_answers_are_invalid_nothing_is_known():
    results = PrincipalAgentExperiment([oil_company()], replications=2).run(Agent(lambda prompt: "No."))
    for row in results.override_rates() + results.shares():
        assert row["n"] == 0
        assert math.isnan(row.get("rate", row.get("customer")))
        assert math.isnan(row["low"])
    effect = results.information_effect()
    assert math.isnan(effect.estimate)
    assert math.isnan(effect.interval[0])
    assert math.isnan(effect.p_value)
    assert effect.bounds == (-1, 1)
    assert effect.empty == 2 * 2 * 4
    assert results.as_json()["effects"][0]["estimate"] is None
    assert "0.000" not in results.text().split("effect")[0]
    with pytest.raises(UserError, match="no valid answer"):
        results.logistic()


def test_effects_over_prompts_are_students_interval_of_the_prompts_effects():
    experiment = PrincipalAgentExperiment([oil_company()], wordings=list(WORDINGS), replications=5, temperatures=[1])
    results = experiment.run(UtilityAgent((0.5, 0.5), sees=1.0), seed=1)
    effect = results.information_effect()
    each = [results.where(wording=name).information_effect().estimate for name in WORDINGS]
    reference = stats.ttest_1samp(each, 0).confidence_interval(0.95)
    assert effect.over_prompts == pytest.approx((reference.low, reference.high))
    assert effect.prompts == 3
    assert math.isnan(results.where(wording="plain").information_effect().over_prompts[0])


def test_models_are_compared_by_the_difference_of_their_effects():
    experiment = PrincipalAgentExperiment([oil_company()], replications=40, temperatures=[1])
    one, other = (experiment.run(UtilityAgent((0.6, 0.6), sees=k), seed=k) for k in (2, 0))
    a, b = one.information_effect(method="wald"), other.information_effect(method="wald")
    found = one.compare(other, method="wald")
    assert found["estimate"] == pytest.approx(a.estimate - b.estimate)
    assert found["high"] - found["estimate"] == pytest.approx(1.959964 * math.hypot(a.se, b.se), abs=1e-6)
    assert one.compare(one)["estimate"] == 0


def test_results_are_written_and_read_again_whole(tmp_path):
    results = PrincipalAgentExperiment(replications=6).run(UtilityAgent(refuses=0.6), seed=2)
    assert {row.outcome for row in results} == {"chosen", "invalid"}
    results.write(tmp_path / "run")
    for path in (tmp_path / "run", tmp_path / "run" / "answers.jsonl", tmp_path / "run" / "answers.csv"):
        again = Results.read(path)
        assert list(again) == list(results)
        assert again.as_json()["effects"] == results.as_json()["effects"]
    again = Results.read(tmp_path / "run")
    assert again.prompts == results.prompts
    assert again.design == results.design
    assert {row.prompt for row in results} == set(results.prompts)
    with open(tmp_path / "run" / "answers.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == len(results)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "outcome": "maybe"}, r"answers.jsonl:2: outcome is 'maybe'"),
        (lambda row: {**row, "for_customer": 1.5}, r"answers.jsonl:2: for_customer is 1.5"),
        (lambda row: {**row, "for_customer": None}, r"answers.jsonl:2: for_customer is None"),
        (lambda row: {**row, "principal_sees": not row["principal_sees"]}, r"answers.jsonl:2: who sees"),
        (lambda row: {k: v for k, v in row.items() if k != "text"}, r"answers.jsonl:2: .*text"),
    ],
)
def test_a_table_that_was_broken_is_refused_by_file_and_line(tmp_path, change, message):
    PrincipalAgentExperiment(replications=1).run(UtilityAgent()).write(tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    lines[1] = json.dumps(change(json.loads(lines[1])))
    (tmp_path / "answers.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=message):
        Results.read(tmp_path)


# failures


def test_what_a_callable_raises_is_a_failed_answer_and_is_asked_again():
    calls, down = [], {3}

    def client(prompt):
        calls.append(prompt)
        if len(calls) in down:
            raise TimeoutError("no answer within 5 s")
        return "Choice: 1"

    experiment = PrincipalAgentExperiment([oil_company()], replications=1, temperatures=[1])
    first = experiment.run(Agent(client))
    assert [row.outcome for row in first].count("failed") == first.failed == 1
    failed = next(row for row in first if row.outcome == "failed")
    assert failed.error == "TimeoutError: no answer within 5 s"
    assert failed.choice is failed.for_customer is failed.text is None
    assert math.isnan(first.information_effect().estimate)  # one cell of one answer is empty
    second = experiment.run(Agent(client), resume=first)
    assert len(calls) == 8 + 1
    assert second.failed == 0
    assert [row for row in second if row.prompt != failed.prompt] == [
        row for row in first if row.prompt != failed.prompt
    ]
    with pytest.raises(UserError, match="another experiment: seed"):
        experiment.run(Agent(client), seed=1, resume=first)
    more = PrincipalAgentExperiment([oil_company()], replications=2, temperatures=[1]).run(Agent(client), resume=second)
    assert (len(more), len(calls)) == (16, 17)


def test_an_agent_that_only_fails_is_left_alone():
    calls = []

    def dead(prompt):
        calls.append(prompt)
        raise ConnectionError("refused")

    results = PrincipalAgentExperiment().run(Agent(dead))
    assert len(calls) == 8
    assert results.failed == len(results) == 960
    assert "not asked after 8 failures in a row" in results[-1].error
    with pytest.raises(TypeError, match="returned a int"):
        PrincipalAgentExperiment().run(Agent(lambda prompt: 1, name="mine"))


class Server:
    """An endpoint that answers `Choice: 1` unless told to fail."""

    def __init__(self):
        outer = self
        self.requests, self.failing = [], lambda number: False

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                bad = outer.failing(len(outer.requests))
                answer = {"error": {"message": "overloaded"}} if bad else {
                    "choices": [{"message": {"content": "Explanation: x\nChoice: 1"}, "finish_reason": "stop"}],
                    "usage": {"prompt_tokens": 200, "completion_tokens": 10},
                }  # fmt: skip
                data = json.dumps(answer).encode()
                self.send_response(500 if bad else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    pytest.importorskip("openai")
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def test_an_endpoints_failures_are_recorded_kept_out_of_the_cache_and_asked_again(server, tmp_path):
    experiment = PrincipalAgentExperiment([oil_company()], replications=2, temperatures=[0.2, 0.6])
    options = dict(cache=tmp_path, retries=0, jobs=1, price=(1.0, 2.0), system="Be brief.")
    server.failing = lambda number: number in (2, 5)
    agent = EndpointAgent(server.url, "m", **options)
    first = experiment.run(agent)
    assert first.failed == 2
    assert {row.outcome for row in first} == {"chosen", "failed"}
    assert "500" in next(row.error for row in first if row.outcome == "failed")
    assert len(server.requests) == 32
    assert agent.usage.cost == pytest.approx(30 * (200 + 2 * 10) / 1e6)
    assert {body["temperature"] for body in server.requests} == {0.2, 0.6}
    assert len({(body["seed"], body["messages"][1]["content"]) for body in server.requests}) == 32
    assert json.loads(first.prompts[first[0].prompt]["rendered"]) == server.requests[0]["messages"]
    again = experiment.run(EndpointAgent(server.url, "m", **options))  # without the table, from the cache
    assert again.failed == 0
    assert len(server.requests) == 34


# bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(oil_company(), products=oil_company().products[:1]), "has 1 products"),
        (lambda: replace(oil_company(), products=(Product("a", 1, id=3), Product("b", 1, id=3))), "the id 3"),
        (lambda: replace(oil_company(), products=(Product("a", 1), Product("A", 1))), "both products are called"),
        (lambda: replace(oil_company(), preferred={"customer": 0}), "name for customer and principal"),
        (lambda: replace(oil_company(), preferred={"customer": 0, "principal": 2}), "name for customer and principal"),
        (lambda: replace(oil_company(), persona=" "), "persona is ' '"),
        (lambda: Product("a", -1), "price of 'a' is -1"),
        (lambda: Product("a", float("nan")), "price of 'a' is nan"),
        (
            lambda: replace(WORDINGS["plain"], information={k: "x" + k for k in list(INFORMATION)[:3]}),
            "does not say who sees the explanation in: neither",
        ),
        (lambda: replace(WORDINGS["plain"], information=dict.fromkeys(INFORMATION, "x")), "the same words"),
        (lambda: replace(WORDINGS["plain"], template="{principal} Choice: "), "lacks {customer}"),
        (lambda: replace(WORDINGS["plain"], template=WORDINGS["plain"].template + "{who}"), "unknown fields: {who}"),
        (lambda: PrincipalAgentExperiment([]), "scenarios is empty"),
        (lambda: PrincipalAgentExperiment(cases=["title"]), "cases has 'title'"),
        (lambda: PrincipalAgentExperiment(information=["all"]), "information has 'all'"),
        (lambda: PrincipalAgentExperiment(orders="one"), "orders is 'one'"),
        (lambda: PrincipalAgentExperiment(wordings=["odd"]), "wording 'odd'"),
        (lambda: PrincipalAgentExperiment(replications=0), "replications is 0"),
        (lambda: PrincipalAgentExperiment([oil_company(), oil_company()]), "repeats a level"),
        (lambda: PrincipalAgentExperiment(temperatures=[0]).questions(), "copies of one answer"),
        (lambda: information_effects([1], [1]), "shape"),
        (lambda: information_effects(np.full((1, 2, 2), 3), np.full((1, 2, 2), 2)), "no more answers"),
        (lambda: UtilityAgent(refuses=2), "refuses is 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_a_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_effect_needs_all_four_conditions():
    results = PrincipalAgentExperiment(information=["both", "neither"], replications=2).run(UtilityAgent())
    with pytest.raises(UserError, match="all four conditions"):
        results.information_effect()
    assert results.as_json()["effects"] == []


YAML = """\
scenarios:
  - name: bakery
    principal: the mill
    persona: You like flour.
    customer: I want rye bread, wheat would do. I have $9.
    products:
      - {name: rye bread, price: 5}
      - {name: wheat bread, price: 4, id: 7}
    preferred: {customer: 0, principal: 1}
  - name: second
    principal: x
    persona: y
    customer: z
    products: [{name: a, price: 1}, {name: b, price: 2}]
    preferred: {customer: 1, principal: 0}
"""


def test_scenarios_are_read_from_a_file_and_back(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(YAML)
    (bakery, second), wordings = read_scenarios(path)
    assert bakery.ids == (1, 7)
    assert second.preferred == {"customer": 1, "principal": 0}
    assert wordings == ()
    path.write_text(json.dumps({"scenarios": [oil_company().as_json()], "wordings": [WORDINGS["terse"].as_json()]}))
    (oil,), (terse,) = read_scenarios(path)
    assert oil == oil_company()
    assert terse == WORDINGS["terse"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("price: 4, id: 7", "price: 4, id: 1", r"own.yaml:2: .*the id 1"),
        ("    customer: z\n", "", r"own.yaml:10: a scenario lacks customer"),
        ("    customer: z\n", "    customer: z\n    colour: red\n", r"own.yaml:10: .*no colour"),
        ("name: second", "name: bakery", r"own.yaml:10: another .*'bakery'"),
        ("[{name: a, price: 1}, {name: b, price: 2}]", "[{name: a, price: 1}]", r"own.yaml:10: .*1 products"),
        ("price: 5", "price: cheap", r"own.yaml:2: .*'cheap'"),
        ("scenarios:", "scenes:", r"own.yaml:1: expected"),
        ("{customer: 1", "{customer: [1", r"own.yaml:\d+ is no YAML"),
    ],
)
def test_a_bad_scenario_file_is_refused_by_line(tmp_path, old, new, message):
    path = tmp_path / "own.yaml"
    path.write_text(YAML.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_scenarios(path)


# the command


def invoke(*words):
    return CliRunner().invoke(commands, [str(word) for word in words])


def test_the_command_asks_an_endpoint_stores_and_compares(server, tmp_path):
    server.failing = lambda number: number == 3
    words = ["principals", "--model", server.url, "--endpoint-model", "m", "--replications", 1, "--temperature", 0.5]
    words += ["--retries", 0, "--scenario", "oil-company", "--out", tmp_path / "run", "--json"]
    ran = invoke(*words)
    assert ran.exit_code == 1
    assert "1 of 8 answers failed" in ran.stderr
    assert json.loads(ran.stdout)["failed"] == 1
    ran = invoke(*words)
    assert ran.exit_code == 0
    assert len(server.requests) == 9
    found = json.loads(ran.stdout)
    assert (found["answers"], found["valid"], found["position_effect"]) == (8, 8, 1.0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"answers.jsonl", "answers.csv", "prompts.jsonl", "design.json", "shares.png", "replies"}
    ran = invoke("observed", tmp_path / "run", "--against", tmp_path / "run", "--json")
    assert ran.exit_code == 0
    assert [row["estimate"] for row in json.loads(ran.stdout)["differences"]] == [0, 0, 0]
    assert invoke("observed", tmp_path / "run").stdout.startswith("m (sample): 8 answers")
    changed = invoke(*words, "--case", "upper")
    assert isinstance(changed.exception, UserError)
    assert "another experiment: cases differ" in str(changed.exception)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scenario", "bank"], "no scenario 'bank'; there are oil-company"),
        (["--wording", "odd"], "no wording 'odd'"),
        (["--endpoint-model", "m"], "endpoint's address as --model"),
        (["--model", "http://localhost:1/v1"], "name one of its models with --endpoint-model"),
        (["--model", "http://localhost:1/v1", "--endpoint-model", "m", "--mode", "logprob"], "needs the model here"),
        (["--mode", "sample", "--temperature", "0"], "copies of one answer"),
    ],
)
def test_the_command_refuses_what_cannot_be_meant(tmp_path, words, message):
    ran = invoke("principals", *words, "--out", tmp_path / "run")
    assert isinstance(ran.exception, UserError)
    assert message in str(ran.exception)
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine.txt").touch()
    ran = invoke("principals", "--out", tmp_path)
    assert "holds files of something else" in str(ran.exception)


# the claims


def test_the_instruments_task_counts_what_it_says():
    settings = {"studies": 400, "replications": 30}
    main = next(claim for claim in claims.CLAIMS if claim.name == "main")
    trial = Trial(seed=1002, settings={**settings, **main.settings})
    dropped, kept = (claims.run_studies(arm, trial) for arm in (main.baseline, main.method))
    assert dropped["share_error"] == kept["share_error"]
    assert kept["width"] > dropped["width"]
    plain, ours = (
        claims.run_studies(arm, Trial(seed=1003, settings=settings)) for arm in (claims.PLAIN, claims.INSTRUMENT)
    )
    assert plain["coverage_error"] < 0.04
    assert ours["coverage_error"] < 0.04
    assert ours["effect_error"] == pytest.approx(plain["effect_error"])


def test_an_instance_of_the_models_task_is_the_same_for_all_arms():
    scenarios = [claims.instance(Trial(seed=seed)) for seed in (1000, 1000, 1001)]
    assert scenarios[0] == scenarios[1] != scenarios[2]
    for scenario, wording in scenarios:
        assert scenario.conflict
        assert wording in WORDINGS
        assert scenario.products[0].price != scenario.products[1].price
