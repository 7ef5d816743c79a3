"""What a judge's reply says about a grade: read strictly, quotations left out, None rather than a guess."""

import math
import re
from dataclasses import dataclass

from counterproof.judging.rubrics import Rubric

__all__ = ["CriterionGrade", "read_score"]

CLOSE = 1e-6
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)

NUMBER = rf"(?:\d+(?:[.,]\d+)?|\b(?:{'|'.join(sorted(WORDS, key=len, reverse=True))})\b)"
UNIT = r"(?:points?|pts?|marks?)\b\.?"
OF = rf"(?:/|out\s+of\b|of\b)\s*(?P<%s>{NUMBER})"
VALUE = re.compile(
    rf"(?P<points>{NUMBER})\s*(?:{OF % 'of'})?\s*(?:{UNIT})?\s*(?:{OF % 'most'})?\s*(?:{UNIT})?[*_]*"
    r"(?=$|[\s.,;:()|\u2013\u2014-])",
    re.I,
)
RANGE = re.compile(rf"\s*(?:-|\u2013|\u2014|to\b|or\b|and\b)\s*{NUMBER}", re.I)
RANGE_OF = re.compile(rf"\s*(?:-|\u2013|\u2014|to\b|or\b|and\b)\s*{NUMBER}\s*(?:/|out\s+of\b)", re.I)
SCORE = re.compile(
    r"^[ \t*_#•-]*(?:(?:final|total|overall)[ \t]+)?(?:score|grade|points|mark)s?[ \t*_]*[:=][ \t*_]*(?P<value>.*)$",
    re.I | re.M,
)
CRITERION = re.compile(
    r"^[ \t*_#•-]*criterion[ \t]*(?P<number>\d+)[ \t*_]*(?:\([^)\n]*\))?[ \t*_]*[:.\u2013-][ \t*_]*(?P<value>.*)$",
    re.I | re.M,
)
TOTAL = re.compile(r"^[ \t*_#•-]*(?:total|sum|score|grade)\b[^:=\n]{0,20}[:=][ \t*_]*(?P<value>.*)$", re.I | re.M)
QUOTED = re.compile(r'"[^"]*"|“[^”]*”|«[^»]*»|```[\s\S]*?```|`[^`\n]*`|^[ \t]*>[^\n]*$', re.M)
MARKED = re.compile(r"^-+ student answer\b[\s\S]*?^-+ end of student answer\b[^\n]*$", re.M)


def _number(text: str) -> float:
    word = text.strip().lower()
    return float(WORDS.index(word)) if word in WORDS else float(word.replace(",", "."))


def _value(text: str, most: float) -> float | None:
    """The points at the start of a text; None for a range, another maximum, or what is no number."""
    match = VALUE.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    given = [match[name] for name in ("of", "most") if match[name] is not None]
    if (RANGE_OF if given else RANGE).match(rest) or re.match(r"[.,]\d", rest):
        return None
    if any(abs(_number(one) - most) > CLOSE for one in given):
        return None
    return _number(match["points"])


def _unquoted(reply: str) -> str:
    """A reply in which quotations, of the student's words, are blanks; places and lines stay."""
    for pattern in (MARKED, QUOTED):
        reply = pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), reply)
    return reply


def read_score(reply: str, max_points: float) -> float | None:
    """The score that a reply gives, in points; None when that cannot be said without guessing.

    A line ``Score: 7/9`` (``7``, ``7.5``, ``seven``, ``7 out of 9``; also Grade, Final score, ...) outside quotations,
    or a reply that is nothing but the number. Ranges, other maxima and scores that contradict each other are not read.
    It may exceed the maximum; a grader clips it.

    Args:
        reply: the judge's words.
        max_points: the most there is.
    """
    plain = _unquoted(reply)
    lines = list(SCORE.finditer(plain))
    if not lines:
        bare = reply.strip().strip("*_ ").rstrip(".")
        match = VALUE.fullmatch(bare)
        return _value(bare, max_points) if match else None
    found = {_value(match["value"].strip(), max_points) for match in lines}
    return found.pop() if len(found) == 1 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class CriterionGrade:
    """Points for one criterion, the most there are for it, and the judge's reason."""

    criterion: str
    points: float
    most: float
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What one reply says."""

    points: float
    per_criterion: tuple[CriterionGrade, ...]
    reason: str
    flags: tuple[str, ...]


def _tidy(reason: str) -> str:
    """One line, without what a spreadsheet would take for a formula."""
    return " ".join(reason.split()).strip("*_ ").lstrip("=+-\u2013\u2014@:;,. ")


def read_graded(reply: str, *, maximum: float) -> Reading | None:
    points = read_score(reply, maximum)
    if points is None:
        return None
    lines = list(SCORE.finditer(_unquoted(reply)))
    reason = _tidy(reply[: lines[0].start()]) if lines else ""
    if lines and not reason:
        reason = _tidy(reply[lines[-1].end() :])
    flags = (f"score {points:g} clipped to {maximum:g}",) if points > maximum + CLOSE else ()
    return Reading(points=min(points, maximum), per_criterion=(), reason=reason, flags=flags)


def read_criteria(reply: str, *, rubric: Rubric) -> Reading | None:
    """Every criterion once; their sum is the grade, whatever total the judge adds up itself."""
    plain = _unquoted(reply)
    found: dict[int, CriterionGrade] = {}
    given: dict[int, float] = {}
    flags = []
    for match in CRITERION.finditer(plain):
        number = int(match["number"])
        if not 1 <= number <= len(rubric.criteria):
            return None
        wanted = rubric.criteria[number - 1]
        points = _value(match["value"], wanted.points)
        if points is None or (number in given and abs(given[number] - points) > CLOSE):
            return None
        if number in given:
            continue
        given[number] = points
        if points > wanted.points + CLOSE:
            flags.append(f"criterion {number}: {points:g} clipped to {wanted.points:g}")
        value = VALUE.match(match["value"])
        assert value is not None
        start = match.start("value") + value.end()
        # The reason is in the reply as it is, quotations included, to the end of its line.
        found[number] = CriterionGrade(
            criterion=wanted.name,
            points=min(points, wanted.points),
            most=wanted.points,
            reason=_tidy(reply[start : match.end()]),
        )
    if len(found) < len(rubric.criteria):
        return None
    ordered = tuple(found[number] for number in sorted(found))
    total = math.fsum(one.points for one in ordered)
    for match in TOTAL.finditer(plain):
        said = _value(match["value"].strip(), rubric.max_points)
        if said is not None and abs(said - math.fsum(given.values())) > CLOSE:
            flags.append(f"the judge's own total is {said:g}, the sum {math.fsum(given.values()):g}")
    reason = "; ".join(
        f"{one.criterion}: {one.points:g}/{one.most:g}" + (f" ({one.reason})" if one.reason else "") for one in ordered
    )
    return Reading(
        points=min(max(total, 0.0), rubric.max_points), per_criterion=ordered, reason=reason, flags=tuple(flags)
    )
