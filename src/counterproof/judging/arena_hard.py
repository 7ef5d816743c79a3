"""Arena-Hard and BenchBuilder: benchmarks mined from crowd prompts, and what a benchmark is worth.

Paper: arXiv 2406.11939, "From Crowdsourced Data to High-Quality Benchmarks: Arena-Hard and BenchBuilder Pipeline".
Read beside: lmarena/arena-hard-auto @196f6b8 (BenchBuilder/, show_result.py, utils/math_utils.py).
Deviations: prompts are reduced by PCA unless UMAP is asked for; where a reply has no readable list of criteria, it is
asked for once more, then counted as no criterion (as there) and recorded; a bootstrap draws prompts, not games.
Offensive prompts are left to the reader; personal data are looked for by pattern.

Battles and ratings are in `battles` and `bradley_terry`, the three statistics of a benchmark in `reliability`, and are
offered here too; judging is in `pairwise`.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("judging"):
    from sklearn.cluster import HDBSCAN
    from sklearn.decomposition import PCA

from counterproof.judging.asking import Answer, ask_judge
from counterproof.judging.battles import Battles, count_battles, read_battles
from counterproof.judging.bradley_terry import BradleyTerry
from counterproof.judging.reliability import agreement, brier, rank_correlations, separability
from counterproof.judging.templates import PromptTemplate
from counterproof.language.conversation import Chat

__all__ = [
    "Battles",
    "BradleyTerry",
    "Candidate",
    "Selection",
    "agreement",
    "annotate_prompts",
    "brier",
    "cluster_prompts",
    "count_battles",
    "name_topics",
    "rank_correlations",
    "read_battles",
    "read_criteria",
    "read_prompts",
    "select_prompts",
    "separability",
    "style_counts",
    "style_differences",
    "write_benchmark",
]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CRITERIA = (
    "specificity",
    "domain knowledge",
    "complexity",
    "problem solving",
    "creativity",
    "technical accuracy",
    "real-world application",
)
SHORTEST = 33  # characters; the official script drops what has 32 or fewer
LONGEST = 10_000
SHOWN = 12_500  # characters of a prompt that the annotator sees
PRIVATE = {
    "an e-mail address": re.compile(r"\b[\w.+-]+@[\w-]+\.[\w.-]*[A-Za-z]\b"),
    "a telephone number": re.compile(r"(?<![\w.])\+\d{1,3}[ ./-]?(?:\(?\d{1,4}\)?[ ./-]?){2,4}\d{2,4}(?![\w.])"),
    "a card number": re.compile(r"(?<![\w.-])(?:\d{4}[ -]){3}\d{4}(?![\w.-])"),
}


# style


def style_counts(text: str, tokens: Callable[[str], int] = lambda text: len(text.split())) -> dict[str, float]:
    """Length, and headers, list items and bold passages in an answer's Markdown, code blocks left out of the latter.

    Args:
        tokens: counts the length; words by default, the paper has tokens.
    """
    prose = re.sub(r"```.*?(?:```|\Z)", "", text, flags=re.DOTALL)
    return {
        "length": float(tokens(text)),
        "header": float(len(re.findall(r"^#{1,6}\s", prose, re.MULTILINE))),
        "list": float(len(re.findall(r"^\s*(?:\d+\.|[-*+])\s", prose, re.MULTILINE))),
        "bold": float(len(re.findall(r"\*\*[^*\n]+\*\*|__[^_\n]+__", prose))),
    }


def style_differences(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """The paper's four covariates of a battle: columns ``style_length`` and so on for `read_battles`.

    Length: (l_a - l_b) / (l_a + l_b). The others: densities d = c / (l + 1), and (d_a - d_b) / (d_a + d_b + 1).

    Args:
        a, b: `style_counts` of the two answers.
    """
    total = a["length"] + b["length"]
    found = {"style_length": (a["length"] - b["length"]) / total if total else 0.0}
    for name in ("header", "list", "bold"):
        one, other = a[name] / (a["length"] + 1), b[name] / (b["length"] + 1)
        found[f"style_{name}"] = (one - other) / (one + other + 1)
    return found


# BenchBuilder


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A prompt, with what is known of it.

    Attributes:
        uid: unique in a benchmark.
        text: the prompt.
        source: where it was read.
        cluster: number of its topic; -1 until it has one.
        topic: the topic's name; empty if none was asked for.
        criteria: those of `CRITERIA` that it meets.
        score: how many.
        cluster_score: mean score of its topic.
        outcome: of the annotation: read, unparsed or failed.
        replies: what the annotator said.
    """

    uid: str
    text: str
    source: str
    cluster: int = -1
    topic: str = ""
    criteria: tuple[str, ...] = ()
    score: int = 0
    cluster_score: float = 0.0
    outcome: str = ""
    replies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """A benchmark, and what became of the rest.

    Attributes:
        chosen: the benchmark's prompts.
        candidates: all prompts that were annotated.
        dropped: why others were not, and how many.
    """

    chosen: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    dropped: Mapping[str, int]


def read_prompts(path: str | Path) -> tuple[list[Candidate], dict[str, int]]:
    """Prompts of a JSONL file that can be in a benchmark, and why the others cannot.

    A record has ``prompt`` (or ``text``, ``question``): text, or chat messages; it may have ``uid`` and ``language``.
    Left out, and counted: conversations of several turns, records whose ``language`` is not English, texts of 32
    characters or fewer, repeated ones, ones with personal data (by pattern). Longer than 10,000 characters is cut.

    Raises:
        UserError: naming file and line: not JSON, no prompt, a uid that is there twice; a file that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give a .jsonl file with a prompt a line")
    found: list[Candidate] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    uids: dict[str, int] = {}
    with open(path, encoding="utf-8") as stream:
        for line, content in enumerate(stream, 1):
            if not content.strip():
                continue
            where = f"{path}:{line}"
            try:
                record = json.loads(content)
            except ValueError as problem:
                raise UserError(f"{where}: not JSON ({problem}); expected one record a line") from None
            name = next(
                (key for key in ("prompt", "text", "question") if isinstance(record, dict) and key in record), ""
            )
            if not name:
                raise UserError(f"{where}: there is no prompt; expected {{'prompt': ...}}")
            text, turns = _spoken(record[name], where)
            uid = str(record.get("uid", f"{path.stem}-{line}"))
            if uid in uids:
                raise UserError(f"{where}: the uid {uid!r} is that of line {uids[uid]} too; make them distinct")
            uids[uid] = line
            plain = " ".join(text.lower().split())
            private = next((what for what, pattern in PRIVATE.items() if pattern.search(text)), None)
            why = (
                "several turns" if turns > 1
                else "not English" if str(record.get("language", "en")).lower() not in ("en", "english")
                else f"shorter than {SHORTEST} characters" if len(text.strip()) < SHORTEST
                else "repeated" if plain in seen
                else f"holds {private}" if private
                else None
            )  # fmt: skip
            if why:
                dropped[why] += 1
                continue
            seen.add(plain)
            found.append(Candidate(uid=uid, text=text.strip()[:LONGEST], source=where))
    return found, dict(dropped)


def _spoken(prompt: Any, where: str) -> tuple[str, int]:
    """The text of a prompt, and of how many turns it is."""
    if isinstance(prompt, str):
        return prompt, 1
    if isinstance(prompt, list) and all(
        isinstance(one, dict) and isinstance(one.get("content"), str) for one in prompt
    ):
        asked = [one["content"] for one in prompt if one.get("role") == "user"]
        if asked:
            return asked[0], len(asked)
    raise UserError(f"{where}: the prompt is {prompt!r:.60}; expected text, or chat messages with a user's")


def cluster_prompts(
    embeddings: Floats, *, smallest: int = 8, reduce: Literal["pca", "umap"] = "pca", seed: int = 0
) -> Ints:
    """Topics of prompts: 15 (PCA) or 5 (UMAP) dimensions at most, then HDBSCAN; outliers go to the nearest topic.

    Args:
        embeddings: (N, D).
        smallest: prompts of the smallest topic; the paper's repository has 8.
        reduce: ``"umap"`` is the paper's, and needs umap-learn.

    Returns:
        (N,) int64 from 0; all 0 when no topic stands out, or there are too few prompts for any.
    """
    embeddings = np.asarray(embeddings, dtype=float)
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings have the shape {embeddings.shape}; expected (prompts, dimensions), finite")
    size = len(embeddings)
    if size <= max(2 * smallest, 3):
        return np.zeros(size, dtype=np.int64)
    if reduce == "umap":
        try:
            from umap import UMAP
        except ModuleNotFoundError:
            raise UserError("UMAP is not installed; it comes with: pip install umap-learn") from None
        flat = UMAP(n_components=min(5, size - 2), metric="cosine", random_state=seed).fit_transform(embeddings)
    elif reduce == "pca":
        unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        flat = PCA(min(15, *embeddings.shape), random_state=seed).fit_transform(unit)
    else:
        raise ValueError(f"reduce is {reduce!r}; expected 'pca' or 'umap'")
    labels = np.asarray(HDBSCAN(min_cluster_size=smallest, copy=True).fit_predict(flat), dtype=np.int64)
    topics = np.unique(labels[labels >= 0])
    if not len(topics):
        return np.zeros(size, dtype=np.int64)
    centres = np.stack([flat[labels == topic].mean(axis=0) for topic in topics])
    astray = np.flatnonzero(labels < 0)
    distances = np.linalg.norm(flat[astray, None] - centres[None], axis=2)
    labels[astray] = topics[distances.argmin(axis=1)]
    return labels


def read_criteria(text: str) -> tuple[int, ...] | None:
    """The numbers, 1 to 7, of a reply's bracketed list such as ``[1, 2, 6]``; None without one, or with two."""
    lists = {
        tuple(sorted({int(number) for number in re.findall(r"\d+", inside)}))
        for inside in re.findall(r"\[([\d,\s]*)\]", text)
    }
    if len(lists) != 1:
        return None
    (numbers,) = lists
    return numbers if all(1 <= number <= len(CRITERIA) for number in numbers) else None


def annotate_prompts(
    judge: Chat,
    texts: Sequence[str],
    *,
    template: str | Path | None = None,
    jobs: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Answer[tuple[int, ...]]]:
    """Which of the seven criteria each prompt meets, as a judge model sees it.

    Args:
        template: a file as `PromptTemplate` reads it, with ``{{prompt}}`` and, if it likes, ``{{criteria}}``.
        jobs, progress: see `Chat.ask_all`.

    Raises:
        UserError: a template that is not there or has other placeholders; an endpoint that does not answer.
    """
    layout = PromptTemplate.read(template or "arena-hard-criteria", needed=["prompt"], allowed=["criteria"])
    criteria = "\n".join(f"{number}. {name}" for number, name in enumerate(CRITERIA, 1))
    questions = [layout.messages(criteria=criteria, prompt=text[:SHOWN]) for text in texts]
    return ask_judge(
        judge,
        questions,
        read_criteria,
        reminder=layout.reminder,
        max_tokens=32,
        jobs=jobs,
        progress=progress,
    )


def name_topics(judge: Chat, candidates: Sequence[Candidate], *, jobs: int = 8, seed: int = 0) -> dict[int, str]:
    """A name of five words at most for each topic, from some of its prompts; empty where the judge gives none."""
    layout = PromptTemplate.read("arena-hard-topic", needed=["prompts"])
    rng = np.random.default_rng(seed)
    topics = sorted({candidate.cluster for candidate in candidates})
    questions = []
    for topic in topics:
        texts = [candidate.text for candidate in candidates if candidate.cluster == topic]
        some = [texts[place] for place in rng.permutation(len(texts))[:8]]
        listed = "\n".join(f"- {' '.join(text.split())[:300]}" for text in some)
        questions.append(layout.messages(prompts=listed))

    def read(reply: str) -> str | None:
        name = reply.strip().splitlines()[0].strip(" \"'.*#") if reply.strip() else ""
        return name if 0 < len(name.split()) <= 5 else None

    answers = ask_judge(judge, questions, read, reminder=layout.reminder, max_tokens=24, jobs=jobs)
    return {topic: answer.value or "" for topic, answer in zip(topics, answers, strict=True)}


def select_prompts(
    texts: Sequence[str] | Sequence[Candidate],
    *,
    embed: Callable[[Sequence[str]], NDArray[np.floating[Any]]],
    annotate: Callable[[Sequence[str]], Sequence[Answer[tuple[int, ...]] | Sequence[int]]],
    prompt_threshold: float = 6,
    cluster_threshold: float = 5,
    clusters: int | None = 250,
    per_cluster: int | None = 2,
    smallest: int = 8,
    reduce: Literal["pca", "umap"] = "pca",
    seed: int = 0,
) -> Selection:
    """Good prompts of good topics, evenly over topics (the paper's section 4).

    A prompt's score is the number of criteria it meets, a topic's the mean of its prompts'. A prompt is kept if both
    reach their threshold; of the topics that have such prompts, `clusters` are drawn, and of each `per_cluster`
    prompts, or all if it has fewer.

    Args:
        texts: prompts, or what `read_prompts` returns.
        embed: texts to (N, D) vectors, such as `counterproof.language.embedding.embed`.
        annotate: texts to the numbers, from 1, of the criteria each meets, such as `annotate_prompts` with a judge.
        prompt_threshold, cluster_threshold: the paper's.
        clusters, per_cluster: the paper's; None for all.
        smallest, reduce: see `cluster_prompts`.
        seed: of the draws.

    Raises:
        UserError: no prompts.
        ValueError: an annotator or embedder that returns another number of results.
    """
    candidates = [
        text if isinstance(text, Candidate) else Candidate(uid=f"prompt-{number}", text=str(text), source="")
        for number, text in enumerate(texts)
    ]
    if not candidates:
        raise UserError("there are no prompts to select from")
    plain = [candidate.text for candidate in candidates]
    vectors = np.asarray(embed(plain), dtype=float)
    if len(vectors) != len(plain):
        raise ValueError(f"embed returned {len(vectors)} vectors for {len(plain)} prompts")
    labels = cluster_prompts(vectors, smallest=smallest, reduce=reduce, seed=seed)
    notes = list(annotate(plain))
    if len(notes) != len(plain):
        raise ValueError(f"annotate returned {len(notes)} results for {len(plain)} prompts")
    met = [tuple(sorted(set((note.value or ()) if isinstance(note, Answer) else note))) for note in notes]
    scores = np.array([len(numbers) for numbers in met])
    means = np.bincount(labels, scores) / np.maximum(np.bincount(labels), 1)
    annotated = tuple(
        Candidate(
            uid=candidate.uid,
            text=candidate.text,
            source=candidate.source,
            cluster=int(label),
            topic=candidate.topic,
            criteria=tuple(CRITERIA[number - 1] for number in numbers),
            score=len(numbers),
            cluster_score=float(means[label]),
            outcome=note.outcome if isinstance(note, Answer) else "read",
            replies=note.replies if isinstance(note, Answer) else (),
        )
        for candidate, label, numbers, note in zip(candidates, labels, met, notes, strict=True)
    )
    good = [one for one in annotated if one.score >= prompt_threshold and one.cluster_score >= cluster_threshold]
    rng = np.random.default_rng(seed)
    topics = sorted({one.cluster for one in good})
    drawn = [topics[place] for place in rng.permutation(len(topics))[:clusters]]
    chosen: list[Candidate] = []
    for topic in sorted(drawn):
        inside = [one for one in good if one.cluster == topic]
        chosen += [inside[place] for place in sorted(rng.permutation(len(inside))[:per_cluster])]
    dropped = {
        f"score below {prompt_threshold:g}": sum(one.score < prompt_threshold for one in annotated),
        f"topic's score below {cluster_threshold:g}": sum(
            one.score >= prompt_threshold and one.cluster_score < cluster_threshold for one in annotated
        ),
        "not drawn": len(good) - len(chosen),
    }
    return Selection(tuple(chosen), annotated, dropped)


def write_benchmark(selection: Selection, path: str | Path, *, judge: str = "") -> None:
    """A JSONL file: uid, prompt, cluster, topic, criteria, score, cluster_score, source, judge and its replies."""
    with replacing(Path(path)) as stream:
        for one in selection.chosen:
            record = {key: value for key, value in asdict(one).items() if key != "text"}
            stream.write(
                json.dumps({"uid": one.uid, "prompt": one.text, **record, "judge": judge}, ensure_ascii=False) + "\n"
            )
