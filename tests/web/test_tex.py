"""TeX becomes MathML or stays what was written; whatever it says, no element comes in that is not known."""

import re
import time
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("latex2mathml", reason="the extra page is not installed")

from counterproof.web.tex import ELEMENTS, _kept, typeset

OWN = ELEMENTS | {"em", "strong", "code", "sup", "sub"}


@pytest.mark.parametrize(
    ("tex", "parts"),
    [
        ("$x^2$", ["<msup><mi>x</mi><mn>2</mn></msup>"]),
        (r"$\frac{1}{n}$", ["<mfrac>"]),
        (r"\(\alpha\)", ["<mi>\u03b1</mi>"]),
        (r"$$\sum_i x_i$$", ["∑"]),
        (r"\emph{so} and \textbf{bold}", ["<em>so</em> and <strong>bold</strong>"]),
        (r"5\% of R\&D", ["5% of R&amp;D"]),
        ("one--to--many", ["one\u2013to\u2013many"]),
        ("costs $5 and $10 more", ["costs $5 and $10 more"]),
        (r"$\nonsense{$", ['<code class="tex">$\\nonsense{$</code>']),
        ("https://x.edu/~me --flag", ["https://x.edu/~me --flag"]),
    ],
)
def test_what_is_meant(tex, parts):
    for part in parts:
        assert part in typeset(tex)


@pytest.mark.parametrize(
    "tex",
    [
        "<script>alert(1)</script>", r"$<script>alert(1)</script>$", r"$\text{<img src=x onerror=alert(1)>}$",
        r"$\href{javascript:alert(1)}{x}$", r"$\class{x}{y}$", r"$\style{color:red}{y}$", r"\emph{<b>}",
        r"$\mathrm{&lt;script&gt;}$", r'$"onload="x$', r"$\unicode{x3c}script$", r"$\color{red\" onx=y}{x}$",
    ],
)  # fmt: skip
def test_nothing_gets_in(tex):
    made = typeset(tex)
    assert set(re.findall(r"<([a-zA-Z]+)", made)) <= OWN
    assert "javascript:" not in re.sub(r">[^<]*<", "><", made)
    assert not re.search(r"<[^>]* (on\w+|style|href)=", made)


def test_of_what_the_converter_makes_only_known_elements_and_attributes_are_kept():
    def kept(text):
        return _kept(ElementTree.fromstring(text), 0)

    assert kept('<math onclick="x" style="y" display="block" href="z"><mi>a</mi></math>') == (
        '<math display="block"><mi>a</mi></math>'
    )
    for name in ("script", "maction", "annotation-xml", "img"):
        assert kept(f"<math><{name}>a</{name}></math>") is None
    assert kept("<math><mo>&lt;</mo>&lt;b&gt;</math>") == "<math><mo>&lt;</mo>&lt;b&gt;</math>"


@given(st.text("$\\{}()[]^_&<>\"' abc%~-#frcexth", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_is_safe_and_balanced(text):
    made = str(typeset(text))
    opened = re.findall(r"<(/?)(\w+)[^<>]*>", made)
    assert {name for _, name in opened} <= OWN
    stack = []
    for closing, name in opened:
        if closing:
            assert stack.pop() == name
        else:
            stack.append(name)
    assert stack == []
    ElementTree.fromstring(f"<p>{made}</p>")  # escaped wherever it must be


@pytest.mark.parametrize("text", ["$", "\\(", "$a", "\\emph{", "$x$ ", "{", "\\[a"])
def test_long_texts_take_no_longer_than_they_are(text):
    begin = time.process_time()
    typeset(text * 20_000)
    assert time.process_time() - begin < 10
