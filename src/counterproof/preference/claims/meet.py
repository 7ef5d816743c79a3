"""Does it pay to tune the control before the model? Against joint training, at equal second stages and equal totals."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    from counterproof.language import Group, Language
    from counterproof.preference.meet import Labelled

_TINY: Mapping[str, Any] = {
    "model": "tiny",
    "equal": "second",
    "steps": 100,
    "batch": 32,
    # A small rate where all arms have as many steps of the second stage, since there the controls decide; a usual one
    # for this model where all arms have as many steps altogether.
    "learning_rate": {"second": 5e-5, "total": 3e-4},
    "control_lr": 1e-2,
    "virtual_tokens": 4,
    "prompts": 512,
    "answers": 8,
    "flipped": 0.1,
    "held_out": 512,
    "questions": 512,
    "longest": 16,
    "lora": 0,
    "points": 10,
}
_SMOLLM2: Mapping[str, Any] = {
    **_TINY,
    "model": "smollm2",
    "steps": 24,
    "batch": 6,
    "learning_rate": {"second": 2e-4, "total": 2e-4},
    "control_lr": 1e-2,
    "virtual_tokens": 10,
    "prompts": 320,
    "held_out": 48,
    "questions": 16,
    "longest": 48,
    "lora": 8,
    "points": 1,
}

TASK = Task(
    name="labelled-answers",
    says=(
        "a language model learns good and bad answers, each under a control of its own (virtual tokens, adapters, "
        "words), and is asked under each: a tiny Llama on answers labelled by a known reward with noise, SmolLM2 on "
        "rule-graded ones"
    ),
    run="counterproof.preference.claims.meet:run_labelled",
    metrics={
        "accuracy": Metric(
            "higher",
            says="share of held-out answers that are likelier under the control of their true label than the other",
        ),
        "gap": Metric("higher", says="true reward of its answers under the good control minus that under the bad one"),
        "reward": Metric(
            "higher",
            says=(
                "true reward under the good control, 0 to 1: share of words on the topic (tiny world), of rules kept "
                "(SmolLM2)"
            ),
        ),
        "reward_bad": Metric("lower", says="true reward under the bad control"),
        "neutral": Metric(
            "lower", "nats per token", says="what unlabelled text has lost in log-likelihood without a control"
        ),
        "length": Metric("lower", "tokens", says="of its answers under the good control"),
        "scored_tokens": Metric("lower", "tokens", says="completion tokens that training scored, in both stages"),
    },
    budgets={
        "quick": Budget(settings=_TINY, seeds=(4, 12), minutes=3.0),
        "standard": Budget(settings=_SMOLLM2, seeds=(3, 4), minutes=45.0, trial_minutes=30.0),
        "full": Budget(
            settings={
                **_SMOLLM2,
                "steps": 300,
                "batch": 32,
                "learning_rate": {"second": 1e-5, "total": 1e-5},
                "lora": 0,
                "held_out": 256,
                "questions": 80,
                "points": 10,
            },
            seeds=(5, 12),
            minutes=None,
            trial_minutes=120.0,
            trial_memory=32.0,
        ),
    },
    plug=(
        "a class like ControlTuning: method(model, tokenizer, control=, ...), fit(rows, stage1_steps=, stage2_steps=, "
        "lr=, ...), log-likelihoods and answers under a label. The arm's setting `stages` says which of the two it has "
        "(both, model, control); `control`, `stage2_control_lr` and `train_control_in_stage2` are passed on. With the "
        "task's `equal` = 'second' every stage has `steps` steps; with 'total' all arms have twice as many altogether."
    ),
)

METHOD = "counterproof.preference.meet:ControlTuning"
# Of 1e-2 and 3e-2 the more accurate on seeds 1000 and 1001; for the first stage that was 1e-2.
OWN_RATE = {"stage2_control_lr": 3e-2}

TWO_STAGES = Arm("control-then-model", METHOD, {"stages": "both"})
JOINT = Arm("joint", METHOD, {"stages": "model"})
JOINT_TUNED = Arm("joint-own-rate", METHOD, {"stages": "model", **OWN_RATE})
TWO_STAGES_TUNED = Arm("control-then-model-own-rate", METHOD, {"stages": "both", **OWN_RATE})
CONTROL_ONLY = Arm("control-only", METHOD, {"stages": "control"})
FROZEN = Arm("frozen-control", METHOD, {"stages": "both", "train_control_in_stage2": False})
TOKEN = Arm("special-token", METHOD, {"stages": "model", "control": "token"})


class _World(NamedTuple):
    """What a trial works on: the model to train, labelled rows, true rows, unlabelled text, questions and the truth."""

    language: "Language"
    rows: "list[Labelled]"
    test: "list[Labelled]"
    neutral: "list[Group]"
    questions: Sequence[Any]
    reward: Callable[[int, str], float]  # of the question's number and an answer
    init_text: Mapping[str, str]


def run_labelled(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Train one arm on one seed and ask it under both controls; see `TASK`.

    Model, labelled rows, the controls' start, questions and the noise of the answers are the same for every arm; so is
    the order of the rows in stage 2.
    """
    import numpy as np

    settings = trial.settings
    with trial.off_clock():
        world = (_tiny if settings["model"] == "tiny" else _smollm2)(trial)
        before = _neutral(world)
    options = dict(arm.settings)
    stages, control = options.pop("stages"), options.pop("control", "prompt")
    first, second = steps_of(stages, settings["equal"], settings["steps"])
    seeds = {purpose: int(trial.rng(purpose).integers(2**31)) for purpose in ("start", "order", "answers")}
    soft = control == "prompt"
    tuning = arm.load()(
        world.language.model,
        world.language.tokenizer,
        control=control,
        num_virtual_tokens=settings["virtual_tokens"] if soft else None,
        init_text=world.init_text if control in ("prompt", "text") else None,
        seed=seeds["start"],
    )
    done, every = 0, max(1, (first + second) // settings["points"])

    def watch(stage: int, step: int, loss: float) -> None:
        nonlocal done
        done += 1
        if done % every or done == first + second:
            trial.log(done / (first + second))
            return
        with trial.off_clock():
            accuracy = tuning.label_accuracy(world.test[: len(world.test) // 2])
        trial.log(done / (first + second), step=done, accuracy=accuracy, loss=loss)

    try:
        tuning.fit(
            world.rows,
            stage1_steps=first,
            stage2_steps=second,
            lr=(settings["control_lr"], settings["learning_rate"][settings["equal"]]),
            lora=settings["lora"] if control != "token" else 0,
            batch=settings["batch"],
            seed=seeds["order"],
            watch=watch,
            **options,
        )
    except ArithmeticError as problem:
        raise Diverged(str(problem)) from None
    with trial.off_clock():
        rewards, lengths = {}, {}
        for label in ("good", "bad"):
            drawn = tuning.generate(
                world.questions,
                label=label,
                seed=seeds["answers"],
                max_new_tokens=settings["longest"],
                batch_size=256 if settings["model"] == "tiny" else 16,
            )
            rewards[label] = float(np.mean([world.reward(n, own[0].text) for n, own in enumerate(drawn)]))
            lengths[label] = float(np.mean([len(own[0].tokens) for own in drawn]))
        each = float(np.mean([len(row.group.completions[0]) for row in world.rows]))
        return {
            "accuracy": tuning.label_accuracy(world.test),
            "gap": rewards["good"] - rewards["bad"],
            "reward": rewards["good"],
            "reward_bad": rewards["bad"],
            "neutral": _neutral(world) - before,
            "length": lengths["good"],
            "scored_tokens": each * settings["batch"] * (first + second),
        }


def steps_of(stages: str, equal: str, steps: int) -> tuple[int, int]:
    """Steps of the control's and of the model's stage."""
    both = {"both": (steps, steps), "model": (0, steps), "control": (steps, 0)}
    if equal == "second" or stages == "both":
        return both[stages]
    return (0, 2 * steps) if stages == "model" else (2 * steps, 0)


def _neutral(world: _World) -> float:
    """Negative log-likelihood per token of unlabelled text under the model without a control."""
    import torch

    from counterproof.language import batches, completion_logps

    total, count = 0.0, 0
    with torch.no_grad():
        for run in batches(world.neutral, 4096):
            token = completion_logps(world.language.model, [world.neutral[index] for index in run]).token
            total, count = total - float(token.double().sum()), count + len(token)
    return total / count


def _tiny(trial: Trial) -> _World:
    """TinyWorld: of some answers of the model to a prompt the one with most and the one with fewest words on the topic.

    A share of the training labels is flipped, row by row; those of the test are true.
    """
    from counterproof.language import tokenize
    from counterproof.language.tiny import TinyWorld
    from counterproof.preference.meet import Labelled
    from counterproof.preference.rollout import draw

    settings, world = trial.settings, TinyWorld()
    start = world.language(int(trial.rng("model").integers(2**31)), device=trial.device)

    def labelled(purpose: str, count: int, flipped: float) -> "list[Labelled]":
        rng = trial.rng(purpose)
        prompts, seed = world.prompts(rng, count), int(rng.integers(2**31))
        found = []
        for own in draw(start, prompts, samples=settings["answers"], seed=seed, max_new_tokens=settings["longest"]):
            ranked = sorted(own, key=lambda answer: world.relevance(answer.prompt, answer.text))
            for answer, label, other in ((ranked[-1], "good", "bad"), (ranked[0], "bad", "good")):
                found.append(Labelled(answer.group, other if rng.random() < flipped else label))
        return found

    rng = trial.rng("neutral")
    texts = [(prompt, world.answer(rng, prompt)) for prompt in world.prompts(rng, settings["held_out"])]
    questions = world.prompts(trial.rng("questions"), settings["questions"])
    return _World(
        start,
        labelled("data", settings["prompts"], settings["flipped"]),
        labelled("test", settings["held_out"] // 2, 0.0),
        [tokenize(start.tokenizer, prompt, [answer]) for prompt, answer in texts],
        questions,
        lambda number, answer: world.relevance(questions[number], answer),
        {},
    )


def _smollm2(trial: Trial) -> _World:
    """SmolLM2: its own answers to small writing tasks, good where three rules of four are kept, bad at one or none."""
    from counterproof.language.models import load
    from counterproof.preference.data import encode
    from counterproof.preference.meet import Labelled
    from counterproof.preference.objectives import Sample
    from counterproof.preference.rules import RuleTask, rule_examples, rule_grade

    settings = trial.settings
    start = load(device=trial.device)
    examples = rule_examples()
    order = trial.rng("split").permutation(len(examples)).tolist()
    train, aside = order[: settings["prompts"]], order[settings["prompts"] :]

    def samples(chosen: Sequence[int]) -> list[Sample]:
        found = []
        for index in chosen:
            example = examples[index]
            group = encode(example, start.tokenizer, max_length=512, trim_after_eos=True).group
            found.append(Sample(group, example.scores, {}, example.where))
        return found

    def labelled(chosen: Sequence[int]) -> "list[Labelled]":
        found = []
        for sample in samples(chosen):
            for completion, score in zip(sample.group.completions, sample.scores, strict=True):
                if score >= 0.75 or score <= 0.25:
                    label = "good" if score >= 0.75 else "bad"
                    found.append(Labelled(type(sample.group)(sample.group.prompt, (completion,)), label, sample.where))
        return found

    tasks = [
        RuleTask(examples[index].columns["subject"], tuple(examples[index].columns["words"]))
        for index in aside[: settings["questions"]]
    ]
    return _World(
        start,
        _balanced(labelled(train)),
        _balanced(labelled(aside))[: settings["held_out"]],
        [sample.group for sample in samples(aside[: settings["questions"]])],
        [task.messages for task in tasks],
        lambda number, answer: rule_grade(tasks[number], answer),
        {"good": "A good answer:", "bad": "A bad answer:"},
    )


def _balanced(rows: "list[Labelled]") -> "list[Labelled]":
    """Good and bad rows in turn, as long as there are both."""
    good, bad = ([row for row in rows if row.label == label] for label in ("good", "bad"))
    return [row for pair in zip(good, bad, strict=False) for row in pair]


SECOND: Mapping[str, Any] = {"equal": "second"}
TOTAL: Mapping[str, Any] = {"equal": "total"}
SMALLEST = {"accuracy": 0.02, "gap": 0.03, "reward": 0.02, "neutral": 0.01}


def _claim(
    name: str,
    says: str,
    baseline: Arm,
    metric: str = "accuracy",
    *,
    method: Arm = TWO_STAGES,
    settings: Mapping[str, Any] = SECOND,
    reported: str = "not measured in the paper",
) -> Claim:
    return Claim(
        paper="meet",
        name=name,
        says=says,
        task=TASK,
        baseline=baseline,
        method=method,
        metric=metric,
        better=TASK.metrics[metric].better,
        smallest=SMALLEST[metric],
        reported=reported,
        settings=settings,
    )


_PAPER = (
    "consistent gains over controllable-generation baselines on dialogue and summarisation preferences, an apparent "
    "margin by reward models and a language model as judge; no figure was read"
)

CLAIMS = (
    _claim(
        "main",
        "controls tuned first, then model and controls together, follow their labels better than model and controls "
        "trained together for as many steps as the second stage has, at one learning rate",
        JOINT,
        reported=_PAPER,
    ),
    _claim(
        "gap",
        "under the same comparison, answers under the good and the bad control lie further apart in true reward",
        JOINT,
        "gap",
        reported=_PAPER,
    ),
    _claim(
        "reward",
        "under the same comparison, answers under the good control earn more true reward",
        JOINT,
        "reward",
        reported=_PAPER,
    ),
    _claim(
        "own-rate",
        "the gain remains when joint training gives the controls a learning rate of their own",
        JOINT_TUNED,
    ),
    _claim(
        "own-rate-gap",
        "the gain in the distance between good and bad answers remains when joint training gives the controls a "
        "learning rate of their own",
        JOINT_TUNED,
        "gap",
    ),
    _claim(
        "head-start",
        "where the controls have a learning rate of their own in both, a first stage for them helps all the same",
        JOINT_TUNED,
        method=TWO_STAGES_TUNED,
    ),
    _claim(
        "equal-total",
        "the gain over joint training at one learning rate remains when that has all the steps of both stages",
        JOINT,
        settings=TOTAL,
    ),
    _claim(
        "equal-total-gap",
        "at equal steps altogether, good and bad answers lie further apart than after joint training",
        JOINT,
        "gap",
        settings=TOTAL,
    ),
    _claim(
        "equal-total-own-rate",
        "at equal steps altogether, two stages beat joint training with a learning rate of its own for the controls",
        JOINT_TUNED,
        settings=TOTAL,
    ),
    _claim(
        "second-stage",
        "half of the steps spent on the model do more than all of them spent on the controls",
        CONTROL_ONLY,
        settings=TOTAL,
        reported="not measured: a reviewer missed the ablation of each stage",
    ),
    _claim(
        "moving-controls",
        "controls that move with the model in the second stage beat controls that are frozen there",
        FROZEN,
        settings=TOTAL,
    ),
    _claim(
        "special-token",
        "at equal steps altogether, two stages with soft prompts beat a new token for each label trained with the "
        "model",
        TOKEN,
        settings=TOTAL,
        reported=_PAPER,
    ),
    _claim(
        "neutral-text",
        "at equal steps altogether, unlabelled text loses less likelihood than in joint training",
        JOINT,
        "neutral",
        settings=TOTAL,
    ),
)
