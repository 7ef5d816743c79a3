"""Start a paper: card, method, claim and test that pass as they are, to be filled in."""

import keyword
import re
from datetime import date
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from counterproof.errors import UserError
from counterproof.files import replacing
from counterproof.page.catalogue import SECTIONS, Paper, papers

__all__ = ["new_paper"]


def new_paper(slug: str, room: str, into: Path | None = None) -> list[Path]:
    """Write the four files of a paper with a trivial, true claim.

    A card that is there as ``planned`` keeps its text and becomes one that ``runs``.

    Args:
        slug: lower-case words joined by hyphens.
        room: the room it belongs to.
        into: the package folder that takes it, e.g. of your own package; its tests go to ``tests`` beside the package's
            top folder, or beside ``src``. Default: the room of the checkout this runs from.

    Returns:
        what was written.

    Raises:
        UserError: a slug that is not one, is taken, or whose files exist; a folder that is no package.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug) or keyword.iskeyword(slug):
        raise UserError(f"{slug!r} is not a slug: lower-case words and numbers joined by hyphens, such as group-detr")
    folder = into if into is not None else Path(__file__).parents[1] / room
    if into is None and not (folder.parents[2] / "pyproject.toml").exists():
        raise UserError("Counterproof is installed, not checked out: name your own package's folder with --into")
    if not (folder / "__init__.py").exists():
        raise UserError(f"{folder} is not a package: it has no __init__.py")
    module = slug.replace("-", "_")
    planned = papers().get(slug)
    if planned is not None and (planned.status == "runs" or planned.path != folder / f"{module}.md"):
        raise UserError(f"the slug {slug!r} is taken by {planned.path}")
    parts = [folder.resolve().name]
    top = folder.resolve().parent
    while (top / "__init__.py").exists():
        parts.insert(0, top.name)
        top = top.parent
    tests = (top.parent if top.name == "src" else top) / "tests" / Path(*parts[1:])
    files = {
        folder / f"{module}.md": "card.md",
        folder / f"{module}.py": "method.py",
        folder / "claims" / f"{module}.py": "claim.py",
        tests / f"test_{module}.py": "test.py",
    }
    for path in files:
        if path.exists() and not (planned and path == planned.path):
            raise UserError(f"{path} exists; nothing was written")
    templates = Environment(
        loader=PackageLoader("counterproof.page", "templates/new"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    values = {
        "slug": slug,
        "module": module,
        "package": ".".join(parts),
        "room": room,
        "year": date.today().year,
        "title": slug.replace("-", " ").capitalize(),
    }
    try:
        (folder / "claims").mkdir(exist_ok=True)
        (folder / "claims" / "__init__.py").touch()
        tests.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot write {problem.filename}: {problem.strerror}") from None
    for path, template in files.items():
        text = templates.get_template(f"{template}.jinja").render(values)
        with replacing(path) as stream:
            stream.write(begun(planned, text) if template == "card.md" and planned else text)
    return list(files)


def begun(planned: Paper, template: str) -> str:
    """The card of a planned paper as that of one that runs: its text, with what it lacks from the template."""
    sections = dict(re.findall(r"^## (.+)\n((?:.*\n)*?)(?=^## |\Z)", template, re.MULTILINE))
    use = "How it is used here"
    sections |= {**{name: text + "\n" for name, text in planned.sections.items()}}
    sections[use] = (
        planned.sections[use] + "\n\n" + re.findall(r"```python(?:.*\n)*", template)[0].partition("\n## ")[0]
    )
    front = planned.path.read_text(encoding="utf-8").partition("\n---\n")[0]
    front = front.replace("status: planned", "status: runs\n" + re.findall(r"^defaults:.*$", template, re.MULTILINE)[0])
    body = "\n".join(f"## {name}\n{sections[name].strip()}\n" for name in SECTIONS["runs"])
    return f"{front}\n---\n\n{body}"
