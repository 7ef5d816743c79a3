"""BibTeX as bibtexparser takes it apart, LaTeX as pylatexenc reads it: entries, their fields, people's names."""

import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from counterproof.errors import extra
from counterproof.page.readers import Note, Piece, Skipped, Unreadable, cut, lines_of

__all__ = ["fields_of", "names_of", "split", "unlatex"]

# What it logs is reported by line here.
logging.getLogger("bibtexparser").addHandler(logging.NullHandler())


def split(data: bytes, charset: str | None) -> Iterator[Piece | Skipped | Note]:
    """The entries of a file, each with the macros it uses, so that it can be read alone; what is none is named."""
    with extra("page"):
        from bibtexparser import model
        from bibtexparser.entrypoint import parse_string

    lines, guessed = lines_of(data, charset)
    if guessed:
        yield Note("file", guessed)
    found = parse_string("\n".join(lines), parse_stack=[])
    macros = {block.key.lower(): block.raw or "" for block in found.strings}
    word = re.compile(r"[A-Za-z_][\w:.+/-]*")
    for block in found.blocks:
        where = f"line {(block.start_line or 0) + 1}"
        if isinstance(block, model.DuplicateBlockKeyBlock | model.DuplicateFieldKeyBlock):
            inner = block.ignore_error_block
            if not isinstance(inner, model.Entry):
                yield Note(where, f"defines the macro {block.key!r} again; the first holds")  # type: ignore[union-attr]
                continue
            if isinstance(block, model.DuplicateFieldKeyBlock):
                names = ", ".join(sorted(block.duplicate_keys))
                yield Note(where, f"{inner.key!r} has {names} twice; the first holds")
            else:
                yield Note(where, f"the key {inner.key!r} was used before; both were read")
            block = inner
        if isinstance(block, model.ParsingFailedBlock):
            reason = getattr(block.error, "abort_reason", None) or str(block.error)
            yield Skipped(where, f"is no proper BibTeX: {cut(reason, 160)}")
        elif isinstance(block, model.ImplicitComment):
            for number, line in enumerate((block.raw or "").split("\n")):
                if line.strip() and not line.lstrip().startswith("%"):
                    yield Skipped(f"line {(block.start_line or 0) + 1 + number}", f"outside of an entry: {cut(line)}")
        elif isinstance(block, model.Entry):
            # The macros an entry uses go with it, so that it can be read alone.
            used = dict.fromkeys(name for name in map(str.lower, word.findall(block.raw or "")) if name in macros)
            raw = "\n".join([*(macros[name] for name in used), block.raw or ""])
            yield Piece(f"{where} ({block.key})", raw.encode("utf-8", "replace"), "bibtex")


@cache
def _latex() -> Any:
    with extra("page"):
        from pylatexenc.latex2text import LatexNodes2Text

    return LatexNodes2Text(math_mode="verbatim", keep_comments=True)


def unlatex(text: str) -> str:
    """Accents as letters, braces gone, formulas as they are."""
    if not re.search(r"[\\{}~$]|--|``|''", text):
        return text
    # An unescaped percent sign is no comment inside of a field.
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    # It takes the first of these for a letter's accent, and does not know the others.
    for name, letter in (("asciicircum", "^"), ("braceleft", r"\\{"), ("braceright", r"\\}")):
        text = re.sub(rf"\\text{name}(?:\{{\}}|(?![A-Za-z]))", letter, text)
    return str(_latex().latex_to_text(text))


def fields_of(raw: bytes) -> tuple[str, dict[str, str]]:
    """The key of an entry of `split`, and its fields by name in lower case, as LaTeX; of a field given twice the first.

    Raises:
        Unreadable: it is no entry.
    """
    with extra("page"):
        from bibtexparser import model
        from bibtexparser.entrypoint import parse_string

    found = parse_string(raw.decode(), parse_stack=[])
    macros: dict[str, str] = {}
    for macro in found.strings:  # one may be made of those before it
        macros[macro.key.lower()] = _joined(str(macro.value), macros)
    entries = [
        inner
        for block in found.blocks
        if isinstance(inner := getattr(block, "ignore_error_block", None) or block, model.Entry)
    ]
    if len(entries) != 1:
        raise Unreadable("is no proper BibTeX")
    fields: dict[str, str] = {}
    for field in entries[0].fields:
        fields.setdefault(field.key.lower(), _joined(str(field.value), macros))
    return entries[0].key, fields


def _joined(value: str, macros: Mapping[str, str]) -> str:
    """The text of a field: parts in braces or quotes, numbers and macros, joined by ``#``."""
    parts, depth, quoted, part = [], 0, False, ""
    for letter in value:
        depth += (letter == "{") - (letter == "}")
        if letter == '"' and depth == 0:
            quoted = not quoted
        if letter == "#" and depth == 0 and not quoted:
            parts.append(part)
            part = ""
        else:
            part += letter
    found = []
    for text in map(str.strip, [*parts, part]):
        bare = text[1:-1] if text[:1] + text[-1:] in ("{}", '""') and len(text) > 1 else None
        found.append(macros.get(text.lower(), text) if bare is None else bare)
    return "".join(found)


def names_of(text: str) -> list[str]:
    """``Carion, Nicolas and others`` as ``Nicolas Carion`` and ``others``; a name in braces is one name."""
    found, depth, part = [], 0, ""
    for piece in re.split(r"(\s+and\s+|[{}])", text.strip()):
        depth += (piece == "{") - (piece == "}")
        if depth <= 0 and re.fullmatch(r"\s+and\s+", piece):
            found.append(part)
            part = ""
        else:
            part += piece
    names = []
    for name in [*found, part]:
        whole = name.strip().startswith("{") and name.strip().endswith("}")
        plain = " ".join(unlatex(name).split())
        parts = [part.strip() for part in plain.split(",")]
        if not whole and len(parts) == 2:
            plain = f"{parts[1]} {parts[0]}"
        elif not whole and len(parts) == 3:  # family, junior, given
            plain = f"{parts[2]} {parts[0]} {parts[1]}"
        if plain:
            names.append(plain)
    return names
