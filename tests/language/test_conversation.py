"""chat(): against a real HTTP server that speaks /v1/chat/completions, and against generate() for a model here."""

import json
import logging
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from counterproof.errors import UserError
from counterproof.language.conversation import chat
from counterproof.language.models import Language
from counterproof.language.sampling import generate

KEY = "sk-very-secret-0123456789"


def completion(text, **more):
    return {
        "id": "c-1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}} | more],
        "usage": {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14},
    }


class Endpoint:
    """A server whose `behave(body, number)` returns (status, answer, headers) for the number-th request."""

    def __init__(self):
        self.requests, self.headers, self.times = [], [], []
        self.under_way = self.most = 0
        self.lock = threading.Lock()
        self.behave = lambda body, number: (200, completion(f"echo {body['messages'][-1]['content']}"), {})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    number = len(outer.requests)
                    outer.requests.append({"path": self.path} | body)
                    outer.headers.append(self.headers)
                    outer.times.append(time.monotonic())
                    outer.under_way += 1
                    outer.most = max(outer.most, outer.under_way)
                status, answer, headers = outer.behave(body, number)
                with outer.lock:
                    outer.under_way -= 1
                data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # whoever asked has gone
                    self.close_connection = True

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def then(self, *answers):
        """These answers one after the other, the last for ever."""
        self.behave = lambda body, number: answers[min(number, len(answers) - 1)]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def endpoint():
    it = Endpoint()
    yield it
    it.close()


# an endpoint


def test_a_question_and_its_reply(endpoint):
    c = chat(endpoint.url, model="judge-1")
    reply = c.ask("hello", max_tokens=9, temperature=0.5, top_p=0.9, stop=["x", "y"])
    assert (reply.text, reply.finish, reply.cached) == ("echo hello", "stop", False)
    assert (reply.prompt_tokens, reply.completion_tokens, reply.logprobs) == (11, 3, None)
    assert reply.seconds > 0
    assert endpoint.requests == [
        {
            "path": "/v1/chat/completions",
            "model": "judge-1",
            "messages": [{"role": "user", "content": "hello"}],
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["x", "y"],
            "seed": 0,
        }
    ]
    assert endpoint.headers[0]["Authorization"] == "Bearer none"


def test_what_is_none_is_not_sent_and_options_are(endpoint):
    c = chat(endpoint.url, model="m", seed=None)
    c.ask("hello", max_tokens=None, temperature=None, top_p=None, options={"max_completion_tokens": 7})
    assert endpoint.requests[0].keys() == {"path", "model", "messages", "max_completion_tokens"}


def test_messages_and_the_system_message(endpoint):
    c = chat(endpoint.url, model="m", system="be brief")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    c.ask(turns)
    c.ask([{"role": "system", "content": "be long"}, *turns])
    system = {"role": "system", "content": "be brief"}
    assert endpoint.requests[0]["messages"] == [system, *turns]
    assert endpoint.requests[1]["messages"] == [{"role": "system", "content": "be long"}, *turns]
    assert len(turns) == 3


def test_usage_and_cost(endpoint):
    c = chat(endpoint.url, model="m", price=(2.0, 10.0))
    assert c.usage.cost == 0.0
    c.ask_all(["a", "b", "c"])
    assert (c.usage.calls, c.usage.cached, c.usage.prompt_tokens, c.usage.completion_tokens) == (3, 0, 33, 9)
    assert c.usage.cost == pytest.approx(3 * (11 * 2.0 + 3 * 10.0) / 1e6)
    free = chat(endpoint.url, model="m")
    free.ask("a")
    assert free.usage.cost is None
    endpoint.then((200, completion("x") | {"usage": None}, {}))
    reply = c.ask("d")
    assert reply.prompt_tokens is reply.completion_tokens is None
    assert (c.usage.calls, c.usage.prompt_tokens, c.usage.cost) == (4, 33, None)


def test_logprobs_when_they_are_given(endpoint):
    content = [{"token": "ye", "logprob": -0.5, "top_logprobs": []}, {"token": "s", "logprob": -1.25}]
    endpoint.then((200, completion("yes", logprobs={"content": content}), {}), (200, completion("yes"), {}))
    c = chat(endpoint.url, model="m")
    assert c.ask("a", logprobs=True).logprobs == (("ye", -0.5), ("s", -1.25))
    assert endpoint.requests[0]["logprobs"] is True
    assert c.ask("b", logprobs=True).logprobs is None


@pytest.mark.parametrize(
    ("choice", "text", "finish"),
    [
        ({"finish_reason": "length"}, "abc", "length"),
        ({"finish_reason": "stop", "message": {"content": None, "refusal": "I will not."}}, "I will not.", "stop"),
        ({"finish_reason": "content_filter"}, "abc", "content_filter"),
        ({"message": {"content": None}}, "", "stop"),
        ({"finish_reason": None}, "abc", "unknown"),
    ],
)  # fmt: skip
def test_other_ends(endpoint, choice, text, finish):
    endpoint.then((200, completion("abc", **choice), {}))
    reply = chat(endpoint.url, model="m").ask("a")
    assert (reply.text, reply.finish) == (text, finish)


def test_samples_are_requests_of_their_own_with_seeds_of_their_own(endpoint):
    endpoint.behave = lambda body, number: (200, completion(f"{body['messages'][0]['content']}/{body['seed']}"), {})
    c = chat(endpoint.url, model="m", seed=5)
    replies = c.samples(["a", "b"], 3)
    seeds = [5, 5 + 1_000_003, 5 + 2_000_006]
    assert [[reply.text for reply in own] for own in replies] == [[f"{q}/{s}" for s in seeds] for q in "ab"]
    assert c.ask("a", sample=2).text == replies[0][2].text
    assert c.ask("a").text == replies[0][0].text
    assert c.usage.calls == 8


# order, number at a time, progress


def test_many_at_a_time_keep_their_order_and_their_bound(endpoint):
    def slowly(body, number):
        time.sleep(0.02 * (5 - number % 5))  # the later ones answer first
        return 200, completion(body["messages"][0]["content"].upper()), {}

    endpoint.behave = slowly
    seen = []
    questions = [f"q{i}" for i in range(20)]
    replies = chat(endpoint.url, model="m").ask_all(questions, jobs=4, progress=lambda *at: seen.append(at))
    assert [reply.text for reply in replies] == [q.upper() for q in questions]
    assert 2 <= endpoint.most <= 4
    assert seen == [(i + 1, 20) for i in range(20)]


def test_one_job_asks_one_after_the_other(endpoint):
    replies = chat(endpoint.url, model="m").ask_all(["a", "b", "c"], jobs=1)
    assert [reply.text for reply in replies] == ["echo a", "echo b", "echo c"]
    assert endpoint.most == 1


def test_equal_questions_share_a_reply(endpoint):
    seen = []
    c = chat(endpoint.url, model="m")
    replies = c.ask_all(["a", "b", "a"], progress=lambda *at: seen.append(at), jobs=1)
    assert [reply.text for reply in replies] == ["echo a", "echo b", "echo a"]
    assert len(endpoint.requests) == c.usage.calls == 2
    assert seen == [(2, 3), (3, 3)]


def test_a_chat_may_be_used_from_several_threads(endpoint):
    c = chat(endpoint.url, model="m")
    threads = [threading.Thread(target=c.ask_all, args=([f"{i}-{j}" for j in range(10)],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert c.usage.calls == 40
    assert c.usage.prompt_tokens == 440


# failures


def test_429_is_asked_again_when_the_endpoint_says(endpoint):
    endpoint.then((429, {"error": {"message": "slow down"}}, {"Retry-After": "1"}), (200, completion("ok"), {}))
    c = chat(endpoint.url, model="m")
    reply = c.ask("a")
    assert reply.text == "ok"
    assert reply.seconds >= 1  # the unasked-for wait would be half a second at most
    assert endpoint.times[1] - endpoint.times[0] >= 1
    assert c.usage.calls == 1


@pytest.mark.parametrize("status", [408, 409, 500, 503])
def test_passing_failures_are_asked_again(endpoint, status):
    endpoint.then((status, b"busy", {"Retry-After-Ms": "1"}), (200, completion("ok"), {}))
    assert chat(endpoint.url, model="m").ask("a").text == "ok"
    assert len(endpoint.requests) == 2


def test_failures_that_last_end_the_asking(endpoint):
    endpoint.then((500, {"error": {"message": "out of memory"}}, {"Retry-After-Ms": "1"}))
    with pytest.raises(UserError, match=r"model 'm'\) failed 3 times \(500\): out of memory; try again later"):
        chat(endpoint.url, model="m", retries=2).ask("a")
    assert len(endpoint.requests) == 3


def test_too_many_requests_to_the_end(endpoint):
    endpoint.then((429, {"error": {"message": "quota"}}, {"Retry-After": "3600"}))
    with pytest.raises(
        UserError, match=r"asked once and refused for too many requests \(429\): quota \(Retry-After: 3600"
    ):
        chat(endpoint.url, model="m").ask("a")
    assert len(endpoint.requests) == 1  # an hour is not waited for


def test_no_answer_in_time(endpoint):
    gone = threading.Event()
    endpoint.behave = lambda body, number: (gone.wait(20), (200, completion("late"), {}))[1]
    with pytest.raises(UserError, match=r"was asked 2 times and gave no answer within 0\.2 s; raise timeout="):
        chat(endpoint.url, model="m", timeout=0.2, retries=1).ask("a")
    gone.set()


def test_a_late_answer_may_come_at_the_second_try(endpoint):
    gone = threading.Event()
    endpoint.behave = lambda body, number: (number == 0 and gone.wait(20), (200, completion("here"), {}))[1]
    assert chat(endpoint.url, model="m", timeout=0.5).ask("a").text == "here"
    gone.set()


def test_a_dead_endpoint(endpoint):
    endpoint.close()
    with pytest.raises(
        UserError, match=r"cannot reach http://127\.0\.0\.1:\d+/v1 \(tried 2 times\): .*refused.*running"
    ):
        chat(endpoint.url, model="m", retries=1).ask("a")


@pytest.mark.parametrize(
    "answer",
    [b'{"choices": [{"mess', b"<html>It works!</html>", b"[]", b"", b"null", b'{"choices": []}',
     b'{"error": {"message": "no"}}', b'{"choices": [{"message": {"content": 5}}]}',
     b'{"choices": [{"message": "hi"}]}'],
)  # fmt: skip
def test_what_is_no_chat_completion(endpoint, tmp_path, answer):
    endpoint.then((200, answer, {}))
    c = chat(endpoint.url, model="m", cache=tmp_path)
    with pytest.raises(UserError, match="answered what is no chat completion"):
        c.ask("a")
    assert len(endpoint.requests) == 1
    assert c.usage.calls == 0
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (401, r"model 'm'\) refused the API key \(401\): said so; give api_key=, or set OPENAI_API_KEY"),
        (403, r"refused the API key \(403\)"),
        (404, r"127.0.0.1:\d+/v1 \(model 'm'\) was not found \(404\): said so; see that model="),
        (400, r"did not accept question 1 \(400\): said so"),
        (422, r"did not accept question 1 \(422\): said so"),
        (402, r"did not accept question 1 \(402\): said so"),
    ],
)
def test_refusals_are_not_asked_again(endpoint, status, says):
    refuse = (status, {"error": {"message": "said so", "type": "x"}}, {})
    endpoint.behave = lambda body, n: refuse if body["messages"][0]["content"] == "b" else (200, completion("ok"), {})
    with pytest.raises(UserError, match=says):
        chat(endpoint.url, model="m", api_key=KEY).ask_all(["a", "b", "c"], jobs=1)
    assert len(endpoint.requests) == 2


def test_without_a_key_the_refusal_says_so(endpoint):
    endpoint.then((401, {"error": "who?"}, {}))
    with pytest.raises(UserError, match="refused a request without an API key"):
        chat(endpoint.url, model="m").ask("a")


def test_one_failure_ends_the_asking_and_keeps_the_rest(endpoint, tmp_path):
    def behave(body, number):
        content = body["messages"][0]["content"]
        if content == "3":
            return 400, {"error": {"message": "bad"}}, {}
        time.sleep(0.2)
        return 200, completion(content), {}

    endpoint.behave = behave
    c = chat(endpoint.url, model="m", cache=tmp_path)
    with pytest.raises(UserError, match="question 3"):
        c.ask_all([str(i) for i in range(40)], jobs=4)
    assert len(endpoint.requests) < 40  # what had not begun is not begun
    assert len(list(tmp_path.rglob("*.json"))) == len(endpoint.requests) - 1 == c.usage.calls
    endpoint.behave = lambda body, number: (200, completion(body["messages"][0]["content"]), {})
    again = c.ask_all([str(i) for i in range(40)])
    assert [reply.text for reply in again] == [str(i) for i in range(40)]
    assert c.usage.cached == sum(reply.cached for reply in again) > 0


# each question for itself: attempt_all


def fails_on(*bad):
    def behave(body, number):
        content = body["messages"][-1]["content"]
        if content in bad:
            return 400, {"error": {"message": f"{content} is bad"}}, {}
        return 200, completion(content.upper()), {}

    return behave


def told(answers):
    return [str(answer) if isinstance(answer, UserError) else answer.text for answer in answers]


@pytest.mark.parametrize("jobs", [1, 4])
def test_a_question_that_fails_has_its_error_and_the_others_their_replies(endpoint, jobs):
    endpoint.behave = fails_on("b", "d")
    c = chat(endpoint.url, model="m")
    seen = []
    answers = c.attempt_all(["a", "b", "c", "d", "e"], jobs=jobs, progress=lambda *at: seen.append(at))
    assert [isinstance(answer, UserError) for answer in answers] == [False, True, False, True, False]
    assert [answer.text for answer in answers[::2]] == ["A", "C", "E"]
    assert "did not accept question 1 (400): b is bad" in str(answers[1])
    assert "did not accept question 3 (400): d is bad" in str(answers[3])
    assert seen == [(i + 1, 5) for i in range(5)]
    assert c.usage.calls == 3  # what failed is no call


def test_equal_questions_share_an_error_too(endpoint):
    endpoint.behave = fails_on("b")
    one, two, three = chat(endpoint.url, model="m").attempt_all(["b", "a", "b"])
    assert one is three
    assert isinstance(one, UserError)
    assert two.text == "A"
    assert len(endpoint.requests) == 2


def test_errors_are_asked_again_and_replies_are_not(endpoint, tmp_path):
    endpoint.behave = fails_on("b", "d")
    c = chat(endpoint.url, model="m", cache=tmp_path)
    c.attempt_all(["a", "b", "c", "d"])
    assert len(list(tmp_path.rglob("*.json"))) == 2
    endpoint.requests.clear()
    endpoint.behave = fails_on("d")
    answers = chat(endpoint.url, model="m", cache=tmp_path).attempt_all(["a", "b", "c", "d"])
    assert told(answers)[:3] == ["A", "B", "C"]
    assert [answer.cached for answer in answers[:3]] == [True, False, True]
    assert isinstance(answers[3], UserError)
    assert sorted(request["messages"][0]["content"] for request in endpoint.requests) == ["b", "d"]


@pytest.mark.parametrize(("jobs", "tries"), [(1, 3), (2, 3), (5, 5)])
def test_an_endpoint_that_never_replies_ends_it(endpoint, jobs, tries):
    endpoint.then((500, {"error": {"message": "no model loaded"}}, {}))
    with pytest.raises(UserError, match=r"failed once \(500\): no model loaded"):
        chat(endpoint.url, model="m", retries=0).attempt_all([str(i) for i in range(40)], jobs=jobs)
    assert tries <= len(endpoint.requests) < tries + 2 * jobs


def test_as_many_jobs_may_fail_before_the_first_reply_is_there(endpoint):
    def behave(body, number):
        if body["messages"][0]["content"] != "slow":
            return 400, {"error": {"message": "no"}}, {}
        time.sleep(0.5)
        return 200, completion("here"), {}

    endpoint.behave = behave
    answers = chat(endpoint.url, model="m").attempt_all(["slow", "a", "b", "c", "d"], jobs=5)
    assert answers[0].text == "here"
    assert all(isinstance(answer, UserError) for answer in answers[1:])


def test_few_failures_without_a_reply_are_the_questions_own(endpoint):
    endpoint.then((400, {"error": {"message": "no"}}, {}))
    answers = chat(endpoint.url, model="m").attempt_all(["a", "b"], jobs=1)
    assert all(isinstance(answer, UserError) for answer in answers)


def test_an_endpoint_that_has_replied_may_fail_as_often_as_it_likes(endpoint):
    endpoint.behave = fails_on(*(str(i) for i in range(1, 20)))
    answers = chat(endpoint.url, model="m").attempt_all([str(i) for i in range(20)], jobs=1)
    assert answers[0].text == "0"
    assert all(isinstance(answer, UserError) for answer in answers[1:])
    assert len(answers) == 20


def test_a_time_out_is_the_questions_own(endpoint):
    gone = threading.Event()
    endpoint.behave = lambda body, number: (
        body["messages"][0]["content"] == "slow" and gone.wait(20),
        (200, completion("quick"), {}),
    )[1]
    answers = chat(endpoint.url, model="m", timeout=0.3, retries=0).attempt_all(["a", "slow", "b"], jobs=3)
    assert [isinstance(answer, UserError) for answer in answers] == [False, True, False]
    assert "gave no answer within 0.3 s" in str(answers[1])
    gone.set()


def test_attempts_take_samples_and_settings_as_ask_all_does(endpoint):
    c = chat(endpoint.url, model="m")
    c.attempt_all(["a"], sample=2, temperature=0.5)
    assert endpoint.requests[0]["seed"] == 2_000_006
    assert endpoint.requests[0]["temperature"] == 0.5
    assert c.attempt_all([]) == []
    with pytest.raises(ValueError, match="jobs is 0"):
        c.attempt_all(["a"], jobs=0)


# the API key


def test_the_key_comes_from_the_argument_or_the_environment(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-environment\n")
    chat(endpoint.url, model="m").ask("a")
    chat(endpoint.url, model="m", api_key=KEY).ask("a")
    sent = [headers["Authorization"] for headers in endpoint.headers]
    assert sent == ["Bearer from-environment", f"Bearer {KEY}"]


def test_the_key_is_nowhere_to_be_read(endpoint, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    c = chat(endpoint.url, model="m", api_key=KEY, cache=tmp_path)
    c.ask("a")
    endpoint.then((401, {"error": {"message": f"no such key: {KEY}"}}, {}))
    with pytest.raises(UserError) as refused:
        c.ask("b")
    assert "no such key: ***" in str(refused.value)
    endpoint.then((200, f"you sent {KEY}".encode(), {}))
    with pytest.raises(UserError) as malformed:
        c.ask("b")
    kept = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    for text in (caplog.text, kept, repr(c), str(refused.value), str(malformed.value)):
        assert KEY not in text
    assert refused.value.__cause__ is None
    with pytest.raises(UserError) as odd:
        chat(endpoint.url, model="m", api_key=f"{KEY}\nx")
    assert KEY not in str(odd.value)


def test_a_password_in_the_address_is_not_shown(endpoint, tmp_path):
    url = endpoint.url.replace("http://", "http://user:hunter2@") + "/?token=hunter2"
    c = chat(url, model="m", cache=tmp_path)
    endpoint.then((404, {}, {}))
    with pytest.raises(UserError) as problem:
        c.ask("a")
    assert "hunter2" not in str(problem.value) + repr(c)
    assert c._backend.identity()["endpoint"] == endpoint.url


# the cache


def test_a_reply_on_disk_needs_no_request(endpoint, tmp_path):
    first = chat(endpoint.url, model="m", cache=tmp_path / "a" / "b", price=(1, 1))
    asked = first.ask_all(["a", "b"], temperature=0)
    again = chat(endpoint.url, model="m", cache=tmp_path / "a" / "b", price=(1, 1))
    found = again.ask_all(["b", "a", "a"], temperature=0)
    assert len(endpoint.requests) == 2
    assert [reply.text for reply in found] == ["echo b", "echo a", "echo a"]
    assert all(reply.cached for reply in found)
    assert found[0].seconds == asked[1].seconds
    assert again.usage == again.usage.__class__(cached=2, cost=0.0)


def test_every_setting_is_part_of_the_key(endpoint, tmp_path):
    """Each of these asks something else, so none is answered by another's reply; each again needs no request."""

    def ask(question="a", *, model="m", url=endpoint.url, system=None, seed=0, **settings):
        return chat(url, model=model, system=system, seed=seed, cache=tmp_path).ask(question, **settings)

    different = [
        {}, {"question": "b"}, {"model": "n"}, {"system": "s"}, {"seed": 1}, {"seed": None}, {"sample": 1},
        {"stop": "x"}, {"max_tokens": 7}, {"temperature": 0}, {"top_p": 0.5}, {"logprobs": True}, {"options": {"x": 1}},
        {"url": endpoint.url.replace("127.0.0.1", "localhost")},
        {"question": [{"role": "system", "content": "a"}]},
    ]  # fmt: skip
    for number, settings in enumerate(different):
        assert not ask(**settings).cached
        assert len(endpoint.requests) == number + 1
    for settings in [*different, {"url": endpoint.url + "/"}, {"question": [{"content": "a", "role": "user"}]}]:
        assert ask(**settings).cached
    assert len(endpoint.requests) == len(different)


def test_a_reply_comes_back_from_disk_as_it_was(endpoint, tmp_path):
    text = 'quotes " and \\ breaks \n é 漢 🙂 \u2028 \x00 end'
    content = [{"token": "é\n", "logprob": -1e-17}, {"token": "\ud83d", "logprob": -123.456789012345}]
    endpoint.then((200, completion(text, logprobs={"content": content}, finish_reason="length"), {}))
    first, second = (chat(endpoint.url, model="m", cache=tmp_path).ask("ü", logprobs=True) for _ in range(2))
    assert second.cached
    assert second.text == first.text == text
    assert second.logprobs == first.logprobs == tuple((one["token"], one["logprob"]) for one in content)
    assert (second.finish, second.prompt_tokens, second.seconds) == ("length", 11, first.seconds)


def test_failures_are_not_kept(endpoint, tmp_path):
    endpoint.then((500, {}, {}), (200, completion("ok"), {}))
    c = chat(endpoint.url, model="m", cache=tmp_path, retries=0)
    with pytest.raises(UserError):
        c.ask("a")
    assert c.ask("a").text == "ok"


def test_a_reply_is_written_whole_or_not_at_all(endpoint, tmp_path, monkeypatch):
    c = chat(endpoint.url, model="m", cache=tmp_path)

    def breaks_off(content, stream, **settings):
        stream.write('{"reply": ')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("counterproof.language.conversation.json.dump", breaks_off)
        with pytest.raises(UserError, match="the disk is full"):
            c.ask("a")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not c.ask("a").cached


def test_writers_at_the_same_time_do_not_disturb_each_other(endpoint, tmp_path):
    questions = [str(i) for i in range(15)]
    found = []

    def work():
        found.append([reply.text for reply in chat(endpoint.url, model="m", cache=tmp_path).ask_all(questions)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[f"echo {i}" for i in range(15)]] * 4
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 15
    assert all(json.loads(path.read_text())["reply"]["text"].startswith("echo") for path in files)


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b'{"reply": {"text": "x"}}', b"\xff", b'{"reply": {"logprobs": 3}}']
)
def test_a_damaged_reply_is_named(endpoint, tmp_path, damage):
    c = chat(endpoint.url, model="m", cache=tmp_path)
    c.ask("a")
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(damage)
    with pytest.raises(UserError, match=f"{path.name}.*delete it"):
        c.ask("a")


def test_a_cache_that_is_no_folder(endpoint, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot keep replies in .*file"):
        chat(endpoint.url, model="m", cache=tmp_path / "file")


# arguments


def test_arguments_that_do_not_fit(endpoint):
    with pytest.raises(UserError, match="is an endpoint; name one of its models with model="):
        chat(endpoint.url)
    with pytest.raises(UserError, match="has no host"):
        chat("http://", model="m")
    for wrong in ({"retries": -1}, {"timeout": 0}, {"timeout": float("nan")}, {"price": (-1, 0)}, {"seed": -1}):
        with pytest.raises(ValueError):
            chat(endpoint.url, model="m", **wrong)
    c = chat(endpoint.url, model="m")
    for wrong in ({"max_tokens": 0}, {"temperature": -1}, {"top_p": 2}, {"stop": [""]}):
        with pytest.raises(ValueError):
            c.ask("a", **wrong)
    with pytest.raises(ValueError, match="jobs is 0"):
        c.ask_all(["a"], jobs=0)
    with pytest.raises(ValueError, match="n is 0"):
        c.samples(["a"], 0)
    with pytest.raises(TypeError):
        c.ask("a", top_k=5)
    for wrong in ("a", {"role": "user", "content": "a"}, [{"role": "user", "content": "a"}], [None], [["a"]]):
        with pytest.raises(TypeError):
            c.ask_all(wrong)
    for empty in ("", []):
        with pytest.raises(UserError, match="question 1 is empty"):
            c.ask_all(["a", empty])
    assert c.ask_all([]) == []
    assert endpoint.requests == []


# a model here

WORDS = ["red", "green", "blue", "one", "two", "three", "yes", "no", "user", "assistant", "system", ":"]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}assistant :"


def tiny(seed=0, template=TEMPLATE):
    vocab = {word: index for index, word in enumerate(["<end>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="no"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = template
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(vocab), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return Language(model.eval(), tokenizer)


def test_a_model_here_says_what_generate_says():
    language = tiny()
    messages = [{"role": "system", "content": "red"}, {"role": "user", "content": "one two"}]
    c = chat(language, price=(1.0, 1.0))
    reply = c.ask(messages, temperature=0, max_tokens=8, logprobs=True)
    ((one,),) = generate(language, [messages], temperature=0, max_new_tokens=8)
    assert reply.text == one.text
    assert reply.finish == ("length" if one.finish == "length" else "stop")
    assert [p for _, p in reply.logprobs] == list(one.logprobs)
    assert [token for token, _ in reply.logprobs] == [language.tokenizer.decode([t]) for t in one.tokens]
    assert reply.prompt_tokens == len(language.tokenizer.encode("system : red user : one two assistant :")) == 9
    assert reply.completion_tokens == len(one.tokens)
    assert c.usage.cost == pytest.approx((9 + len(one.tokens)) / 1e6)
    assert chat(language, system="red").ask("one two", temperature=0, max_tokens=8).text == reply.text


def test_of_a_model_here_a_reply_depends_on_its_question_alone():
    c = chat(tiny())
    questions = ["red", "green", "blue", "one", "two", "three", "yes"]
    seen = []
    together = c.ask_all(questions, max_tokens=6, jobs=3, progress=lambda *at: seen.append(at))
    assert seen == [(i + 1, 7) for i in range(7)]
    assert [reply.text for reply in c.ask_all(questions[::-1], max_tokens=6)][::-1] == [r.text for r in together]
    assert [c.ask(question, max_tokens=6).text for question in questions] == [reply.text for reply in together]
    assert c.usage.calls == 21
    # Different questions do not share their noise, nor do samples, nor seeds.
    flat = tiny()
    flat.model.lm_head.weight.data.zero_()  # every token is equally likely, whatever is asked
    said = [chat(flat, seed=seed).samples(["red", "blue"], 3, max_tokens=6) for seed in (0, 1)]
    assert len({reply.text for one in said for own in one for reply in own}) == 12


def test_samples_of_a_model_here(tmp_path):
    c = chat(tiny(), cache=tmp_path)
    few = c.samples(["red", "blue"], 2, max_tokens=5)
    many = c.samples(["red", "blue"], 4, max_tokens=5)
    assert [[reply.text for reply in own[:2]] for own in many] == [[reply.text for reply in own] for own in few]
    assert [[reply.cached for reply in own] for own in many] == [[True, True, False, False]] * 2
    assert (c.usage.calls, c.usage.cached) == (8, 4)


def test_the_cache_knows_the_weights(tmp_path):
    language = tiny()
    c = chat(language, cache=tmp_path)
    assert not c.ask("red").cached
    assert c.ask("red").cached
    assert chat(tiny(), cache=tmp_path).ask("red").cached  # another object, the same model
    with torch.no_grad():
        language.model.lm_head.weight[3, 3] += 1e-4  # trained a little
    assert not c.ask("red").cached
    with torch.no_grad():
        language.model.lm_head.weight[3, 3] -= 1e-4
    language.tokenizer.chat_template = TEMPLATE.replace("assistant :", "assistant : yes")
    assert not c.ask("red").cached
    assert not chat(tiny(1), cache=tmp_path).ask("red").cached


def test_the_cache_knows_the_adapters(tmp_path):
    import peft

    language = tiny()
    base = chat(language, cache=tmp_path).ask("red", max_tokens=5)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(language.model, config)
        model.add_adapter("second", config)
    c = chat(Language(model.eval(), language.tokenizer), cache=tmp_path)
    states = Counter()
    for adapter in ("default", "second", "default"):
        model.set_adapter(adapter)
        states[c.ask("red", max_tokens=5).cached] += 1
    with model.disable_adapter():
        reply = c.ask("red", max_tokens=5)
        assert not reply.cached
        assert reply.text == base.text
    assert states == {False: 2, True: 1}
    model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    assert not c.ask("red", max_tokens=5).cached


def test_a_folder_is_loaded_and_cached_by_its_weights(tmp_path):
    language = tiny()
    for name in ("here", "there"):
        language.model.save_pretrained(tmp_path / name)
        language.tokenizer.save_pretrained(tmp_path / name)
    first = chat(tmp_path / "here", cache=tmp_path / "cache").ask("red")
    second = chat(str(tmp_path / "there"), cache=tmp_path / "cache").ask("red")
    assert not first.cached
    assert second.cached
    assert second.text == first.text == chat(language).ask("red").text


def test_what_a_model_here_cannot_do():
    language = tiny()
    with pytest.raises(UserError, match="is no address"):
        chat(language, model="m")
    with pytest.raises(ValueError, match="seed is None"):
        chat(language, seed=None)
    c = chat(language)
    with pytest.raises(UserError, match="options are an endpoint's; a model that runs here has no top_k"):
        c.ask("red", options={"top_k": 5})
    with pytest.raises(ValueError, match="max_tokens is None"):
        c.ask("red", max_tokens=None)
    with pytest.raises(UserError, match="question 1 has 74 tokens"):
        c.ask_all(["red", "red " * 70])
    with pytest.raises(UserError, match="question 0 is chat messages, and this model's tokenizer has no chat template"):
        chat(tiny(template=None)).ask_all(["red"])


def test_a_question_too_long_for_a_model_here_does_not_stop_the_others():
    c = chat(tiny())
    questions = ["red", "red " * 70, "blue"]
    answers = c.attempt_all(questions, max_tokens=5)
    assert "question 1 has 74 tokens" in str(answers[1])
    alone = c.ask_all([questions[0], questions[2]], max_tokens=5)
    assert [answers[0].text, answers[2].text] == [reply.text for reply in alone]
    (only,) = c.attempt_all(["red " * 70])
    assert isinstance(only, UserError)
    several = c.attempt_all(["red " * n for n in range(70, 80)])
    assert len(several) == 10  # however many fail: a model here is there
    assert all(isinstance(answer, UserError) for answer in several)


def test_threads_take_turns_at_a_model_here():
    c = chat(tiny())
    expected = [reply.text for reply in c.ask_all(["red", "blue"], max_tokens=6)]
    found = []
    threads = [
        threading.Thread(target=lambda: found.append([r.text for r in c.ask_all(["red", "blue"], max_tokens=6)]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_an_endpoint_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from counterproof.language.conversation import chat; chat('http://localhost:1/v1', model='m');"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
