"""CompassJudger-1: one chat model that compares, scores, criticises and converses, trained by a mixture of formats.

Paper: arXiv 2410.16256.
Read beside: open-compass/opencompass @2de7ed9 (datasets/subjective/judgerbench.py), open-compass/CompassJudger @9cdf659
    (usage and figures; no training code is published).
Deviations: prompts are in our own words, and files that can be replaced; replies are read strictly, with one reminder,
    the official rules behind ``rules="official"``; a comparison asks both orders; the mixture's unit is the item;
    positions and formats are balanced exactly.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from counterproof.errors import UserError, extra

with extra("judging"):
    import torch

from counterproof.judging.asking import Answer, ask_judge
from counterproof.judging.judge_training import (
    READERS,
    CritiquePoint,
    Point,
    checked_rubric,
    judge_mixture,
    plain_text,
    point_question,
    read_templates,
    reply_labels,
)
from counterproof.judging.judger_bench import JudgerBench
from counterproof.judging.pairwise import Pair, shortened
from counterproof.judging.templates import PromptTemplate
from counterproof.judging.verdicts import read_critique, read_points
from counterproof.language.conversation import Chat, chat
from counterproof.language.models import Language, load
from counterproof.language.sampling import encode
from counterproof.language.scoring import Group, batches, completion_logps

__all__ = [
    "Critique",
    "CritiquePoint",
    "Judge",
    "JudgerBench",
    "Point",
    "Scores",
    "Verdict",
    "agreeing_pairs",
    "judge_mixture",
    "reply_labels",
]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A comparison of answers a and b.

    Attributes:
        winner: ``"a"``, ``"b"`` or ``"tie"``; None when an order asked for could not be read.
        margin: 2 (a much better) to -2, the mean of the orders; a two-valued form gives 1 and -1. None as above.
        consistent: both orders name the same winner; None when only one was asked, or as above.
        outcome: ``"read"``, ``"unparsed"`` or ``"failed"``, the worst of the orders.
        text: the last reply of each order asked.
    """

    winner: str | None
    margin: float | None
    consistent: bool | None
    outcome: Literal["read", "unparsed", "failed"]
    text: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of an answer: `dimensions` by name and `total`, 1 to 10; None when they could not be read."""

    dimensions: Mapping[str, int] | None
    total: int | None
    outcome: Literal["read", "unparsed", "failed"]
    text: str


@dataclass(frozen=True, slots=True)
class Critique:
    """Comments on an answer, and the answer revised; None when they could not be read."""

    comments: str | None
    revision: str | None
    outcome: Literal["read", "unparsed", "failed"]
    text: str


class Judge:
    """One model for every use of a judge: compare, score, criticise, reward, converse.

    Args:
        target: a `Language`, or a `Chat`. Log-probabilities need a `Language`.
        endpoint: in place of `target`, the address of an OpenAI-compatible endpoint.
        model: which of the endpoint's models.
        templates: files in place of the shipped prompts, by name: ``compass-letter``, ``compass-bracket``,
            ``compass-five-level``, ``compass-json``, ``compass-scores``, ``compass-point``, ``compass-critique``.
        reward_mode: what `reward` is: ``"score"``, ``"letter"`` or ``"logprob"``.
        max_tokens: the longest reply; the official 2048.
        temperature: 0, greedy, as the official settings are.
        longest_answer: characters of an answer that are shown; the instruction is never cut. `answers_cut` counts.
        jobs: questions under way at a time.
        options: of `chat`, such as ``cache``, ``price``, ``timeout``.

    Raises:
        UserError: no or two targets; a template that cannot be used; what `chat` raises.
    """

    def __init__(
        self,
        target: Language | Chat | None = None,
        *,
        endpoint: str | None = None,
        model: str | None = None,
        templates: Mapping[str, str | Path | PromptTemplate] | None = None,
        reward_mode: Literal["score", "letter", "logprob"] = "score",
        max_tokens: int = 2048,
        temperature: float = 0.0,
        longest_answer: int | None = None,
        jobs: int = 8,
        **options: Any,
    ) -> None:
        if (target is None) == (endpoint is None):
            raise UserError("a judge is either a model (a Language or a Chat) or an endpoint=; give one of them")
        if reward_mode not in ("score", "letter", "logprob"):
            raise ValueError(f"reward_mode is {reward_mode!r}; expected score, letter or logprob")
        if longest_answer is not None and longest_answer < 1:
            raise ValueError(f"longest_answer is {longest_answer}; expected at least 1 character")
        if isinstance(target, Chat):
            if options or model is not None:
                raise UserError(f"a Chat has its settings already; drop {', '.join([*options, 'model'])}")
            self.chat = target
        else:
            self.chat = chat(endpoint if target is None else target, model=model, **options)
        self.language = target if isinstance(target, Language) else None
        if reward_mode == "logprob" and self.language is None:
            raise UserError("rewards by log-probability need a model that runs here; give a Language, or another mode")
        self.reward_mode = reward_mode
        self.templates = read_templates(templates)
        self.longest_answer = longest_answer
        self.answers_cut = 0
        self._settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "jobs": jobs}
        self._letters: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @classmethod
    def from_pretrained(cls, spec: str | Path | None = None, *, device: str = "cpu", **settings: Any) -> "Judge":
        """A judge of what `load` takes, such as ``"opencompass/CompassJudger-1-7B-Instruct"`` or a folder."""
        return cls(load(spec, device=device), **settings)

    # comparing

    def compare(self, prompt: str, a: str, b: str, *, both_orders: bool = True, form: str = "five-level") -> Verdict:
        """Which of two answers is better.

        Args:
            prompt, a, b: texts.
            both_orders: ask in both, which makes the result antisymmetric: ``compare(p, b, a)`` mirrors it, and equal
                answers tie.
            form: ``"letter"``, ``"bracket"``, ``"five-level"``, ``"json"`` or ``"scores"``.
        """
        return self.compare_all([prompt], [a], [b], both_orders=both_orders, form=form)[0]

    def compare_all(
        self,
        prompts: Sequence[str],
        a: Sequence[str],
        b: Sequence[str],
        *,
        both_orders: bool = True,
        form: str = "five-level",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Verdict]:
        """As `compare`, of many at a time."""
        if form not in READERS:
            raise ValueError(f"form is {form!r}; expected one of {', '.join(READERS)}")
        cases = list(zip(prompts, a, b, strict=True))
        shown = cases + ([(prompt, second, first) for prompt, first, second in cases] if both_orders else [])
        template = self.templates[f"compass-{form}"]
        questions = [
            template.messages(prompt=prompt, answer_a=self._shown(one), answer_b=self._shown(other))
            for prompt, one, other in shown
        ]
        answers = self._ask(questions, READERS[form], template.reminder, progress)
        swapped = answers[len(cases) :] if both_orders else [None] * len(cases)
        return [_verdict(one, other) for one, other in zip(answers[: len(cases)], swapped, strict=True)]

    # one answer

    def score(
        self, prompt: str, answer: str, *, rubric: Sequence[str] = ("accuracy", "clarity"), reference: str | None = None
    ) -> Scores:
        """How good an answer is, per dimension and in total.

        Args:
            prompt, answer: texts.
            rubric: names of the dimensions.
            reference: an answer known to be good.
        """
        return self.score_all([prompt], [answer], rubric=rubric, references=[reference])[0]

    def score_all(
        self,
        prompts: Sequence[str],
        answers: Sequence[str],
        *,
        rubric: Sequence[str] = ("accuracy", "clarity"),
        references: Sequence[str | None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Scores]:
        """As `score`, of many at a time."""
        rubric = checked_rubric(rubric)
        template = self.templates["compass-point"]
        questions = [
            point_question(template, prompt, self._shown(answer), rubric, reference)
            for prompt, answer, reference in zip(prompts, answers, references or [None] * len(prompts), strict=True)
        ]
        found = self._ask(questions, partial(read_points, rubric=rubric), template.reminder, progress)
        return [
            Scores(
                None if each.value is None else {name: each.value[name] for name in rubric},
                None if each.value is None else each.value["total"],
                each.outcome,
                each.replies[-1] if each.replies else "",
            )
            for each in found
        ]

    def critique(self, prompt: str, answer: str) -> Critique:
        """What is wrong with an answer, and the answer as it should be."""
        return self.critique_all([prompt], [answer])[0]

    def critique_all(
        self, prompts: Sequence[str], answers: Sequence[str], *, progress: Callable[[int, int], None] | None = None
    ) -> list[Critique]:
        """As `critique`, of many at a time."""
        template = self.templates["compass-critique"]
        questions = [
            template.messages(prompt=prompt, answer=self._shown(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        found = self._ask(questions, read_critique, template.reminder, progress)
        critiques = []
        for each in found:
            comments, revision = each.value or (None, None)
            critiques.append(Critique(comments, revision, each.outcome, each.replies[-1] if each.replies else ""))
        return critiques

    def general(self, question: str | Sequence[Mapping[str, Any]]) -> str:
        """A reply as any chat model gives it."""
        return self.chat.ask(question, **{name: self._settings[name] for name in ("max_tokens", "temperature")}).text

    # rewards

    def reward(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        reference: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """A number for every completion; the bound method is an entry of `reward_funcs` in TRL's trainers.

        With mode ``"score"`` the total of `score`, 1 to 10. With ``"letter"`` and ``"logprob"`` the completion is
        compared, in both orders, with its reference; without references with every other completion of the same prompt
        in the call, of which the mean counts. ``"letter"``: 1 better, 0 tie, -1 worse. ``"logprob"``: see `margins`.

        Args:
            prompts, completions: texts, or chat messages, whose texts are joined.
            reference: for every completion what it is compared with (a column of the data set, when TRL calls).
            columns: what else TRL passes; not used.

        Returns:
            Per completion a float, or None, which TRL takes for "no reward here", when the judge could not be read.

        Raises:
            ValueError: nothing to compare a completion with.
        """
        asked, said = [plain_text(prompt) for prompt in prompts], [plain_text(completion) for completion in completions]
        if len(asked) != len(said):
            raise ValueError(f"{len(asked)} prompts for {len(said)} completions; give one for each")
        if self.reward_mode == "score":
            totals = [scores.total for scores in self.score_all(asked, said)]
            return [None if total is None else float(total) for total in totals]
        if reference is not None:
            against = [[plain_text(each)] for each in reference]
            if len(against) != len(said):
                raise ValueError(f"{len(against)} references for {len(said)} completions; give one for each")
        else:
            against = [
                [other for at, other in enumerate(said) if at != index and asked[at] == asked[index]]
                for index in range(len(said))
            ]
        for index, others in enumerate(against):
            if not others:
                raise ValueError(
                    f"completion {index} has nothing to be compared with; give a reference, more completions of its "
                    "prompt, or reward_mode='score'"
                )
        cases = [(asked[i], said[i], other) for i, others in enumerate(against) for other in others]
        parts = [list(part) for part in zip(*cases, strict=True)]
        values: list[float | None]
        if self.reward_mode == "logprob":
            values = list(self.margins(*parts)) if cases else []
        else:
            verdicts = self.compare_all(*parts, form="letter") if cases else []
            values = [None if each.margin is None else float(np.sign(each.margin)) for each in verdicts]
        rewards: list[float | None] = []
        left = iter(values)
        for others in against:
            own = [value for value in itertools.islice(left, len(others)) if value is not None]
            rewards.append(sum(own) / len(own) if own else None)
        return rewards

    def margins(self, prompts: Sequence[str], a: Sequence[str], b: Sequence[str]) -> list[float]:
        """``log p("A") - log p("B")`` at the start of the reply, in nats, the mean of both orders; above 0 for a.

        The probability of a letter is that of all tokens that spell it, with or without blanks around.

        Raises:
            UserError: a judge that does not run here; a tokenizer without a token for a letter; a question longer than
                the context.
        """
        if self.language is None:
            raise UserError("log-probabilities need a model that runs here; make the judge of a Language")
        cases = list(zip(prompts, a, b, strict=True))
        template = self.templates["compass-letter"]
        groups = []
        for_a, for_b = self._letter_tokens()
        shown = cases + [(prompt, second, first) for prompt, first, second in cases]
        for index, (prompt, one, other) in enumerate(shown):
            question = template.messages(prompt=prompt, answer_a=self._shown(one), answer_b=self._shown(other))
            ids = encode(self.language, question, f"pair {index % len(cases)}")
            groups.append(Group(ids, tuple((token,) for token in (*for_a, *for_b))))
        differences: list[float] = []
        training = self.language.model.training
        self.language.model.eval()
        try:
            with torch.no_grad():
                for run in batches(groups, 4096):
                    logps = completion_logps(self.language.model, [groups[index] for index in run]).token.double()
                    logps = logps.view(len(run), len(for_a) + len(for_b))
                    first, second = logps[:, : len(for_a)], logps[:, len(for_a) :]
                    differences += (first.logsumexp(1) - second.logsumexp(1)).tolist()
        finally:
            self.language.model.train(training)
        own, swapped = differences[: len(cases)], differences[len(cases) :]
        return [(one - other) / 2 for one, other in zip(own, swapped, strict=True)]

    def _letter_tokens(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of all tokens that spell A, and B."""
        if self._letters is None:
            assert self.language is not None
            tokenizer: Any = self.language.tokenizer
            size = self.language.model.config.get_text_config().vocab_size
            texts = tokenizer.batch_decode([[token] for token in range(min(size, len(tokenizer)))])
            a, b = (tuple(i for i, text in enumerate(texts) if text.strip() == letter) for letter in "AB")
            if not a or not b:
                raise UserError("the judge's tokenizer has no token for A or for B; use reward_mode='letter'")
            self._letters = a, b
        return self._letters

    def _shown(self, answer: str) -> str:
        self.answers_cut += self.longest_answer is not None and len(answer) > self.longest_answer
        return shortened(answer, self.longest_answer)

    def _ask(
        self,
        questions: Sequence[Sequence[Mapping[str, Any]]],
        read: Callable[[str], Any],
        reminder: str,
        progress: Callable[[int, int], None] | None,
    ) -> list[Answer[Any]]:
        return ask_judge(self.chat, questions, read, reminder=reminder, progress=progress, **self._settings)


def _verdict(own: Answer[int], swapped: Answer[int] | None) -> Verdict:
    """Of one order, or of two, the second of which had the answers swapped."""
    text = tuple(each.replies[-1] if each.replies else "" for each in (own, swapped) if each is not None)
    outcomes = [each.outcome for each in (own, swapped) if each is not None]
    for outcome in ("failed", "unparsed"):
        if outcome in outcomes:
            return Verdict(None, None, None, outcome, text)
    assert own.value is not None
    margins = [float(own.value)]
    if swapped is not None:
        assert swapped.value is not None
        margins.append(-float(swapped.value))
    margin = sum(margins) / len(margins)
    consistent = None if swapped is None else bool(np.sign(margins[0]) == np.sign(margins[1]))
    return Verdict("tie" if margin == 0 else "a" if margin > 0 else "b", margin, consistent, "read", text)


def agreeing_pairs(pairs: Sequence[Pair], judge: Judge, *, form: str = "five-level") -> list[Pair]:
    """The consistency filter: pairs whose labelled winner a judge names too, in both orders.

    Args:
        pairs: with a winner; ties stay if the judge calls them a tie in both orders.
        judge: a strong one.
        form: of its verdicts, see `Judge.compare`.
    """
    verdicts = judge.compare_all(
        [pair.prompt for pair in pairs], [pair.answer_a for pair in pairs], [pair.answer_b for pair in pairs], form=form
    )
    named = {"a": "model_a", "b": "model_b", "tie": "tie"}
    return [
        pair
        for pair, verdict in zip(pairs, verdicts, strict=True)
        if verdict.consistent and verdict.winner is not None and named[verdict.winner] == pair.winner
    ]
