"""ask_judge(): what is read, asked again, unread, failed; against a chat whose every reply is scripted."""

import pytest

from counterproof.errors import UserError
from counterproof.judging.asking import Answer, ask_judge
from counterproof.language.conversation import Chat, Reply

REMINDER = "Say a number."


class Script:
    """The backend of a chat: `say(messages, request)` gives a text, a Reply, or an error to be had instead."""

    def __init__(self, say):
        self.say, self.requests = say, []

    def check(self, settings):
        pass

    def identity(self):
        return {"script": 1}

    def ask(self, requests, jobs, keep, say):
        for key, request in requests.items():
            self.requests.append(request)
            found = self.say(request.messages, request)
            if isinstance(found, str):
                found = Reply(text=found, finish="stop", prompt_tokens=1, completion_tokens=1)
            if isinstance(found, Reply):
                keep(key, found)
            say(key, found)


def scripted(say):
    backend = Script(say)
    return Chat(backend, None, None, None, 0), backend


def question(text):
    return [{"role": "user", "content": text}]


def number(text):
    return int(text) if text.strip().isdigit() else None


def asked(chat, *texts, **more):
    return ask_judge(chat, [question(text) for text in texts], number, reminder=REMINDER, **more)


def test_what_can_be_read_is_asked_once_and_in_order():
    chat, backend = scripted(lambda messages, request: messages[-1]["content"][1:])
    assert asked(chat, "q3", "q1", "q2") == [Answer(outcome="read", value=n, replies=(str(n),)) for n in (3, 1, 2)]
    assert len(backend.requests) == 3
    assert {request.settings.temperature for request in backend.requests} == {0.0}


def test_what_cannot_be_read_is_asked_once_more_with_the_reply_and_the_reminder():
    chat, backend = scripted(lambda messages, request: "7" if len(messages) > 1 else "seven")
    assert asked(chat, "q") == [Answer(outcome="read", value=7, replies=("seven", "7"))]
    assert backend.requests[1].messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": REMINDER},
    ]


def test_what_cannot_be_read_twice_stays_unread():
    chat, backend = scripted(lambda messages, request: f"nonsense {len(messages)}")
    (answer,) = asked(chat, "q")
    assert answer == Answer(outcome="unparsed", value=None, replies=("nonsense 1", "nonsense 3"))
    assert len(backend.requests) == 2  # and no third time


def test_only_what_could_not_be_read_is_asked_again():
    chat, backend = scripted(lambda messages, request: "5" if "good" in messages[0]["content"] else "?")
    answers = asked(chat, "good 1", "bad", "good 2")
    assert [answer.outcome for answer in answers] == ["read", "unparsed", "read"]
    assert [len(answer.replies) for answer in answers] == [1, 2, 1]
    assert len(backend.requests) == 4


def test_a_value_that_is_false_is_a_value():
    chat, backend = scripted(lambda messages, request: "0")
    assert asked(chat, "q") == [Answer(outcome="read", value=0, replies=("0",))]
    assert len(backend.requests) == 1


def test_no_answer_is_a_failure_and_not_asked_again():
    chat, backend = scripted(lambda messages, request: UserError("timed out") if "b" in str(messages) else "4")
    a, b, c = asked(chat, "a", "b", "c")
    assert b == Answer(outcome="failed", value=None, replies=(), problem="timed out")
    assert (a.value, c.value) == (4, 4)
    assert len(backend.requests) == 3


def test_a_failure_of_the_second_question_is_a_failure():
    chat, _ = scripted(lambda messages, request: UserError("too long") if len(messages) > 1 else "well")
    assert asked(chat, "q") == [Answer(outcome="failed", value=None, replies=("well",), problem="too long")]


def test_an_answer_that_was_cut_is_marked():
    def say(messages, request):
        finish = "length" if len(messages) == 1 or "long" in messages[0]["content"] else "stop"
        return Reply(text="9" if finish == "stop" else "I think", finish=finish, prompt_tokens=1, completion_tokens=1)

    chat, _ = scripted(say)
    short, long = asked(chat, "q", "long")
    assert (short.outcome, short.cut) == ("read", False)  # the last reply counts
    assert (long.outcome, long.cut) == ("unparsed", True)


def test_samples_and_settings_reach_both_questions():
    chat, backend = scripted(lambda messages, request: "?")
    asked(chat, "q", sample=3, temperature=0.7, max_tokens=11)
    assert [(r.sample, r.settings.temperature, r.settings.max_tokens) for r in backend.requests] == [(3, 0.7, 11)] * 2


def test_progress_counts_the_first_questions():
    chat, _ = scripted(lambda messages, request: "?")
    seen = []
    asked(chat, "a", "b", progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]


def test_nothing_to_ask():
    chat, backend = scripted(lambda messages, request: "?")
    assert asked(chat) == []
    assert backend.requests == []


def test_an_endpoint_that_is_not_there_is_not_a_failure_of_the_questions():
    class Gone(Script):
        def ask(self, requests, jobs, keep, say):
            raise UserError("cannot reach it")

    with pytest.raises(UserError, match="cannot reach it"):
        asked(Chat(Gone(None), None, None, None, 0), "q")
