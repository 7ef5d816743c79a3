"""I-SHEEP: parser, threshold, ROUGE-L, rules, stages by hand, what training starts from and learns, resuming."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from counterproof.errors import UserError
from counterproof.language import Language
from counterproof.language.sampling import Generation
from counterproof.language.tiny import tiny_model, tiny_tokenizer
from counterproof.preference import i_sheep as module
from counterproof.preference.data import Example, encode
from counterproof.preference.forward import objective_output
from counterproof.preference.i_sheep import (
    INSTRUCTION_RULES,
    RESPONSE_RULES,
    Grades,
    Instruction,
    ISheep,
    ISheepTraining,
    SelfAssessor,
    SelfPair,
    apply_rules,
    below_perplexity,
    drop_duplicates,
    fine_tune,
    grades_above,
    parse_instructions,
    parse_score,
    perplexities,
    propose_instructions,
    read_seed_tasks,
    respond,
    rouge_l,
)
from counterproof.preference.objectives import SFT, Sample
from counterproof.preference.trainer import TrainSettings, find_method, train

FACTS = [*(f"q{i}" for i in range(12)), *(f"a{i}" for i in range(12))]
WORDS = [*FACTS, "rate", ":", "user", *(f"{k}||" for k in range(1, 11))]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}user {{ m.content }} : {% else %}{{ m.content }}</s>{% endif %}"
    "{% endfor %}"
)
LORA = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
QUESTIONS = [f"q{i} q{j}" for i in range(4) for j in range(3)]


def language(seed=0, template=TEMPLATE):
    tokenizer = tiny_tokenizer(WORDS)
    tokenizer.chat_template = template
    model = tiny_model(tokenizer, seed=seed, hidden=16, layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3
    return Language(model, tokenizer)


def weights(model):
    return torch.cat([value.flatten() for _, value in sorted(model.state_dict().items())])


def pairs_of(grades):
    return [SelfPair(f"q{i}", "", "a1", *both) for i, both in enumerate(grades)]


def loop(base, **more):
    """Rounds whose proposals and grades come from their seeds, and whose answers come from the model."""

    def propose(language, n, *, number, seed):
        return [Instruction(QUESTIONS[i]) for i in np.random.default_rng(seed).integers(len(QUESTIONS), size=n)]

    def assess(language, pairs, *, number, seed):
        return [Grades(*map(int, row)) for row in np.random.default_rng(seed).integers(8, 11, size=(len(pairs), 2))]

    settings = {
        "n_per_round": 12,
        "rounds": 3,
        "duplicates": None,
        "instruction_rules": {},
        "response_rules": {"empty": RESPONSE_RULES["empty"]},
        "peft_config": LORA,
        "training": {"steps": 2, "learning_rate": 1e-2},
        "max_new_tokens": 6,
        "propose": propose,
        "assess": assess,
    }
    return ISheep(base, QUESTIONS, **(settings | more))


# grades


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("9||good", 9),
        (" 8.6||", 9),
        ("||x", None),
        ("11", None),
        ("Score: 7", None),
        ("10", 10),
        ("0", None),
        ("Score: 7||fine", 7),
        ("", None),
        ("8.4 of 10", 8),
    ],
)
def test_scores_are_parsed_exactly(text, score):
    assert parse_score(text) == score


def test_the_threshold_is_exclusive_on_both_grades():
    grades = [(q, f) for q in (None, *range(1, 11)) for f in (None, *range(1, 11))]
    pairs = pairs_of(grades)
    assert {(p.quality, p.following) for p in grades_above(pairs)} == {(9, 9), (9, 10), (10, 9), (10, 10)}
    assert grades_above(pairs, 0) == [p for p in pairs if p.quality and p.following]
    assert grades_above(pairs, 10) == []
    assert {p.quality for p in grades_above(pairs, by=["quality"])} == {9, 10}
    assert len(grades_above(pairs, by=["quality"])) == 2 * 11


def test_nothing_kept_ends_the_iteration_with_a_reason():
    rounds = iter(held := loop(language(), threshold=10))
    with pytest.raises(StopIteration, match=r"round 1: nothing is left.*kept 0; threshold 10") as stopped:
        next(rounds)
    assert stopped.value.value == held.stopped


def test_threshold_zero_equals_no_filter_when_all_grades_are_understood():
    base = language()
    graded, free = (next(iter(loop(base, threshold=threshold))) for threshold in (0, None))
    assert torch.equal(weights(graded.model), weights(free.model))
    assert free.kept[0].quality is None
    assert free.parse_rate == 1
    assert free.yield_ == len(free.kept) / 12


def test_no_parsed_grade_at_all_is_an_error():
    with pytest.raises(UserError, match=r"none of \d+ gradings has a score"):
        next(iter(loop(language(), assess=lambda g, pairs, *, number, seed: [Grades(None, None)] * len(pairs))))


def test_the_expected_grade_is_the_mean_by_the_models_probabilities():
    judge = language(3)
    pair = SelfPair("q1 q2", "", "a3")
    assessor = SelfAssessor(
        judge, quality_prompt="rate {instruction} {response} :", following_prompt=None, expected=True
    )
    (grades,) = assessor.score([pair])
    ids = judge.tokenizer("rate q1 q2 a3 :", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = judge.model(ids).logits[0, -1].double()
    chance = logits[judge.tokenizer.convert_tokens_to_ids([f"{k}||" for k in range(1, 11)])].softmax(0)
    assert grades.quality == pytest.approx(float(chance @ torch.arange(1.0, 11.0, dtype=torch.float64)), abs=1e-4)
    assert grades.following is None


def test_sampled_grades_are_those_of_the_text_and_prompts_keep_their_braces(monkeypatch):
    seen = []

    def fake(language, prompts, **settings):
        seen.append((list(prompts), settings["temperature"]))
        return [[Generation(text, (1,), (0.0,), "eos")] for text in ("9||yes", "none")]

    monkeypatch.setattr(module, "generate", fake)
    pairs = [SelfPair("say {response}", "x {y}", "a"), SelfPair("b", "", "{instruction}")]
    grades = SelfAssessor(language(), quality_prompt="{instruction}>{response}").score(pairs)
    assert grades == [(9, 9), (None, None)]
    assert seen[0] == (["say {response}\nx {y}>a", "b>{instruction}"], 1.0)


def test_the_filter_has_the_precision_of_bayes_rule():
    p, a, b = 0.35, 0.9, 0.2
    rng = np.random.default_rng(0)
    right = rng.random(40_000) < p
    high = rng.random(40_000) < np.where(right, a, b)
    pairs = [SelfPair("", "", "right" if r else "", 9 if h else 2, 9) for r, h in zip(right, high, strict=True)]
    kept = grades_above(pairs)
    assert np.mean([bool(pair.response) for pair in kept]) == pytest.approx(p * a / (p * a + (1 - p) * b), abs=0.01)


# texts and rules


def test_rouge_l_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    rng = np.random.default_rng(0)
    words = ["write", "a", "Poem,", "about", "the", "sea-side", "It's", "2nd", "...", "é"]
    for _ in range(200):
        one, two = (" ".join(rng.choice(words, size=rng.integers(0, 9))) for _ in range(2))
        assert rouge_l(one, two) == pytest.approx(scorer.score(one, two)["rougeL"].fmeasure, abs=1e-12)


def test_of_duplicates_the_first_wins_and_the_bound_is_inclusive():
    ten = "a b c d e f g h i j"
    at, above = "a b c d e f g x y z", "a b c d e f g h x y"
    assert rouge_l(ten, at) == 0.7
    texts = [ten, above, at, ten]
    tasks = [Instruction(text) for text in texts]
    assert drop_duplicates(tasks) == [tasks[0], tasks[2]]
    assert drop_duplicates(tasks[1:]) == [tasks[1]]  # `at` and `ten` are both too like `above`
    assert drop_duplicates(tasks, [Instruction(ten)]) == [tasks[2]]
    rng = np.random.default_rng(0)
    many = [Instruction(" ".join(rng.choice(list("abcd"), size=rng.integers(1, 9)))) for _ in range(60)]
    kept = []
    for task in many:
        if all(rouge_l(task.instruction, other.instruction) <= 0.7 for other in kept):
            kept.append(task)
    assert drop_duplicates(many) == kept


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("length", Instruction("Write a poem"), Instruction("Write a short poem")),
        ("tools", Instruction("Draw me a small horse"), Instruction("Describe the drawbridge of Mapleton")),
        ("beginning", Instruction("- name three old rivers"), Instruction("3 rivers that you know")),
        ("url", Instruction("Summarise https://a.example for me"), Instruction("Summarise this text for me")),
        ("label", Instruction("Input: sort these words please"), Instruction("Describe your input device briefly")),
        ("noinput", Instruction("Name three rivers <noinput> now"), Instruction("Name three rivers right now")),
    ],
)
def test_instruction_rules(rule, bad, good):
    assert INSTRUCTION_RULES[rule](bad)
    assert apply_rules([bad, good], {rule: INSTRUCTION_RULES[rule]}) == ([good], {rule: 1})
    assert apply_rules([good], INSTRUCTION_RULES) == ([good], dict.fromkeys(INSTRUCTION_RULES, 0))


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("empty", " \n", "Yes."),
        ("turn", "Yes.\nHuman: and now?", "Humans ask: why."),
        ("choices", "Answer Choices: x", "The choices are x."),
        ("options", "See:\nA. one\nB. two", "It was made by a. n. other."),
        ("question", "Paris.\n\nWhat is the capital of Peru?", "Who knows?"),
        ("noinput", "<noinput>", "no input"),
        ("cjk", "水 is water", "Wasser is water, água too"),
        ("repeated", "whatever", "fine"),
    ],
)
def test_response_rules(rule, bad, good):
    given = ("sort this: b a", "b a") if rule == "repeated" else ("sort this", "b a")
    dropped, kept = SelfPair(*given, bad), SelfPair("sort this", "b a", good)
    assert apply_rules([dropped, kept], {rule: RESPONSE_RULES[rule]}) == ([kept], {rule: 1})
    assert apply_rules([kept], RESPONSE_RULES)[0] == [kept]


def test_lists_are_parsed_without_their_last_task():
    items = [
        " Name a river.\n3. Input:\n<noinput>",
        "4. Instruction: Sort.\n4. Input:\nb a",
        "5. no",
        "6. Instruction: X",
    ]
    text = "\n###\n".join(items) + "\n6. Input:\ncu"
    assert parse_instructions(text) == [Instruction("Name a river."), Instruction("Sort.", "b a")]


def test_proposals_ask_with_demonstrations_until_there_are_enough(monkeypatch):
    asked = []

    def fake(language, prompts, **settings):
        asked.extend(prompts)
        return [[Generation(" New one.\n3. Input:\nx\n###\n", (1,), (0.0,), "length")] for _ in prompts]

    monkeypatch.setattr(module, "generate", fake)
    seeds = [Instruction("One."), Instruction("Two.", "given")]
    found = propose_instructions(language(), seeds, 3, demonstrations=2, meta_prompt="List:\n", seed=1)
    assert found == [Instruction("New one.", "x")] * 3
    shown = [("One.", "<noinput>"), ("Two.", "given")]
    lists = []
    for (a, x), (b, y) in (shown, shown[::-1]):
        head = f"List:\n1. Instruction: {a}\n1. Input:\n{x}\n###\n"
        lists.append(f"{head}2. Instruction: {b}\n2. Input:\n{y}\n###\n3. Instruction:")
    assert set(asked) <= set(lists)
    asked.clear()
    weighted = [Instruction("One.", perplexity=1e-6), Instruction("Two.", perplexity=1e6)]
    propose_instructions(language(), weighted, 3, demonstrations=1, weights="perplexity", meta_prompt="", seed=1)
    assert all("One." in prompt for prompt in asked)


def test_seeds_are_read_from_files_records_and_examples(tmp_path):
    path = tmp_path / "seeds.jsonl"
    rows = [{"instruction": "Go.", "instances": [{"input": "x"}]}, {"instruction": "Stop.", "ppl": 3.5}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_seed_tasks(path) == [Instruction("Go.", "x"), Instruction("Stop.", "", 3.5)]
    example = Example(prompt=[{"role": "user", "content": "Hi."}], completions=(), scores=(), kind="prompt")
    assert read_seed_tasks([example, "Plain."]) == [Instruction("Hi."), Instruction("Plain.")]
    path.write_text('{"instruction": "Go."}\n{"task": "x"}')
    with pytest.raises(UserError, match=r"seeds\.jsonl:2 has no instruction"):
        read_seed_tasks(path)


def test_perplexities_are_those_of_transformers():
    base = language(1)
    texts = ["q1 q2 a3", "a1 a1", "q5"]
    for text, found in zip(texts, perplexities(base, texts), strict=True):
        ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert found == pytest.approx(math.exp(base.model(ids, labels=ids).loss), rel=1e-4)
    alone = perplexities(base, ["a1", "a2"])
    pairs = [SelfPair("q1", "", "a1"), SelfPair("q1", "", "a2")]
    kept = below_perplexity(base, pairs, bound=1e9)
    assert kept == pairs
    assert below_perplexity(base, pairs, bound=min(alone)) == []


# training


@pytest.mark.parametrize("chat", [True, False])
def test_the_loss_is_on_the_responses_tokens_alone(chat):
    base = language(2)
    pair = SelfPair("q1 q2", "q3", "a3 a4")
    group = encode(pair.example(chat=chat), base.tokenizer, max_length=64).group
    ids = torch.tensor([[*group.prompt, *group.completions[0]]])
    labels = ids.clone()
    labels[:, : len(group.prompt)] = -100
    assert base.tokenizer.decode(labels[0, len(group.prompt) :]) == "a3 a4 </s>"
    loss = objective_output(base.model, SFT(), [Sample(group, (1.0,))]).loss
    assert float(loss.detach()) == pytest.approx(float(base.model(ids, labels=labels).loss.detach()), abs=1e-5)


def test_a_round_trains_the_base_the_current_model_or_the_base_on_everything():
    base = language()
    before = weights(base.model)
    seen = {"base": [], "current": [], "all": []}
    for way, calls in seen.items():

        def spy(start, pairs, *, number, seed, calls=calls):
            calls.append((weights(start.model), list(pairs)))
            return fine_tune(start, pairs, peft_config=LORA, steps=2, learning_rate=1e-2, seed=seed)

        states = list(loop(base, train_from=way, train=spy))
        for index, (start, data) in enumerate(calls):
            came_from = before if way != "current" or index == 0 else weights(states[index - 1].model)
            assert torch.equal(start, came_from)
            used = states[: index + 1] if way == "all" else [states[index]]
            assert data == [pair for state in used for pair in state.kept]
        assert not torch.equal(weights(states[-1].model), before)
    assert torch.equal(weights(base.model), before)


def test_one_round_is_a_one_shot_run_of_its_stages():
    base = language()
    held = loop(base, rounds=1)
    (state,) = held
    seeds = [int(s) for s in np.random.SeedSequence([0, 1]).generate_state(4)]
    tasks = held.propose(base, 12, number=1, seed=seeds[0])
    pairs, _ = apply_rules(
        respond(base, tasks, max_new_tokens=6, seed=seeds[1]), {"empty": lambda pair: not pair.response}
    )
    grades = held.assess(base, pairs, number=1, seed=seeds[2])
    kept = grades_above([SelfPair(p.instruction, p.input, p.response, *g) for p, g in zip(pairs, grades, strict=True)])
    assert state.kept == tuple(kept)
    tuned = fine_tune(base, kept, peft_config=LORA, steps=2, learning_rate=1e-2, seed=seeds[3])
    assert torch.equal(weights(tuned.model), weights(state.model))
    assert state.counts["proposed"] == 12
    dropped = sum(count for name, count in state.counts.items() if "/" in name or name in ("filter", "kept"))
    assert dropped == 12


def test_the_grader_is_the_base_or_the_generator():
    base = language()
    graders = []

    def assess(grader, pairs, *, number, seed):
        graders.append(weights(grader.model))
        return [Grades(9, 9)] * len(pairs)

    list(loop(base, rounds=2, assess=assess))
    assert all(torch.equal(own, weights(base.model)) for own in graders)
    graders.clear()
    first, _ = loop(base, rounds=2, assess=assess, grader="current", truth=lambda pair: pair.response.startswith("a"))
    assert torch.equal(graders[1], weights(first.model))
    assert first.precision == np.mean([pair.response.startswith("a") for pair in first.kept])


def test_it_trains_any_causal_model_and_its_result_is_a_plain_one():
    tokenizer = language().tokenizer
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2
    )
    base = Language(GPT2LMHeadModel(config).eval(), tokenizer)
    state = next(iter(loop(base, threshold=None)))
    assert type(state.model) is GPT2LMHeadModel
    assert weights(state.model).shape == weights(base.model).shape


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    base = language()
    for way in ("base", "current", "all"):
        whole = list(loop(base, train_from=way))
        folder = tmp_path / way
        first = next(iter(loop(base, train_from=way, out=folder)))
        assert torch.equal(weights(first.model), weights(whole[0].model))

        def fails(*args, **more):
            raise KeyboardInterrupt

        def stop(language, pairs, *, number, seed):
            raise KeyboardInterrupt

        stop.__qualname__ = ISheep._train.__qualname__
        with pytest.raises(KeyboardInterrupt):  # in round 2, after its pairs were made
            list(loop(base, train_from=way, out=folder, train=stop))
        assert (folder / "round-2.part" / "pairs.json").exists()
        resumed = list(loop(base, train_from=way, out=folder))
        assert [state.round for state in resumed] == [1, 2, 3]
        for one, other in zip(whole, resumed, strict=True):
            assert torch.equal(weights(one.model), weights(other.model))
            assert (one.generated, one.kept, one.counts) == (other.generated, other.kept, other.counts)
            assert (one.parse_rate, one.yield_) == (other.parse_rate, other.yield_)
        again = copy.copy(held := loop(base, train_from=way, out=folder))
        again.train = partial(fails)
        again._claim = held._claim
        assert len(list(again)) == 3  # nothing is made anew
    with pytest.raises(UserError, match="holds another run \\(its train_from differ"):
        list(loop(base, train_from="current", out=tmp_path / "base"))
    with pytest.raises(UserError, match="holds another run \\(its model differ"):
        list(loop(language(5), train_from="base", out=tmp_path / "base"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rounds": 0}, "rounds is 0"),
        ({"grader": "me"}, "grader is 'me'"),
        ({"train_from": "scratch"}, "train_from is 'scratch'"),
    ],
)
def test_arguments_out_of_range(more, message):
    with pytest.raises(ValueError, match=message):
        loop(language(), **more)


def test_missing_seeds_template_and_proposals_are_said():
    with pytest.raises(UserError, match="no seed tasks"):
        ISheep(language(), [])
    with pytest.raises(UserError, match="no chat template"):
        ISheep(language(template=None), ["q1"])
    with pytest.raises(UserError, match="proposed no instruction"):
        next(iter(loop(language(), propose=lambda *a, **k: [])))


def test_the_command_line_finds_it_and_it_trains_by_the_trainer(tmp_path, monkeypatch):
    method = find_method("i-sheep", n_per_round=6, rounds=2, threshold=None, max_new_tokens=5)
    assert isinstance(method, ISheepTraining)

    def proposed(language, seeds, n, *, seed, **more):
        return [Instruction(f"q{i} q{i + 1} q{i + 2} q{i + 3}") for i in range(n)]

    monkeypatch.setattr(module, "propose_instructions", proposed)
    examples = [Example(prompt="q11 a11", completions=(), scores=(), kind="prompt")]
    settings = TrainSettings(steps=2, batch=2, lora=2, held_out=0.0)
    monkeypatch.setattr(module, "drop_duplicates", lambda tasks, *a, **k: list(tasks))
    done = train(language(), examples, method=method, out=tmp_path / "run", held_out=(), settings=settings)
    assert [row["step"] for row in done.history] == [1, 2]
    assert (tmp_path / "run" / "model.safetensors").exists()
