"""What the papers of this room are compared on: whole grids of hyper-parameters, not their best points."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Budget, Diverged, Metric, Task, Trial
from counterproof.errors import UserError

if TYPE_CHECKING:
    from counterproof.preference.data import Example
    from counterproof.preference.study import GridPoint, Start

FEWEST = 20  # pairs, and prompts, in a user's file
HELD_OUT = 0.2  # share of the prompts that are not trained on
TRIED = 2  # random grid points of which the best is expected

TINY = {
    "model": "tiny",
    "labeller": "neutral",
    "certainty": 3.0,
    "pairs": 1024,
    "prompts": 256,
    "steps": 80,
    "batch": 32,
    "learning_rate": 3e-4,
    "looks": 4,
    "points": None,
    "target": 0.4,
    "lora": 0,
    "max_length": None,
    "max_new_tokens": 24,
    "batch_size": 256,
}
LANGUAGE = {
    "model": "smollm2",
    "pairs": 64,
    "prompts": 24,
    "held_out": 48,
    "steps": 16,
    "batch": 4,
    "learning_rate": 5e-4,
    "looks": 1,
    "points": 3,
    "target": 0.25,
    "lora": 8,
    "max_length": 384,
    "max_new_tokens": 48,
    "batch_size": 24,
}
OWN = {**LANGUAGE, "pairs": 40, "prompts": 12, "held_out": 32, "steps": 10, "points": 2}

PREFERENCE = Task(
    name="preference",
    says=(
        "a whole grid of an objective's hyper-parameters, a model per point from the same start and data: a tiny Llama "
        "on pairs labelled by a known reward, SmolLM2 with LoRA on rule-graded answers, or your model on your pairs"
    ),
    run="counterproof.preference.task:run_preference",
    metrics={
        "quality_mean": Metric(
            "higher",
            says=(
                "quality over the grid: true reward of the answers to held-out prompts (share of on-topic words; share "
                "of rules kept), or held-out pair accuracy on your data"
            ),
        ),
        "quality_worst": Metric("higher", says="quality at the worst point of the grid"),
        "quality_median": Metric("higher", says="quality at the median point of the grid"),
        "quality_best": Metric("higher", says="quality at the best point of the grid"),
        "quality_sd": Metric("lower", says="standard deviation of quality over the grid"),
        "quality_best_of_2": Metric("higher", says="expected quality of the better of two random points of the grid"),
        "above_start": Metric("higher", says="share of the grid that is better than the model before training"),
        "kl_mean": Metric("lower", "nats", "KL from the start per answer, over the grid"),
        "length_mean": Metric("lower", "tokens", "length of an answer, over the grid"),
        "capped_mean": Metric("lower", says="share of answers cut at the longest length, over the grid"),
        "length_at_quality": Metric(
            "lower",
            "tokens",
            "length of an answer where training first reaches a set quality (0.4 of the way from the start to 1 in the "
            "tiny world), interpolated between measurements; mean over points that reach it, the longest if none does",
        ),
        "kl_at_quality": Metric(
            "lower",
            "nats",
            "KL from the start at that quality; that of a longest answer from a uniform start if none does",
        ),
        "reached": Metric("higher", says="share of the grid that reaches that quality"),
    },
    budgets={
        "quick": Budget(settings={**TINY, "own": OWN}, seeds=(4, 12)),
        "standard": Budget(
            settings={**LANGUAGE, "own": {}},
            seeds=(3, 6),
            minutes=30.0,
            trial_minutes=30.0,
            trial_memory=12.0,
        ),
        "full": Budget(
            settings={
                **LANGUAGE,
                "pairs": None,
                "prompts": 256,
                "held_out": None,
                "steps": 400,
                "batch": 32,
                "looks": 8,
                "points": None,
                "lora": 16,
                "max_length": 1024,
                "max_new_tokens": 256,
                "batch_size": 64,
                "own": {},
            },
            seeds=(3, 8),
            minutes=None,
            trial_minutes=1440.0,
            trial_memory=64.0,
        ),
    },
    plug=(
        "an Objective class; its settings are axes, {name: list of values}, of which `learning_rate` and `steps` go to "
        "the loop and the rest to the class; the grid is all their combinations"
    ),
    data="counterproof.preference.task:describe_preferences",
    model="a causal language model: a folder in transformers' format, or a hub id; it is trained with LoRA",
)


def _arm(name: str, objective: str, **axes: list[Any]) -> Arm:
    """An arm of eight points: four of the objective, two learning rates."""
    settings = {**axes, "learning_rate": [2e-4, 1e-3]}
    return Arm(name, method=f"counterproof.preference.objectives:{objective}", settings=settings)


# Each around its paper's values; any comparison may use them.
ARMS: dict[str, tuple[Arm, ...]] = {
    "preference": (
        _arm("dpo", "DPO", beta=[0.02, 0.05, 0.1, 0.3]),
        _arm("simpo", "SimPO", beta=[2.0, 2.5], gamma=[0.5, 1.5]),
        _arm("ipo", "IPO", tau=[0.05, 0.1, 0.3, 1.0]),
        _arm("kto", "KTO", beta=[0.02, 0.05, 0.1, 0.3]),
        _arm("orpo", "ORPO", weight=[0.1, 0.3, 1.0, 3.0]),
        _arm("cpo", "CPO", beta=[0.05, 0.1], alpha=[0.1, 1.0]),
        _arm("r-dpo", "RDPO", beta=[0.05, 0.1], alpha=[0.01, 0.05]),
        _arm("slic", "SLiC", delta=[1.0, 5.0], weight=[0.1, 0.5]),
        _arm("hinge", "Hinge", beta=[0.02, 0.05, 0.1, 0.3]),
        _arm("robust-dpo", "RobustDPO", beta=[0.05, 0.1], label_smoothing=[0.1, 0.2]),
    )
}


def run_preference(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Train every point of the arm's grid, and measure each on held-out prompts.

    Start, pairs, order of the batches, adapter, prompts and noise of the answers are the same for every arm and point.
    """
    from counterproof.preference.study import best_of, grid, grid_statistics

    own = trial.data is not None or trial.model is not None
    settings = {**trial.settings, **(trial.settings["own"] if own else {})}
    method = arm.load()
    if method is None:
        raise UserError(f"arm {arm.name}: the task {PREFERENCE.name} needs an objective; {PREFERENCE.plug}")
    points = grid(**arm.settings)
    with trial.off_clock():
        start = (tiny_start if settings["model"] == "tiny" else language_start)(trial, settings)
        before = start.before
        trial.log(0.1, **before.numbers())
    chosen: Sequence[int] = range(len(points))
    if settings["points"] is not None and settings["points"] < len(points):
        # Random search: other points for every seed, the same ones for grids of the same size.
        chosen = sorted(trial.rng("grid").permutation(len(points))[: settings["points"]].tolist())
    found: list[GridPoint] = []
    for number, point in enumerate(chosen):
        found.append(
            start.train(
                method,
                points[point],
                point=point,
                label=arm.name,
                steps=settings["steps"],
                batch=settings["batch"],
                learning_rate=settings["learning_rate"],
                looks=settings["looks"],
                aside=trial.off_clock,
                watch=_steps(trial, number, len(chosen), settings["steps"]),
            )
        )
        trial.log(0.1 + 0.9 * (number + 1) / len(chosen), **found[-1].numbers())
    finished = [point.measured for point in found if point.measured is not None]
    if not finished:
        raise Diverged(f"every point of the grid diverged, the first with {found[0].problem}")
    # A run that diverged has quality 0, the least there is, and no length or KL.
    quality = [point.measured.quality if point.measured is not None else 0.0 for point in found]
    worth = grid_statistics(quality, before.quality)
    target = before.quality + settings["target"] * (1 - before.quality)
    length, kl, reached = matched_quality(start, found, target)
    return {
        **{f"quality_{name}": worth[name] for name in ("mean", "worst", "median", "best", "sd")},
        f"quality_best_of_{TRIED}": best_of(quality, TRIED),
        "above_start": worth["above_start"],
        "kl_mean": math.fsum(one.kl for one in finished) / len(finished),
        "length_mean": math.fsum(one.length for one in finished) / len(finished),
        "capped_mean": math.fsum(one.capped for one in finished) / len(finished),
        "length_at_quality": length,
        "kl_at_quality": kl,
        "reached": reached,
    }


def matched_quality(start: "Start", points: "list[GridPoint]", target: float) -> tuple[float, float, float]:
    """Length and KL where training first reaches a quality, means over the points that do, and their share.

    A grid of which none does counts as the longest answer, and as the KL of one such answer from a uniform start: both
    as bad as can be.
    """
    from counterproof.preference.study import at_quality

    length, reached = at_quality([[(at[1], at[2]) for at in point.path] for point in points], target)
    kl, _ = at_quality([[(at[1], at[3]) for at in point.path] for point in points], target)
    if length is None or kl is None:
        longest = start.max_new_tokens
        return float(longest), longest * math.log(len(start.language.tokenizer)), 0.0
    return length, kl, reached


def _steps(trial: Trial, number: int, count: int, steps: int) -> Callable[[int], None]:
    """Moves the progress bar."""

    def watch(step: int) -> None:
        if step % 10 == 0:
            trial.log(0.1 + 0.9 * min(number + step / steps, number + 1) / count)

    return watch


# the tiny world


def tiny_start(trial: Trial, settings: Mapping[str, Any]) -> "Start":
    """A tiny Llama trained on a world's text, and pairs of its own answers that a labeller has compared.

    The labeller draws its labels from Bradley and Terry's model, with scale `certainty`, on a score: ``"neutral"`` 3
    times the share of on-topic words; ``"likes-length"`` that and a quarter for each word; ``"longer-says-more"`` 0.6
    for each on-topic word. Quality is the share of on-topic words, whoever labels.
    """
    from counterproof.language.tiny import TinyWorld
    from counterproof.preference.rollout import draw, score_pairs
    from counterproof.preference.study import Start, questions_of

    world = TinyWorld()

    def neutral(prompt: str, answer: str) -> float:
        return 3 * world.relevance(prompt, answer)

    def likes_length(prompt: str, answer: str) -> float:
        return 3 * world.relevance(prompt, answer) + 0.25 * len(answer.split())

    def longer_says_more(prompt: str, answer: str) -> float:
        return 0.6 * world.relevance(prompt, answer) * len(answer.split())

    label = {"neutral": neutral, "likes-length": likes_length, "longer-says-more": longer_says_more}
    language = world.language(int(trial.rng("start").integers(2**31)), device=trial.device)
    answers = draw(
        language,
        world.prompts(trial.rng("prompts"), settings["pairs"]),
        samples=2,
        seed=int(trial.rng("answers").integers(2**31)),
        max_new_tokens=settings["max_new_tokens"],
        batch_size=settings["batch_size"],
    )
    pairs = score_pairs(answers, label[settings["labeller"]], trial.rng("labels"), certainty=settings["certainty"])
    asked = questions_of(dict.fromkeys(world.prompts(trial.rng("held-out"), settings["prompts"])), language)
    return Start.of(language, pairs, asked, reward=world.relevance, **common(trial, settings))


# a language model


def language_start(trial: Trial, settings: Mapping[str, Any]) -> "Start":
    """SmolLM2 or the user's model, on rule-graded answers or the user's pairs; the seed splits the prompts."""
    from counterproof.language.models import load
    from counterproof.preference.data import split
    from counterproof.preference.rules import RuleTask, rule_examples, rule_grade
    from counterproof.preference.study import Start, pairs_of, plain, questions_of

    language = load(trial.model, device=trial.device)
    examples = rule_examples() if trial.data is None else readable(trial.data)
    train, test = split(examples, HELD_OUT, seed=int(trial.rng("split").integers(2**31)))
    order = trial.rng("rows")
    kept, aside = ([rows[i] for i in order.permutation(len(rows))] for rows in (list(train), list(test)))
    samples = pairs_of(kept, language.tokenizer, max_length=settings["max_length"])[: settings["pairs"]]
    questions = questions_of(aside, language, max_length=settings["max_length"])[: settings["prompts"]]
    if trial.data is not None:
        held_out = pairs_of(aside, language.tokenizer, max_length=settings["max_length"])[: settings["held_out"]]
        return Start.of(language, samples, questions, held_out=held_out, **common(trial, settings))
    tasks = {
        plain(example.prompt): RuleTask(example.columns["subject"], tuple(example.columns["words"]))
        for example in aside
    }
    return Start.of(
        language,
        samples,
        questions,
        reward=lambda prompt, answer: rule_grade(tasks[plain(prompt)], answer),
        **common(trial, settings),
    )


def common(trial: Trial, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a start takes from the settings."""
    return {
        "seed": int(trial.rng("training").integers(2**31)),
        **{name: settings[name] for name in ("lora", "max_new_tokens", "batch_size")},
    }


# the user's pairs


def readable(path: Path) -> "list[Example]":
    """The pairs and rankings of a preference file, ties of rankings left out.

    Raises:
        UserError: what `counterproof.preference.data.read` raises; another kind of data; too few pairs or prompts.
    """
    from counterproof.preference.data import read, to_pairs

    pairs = list(to_pairs(read(path)))
    prompts = len({str(pair.prompt) for pair in pairs})
    if len(pairs) < FEWEST or prompts < FEWEST:
        raise UserError(
            f"{path} makes {len(pairs)} pairs on {prompts} prompts; give {FEWEST} of each or more, a fifth of the "
            "prompts is held out"
        )
    return pairs


def describe_preferences(path: Path) -> str:
    """Read and check a preference file or folder, and say in a line what it holds.

    Raises:
        UserError: as `readable`.
    """
    from counterproof.preference.data import survey

    pairs = readable(path)
    found = survey(pairs)
    chat = "chat messages" if found.conversational else "plain text"
    longer = found.chosen_longer.get("words")
    facts = [f"{len(pairs)} pairs on {found.prompts} prompts", chat]
    if longer is not None:
        facts.append(f"the chosen answer is longer in {longer:.0%}")
    if found.contradictions:
        facts.append(f"{found.contradictions} pairs occur both ways round")
    return f"{', '.join(facts)}; a fifth of the prompts is held out"


SUMMARIES = {"preference": "counterproof.preference.study:summary_of_arms"}
