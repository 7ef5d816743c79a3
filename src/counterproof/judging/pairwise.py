"""Which of two answers is better: a judge is asked in both positions, and its habits are measured with its verdicts.

The verdicts are the five levels of Arena-Hard (arXiv 2406.11939), read strictly: what cannot be read stays unread.
"""

import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from counterproof.errors import UserError
from counterproof.files import replacing
from counterproof.judging.asking import ask_judge
from counterproof.judging.templates import PromptTemplate
from counterproof.language.conversation import Chat

__all__ = [
    "Estimate",
    "Judgment",
    "Pair",
    "PairwiseJudge",
    "PairwiseReport",
    "battle_rows",
    "bootstrap_means",
    "pairwise_report",
    "read_pairs",
    "read_verdict",
    "write_json_lines",
]

LEVELS = {"A>>B": 2, "A>B": 1, "A=B": 0, "B>A": -1, "B>>A": -2}
WINNERS = {"model_a": 1, "tie": 0, "model_b": -1}
PLACES = ("prompt", "answer_a", "answer_b")
CUT = "\n[... cut]"
BLOCK = 2**22  # resampling counts held at a time


def read_verdict(text: str) -> str | None:
    """The verdict of a reply, by Arena-Hard's rule: the last ``[[...]]``, or the last ``[...]`` if there is none.

    Args:
        text: a judge's reply, without the question.

    Returns:
        ``"A>>B"``, ``"A>B"``, ``"A=B"``, ``"B>A"`` or ``"B>>A"``; None when there is no verdict, or the last one is
        none of these (as in ``[[A<B]]``, ``[[A]]``).
    """
    upper = text.upper()
    found = re.findall(r"\[\[([AB<>=]+)\]\]", upper) or re.findall(r"\[([AB<>=]+)\]", upper)
    return found[-1] if found and found[-1] in LEVELS else None


# pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers to one prompt.

    Attributes:
        prompt, answer_a, answer_b: texts.
        model_a, model_b: who gave the answers.
        prompt_id: pairs with the same one share the prompt, and are resampled together.
        winner: ``"model_a"``, ``"model_b"`` or ``"tie"`` by a person or another truth; None if unknown.
        category: of the prompt; empty if there are none.
        strength: 2 if the winner is much better, 1 if slightly.
        reason: why, for those who train a judge; empty if nobody said.
        totals: of the two answers, 1 to 10 each; None if nobody scored them.
    """

    prompt: str
    answer_a: str
    answer_b: str
    model_a: str = "a"
    model_b: str = "b"
    prompt_id: str = ""
    winner: str | None = None
    category: str = ""
    strength: int = 1
    reason: str = ""
    totals: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.strength not in (1, 2) or isinstance(self.strength, bool):
            raise ValueError(f"strength is {self.strength!r}; expected 1 (slightly better) or 2 (much better)")
        if self.totals is not None:
            totals = tuple(self.totals)
            if len(totals) != 2 or not all(type(total) is int and 1 <= total <= 10 for total in totals):
                raise ValueError(f"totals is {self.totals!r}; expected two whole numbers from 1 to 10")
            object.__setattr__(self, "totals", totals)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; every pair needs one")
        if self.model_a == self.model_b:
            raise ValueError(f"model_a and model_b are both {self.model_a!r}; a pair has two different models")
        if self.winner is not None and self.winner not in WINNERS:
            raise ValueError(f"winner is {self.winner!r}; expected one of {', '.join(WINNERS)}")
        if not self.prompt_id:
            object.__setattr__(self, "prompt_id", hashlib.sha256(self.prompt.encode()).hexdigest()[:12])


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and record of each line that is not blank.

    Raises:
        UserError: a file that cannot be read; a line that is not a JSON object; names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        said = "is not UTF-8 text" if isinstance(problem, UnicodeDecodeError) else problem.strerror
        raise UserError(f"cannot read {path}: {said}; name a JSONL file") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as problem:
            raise UserError(f"{path}:{number}: not JSON ({problem.msg}); each line is one JSON object") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: {line.strip():.60} is not a JSON object")
        yield number, record


def read_pairs(path: str | Path, *, labelled: bool = False) -> list[Pair]:
    """Pairs from a JSONL file: an object a line with the fields of `Pair`; other fields are ignored.

    Needed are prompt, answer_a, answer_b, and, where more than one pair shares a prompt, model_a and model_b.

    Args:
        path: the file.
        labelled: every pair must have a winner.

    Raises:
        UserError: file and line of what is missing, not a text, empty, or there twice; a file without pairs.
    """
    path = Path(path)
    pairs: list[Pair] = []
    prompts: dict[str, tuple[int, str]] = {}
    seen: dict[tuple[str, frozenset[str]], int] = {}
    for line, record in json_lines(path):
        values: dict[str, Any] = {}
        for name in Pair.__dataclass_fields__:
            value = record.get(name)
            if name == "prompt_id" and isinstance(value, int) and not isinstance(value, bool):
                value = str(value)
            if value is None:
                if name in PLACES or (labelled and name == "winner"):
                    raise UserError(f"{path}:{line}: no field {name!r}; it has {', '.join(map(repr, record))}")
                continue
            kind, called = {"strength": (int, "number"), "totals": (list, "list of two")}.get(name, (str, "text"))
            if not isinstance(value, kind):
                raise UserError(f"{path}:{line}: {name} is {value!r:.40}; expected a {called}")
            values[name] = value
        try:
            pair = Pair(**values)
        except ValueError as problem:
            raise UserError(f"{path}:{line}: {problem}") from None
        at, prompt = prompts.setdefault(pair.prompt_id, (line, pair.prompt))
        if prompt != pair.prompt:
            raise UserError(f"{path}:{line}: prompt_id {pair.prompt_id!r} has another prompt than in line {at}")
        key = (pair.prompt_id, frozenset((pair.model_a, pair.model_b)))
        if key in seen:
            raise UserError(
                f"{path}:{line}: {pair.model_a} and {pair.model_b} are compared on prompt_id {pair.prompt_id!r} in "
                f"line {seen[key]} already; both orders are asked anyway, so keep one of them, or name the models apart"
            )
        seen[key] = line
        pairs.append(pair)
    if not pairs:
        raise UserError(f"{path} has no pairs; each line is an object with {', '.join(PLACES)}")
    return pairs


# judging


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgment:
    """One game: a pair shown to a judge in one order.

    Attributes:
        pair: what was judged.
        order: ``"ab"``: model_a's answer was shown first, as A; ``"ba"``: model_b's.
        repeat: 0, 1, ...
        outcome: ``"read"``, ``"unparsed"`` or ``"failed"``, see `Answer`.
        verdict: as the judge put it, of the positions: A is what was shown first; None unless read.
        replies: every reply's text.
        problem: why it failed.
        cut: the last reply ended at `max_tokens`.
        answers_cut: answers of the pair that were shown shortened.
    """

    pair: Pair
    order: Literal["ab", "ba"]
    repeat: int
    outcome: Literal["read", "unparsed", "failed"]
    verdict: str | None
    replies: tuple[str, ...] = ()
    problem: str = ""
    cut: bool = False
    answers_cut: int = 0

    @property
    def level(self) -> int | None:
        """2 (model_a much better) to -2 (model_b much better), whichever was shown first; None unless read."""
        if self.verdict is None:
            return None
        return LEVELS[self.verdict] * (1 if self.order == "ab" else -1)

    @property
    def winner(self) -> str | None:
        """``"model_a"``, ``"model_b"`` or ``"tie"``; None unless read."""
        if self.level is None:
            return None
        return "tie" if self.level == 0 else "model_a" if self.level > 0 else "model_b"

    def as_json(self) -> dict[str, Any]:
        """A record for a JSONL file, without the texts of the pair."""
        own = {name: value for name, value in asdict(self).items() if name != "pair"}
        pair = {name: getattr(self.pair, name) for name in ("prompt_id", "model_a", "model_b")}
        return {**pair, **own, "winner": self.winner}


class PairwiseJudge:
    """A chat model that compares answers on five levels, each pair in both orders.

    Args:
        chat: the judge, from `counterproof.language.chat`. With a `cache` its replies are kept, and judging that was
            broken off goes on where it was.
        template: a file in place of the shipped ``pairwise`` prompt, see `PromptTemplate`; its places are
            ``{{prompt}}``, ``{{answer_a}}`` and ``{{answer_b}}``, all needed.
        name: of the judge, in battles.
        max_tokens: the longest reply; Arena-Hard's 4096.
        temperature: of the judge; 0, as Arena-Hard's.
        longest_answer: characters of an answer that are shown; a longer one loses its end, and is counted. None: all.
        jobs: questions under way at a time.

    Raises:
        UserError: a template that cannot be used; names the file.
    """

    def __init__(
        self,
        chat: Chat,
        template: str | Path | PromptTemplate | None = None,
        *,
        name: str | None = None,
        max_tokens: int = 4096,
        temperature: float = 0.0,
        longest_answer: int | None = None,
        jobs: int = 8,
    ) -> None:
        if longest_answer is not None and longest_answer < 1:
            raise ValueError(f"longest_answer is {longest_answer}; expected at least 1 character")
        self.chat = chat
        self.name = repr(chat) if name is None else name
        if not isinstance(template, PromptTemplate):
            template = PromptTemplate.read("pairwise" if template is None else template, needed=PLACES)
        self.template = template
        self.longest_answer = longest_answer
        self._settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "jobs": jobs}

    def messages(self, pair: Pair, order: str) -> list[dict[str, str]]:
        """What the judge is asked about a pair in an order, ``"ab"`` or ``"ba"``."""
        first, second = (shortened(answer, self.longest_answer) for answer in (pair.answer_a, pair.answer_b))
        if order == "ba":
            first, second = second, first
        return self.template.messages(prompt=pair.prompt, answer_a=first, answer_b=second)

    def judge(
        self,
        pairs: Sequence[Pair],
        *,
        repeats: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Judgment]:
        """Every pair in both orders, `repeats` times: 2 x repeats judgments per pair, in order of the pairs.

        Args:
            pairs: what to judge.
            repeats: more than one measures how often the judge agrees with itself. At temperature 0 a model that runs
                here always does; an endpoint need not.
            progress: called with the judgments had and those to be had.

        Raises:
            UserError: an endpoint that does not answer at all.
        """
        if repeats < 1:
            raise ValueError(f"repeats is {repeats}; expected at least 1")
        games: list[tuple[Pair, Literal["ab", "ba"]]] = [(pair, order) for pair in pairs for order in ("ab", "ba")]
        questions = [self.messages(pair, order) for pair, order in games]
        found: list[list[Judgment]] = [[] for _ in games]
        for repeat in range(repeats):
            watch = None
            if progress is not None:
                watch = _from(progress, repeat * len(games), repeats * len(games))
            answers = ask_judge(
                self.chat,
                questions,
                read_verdict,
                reminder=self.template.reminder,
                sample=repeat,
                progress=watch,
                **self._settings,
            )
            for own, (pair, order), answer in zip(found, games, answers, strict=True):
                own.append(
                    Judgment(
                        pair=pair,
                        order=order,
                        repeat=repeat,
                        outcome=answer.outcome,
                        verdict=answer.value,
                        replies=answer.replies,
                        problem=answer.problem,
                        cut=answer.cut,
                        answers_cut=sum(
                            self.longest_answer is not None and len(text) > self.longest_answer
                            for text in (pair.answer_a, pair.answer_b)
                        ),
                    )
                )
        return [judgment for own in found for judgment in own]


def shortened(text: str, longest: int | None) -> str:
    """A text without what is beyond so many characters, and marked so."""
    return text if longest is None or len(text) <= longest else text[:longest] + CUT


def _from(progress: Callable[[int, int], None], start: int, total: int) -> Callable[[int, int], None]:
    return lambda done, of: progress(start + done, total)


def battle_rows(judgments: Sequence[Judgment], *, judge: str, strong: float = 3.0) -> list[dict[str, Any]]:
    """Battles in the schema of arenas: model_a, model_b, winner, prompt_id, judge, weight, order.

    A pair and repeat of which one order has no verdict gives no battle, as in Arena-Hard: one order alone would carry
    the judge's position bias into the ranking. `model_a` is the pair's, in both orders; `order` says who
    was shown first.

    Args:
        judgments: from `PairwiseJudge.judge`.
        judge: its name.
        strong: weight of a verdict of "much better"; Arena-Hard's 3. It is divided, as every weight, by the number of
            repeats of the pair that count, so that asking more often does not count as more prompts.
    """
    if not 0 < strong < math.inf:
        raise ValueError(f"strong is {strong}; expected a weight above 0")
    rows: list[dict[str, Any]] = []
    for games in _complete(judgments).values():
        for game in itertools.chain(*games):
            rows.append(
                {
                    "model_a": game.pair.model_a,
                    "model_b": game.pair.model_b,
                    "winner": game.winner,
                    "prompt_id": game.pair.prompt_id,
                    "judge": judge,
                    "weight": (strong if abs(game.level or 0) == 2 else 1.0) / len(games),
                    "order": game.order,
                }
            )
    return rows


def _complete(judgments: Sequence[Judgment]) -> dict[Pair, list[tuple[Judgment, Judgment]]]:
    """Per pair the repeats in which both orders could be read, as (ab, ba)."""
    by_game: dict[tuple[Pair, int], dict[str, Judgment]] = defaultdict(dict)
    for judgment in judgments:
        by_game[judgment.pair, judgment.repeat][judgment.order] = judgment
    found: dict[Pair, list[tuple[Judgment, Judgment]]] = {}
    for (pair, _), orders in by_game.items():
        if len(orders) == 2 and all(game.verdict is not None for game in orders.values()):
            found.setdefault(pair, []).append((orders["ab"], orders["ba"]))
    return found


def write_json_lines(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object a line; the file is there in whole or not at all."""
    with replacing(Path(path)) as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


# what a judge is like


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: over all; NaN when there is nothing it could be of.
        low, high: of the percentile interval over resampled prompts; NaN with fewer than two prompts.
        count: what it is a mean over.
        prompts: of how many prompts.
    """

    value: float
    low: float
    high: float
    count: int
    prompts: int

    def as_json(self) -> dict[str, float | int | None]:
        """With None for NaN, which JSON does not have."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "-"
        return (
            f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if not math.isnan(self.low) else f"{self.value:.3f}"
        )


def prompt_counts(prompts: int, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (r, prompts), float64, of how often each prompt is drawn in each of `rounds` resamples."""
    rng = np.random.default_rng(seed)
    at = max(1, BLOCK // max(prompts, 1))
    for start in range(0, rounds, at):
        yield rng.multinomial(prompts, np.full(prompts, 1 / prompts), size=min(at, rounds - start)).astype(float)


def bootstrap_means(
    columns: Mapping[str, Sequence[float] | np.ndarray],
    prompts: Sequence[Hashable],
    *,
    rounds: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Means with percentile intervals in which whole prompts are resampled, the same ones for every column.

    Judgments of one prompt are not independent; resampling them one by one gives intervals that are too narrow.

    Args:
        columns: per figure a value for each row, NaN where it has none.
        prompts: per row what it belongs to.
        rounds: resamples.
        level: of the intervals.
        seed: of the resamples.
    """
    if rounds < 1 or not 0 < level < 1:
        raise ValueError(f"rounds is {rounds}, level {level}; expected at least 1, and a level between 0 and 1")
    index: dict[Hashable, int] = {}
    codes = np.array([index.setdefault(prompt, len(index)) for prompt in prompts], dtype=int)
    names, size = list(columns), len(index)
    sums, counts = np.zeros((size, len(names))), np.zeros((size, len(names)))
    for at, name in enumerate(names):
        values = np.asarray(columns[name], dtype=float)
        if values.shape != codes.shape:
            raise ValueError(f"column {name!r} has shape {values.shape}; there are {len(codes)} rows")
        there = ~np.isnan(values)
        np.add.at(sums[:, at], codes[there], values[there])
        np.add.at(counts[:, at], codes[there], 1.0)
    replicates = [
        _ratio(drawn @ sums, drawn @ counts) for drawn in (prompt_counts(size, rounds, seed) if size > 1 else ())
    ]
    drawn = np.concatenate(replicates) if replicates else np.empty((0, len(names)))
    found = {}
    for at, name in enumerate(names):
        own, total = drawn[:, at], counts[:, at].sum()
        own = own[~np.isnan(own)]
        many = np.count_nonzero(counts[:, at])
        low, high = interval(own, level) if many > 1 else (math.nan, math.nan)
        value = float(sums[:, at].sum() / total) if total else math.nan
        found[name] = Estimate(value, low, high, int(total), int(many))
    return found


def interval(replicates: np.ndarray, level: float) -> tuple[float, float]:
    """The percentile interval of replicates (r,); NaN without any."""
    if not len(replicates):
        return math.nan, math.nan
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)
    return ratio


FIGURES = {
    "position_bias": "wins of the first position less wins of the second, per pair asked in both orders; 0 is none",
    "consistency": "share of pairs with the same winner in both orders",
    "first_twice": "share of pairs in which the first position won both times",
    "second_twice": "share of pairs in which the second position won both times",
    "tie": "share of ties among the verdicts",
    "verbosity": "wins of the longer answer less wins of the shorter; not a bias by itself, it may be the better one",
    "verbosity_bias": "that, less the same of the labels: how much more the judge likes length than the labels do",
    "self_consistency": "share of repeats, of one order of one pair, that name the same winner",
    "agreement": "share of verdicts that name the labelled winner",
    "reminded": "share of games that had to be asked a second time",
    "unparsed": "share of games without a readable verdict",
    "failed": "share of games without an answer",
    "cut": "share of games whose last reply ended at the longest length",
}


@dataclass(frozen=True)
class PairwiseReport:
    """What a judge is like.

    Attributes:
        pairs, prompts, games: counts.
        complete: pairs of which some repeat could be read in both orders.
        figures: by name, see `FIGURES`; those that nothing can be said of are NaN.
        answers_cut: answers that were shown shortened.
        level, rounds: of the intervals.
    """

    pairs: int
    prompts: int
    games: int
    complete: int
    figures: dict[str, Estimate] = field(default_factory=dict)
    answers_cut: int = 0
    level: float = 0.95
    rounds: int = 1000

    def as_json(self) -> dict[str, Any]:
        """JSON values only."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "figures"}
        return {**own, "figures": {name: figure.as_json() for name, figure in self.figures.items()}}


def pairwise_report(
    judgments: Sequence[Judgment], *, rounds: int = 1000, level: float = 0.95, seed: int = 0
) -> PairwiseReport:
    """Position bias, verbosity, self-consistency, and what could not be read, with intervals over resampled prompts.

    Args:
        judgments: of one judge, from `PairwiseJudge.judge`.
        rounds, level, seed: of the bootstrap, see `bootstrap_means`.
    """
    rows: list[tuple[str, dict[str, float]]] = []  # (prompt, figures)
    by_order: dict[tuple[Pair, str], list[Judgment]] = defaultdict(list)
    for game in judgments:
        by_order[game.pair, game.order].append(game)
        read = game.winner is not None
        own = {
            "unparsed": float(game.outcome == "unparsed"),
            "failed": float(game.outcome == "failed"),
            "cut": float(game.cut),
            "reminded": float(len(game.replies) > 1),
            "tie": float(game.winner == "tie") if read else math.nan,
        }
        if read and game.pair.winner is not None:
            own["agreement"] = float(game.winner == game.pair.winner)
        rows.append((game.pair.prompt_id, own))
    complete = _complete(judgments)
    for ab, ba in itertools.chain.from_iterable(complete.values()):
        a, b = (WINNERS[str(game.winner)] for game in (ab, ba))  # 1: model_a
        own = {
            "position_bias": (a - b) / 2,
            "consistency": float(a == b),
            "first_twice": float(a == 1 and b == -1),
            "second_twice": float(a == -1 and b == 1),
        }
        longer = np.sign(len(ab.pair.answer_a) - len(ab.pair.answer_b))
        if longer:
            own["verbosity"] = float((a + b) / 2 * longer)
            if ab.pair.winner is not None:
                own["verbosity_bias"] = own["verbosity"] - float(WINNERS[ab.pair.winner] * longer)
        rows.append((ab.pair.prompt_id, own))
    for games in by_order.values():
        said = [game.winner for game in games if game.winner is not None]
        if len(said) > 1:
            agree = [float(one == other) for one, other in itertools.combinations(said, 2)]
            rows.append((games[0].pair.prompt_id, {"self_consistency": sum(agree) / len(agree)}))
    columns = {name: [own.get(name, math.nan) for _, own in rows] for name in FIGURES}
    shortened_ = {game.pair: game.answers_cut for game in judgments}
    return PairwiseReport(
        pairs=len({game.pair for game in judgments}),
        prompts=len({game.pair.prompt_id for game in judgments}),
        games=len(judgments),
        complete=len(complete),
        figures=bootstrap_means(columns, [prompt for prompt, _ in rows], rounds=rounds, level=level, seed=seed),
        answers_cut=sum(shortened_.values()),
        level=level,
        rounds=rounds,
    )
