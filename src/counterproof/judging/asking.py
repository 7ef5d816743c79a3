"""Ask a judge many questions, read each answer strictly, ask once more where nothing could be read, and never guess."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from counterproof.errors import UserError
from counterproof.language.conversation import Chat, Reply

__all__ = ["Answer", "ask_judge"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer(Generic[T]):
    """What became of one question.

    Attributes:
        outcome: ``"read"``; ``"unparsed"``, the judge answered, twice, but not in the form that was asked for;
            ``"failed"``, there was no answer (a time-out, a question longer than the context): asking again later may
            help.
        value: what was read; None otherwise.
        replies: every reply's text, the last one last.
        problem: why it failed; empty otherwise.
        cut: the last reply ended at `max_tokens`.
    """

    outcome: Literal["read", "unparsed", "failed"]
    value: T | None
    replies: tuple[str, ...]
    problem: str = ""
    cut: bool = False


def ask_judge(
    judge: Chat,
    questions: Sequence[Sequence[Mapping[str, Any]]],
    read: Callable[[str], T | None],
    *,
    reminder: str,
    sample: int = 0,
    jobs: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> list[Answer[T]]:
    """An answer to each question, in order.

    Args:
        judge: from `counterproof.language.chat`. With a `cache` every reply is kept, and what was broken off goes on.
        questions: chat messages.
        read: what a reply's text says, or None if it cannot be read without guessing.
        reminder: what the judge is told, after its own reply, when that could not be read: the form that is expected.
        sample: another number, another answer (at a temperature above 0).
        jobs, progress, settings: see `Chat.ask_all`; greedy unless `temperature` is given.

    Raises:
        UserError: an endpoint that does not answer at all.
    """
    settings = {"temperature": 0.0, **settings}
    first = judge.attempt_all(questions, sample=sample, jobs=jobs, progress=progress, **settings)
    values = [None if isinstance(reply, UserError) else read(reply.text) for reply in first]
    again = [
        index
        for index, (reply, value) in enumerate(zip(first, values, strict=True))
        if value is None and isinstance(reply, Reply)
    ]
    retold = [
        [
            *questions[index],
            {"role": "assistant", "content": _text(first[index])},
            {"role": "user", "content": reminder},
        ]
        for index in again
    ]
    second = dict(zip(again, judge.attempt_all(retold, sample=sample, jobs=jobs, **settings), strict=True))
    answers: list[Answer[T]] = []
    for index, (reply, value) in enumerate(zip(first, values, strict=True)):
        if isinstance(reply, UserError):
            answers.append(Answer(outcome="failed", value=None, replies=(), problem=str(reply)))
            continue
        last = second.get(index, reply)
        if isinstance(last, UserError):
            # It answered once, and the second question did not reach it: what is missing is the second answer.
            answers.append(Answer(outcome="failed", value=None, replies=(reply.text,), problem=str(last)))
            continue
        if index in second:
            value = read(last.text)
        answers.append(
            Answer(
                outcome="unparsed" if value is None else "read",
                value=value,
                replies=(reply.text, last.text) if index in second else (reply.text,),
                cut=last.finish == "length",
            )
        )
    return answers


def _text(reply: Reply | UserError) -> str:
    assert isinstance(reply, Reply)
    return reply.text
