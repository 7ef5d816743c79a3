"""How does an objective do over the whole of its grid, not only at its best point?

A `RobustnessStudy` trains one model per grid point, from the same start, on the same data, in the same order, and asks
each the same held-out prompts with the same noise. It reports what a user with little budget gets (mean, median, worst,
expected best of k random points) beside what a user with much gets (best), with distance from the start and length.

The statistics are pure functions of points; `summary_of_arms` takes plain dicts, from a study or from a journal.
"""

import hashlib
import html
import itertools
import json
import marshal
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import KW_ONLY, asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("preference"):
    import numpy as np
    import torch

from counterproof.language import Group, Language
from counterproof.language.sampling import encode as encode_prompt
from counterproof.language.sampling import generate
from counterproof.preference.data import Example, Text, encode, to_pairs
from counterproof.preference.forward import optimise, reference_logps, referenced
from counterproof.preference.objectives import Objective, Output, Sample
from counterproof.preference.rollout import Answer, answer_logps

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "ArmsSummary",
    "GridPoint",
    "Measured",
    "Question",
    "RobustnessStudy",
    "Start",
    "StudyResult",
    "WinRate",
    "at_quality",
    "best_of",
    "first_reached",
    "grid",
    "grid_statistics",
    "summary_of_arms",
    "win_rate",
]

Setting: TypeAlias = Mapping[str, Any]
Reward: TypeAlias = Callable[[Any, str], float]  # of (prompt, answer)
LOOP = ("learning_rate", "steps")  # axes that belong to the training loop; the others are the objective's
TRIED = (2, 4)  # random grid points of which the best is expected


# grids and what is said of them


def grid(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations of the axes' values, the last axis fastest.

    Args:
        axes: the objective's hyper-parameters, and `learning_rate` or `steps` of the loop; each a list of values.

    Raises:
        ValueError: an axis without values or with one twice; no axis.
        TypeError: an axis that is no list.
    """
    if not axes:
        raise ValueError("a grid needs at least one axis, such as beta=[0.05, 0.1, 0.3]")
    for name, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise TypeError(f"axis {name} is {values!r}; give a list of values")
        if not values or any(value in values[:i] for i, value in enumerate(values)):
            raise ValueError(f"axis {name} is {values!r}; give one or more different values")
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*axes.values())]


def best_of(values: Sequence[float], k: int) -> float:
    """The expected largest of k different ones of these values, drawn at random: exact, by order statistics.

    The i-th smallest of n is the largest of k in ``C(i - 1, k - 1)`` of the ``C(n, k)`` draws.

    Args:
        values: one for each grid point.
        k: points that are tried, at least 1; more than there are count as all.
    """
    if len(values) == 0 or k < 1:
        raise ValueError(f"best_of takes one value or more and k >= 1, not {len(values)} values and k = {k}")
    k = min(k, len(values))
    draws = math.comb(len(values), k)
    return math.fsum(math.comb(i, k - 1) / draws * value for i, value in enumerate(sorted(values)))


def grid_statistics(qualities: Sequence[float], start: float) -> dict[str, float]:
    """What a grid is worth.

    Args:
        qualities: of its points; higher is better.
        start: quality before training.

    Returns:
        mean, sd (over the points, which are all there are), worst, median, best, best_of_2, best_of_4, and above_start,
        the share of points better than the start.
    """
    return {
        "mean": fmean(qualities),
        "sd": pstdev(qualities),
        "worst": min(qualities),
        "median": median(qualities),
        "best": max(qualities),
        **{f"best_of_{k}": best_of(qualities, k) for k in TRIED},
        "above_start": fmean(quality > start for quality in qualities),
    }


def first_reached(path: Sequence[tuple[float, float]], target: float) -> float | None:
    """The value at which a path of (quality, value) first comes up to a quality, interpolated linearly; None: never."""
    before: tuple[float, float] | None = None
    for quality, value in path:
        if quality >= target:
            if before is None:
                return value
            share = (target - before[0]) / (quality - before[0])
            return before[1] + share * (value - before[1])
        before = quality, value
    return None


def at_quality(paths: Sequence[Sequence[tuple[float, float]]], target: float) -> tuple[float | None, float]:
    """A value, such as length or KL, at matched quality: its mean over the runs that reach it, and their share.

    Args:
        paths: per grid point its (quality, value) from the start on, in the order of training.
        target: the quality.
    """
    found = [value for path in paths if (value := first_reached(path, target)) is not None]
    return (fmean(found) if found else None), len(found) / len(paths)


class WinRate(NamedTuple):
    """Share of prompts won, ties counting half, and its 95 % interval (normal approximation over prompts)."""

    rate: float
    low: float
    high: float


def win_rate(own: Sequence[float], other: Sequence[float]) -> WinRate:
    """How often the first of two answers to the same prompt has the higher reward.

    Args:
        own, other: rewards per prompt, in the same order.

    Raises:
        ValueError: different numbers of them, or none.
    """
    if len(own) == 0 or len(own) != len(other):
        raise ValueError(f"win rates compare answers to the same prompts, not {len(own)} with {len(other)}")
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(own, other, strict=True)]
    rate = fmean(won)
    if len(won) == 1:
        return WinRate(rate, 0.0, 1.0)
    half = 1.96 * pstdev(won) / math.sqrt(len(won) - 1)
    return WinRate(rate, max(0.0, rate - half), min(1.0, rate + half))


# one grid point


class Question(NamedTuple):
    """A held-out prompt.

    Attributes:
        prompt: text or chat messages, what the reward is told.
        tokens: what the model is given.
        chosen: the data's preferred answer to it, or None.
    """

    prompt: Text
    tokens: tuple[int, ...]
    chosen: str | None = None


@dataclass(frozen=True)
class Measured:
    """What a policy does on held-out prompts.

    Attributes:
        quality: mean reward of its answers; where no reward is known, `accuracy`.
        kl: nats per answer from the start: the mean of ``log pi - log start`` over its own answers, drawn at
            temperature 1 from the whole distribution.
        kl_per_token: the same sum per token.
        length: mean tokens of an answer, the end included.
        capped: share of answers cut at the longest length.
        accuracy: share of held-out pairs whose chosen completion has gained more log-probability since the start than
            the rejected one, ties half; None without pairs.
        margin: the mean of that difference, in nats.
        win_start, win_chosen: win rates against the start's answers and the data's chosen ones; None where unknown.
        rewards: per answer.
    """

    quality: float
    kl: float
    kl_per_token: float
    length: float
    capped: float
    accuracy: float | None = None
    margin: float | None = None
    win_start: WinRate | None = None
    win_chosen: WinRate | None = None
    rewards: tuple[float, ...] = ()

    def numbers(self) -> dict[str, float]:
        """What is known, as plain numbers."""
        named = {
            "quality": self.quality,
            "kl": self.kl,
            "length": self.length,
            "kl_per_token": self.kl_per_token,
            "capped": self.capped,
            "accuracy": self.accuracy,
            "margin": self.margin,
            "win_start": self.win_start and self.win_start.rate,
            "win_chosen": self.win_chosen and self.win_chosen.rate,
        }
        return {name: float(value) for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class GridPoint:
    """A trained grid point.

    Attributes:
        method: label.
        point: its number in the grid, from 0.
        seed: of adapter, order of the data, and answers.
        setting: as it was asked for.
        numeric: the setting's numbers as they were used: a beta that was calibrated is a number here.
        measured: at the end; None for a run that diverged.
        path: (step, quality, length, kl) along the training, the start first.
        problem: why a run diverged, or nothing.
        seconds: processor time of the training, without measuring.
    """

    method: str
    point: int
    seed: int
    setting: Setting
    numeric: Mapping[str, float]
    measured: Measured | None
    path: tuple[tuple[int, float, float, float], ...]
    problem: str
    seconds: float

    def numbers(self, floor: float = 0.0) -> dict[str, float]:
        """Plain numbers, for a curve or a table; a run that diverged has the quality `floor` and nothing else."""
        found = {"quality": floor, "diverged": 1.0} if self.measured is None else self.measured.numbers()
        return {**found, "point": float(self.point), **self.numeric}

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "GridPoint":
        """A point as it was written."""
        measured = row["measured"]
        if measured is not None:
            wins = {name: measured[name] and WinRate(*measured[name]) for name in ("win_start", "win_chosen")}
            measured = Measured(**{**measured, **wins, "rewards": tuple(measured["rewards"])})
        path = tuple((int(step), *map(float, rest)) for step, *rest in row["path"])
        return cls(**{**{f.name: row[f.name] for f in fields(cls)}, "measured": measured, "path": path})


@dataclass(frozen=True, eq=False, kw_only=True)
class Start:
    """What all grid points of a seed begin with: model, data with their reference, questions, and how it does.

    Attributes:
        language: the model, which stays as it is, and its tokenizer.
        samples: pairs to train on, with references.
        held_out: pairs to test on, with references; may be empty.
        questions: held-out prompts.
        reward: of (prompt, answer), or None.
        seed: see `GridPoint`.
        lora: rank of the adapter that is trained on all linear layers; 0 trains a copy of the model.
        max_new_tokens, batch_size: longest answer, and answers drawn at a time.
        before: the model as it is.
    """

    language: Language
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    questions: Sequence[Question]
    reward: Reward | None
    seed: int
    lora: int
    max_new_tokens: int
    batch_size: int
    before: Measured

    @classmethod
    def of(
        cls,
        language: Language,
        samples: Sequence[Sample],
        questions: Sequence[Question],
        *,
        held_out: Sequence[Sample] = (),
        reward: Reward | None = None,
        seed: int = 0,
        lora: int = 0,
        max_new_tokens: int = 64,
        batch_size: int = 64,
    ) -> "Start":
        """Compute the references, and measure the model before training.

        Raises:
            UserError: nothing to train on; no questions; neither a reward nor held-out pairs; a held-out sample that is
                no pair; a model that already carries an adapter.
        """
        if not samples:
            raise UserError("there is no pair to train on")
        if not questions:
            raise UserError("there is no held-out prompt to ask; KL and length are measured on answers to them")
        if reward is None and not held_out:
            raise UserError("nothing says what quality is: give a reward, or held-out pairs")
        odd = next((s for s in held_out if len(s.scores) != 2 or s.scores[0] == s.scores[1]), None)
        if odd is not None:
            raise UserError(f"{odd.where or 'a held-out sample'}: not a pair with one completion better than the other")
        if hasattr(language.model, "peft_config"):
            raise UserError("the model carries an adapter already; merge it first (peft: merge_and_unload)")
        model = language.model
        unmeasured = Measured(math.nan, 0.0, 0.0, math.nan, math.nan)
        start = cls(
            language=language,
            samples=referenced(model, samples),
            held_out=referenced(model, held_out),
            questions=questions,
            reward=reward,
            seed=seed,
            lora=lora,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            before=unmeasured,
        )
        return replace(start, before=start.measure(language, lambda: nullcontext(model)))

    @property
    def mean_length(self) -> float:
        """Tokens of a training completion on average."""
        return fmean(len(completion) for sample in self.samples for completion in sample.group.completions)

    @contextmanager
    def trainee(self) -> Iterator[tuple[Language, Callable[[], "AbstractContextManager[nn.Module]"]]]:
        """A model to train, and a context in which the start stands in its place."""
        model, tokenizer = self.language
        if not self.lora:
            yield Language(deepcopy(model).requires_grad_(True), tokenizer), lambda: nullcontext(model)
            return
        with extra("preference"):
            from peft import LoraConfig, get_peft_model

        trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        config = LoraConfig(r=self.lora, lora_alpha=2 * self.lora, target_modules="all-linear", task_type="CAUSAL_LM")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            policy: Any = get_peft_model(model, config)

        @contextmanager
        def origin() -> "Iterator[nn.Module]":
            with policy.disable_adapter():
                yield policy

        try:
            yield Language(policy, tokenizer), origin
        finally:
            policy.unload()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained[name])

    def measure(
        self,
        policy: Language,
        origin: Callable[[], "AbstractContextManager[nn.Module]"],
        *,
        first: "Start | None" = None,
    ) -> Measured:
        """Ask a policy the questions.

        Args:
            policy: what has been trained.
            origin: the start, in a context.
            first: the start as it was measured, for win rates against it.
        """
        drawn = generate(
            policy,
            [list(question.tokens) for question in self.questions],
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            batch_size=self.batch_size,
        )
        answers = [
            Answer(str(question.prompt), own[0].text, Group(question.tokens, (own[0].tokens,)))
            for question, own in zip(self.questions, drawn, strict=True)
        ]
        now = answer_logps(policy.model, answers)
        with origin() as model:
            ratio = (now - answer_logps(model, answers)).double()
        lengths = [len(own[0].tokens) for own in drawn]
        accuracy = margin = win_start = win_chosen = None
        if self.held_out:
            accuracy, margin = self._accuracy(policy.model)
        rewards: tuple[float, ...] = ()
        if self.reward is not None:
            rewards = tuple(float(self.reward(q.prompt, a.text)) for q, a in zip(self.questions, answers, strict=True))
            if first is not None:
                win_start = win_rate(rewards, first.before.rewards)
            if all(question.chosen is not None for question in self.questions):
                win_chosen = win_rate(rewards, self._chosen_rewards)
        quality = fmean(rewards) if self.reward is not None else accuracy
        assert quality is not None  # Start.of asks for the one or the other
        return Measured(
            quality=quality,
            kl=float(ratio.mean()),
            kl_per_token=float(ratio.sum()) / sum(lengths),
            length=fmean(lengths),
            capped=fmean(own[0].finish == "length" for own in drawn),
            accuracy=accuracy,
            margin=margin,
            win_start=win_start,
            win_chosen=win_chosen,
            rewards=rewards,
        )

    @cached_property
    def _chosen_rewards(self) -> list[float]:
        assert self.reward is not None
        return [float(self.reward(question.prompt, question.chosen or "")) for question in self.questions]

    def _accuracy(self, model: "nn.Module") -> tuple[float, float]:
        """Share of held-out pairs ordered rightly by log-ratio, and the mean margin."""
        ratios = reference_logps(referenced(model, self.held_out)).sum() - reference_logps(self.held_out).sum()
        best = torch.tensor([[sample.scores[0] > sample.scores[1]] for sample in self.held_out])
        pairs = ratios.double().view(-1, 2)
        margins = torch.where(best[:, 0], pairs[:, 0] - pairs[:, 1], pairs[:, 1] - pairs[:, 0])
        return float((margins > 0).double().mean() + 0.5 * (margins == 0).double().mean()), float(margins.mean())

    def train(
        self,
        method: type[Objective],
        setting: Setting,
        *,
        point: int = 0,
        label: str | None = None,
        steps: int = 100,
        batch: int = 32,
        learning_rate: float = 3e-4,
        warmup: int = 5,
        looks: int = 1,
        aside: Callable[[], "AbstractContextManager[Any]"] = nullcontext,
        watch: Callable[[int], None] | None = None,
    ) -> GridPoint:
        """Train one grid point from here and measure it.

        Args:
            method: an Objective class.
            setting: its hyper-parameters, and `learning_rate` or `steps` to override those of the loop.
            point, label: number and name in the results; the name is the class's own.
            steps, batch, learning_rate, warmup: of `optimise`.
            looks: measurements, evenly spaced, the last at the end.
            aside: the context measurements are made in.
            watch: is told every step.

        Raises:
            TypeError, ValueError: a setting that the objective does not take.
        """
        loop = {"learning_rate": learning_rate, "steps": steps, **{n: setting[n] for n in LOOP if n in setting}}
        asked = method(**{name: value for name, value in setting.items() if name not in LOOP})
        objective = asked.calibrated(self.mean_length)
        used = {name: getattr(objective, name) for name in setting if name not in LOOP}
        used |= {name: loop[name] for name in LOOP if name in setting}
        numeric = {name: float(value) for name, value in used.items() if isinstance(value, int | float)}
        before = self.before
        path = [(0, before.quality, before.length, before.kl)]
        steps = loop["steps"]
        spent, began = 0.0, time.process_time()
        measured: Measured | None = None
        problem = ""
        with self.trainee() as (policy, origin):

            def look(step: int, output: Output) -> None:
                nonlocal measured, spent, began
                if step * looks // steps > (step - 1) * looks // steps:
                    spent += time.process_time() - began
                    with aside():
                        measured = self.measure(policy, origin, first=self)
                    began = time.process_time()
                    path.append((step, measured.quality, measured.length, measured.kl))
                if watch is not None:
                    watch(step)

            try:
                optimise(
                    policy.model,
                    objective,
                    self.samples,
                    steps=steps,
                    batch=min(batch, len(self.samples)),
                    learning_rate=loop["learning_rate"],
                    rng=np.random.default_rng([self.seed, 1]),
                    warmup=warmup,
                    watch=look,
                )
            except ArithmeticError as bad:  # not finite: a result, which counts against the point
                measured, problem = None, str(bad)
        spent += time.process_time() - began
        name = label if label is not None else method.name
        return GridPoint(name, point, self.seed, dict(setting), numeric, measured, tuple(path), problem, spent)


def pairs_of(
    rows: Iterable[Example | Sample], tokenizer: Any, *, max_length: int | None, columns: Iterable[str] = ()
) -> list[Sample]:
    """Examples as tokenised pairs, best against worst of rankings; samples pass.

    Args:
        rows: from `counterproof.preference.data.read`, or samples.
        tokenizer: a transformers tokenizer.
        max_length: tokens of prompt and completion; a longer prompt loses its beginning.
        columns: carried along where they are.
    """
    found: list[Sample] = []
    for row in rows:
        if isinstance(row, Sample):
            found.append(row)
            continue
        for pair in to_pairs([row]):
            own = {name: pair.columns[name] for name in columns if name in pair.columns}
            spread = {n: v if isinstance(v, Sequence) and len(v) == 2 else (v, v) for n, v in own.items()}
            group = encode(pair, tokenizer, max_length=max_length).group
            found.append(Sample(group, pair.scores, spread, pair.where))
    return found


def questions_of(rows: Iterable[Any], language: Language, *, max_length: int | None = None) -> list[Question]:
    """Held-out prompts: texts, chat messages, Examples (their best completion is the chosen one) or Samples."""
    found: dict[tuple[int, ...], Question] = {}
    for number, row in enumerate(rows):
        prompt: Text
        chosen: str | None = None
        if isinstance(row, Sample):
            tokens = row.group.prompt
            prompt = spelt(language, tokens)
            best = max(range(len(row.scores)), key=row.scores.__getitem__)
            chosen = spelt(language, row.group.completions[best])
        elif isinstance(row, Example):
            prompt = row.prompt
            if row.completions:
                # As in training: without the token that prompt and completion would share.
                tokens = encode(row, language.tokenizer, max_length=max_length).group.prompt
                best = max(range(len(row.scores)), key=row.scores.__getitem__)
                chosen = plain(row.completions[best])
            else:
                tokens = encode_prompt(language, row.prompt, row.where or f"prompt {number}")
        else:
            prompt, tokens = row, encode_prompt(language, row, f"prompt {number}")
        found.setdefault(tokens, Question(prompt, tokens, chosen))
    return list(found.values())


def spelt(language: Language, tokens: tuple[int, ...]) -> str:
    """Tokens as text, special ones left out."""
    return str(language.tokenizer.decode(list(tokens), skip_special_tokens=True))


def plain(text: Text) -> str:
    """A completion's text, whichever way it is given."""
    return text if isinstance(text, str) else "\n".join(str(message.get("content") or "") for message in text)


# the study


@dataclass
class RobustnessStudy:
    """Train every point of every grid, seed by seed, and report what the grids are worth.

    Args:
        model: model and tokenizer, which stay as they are; or a function of a seed that makes them.
        pairs: Examples (pairs, or rankings, of which best and worst make one), or Samples; where they depend on seed or
            model a function of (seed, language).
        prompts: held out: texts, chat messages, or Examples and Samples, whose chosen completions are then competitors.
        methods: by Objective class, or by its `name` ("dpo"; a class that has been imported), the points from `grid`.
        reward: of (prompt, answer); higher is better. None: quality is the accuracy on `held_out` pairs.
        held_out: pairs to test on, like `pairs`.
        seeds: each trains all grids once.
        budget_steps, batch, learning_rate, warmup: the loop, where a grid has no axis for it.
        lora: rank of the adapter; 0 trains all parameters of a copy.
        max_length, max_new_tokens, batch_size: tokens of prompt and completion, of an answer; answers drawn at once.
        looks: measurements along a training.
        floor: the quality that a run which diverges counts with.
        out: folder in which every finished point is kept, and found again by the next run. Its file's name holds what
            it depends on: setting, loop, data, the model's weights, and the reward function's own code; not the code of
            what that calls.
        watch: is told (points done, points in all, the last one).

    Raises:
        UserError: a name that no imported objective has; what `Start.of` raises.
    """

    model: Language | Callable[[int], Language]
    pairs: Any
    prompts: Sequence[Any]
    _: KW_ONLY
    methods: Mapping[Any, Sequence[Setting]]
    reward: Reward | None = None
    held_out: Sequence[Any] = ()
    seeds: Sequence[int] = (0,)
    budget_steps: int = 100
    batch: int = 32
    learning_rate: float = 3e-4
    warmup: int = 5
    lora: int = 0
    max_length: int | None = 1024
    max_new_tokens: int = 64
    batch_size: int = 64
    looks: int = 1
    floor: float = 0.0
    out: str | Path | None = None
    watch: Callable[[int, int, GridPoint], None] | None = None

    def __post_init__(self) -> None:
        # What can be read only once is read here, since every seed needs it.
        if not callable(self.pairs):
            self.pairs = list(self.pairs)
        self.prompts, self.held_out = list(self.prompts), list(self.held_out)

    def run(self) -> "StudyResult":
        """Train what is not in the folder yet; stopped at any moment, the next call goes on from the last point."""
        grids = {objective_class(key): list(points) for key, points in self.methods.items()}
        for method, points in grids.items():
            for setting in points:
                method(**{name: value for name, value in setting.items() if name not in LOOP})  # before hours of work
        folder = None if self.out is None else Path(self.out)
        if folder is not None:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file; name a folder for the points")
            folder.mkdir(parents=True, exist_ok=True)
        total = len(self.seeds) * sum(map(len, grids.values()))
        found: list[GridPoint] = []
        starts: dict[int, Measured] = {}
        for seed in self.seeds:
            start = self._start(seed, grids)
            starts[seed] = start.before
            base = self._fingerprint(start) if folder is not None else b""
            for method, points in grids.items():
                for number, setting in enumerate(points):
                    path = None if folder is None else folder / f"{point_key(base, method, setting)}.json"
                    point = None if path is None else saved_point(path)
                    if point is None:
                        point = start.train(
                            method,
                            setting,
                            steps=self.budget_steps,
                            batch=self.batch,
                            learning_rate=self.learning_rate,
                            warmup=self.warmup,
                            looks=self.looks,
                        )
                        if path is not None:
                            with replacing(path) as stream:
                                json.dump(point.as_json(), stream)
                    found.append(replace(point, point=number))
                    if self.watch is not None:
                        self.watch(len(found), total, found[-1])
        result = StudyResult(tuple(found), starts, self.floor)
        if folder is not None:
            result.report(folder / "report.html")
            with replacing(folder / "report.json") as stream:
                json.dump(result.as_json(), stream, indent=1)
        return result

    def _start(self, seed: int, grids: Mapping[type[Objective], Any]) -> Start:
        language = self.model if isinstance(self.model, Language) else self.model(seed)
        pairs = self.pairs(seed, language) if callable(self.pairs) else self.pairs
        needs = sorted(set().union(*(method.needs for method in grids)) - {"reference", "pairs", "baseline"})
        return Start.of(
            language,
            pairs_of(pairs, language.tokenizer, max_length=self.max_length, columns=needs),
            questions_of(self.prompts, language, max_length=self.max_length),
            held_out=pairs_of(self.held_out, language.tokenizer, max_length=self.max_length),
            reward=self.reward,
            seed=seed,
            lora=self.lora,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )

    def _fingerprint(self, start: Start) -> bytes:
        """Digest of all that the points of a seed share."""
        digest = hashlib.blake2b()
        for name, value in sorted(start.language.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        for samples in (start.samples, start.held_out):
            digest.update(repr([(s.group, s.scores, sorted(s.columns.items())) for s in samples]).encode())
        digest.update(repr(start.questions).encode())
        if self.reward is not None:
            name = getattr(self.reward, "__qualname__", type(self.reward).__qualname__)
            code = getattr(self.reward, "__code__", None) or getattr(type(self.reward).__call__, "__code__", None)
            digest.update(name.encode() + (marshal.dumps(code) if code is not None else b""))
        loop = (self.budget_steps, self.batch, self.learning_rate, self.warmup, self.looks)
        digest.update(repr((start.seed, self.lora, self.max_new_tokens, loop)).encode())
        return digest.digest()


def objective_class(key: Any) -> type[Objective]:
    """The Objective class itself, or the imported one of that `name`; an underscore stands for a hyphen.

    Raises:
        UserError: none has that name.
        TypeError: something else.
    """
    if isinstance(key, type) and issubclass(key, Objective):
        return key
    if not isinstance(key, str):
        raise TypeError(f"a method is an Objective class or its name, not {key!r}")
    known: dict[str, type[Objective]] = {}
    queue: list[Any] = [Objective]
    while queue:
        for child in queue.pop().__subclasses__():
            queue.append(child)
            if isinstance(child.__dict__.get("name"), str):
                known.setdefault(child.name, child)
    name = key.replace("_", "-")
    if name not in known:
        raise UserError(
            f"no imported objective is called {key!r}; give its class, or one of {', '.join(sorted(known))}"
        )
    return known[name]


def point_key(base: bytes, method: type[Objective], setting: Setting) -> str:
    """Name of a point's file."""
    digest = hashlib.blake2b(base, digest_size=12)
    digest.update(repr((method.__module__, method.__qualname__, sorted(setting.items()))).encode())
    return f"{method.name}-{digest.hexdigest()}"


def saved_point(path: Path) -> GridPoint | None:
    """A point from its file; None when there is none, or it is damaged."""
    try:
        return GridPoint.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class StudyResult:
    """A finished study.

    Attributes:
        points: in the order they were run.
        starts: by seed, the model before training.
        floor: the quality of a run that diverged.
    """

    points: tuple[GridPoint, ...]
    starts: Mapping[int, Measured]
    floor: float = 0.0

    @cached_property
    def summary(self) -> "ArmsSummary":
        """Statistics per method, and which one the evidence speaks for."""
        arms: dict[str, list[dict[str, Any]]] = {}
        for method in dict.fromkeys(point.method for point in self.points):
            for seed, before in self.starts.items():
                own = [p for p in self.points if p.method == method and p.seed == seed]
                curve = [before.numbers(), *(point.numbers(self.floor) for point in own)]
                arms.setdefault(method, []).append({"seed": seed, "curve": curve})
        return summary_of_arms(arms)

    def report(self, path: str | Path | None = None) -> str:
        """The table with the recommendation, as text; also, when a path is given, as an HTML page with plots."""
        if path is not None:
            with replacing(Path(path)) as stream:
                stream.write(self.summary.html())
        return self.summary.text()

    def table(self) -> list[dict[str, Any]]:
        """A row of statistics per method."""
        return [dict(row) for row in self.summary.rows]

    def length_at_quality(self, method: str, target: float) -> tuple[float | None, float]:
        """Mean length at which the runs of a method first reach a quality, and the share of them that do."""
        return self._at(method, target, 2)

    def kl_at_quality(self, method: str, target: float) -> tuple[float | None, float]:
        """Mean KL at which the runs of a method first reach a quality, and the share of them that do."""
        return self._at(method, target, 3)

    def _at(self, method: str, target: float, column: int) -> tuple[float | None, float]:
        paths = [[(at[1], at[column]) for at in point.path] for point in self.points if point.method == method]
        if not paths:
            raise ValueError(
                f"no method {method!r}; there are {', '.join(dict.fromkeys(p.method for p in self.points))}"
            )
        return at_quality(paths, target)

    def as_json(self) -> dict[str, Any]:
        """Everything: summary, points, starts."""
        return {
            "summary": self.summary.as_json(),
            "points": [point.as_json() for point in self.points],
            "starts": {str(seed): before.numbers() for seed, before in self.starts.items()},
        }


# arms side by side

MEASURES = {  # of a point; what else it holds is its setting
    "progress", "cost", "step", "point", "diverged", "quality", "kl", "kl_per_token", "length", "capped", "accuracy",
    "margin", "win_start", "win_chosen",
}  # fmt: skip
COLUMNS = {  # of the table: heading, and digits
    "mean": ("mean", 3), "sd": ("sd", 3), "worst": ("worst", 3), "median": ("median", 3), "best": ("best", 3),
    "best_of_2": ("best of 2", 3), "best_of_4": ("best of 4", 3), "above_start": ("above start", 2), "kl": ("KL", 2),
    "kl_per_token": ("KL/token", 3), "length": ("length", 1), "capped": ("capped", 2), "win_start": ("wins/start", 2),
    "win_chosen": ("wins/chosen", 2),
}  # fmt: skip


@dataclass(frozen=True)
class ArmsSummary:
    """Grids side by side.

    Attributes:
        rows: per arm, means over its seeds of the statistics of `grid_statistics` and of kl, kl_per_token, length,
            capped and win rates over the grid; seeds, points, and failed trials.
        recommended: the arm with the highest mean quality over its grid, among those with the fewest failed trials.
        against: per other arm the mean paired difference in that mean, its 95 % t interval (None with one seed), and on
            how many of how many common seeds the recommended arm is ahead.
        evidence: the same in sentences.
        points: per arm its grid points, averaged over seeds: quality, kl, length, setting; what the plots draw.
        start: the model before training, averaged over seeds: quality and length; empty when it was not logged.
    """

    rows: tuple[Mapping[str, Any], ...]
    recommended: str
    against: Mapping[str, Mapping[str, Any]]
    evidence: tuple[str, ...]
    points: Mapping[str, Sequence[Mapping[str, float]]]
    start: Mapping[str, float]

    def text(self) -> str:
        """Table and evidence."""
        return "\n".join([self._table(), "", *self.evidence])

    def _table(self) -> str:
        shown = [name for name in COLUMNS if any(row.get(name) is not None for row in self.rows)]
        lines = [["arm", "seeds", "points", *(COLUMNS[name][0] for name in shown)]]
        for row in self.rows:
            values = ["-" if row.get(n) is None else f"{row[n]:.{COLUMNS[n][1]}f}" for n in shown]
            seeds = f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else "")
            lines.append([row["arm"], seeds, str(row["points"]), *values])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        table = [
            "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines
        ]
        if self.start:
            table.append(f"before training: quality {self.start['quality']:.3f}, length {self.start['length']:.1f}")
        return "\n".join(table)

    def as_json(self) -> dict[str, Any]:
        """Everything, as what `json.dumps` takes."""
        return {
            "rows": [dict(row) for row in self.rows],
            "recommended": self.recommended,
            "against": {name: dict(value) for name, value in self.against.items()},
            "evidence": list(self.evidence),
            "points": {arm: [dict(point) for point in points] for arm, points in self.points.items()},
            "start": dict(self.start),
        }

    def plots(self) -> dict[str, str]:
        """SVG drawings: quality against ``"kl"`` and against ``"length"``; a mark per grid point, a shape per arm."""
        return {
            name: scatter(self, name, words)
            for name, words in (("kl", "KL from the start, nats"), ("length", "length, tokens"))
        }

    def html(self) -> str:
        """Table, evidence and plots as one self-contained page."""
        drawn = "".join(f"<figure>{svg}</figure>" for svg in self.plots().values())
        reasons = "".join(f"<p>{html.escape(reason)}</p>" for reason in self.evidence)
        style = (
            ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;"
            "padding:0 1rem}pre{overflow-x:auto}figure{margin:1.5rem 0}svg{max-width:100%;height:auto}"
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Grids side by side</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{style}</style></head><body><h1>Grids side by side</h1>"
            f"<pre>{html.escape(self._table())}</pre>{reasons}{drawn}</body></html>\n"
        )


def summary_of_arms(arms: Mapping[str, Sequence[Mapping[str, Any]]]) -> ArmsSummary:
    """What the trials of several arms say: a table, the arm to take, why, and what to plot.

    Args:
        arms: per arm its trials, one per seed, as plain dicts: ``seed``; ``curve``, of which the dicts with a ``point``
            are grid points (quality, kl, length, ... and the setting's numbers), and one with quality but no point is
            the model before training. A trial without grid points has failed. What a journal's records give as JSON
            will do.

    Raises:
        ValueError: no arm, or none with a finished trial.
    """
    rows: list[dict[str, Any]] = []
    means: dict[str, dict[int, float]] = {}
    points: dict[str, list[dict[str, float]]] = {}
    starts: list[Mapping[str, float]] = []
    for arm, trials in arms.items():
        means[arm], failed = {}, 0
        per_seed: list[dict[str, float | None]] = []
        by_point: dict[int, list[Mapping[str, float]]] = {}
        for trial in trials:
            done = [dict(at) for at in trial["curve"] if "point" in at and "quality" in at]
            before = [at for at in trial["curve"] if "point" not in at and "quality" in at]
            if not done or trial.get("outcome", "ok") != "ok":
                failed += 1
                continue
            starts += before[:1]
            per_seed.append(statistics_of(done, before[0] if before else None))
            means[arm][int(trial["seed"])] = fmean(at["quality"] for at in done)
            for at in done:
                by_point.setdefault(int(at["point"]), []).append(at)
        row: dict[str, Any] = {"arm": arm, "seeds": len(per_seed), "failed": failed, "points": len(by_point)}
        for name in COLUMNS:
            known = [value for one in per_seed if (value := one.get(name)) is not None]
            row[name] = fmean(known) if known else None
        rows.append(row)
        points[arm] = [averaged(same) for _, same in sorted(by_point.items())]
    if not any(means.values()):
        raise ValueError("no trial of these arms has finished a grid point")
    ranked = sorted((row for row in rows if row["seeds"]), key=lambda row: (row["failed"], -row["mean"]))
    first = ranked[0]["arm"]
    against = {other: paired(means[first], means[other]) for other in arms if other != first and means[other]}
    return ArmsSummary(tuple(rows), first, against, tuple(why(ranked, against)), points, averaged(starts))


def statistics_of(points: Sequence[Mapping[str, float]], before: Mapping[str, float] | None) -> dict[str, float | None]:
    """The table's figures of one trial."""
    start = before["quality"] if before is not None else math.nan
    found: dict[str, float | None] = {**grid_statistics([at["quality"] for at in points], start)}
    if before is None:
        found["above_start"] = None
    for name in ("kl", "kl_per_token", "length", "capped", "win_start", "win_chosen"):
        known = [at[name] for at in points if name in at]
        found[name] = fmean(known) if known else None
    return found


def averaged(same: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number that all of these have."""
    shared = [name for name in same[0] if all(name in one for one in same)] if same else []
    return {name: fmean(one[name] for one in same) for name in shared}


def paired(own: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """Paired differences over the seeds that both have: mean, 95 % t interval, wins, seeds."""
    from scipy.stats import t

    common = sorted(own.keys() & other.keys())
    gaps = [own[seed] - other[seed] for seed in common]
    if not gaps:
        return {"difference": None, "interval": None, "wins": 0, "seeds": 0}
    middle, interval = fmean(gaps), None
    if len(gaps) > 1:
        half = float(t.ppf(0.975, len(gaps) - 1)) * pstdev(gaps) / math.sqrt(len(gaps) - 1)
        interval = [middle - half, middle + half]
    return {"difference": middle, "interval": interval, "wins": sum(gap > 0 for gap in gaps), "seeds": len(gaps)}


def why(ranked: Sequence[Mapping[str, Any]], against: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Why the first of the ranked arms, in sentences; and what speaks for another."""
    first = ranked[0]
    yield (
        f"take {first['arm']}: mean quality {first['mean']:.3f} over its grid of {first['points']}, worst "
        f"{first['worst']:.3f}, spread {first['sd']:.3f}, expected best of 2 random points {first['best_of_2']:.3f}"
    )
    for row in ranked[1:]:
        gap = against[row["arm"]]
        if gap["difference"] is None:
            yield f"against {row['arm']}: no seed in common"
            continue
        low_high = "one seed tells nothing of chance"
        if gap["interval"] is not None:
            low, high = gap["interval"]
            low_high = f"95 % interval {low:+.3f} to {high:+.3f}"
            if low <= 0 <= high:
                low_high += ", so the seeds do not separate the two"
        failed = f"; {row['failed']} of its trials failed" if row["failed"] else ""
        yield (
            f"against {row['arm']}: mean quality {gap['difference']:+.3f} ({low_high}), ahead on {gap['wins']} of "
            f"{gap['seeds']} seeds{failed}"
        )
    for name, better, words in (
        ("worst", max, "the highest worst point"),
        ("sd", min, "the smallest spread"),
        ("best_of_2", max, "the highest expected best of 2"),
        ("best", max, "the highest best point"),
    ):
        leader = better(ranked, key=lambda row: row[name])
        if leader["arm"] != first["arm"] and leader[name] != first[name]:
            yield f"but {leader['arm']} has {words}: {leader[name]:.3f}, against {first[name]:.3f}"


# drawing

INK = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B2A100", "#882255", "#44AA99")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 360, 60, 48, 16
KEY = 150  # width of the key


def scatter(summary: ArmsSummary, x: str, words: str) -> str:
    """SVG: quality against a measure, a mark per grid point, shape and colour per arm, a cross for the start."""
    shown = {
        arm: [point for point in points if x in point and math.isfinite(point[x])]
        for arm, points in summary.points.items()
    }
    start = {x: 0.0, **summary.start} if summary.start and (x == "kl" or x in summary.start) else None
    every = [point for points in shown.values() for point in points] + ([start] if start else [])
    if not every:
        return ""
    across = axis([point[x] for point in every])
    up = axis([point["quality"] for point in every])

    def place(point: Mapping[str, float]) -> tuple[float, float]:
        right, top = (point[x] - across[0]) / (across[-1] - across[0]), (point["quality"] - up[0]) / (up[-1] - up[0])
        return LEFT + right * (WIDTH - LEFT - KEY), HEIGHT - BOTTOM - top * (HEIGHT - BOTTOM - TOP)

    told = "; ".join(
        f"{arm}: quality {min(p['quality'] for p in points):.3g} to {max(p['quality'] for p in points):.3g} at "
        f"{x} {min(p[x] for p in points):.3g} to {max(p[x] for p in points):.3g}"
        for arm, points in shown.items()
        if points
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="system-ui,sans-serif" font-size="12" fill="currentColor">'
        f"<title>Quality against {html.escape(words)}</title><desc>{html.escape(told)}</desc>"
    ]
    for value in across:
        at = place({x: value, "quality": up[0]})[0]
        parts.append(f'<path d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for value in up:
        at = place({x: across[0], "quality": value})[1]
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - KEY}" stroke="currentColor" stroke-opacity=".15"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    middle = LEFT + (WIDTH - LEFT - KEY) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{html.escape(words)}</text>')
    turned = f'transform="rotate(-90 14 {HEIGHT / 2:.0f})"'
    parts.append(f'<text x="14" y="{HEIGHT / 2:.0f}" text-anchor="middle" {turned}>quality</text>')
    for number, (arm, points) in enumerate(shown.items()):
        key = WIDTH - KEY + 20
        parts.append(mark(number, key, TOP + 12 + 18 * number, ""))
        parts.append(f'<text x="{key + 12}" y="{TOP + 16 + 18 * number}">{html.escape(arm)}</text>')
        for point in points:
            setting = ", ".join(f"{name} {value:.4g}" for name, value in point.items() if name not in MEASURES)
            says = f"{arm}, {setting}: quality {point['quality']:.3f}, {x} {point[x]:.3g}"
            parts.append(mark(number, *place(point), says))
    if start:
        left, top = place(start)
        parts.append(
            f'<path d="M{left - 6:.1f} {top:.1f}h12M{left:.1f} {top - 6:.1f}v12" stroke="currentColor" '
            'stroke-width="2"><title>before training</title></path>'
        )
    return "".join([*parts, "</svg>"])


def axis(values: Sequence[float]) -> list[float]:
    """Round ticks from below the least to above the largest value."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    return [round(i * step, 12) for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def mark(number: int, x: float, y: float, says: str) -> str:
    """A shape of its own for each arm, so that colour is not needed to tell them apart."""
    ink = INK[number % len(INK)]
    shapes = (
        f"M{x - 4:.1f} {y:.1f}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z",
        f"M{x:.1f} {y - 5:.1f}l5 9h-10z",
        f"M{x:.1f} {y - 6:.1f}l5 6l-5 6l-5 -6z",
        f"M{x:.1f} {y + 5:.1f}l5 -9h-10z",
    )
    hollow = number // len(shapes) % 2
    paint = f'fill="none" stroke="{ink}" stroke-width="2"' if hollow else f'fill="{ink}" fill-opacity=".75"'
    return f'<path d="{shapes[number % len(shapes)]}" {paint}><title>{html.escape(says)}</title></path>'
