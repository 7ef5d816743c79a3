"""Curry-DPO: several pairs per prompt, trained from easy to hard in stages, each stage held to the one before.

Paper: arXiv 2403.07230 (section 3, figure 1); published as "Enhancing Alignment using Curriculum Learning & Ranked
    Preferences", EMNLP 2024 Findings.
Read beside: no official training code was found; trl 1.16.0 (trainer/dpo_trainer.py) for what one DPOTrainer per stage
    takes for its reference.
Deviations: the log-probability gap is signed, chosen minus rejected under the starting model, summed or per token (the
    paper does not say which of them); ties, rankings of other lengths than four and resuming are settled here.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, get_args

from counterproof.errors import UserError, extra

with extra("preference"):
    import numpy as np
    import torch

from counterproof.files import replacing
from counterproof.language import Group, Language, Logps
from counterproof.preference.data import Example, encode
from counterproof.preference.forward import optimise, reference_logps, referenced
from counterproof.preference.objectives import DPO, Objective, Output, Sample

if TYPE_CHECKING:
    from torch import nn

    from counterproof.preference.trainer import Trained, TrainSettings

__all__ = ["Curriculum", "CurriculumTrainer", "CurryDPO", "Stage", "StageReport"]

Ranked = Example | Sample
Gap = Callable[[Any, int, int], float]
Criterion = Literal["score_gap", "logp_gap", "logp_gap_per_token"]
Scope = Literal["local", "global"]
Order = Literal["easy_to_hard", "hard_to_easy", "random"]
Pairing = Literal["best_vs_rest", "best_worst", "best_random"]
Reference = Literal["previous_stage", "initial"]
Within = Literal["shuffled", "sorted"]

WATCHED = 64  # pairs of the first stage on which the distance to the start is measured
STATE = "curriculum.json"


@dataclass(frozen=True, eq=False)
class Stage:
    """The pairs of one stage, in the order of the data.

    Attributes:
        number: from 1.
        pairs: pair `Example`s, or `Sample`s of two completions with the scores 1 and 0: as the rankings were given.
        gaps: per pair by how much the chosen completion is ahead, in the criterion's unit.
    """

    number: int
    pairs: tuple[Any, ...]
    gaps: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)

    @property
    def mean_gap(self) -> float:
        """The mean of `gaps`."""
        return sum(self.gaps) / len(self.gaps)

    def sorted(self, order: Order = "easy_to_hard") -> "Stage":
        """The stage with its pairs from the widest gap to the narrowest, or the other way; stable."""
        if order == "random":
            raise ValueError("a random order has no sorting; sort from easy_to_hard or hard_to_easy")
        sign = -1 if order == "easy_to_hard" else 1
        places = sorted(range(len(self.gaps)), key=lambda place: sign * self.gaps[place])
        return replace(
            self,
            pairs=tuple(self.pairs[place] for place in places),
            gaps=tuple(self.gaps[place] for place in places),
        )

    def rows(self) -> list[dict[str, Any]]:
        """``prompt``, ``chosen``, ``rejected`` of each pair, for ``datasets.Dataset.from_list`` and TRL.

        Raises:
            TypeError: the curriculum was made of samples, which have tokens and no text.
        """
        if not all(isinstance(pair, Example) for pair in self.pairs):
            raise TypeError("this curriculum was made of tokenised samples; make it of Examples to have texts")
        return [
            {"prompt": pair.prompt, "chosen": pair.completions[0], "rejected": pair.completions[1]}
            for pair in self.pairs
        ]


@dataclass(frozen=True, eq=False)
class Curriculum:
    """Pairs of ranked completions, in stages; iterating gives the stages in the order of training.

    Attributes:
        stages: none is empty.
        order: as they were asked for.
        dropped: rankings that gave no pair, because all their scores are equal.
        ties: pairs that were not made, because the completion is rated as high as the best.
    """

    stages: tuple[Stage, ...]
    order: Order
    dropped: int
    ties: int

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @classmethod
    def from_ranked(
        cls,
        ranked: Iterable[Example | Sample | Mapping[str, Any]],
        *,
        criterion: Criterion | Gap = "score_gap",
        scope: Scope = "local",
        stages: int = 3,
        order: Order = "easy_to_hard",
        pairing: Pairing = "best_vs_rest",
        language: Language | None = None,
        max_length: int = 1024,
        seed: int = 0,
    ) -> Self:
        """Make pairs and deal them to stages (section 3 of the paper).

        Completions are ranked by score, equal scores by their place; the best is the chosen one of every pair. A pair
        of equal scores is not made.

        Args:
            ranked: examples of `preference.data.read` (ranked or pair), samples, or rows with ``prompt``,
                ``completions`` and ``scores``, such as those of a `datasets.Dataset`; higher scores are better.
            criterion: what makes a pair easy. ``"score_gap"``: the difference of the scores. ``"logp_gap"``: the
                log-probability of the chosen minus that of the rejected completion under `language`, in nats;
                ``"logp_gap_per_token"``: the same of their means. A callable ``(ranking, chosen, rejected) -> gap``
                takes the ranking and two indices of its completions. Wider is easier.
            scope: ``"local"``: every ranking deals its own pairs to the stages, its easiest to the first; with more
                pairs than stages neighbours share one. ``"global"``: all pairs are sorted and cut into stages whose
                sizes differ by one at most.
            stages: how many; fewer come out when no ranking has so many pairs.
            order: of the stages. ``"random"`` deals each ranking's own pairs (local) or all pairs (global) to the same
                stage sizes by lot; with ``stages=1`` all are pooled, which is MultiPair DPO.
            pairing: ``"best_vs_rest"``: the best against every other one, from four responses the paper's (R1, R4),
                (R1, R3), (R1, R2). ``"best_worst"`` and ``"best_random"`` make one pair per ranking.
            language: the model that training begins with, for the log-probability gaps.
            max_length: tokens of prompt and longest completion, for those gaps; see `preference.data.encode`.
            seed: for what is drawn by lot.

        Raises:
            ValueError: naming the row: fewer than two completions, scores that are not finite or of another number; an
                unknown option; log-probability gaps without a model.
            UserError: no pair is left; an example that is neither ranked nor a pair.

        Warns:
            UserWarning: all log-probability gaps are equal; the scores' gaps are used in their place.

        Example:
            >>> row = {"prompt": "a", "completions": ["b", "c", "d", "e"], "scores": [9, 7, 7, 2]}
            >>> [stage.rows()[0]["rejected"] for stage in Curriculum.from_ranked([row])]
            ['e', 'd', 'c']
        """
        if not callable(criterion):
            _one_of("criterion", criterion, Criterion)
        _one_of("scope", scope, Scope)
        _one_of("order", order, Order)
        _one_of("pairing", pairing, Pairing)
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"stages is {stages!r}; expected a whole number >= 1")
        rng = np.random.default_rng(seed)
        rankings = [_ranking(row, number) for number, row in enumerate(ranked, 1)]
        pairs, dropped, ties = _pairs(rankings, pairing, rng)
        if not pairs:
            raise UserError(f"none of {len(rankings)} rankings has two different scores; there is nothing to prefer")
        pairs = _with_gaps(rankings, pairs, criterion, language, max_length)
        if scope == "local":
            dealt = _deal_each(pairs, stages, rng if order == "random" else None)
        else:
            dealt = _deal_all(pairs, stages, rng if order == "random" else None)
        dealt = [part for part in dealt if part]
        if order == "hard_to_easy":
            dealt.reverse()
        made = []
        for number, part in enumerate(dealt, 1):
            part.sort(key=lambda pair: (pair.row, pair.rejected))
            made.append(Stage(number, tuple(_pair(rankings[p.row], p) for p in part), tuple(pair.gap for pair in part)))
        return cls(tuple(made), order, dropped, ties)


class _Pair(NamedTuple):
    row: int
    chosen: int
    rejected: int
    rank: int  # of the rejected one, from 1 (the second best)
    score_gap: float
    gap: float


def _one_of(name: str, value: Any, kind: Any) -> None:
    if value not in get_args(kind):
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(kind)))}")


def _ranking(row: Any, number: int) -> Ranked:
    if isinstance(row, Mapping):
        where = f"row {number}"
        missing = [name for name in ("prompt", "completions", "scores") if name not in row]
        if missing:
            raise ValueError(f"{where} has no {missing[0]!r}; a ranking has prompt, completions and scores")
        completions, scores = tuple(row["completions"]), tuple(row["scores"])
        _check_scores(where, len(completions), scores)
        columns = {name: value for name, value in row.items() if name not in ("prompt", "completions", "scores")}
        return Example(
            prompt=row["prompt"],
            completions=completions,
            scores=tuple(map(float, scores)),
            kind="ranked",
            columns=columns,
            where=where,
        )
    if not isinstance(row, Example | Sample):
        raise TypeError(f"row {number} is a {type(row).__name__}; expected an Example, a Sample or a mapping")
    where = row.where or f"row {number}"
    if isinstance(row, Example) and row.kind not in ("ranked", "pair"):
        raise UserError(f"{where}: {row.kind}: a curriculum is made of rankings or pairs")
    completions = row.completions if isinstance(row, Example) else row.group.completions
    _check_scores(where, len(completions), row.scores)
    return row


def _check_scores(where: str, completions: int, scores: Sequence[Any]) -> None:
    if completions < 2:
        raise ValueError(f"{where} has {completions} completions; a ranking needs two or more")
    if len(scores) != completions:
        raise ValueError(f"{where} has {completions} completions and {len(scores)} scores; each needs one score")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float | np.number) or not math.isfinite(score):
            raise ValueError(f"{where} has the score {score!r}; scores are finite numbers")


def _pairs(rankings: Sequence[Ranked], pairing: Pairing, rng: np.random.Generator) -> tuple[list[_Pair], int, int]:
    pairs: list[_Pair] = []
    dropped = ties = 0
    for row, ranking in enumerate(rankings):
        scores = ranking.scores
        ranks = sorted(range(len(scores)), key=lambda place: -scores[place])
        best = ranks[0]
        rest = list(enumerate(ranks))[1:]
        worse = [(rank, place) for rank, place in rest if scores[place] < scores[best]]
        ties += len(rest) - len(worse)
        dropped += not worse
        if worse and pairing == "best_worst":
            worse = worse[-1:]
        elif worse and pairing == "best_random":
            worse = [worse[rng.integers(len(worse))]]
        for rank, place in worse:
            gap = scores[best] - scores[place]
            pairs.append(_Pair(row, best, place, rank, gap, gap))
    return pairs, dropped, ties


def _with_gaps(
    rankings: Sequence[Ranked],
    pairs: list[_Pair],
    criterion: Criterion | Gap,
    language: Language | None,
    max_length: int,
) -> list[_Pair]:
    if criterion == "score_gap":
        return pairs
    if callable(criterion):
        gaps = [float(criterion(rankings[pair.row], pair.chosen, pair.rejected)) for pair in pairs]
        for pair, gap in zip(pairs, gaps, strict=True):
            if not math.isfinite(gap):
                where = rankings[pair.row].where or f"row {pair.row + 1}"
                raise ValueError(f"{where}: the criterion gave {gap}; a gap is a finite number")
        return [pair._replace(gap=gap) for pair, gap in zip(pairs, gaps, strict=True)]
    if language is None:
        raise ValueError(f"criterion {criterion!r} needs the model that training begins with; give language=")
    samples = referenced(language.model, [_sample(ranking, language, max_length) for ranking in rankings])
    logps = reference_logps(samples)
    values = (logps.sum() if criterion == "logp_gap" else logps.mean()).tolist()
    starts = np.cumsum([0, *(len(sample.group.completions) for sample in samples)]).tolist()
    gaps = [values[starts[pair.row] + pair.chosen] - values[starts[pair.row] + pair.rejected] for pair in pairs]
    if max(gaps) - min(gaps) <= 1e-5 * (1 + max(map(abs, gaps))):
        warnings.warn(
            "the model gives all pairs the same log-probability gap, which orders nothing; the scores' gaps are used",
            stacklevel=3,
        )
        return pairs
    return [pair._replace(gap=gap) for pair, gap in zip(pairs, gaps, strict=True)]


def _deal_each(pairs: Sequence[_Pair], stages: int, rng: np.random.Generator | None) -> list[list[_Pair]]:
    """Every ranking's pairs over the stages, its easiest first, or by lot."""
    dealt: list[list[_Pair]] = [[] for _ in range(stages)]
    by_row: dict[int, list[_Pair]] = {}
    for pair in pairs:
        by_row.setdefault(pair.row, []).append(pair)
    for own in by_row.values():
        own.sort(key=lambda pair: (-pair.gap, -pair.score_gap, -pair.rank))
        if rng is not None:
            own = [own[place] for place in rng.permutation(len(own))]
        for place, pair in enumerate(own):
            dealt[place if len(own) <= stages else place * stages // len(own)].append(pair)
    return dealt


def _deal_all(pairs: Sequence[_Pair], stages: int, rng: np.random.Generator | None) -> list[list[_Pair]]:
    """All pairs sorted by gap, or shuffled, and cut."""
    if rng is None:
        line = sorted(pairs, key=lambda pair: -pair.gap)
    else:
        line = [pairs[place] for place in rng.permutation(len(pairs))]
    cuts = [len(line) * number // stages for number in range(stages + 1)]
    return [line[start:end] for start, end in itertools.pairwise(cuts)]


def _pair(ranking: Ranked, pair: _Pair) -> Ranked:
    both = (pair.chosen, pair.rejected)
    if isinstance(ranking, Sample):
        group = Group(ranking.group.prompt, tuple(ranking.group.completions[place] for place in both))
        columns = {name: [values[place] for place in both] for name, values in ranking.columns.items()}
        return Sample(group, (1.0, 0.0), columns, ranking.where)
    if ranking.kind == "pair":
        return ranking
    return replace(
        ranking,
        completions=tuple(ranking.completions[place] for place in both),
        scores=(1.0, 0.0),
        kind="pair",
        columns={
            **{name: _of_both(values, both, len(ranking.scores)) for name, values in ranking.columns.items()},
            "score_chosen": ranking.scores[pair.chosen],
            "score_rejected": ranking.scores[pair.rejected],
        },
    )


def _of_both(values: Any, both: tuple[int, int], count: int) -> Any:
    """The pair's own of a column with a number, or equally many numbers, for each completion; else the column."""
    if not isinstance(values, list | tuple) or len(values) != count:
        return values
    flat = [number for value in values for number in (value if isinstance(value, list | tuple) else [value])]
    if not all(isinstance(number, int | float) for number in flat):
        return values
    return [values[place] for place in both]


def _sample(one: Ranked, language: Language, max_length: int) -> Sample:
    if isinstance(one, Sample):
        return one
    return Sample(encode(one, language.tokenizer, max_length=max_length).group, one.scores, {}, one.where)


# training


class StageReport(NamedTuple):
    """What a stage did.

    Attributes:
        number, pairs, steps, mean_gap: of the stage.
        first_loss, last_loss: mean loss of its first batch, before any step, and of its last. With DPO and the previous
            stage for reference the first is log 2.
        chosen_drift, rejected_drift: at its end, mean of ``log pi - log pi_0`` in nats per completion over the first
            64 pairs of the first stage, pi_0 being the model that training began with: how far the references that
            moved have let the model go.
    """

    number: int
    pairs: int
    steps: int
    mean_gap: float
    first_loss: float
    last_loss: float
    chosen_drift: float
    rejected_drift: float


class _InOrder(np.random.Generator):
    """Leaves what it is asked to shuffle as it is."""

    def permutation(self, x: Any, axis: int = 0) -> Any:
        return np.arange(x)


class CurriculumTrainer:
    """Train a model on a curriculum, stage by stage, by any objective of pairs.

    Each stage starts with a fresh optimizer, a fresh schedule (warm-up, then constant) and, as it is asked for, a fresh
    reference: the log-probabilities of its pairs under the model *as it is* at the boundary. Whatever adapters are
    active count, so that with LoRA the adapter of the last stage is the reference and not the base model. Nothing but
    those numbers is kept, no second model.

    Args:
        language: model and tokenizer (``Language(model, tokenizer)``); the model is trained in place, those of its
            parameters that require gradients.
        curriculum: stages of Examples or Samples.
        objective: of pairs; None is `DPO` with the paper's beta of 0.1.
        reference: ``"previous_stage"``, the paper's; ``"initial"`` keeps the model that training began with.
        steps_per_stage: optimizer steps, one number or one for each stage; None: so many that every pair is used
            `epochs` times.
        epochs: when `steps_per_stage` is None.
        batch: pairs in a step.
        learning_rate, warmup: of AdamW without weight decay; warm-up in steps. Gradients are clipped to norm 1.
        within: ``"shuffled"``, or ``"sorted"`` for batches that follow the gaps in the curriculum's direction. One
            stage that is sorted is the paper's non-iterative variant.
        max_length: tokens of prompt and longest completion, see `preference.data.encode`.
        seed: of the order of the pairs.
        out: a folder. After each stage the model and tokenizer are saved in ``out/stage-1`` and so on (a peft model's
            adapter alone), and a run that was interrupted goes on at the last boundary.
        watch: is told stage, step within it from 1, and the objective's output after each step.

    Raises:
        ValueError: an unknown option or a number out of range.
    """

    def __init__(
        self,
        language: Language,
        *,
        curriculum: Curriculum,
        objective: Objective | None = None,
        reference: Reference = "previous_stage",
        steps_per_stage: int | Sequence[int] | None = None,
        epochs: int = 1,
        batch: int = 32,
        learning_rate: float = 5e-7,
        warmup: int = 5,
        within: Within = "shuffled",
        max_length: int = 1024,
        seed: int = 0,
        out: Path | str | None = None,
        watch: Callable[[int, int, Output], None] | None = None,
    ) -> None:
        _one_of("reference", reference, Reference)
        _one_of("within", within, Within)
        if within == "sorted" and curriculum.order == "random":
            raise ValueError("within='sorted' contradicts the curriculum's order 'random'; shuffle within its stages")
        if isinstance(steps_per_stage, Sequence) and len(steps_per_stage) != len(curriculum):
            raise ValueError(f"steps_per_stage has {len(steps_per_stage)} numbers for {len(curriculum)} stages")
        self.language = language
        self.curriculum = curriculum
        self.objective = DPO(beta=0.1) if objective is None else objective
        self.reference = reference
        self.batch = batch
        self.learning_rate = learning_rate
        self.warmup = warmup
        self.within = within
        self.max_length = max_length
        self.seed = seed
        self.out = None if out is None else Path(out)
        self.watch = watch
        self.notes: list[str] = []
        if steps_per_stage is None:
            self.steps = [epochs * math.ceil(len(stage) / max(1, batch)) for stage in curriculum]
        elif isinstance(steps_per_stage, Sequence):
            self.steps = list(steps_per_stage)
        else:
            self.steps = [steps_per_stage] * len(curriculum)
        if min(batch, *self.steps) < 1:
            raise ValueError(f"batch {batch} and steps {self.steps} must be whole numbers >= 1")

    def train(self) -> list[StageReport]:
        """Train all stages that are not done yet.

        Returns:
            A report for each stage, those done before an interruption included.

        Raises:
            UserError: `out` holds another run's stages.
            ArithmeticError: a loss or gradient that is not finite.
        """

        def optimised(number: int, samples: list[Sample], objective: Objective) -> list[float]:
            losses: list[float] = []

            def seen(step: int, output: Output) -> None:
                losses.append(float(output.loss.detach()))
                if self.watch is not None:
                    self.watch(number, step, output)

            shuffled = np.random.default_rng([self.seed, number])
            optimise(
                self.language.model,
                objective,
                samples,
                steps=self.steps[number - 1],
                batch=self.batch,
                learning_rate=self.learning_rate,
                warmup=self.warmup,
                rng=_InOrder(np.random.PCG64(0)) if self.within == "sorted" else shuffled,
                watch=seen,
            )
            return losses

        return self._train(optimised)

    def _train(self, train_stage: Callable[[int, list[Sample], Objective], list[float]]) -> list[StageReport]:
        model = self.language.model
        stages = [
            self._samples((stage.sorted(self.curriculum.order) if self.within == "sorted" else stage).pairs)
            for stage in self.curriculum
        ]
        objective = self.objective.calibrated(_mean_length(stages))
        key = "" if self.out is None else self._key(stages)
        reports = self._done(key)
        compares = "reference" in objective.needs
        # Before any stage's weights are loaded: this is the only moment at which the model is the initial one.
        if compares:
            stages[0] = referenced(model, stages[0])
            if self.reference == "initial":
                stages[1:] = [referenced(model, samples) for samples in stages[1:]]
        start = stages[0][:WATCHED] if compares else referenced(model, stages[0][:WATCHED])
        if reports:
            _load(model, self._folder(len(reports)))
        for stage, samples in zip(self.curriculum, stages, strict=True):
            if stage.number <= len(reports):
                continue
            if compares and self.reference == "previous_stage" and stage.number > 1:
                samples = referenced(model, samples)
            losses = train_stage(stage.number, samples, objective)
            drift = _ratios(model, start)
            reports.append(
                StageReport(
                    number=stage.number,
                    pairs=len(stage),
                    steps=len(losses),
                    mean_gap=stage.mean_gap,
                    first_loss=losses[0],
                    last_loss=losses[-1],
                    chosen_drift=float(drift[::2].mean()),
                    rejected_drift=float(drift[1::2].mean()),
                )
            )
            self._save(key, reports)
        return reports

    def _samples(self, pairs: Sequence[Ranked]) -> list[Sample]:
        if all(isinstance(pair, Sample) for pair in pairs):
            return list(pairs)  # type: ignore[arg-type]
        from counterproof.preference.trainer import prepare

        samples, notes = prepare(
            pairs,  # type: ignore[arg-type]
            self.language.tokenizer,
            max_length=self.max_length,
            objective=self.objective,
        )
        self.notes += notes
        return samples

    # what is on disk

    def _folder(self, number: int) -> Path:
        assert self.out is not None
        return self.out / f"stage-{number}"

    def _key(self, stages: Sequence[Sequence[Sample]]) -> str:
        """What a run's result depends on, the model it begins with included."""
        digest = blake2b(digest_size=16)
        for name, value in sorted(self.language.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        settings = (self.reference, self.steps, self.batch, self.learning_rate, self.warmup, self.within, self.seed)
        digest.update(repr((self.objective, settings)).encode())
        for samples in stages:
            for sample in samples:
                digest.update(repr((sample.group, sample.scores, sorted(sample.columns.items()))).encode())
            digest.update(b"stage")
        return digest.hexdigest()

    def _done(self, key: str) -> list[StageReport]:
        if self.out is None or not (self.out / STATE).exists():
            return []
        try:
            state = json.loads((self.out / STATE).read_text(encoding="utf-8"))
            known, reports = state["key"], [StageReport(**report) for report in state["stages"]]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.out / STATE} is damaged; give another folder, or remove this one") from None
        if known != key:
            raise UserError(
                f"{self.out} holds the stages of another run (other model, data or settings); give another folder"
            )
        return reports

    def _save(self, key: str, reports: Sequence[StageReport]) -> None:
        if self.out is None:
            return
        folder = self._folder(len(reports))
        folder.mkdir(parents=True, exist_ok=True)
        self.language.model.save_pretrained(folder)
        self.language.tokenizer.save_pretrained(folder)
        # Only now does the stage count as done.
        with replacing(self.out / STATE) as stream:
            json.dump({"key": key, "stages": [report._asdict() for report in reports]}, stream, indent=1)


def _mean_length(stages: Sequence[Sequence[Sample]]) -> float:
    lengths = [len(ids) for samples in stages for sample in samples for ids in sample.group.completions]
    return sum(lengths) / len(lengths)


def _ratios(model: "nn.Module", samples: Sequence[Sample]) -> torch.Tensor:
    """(n,): ``D`` of the samples' completions."""
    now: Logps = reference_logps(referenced(model, samples))
    difference: torch.Tensor = now.sum() - reference_logps(samples).sum()
    return difference


def _load(model: Any, folder: Path) -> None:
    """Put what `save_pretrained` wrote back into the model it was written from."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        name = model.active_adapter
        own = folder if name == "default" else folder / name
        set_peft_model_state_dict(model, load_peft_weights(str(own)), adapter_name=name)
        return
    saved = type(model).from_pretrained(folder, dtype=next(model.parameters()).dtype)
    model.load_state_dict(saved.state_dict())


# the whole recipe


@dataclass(frozen=True, kw_only=True)
class CurryDPO:
    """The paper's recipe in one object: curriculum, objective and reference.

    ``train(model, data, method="curry-dpo", out=...)`` and the command line use it by its name.

    Args:
        objective: of pairs, or the name of one of the room's, with its defaults; None is DPO with `beta`.
        beta: of DPO.
        criterion, scope, stages, order, pairing: see `Curriculum.from_ranked`.
        reference, within: see `CurriculumTrainer`.
    """

    objective: Objective | str | None = None
    beta: float = 0.1
    criterion: Criterion = "score_gap"
    scope: Scope = "local"
    stages: int = 3
    order: Order = "easy_to_hard"
    pairing: Pairing = "best_vs_rest"
    reference: Reference = "previous_stage"
    within: Within = "shuffled"
    name: ClassVar[str] = "curry-dpo"

    def __post_init__(self) -> None:
        for name, kind in (
            ("criterion", Criterion),
            ("scope", Scope),
            ("order", Order),
            ("pairing", Pairing),
            ("reference", Reference),
            ("within", Within),
        ):
            _one_of(name, getattr(self, name), kind)
        self._objective()

    def train(
        self,
        language: Language,
        ranked: Iterable[Example | Sample | Mapping[str, Any]],
        *,
        steps: int,
        batch: int,
        learning_rate: float = 5e-7,
        warmup: int = 5,
        max_length: int = 1024,
        seed: int = 0,
        out: Path | str | None = None,
        watch: Callable[[int, int, Output], None] | None = None,
    ) -> list[StageReport]:
        """Make the curriculum and train on it by `CurriculumTrainer`.

        Args:
            ranked: see `Curriculum.from_ranked`.
            steps: in all, divided among the stages as evenly as possible.
            language, batch, learning_rate, warmup, max_length, seed, out, watch: see `CurriculumTrainer`.

        Raises:
            ValueError: fewer steps than stages; and what curriculum and trainer raise.
        """
        curriculum = self._curriculum(ranked, language, max_length, seed)
        return CurriculumTrainer(
            language,
            curriculum=curriculum,
            objective=self._objective(),
            reference=self.reference,
            steps_per_stage=_divided(steps, len(curriculum)),
            batch=batch,
            learning_rate=learning_rate,
            warmup=warmup,
            within=self.within,
            max_length=max_length,
            seed=seed,
            out=out,
            watch=watch,
        ).train()

    def fit(
        self, language: Language, examples: Sequence[Example], *, settings: "TrainSettings", out: Path
    ) -> "Trained":
        """Train on the user's own rankings, a `PreferenceTrainer` for each stage: what `preference.train` calls.

        Args:
            language: model and tokenizer. With ``settings.lora`` the model gets an adapter, unless it has one.
            examples: rankings; pairs make one stage, which is plain training.
            settings: `epochs` counts passes over each stage, `steps` all stages together; the schedule restarts at each
                stage. Nothing is evaluated on the way.
            out: the trained model or adapter is saved here, that of each stage in ``stage-1`` and so on. A run that was
                interrupted goes on at the last boundary.
        """
        from counterproof.preference.trainer import (
            PreferenceTrainer,
            Trained,
            lora_config,
            save,
            training_arguments,
            with_adapter,
        )

        curriculum = self._curriculum(examples, language, settings.max_length, settings.seed)
        model, tokenizer = language
        adapter = lora_config(settings, model)
        if adapter is not None:
            model = with_adapter(model, adapter, settings.seed)
        if settings.steps is not None:
            steps = _divided(settings.steps, len(curriculum))
        else:
            steps = [math.ceil(settings.epochs * math.ceil(len(stage) / settings.batch)) for stage in curriculum]
        stages = CurriculumTrainer(
            Language(model, tokenizer),
            curriculum=curriculum,
            objective=self._objective(),
            reference=self.reference,
            steps_per_stage=steps,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            within=self.within,
            max_length=settings.max_length,
            seed=settings.seed,
            out=out,
        )
        history: list[dict[str, float]] = []

        def trained(number: int, samples: list[Sample], objective: Objective) -> list[float]:
            total = steps[number - 1]
            trainer = PreferenceTrainer(
                model,
                objective,
                training_arguments(
                    settings,
                    model,
                    out / f"stage-{number}",
                    total,
                    train_sampling_strategy="sequential" if self.within == "sorted" else "random",
                    save_strategy="no",
                    logging_steps=1,
                    seed=settings.seed + number,
                ),
                samples,
                processing_class=tokenizer,
                micro_tokens=settings.micro_tokens,
            )
            trainer.train()
            rows = [row for row in trainer.state.log_history if "loss" in row]
            done = sum(steps[: number - 1])
            history.extend({**row, "step": done + row["step"], "stage": number} for row in rows)
            return [row["loss"] for row in rows]

        reports = stages._train(trained)
        notes = [*dict.fromkeys(stages.notes)]
        notes.append(f"{len(curriculum)} stages of {', '.join(str(len(stage)) for stage in curriculum)} pairs")
        if curriculum.dropped or curriculum.ties:
            notes.append(
                f"{curriculum.dropped} rankings gave no pair; {curriculum.ties} pairs of equal scores were not made"
            )
        final = {name: reports[-1]._asdict()[name] for name in ("last_loss", "chosen_drift", "rejected_drift")}
        finished = Trained(model, tokenizer, out, tuple(history), final, tuple(notes))
        about = {"method": self.name, "objective": repr(stages.objective)}
        save(finished, out, {**about, "stages": [report._asdict() for report in reports]})
        return finished

    def _objective(self) -> Objective:
        if self.objective is None:
            return DPO(beta=self.beta)
        if isinstance(self.objective, Objective):
            return self.objective
        from counterproof.preference.trainer import find_method

        found = find_method(self.objective)
        if not isinstance(found, Objective):
            raise UserError(f"objective {self.objective!r} is a method of its own; name an objective, such as 'dpo'")
        return found

    def _curriculum(self, ranked: Iterable[Any], language: Language, max_length: int, seed: int) -> Curriculum:
        return Curriculum.from_ranked(
            ranked,
            criterion=self.criterion,
            scope=self.scope,
            stages=self.stages,
            order=self.order,
            pairing=self.pairing,
            language=language,
            max_length=max_length,
            seed=seed,
        )


def _divided(steps: int, stages: int) -> list[int]:
    if steps < stages:
        raise ValueError(f"{steps} steps for {stages} stages; each needs one at least")
    each, more = divmod(steps, stages)
    return [each + (number < more) for number in range(stages)]
