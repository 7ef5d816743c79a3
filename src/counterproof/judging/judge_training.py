"""What an all-in-one judge is trained on: its forms of question and reply, and their mixture (CompassJudger-1)."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from counterproof.errors import UserError
from counterproof.judging.pairwise import PLACES, WINNERS, Pair
from counterproof.judging.templates import PromptTemplate, chosen_templates
from counterproof.judging.verdicts import (
    COMMENTS,
    REVISED,
    Reader,
    read_bracket,
    read_choice,
    read_letter,
    read_level,
    read_totals,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CritiquePoint", "Point", "judge_mixture", "reply_labels"]

# The forms of a comparison, and how a reply in each is read.
READERS: Mapping[str, Reader] = {
    "letter": read_letter,
    "bracket": read_bracket,
    "five-level": read_level,
    "json": read_choice,
    "scores": read_totals,
}
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((f"compass-{form}" for form in READERS), PLACES),
    "compass-point": ("prompt", "answer", "rubric", "form"),
    "compass-critique": ("prompt", "answer"),
}
FORMS = (*READERS, "point", "critique")
LEVELS = ("[[B>>A]]", "[[B>A]]", "[[A=B]]", "[[A>B]]", "[[A>>B]]")
CHOICES = ("B++", "B+", "A=B", "A+", "A++")
NO_REFERENCE = "(none)"


def read_templates(given: Mapping[str, str | Path | PromptTemplate] | None) -> dict[str, PromptTemplate]:
    """All templates of a judge, those given in place of those shipped."""
    own = chosen_templates(given, tuple(TEMPLATES))
    found = {}
    for name, places in TEMPLATES.items():
        source = own.get(name, name)
        allowed = ("reference",) if name == "compass-point" else ()
        if not isinstance(source, PromptTemplate):
            source = PromptTemplate.read(source, needed=places, allowed=allowed)
        found[name] = source
    return found


def checked_rubric(rubric: Sequence[str]) -> tuple[str, ...]:
    names = tuple(rubric)
    if isinstance(rubric, str) or not names or len(set(names)) != len(names) or "total" in names:
        raise ValueError(f"rubric is {rubric!r}; expected different names of dimensions, none of them 'total'")
    return names


def point_question(
    template: PromptTemplate, prompt: str, answer: str, rubric: Sequence[str], reference: str | None
) -> list[dict[str, str]]:
    """The messages that ask for the scores of an answer."""
    form = json.dumps({**dict.fromkeys(rubric, 6), "total": 6}, ensure_ascii=False)
    return template.messages(
        prompt=prompt, answer=answer, rubric=", ".join(rubric), form=form, reference=reference or NO_REFERENCE
    )


def plain_text(text: Any) -> str:
    """Text of a prompt or completion as TRL passes it."""
    return text if isinstance(text, str) else "\n\n".join(str(message["content"]) for message in text)


# the mixture


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """An answer with scores.

    Attributes:
        prompt, answer: texts.
        scores: by dimension, 1 to 10.
        total: 1 to 10.
        reference: an answer known to be good; empty if there is none.
        reason: why; empty if nobody said.
    """

    prompt: str
    answer: str
    scores: Mapping[str, int]
    total: int
    reference: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        checked_rubric(tuple(self.scores))
        values = {**self.scores, "total": self.total}
        for name, value in values.items():
            if type(value) is not int or not 1 <= value <= 10:
                raise ValueError(f"{name} is {value!r}; expected a whole number from 1 to 10")


@dataclass(frozen=True, kw_only=True, slots=True)
class CritiquePoint:
    """An answer with comments on it and a revision, none of them empty."""

    prompt: str
    answer: str
    comments: str
    revision: str

    def __post_init__(self) -> None:
        if not self.comments.strip() or not self.revision.strip():
            raise ValueError("comments and revision must not be empty")


@dataclass
class _Supply:
    """What is left to draw from, a prompt in one place only."""

    pairs: list[Pair] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    critiques: list[CritiquePoint] = field(default_factory=list)
    general: list[list[dict[str, Any]]] = field(default_factory=list)

    def pair_for(self, form: str) -> Pair | None:
        """Take the next pair that can be put in a form."""
        for index, pair in enumerate(self.pairs):
            if _suits(pair, form):
                return self.pairs.pop(index)
        return None


def _suits(pair: Pair, form: str) -> bool:
    if form == "scores":
        return pair.totals is not None
    return pair.winner != "tie" or form in ("five-level", "json")


def judge_mixture(
    *,
    pairs: Sequence[Pair] = (),
    points: Sequence[Point] = (),
    critiques: Sequence[CritiquePoint] = (),
    general: Sequence[Sequence[Mapping[str, Any]]] = (),
    ratio: tuple[int, int, int] = (1, 3, 1),
    size: int | None = None,
    forms: Sequence[str] | Literal["all"] = "all",
    templates: Mapping[str, str | Path | PromptTemplate] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Training data for an all-in-one judge: critique, reward and general items in an exact ratio, for TRL.

    A reward item is a pair to be answered with its letter. A critique item is a point, a critique, or a pair in one of
    the other forms, the forms taking turns. Every prompt is used once at most; in each form of a comparison the better
    answer is A as often as B, give or take one item, and so in all of them together.

    Args:
        pairs: with a winner. A tie suits the five-level and json forms only, the form scores needs `Pair.totals`.
        points, critiques: scored and criticised answers.
        general: chat messages, the last one the assistant's.
        ratio: of critique, reward and general items; the paper's 1:3:1. (0, 1, 0) is a reward model's data.
        size: items in all, a multiple of the ratio's sum; None: as many as there are prompts for.
        forms: which of letter, bracket, five-level, json, scores, point and critique; reward items are letters always.
        templates: in place of the shipped prompts, see `Judge`.
        seed: of choice, positions and order.

    Returns:
        Rows with ``messages`` (the last one the assistant's, to be learnt), ``pool`` (critique, reward or general) and
        ``form``.

    Raises:
        UserError: a pair without a winner; too few prompts for the size, or for a single round of the ratio.
        ValueError: a ratio, size or form that cannot be.
    """
    ratio = tuple(ratio)  # type: ignore[assignment]
    if len(ratio) != 3 or any(type(part) is not int or part < 0 for part in ratio) or not any(ratio):
        raise ValueError(f"ratio is {ratio}; expected three whole numbers from 0 up, not all of them 0")
    divisor = math.gcd(*ratio)
    shares = [part // divisor for part in ratio]
    chosen = FORMS if isinstance(forms, str) and forms == "all" else tuple(forms)
    for form in chosen:
        if form not in FORMS:
            raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
    if size is not None and (size < 1 or size % sum(shares)):
        raise ValueError(f"size is {size}; expected a multiple of {sum(shares)}, the sum of the ratio")
    prompts = read_templates(templates)
    for index, pair in enumerate(pairs):
        if pair.winner is None:
            raise UserError(f"pair {index} has no winner; a judge learns from labelled pairs")
    for index, messages in enumerate(general):
        if len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise UserError(f"general item {index} does not end with an assistant's message after another one")
    rng = np.random.default_rng(seed)
    supply = _supply(rng, pairs, points, critiques, general)
    drawn = _draw(supply, shares, size, [form for form in chosen if form != "letter"])
    rows = [*_comparisons(rng, drawn["pairs"], prompts), *_others(drawn["others"], prompts)]
    rows += [{"messages": each, "pool": "general", "form": "general"} for each in drawn["general"]]
    return [rows[index] for index in rng.permutation(len(rows))]


def _supply(
    rng: np.random.Generator,
    pairs: Sequence[Pair],
    points: Sequence[Point],
    critiques: Sequence[CritiquePoint],
    general: Sequence[Sequence[Mapping[str, Any]]],
) -> _Supply:
    """Everything in random order, of each prompt the first."""
    listed: list[tuple[str, str, Any]] = [("pairs", pair.prompt, pair) for pair in pairs]
    listed += [("points", point.prompt, point) for point in points]
    listed += [("critiques", critique.prompt, critique) for critique in critiques]
    listed += [("general", plain_text(messages[:-1]), [dict(message) for message in messages]) for messages in general]
    found, seen = _Supply(), set()
    for index in rng.permutation(len(listed)):
        where, prompt, item = listed[index]
        if prompt not in seen:
            seen.add(prompt)
            getattr(found, where).append(item)
    return found


def _draw(supply: _Supply, shares: Sequence[int], size: int | None, forms: Sequence[str]) -> dict[str, list[Any]]:
    """As many rounds of the ratio as wanted, or as there can be."""
    rounds = _rounds(supply, shares, forms)
    wanted = rounds if size is None else size // sum(shares)
    if wanted < 1 or wanted > rounds:
        raise UserError(
            f"the ratio {':'.join(map(str, shares))} (critique, reward, general) can be filled {rounds} times from "
            f"{len(supply.pairs)} pairs, {len(supply.points)} points, {len(supply.critiques)} critiques and "
            f"{len(supply.general)} general items of different prompts, {max(wanted, 1)} times are needed; give more "
            "of what is short, a smaller size, or another ratio"
        )
    drawn: dict[str, list[Any]] = {"pairs": [], "others": [], "general": supply.general[: shares[2] * wanted]}
    rewards = _for_rewards(supply.pairs)[: shares[1] * wanted]
    drawn["pairs"] += [("reward", "letter", pair) for pair in rewards]
    taken = set(map(id, rewards))
    supply = replace(supply, pairs=[pair for pair in supply.pairs if id(pair) not in taken])
    turn = itertools.cycle(forms)
    while len(drawn["pairs"]) + len(drawn["others"]) < (shares[0] + shares[1]) * wanted:
        form = next(turn)  # a form that has run out is passed over; `_rounds` knows that there is enough
        item: Any = None
        if form == "point":
            item = supply.points.pop() if supply.points else None
        elif form == "critique":
            item = supply.critiques.pop() if supply.critiques else None
        else:
            item = supply.pair_for(form)
        if item is not None:
            drawn["others" if form in ("point", "critique") else "pairs"].append(("critique", form, item))
    return drawn


def _rounds(supply: _Supply, shares: Sequence[int], forms: Sequence[str]) -> int:
    """How often the ratio can be filled."""
    limits = [len(supply.general) // shares[2]] if shares[2] else []
    rewards = _for_rewards(supply.pairs)
    if shares[1]:
        limits.append(len(rewards) // shares[1])
    if not shares[0]:
        return min(limits)
    suiting = {id(pair) for pair in supply.pairs if any(_suits(pair, form) for form in forms if form in READERS)}
    others = len(supply.points) * ("point" in forms) + len(supply.critiques) * ("critique" in forms)
    lost = np.cumsum([0, *(id(pair) in suiting for pair in rewards)])  # to the other forms, by the first rewards
    for rounds in range(min([*limits, (others + len(suiting)) // shares[0]]), 0, -1):
        if others + len(suiting) - lost[shares[1] * rounds] >= shares[0] * rounds:
            return rounds
    return 0


def _for_rewards(pairs: Sequence[Pair]) -> list[Pair]:
    """Pairs that a letter can answer; first those without totals, since the others suit one form more."""
    return sorted((pair for pair in pairs if pair.winner != "tie"), key=lambda pair: pair.totals is not None)


def _comparisons(
    rng: np.random.Generator, drawn: Sequence[tuple[str, str, Pair]], prompts: Mapping[str, PromptTemplate]
) -> Iterator[dict[str, Any]]:
    """Rows of pairs, the better answer as often A as B."""
    by_form: dict[str, list[tuple[str, Pair]]] = {}
    for pool, form, pair in drawn:
        by_form.setdefault(form, []).append((pool, pair))
    odd = int(rng.integers(2))  # where the spare item of a form of an odd number goes; they take turns
    for form, cases in by_form.items():
        decisive = sum(pair.winner != "tie" for _, pair in cases)
        sides = [0, 1] * (decisive // 2)
        if decisive % 2:
            sides.append(odd)
            odd = 1 - odd
        order = iter(rng.permutation(np.array(sides, dtype=int)).tolist())
        for pool, pair in cases:
            assert pair.winner is not None
            # 0: the better answer is shown first.
            swap = bool(rng.integers(2)) if pair.winner == "tie" else next(order) != (pair.winner == "model_b")
            one, other = (pair.answer_b, pair.answer_a) if swap else (pair.answer_a, pair.answer_b)
            question = prompts[f"compass-{form}"].messages(prompt=pair.prompt, answer_a=one, answer_b=other)
            margin = WINNERS[pair.winner] * pair.strength * (-1 if swap else 1)
            reply = _reply(form, margin, pair.reason, pair.totals if not swap or not pair.totals else pair.totals[::-1])
            yield {"messages": [*question, {"role": "assistant", "content": reply}], "pool": pool, "form": form}


def _reply(form: str, margin: int, reason: str, totals: tuple[int, int] | None) -> str:
    """What the judge is to say of a pair."""
    before = f"{reason}\n\n" if reason else ""
    if form == "letter":
        return "A" if margin > 0 else "B"
    if form == "bracket":
        return f"{before}[[{'A' if margin > 0 else 'B'}]]"
    if form == "five-level":
        return f"{before}{LEVELS[margin + 2]}"
    if form == "json":
        return json.dumps({**({"reason": reason} if reason else {}), "choice": CHOICES[margin + 2]}, ensure_ascii=False)
    assert totals is not None
    return json.dumps({"A": {"total": totals[0]}, "B": {"total": totals[1]}})


def _others(drawn: Sequence[tuple[str, str, Any]], prompts: Mapping[str, PromptTemplate]) -> Iterator[dict[str, Any]]:
    for pool, form, item in drawn:
        if form == "point":
            question = point_question(
                prompts["compass-point"], item.prompt, item.answer, tuple(item.scores), item.reference
            )
            scores = json.dumps({**item.scores, "total": item.total}, ensure_ascii=False)
            reply = f"{item.reason}\n\n{scores}" if item.reason else scores
        else:
            question = prompts["compass-critique"].messages(prompt=item.prompt, answer=item.answer)
            reply = f"{COMMENTS}\n{item.comments}\n{REVISED}\n{item.revision}"
        yield {"messages": [*question, {"role": "assistant", "content": reply}], "pool": pool, "form": form}


def reply_labels(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]]
) -> tuple[list[int], list[int]]:
    """Token ids of a row by the tokenizer's chat template, and labels that are -100 on all but the reply.

    For training loops that take labels. TRL's SFTTrainer masks by itself: with ``assistant_only_loss=True`` where the
    chat template marks replies, or with rows split into ``prompt`` and ``completion``.

    Raises:
        UserError: a last message that is not the assistant's; what `tokenize` raises.
    """
    rows = [dict(message) for message in messages]
    if len(rows) < 2 or rows[-1]["role"] != "assistant":
        raise UserError("a row ends with the assistant's message, after at least one other")
    from counterproof.language.scoring import tokenize

    group = tokenize(tokenizer, rows[:-1], [rows[-1:]])
    reply = group.completions[0]
    return [*group.prompt, *reply], [-100] * len(group.prompt) + list(reply)
