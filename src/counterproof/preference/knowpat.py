"""KnowPAT: learn from answers ranked by style and by the knowledge behind them, by likelihood and a list-wise term.

Paper: arXiv 2311.06503 (abstract pages; the objective as the released code states it).
Read beside: zjukg/KnowPAT at 91375fb (train.py) and f731bd8 (utils/retrieve_relative_triple.py, utils/triple_bge.py).
Deviations: answers are scored per token of their own, where the released code divides all answers of a question by one
    padded length (`official_lengths` does too); the list-wise term is divided by n - 1 and kept to a question's own
    answers, where the code divides by 3 and compares whatever is in the batch; tied answers are not compared; equal
    scores under the model give weight 1 in place of 0/0; the order of the knowledge set's last two answers is ours.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import numpy as np

from counterproof.errors import UserError, extra

with extra("preference"):
    import torch
    import torch.nn.functional as F
    from torch import Tensor

from counterproof.preference.data import Example, Text, encode
from counterproof.preference.objectives import Batch, Objective, Output, not_negative, softplus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from counterproof.language import Logps

__all__ = ["KnowPAT", "KnowledgePreferenceBuilder", "LinkedTriple", "TripleLinker", "with_padded_length"]

Triple = tuple[str, str, str]
Weights = Literal["adaptive", "uniform", "rank"]
Knowledge = Literal["relevant", "none", "misleading"]
SetKind = Literal["style", "knowledge"]
Answerer = Callable[[list[Any]], Sequence[str]]

SEPARATOR = " [SEP] "  # between the parts of a triple, for encoders that know the token
QUESTIONS = 256  # whose similarities to all triples exist at a time


# the objective


@dataclass(frozen=True)
class KnowPAT(Objective):
    """Likelihood of the best answer and a list-wise ranking of all of them; no reference, no reward model.

    With the answers of a question sorted from best (1) to worst (n) by score and ``S_i`` their mean log-probability per
    token, the loss is ``-m_1 + align_weight * A`` with

        ``A = 1/(n-1) sum_{i<n} w_i [ -log sigmoid(S_i) + 1/(n-i) sum_{j>i} -log(1 - sigmoid(S_j)) ]``:

    each answer is pulled up and all worse ones are pushed down. The weight ``w_i = (S_i - min S) / (max S - min S)``
    over the question's answers carries no gradient: it is the model's own opinion of the answer. So a preferred answer
    that the model rates lowest gets none; the metric ``knowpat/unweighted`` is the share of such answers.

    Any number of answers from two up, in any order, and another number for each question. Answers with equal scores are
    not compared; A is then the mean over the answers that have a worse one. Where all S are equal, all weights are 1.

    Metrics, beside TRL's (the reward is S, chosen the best answer, rejected the worst, accuracy the share of
    comparisons that S gets right): ``knowpat/likelihood`` and ``knowpat/alignment``, the two parts of the loss, and
    ``knowpat/unweighted``.

    Args:
        align_weight: lambda; the released recipes have 0.1 (product questions) and 0.01 (RJUA-QA). S is never positive,
            so the term never vanishes, and a large weight costs fluency.
        weights: ``"adaptive"``, the paper's; ``"uniform"``, 1; ``"rank"``, the share of the other answers that are
            worse.
        length_normalize: S per token; False sums.
        official_lengths: divide S and the likelihood by tokens of prompt and longest answer, as the released code does
            in effect; needs the column of `with_padded_length`.

    Raises:
        ValueError: a weight that is negative or not finite, unknown `weights`, `official_lengths` without
            `length_normalize`.
    """

    align_weight: float = 0.1
    weights: Weights = "adaptive"
    length_normalize: bool = True
    official_lengths: bool = False
    name: ClassVar[str] = "knowpat"

    def __post_init__(self) -> None:
        not_negative(self.align_weight, "align_weight")
        if self.weights not in get_args(Weights):
            raise ValueError(f"weights must be one of {', '.join(get_args(Weights))}, not {self.weights!r}")
        if self.official_lengths and not self.length_normalize:
            raise ValueError("official_lengths is a way of normalising; it goes with length_normalize=True")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The column of padded lengths, if it is used."""
        return frozenset({"padded_length"}) if self.official_lengths else frozenset()

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,).

        Raises:
            UserError: a question with one answer, with a score that is no number, or with all scores equal, by name.
        """
        _check_rankings(batch)
        sums = policy.sum()
        per_token = sums / (batch.column("padded_length") if self.official_lengths else policy.lengths)
        score = per_token if self.length_normalize else sums
        best = batch.best()
        likelihood = -per_token[best]

        better = (batch.group[:, None] == batch.group) & (batch.score[:, None] > batch.score)
        worse = better.sum(1)
        compared = worse > 0
        weight = self._weights(score.detach(), worse, batch)
        pushed = better.to(score) @ softplus(score) / worse.clamp(min=1)
        terms = torch.where(compared, weight * (pushed - F.logsigmoid(score)), 0)
        alignment = score.new_zeros(batch.groups).index_add(0, batch.group, terms)
        alignment = alignment / torch.bincount(batch.group[compared], minlength=batch.groups)
        losses = likelihood + self.align_weight * alignment

        with torch.no_grad():
            worst = replace(batch, score=-batch.score).best()
            right = (score[:, None] > score)[better].to(score)
            metrics = {
                "knowpat/likelihood": likelihood,
                "knowpat/alignment": alignment,
                "knowpat/unweighted": (weight[compared] == 0).to(score),
                "rewards/chosen": score[best],
                "rewards/rejected": score[worst],
                "rewards/margins": score[best] - score[worst],
                "rewards/accuracies": right,
                "logps/chosen": sums[best],
                "logps/rejected": sums[worst],
            }
        return Output(losses, {name: float(value.detach().mean()) for name, value in metrics.items()})

    def _weights(self, score: Tensor, worse: Tensor, batch: Batch) -> Tensor:
        """(n,)."""
        if self.weights == "uniform":
            return torch.ones_like(score)
        if self.weights == "rank":
            others = torch.bincount(batch.group, minlength=batch.groups) - 1
            return worse.to(score) / others[batch.group]
        low, high = (
            score.new_full((batch.groups,), -sign * math.inf).scatter_reduce(0, batch.group, score, f"a{name}")
            for name, sign in (("min", -1), ("max", 1))
        )
        spread = (high - low)[batch.group]
        return torch.where(spread > 0, (score - low[batch.group]) / spread, 1)


def _check_rankings(batch: Batch) -> None:
    """Every question has two answers or more, and something to prefer."""
    counts = torch.bincount(batch.group, minlength=batch.groups)
    extremes = [
        torch.zeros_like(batch.score[: batch.groups]).scatter_reduce(
            0, batch.group, batch.score, f"a{which}", include_self=False
        )
        for which in ("min", "max")
    ]
    for bad, what in (
        (counts < 2, "has one answer; KnowPAT compares the answers to a question: give two or more, with scores"),
        (~torch.isfinite(extremes[0] + extremes[1]), "has a score that is not a finite number"),
        (extremes[0] == extremes[1], "has answers with one and the same score; there is nothing to prefer"),
    ):
        if bool(bad.any()):
            raise UserError(f"{batch.name(int(bad.nonzero()[0, 0]))}{what}")


def with_padded_length(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", *, max_length: int | None = None
) -> list[Example]:
    """The examples with the column ``padded_length``: tokens of the prompt and the longest answer.

    By it the released code divides every answer of a question: it overwrites the labels' mask in place before it counts
    them.

    Args:
        examples: rankings.
        tokenizer: the model's.
        max_length: as in training, which cuts long prompts.

    Raises:
        UserError: an example that cannot be tokenised, by name.
    """
    lengths = []
    for example in examples:
        group = encode(example, tokenizer, max_length=max_length).group
        lengths.append(len(group.prompt) + max(map(len, group.completions)))
    return [
        replace(example, columns={**example.columns, "padded_length": length})
        for example, length in zip(examples, lengths, strict=True)
    ]


# triple linking


class Encoder(Protocol):
    """What turns texts into vectors, such as a SentenceTransformer."""

    def encode(self, sentences: list[str], /) -> Any:
        """(n, d) numpy array or tensor."""


class LinkedTriple(NamedTuple):
    """A triple of the graph and its cosine similarity to the question."""

    triple: Triple
    similarity: float


class TripleLinker:
    """Finds the triples of a knowledge graph that are nearest to a question, by cosine similarity; nothing is trained.

    A triple is read as ``head [SEP] relation [SEP] tail``. The paper encodes with a BERT-like sentence encoder (BGE);
    the default here needs no download: tf-idf of words and pairs of neighbouring words, characters in Chinese and
    Japanese.

    Args:
        triples: (head, relation, tail) each; exact duplicates are removed.
        encoder: ``"tfidf"``, or an object with ``encode(list[str]) -> (n, d)``, the interface of sentence-transformers.

    Attributes:
        triples: without duplicates, in order.
        duplicates: how many were removed.

    Raises:
        ValueError: no triple, one that is not three texts, by number; vectors of another number or not finite.
        TypeError: another kind of encoder.
        MissingExtra: tf-idf without scikit-learn.

    Example:
        >>> graph = [("Peru", "capital", "Lima"), ("Peru", "currency", "sol"), ("Chile", "capital", "Santiago")]
        >>> linker = TripleLinker(graph)
        >>> linker.link(["What is the capital of Peru?"], k=1)[0][0].triple
        ('Peru', 'capital', 'Lima')
    """

    def __init__(self, triples: Sequence[Sequence[str]], *, encoder: Literal["tfidf"] | Encoder = "tfidf") -> None:
        kept: dict[Triple, None] = {}
        for number, triple in enumerate(triples, 1):
            parts = () if isinstance(triple, str) else tuple(triple)
            if len(parts) != 3 or not all(isinstance(part, str) and part.strip() for part in parts):
                raise ValueError(f"triple {number} is {triple!r}; expected three texts: head, relation, tail")
            kept[parts] = None
        if not kept:
            raise ValueError("there is no triple to link to")
        self.triples = tuple(kept)
        self.duplicates = len(triples) - len(kept)
        texts = [SEPARATOR.join(triple) for triple in self.triples]
        if isinstance(encoder, str):
            if encoder != "tfidf":
                raise TypeError(f"encoder is {encoder!r}; expected 'tfidf' or an object with encode(list of texts)")
            encoder = _TfIdf(texts)
        if not hasattr(encoder, "encode"):
            raise TypeError(
                f"encoder is a {type(encoder).__name__}; expected 'tfidf' or an object with encode(list of texts)"
            )
        self._encoder: Encoder = encoder
        self._vectors = self._encode(texts)

    def link(self, questions: Sequence[str], *, k: int = 10) -> list[list[LinkedTriple]]:
        """The k nearest triples of each question, nearest first, equals in the graph's order.

        Args:
            questions: texts.
            k: how many; the released code takes 10.

        Raises:
            ValueError: k below 1; a question without text, by number.

        Warns:
            UserWarning: fewer triples than k; all are returned.
        """
        questions = _texts(questions, "question")
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of triples, at least 1, not {k!r}")
        if k > len(self.triples):
            warnings.warn(
                f"the graph has {len(self.triples)} triples, fewer than k = {k}; all are linked", stacklevel=2
            )
            k = len(self.triples)
        found: list[list[LinkedTriple]] = []
        for start in range(0, len(questions), QUESTIONS):
            vectors = self._encode(questions[start : start + QUESTIONS])
            similarity = vectors @ self._vectors.T
            rows = similarity.toarray() if hasattr(similarity, "toarray") else similarity
            found += [
                [LinkedTriple(self.triples[index], float(row[index])) for index in _highest(row, k)] for row in rows
            ]
        return found

    def _encode(self, texts: list[str]) -> Any:
        """(n, d) vectors of length 1, or 0 for a text that the encoder finds nothing in; a scipy matrix for tf-idf."""
        vectors = self._encoder.encode(texts)
        if hasattr(vectors, "toarray"):
            return vectors
        if isinstance(vectors, Tensor):
            vectors = vectors.detach().cpu().numpy()
        vectors = np.asarray(vectors, dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise ValueError(
                f"the encoder made {vectors.shape} of {len(texts)} texts; expected ({len(texts)}, d) finite numbers"
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms > 0, norms, 1)


def _highest(values: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k highest, in falling order, the first of equals first."""
    least = np.partition(values, len(values) - k)[len(values) - k]
    candidates = np.flatnonzero(values >= least)
    return candidates[np.argsort(-values[candidates], kind="stable")][:k]


class _TfIdf:
    """Words and neighbouring words of the triples, rarer ones weighing more, as unit vectors."""

    # A character each in scripts that put no blank between words.
    WORD = r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]"

    def __init__(self, texts: list[str]) -> None:
        with extra("preference"):
            from sklearn.feature_extraction.text import TfidfVectorizer
        self._vectorizer = TfidfVectorizer(preprocessor=self._plain, token_pattern=self.WORD, ngram_range=(1, 2))
        try:
            self._vectorizer.fit(texts)
        except ValueError as problem:
            raise ValueError(f"tf-idf finds no word in the triples: {problem}") from None

    @staticmethod
    def _plain(text: str) -> str:
        return text.replace("[SEP]", " ").casefold()

    def encode(self, texts: list[str], /) -> Any:
        return self._vectorizer.transform(texts)


# preference sets


class KnowledgePreferenceBuilder:
    """Makes the two ranked sets of a question: answers by style, and answers by the knowledge behind them.

    Style set: the golden answer, then every answerer's, from the strongest to the weakest, all given the linked
    triples. Knowledge set: the golden answer, then the strongest answerer's under different knowledge: with the k
    nearest triples, with none, with the next k, which are similar and wrong. Scores are n, n - 1, ..., 1. The prompt
    trained on is the question with its k nearest triples, shuffled, so that their place gives nothing away.

    Of equal answers in a set the best-placed is kept; a set with one answer left is left out. Both are counted in a
    warning.

    Args:
        linker: over the knowledge graph.
        k: triples in a prompt; the released code links 10.
        prompt_template: text with ``{question}`` and ``{triples}`` (a line each, ``head | relation | tail``), or a
            function of (question, triples) that returns text or chat messages. None: "Facts: ... Question: ...
            Answer:", without the facts when there are none.
        answerers: by name, the strongest first: functions from a list of prompts to a list of answers, such as
            ``lambda prompts: [own[0].text for own in generate(language, prompts)]``.
        knowledge_order: of the knowledge set after the golden answer.
        seed: of the order of triples in a prompt.

    Raises:
        ValueError: k below 1, a template without question or triples, an unknown or repeated word in `knowledge_order`.
    """

    def __init__(
        self,
        linker: TripleLinker,
        *,
        answerers: Mapping[str, Answerer],
        k: int = 10,
        prompt_template: str | Callable[[str, list[Triple]], Text] | None = None,
        knowledge_order: Sequence[Knowledge] = ("relevant", "none", "misleading"),
        seed: int = 0,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of triples, at least 1, not {k!r}")
        if isinstance(prompt_template, str) and not all(
            f"{{{name}}}" in prompt_template for name in ("question", "triples")
        ):
            raise ValueError(f"prompt_template {prompt_template!r} lacks {{question}} or {{triples}}")
        odd = [word for word in knowledge_order if word not in get_args(Knowledge)]
        if odd or not knowledge_order or len(set(knowledge_order)) != len(knowledge_order):
            raise ValueError(
                f"knowledge_order is {tuple(knowledge_order)}; expected some of {', '.join(get_args(Knowledge))}, "
                "each once"
            )
        if not answerers:
            raise ValueError(
                "there is no answerer to rank below the golden answers; give one or more, the strongest first"
            )
        self.linker, self.k, self.template, self.seed = linker, k, prompt_template, seed
        self.answerers = dict(answerers)
        self.knowledge_order = tuple(knowledge_order)

    def prompts(self, questions: Sequence[str]) -> list[Text]:
        """The questions with their linked triples, for inference.

        Raises:
            ValueError: a question without text, by number.
        """
        return self._prompts(_texts(questions, "question"))["relevant"]

    def __call__(
        self, questions: Sequence[str], golden: Sequence[str], *, sets: Sequence[SetKind] = ("style", "knowledge")
    ) -> list[Example]:
        """Ranked examples, the sets of a question one after the other.

        Args:
            questions: texts.
            golden: the best answer to each.
            sets: which to make.

        Returns:
            Examples with the columns ``set_kind``, ``question`` and ``sources`` (who gave each answer).

        Raises:
            ValueError: texts that are empty or of different number, an unknown set, an answerer with an empty answer or
                another number of them, a graph of no more than k triples, which leaves none to mislead with.
        """
        questions, golden = _texts(questions, "question"), _texts(golden, "golden answer")
        if len(questions) != len(golden):
            raise ValueError(f"{len(questions)} questions and {len(golden)} golden answers; give one for each")
        if not sets or any(kind not in get_args(SetKind) for kind in sets) or len(set(sets)) != len(sets):
            raise ValueError(f"sets is {tuple(sets)!r}; expected some of {', '.join(get_args(SetKind))}, each once")
        if "knowledge" in sets and "misleading" in self.knowledge_order and len(self.linker.triples) <= self.k:
            raise ValueError(
                f"the graph has {len(self.linker.triples)} triples, which leaves none beyond the {self.k} nearest to "
                "mislead with; lower k, or leave 'misleading' out of knowledge_order"
            )
        prompts = self._prompts(questions)
        strongest = next(iter(self.answerers))
        asked = [(name, "relevant") for name in self.answerers] if "style" in sets else []
        if "knowledge" in sets:
            asked += [(strongest, knowledge) for knowledge in self.knowledge_order]
        given = {who: self._ask(who[0], prompts[who[1]]) for who in dict.fromkeys(asked)}
        ranked = {
            "style": [(name, given[name, "relevant"]) for name in self.answerers if "style" in sets],
            "knowledge": [
                (f"{strongest}, {word}", given[strongest, word]) for word in self.knowledge_order if "knowledge" in sets
            ],
        }
        examples, same, left_out = [], 0, 0
        for number, (question, best, prompt) in enumerate(zip(questions, golden, prompts["relevant"], strict=True)):
            for kind in sets:
                answers: dict[str, str] = {best: "golden"}
                for source, texts in ranked[kind]:
                    same += texts[number] in answers
                    answers.setdefault(texts[number], source)
                if len(answers) == 1:
                    left_out += 1
                    continue
                examples.append(
                    Example(
                        prompt=prompt,
                        completions=tuple(_completion(text, prompt) for text in answers),
                        scores=tuple(float(rank) for rank in range(len(answers), 0, -1)),
                        kind="ranked",
                        columns={"set_kind": kind, "question": question, "sources": list(answers.values())},
                        where=f"question {number + 1} ({kind} set)",
                    )
                )
        if same:
            warnings.warn(
                f"{same} answers equal a better-placed one and were left out, and {left_out} sets with them",
                stacklevel=2,
            )
        return examples

    def _prompts(self, questions: list[str]) -> dict[str, list[Text]]:
        """Prompts by the knowledge in them."""
        rng = np.random.default_rng(self.seed)
        linked = self.linker.link(questions, k=min(2 * self.k, len(self.linker.triples)))
        made: dict[str, list[Text]] = {"relevant": [], "none": [], "misleading": []}
        for question, found in zip(questions, linked, strict=True):
            triples = [each.triple for each in found]
            for name, part in (("relevant", triples[: self.k]), ("none", []), ("misleading", triples[self.k :])):
                made[name].append(self._prompt(question, [part[index] for index in rng.permutation(len(part))]))
        return made

    def _prompt(self, question: str, triples: list[Triple]) -> Text:
        if callable(self.template):
            return self.template(question, triples)
        lines = "\n".join(" | ".join(triple) for triple in triples)
        if self.template is None:
            facts = f"Facts:\n{lines}\n\n" if triples else ""
            return f"{facts}Question: {question}\nAnswer:\n"
        # One pass, so that braces in a question or a triple are text.
        values = {"{question}": question, "{triples}": lines}
        return re.sub(r"\{question\}|\{triples\}", lambda match: values[match[0]], self.template)

    def _ask(self, name: str, prompts: list[Text]) -> list[str]:
        answers = list(self.answerers[name](list(prompts)))
        if len(answers) != len(prompts):
            raise ValueError(f"answerer {name!r} gave {len(answers)} answers to {len(prompts)} prompts")
        return _texts(answers, f"answer of {name!r}")


def _texts(values: Sequence[str], what: str) -> list[str]:
    if isinstance(values, str):
        raise ValueError(f"a list of texts is expected, not the single {what} {values!r}")
    for number, value in enumerate(values, 1):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{what} {number} is {value!r}; expected text")
    return list(values)


def _completion(text: str, prompt: Text) -> Text:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
