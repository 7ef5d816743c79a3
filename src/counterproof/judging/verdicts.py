"""What a judge's reply says, in every form that judges are asked for, read strictly: None where it takes a guess.

Each reader takes the reply alone, never the question, so that a verdict quoted in an answer cannot count. Of several
verdicts in the form asked for the last one counts. Margins are of the positions: 2 A much better ... -2 B much better.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from counterproof.judging.pairwise import LEVELS, read_verdict

__all__ = ["read_choice", "read_critique", "read_letter", "read_level", "read_points", "read_totals"]

CHOICES = {"A++": 2, "A+": 1, "A=B": 0, "B+": -1, "B++": -2}
COMMENTS, REVISED = "## Comments", "## Revised answer"


def objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects, or Python dictionaries of plain values, in a text."""
    at = 0
    while (at := text.find("{", at)) >= 0:
        try:
            found, end = json.JSONDecoder().raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            found, end = _dictionary(text, at)
        if isinstance(found, dict):
            yield found
            at = end
        else:
            at += 1


def _dictionary(text: str, start: int) -> tuple[Any, int]:
    """A dictionary as Python writes it, with single quotes, that begins at `start`; None if there is none."""
    for close in re.finditer("}", text[start : start + 4000]):
        end = start + close.end()
        if text.count("{", start, end) == text.count("}", start, end):
            try:
                return ast.literal_eval(text[start:end]), end
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return None, start
    return None, start


def read_letter(text: str) -> int | None:
    """1 for A, -1 for B: the reply is that letter, quotes, brackets and stops aside, or has ``[[A]]`` or ``[[B]]``."""
    alone = re.fullmatch(r"[\s\"'`*\[\](){}.:]*([AB])[\s\"'`*\[\](){}.:]*", text)
    found = [alone[1]] if alone else re.findall(r"\[\[\s*([AB])\s*\]\]", text)
    return {"A": 1, "B": -1}[found[-1]] if found else None


def read_bracket(text: str) -> int | None:
    """1 for ``[[A]]``, -1 for ``[[B]]``."""
    found = re.findall(r"\[\[\s*([AB])\s*\]\]", text)
    return {"A": 1, "B": -1}[found[-1]] if found else None


def read_level(text: str) -> int | None:
    """2 to -2 for ``[[A>>B]]`` to ``[[B>>A]]``, see `read_verdict`."""
    verdict = read_verdict(text)
    return None if verdict is None else LEVELS[verdict]


def read_choice(text: str) -> int | None:
    """2 to -2 for an object whose ``"choice"`` is A++, A+, A=B, B+ or B++."""
    found = [each["choice"] for each in objects(text) if "choice" in each]
    return CHOICES.get(found[-1].strip()) if found and isinstance(found[-1], str) else None


def read_totals(text: str) -> int | None:
    """1, 0 or -1 by the totals of an object such as ``{"A": {"total": 4}, "B": {"total": 7}}``, 1 to 10 each."""
    found = [each for each in objects(text) if "A" in each and "B" in each]
    if not found:
        return None
    totals: list[Any] = [
        side.get("total") if isinstance(side, dict) else None for side in (found[-1]["A"], found[-1]["B"])
    ]
    if not all(type(total) in (int, float) and 1 <= total <= 10 for total in totals):
        return None
    return int(totals[0] > totals[1]) - int(totals[0] < totals[1])


def read_points(text: str, rubric: Sequence[str]) -> dict[str, int] | None:
    """Scores of an object that has every dimension of the rubric and ``"total"``, whole numbers from 1 to 10."""
    wanted = [*rubric, "total"]
    found = [each for each in objects(text) if "total" in each]
    if not found or set(found[-1]) != set(wanted):
        return None
    scores = found[-1]
    if not all(type(scores[name]) is int and 1 <= scores[name] <= 10 for name in wanted):
        return None
    return {name: scores[name] for name in wanted}


def read_critique(text: str) -> tuple[str, str] | None:
    """Comments and revised answer, from under their two headings; neither may be empty."""
    found = re.search(r"##\s*Comments\s*(.*?)\s*##\s*Revised answer\s*(.*)", text, re.DOTALL | re.IGNORECASE)
    if not found or not found[1].strip() or not found[2].strip():
        return None
    return found[1].strip(), found[2].strip()


def read_identifier(text: str) -> int | None:
    """1 for m, -1 for M: the whole reply, quotes and stops aside."""
    found = re.fullmatch(r"[\s\"'`*.]*([mM])[\s\"'`*.]*", text)
    return {"m": 1, "M": -1}[found[1]] if found else None


def read_format(text: str) -> int | None:
    """0 or 1 after the last ``format_correctness``."""
    found = re.findall(r"[\"']format_correctness[\"']\s*:\s*[\"']?([01])\b(?!\.)", text)
    return int(found[-1]) if found else None


Reader = Callable[[str], int | None]

STRICT: Mapping[str, Reader] = {
    "letter": read_letter,
    "bracket": read_bracket,
    "identifier": read_identifier,
    "level": read_level,
    "choice": read_choice,
    "format": read_format,
}


# OpenCompass's scorer @2de7ed9, rule by rule: for figures that are to be compared with those that it gives.


def _official_letter(text: str) -> int | None:
    return 1 if "A" in text else -1 if "B" in text else None  # so "Assistant B" is A


def _official_bracket(text: str) -> int | None:
    return 1 if "[[A]]" in text else -1 if "[[B]]" in text else None


def _official_identifier(text: str) -> int | None:
    return {"m": 1, "M": -1}.get(text[:1])  # so any reply that begins with an m is for model m


def _official_level(text: str) -> int | None:
    found = re.findall(r"\[\[([AB<>=]+)\]\]", text)
    return next((level for verdict, level in LEVELS.items() if found and verdict in found[0]), None)


def _official_choice(text: str) -> int | None:
    found = re.findall(r'"choice": "(.*?)"', text)
    # In this order, so that B++ counts as B+.
    return next((CHOICES[choice] for choice in CHOICES if found and choice in found[0]), None)


def _official_format(text: str) -> int | None:
    found = re.search(r"[\"']format_correctness[\"']:\s*([0-1]+)", text)
    return int(found[1]) if found else None


OFFICIAL: Mapping[str, Reader] = {
    "letter": _official_letter,
    "bracket": _official_bracket,
    "identifier": _official_identifier,
    "level": _official_level,
    "choice": _official_choice,
    "format": _official_format,
}
RULES: Mapping[str, Mapping[str, Reader]] = {"strict": STRICT, "official": OFFICIAL}
