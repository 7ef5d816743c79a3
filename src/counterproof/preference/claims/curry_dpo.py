"""Is it the order of the pairs, the number of pairs, or the reference that moves? All at the same steps and batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    import numpy as np

    from counterproof.language import Language
    from counterproof.preference.objectives import Sample

_TINY: Mapping[str, Any] = {
    "model": "tiny",
    "prompts": 768,
    "answers": 4,
    "noise": 0.5,
    "steps": 150,
    "stages": 3,
    "batch": 64,
    "learning_rate": 3e-4,
    "held_out": 256,
    "longest": 16,
    "points": 6,
}
_SMOLLM2: Mapping[str, Any] = {
    **_TINY,
    "model": "smollm2",
    "prompts": 60,
    "steps": 45,
    "batch": 4,
    "learning_rate": 2e-4,
    "lora": 16,
    "layers": 10,
    "held_out": 32,
    "longest": 48,
    "points": 1,
}

TASK = Task(
    name="ranked-preferences",
    says=(
        "a language model learns from four ranked answers to a prompt; the same optimizer steps, batch and restarts of "
        "the schedule for every arm; its own answers to held-out prompts are graded by the true reward"
    ),
    run="counterproof.preference.claims.curry_dpo:run_ranked",
    metrics={
        "reward": Metric(
            "higher",
            says="true reward of its answers: share of words on the topic (tiny world), of rules kept (SmolLM2)",
        ),
        "kl": Metric("lower", "nats", says="Kullback-Leibler divergence of its answers from the model it began as"),
        "length": Metric("lower", "tokens", says="of its answers"),
        "accuracy": Metric(
            "higher",
            says="share of held-out pairs, best against each other, whose better answer gained more likelihood",
        ),
        "accuracy_easy": Metric("higher", says="of the best against the worst of four"),
        "accuracy_hard": Metric("higher", says="of the best against the second of four"),
    },
    budgets={
        "quick": Budget(settings=_TINY, seeds=(4, 12), minutes=3.0),
        "standard": Budget(settings=_SMOLLM2, seeds=(3, 4), minutes=30.0, trial_minutes=30.0),
        "full": Budget(
            settings={
                **_SMOLLM2,
                "prompts": 320,
                "steps": 600,
                "batch": 16,
                "layers": 30,
                "held_out": 80,
                "points": 10,
            },
            seeds=(5, 12),
            minutes=None,
            trial_minutes=60.0,
        ),
    },
    plug=(
        "an objective of pairs, built with the arm's settings, which the task trains on the pairs that the setting "
        "`pairing` names (best_worst, best_vs_rest); or a method with train(language, samples, steps=, batch=, "
        "learning_rate=, seed=, watch=)"
    ),
)

DPO = "counterproof.preference.objectives:DPO"
METHOD = "counterproof.preference.curry_dpo:CurryDPO"
BETA = 0.2
# The beta at which the curriculum ends as far from its start as single-pair DPO does, from seeds 1000 and 1001.
MATCHED_BETA = 0.6

SINGLE = Arm("single-pair-dpo", DPO, {"beta": BETA})
MULTI = Arm("multi-pair-dpo", DPO, {"beta": BETA, "pairing": "best_vs_rest"})
CURRY = Arm("curry-dpo", METHOD, {"beta": BETA})
RANDOM = Arm("curry-random-order", METHOD, {"beta": BETA, "order": "random"})
HARD_FIRST = Arm("curry-hard-first", METHOD, {"beta": BETA, "order": "hard_to_easy"})
FIXED = Arm("curry-fixed-reference", METHOD, {"beta": BETA, "reference": "initial"})
RANDOM_FIXED = Arm("random-fixed-reference", METHOD, {"beta": BETA, "order": "random", "reference": "initial"})
MATCHED = Arm("curry-matched-kl", METHOD, {"beta": MATCHED_BETA})


class _World(NamedTuple):
    """What a trial works on: the model to train, its start, ranked samples, held-out prompts and the truth."""

    policy: "Language"
    start: Any
    ranked: "list[Sample]"
    test: "list[Sample]"
    prompts: list[str]
    reward: Callable[[str, str], float]


def run_ranked(arm: Arm, trial: Trial) -> dict[str, float]:
    """One arm on one seed; see `TASK`."""
    import numpy as np

    from counterproof.preference.forward import optimise, reference_logps, referenced
    from counterproof.preference.objectives import Objective
    from counterproof.preference.rollout import assess

    settings = trial.settings
    with trial.off_clock():
        world = (_tiny if settings["model"] == "tiny" else _smollm2)(trial)
    model, stages, batch = world.policy.model, settings["stages"], settings["batch"]
    steps, rate = settings["steps"], settings["learning_rate"]
    asked, seed = (int(trial.rng(purpose).integers(2**31)) for purpose in ("answers", "batches"))
    every = max(1, steps // settings["points"])
    done = 0

    def watch(*_: Any) -> None:
        nonlocal done
        done += 1
        if done % every == 0 and done < steps:
            with trial.off_clock():
                few = world.prompts[: len(world.prompts) // 2]
                now = assess(
                    world.policy, world.start, few, world.reward, seed=asked, max_new_tokens=settings["longest"]
                )
            trial.log(done / steps, step=done, reward=now.reward, kl=now.kl)
        else:
            trial.log(done / steps)

    method = arm.load()
    try:
        if issubclass(method, Objective):
            pairing = arm.settings.get("pairing", "best_worst")
            objective = method(**{name: value for name, value in arm.settings.items() if name != "pairing"})
            pairs = referenced(model, [pair for sample in world.ranked for pair in _pairs(sample, pairing)])
            for number in range(1, stages + 1):
                # The curriculum restarts optimizer and schedule at each stage, so every arm does.
                optimise(
                    model,
                    objective,
                    pairs,
                    steps=steps // stages,
                    batch=batch,
                    learning_rate=rate,
                    rng=np.random.default_rng([seed, number]),
                    watch=watch,
                )
        else:
            method(**arm.settings, stages=stages).train(
                world.policy, world.ranked, steps=steps, batch=batch, learning_rate=rate, seed=seed, watch=watch
            )
    except ArithmeticError as problem:
        raise Diverged(str(problem)) from None
    with trial.off_clock():
        found = assess(
            world.policy,
            world.start,
            world.prompts,
            world.reward,
            seed=asked,
            max_new_tokens=settings["longest"],
            samples=2 if settings["model"] == "tiny" else 1,
        )
        before, after = (reference_logps(referenced(one, world.test)).sum() for one in (world.start, model))
        gains = _accuracies(world.test, (after - before).tolist())
    return {"reward": found.reward, "kl": found.kl, "length": found.length, **gains}


def _worse(scores: "Sequence[float]") -> tuple[int, list[int]]:
    """The place of the best, the first of equals, and those of the worse, from the second best to the worst."""
    best, *rest = sorted(range(len(scores)), key=lambda place: -scores[place])
    return best, [place for place in rest if scores[place] < scores[best]]


def _pairs(sample: "Sample", pairing: str) -> "list[Sample]":
    """The best of a ranking against the worst or against all the worse ones."""
    from counterproof.language import Group
    from counterproof.preference.objectives import Sample

    best, worse = _worse(sample.scores)
    completions = sample.group.completions
    return [
        Sample(Group(sample.group.prompt, (completions[best], completions[place])), (1.0, 0.0), {}, sample.where)
        for place in (worse[-1:] if pairing == "best_worst" else sorted(worse))
    ]


def _accuracies(samples: "Sequence[Sample]", gains: "Sequence[float]") -> dict[str, float]:
    """Shares of pairs whose better completion gained more; `gains` has a number for each completion."""
    wins: dict[str, list[bool]] = {"accuracy": [], "accuracy_easy": [], "accuracy_hard": []}
    at = 0
    for sample in samples:
        best, worse = _worse(sample.scores)
        better = [gains[at + best] > gains[at + place] for place in worse]
        at += len(sample.scores)
        wins["accuracy"] += better
        wins["accuracy_easy"] += better[-1:]
        wins["accuracy_hard"] += better[:1]
    return {name: sum(values) / len(values) for name, values in wins.items()}


def _noisy(samples: "Sequence[Sample]", noise: float, rng: "np.random.Generator") -> "list[Sample]":
    """The samples as a rater sees them: normal noise on each score, in standard deviations of all the scores."""
    from dataclasses import replace

    import numpy as np

    spread = noise * float(np.std([score for sample in samples for score in sample.scores]))
    return [
        replace(
            sample,
            scores=tuple(score + spread * float(z) for score, z in zip(sample.scores, rng.normal(size=4), strict=True)),
        )
        for sample in samples
    ]


def _tiny(trial: Trial) -> _World:
    """TinyWorld: answers of the model itself, graded by the share of their words that are on the topic."""
    import copy

    from counterproof.language import Language
    from counterproof.language.tiny import TinyWorld
    from counterproof.preference.rollout import draw, ranked_sample

    settings, world = trial.settings, TinyWorld()
    start = world.language(int(trial.rng("model").integers(2**31)), device=trial.device)

    def ranked(purpose: str, count: int) -> "list[Sample]":
        rng = trial.rng(purpose)
        drawn = draw(
            start,
            world.prompts(rng, count),
            samples=settings["answers"],
            seed=int(rng.integers(2**31)),
            max_new_tokens=settings["longest"],
        )
        return [ranked_sample(own, [world.relevance(one.prompt, one.text) for one in own]) for own in drawn]

    return _World(
        Language(copy.deepcopy(start.model), start.tokenizer),
        start.model,
        _noisy(ranked("data", settings["prompts"]), settings["noise"], trial.rng("noise")),
        ranked("test", settings["held_out"]),
        world.prompts(trial.rng("prompts"), settings["held_out"]),
        world.relevance,
    )


def _smollm2(trial: Trial) -> _World:
    """SmolLM2 with an adapter on its upper layers: its own answers to small writing tasks, graded by rule."""
    import copy

    from peft import LoraConfig, get_peft_model

    from counterproof.language import Language
    from counterproof.language.models import load
    from counterproof.preference.data import encode
    from counterproof.preference.objectives import Sample
    from counterproof.preference.rules import RuleTask, rule_examples, rule_grade

    settings = trial.settings
    start = load(device=trial.device)
    examples = rule_examples()
    order = trial.rng("split").permutation(len(examples))
    parts = order[: settings["prompts"]], order[settings["prompts"] :][: settings["held_out"]]
    train, test = (
        [
            Sample(
                encode(example, start.tokenizer, max_length=512, trim_after_eos=True).group,
                example.scores,
                {},
                example.where,
            )
            for example in (examples[index] for index in part)
        ]
        for part in parts
    )
    tasks = {}
    for index in parts[1]:
        columns = examples[index].columns
        task = RuleTask(columns["subject"], tuple(columns["words"]))
        tasks[str(start.tokenizer.apply_chat_template(task.messages, tokenize=False, add_generation_prompt=True))] = (
            task
        )
    layers = start.model.config.num_hidden_layers
    adapter = LoraConfig(
        r=settings["lora"],
        lora_alpha=2 * settings["lora"],
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(layers - settings["layers"], layers)),
        task_type="CAUSAL_LM",
    )
    # The engine seeds torch's own generator, which peft draws the adapter from.
    policy = get_peft_model(copy.deepcopy(start.model), adapter)
    return _World(
        Language(policy, start.tokenizer),
        start.model,
        _noisy(train, settings["noise"], trial.rng("noise")),
        test,
        list(tasks),
        lambda prompt, answer: rule_grade(tasks[prompt], answer),
    )


def _claim(
    name: str,
    says: str,
    method: Arm,
    baseline: Arm,
    metric: str = "reward",
    *,
    reported: str,
    settings: Mapping[str, Any] | None = None,
) -> Claim:
    return Claim(
        paper="curry-dpo",
        name=name,
        says=says,
        task=TASK,
        baseline=baseline,
        method=method,
        metric=metric,
        better=TASK.metrics[metric].better,
        smallest=0.02 if metric != "kl" else None,
        reported=reported,
        settings=settings or {},
    )


_ORDER = "easy to hard is the paper's order; its figures for other orders were not read"
_ABLATION = "an ablation of the paper, whose figures were not read"
_HEADLINE = (
    "MT-bench 7.43 with Zephyr-7B; win rates judged by GPT-4 of 90.7 % (Vicuna), 87.1 % (WizardLM), 87.9 % "
    "(UltraFeedback): up to 7.5 points above DPO"
)

CLAIMS = (
    _claim(
        "main",
        "after equal steps, three stages from easy to hard, each with the one before for its reference, beat DPO "
        "on the best and the worst answer in the true reward of what the model says",
        CURRY,
        SINGLE,
        reported=_HEADLINE,
    ),
    _claim(
        "order",
        "with a reference that moves, easy to hard beats the same pairs in random order in true reward",
        CURRY,
        RANDOM,
        reported=_ORDER,
    ),
    _claim(
        "matched-kl",
        "with a beta that lets it go no further from its start than single-pair DPO, the curriculum still beats it in "
        "true reward",
        MATCHED,
        SINGLE,
        reported="not measured in the paper; " + _HEADLINE,
    ),
    _claim(
        "multi-pair",
        "the curriculum beats DPO on all its pairs pooled (MultiPair) in true reward",
        CURRY,
        MULTI,
        reported=_ABLATION,
    ),
    _claim(
        "more-pairs",
        "without stages, three pairs a prompt beat the one of best and worst in true reward after equally many steps",
        MULTI,
        SINGLE,
        reported=_ABLATION,
    ),
    _claim(
        "moving-reference",
        "in the same stages, a reference that moves beats one that stays in true reward",
        CURRY,
        FIXED,
        reported=_ABLATION,
    ),
    _claim(
        "fixed-reference",
        "stages from easy to hard beat single-pair DPO in true reward when the reference stays, too",
        FIXED,
        SINGLE,
        reported=_ABLATION,
    ),
    _claim(
        "order-reversed",
        "with a reference that moves, easy to hard beats hard to easy in true reward",
        CURRY,
        HARD_FIRST,
        reported=_ORDER,
    ),
    _claim(
        "order-fixed",
        "with a reference that stays, easy to hard beats the same pairs in random order in true reward",
        FIXED,
        RANDOM_FIXED,
        reported=_ORDER,
    ),
    _claim(
        "order-noisy",
        "with raters twice as noisy, where easy pairs first should help most, easy to hard beats random order",
        CURRY,
        RANDOM,
        reported="the paper's motive, easy pairs being the least ambiguous; not measured by noise",
        settings={"noise": 1.0},
    ),
    _claim(
        "hard-pairs",
        "the curriculum tells the best of four answers from the second better than single-pair DPO",
        CURRY,
        SINGLE,
        "accuracy_hard",
        reported="not measured in the paper; what training on hard pairs is for",
    ),
    _claim(
        "distance",
        "the curriculum ends no further from the model it began as than single-pair DPO",
        CURRY,
        SINGLE,
        "kl",
        reported="not measured in the paper",
    ),
)
