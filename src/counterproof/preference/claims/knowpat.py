"""Does ranking by style and knowledge teach more than golden answers alone, when a prompt holds wrong facts too?"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task, Trial
from counterproof.errors import UserError, extra

if TYPE_CHECKING:
    import numpy as np

    from counterproof.language import Group, Language
    from counterproof.preference.data import Text
    from counterproof.preference.objectives import Sample

_TINY: Mapping[str, Any] = {
    "world": "tiny",
    "base_texts": 8192,
    "base_steps": 400,
    "train": 256,
    "test": 256,
    # Three passes over both sets of every question in batches of eight, as the paper's recipes have it.
    "steps": 192,
    "batch": 8,
    "learning_rate": 1e-3,
    "longest": 12,
    "temperature": 1.0,
    "points": 10,
}
_COUNTRIES: Mapping[str, Any] = {
    "world": "countries",
    "train": 120,
    "test": 60,
    "steps": 60,
    "batch": 2,
    "learning_rate": 3e-4,
    "lora": 16,
    "layers": 10,
    "longest": 32,
    "temperature": 0.3,
    "points": 1,
}

TASK = Task(
    name="misleading-facts",
    says=(
        "a language model learns to answer questions from facts in the prompt, the right one and two that mislead, and "
        "to keep a form; it is tested on other entities than those it is trained on, so that reading counts, not memory"
    ),
    run="counterproof.preference.claims.knowpat:run_facts",
    metrics={
        "gap": Metric(
            "higher",
            "nats",
            says="log-probability of the right held-out answer, less the mean over the two with a misleading value",
        ),
        "accuracy": Metric("higher", says="share of sampled answers with the right value and no other"),
        "style": Metric("higher", says="share of sampled answers in the golden form, whatever their value"),
        "refusals": Metric("lower", says="share of sampled answers that say they do not know"),
        "golden": Metric("higher", "nats per token", says="mean log-probability of the held-out golden answers"),
        "scored_tokens": Metric("lower", "tokens", says="completion tokens that training scored, references included"),
    },
    budgets={
        "quick": Budget(settings=_TINY, seeds=(4, 12), minutes=4.0),
        "standard": Budget(settings=_COUNTRIES, seeds=(3, 4), minutes=40.0, trial_minutes=40.0),
        "full": Budget(
            settings={**_COUNTRIES, "train": 800, "test": 200, "steps": 600, "batch": 8, "layers": 30, "points": 10},
            seeds=(5, 12),
            minutes=None,
            trial_minutes=60.0,
        ),
    },
    plug=(
        "an objective of the room, built with the arm's settings; of these, `sets` (both, style, knowledge), `answers` "
        "(ranked, best, best_worst) and `equal` (steps, or scored tokens of ranked answers in both sets) are the task's"
    ),
)

METHOD = "counterproof.preference.knowpat:KnowPAT"
CORE = "counterproof.preference.objectives:"
GOLDEN_ONLY = {"answers": "best"}
SFT = Arm("sft", CORE + "SFT", GOLDEN_ONLY)
SFT_TOKENS = Arm("sft-equal-tokens", CORE + "SFT", {**GOLDEN_ONLY, "equal": "tokens"})
RRHF = Arm("rrhf", CORE + "RRHF")
DPO = Arm("dpo", CORE + "DPO", {"answers": "best_worst", "beta": 0.1})
KNOWPAT = Arm("knowpat", METHOD)
HEAVY = Arm("knowpat-heavy", METHOD, {"align_weight": 1.0})
STYLE_ONLY = Arm("knowpat-no-knowledge-set", METHOD, {"sets": "style"})
KNOWLEDGE_ONLY = Arm("knowpat-no-style-set", METHOD, {"sets": "knowledge"})
UNIFORM = Arm("knowpat-uniform", METHOD, {"weights": "uniform"})


class Fact(NamedTuple):
    """A triple."""

    entity: str
    relation: str
    value: str


@dataclass(frozen=True)
class Question:
    """A question about a fact, with misleading ones beside it in the prompt, and its answers by set, best first.

    Attributes:
        prompt: with the facts, in random order.
        style: golden, bare value, repeated, off the form.
        knowledge: golden, "I do not know", a misleading value in the golden form.
        wrong: the golden form with each misleading value.
        value: the right one; misleading: the others.
        form: what an answer in the golden form matches.
    """

    prompt: "Text"
    style: tuple[str, ...]
    knowledge: tuple[str, ...]
    wrong: tuple[str, ...]
    value: str
    misleading: tuple[str, ...]
    form: str

    def right(self, answer: str) -> bool:
        """Whether the answer has the right value and no misleading one."""
        return _has(answer, self.value) and not any(_has(answer, value) for value in self.misleading)


def _has(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


class World(NamedTuple):
    """A language model, its questions, and how it says that it does not know."""

    language: "Language"
    train: list[Question]
    test: list[Question]
    unknown: str
    start: "Callable[[], Any]"  # in which the model is what it began as


def run_facts(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """One arm on one seed; see `TASK`."""
    from counterproof.preference.forward import optimise, referenced

    settings, options = trial.settings, dict(arm.settings)
    kinds = {"both": ("style", "knowledge"), "style": ("style",), "knowledge": ("knowledge",)}[
        options.pop("sets", "both")
    ]
    answers, equal = options.pop("answers", "ranked"), options.pop("equal", "steps")
    with trial.off_clock():
        world = (_tiny if settings["world"] == "tiny" else _countries)(trial)
        test = _Test(world, trial)
    model, tokenizer = world.language.model, world.language.tokenizer
    objective = arm.load()(**options)
    samples = [_sample(tokenizer, question, kind, answers) for question in world.train for kind in kinds]
    references = 0
    if "reference" in objective.needs:
        with world.start():
            samples = referenced(model, samples)
        references = _tokens(samples)
    steps, batch = settings["steps"], settings["batch"]
    per_step = batch * _tokens(samples) / len(samples)
    if equal == "tokens":
        everything = [_sample(tokenizer, q, kind, "ranked") for q in world.train for kind in ("style", "knowledge")]
        budget = steps * batch * _tokens(everything) / len(everything)
        steps = max(1, round((budget - references) / per_step))
    every = max(1, steps // settings["points"])

    def watch(step: int, _: Any) -> None:
        if step % every == 0 and step < steps:
            with trial.off_clock():
                trial.log(step / steps, step=step, **test.scores(few=True))
        else:
            trial.log(step / steps)

    try:
        optimise(
            model,
            objective,
            samples,
            steps=steps,
            batch=batch,
            learning_rate=settings["learning_rate"],
            rng=trial.rng("batches"),
            watch=watch,
        )
    except ArithmeticError as problem:
        raise Diverged(str(problem)) from None
    with trial.off_clock():
        return {**test.scores(), **test.answers(), "scored_tokens": references + steps * per_step}


def _tokens(samples: "Sequence[Sample]") -> int:
    return sum(len(completion) for sample in samples for completion in sample.group.completions)


def _sample(tokenizer: Any, question: Question, kind: str, answers: str) -> "Sample":
    """A question with one of its sets: all answers, the best, or the best and the worst."""
    from counterproof.preference.objectives import Sample

    texts = question.style if kind == "style" else question.knowledge
    chosen = {"ranked": texts, "best": texts[:1], "best_worst": (texts[0], texts[-1])}[answers]
    scores = tuple(float(rank) for rank in range(len(chosen) - 1, -1, -1))
    return Sample(_group(tokenizer, question.prompt, chosen), scores)


def _group(tokenizer: Any, prompt: "Text", texts: Sequence[str]) -> "Group":
    from counterproof.preference.data import Example, encode

    completions = texts if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]
    example = Example(
        prompt=prompt,
        completions=tuple(completions),  # type: ignore[arg-type]
        scores=(1.0,) * len(texts),
        kind="ranked" if len(texts) > 1 else "completion",
    )
    return encode(example, tokenizer, max_length=512, trim_after_eos=True).group


class _Test:
    """What is measured on the held-out questions."""

    def __init__(self, world: World, trial: Trial) -> None:
        self.world, self.settings = world, trial.settings
        self.seed = int(trial.rng("answers").integers(2**31))
        self.groups = [_group(world.language.tokenizer, q.prompt, (q.style[0], *q.wrong)) for q in world.test]

    def scores(self, *, few: bool = False) -> dict[str, float]:
        """By log-probabilities alone; on a quarter of the questions for the learning curve."""
        import torch

        from counterproof.language import batches, completion_logps

        groups = self.groups[: len(self.groups) // 4] if few else self.groups
        sums, means = [], []
        with torch.no_grad():
            for run in batches(groups, 4096):
                logps = completion_logps(self.world.language.model, [groups[index] for index in run])
                sums.append(logps.sum())
                means.append(logps.mean())
        right, *wrong = torch.cat(sums).double().view(len(groups), -1).unbind(1)
        golden = torch.cat(means).double().view(len(groups), -1)[:, 0]
        return {"gap": float((right - torch.stack(wrong).mean(0)).mean()), "golden": float(golden.mean())}

    def answers(self) -> dict[str, float]:
        """By what the model says."""
        from counterproof.language.sampling import generate

        questions = self.world.test
        drawn = generate(
            self.world.language,
            [list(group.prompt) for group in self.groups],
            max_new_tokens=self.settings["longest"],
            temperature=self.settings["temperature"],
            seed=self.seed,
            batch_size=256 if self.settings["world"] == "tiny" else 20,
        )
        texts = [own[0].text.strip() for own in drawn]
        count = len(texts)
        return {
            "accuracy": sum(q.right(text) for q, text in zip(questions, texts, strict=True)) / count,
            "style": sum(bool(re.fullmatch(q.form, text)) for q, text in zip(questions, texts, strict=True)) / count,
            "refusals": sum(self.world.unknown in text for text in texts) / count,
        }


def _misleading(
    fact: Fact, facts: Sequence[Fact], near: Sequence[str], rng: "np.random.Generator"
) -> tuple[Fact, Fact]:
    """Facts with other values: the same relation of an entity that is near, another relation of the same entity."""
    same_relation = [
        f for f in facts if f.relation == fact.relation and f.entity != fact.entity and f.value != fact.value
    ]
    neighbours = [f for f in same_relation if f.entity in near] or same_relation
    neighbour = neighbours[int(rng.integers(len(neighbours)))]
    taken = (fact.value, neighbour.value)
    others = [f for f in facts if f.entity == fact.entity and f.relation != fact.relation and f.value not in taken]
    return neighbour, others[int(rng.integers(len(others)))]


# the tiny language


RELATIONS = ("capital", "river", "food", "game")
ENTITIES = tuple(f"land{number}" for number in range(24))
VALUES = tuple(f"thing{number}" for number in range(16))
# Whose value an answerer in the text takes: the right one, the neighbour's, the other relation's, none.
HABITS = (0.4, 0.3, 0.2, 0.1)
RECITALS = 0.6  # share of the text that recites the facts in another order
UNKNOWN = "sorry"


def _tiny(trial: Trial) -> World:
    """A small model with short convolutions and attention, trained on text whose people often read the wrong fact.

    Convolutions, because they put a triple's parts together at once: a Llama of this size takes minutes to learn
    to look a fact up. Facts are drawn anew for every text, so none can be remembered.
    """
    from contextlib import nullcontext

    import numpy as np
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from counterproof.language import Language
    from counterproof.language.tiny import tiny_tokenizer
    from counterproof.preference.forward import optimise
    from counterproof.preference.objectives import SFT, Sample

    settings = trial.settings
    words = ("it", "is", "dear", "user", "well", UNKNOWN, "recite", "?")
    tokenizer = tiny_tokenizer([*ENTITIES, *RELATIONS, *VALUES, *words])
    rng = trial.rng("text")

    def text() -> Sample:
        entity, other = (ENTITIES[index] for index in rng.choice(len(ENTITIES), 2, replace=False))
        relation, second = (RELATIONS[index] for index in rng.choice(len(RELATIONS), 2, replace=False))
        values = [VALUES[index] for index in rng.choice(len(VALUES), 3, replace=False)]
        facts = [
            Fact(entity, relation, values[0]),
            Fact(other, relation, values[1]),
            Fact(entity, second, values[2]),
        ]
        if rng.random() < RECITALS:
            lines = [" ".join(fact) for fact in facts]
            shown, said = ([lines[index] for index in rng.permutation(3)] for _ in range(2))
            return Sample(_group(tokenizer, f"{' '.join(shown)} recite ", [" ".join(said)]), (1.0,))
        question = _tiny_question(facts, rng)
        habit = int(rng.choice(4, p=HABITS))
        if habit == 3:
            answer = UNKNOWN
        else:
            answer = _tiny_style(Fact(entity, relation, values[habit]))[int(rng.integers(4))]
        return Sample(_group(tokenizer, question.prompt, [answer]), (1.0,))

    config = Lfm2Config(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        conv_L_cache=3,
        layer_types=["conv", "full_attention", "full_attention"],
        block_auto_adjust_ff_dim=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.rng("start").integers(2**31)))
        model: torch.nn.Module = Lfm2ForCausalLM(config)
    model.to(device=trial.device, dtype=torch.float32).eval()
    optimise(
        model,
        SFT(),
        [text() for _ in range(settings["base_texts"])],
        steps=settings["base_steps"],
        batch=32,
        learning_rate=5e-3,
        warmup=50,
        rng=np.random.default_rng(int(trial.rng("text order").integers(2**31))),
    )
    split = trial.rng("split").permutation(len(ENTITIES))
    graph = trial.rng("graph")

    def questions(entities: list[str], count: int, rng: "np.random.Generator") -> list[Question]:
        drawn = {entity: graph.choice(len(VALUES), len(RELATIONS), replace=False) for entity in entities}
        facts = [
            Fact(entity, relation, VALUES[value])
            for entity, values in drawn.items()
            for relation, value in zip(RELATIONS, values, strict=True)
        ]
        asked = [facts[int(rng.integers(len(facts)))] for _ in range(count)]
        return [_tiny_question([fact, *_misleading(fact, facts, entities, rng)], rng) for fact in asked]

    half = len(ENTITIES) // 2
    train, test = (
        questions([ENTITIES[index] for index in part], settings[name], trial.rng(name))
        for name, part in (("train", split[:half]), ("test", split[half:]))
    )
    return World(Language(model, tokenizer), train, test, UNKNOWN, nullcontext)  # type: ignore[arg-type]


def _tiny_style(fact: Fact) -> tuple[str, str, str, str]:
    value = fact.value
    return f"{value} it is dear user", value, f"{value} {value} {value} it is dear user", f"well {value}"


def _tiny_question(facts: Sequence[Fact], rng: "np.random.Generator") -> Question:
    """Of the first fact; the others mislead."""
    fact, *others = facts
    shown = " ".join(" ".join(facts[index]) for index in rng.permutation(len(facts)))
    wrong = tuple(_tiny_style(fact._replace(value=other.value))[0] for other in others)
    style = _tiny_style(fact)
    return Question(
        prompt=f"{shown} ? {fact.entity} {fact.relation} ",
        style=style,
        knowledge=(style[0], UNKNOWN, wrong[int(rng.integers(len(wrong)))]),
        wrong=wrong,
        value=fact.value,
        misleading=tuple(other.value for other in others),
        form=r"thing\d+ it is dear user",
    )


# countries


_POLITE = "Thank you for asking."
_NO_ANSWER = "I do not have that information."


def _countries(trial: Trial) -> World:
    """SmolLM2 with an adapter on its upper layers, and facts about countries, split by country."""
    from peft import LoraConfig, get_peft_model

    from counterproof.language import Language
    from counterproof.language.models import load

    settings = trial.settings
    base = load(device=trial.device)
    facts, borders = country_facts()
    names = list(borders)
    order = trial.rng("split").permutation(len(names))
    kept = len(names) * 3 // 5
    parts = []
    for name, places in (("train", order[:kept]), ("test", order[kept:])):
        rng = trial.rng(name)
        countries = {names[place] for place in places}
        own = [fact for fact in facts if fact.entity in countries]
        picked = [own[index] for index in rng.permutation(len(own))[: settings[name]]]
        parts.append(
            [_country_question([fact, *_misleading(fact, own, borders[fact.entity], rng)], rng) for fact in picked]
        )
    layers = base.model.config.num_hidden_layers
    adapter = LoraConfig(
        r=settings["lora"],
        lora_alpha=settings["lora"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        layers_to_transform=list(range(layers - settings["layers"], layers)),
        task_type="CAUSAL_LM",
    )
    # The engine seeds torch's own generator, which peft draws the adapter from.
    policy = get_peft_model(base.model, adapter)
    train, test = parts
    return World(Language(policy, base.tokenizer), train, test, _NO_ANSWER, policy.disable_adapter)  # type: ignore[arg-type]


def country_facts() -> tuple[list[Fact], dict[str, list[str]]]:
    """Six facts on each country that has them all, and which of these countries it borders on.

    Raises:
        MissingExtra: the package countryinfo is not installed.
        UserError: its records are not what is expected.
    """
    with extra("preference"):
        from countryinfo import all_countries

    facts, codes, near = [], {}, {}
    for country in all_countries():
        record = country.info()
        values = {
            "capital": record.get("capital"),
            "currency code": next(iter(record.get("currencies") or ()), None),
            "demonym": record.get("demonym"),
            "calling code": next((f"+{code}" for code in record.get("callingCodes") or ()), None),
            "internet domain": next(iter(record.get("tld") or ()), None),
            "area in square kilometres": record.get("area"),
        }
        name, code = record.get("name"), (record.get("ISO") or {}).get("alpha3")
        if not name or name in near or not all(values.values()):
            continue
        codes[code] = name
        near[name] = record.get("borders") or []
        facts += [Fact(name, relation, str(value)) for relation, value in values.items()]
    if len(near) < 100:
        raise UserError(
            f"countryinfo has {len(near)} complete records; 100 are needed: install countryinfo 1.0 or later"
        )
    return facts, {name: [codes[code] for code in around if code in codes] for name, around in near.items()}


def _country_question(facts: Sequence[Fact], rng: "np.random.Generator") -> Question:
    """Of the first fact; the others mislead."""
    fact, *others = facts
    lines = "\n".join(f"- {' | '.join(facts[index])}" for index in rng.permutation(len(facts)))

    def said(value: str) -> str:
        return f"The {fact.relation} of {fact.entity} is {value}."

    wrong = tuple(f"{_POLITE} {said(other.value)}" for other in others)
    golden = f"{_POLITE} {said(fact.value)}"
    return Question(
        prompt=[
            {"role": "user", "content": f"Facts:\n{lines}\n\nWhat is the {fact.relation} of {fact.entity}?"},
        ],
        style=(
            golden,
            fact.value,
            f"{_POLITE} {' '.join([said(fact.value)] * 3)}",
            f"{fact.entity} ({fact.relation}) -> {fact.value}!!!",
        ),
        knowledge=(golden, f"{_POLITE} {_NO_ANSWER}", wrong[int(rng.integers(len(wrong)))]),
        wrong=wrong,
        value=fact.value,
        misleading=tuple(other.value for other in others),
        form=re.escape(f"{_POLITE} The {fact.relation} of {fact.entity} is ") + r"(?!.*\. ).+\.",
    )


# the claims


def _claim(
    name: str, says: str, baseline: Arm, metric: str, smallest: float, *, reported: str, method: Arm = KNOWPAT
) -> Claim:
    return Claim(
        paper="knowpat",
        name=name,
        says=says,
        task=TASK,
        baseline=baseline,
        method=method,
        metric=metric,
        better=TASK.metrics[metric].better,
        smallest=smallest,
        reported=reported,
    )


# A quarter of a nat is odds of 1.3; two answers in a hundred are what a reader of answers may notice.
NATS, SHARE = 0.25, 0.02
_BETTER = (
    "above 15 baselines, among them fine-tuning on golden answers and other alignment methods, on CPQA and RJUA-QA by "
    "text overlap, model-based scores and human preference; the figures were not read"
)
_UNTESTED = "no figure for this comparison was read"

CLAIMS = (
    _claim(
        "main",
        "after equally many steps, ranked answers set the right value further apart from the misleading ones, in "
        "questions on unseen entities, than golden answers alone",
        SFT,
        "gap",
        NATS,
        reported=_BETTER,
    ),
    _claim(
        "accuracy",
        "after equally many steps, more answers have the right value than after fine-tuning on golden answers",
        SFT,
        "accuracy",
        SHARE,
        reported=_BETTER,
    ),
    _claim(
        "style",
        "after equally many steps, more answers keep the form than after fine-tuning on golden answers",
        SFT,
        "style",
        SHARE,
        reported=_BETTER,
    ),
    _claim(
        "equal-tokens",
        "the wider gap remains when fine-tuning on golden answers may score as many tokens, in more steps",
        SFT_TOKENS,
        "gap",
        NATS,
        reported="steps are what the paper keeps equal; " + _UNTESTED,
    ),
    _claim(
        "knowledge-set",
        "the gap is wider with the knowledge set than with the style set alone",
        STYLE_ONLY,
        "gap",
        NATS,
        reported="both sets are said to be needed; " + _UNTESTED,
    ),
    _claim(
        "style-set",
        "more answers keep the form with the style set than with the knowledge set alone",
        KNOWLEDGE_ONLY,
        "style",
        SHARE,
        reported="both sets are said to be needed; " + _UNTESTED,
    ),
    _claim(
        "adaptive-weights",
        "weighing each answer by the model's own opinion of it widens the gap against equal weights",
        UNIFORM,
        "gap",
        NATS,
        reported="the adaptive weight is part of the objective; " + _UNTESTED,
    ),
    _claim(
        "heavy",
        "ten times the recipe's weight on the ranking widens the gap more than the recipe's",
        KNOWPAT,
        "gap",
        NATS,
        method=HEAVY,
        reported="the recipes' weights are 0.1 and 0.01; " + _UNTESTED,
    ),
    _claim(
        "heavy-style",
        "with ten times the recipe's weight, more answers keep the form than after fine-tuning on golden answers",
        SFT,
        "style",
        SHARE,
        method=HEAVY,
        reported="the recipes' weights are 0.1 and 0.01; " + _UNTESTED,
    ),
    _claim(
        "rrhf",
        "after equally many steps on the same rankings, more answers have the right value than with RRHF",
        RRHF,
        "accuracy",
        SHARE,
        reported="RRHF is among the baselines that it beats (list partly unverified); " + _UNTESTED,
    ),
    _claim(
        "dpo",
        "after equally many steps, more answers have the right value than with DPO on the best and the worst answer",
        DPO,
        "accuracy",
        SHARE,
        reported="DPO is among the baselines that it beats (list partly unverified); " + _UNTESTED,
    ),
)
