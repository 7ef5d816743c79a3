"""Prompts as files: what a judge is told stands in a text file that anyone can copy, change and name instead."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from counterproof.errors import UserError

__all__ = ["PromptTemplate"]

SHIPPED = Path(__file__).parent / "prompts"
HEADING = re.compile(r"^=== *(.*?) *===$", re.MULTILINE)
PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")
SECTIONS = ("system", "user", "reminder")
REMINDER = "Your reply did not end in the form that was asked for. Give your verdict once more, in exactly that form."


@dataclass(frozen=True)
class PromptTemplate:
    """The messages of one question, with places for what is asked about.

    A file has sections, each under a heading of its own line: ``=== user ===``, and, as one likes, ``=== system ===``
    and ``=== reminder ===`` (what is said after a reply that could not be read). What stands before the first heading
    is for whoever opens the file, and not sent. Without any heading the whole file is the user's message.
    ``{{name}}`` is a place; other braces are text. What is put in is never searched for places itself.

    Attributes:
        name: the file's name, as errors call it.
        system, user: texts with places; system may be empty.
        reminder: without places.
    """

    name: str
    user: str
    system: str = ""
    reminder: str = REMINDER

    @classmethod
    def read(cls, source: str | Path, *, needed: Sequence[str], allowed: Sequence[str] = ()) -> "PromptTemplate":
        """A template from a file.

        Args:
            source: a path, or the bare name of one that is shipped, such as ``"pairwise"``.
            needed: places that it must have, in the system's or the user's text.
            allowed: places that it may have.

        Raises:
            UserError: no such file, or not UTF-8; a place that is missing or unknown, a section that is unknown, double
                or empty; names the file, and the line where there is one.
        """
        path = Path(source)
        if isinstance(source, str) and (SHIPPED / f"{source}.txt").is_file():
            path = SHIPPED / f"{source}.txt"
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as problem:
            said = "is not UTF-8 text" if isinstance(problem, UnicodeDecodeError) else problem.strerror
            shipped = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.txt")))
            raise UserError(f"cannot read the template {path}: {said}; name a text file, or one of {shipped}") from None
        return cls.parse(text, str(path), needed=needed, allowed=allowed)

    @classmethod
    def parse(cls, text: str, name: str, *, needed: Sequence[str], allowed: Sequence[str] = ()) -> "PromptTemplate":
        """A template from a file's text; see `read`."""
        headings = list(HEADING.finditer(text))
        sections = {} if headings else {"user": text.strip()}
        places = [*needed, *(place for place in allowed if place not in needed)]
        remedy = f"the places are {', '.join(f'{{{{{place}}}}}' for place in places)}"
        for heading, end in zip(headings, [*(each.start() for each in headings[1:]), len(text)], strict=False):
            line = text.count("\n", 0, heading.start()) + 1
            if heading[1] not in SECTIONS:
                raise UserError(f"{name}:{line}: no section {heading[1]!r}; there are {', '.join(SECTIONS)}")
            if heading[1] in sections:
                raise UserError(f"{name}:{line}: a second section {heading[1]!r}; join it with the first")
            sections[heading[1]] = text[heading.end() : end].strip()
        if not sections.get("user"):
            raise UserError(f"{name} has no user's message; write one under a line '=== user ==='")
        start = headings[0].start() if headings else 0
        for found in PLACEHOLDER.finditer(text, start):
            line = text.count("\n", 0, found.start()) + 1
            if found[1] not in places:
                raise UserError(f"{name}:{line}: unknown place {found[0]}; {remedy}")
        asked = sections.get("system", "") + sections["user"]
        present = {found[1] for found in PLACEHOLDER.finditer(asked)}
        for place in needed:
            if place not in present:
                raise UserError(f"{name}: the place {{{{{place}}}}} is missing; {remedy}")
        reminder = sections.get("reminder", REMINDER)
        if PLACEHOLDER.search(reminder) or not reminder:
            raise UserError(f"{name}: the reminder must be a text without places; mend or remove it")
        return cls(name, sections["user"], sections.get("system", ""), reminder)

    def messages(self, **values: str) -> list[dict[str, str]]:
        """Chat messages with the values in their places; a place without a value raises KeyError."""

        def fill(text: str) -> str:
            # One pass over the template: an answer that spells a place stays as it is.
            return PLACEHOLDER.sub(lambda found: values[found[1]], text)

        system = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.user)}]


def chosen_templates(
    given: Mapping[str, "str | Path | PromptTemplate"] | None, known: Sequence[str]
) -> dict[str, "str | Path | PromptTemplate"]:
    """What a user gives in place of shipped templates.

    Raises:
        UserError: a name that is not known.
    """
    for name in given or {}:
        if name not in known:
            raise UserError(f"no template is called {name!r}; there are {', '.join(known)}")
    return dict(given or {})
