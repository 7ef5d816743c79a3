"""TeX of titles and abstracts as HTML: mathematics as MathML, the few text commands people use as what they mean.

What is written is safe whatever it says: text is escaped, of the MathML only known elements and attributes are kept,
and what cannot be read stays as it was written.
"""

import html
import re
import xml.etree.ElementTree as ET
from functools import lru_cache
from itertools import islice

from markupsafe import Markup, escape

from counterproof.errors import extra

with extra("page"):
    import latex2mathml.converter

__all__ = ["typeset"]

FORMULAS = 60  # of a text; more stay as they are
# No formula is longer than 400 letters: the time to look for its end is bounded.
MATHS = re.compile(
    r"(?<!\\)\$\$(?P<display>[^$]{1,400}?)\$\$"
    r"|(?<!\\)\$(?=\S)(?P<inline>(?:[^$\\]|\\.){1,400}?)(?<=\S)\$(?!\d)"
    r"|\\\((?P<round>.{1,400}?)\\\)|\\\[(?P<square>.{1,400}?)\\\]"
)
NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
# fmt: off
ELEMENTS = frozenset((
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "munder", "mover",
    "munderover", "mfrac", "msqrt", "mroot", "mstyle", "mtable", "mtr", "mtd", "mpadded", "mphantom", "mmultiscripts",
    "mprescripts", "none",
))
ATTRIBUTES = frozenset((
    "display", "mathvariant", "stretchy", "fence", "separator", "accent", "accentunder", "form", "lspace", "rspace",
    "minsize", "maxsize", "movablelimits", "largeop", "symmetric", "linethickness", "displaystyle", "scriptlevel",
    "columnalign", "width", "height", "depth",
))
# Text commands and the element that what is in their braces becomes.
WRAPPED = {
    "emph": "em", "textit": "em", "textbf": "strong", "textsc": None, "texttt": "code", "text": None, "textrm": None,
    "mbox": None, "underline": None, "textsuperscript": "sup", "textsubscript": "sub",
}
LETTERS = {
    r"\&": "&", r"\%": "%", r"\#": "#", r"\_": "_", r"\$": "$", r"\{": "{", r"\}": "}", "---": "\u2014",
    "--": "\u2013", "``": "\u201c", "''": "\u201d", r"\ldots": "…", r"\dots": "…", r"\ss": "ß", r"\o": "ø",
    r"\ae": "æ", r"\aa": "å", r"\l": "ł", r"\ ": " ", "~": "\u00a0",
}
# fmt: on
PLAIN = re.compile(
    r"\\(?:" + "|".join(WRAPPED) + r")\{(?P<inside>[^{}\\]*)\}"
    r"|\\(?:ldots|dots|ss|ae|aa|o|l)(?![A-Za-z])\s?|\\[&%#_${} ]"
    r"|(?<=\w)---?(?=\w)|(?<= )---?(?= )|``|''|(?<=[\w.])~(?=\w)"
)


@lru_cache(maxsize=8192)
def typeset(text: str) -> Markup:
    """Text with TeX in it as HTML.

    Example:
        >>> typeset("a < b, \\\\emph{so} 5\\\\%")
        Markup('a &lt; b, <em>so</em> 5%')
    """
    parts: list[Markup] = []
    begin = 0
    for found in islice(MATHS.finditer(text), FORMULAS):
        parts.append(_words(text[begin : found.start()]))
        parts.append(_formula(found[0], next(part for part in found.groups() if part is not None)))
        begin = found.end()
    parts.append(_words(text[begin:]))
    return Markup("").join(parts)


def _words(text: str) -> Markup:
    parts: list[Markup] = []
    begin = 0
    for found in PLAIN.finditer(text):
        parts.append(escape(text[begin : found.start()]))
        begin = found.end()
        if found["inside"] is not None:
            element = WRAPPED[found[0][1:].partition("{")[0]]
            inside = _words(found["inside"])
            parts.append(Markup("<{0}>{1}</{0}>").format(Markup(element), inside) if element else inside)
        else:
            parts.append(escape(LETTERS[found[0] if found[0] in LETTERS else found[0].rstrip()]))
    parts.append(escape(text[begin:]))
    return Markup("").join(parts)


def _formula(written: str, tex: str) -> Markup:
    """MathML, with what was written for those who copy it; what cannot be read, as it was written."""
    made = None if tex.count("{") > 60 else _mathml(tex)
    if made is None:
        return Markup('<code class="tex">{}</code>').format(written)
    return Markup(made)


@lru_cache(maxsize=8192)
def _mathml(tex: str) -> str | None:
    try:
        # The converter unescapes what it is given, so entities must not reach it: &lt; is no TeX.
        root = ET.fromstring(latex2mathml.converter.convert(tex))
    except Exception:  # a library's parser over what anybody wrote: whatever it stumbles over is not typeset
        return None
    if any(len(node.tag) > 80 for node in root.iter()):
        return None
    return _kept(root, 0)


def _kept(node: ET.Element, depth: int) -> str | None:
    name = node.tag.removeprefix(NAMESPACE)
    if name not in ELEMENTS or depth > 40:
        return None
    inside = html.escape(node.text or "", quote=False)
    for child in node:
        kept = _kept(child, depth + 1)
        if kept is None:
            return None
        inside += kept + html.escape(child.tail or "", quote=False)
    said = "".join(
        f' {key}="{html.escape(value)}"'
        for key, value in node.attrib.items()
        if key in ATTRIBUTES and re.fullmatch(r"[\w.% -]{1,40}", value)
    )
    return f"<{name}{said}>{inside}</{name}>"
