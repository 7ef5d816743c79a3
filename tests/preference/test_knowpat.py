"""KnowPAT: the list-wise objective, the linker, and the two preference sets."""

import copy
import itertools
import json
import math
import re
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from counterproof.bench.task import Trial
from counterproof.errors import MissingExtra, UserError
from counterproof.language import Group, Language, Logps, completion_logps
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference import (
    SFT,
    KnowledgePreferenceBuilder,
    KnowPAT,
    PreferenceTrainer,
    TripleLinker,
    with_padded_length,
)
from counterproof.preference.claims import knowpat as claims
from counterproof.preference.data import Example, read
from counterproof.preference.forward import objective_output, optimise
from counterproof.preference.objectives import Batch, Sample
from counterproof.preference.trainer import TrainSettings, prepare, train

WORDS = ["red", "blue", "green", "gold", "pink", "a", "b", "c", "d", ":"]


def language(seed=0, dtype=torch.float32):
    tokenizer = tiny_tokenizer(WORDS)
    return Language(tiny_model(tokenizer, seed=seed, hidden=16, layers=2).to(dtype), tokenizer)


def ranking(scores, number=0):
    completions = tuple(" ".join(WORDS[(i + number + j) % 5] for j in range(1 + i % 3)) for i in range(len(scores)))
    return Example(
        prompt=f"{WORDS[5 + number % 4]} : ",
        completions=completions,
        scores=tuple(map(float, scores)),
        kind="ranked",
        where=f"rows.jsonl:{number + 1}",
    )


def samples(*rankings, tokenizer=None, objective=None):
    tokenizer = tokenizer or language().tokenizer
    return prepare(rankings, tokenizer, max_length=64, objective=objective)[0]


def given_means(questions, lengths=None):
    """Log-probabilities whose means per token are the given ones, and the batch.

    questions: per question a list of (score, mean log-probability).
    """
    groups, tokens, rng = [], [], np.random.default_rng(0)
    sizes = itertools.cycle(lengths or [3, 1, 4, 2, 5])
    for question in questions:
        own = [next(sizes) for _ in question]
        groups.append(Group((1,), tuple((5,) * size for size in own)))
        for (_, mean), size in zip(question, own, strict=True):
            noise = rng.normal(size=size) * 0.1
            tokens += list(mean + noise - noise.mean())
    logps = Logps.of(groups, torch.tensor(tokens, dtype=torch.float64))
    batch = Batch.of([Sample(group, tuple(s for s, _ in q)) for group, q in zip(groups, questions, strict=True)])
    return logps, batch


def losses(objective, questions, lengths=None):
    logps, batch = given_means(questions, lengths)
    return objective(logps, None, batch).losses.tolist()


def by_hand(question, weight=0.1, kind="adaptive"):
    """The paper's sum for one question without ties, answer by answer."""
    S = [mean for _, mean in sorted(question, key=lambda answer: -answer[0])]
    n = len(S)
    total = 0.0
    for i in range(n - 1):
        if kind == "adaptive":
            w = (S[i] - min(S)) / (max(S) - min(S))
        else:
            w = {"uniform": 1.0, "rank": (n - 1 - i) / (n - 1)}[kind]
        term = math.log(1 + math.exp(-S[i]))
        for j in range(i + 1, n):
            term += math.log(1 + math.exp(S[j])) / (n - 1 - i)
        total += w * term / (n - 1)
    return -S[0] + weight * total


# the objective


def test_four_answers_by_hand():
    question = [(4, -0.5), (3, -1.0), (2, -2.0), (1, -3.0)]
    # The weights are 1, 0.8 and 0.4.
    pull = [math.log1p(math.exp(s)) for s in (0.5, 1.0, 2.0)]
    push = [math.log1p(math.exp(s)) for s in (-1.0, -2.0, -3.0)]
    align = (pull[0] + sum(push) / 3 + 0.8 * (pull[1] + (push[1] + push[2]) / 2) + 0.4 * (pull[2] + push[2])) / 3
    (found,) = losses(KnowPAT(align_weight=2.0), [question])
    assert found == pytest.approx(0.5 + 2 * align, abs=1e-9)
    assert found == pytest.approx(by_hand(question, 2.0), abs=1e-9)


@pytest.mark.parametrize(("better", "worse", "weight"), [(-0.7, -2.0, 1.0), (-2.0, -0.7, 0.0)])
def test_of_two_answers_the_better_one_counts_only_if_the_model_agrees(better, worse, weight):
    (found,) = losses(KnowPAT(align_weight=1.0), [[(1, better), (0, worse)]])
    assert found == pytest.approx(-better + weight * (math.log1p(math.exp(-better)) + math.log1p(math.exp(worse))))
    logps, batch = given_means([[(1, better), (0, worse)]])
    metrics = KnowPAT()(logps, None, batch).metrics
    assert metrics["knowpat/unweighted"] == 1 - weight
    assert metrics["rewards/accuracies"] == weight
    assert metrics["rewards/margins"] == pytest.approx(better - worse)


means = st.floats(-6, -0.01).map(lambda value: round(value, 3))
questions = st.lists(means, min_size=2, max_size=6, unique=True).flatmap(
    lambda own: st.permutations(range(len(own))).map(lambda scores: list(zip(map(float, scores), own, strict=True)))
)


@given(st.lists(questions, min_size=1, max_size=3), st.sampled_from(["adaptive", "uniform", "rank"]))
@settings(max_examples=60, deadline=None)
def test_any_batch_equals_the_sum_by_hand(batch, kind):
    """Unsorted answers, unequal K: each question by itself."""
    found = losses(KnowPAT(align_weight=0.7, weights=kind), batch)
    assert found == pytest.approx([by_hand(question, 0.7, kind) for question in batch], abs=1e-9)


def test_the_gradient_is_that_of_frozen_weights():
    logps, batch = given_means([[(3, -1.0), (1, -0.4), (2, -2.0)], [(0, -3.0), (1, -0.2)]])
    token = logps.token.clone().requires_grad_()
    KnowPAT(align_weight=3.0)(logps.with_tokens(token), None, batch).loss.backward()

    def frozen(values):
        """By hand, with the weights of the point at which the gradient is taken."""
        S = logps.with_tokens(values).mean().tolist()
        first = [S[0], S[2], S[1]], [weights[0], weights[2]]
        second = [S[4], S[3]], [weights[4]]
        total = 0.0
        for ranked, own in (first, second):
            n = len(ranked)
            align = 0.0
            for i, w in enumerate(own):
                push = sum(math.log1p(math.exp(s)) for s in ranked[i + 1 :]) / (n - 1 - i)
                align += w * (math.log1p(math.exp(-ranked[i])) + push) / (n - 1)
            total += (-ranked[0] + 3.0 * align) / 2
        return total

    at = logps.mean().tolist()
    weights = [(s - min(at[:3])) / (max(at[:3]) - min(at[:3])) for s in at[:3]]
    weights += [(s - min(at[3:])) / (max(at[3:]) - min(at[3:])) for s in at[3:]]
    eps = 1e-6
    for index in range(len(token)):
        step = torch.zeros_like(logps.token)
        step[index] = eps
        slope = (frozen(logps.token + step) - frozen(logps.token - step)) / (2 * eps)
        assert float(token.grad[index]) == pytest.approx(slope, abs=1e-8)


def test_permuting_answers_with_their_scores_changes_nothing():
    question = [(4, -0.5), (3, -1.5), (2, -1.0), (1, -3.0)]
    found = {round(losses(KnowPAT(), [list(order)])[0], 10) for order in itertools.permutations(question)}
    assert len(found) == 1


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_without_the_list_it_is_fine_tuning_on_the_best_answer(architecture):
    lm = language(dtype=torch.float64)
    model = lm.model
    if architecture == "gpt2":
        config = GPT2Config(vocab_size=len(lm.tokenizer), n_positions=32, n_embd=16, n_layer=2, n_head=2)
        model = GPT2LMHeadModel(config).double().eval()
    (sample,) = samples(ranking([1, 3, 2]))
    objective_output(model, KnowPAT(align_weight=0.0), [sample]).loss.backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    prompt, best = sample.group.prompt, sample.group.completions[1]
    ids = torch.tensor([[*prompt, *best]])
    labels = torch.tensor([[*[-100] * len(prompt), *best]])
    logits = model(input_ids=ids).logits  # not the model's own loss, which rounds to float32
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100).backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, atol=1e-10, rtol=1e-8)


def test_length_and_company_do_not_matter():
    question, other = [(2, -0.5), (1, -2.0), (0, -1.0)], [(0, -4.0), (1, -0.1)]
    alone = losses(KnowPAT(), [question], lengths=[2, 3, 4])
    assert losses(KnowPAT(), [question], lengths=[4, 6, 8]) == pytest.approx(alone)
    assert losses(KnowPAT(), [other, question])[1:] == pytest.approx(alone)
    lm = language()
    rows = samples(ranking([1, 2, 3]), ranking([2, 1], number=1))
    groups, batch = [row.group for row in rows], Batch.of(rows)
    packed, padded = (
        KnowPAT()(completion_logps(lm.model, groups, packed=how), None, batch).losses for how in (True, False)
    )
    torch.testing.assert_close(packed, padded)
    # A sum is not indifferent to length.
    summed = KnowPAT(length_normalize=False)
    assert losses(summed, [question], lengths=[2, 3, 4]) != pytest.approx(losses(summed, [question], [4, 6, 8]))


def test_equal_opinions_weigh_one_and_ties_are_not_compared():
    assert losses(KnowPAT(1.0), [[(2, -1.0), (1, -1.0), (0, -1.0)]], [1]) == pytest.approx(
        losses(KnowPAT(1.0, weights="uniform"), [[(2, -1.0), (1, -1.0), (0, -1.0)]], [1])
    )
    # Two are best: neither pushes the other; the mean is over the two that have a worse one.
    S = (-0.5, -1.5, -2.0)
    w = [(s - S[2]) / (S[0] - S[2]) for s in S]
    term = [math.log1p(math.exp(-s)) + math.log1p(math.exp(S[2])) for s in S]
    (found,) = losses(KnowPAT(1.0), [[(1, S[0]), (1, S[1]), (0, S[2])]])
    assert found == pytest.approx(-S[0] + (w[0] * term[0] + w[1] * term[1]) / 2)


def test_certain_and_hopeless_answers_stay_finite():
    for extreme in (-1e-12, -1e4):
        logps, batch = given_means([[(1, extreme), (0, -1.0), (2, -2.0)]], [1])
        token = logps.token.clone().requires_grad_()
        loss = KnowPAT()(logps.with_tokens(token), None, batch).loss
        loss.backward()
        assert bool(torch.isfinite(loss))
        assert bool(torch.isfinite(token.grad).all())


def test_official_lengths_are_those_of_the_released_code():
    """Its trainer, retold on dense logits: the mask is lost before the lengths are counted, so all are the row's."""
    lm = language(dtype=torch.float64)
    example = ranking([4, 3, 2, 1])
    objective = KnowPAT(align_weight=0.1, official_lengths=True)
    (row,) = samples(*with_padded_length([example], lm.tokenizer), objective=objective)
    found = objective_output(lm.model, objective, [row]).loss

    prompt, answers = row.group.prompt, row.group.completions
    width = len(prompt) + max(map(len, answers))
    gathered = torch.zeros(len(answers), width, dtype=torch.float64)
    for index, answer in enumerate(answers):
        ids = torch.tensor([[*prompt, *answer]])
        logp = lm.model(input_ids=ids).logits[0].log_softmax(-1)
        for place, token in enumerate(answer):
            gathered[index, len(prompt) - 1 + place] = logp[len(prompt) - 1 + place, token]
    scores = gathered.sum(1) / width
    align = 0.0
    for i in range(3):
        term = torch.log(1 + torch.exp(-scores[i]))
        for j in range(i + 1, 4):
            term = term + torch.log(1 + torch.exp(scores[j])) / (3 - i)
        align = align + term * (scores[i] - scores.min()) / (scores.max() - scores.min()) / 3
    torch.testing.assert_close(found, 0.1 * align - gathered[0].mean())
    with pytest.raises(UserError, match="padded_length"):
        objective_output(lm.model, objective, samples(example))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"align_weight": -0.1}, "align_weight"),
        ({"align_weight": math.nan}, "align_weight"),
        ({"weights": "equal"}, "'equal'"),
        ({"official_lengths": True, "length_normalize": False}, "official_lengths"),
    ],
)
def test_bad_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        KnowPAT(**options)


@pytest.mark.parametrize(
    ("scores", "match"),
    [([1.0], "one answer"), ([1.0, 1.0], "one and the same score"), ([1.0, math.nan], "not a finite number")],
)
def test_a_bad_question_is_named_by_its_row(scores, match):
    fine = Sample(Group((1,), ((5,), (6,))), (1.0, 0.0), {}, "rows.jsonl:1")
    bad = Sample(Group((1,), ((5,),) * len(scores)), tuple(scores), {}, "rows.jsonl:2")
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{match}"):
        objective_output(language().model, KnowPAT(), [fine, bad])


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "responses": ["a"], "scores": [1]},
        {"query": "q", "responses": ["a", "b"]},
        {"query": "q", "responses": ["a", ""], "scores": [2, 1]},
        {"query": "q", "responses": ["a", "b"], "scores": [2]},
    ],
)
def test_a_bad_record_of_the_papers_format_is_named_by_its_line(tmp_path, row):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "q", "responses": ["a", "b"], "scores": [2, 1]}\n' + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2"):
        list(read(path))


def test_training_ranks_the_answers_and_the_release_runs_from_a_file(tmp_path):
    lm = language()
    rows = samples(*(ranking([3, 2, 1, 0], number) for number in range(4)))
    policy = copy.deepcopy(lm.model)
    before = objective_output(policy, KnowPAT(), rows)
    optimise(policy, KnowPAT(1.0), rows, steps=60, batch=4, learning_rate=1e-2, rng=np.random.default_rng(0))
    after = objective_output(policy, KnowPAT(), rows)
    assert after.metrics["knowpat/likelihood"] < before.metrics["knowpat/likelihood"]
    assert after.metrics["rewards/margins"] > max(0.5, before.metrics["rewards/margins"])

    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"query": e.prompt, "responses": list(e.completions), "scores": list(e.scores)})
            for e in (ranking([1, 2, 3][: 2 + n % 2], n) for n in range(4))
        )
    )
    settings = TrainSettings(steps=3, batch=2, lora=2, learning_rate=1e-2, samples=0, held_out=0.0)
    done = train(language(), path, method="knowpat", out=tmp_path / "out", settings=settings)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert any("knowpat/alignment" in row for row in done.history)


def test_the_trainer_takes_what_the_builder_makes(tmp_path):
    tokenizer = tiny_tokenizer([*WORDS, "?", "Facts", *sorted({w for t in GRAPH for p in t for w in p.split()})])
    builder = KnowledgePreferenceBuilder(
        TripleLinker(GRAPH), k=1, prompt_template="Facts {triples} ? {question} ", answerers={"echo": last_fact}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an echo gives the same answer under different knowledge
        data = builder(["Peru capital", "Chile capital"], ["Lima a b", "Santiago a b"])
    data = [replace_bars(example) for example in data]
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True)
    trainer = PreferenceTrainer(
        tiny_model(tokenizer, seed=0, hidden=16),
        objective=KnowPAT(align_weight=0.1, length_normalize=True, weights="adaptive"),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
    )
    assert math.isfinite(trainer.train().training_loss)


# linking


GRAPH = [
    ("Peru", "capital", "Lima"),
    ("Peru", "currency", "sol"),
    ("Chile", "capital", "Santiago"),
    ("Chile", "currency", "peso"),
    ("Peru", "borders", "Chile"),
    ("Chile", "borders", "Peru"),
]


def last_fact(prompts):
    """Answers with the last fact's value, or says so."""
    return [p.split("?")[0].split()[-1] if "|" in p else "a" for p in prompts]


def replace_bars(example):
    return Example(
        prompt=example.prompt.replace("|", " "),
        completions=example.completions,
        scores=example.scores,
        kind="ranked",
        where=example.where,
    )


def test_a_triples_own_text_finds_it_first_and_duplicates_are_gone():
    linker = TripleLinker([*GRAPH, *GRAPH[:2]])
    assert linker.triples == tuple(GRAPH)
    assert linker.duplicates == 2
    for separator in (" ", " [SEP] "):
        found = linker.link([separator.join(triple) for triple in GRAPH], k=2)
        assert [own[0].triple for own in found] == GRAPH
        assert [own[0].similarity for own in found] == pytest.approx([1.0] * len(GRAPH))
        assert all(own[1].similarity < 0.99 for own in found)


def test_more_triples_than_there_are_is_all_of_them_with_a_warning():
    with pytest.warns(UserWarning, match="6 triples, fewer than k = 10"):
        (found,) = TripleLinker(GRAPH).link(["capital of Chile"])
    assert sorted(each.triple for each in found) == sorted(GRAPH)
    assert [each.similarity for each in found] == sorted((each.similarity for each in found), reverse=True)


class Vectors:
    """An encoder with the interface of sentence-transformers; keeps what it was asked."""

    def __init__(self, as_tensor):
        self.as_tensor, self.seen = as_tensor, []

    def encode(self, sentences):
        self.seen += sentences
        rows = [np.random.default_rng([len(text), *map(ord, text)]).normal(size=7) * len(text) for text in sentences]
        return torch.tensor(np.array(rows)) if self.as_tensor else np.array(rows)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_any_encoder_ranks_by_cosine(as_tensor):
    encoder = Vectors(as_tensor)
    linker = TripleLinker(GRAPH, encoder=encoder)
    assert encoder.seen[0] == "Peru [SEP] capital [SEP] Lima"
    questions = [f"question {number}" for number in range(600)]  # more than are compared at a time
    found = linker.link(questions, k=3)
    triples = Vectors(False).encode([" [SEP] ".join(triple) for triple in GRAPH])
    for question, own in zip(questions, found, strict=True):
        (vector,) = Vectors(False).encode([question])
        cosines = triples @ vector / np.linalg.norm(triples, axis=1) / np.linalg.norm(vector)
        order = np.argsort(-cosines)[:3]
        assert [each.triple for each in own] == [GRAPH[index] for index in order]
        assert [each.similarity for each in own] == pytest.approx(cosines[order].tolist())


def test_scripts_without_blanks_are_linked_by_character():
    graph = [("肾结石", "症状", "腰痛"), ("膀胱炎", "症状", "尿频"), ("肾结石", "检查", "CT扫描")]
    found = TripleLinker(graph).link(["肾结石有什么症状", "肾结石做CT扫描吗"], k=1)
    assert [own[0].triple for own in found] == [graph[0], graph[2]]


def test_a_question_that_matches_nothing_takes_the_graphs_order():
    (found,) = TripleLinker(GRAPH).link(["xyzzy"], k=3)
    assert [each.triple for each in found] == GRAPH[:3]
    assert [each.similarity for each in found] == [0, 0, 0]


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: TripleLinker([]), ValueError, "no triple"),
        (lambda: TripleLinker([GRAPH[0], ("Peru", "capital")]), ValueError, "triple 2"),
        (lambda: TripleLinker([GRAPH[0], ("Peru", "", "Lima")]), ValueError, "triple 2"),
        (lambda: TripleLinker(GRAPH, encoder="bge"), TypeError, "'bge'"),
        (lambda: TripleLinker(GRAPH, encoder=len), TypeError, "encode"),
        (lambda: TripleLinker(GRAPH).link(["", "x"], k=1), ValueError, "question 1"),
        (lambda: TripleLinker(GRAPH).link("Peru", k=1), ValueError, "list of texts"),
        (lambda: TripleLinker(GRAPH).link(["Peru"], k=0), ValueError, "k must"),
    ],
)
def test_bad_graphs_and_questions_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_an_encoder_that_loses_texts_is_an_error():
    class Short:
        def encode(self, sentences):
            return np.ones((len(sentences) - 1, 3))

    with pytest.raises(ValueError, match=r"\(5, 3\) of 6 texts"):
        TripleLinker(GRAPH, encoder=Short())


def test_without_scikit_learn_the_error_names_it_and_other_encoders_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(MissingExtra, match=r"sklearn.*counterproof"):
        TripleLinker(GRAPH)
    assert TripleLinker(GRAPH, encoder=Vectors(False)).triples == tuple(GRAPH)


# preference sets


def telling(name):
    """An answerer that says what it was shown, for the test to read."""
    return lambda prompts: [f"{name} saw {prompt}" for prompt in prompts]


def test_the_two_sets_are_ranked_as_said():
    builder = KnowledgePreferenceBuilder(
        TripleLinker(GRAPH),
        k=2,
        prompt_template="{triples}\n? {question}",
        answerers={"strong": telling("strong"), "weak": telling("weak")},
    )
    style, knowledge = builder(["What is the capital of Peru?"], ["Lima."])
    (prompt,) = builder.prompts(["What is the capital of Peru?"])
    assert style.prompt == knowledge.prompt == prompt
    assert style.completions == ("Lima.", f"strong saw {prompt}", f"weak saw {prompt}")
    assert style.scores == (3, 2, 1)
    assert style.columns["sources"] == ["golden", "strong", "weak"]
    assert knowledge.scores == (4, 3, 2, 1)
    golden, relevant, none, misleading = knowledge.completions
    assert (golden, relevant) == ("Lima.", f"strong saw {prompt}")
    assert none == "strong saw \n? What is the capital of Peru?"
    linked = [" | ".join(each.triple) for each in TripleLinker(GRAPH).link([style.columns["question"]], k=4)[0]]
    assert all(line in relevant and line not in misleading for line in linked[:2])
    assert all(line in misleading and line not in relevant for line in linked[2:])
    assert (style.columns["set_kind"], knowledge.columns["set_kind"]) == ("style", "knowledge")
    assert knowledge.where == "question 1 (knowledge set)"


def test_order_sets_and_chat_are_the_callers():
    asked = []

    def strong(prompts):
        asked.append(len(prompts))
        return [f"{len(prompt)} {prompt[0]['content']}" for prompt in prompts]

    builder = KnowledgePreferenceBuilder(
        TripleLinker(GRAPH),
        k=2,
        prompt_template=lambda question, triples: [
            {"role": "user", "content": f"{question} {len(triples)} {triples[:1]}"}
        ],
        answerers={"strong": strong},
        knowledge_order=("none", "misleading"),
    )
    made = builder(["Peru?", "Chile?"], ["a", "b"], sets=["knowledge"])
    assert [example.columns["sources"] for example in made] == [["golden", "strong, none", "strong, misleading"]] * 2
    assert made[0].completions[1] == [{"role": "assistant", "content": "1 Peru? 0 []"}]
    assert made[0].conversational
    assert asked == [2, 2]  # once per knowledge, all questions together, and no more than the sets need


def test_triples_are_shuffled_in_the_prompt_and_the_same_seed_repeats():
    builders = [
        KnowledgePreferenceBuilder(
            TripleLinker(GRAPH), k=3, prompt_template="{triples}\n{question}", answerers={"a": telling("a")}, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    questions = ["Peru capital Lima"] * 300
    one, same, other = (builder.prompts(questions) for builder in builders)
    assert one == same != other
    places = Counter(prompt.split("\n").index("Peru | capital | Lima") for prompt in one)
    assert all(70 < places[place] < 130 for place in range(3))  # each about 100, six standard deviations are 49


def test_equal_answers_keep_the_best_place_and_are_counted():
    builder = KnowledgePreferenceBuilder(
        TripleLinker(GRAPH), k=1, answerers={"a": lambda prompts: ["same"] * len(prompts)}
    )
    with pytest.warns(UserWarning, match=r"5 answers equal .* 1 sets"):
        made = builder(["Peru?", "Chile?"], ["golden", "same"], sets=["style", "knowledge"][1:])
    assert [example.completions for example in made] == [("golden", "same")]


def test_braces_in_questions_and_triples_are_text():
    linker = TripleLinker([("{question}", "is", "{triples}"), ("x", "y", "z")])
    builder = KnowledgePreferenceBuilder(
        linker, k=1, prompt_template="{triples} ? {question}", answerers={"a": telling("a")}
    )
    assert builder.prompts(["{0} question"]) == ["{question} | is | {triples} ? {0} question"]


@pytest.mark.parametrize(
    ("options", "call", "match"),
    [
        ({"k": 0}, {}, "k must"),
        ({"prompt_template": "{question}"}, {}, "triples"),
        ({"knowledge_order": ("none", "none")}, {}, "knowledge_order"),
        ({"answerers": {}}, {}, "no answerer"),
        ({"k": 6}, {}, "none beyond the 6 nearest"),
        ({}, {"golden": ["x", "y"]}, "1 questions and 2 golden"),
        ({}, {"golden": [""]}, "golden answer 1"),
        ({}, {"questions": [" "]}, "question 1"),
        ({}, {"sets": ("manner",)}, "manner"),
        ({"answerers": {"mute": lambda prompts: [""] * len(prompts)}}, {}, "answer of 'mute' 1"),
        ({"answerers": {"lazy": lambda prompts: []}}, {}, "'lazy' gave 0 answers to 1"),
    ],
)
def test_bad_use_of_the_builder_is_named(options, call, match):
    with pytest.raises(ValueError, match=match):
        KnowledgePreferenceBuilder(TripleLinker(GRAPH), **{"k": 2, "answerers": {"a": telling("a")}, **options})(
            **{"questions": ["Peru?"], "golden": ["x"], **call}
        )


# what is measured


def test_the_tiny_language_asks_about_other_entities_than_it_teaches():
    budget = {**claims.TASK.budgets["quick"].settings, "base_texts": 64, "base_steps": 1}
    world = claims._tiny(Trial(seed=1, settings=budget))
    train_entities, test_entities = (
        {question.prompt.split("?")[1].split()[0] for question in part} for part in (world.train, world.test)
    )
    assert not train_entities & test_entities
    places = Counter()
    for question in [*world.train, *world.test]:
        facts, asked = question.prompt.split(" ? ")
        triples = list(itertools.batched(facts.split(), 3)) if sys.version_info >= (3, 12) else None
        triples = triples or [tuple(facts.split()[i : i + 3]) for i in (0, 3, 6)]
        (right,) = [triple for triple in triples if triple[:2] == tuple(asked.split())]
        places[triples.index(right)] += 1
        assert right[2] == question.value
        assert sorted(t[2] for t in triples if t != right) == sorted(question.misleading)
        assert question.right(question.style[0])
        assert not any(question.right(text) for text in (*question.wrong, world.unknown))
    assert min(places.values()) > 120  # of 512 in three places
    # Right and misleading sentences differ in the value alone, so length tells nothing.
    assert all(len(q.wrong[0].split()) == len(q.style[0].split()) for q in world.test)


@pytest.mark.parametrize("arm", [claims.SFT_TOKENS, claims.DPO, claims.KNOWPAT], ids=lambda arm: arm.name)
def test_a_trial_measures_what_the_task_declares_and_counts_tokens(arm):
    small = {"base_texts": 64, "base_steps": 2, "train": 8, "test": 8, "steps": 6, "batch": 4, "points": 2}
    trial = Trial(seed=1, settings={**claims.TASK.budgets["quick"].settings, **small})
    found = claims.run_facts(arm, trial)
    assert set(found) == set(claims.TASK.metrics)
    assert all(math.isfinite(value) for value in found.values())
    # Answers of 6, 2, 8 and 3 tokens with their ends; of 6, 2 and 6.
    everything = 6 * 4 * (19 + 14) / 2
    if arm is claims.SFT_TOKENS:
        assert found["scored_tokens"] == pytest.approx(everything, abs=4 * 6 / 2)
    elif arm is claims.KNOWPAT:
        assert found["scored_tokens"] == everything
    else:
        assert found["scored_tokens"] == 8 * (9 + 12) + 6 * 4 * (9 + 12) / 2


def test_countries_have_facts_and_neighbours():
    pytest.importorskip("countryinfo")
    facts, near = claims.country_facts()
    assert claims.Fact("France", "capital", "Paris") in facts
    assert "Spain" in near["France"]
    assert len(facts) == 6 * len(near) > 1000
    fact = claims.Fact("France", "capital", "Paris")
    rng = np.random.default_rng(0)
    neighbour, other = claims._misleading(fact, facts, near["France"], rng)
    assert neighbour.entity in near["France"]
    assert (other.entity, neighbour.relation) == ("France", "capital")
    question = claims._country_question([fact, neighbour, other], rng)
    assert question.right(question.style[0])
    assert not any(map(question.right, [*question.wrong, "Parisian"]))
    matches = [bool(re.fullmatch(question.form, text)) for text in (*question.style, *question.knowledge)]
    assert matches == [True, False, False, False, True, False, True]


def test_the_baselines_do_not_know_the_method():
    assert {claim.baseline.method for claim in claims.CLAIMS if not claim.baseline.name.startswith("knowpat")} == {
        f"counterproof.preference.objectives:{name}" for name in ("SFT", "RRHF", "DPO")
    }
    assert SFT.name == "sft"
