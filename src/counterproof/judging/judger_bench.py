"""JudgerBench: how far a judge's verdicts, and the ranking of models that they add up to, agree with a truth.

Part A has human votes on pairs of conversations; part B replays how public benchmarks use a judge, with the verdicts of
a meta-judge as truth (arXiv 2410.16256). A file of one's own labelled pairs is evaluated in the same way.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from counterproof.errors import UserError
from counterproof.judging.asking import ask_judge
from counterproof.judging.pairwise import (
    PLACES,
    WINNERS,
    Estimate,
    Pair,
    bootstrap_means,
    interval,
    prompt_counts,
    read_pairs,
)
from counterproof.judging.templates import PromptTemplate, chosen_templates
from counterproof.judging.verdicts import RULES
from counterproof.language.conversation import Chat

__all__ = ["BenchItem", "BenchReport", "Correlation", "JudgeResult", "JudgerBench", "Verdicts"]

Messages = list[dict[str, str]]

# Part B, by the names that OpenCompass gives the data sets: template, places, and how verdicts are read.
REPLAYED = {
    "alignment_bench_v1_1": ("compass-b-alignbench", ("question", "prediction", "ref"), "bracket"),
    "alpaca_eval": ("compass-b-alpacaeval", ("question", "prediction", "ref"), "identifier"),
    "arenahard": ("compass-b-arenahard", ("question", "prediction", "ref"), "level"),
    "wildbench": ("compass-b-wildbench", ("history", "question", "prediction", "ref", "checklist"), "choice"),
    "fofo_test_prompts": ("compass-b-fofo", ("question", "prediction"), "format"),
    "fofo_test_prompts_cn": ("compass-b-fofo-cn", ("question", "prediction"), "format"),
}
DIALOGUES = {"en": "compass-dialogues", "cn": "compass-dialogues-cn"}
TEMPLATES = (*DIALOGUES.values(), *(name for name, _, _ in REPLAYED.values()), "pairwise")
TURNS = {"en": ("User", "Assistant A", "Assistant B"), "cn": ("用户", "助手A", "助手B")}


class HasChat(Protocol):
    """Such as `Judge` and `PairwiseJudge`."""

    @property
    def chat(self) -> Chat: ...


@dataclass(frozen=True, kw_only=True)
class BenchItem:
    """One question to a judge, and its true answer.

    Attributes:
        part: ``"A"``, ``"B"`` or ``"pairs"``.
        dataset, category: what figures are given for.
        truth: the true verdict, on the scale of its reader; of A first.
        question: messages.
        swapped: the same with the answers in the other order; None if only one is asked.
        reader: a key of `RULES`.
        reminder: after a reply that cannot be read.
        prompt_id: what is resampled together.
        models: whose sums the verdict adds to, with its sign.
    """

    part: Literal["A", "B", "pairs"]
    dataset: str
    category: str
    truth: float
    question: Messages
    swapped: Messages | None = None
    reader: str = "letter"
    reminder: str = "Reply with your verdict only."
    prompt_id: str = ""
    models: tuple[tuple[str, int], ...] = ()

    @property
    def levels(self) -> bool:
        """Whether the level must be right, not only the winner: so in part B."""
        return self.part == "B"


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of every item of a bench.

    Attributes:
        margins: (n, 2), of the item's own order in both columns: that is, the sign of the second, in which the answers
            were swapped, is already turned. NaN: unreadable, failed, or not asked.
        failed: (n, 2), bool: there was no reply.
        replies: per item and order the last reply's text; empty when they were not kept.
    """

    margins: np.ndarray
    failed: np.ndarray
    replies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Correlation:
    """Over judged models, of a judge's sums of verdicts with the true ones.

    Attributes:
        value: Pearson's; NaN where it is not defined.
        low, high: of the interval over resampled prompts.
        models: how many.
        problem: why there is none; empty if there is.
    """

    value: float
    low: float
    high: float
    models: int
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """With None for NaN, which JSON does not have."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class JudgeResult:
    """One judge on one bench.

    Attributes:
        figures: by part, then by name: ``accuracy`` (share of verdicts that are the true one; an unreadable one is
            wrong, a failed one is left out), of the items asked in both orders ``both_orders_right``, ``consistency``
            (the same winner) and ``position_bias``; ``unparsed``, ``failed``; ``self_preference`` where a family is
            known; ``accuracy of CATEGORY`` for each.
        correlations: by part and data set.
        verdicts: what it said.
    """

    figures: dict[str, dict[str, Estimate]]
    correlations: dict[str, dict[str, Correlation]]
    verdicts: Verdicts

    def mean_correlation(self, part: str) -> float:
        """Over the data sets of a part in which it is defined; NaN if there is none."""
        values = [each.value for each in self.correlations.get(part, {}).values() if not math.isnan(each.value)]
        return float(np.mean(values)) if values else math.nan


@dataclass(frozen=True)
class BenchReport:
    """Several judges on one bench.

    Attributes:
        judges: by name.
        differences: by part, then by name: the judge's accuracy less the first judge's, paired over prompts.
        items, skipped: how many there are, and how many have no readable truth.
        rules: ``"strict"`` or ``"official"``.
    """

    judges: dict[str, JudgeResult]
    differences: dict[str, dict[str, Estimate]]
    items: int
    skipped: int
    rules: str

    def as_json(self) -> dict[str, Any]:
        """JSON values only; parts stay apart, there is no overall score."""
        return {
            "items": self.items,
            "skipped": self.skipped,
            "rules": self.rules,
            "judges": {
                name: {
                    "figures": {part: {n: e.as_json() for n, e in own.items()} for part, own in result.figures.items()},
                    "correlations": {
                        part: {n: c.as_json() for n, c in own.items()} for part, own in result.correlations.items()
                    },
                    "mean_correlation": {
                        part: None if math.isnan(result.mean_correlation(part)) else result.mean_correlation(part)
                        for part in result.correlations
                    },
                }
                for name, result in self.judges.items()
            },
            "differences": {part: {n: e.as_json() for n, e in own.items()} for part, own in self.differences.items()},
        }


class JudgerBench:
    """Items with a true verdict each, and judges put to them.

    Args:
        items: see `BenchItem`; `from_pairs` and `from_opencompass` read them from files.
        skipped: items that were left out because their truth cannot be read.
        rules: how replies are read: ``"strict"`` never guesses; ``"official"`` is OpenCompass's scorer with its
            faults: in part A any reply with the letter A in it is A ("Assistant B is better" too), in part B the choice
            B++ counts as B+ and the first verdict counts.
    """

    def __init__(
        self, items: Sequence[BenchItem], *, skipped: int = 0, rules: Literal["strict", "official"] = "strict"
    ) -> None:
        if rules not in RULES:
            raise ValueError(f"rules is {rules!r}; expected one of {', '.join(RULES)}")
        self.items = list(items)
        self.skipped = skipped
        self.rules = rules

    @classmethod
    def from_pairs(
        cls,
        source: str | Path | Iterable[Pair],
        *,
        template: str | Path | PromptTemplate | None = None,
    ) -> "JudgerBench":
        """From labelled pairs: each asked in both orders on five levels, of which the winner is compared.

        Args:
            source: pairs with a winner, or a JSONL file of them, see `read_pairs`.
            template: in place of the shipped ``pairwise`` prompt.

        Raises:
            UserError: what `read_pairs` and `PromptTemplate` raise; a pair without a winner.
        """
        pairs = read_pairs(source, labelled=True) if isinstance(source, str | Path) else list(source)
        if not isinstance(template, PromptTemplate):
            template = PromptTemplate.read("pairwise" if template is None else template, needed=PLACES)
        items = []
        for index, pair in enumerate(pairs):
            if pair.winner is None:
                raise UserError(f"pair {index} has no winner; a judge is tested on labelled pairs")
            items.append(
                BenchItem(
                    part="pairs",
                    dataset="pairs",
                    category=pair.category,
                    truth=WINNERS[pair.winner],
                    question=template.messages(prompt=pair.prompt, answer_a=pair.answer_a, answer_b=pair.answer_b),
                    swapped=template.messages(prompt=pair.prompt, answer_a=pair.answer_b, answer_b=pair.answer_a),
                    reader="level",
                    reminder=template.reminder,
                    prompt_id=pair.prompt_id,
                    models=((pair.model_a, 1), (pair.model_b, -1)),
                )
            )
        return cls(items)

    @classmethod
    def from_opencompass(
        cls,
        *paths: str | Path,
        both_orders: bool = True,
        rules: Literal["strict", "official"] = "strict",
        templates: Mapping[str, str | Path] | None = None,
    ) -> "JudgerBench":
        """From OpenCompass's files, such as judgerbench_A_en.json, judgerbench_A_cn.json and judgerbench_B.json.

        Args:
            paths: files, or a folder that has them. In a file with ``_cn`` in its name part A is asked in Chinese.
            both_orders: ask part A in both orders, which the official benchmark does not; its order is the first.
            rules: see the class.
            templates: files in place of the shipped prompts ``compass-dialogues``, ``compass-dialogues-cn`` and
                ``compass-b-...``, which ask in other words than OpenCompass's do.

        Raises:
            UserError: a file that cannot be read; file and item of what is missing or unknown.
        """
        if rules not in RULES:
            raise ValueError(f"rules is {rules!r}; expected one of {', '.join(RULES)}")
        own = chosen_templates(templates, TEMPLATES)
        needs = dict.fromkeys(DIALOGUES.values(), ("dialogue",)) | {n: p for n, p, _ in REPLAYED.values()}
        read = {name: PromptTemplate.read(own.get(name, name), needed=places) for name, places in needs.items()}  # type: ignore[arg-type]
        files: list[Path] = []
        for path in map(Path, paths):
            files += sorted(path.glob("judgerbench_[AB]*.json")) if path.is_dir() else [path]
        if not files:
            raise UserError(f"{', '.join(map(str, paths))}: no file judgerbench_A*.json or judgerbench_B*.json there")
        items: list[BenchItem] = []
        skipped = 0
        for file in files:
            for name, record in _records(file):
                try:
                    if "conversation_a" in record:
                        items.append(_part_a(record, "cn" if "_cn" in file.stem else "en", read, both_orders))
                        continue
                    item = _part_b(record, read, rules)
                except KeyError as problem:
                    raise UserError(f"{name}: no field {problem}; it has {', '.join(map(repr, record))}") from None
                except (TypeError, ValueError) as problem:
                    raise UserError(f"{name}: {problem}") from None
                skipped += item is None
                items += [] if item is None else [item]
        return cls(items, skipped=skipped, rules=rules)

    def ask(
        self,
        judge: Chat | HasChat,
        *,
        progress: Callable[[int, int], None] | None = None,
        max_tokens: int = 2048,
        jobs: int = 8,
        **settings: Any,
    ) -> Verdicts:
        """A judge's verdicts on every item, in every order that is asked.

        Args:
            judge: a chat, or what has one, such as `Judge`.
            progress: called with the replies had and those to be had.
            max_tokens: the longest reply.
            jobs, settings: see `ask_judge`; greedy unless `temperature` is given.

        Raises:
            UserError: an endpoint that does not answer at all.
        """
        chat = judge if isinstance(judge, Chat) else judge.chat
        margins = np.full((len(self.items), 2), np.nan)
        failed = np.zeros((len(self.items), 2), dtype=bool)
        replies = [["", ""] for _ in self.items]
        asked: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
        for index, item in enumerate(self.items):
            for order in range(2 if item.swapped is not None else 1):
                asked[item.reader, item.reminder].append((index, order))
        total = sum(map(len, asked.values()))
        done = 0
        for (reader, reminder), places in asked.items():
            questions = [self.items[i].swapped if order else self.items[i].question for i, order in places]
            watch = None if progress is None else partial(_advance, progress, done, total)
            answers = ask_judge(
                chat,
                questions,  # type: ignore[arg-type]
                RULES[self.rules][reader],
                reminder=reminder,
                progress=watch,
                max_tokens=max_tokens,
                jobs=jobs,
                **settings,
            )
            for (index, order), answer in zip(places, answers, strict=True):
                failed[index, order] = answer.outcome == "failed"
                replies[index][order] = answer.replies[-1] if answer.replies else ""
                if answer.value is not None:
                    margins[index, order] = -answer.value if order else answer.value
            done += len(places)
        return Verdicts(margins, failed, tuple((one, other) for one, other in replies))

    def run(
        self,
        judges: Mapping[str, Chat | HasChat] | Sequence[Chat | HasChat],
        *,
        family: Mapping[str, str] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
        rounds: int = 1000,
        level: float = 0.95,
        seed: int = 0,
        **settings: Any,
    ) -> BenchReport:
        """Ask judges, and evaluate them; see `ask` and `evaluate`."""
        named = judges if isinstance(judges, Mapping) else {f"judge {at}": judge for at, judge in enumerate(judges)}
        found = {
            name: self.ask(judge, progress=None if progress is None else partial(progress, name), **settings)
            for name, judge in named.items()
        }
        return self.evaluate(found, family=family, rounds=rounds, level=level, seed=seed)

    def evaluate(
        self,
        verdicts: Mapping[str, Verdicts | np.ndarray],
        *,
        family: Mapping[str, str] | None = None,
        rounds: int = 1000,
        level: float = 0.95,
        seed: int = 0,
    ) -> BenchReport:
        """What the verdicts of judges are worth.

        Args:
            verdicts: by judge; an array (n,) or (n, 2) of margins in the items' own order will do, see `Verdicts`.
            family: by judge, what the names of its own family's models begin with: gives ``self_preference``, by how
                much its verdicts favour them beyond the truth (2 if always against it).
            rounds, level, seed: of the bootstrap over prompts, the same resamples for every judge and figure.
        """
        said = {name: self._checked(name, one) for name, one in verdicts.items()}
        figures: dict[str, dict[str, dict[str, Estimate]]] = {name: {} for name in said}
        differences: dict[str, dict[str, Estimate]] = {}
        correlations: dict[str, dict[str, dict[str, Correlation]]] = {name: {} for name in said}
        for part in sorted({item.part for item in self.items}):
            own = [index for index, item in enumerate(self.items) if item.part == part]
            items = [self.items[index] for index in own]
            prompts = [item.prompt_id or str(index) for index, item in zip(own, items, strict=True)]
            columns: dict[tuple[str, str], np.ndarray] = {}
            for name, one in said.items():
                of = _columns(items, one.margins[own], one.failed[own], (family or {}).get(name))
                columns |= {(name, figure): values for figure, values in of.items()}
            first = next(iter(said), None)
            gaps = {name: columns[name, "accuracy"] - columns[first, "accuracy"] for name in said if name != first}  # type: ignore[index]
            columns |= {("", name): gap for name, gap in gaps.items()}
            means: dict[Any, Estimate] = bootstrap_means(columns, prompts, rounds=rounds, level=level, seed=seed)  # type: ignore[arg-type]
            for (name, figure), estimate in means.items():
                if name:
                    figures[name].setdefault(part, {})[figure] = estimate
                else:
                    differences.setdefault(part, {})[figure] = estimate
            for name, one in said.items():
                for dataset in sorted({item.dataset for item in items}):
                    chosen = [at for at, item in enumerate(items) if item.dataset == dataset and item.models]
                    if chosen:
                        correlations[name].setdefault(part, {})[dataset] = _correlation(
                            [items[at] for at in chosen],
                            one.margins[[own[at] for at in chosen]],
                            [prompts[at] for at in chosen],
                            rounds,
                            level,
                            seed,
                        )
        return BenchReport(
            judges={name: JudgeResult(figures[name], correlations[name], said[name]) for name in said},
            differences=differences,
            items=len(self.items),
            skipped=self.skipped,
            rules=self.rules,
        )

    def _checked(self, name: str, verdicts: Verdicts | np.ndarray) -> Verdicts:
        if not isinstance(verdicts, Verdicts):
            margins = np.asarray(verdicts, dtype=float)
            margins = np.stack([margins, np.full_like(margins, np.nan)], 1) if margins.ndim == 1 else margins
            verdicts = Verdicts(margins, np.zeros(margins.shape, dtype=bool))
        if verdicts.margins.shape != (len(self.items), 2):
            shape = verdicts.margins.shape
            raise ValueError(f"verdicts of {name!r} have shape {shape}; expected ({len(self.items)}, 2)")
        return verdicts


def _advance(progress: Callable[[int, int], None], start: int, total: int, done: int, of: int) -> None:
    progress(start + done, total)


def _columns(
    items: Sequence[BenchItem], margins: np.ndarray, failed: np.ndarray, family: str | None
) -> dict[str, np.ndarray]:
    """Figures of every item, NaN where it has none."""
    truth = np.array([item.truth for item in items], dtype=float)[:, None]
    levels = np.array([item.levels for item in items], dtype=bool)[:, None]
    asked = np.array([[True, item.swapped is not None] for item in items], dtype=bool).reshape(-1, 2)
    read = ~np.isnan(margins)
    right = np.where(levels, margins == truth, np.sign(margins) == np.sign(truth)) & read
    answered = asked & ~failed
    both = asked.all(1)
    sign = np.sign(margins)
    known = both & read.all(1)
    columns = {
        "accuracy": _mean(right, answered),
        "both_orders_right": np.where(both & answered.all(1), right.all(1), np.nan),
        "consistency": np.where(known, sign[:, 0] == sign[:, 1], np.nan),
        # The first position won where the own order says 1, and where the swapped one, turned back, says -1.
        "position_bias": np.where(known, (sign[:, 0] - sign[:, 1]) / 2, np.nan),
        "unparsed": _mean(asked & ~failed & ~read, asked),
        "failed": _mean(failed, asked),
    }
    if family is not None:
        kin = np.array([sum(s for model, s in item.models if model.startswith(family)) for item in items], dtype=float)
        kin = np.where([len(item.models) == 2 for item in items], kin, 0.0)
        beyond = _mean(sign - np.sign(truth), read)
        columns["self_preference"] = np.where(kin != 0, kin * beyond, np.nan)
    categories = [item.category or item.dataset for item in items]
    for category in sorted(set(categories)):
        if len(set(categories)) > 1:
            mine = np.array([each == category for each in categories])
            columns[f"accuracy of {category}"] = np.where(mine, columns["accuracy"], np.nan)
    return columns


def _mean(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Of every row, over the columns that count; NaN if none does."""
    count = where.sum(1)
    total = np.where(where, values, 0.0).sum(1)
    mean: np.ndarray = np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)
    return mean


def _correlation(
    items: Sequence[BenchItem], margins: np.ndarray, prompts: Sequence[str], rounds: int, level: float, seed: int
) -> Correlation:
    """Pearson's of summed verdicts over models; what could not be read adds nothing, two orders add their mean."""
    truth = np.array([item.truth for item in items], dtype=float)
    counted = np.where(np.isnan(margins), 0.0, margins)
    both = np.array([item.swapped is not None for item in items])
    said = np.where(both, counted.mean(1), counted[:, 0])
    if any(not item.levels for item in items):
        said = np.where(both, np.sign(counted).mean(1), np.sign(counted[:, 0]))
    index: dict[str, int] = {}
    models: dict[str, int] = {}
    codes = np.array([index.setdefault(prompt, len(index)) for prompt in prompts])
    for item in items:
        for model, _ in item.models:
            models.setdefault(model, len(models))
    true, own = np.zeros((len(index), len(models))), np.zeros((len(index), len(models)))
    for at, item in enumerate(items):
        for model, sign in item.models:
            true[codes[at], models[model]] += sign * truth[at]
            own[codes[at], models[model]] += sign * said[at]
    value = pearson(true.sum(0), own.sum(0))
    if math.isnan(value):
        problem = "only one judged model" if len(models) < 2 else "all models have the same sum"
        if len(models) == 2 and any(len(item.models) == 2 for item in items):
            problem = "two models that were compared with each other only"
        return Correlation(math.nan, math.nan, math.nan, len(models), problem)
    if len(models) == 2:
        return Correlation(value, math.nan, math.nan, 2, "two models: it can only be 1 or -1")
    drawn = [pearson(block @ true, block @ own) for block in (prompt_counts(len(index), rounds, seed))]
    replicates = np.concatenate(drawn)
    replicates = replicates[~np.isnan(replicates)]
    low, high = interval(replicates, level) if len(index) > 1 else (math.nan, math.nan)
    return Correlation(float(value), low, high, len(models))


def pearson(x: np.ndarray, y: np.ndarray) -> Any:
    """Along the last axis; NaN, in silence, where either does not vary."""
    x = x - x.mean(-1, keepdims=True)
    y = y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    found: Any = np.divide((x * y).sum(-1), scale, out=np.full(np.shape(scale), np.nan), where=scale > 1e-12)
    return float(found) if np.ndim(found) == 0 else found


# OpenCompass's files


def _records(file: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Name and record of each item."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as problem:
        said = problem.strerror if isinstance(problem, OSError) else f"not JSON ({problem})"
        raise UserError(f"cannot read {file}: {said}; expected a JudgerBench json of OpenCompass") from None
    if not isinstance(found, list) or not found:
        raise UserError(f"{file} is no list of items; expected a JudgerBench json of OpenCompass")
    for index, record in enumerate(found):
        if not isinstance(record, dict):
            raise UserError(f"{file}, item {index}: {record!r:.60} is not an object")
        yield f"{file}, item {index}", record


def _identity(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _part_a(
    record: Mapping[str, Any], language: str, templates: Mapping[str, PromptTemplate], both_orders: bool
) -> BenchItem:
    if record["winner"] not in ("model_a", "model_b"):
        raise ValueError(f"winner is {record['winner']!r}; expected model_a or model_b, part A has no ties")
    first, second = record["conversation_a"], record["conversation_b"]
    template = templates[DIALOGUES[language]]
    asked = [turn["content"] for turn in first if turn["role"] == "user"]
    question = template.messages(dialogue=_dialogue(first, second, language))
    return BenchItem(
        part="A",
        dataset=f"judgerbench_A_{language}",
        category=f"{record['category']} ({language})",
        truth=WINNERS[record["winner"]],
        question=question,
        swapped=template.messages(dialogue=_dialogue(second, first, language)) if both_orders else None,
        reader="letter",
        reminder=template.reminder,
        prompt_id=_identity(*asked),
        models=((record["model_a"], 1), (record["model_b"], -1)),
    )


def _dialogue(first: Sequence[Mapping[str, str]], second: Sequence[Mapping[str, str]], language: str) -> str:
    """Two conversations over the same user turns, turn by turn."""
    if [turn["role"] for turn in first] != [turn["role"] for turn in second]:
        raise ValueError("the two conversations differ in their turns")
    user, a, b = TURNS[language]
    said = []
    for one, other in zip(first, second, strict=True):
        if one["role"] == "user":
            said.append(f"### {user}: {one['content']}")
        elif one["role"] == "assistant":
            said += [f"### {a}: {one['content']}", f"### {b}: {other['content']}"]
        else:
            raise ValueError(f"a turn has the role {one['role']!r}; expected user or assistant")
    return "\n".join(said)


def _part_b(record: Mapping[str, Any], templates: Mapping[str, PromptTemplate], rules: str) -> BenchItem | None:
    """None when the meta-judge's verdict cannot be read."""
    dataset = record["dataset_name"]
    if dataset not in REPLAYED:
        raise ValueError(f"unknown dataset_name {dataset!r}; expected one of {', '.join(REPLAYED)}")
    name, places, reader = REPLAYED[dataset]
    others = record["others"]
    truth = RULES[rules][reader](record["gpt4o_pred"])
    values = {"prediction": record["prediction"]}
    if "ref" in places:
        values["ref"] = others["ref"]
    if dataset == "wildbench":
        *before, last = record["conversation"]
        values["history"] = "\n\n".join(
            f"{'ASSISTANT' if turn['role'] == 'assistant' else 'USER'}: {turn['content']}" for turn in before
        )
        values |= {"question": last["content"], "checklist": _text(others["checklist"])}
    else:
        values["question"] = record["question"]
    model, swap = others["model"], others["swap"]
    if truth is None:
        return None
    template = templates[name]
    return BenchItem(
        part="B",
        dataset=dataset,
        category=dataset,
        truth=truth,
        question=template.messages(**{place: _text(value) for place, value in values.items()}),
        reader=reader,
        reminder=template.reminder,
        prompt_id=_identity(dataset, values["question"]),
        models=((model, -1 if swap else 1),),
    )


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(f"- {each}" for each in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
