"""Ask a chat model: one that runs here, or one behind any OpenAI-compatible endpoint, by the same calls.

A reply depends on the model, the messages, the settings, the seed and the sample's number, and on nothing else that is
asked; so it can be kept on disk under these, and a run that was broken off goes on where it was.
"""

import hashlib
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict, Unpack
from urllib.parse import urlsplit

from counterproof.errors import UserError, extra
from counterproof.files import replacing

if TYPE_CHECKING:
    from counterproof.language.models import Language

__all__ = ["Chat", "Reply", "Usage", "chat"]

Question: TypeAlias = str | Sequence[Mapping[str, Any]]
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What a model answered.

    Attributes:
        text: the answer; of a refusal, its words.
        finish: ``"stop"`` the model ended it or a stop string came, ``"length"`` it was cut at `max_tokens`, or what
            else the endpoint says, such as ``"content_filter"``.
        prompt_tokens, completion_tokens: as the model counts; None when an endpoint does not say.
        logprobs: per token its text and log-probability in nats; None when not asked for, or not supported.
        cached: it was on disk.
        seconds: wall time of the request, retries included; of a model here, of the batch it was in. A reply from disk
            keeps the time that it took.
    """

    text: str
    finish: str
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: tuple[tuple[str, float], ...] | None = None
    cached: bool = False
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Totals of a chat.

    Attributes:
        calls: replies that the model gave.
        cached: replies that came from disk instead.
        prompt_tokens, completion_tokens: over the calls, as far as the endpoint counted them.
        cost: in US dollars, of the calls; None without a price, or when the endpoint left a call uncounted.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = None


class Settings(TypedDict, total=False):
    """How to answer; None leaves a setting to the endpoint.

    Attributes:
        max_tokens: the longest answer, 256.
        temperature: of the sampling, 1; 0 is greedy.
        top_p: 1.
        stop: text or texts before which an answer ends.
        logprobs: ask for the tokens' log-probabilities.
        options: more fields for the endpoint's request, as they are, such as ``{"reasoning_effort": "low"}``.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    stop: str | Sequence[str]
    logprobs: bool
    options: Mapping[str, Any]


def chat(
    target: "Language | str | Path | None",
    *,
    model: str | None = None,
    api_key: str | None = None,
    cache: str | Path | None = None,
    retries: int = 4,
    timeout: float = 120.0,
    price: tuple[float, float] | None = None,
    system: str | None = None,
    seed: int | None = 0,
) -> "Chat":
    """A model to ask.

    Args:
        target: a `Language`, what `load` takes, or the address of an OpenAI-compatible endpoint, such as
            ``"http://localhost:8000/v1"``.
        model: which of an endpoint's models.
        api_key: an endpoint's; default: what OPENAI_API_KEY holds, or ``"none"``, which local servers accept.
        cache: a folder, made if need be, where every reply is kept and looked up: one JSON file each, in whole, under a
            hash of endpoint or weights, model, messages, settings, seed and sample. Any number of processes may share
            it. The weights of a `Language` are hashed at every call, since they may have been trained between.
        retries: how often a request is sent again after 408, 409, 429, 5xx, a time-out or a broken connection: after
            0.5, 1, 2, ... 8 seconds less a random quarter, or when the endpoint's Retry-After says (within 2 minutes).
        timeout: seconds without a sign of the endpoint until a try is given up; to connect, 10 at most.
        price: US dollars per million tokens read and written.
        system: put before messages that do not begin with a system message of their own.
        seed: of the answers; a model here repeats them by it. An endpoint is sent ``seed + 1000003 * sample``, and may
            or may not heed it; with None it is sent none.

    Raises:
        UserError: an endpoint without `model`, a model here with one; a key that cannot be one; a cache that is no
            folder; what `load` raises.
        ValueError: another argument out of its range.
    """
    if retries < 0 or not 0 < timeout < math.inf:
        raise ValueError(f"retries is {retries}, timeout {timeout}; expected at least 0, and seconds above 0")
    if price is not None and not all(0 <= part < math.inf for part in price):
        raise ValueError(f"price is {price}; expected US dollars per million tokens, read and written")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    backend: _Backend
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        if not model:
            raise UserError(f"{_bare(target)} is an endpoint; name one of its models with model=")
        backend = _Endpoint(target, model, api_key, retries, timeout)
    else:
        if model is not None:
            raise UserError(
                f"model={model!r} names a model of an endpoint, but the target {target!r:.80} is no address"
            )
        if seed is None:
            raise ValueError("seed is None; a model that runs here needs one")
        backend = _Local(target)
    return Chat(backend, None if cache is None else _Cache(Path(cache)), price, system, seed)


class Chat:
    """A model to ask, and what asking it has cost; made by `chat`. It may be used from several threads."""

    def __init__(
        self,
        backend: "_Backend",
        cache: "_Cache | None",
        price: tuple[float, float] | None,
        system: str | None,
        seed: int | None,
    ) -> None:
        self._backend = backend
        self._cache = cache
        self._price = price
        self._system = system
        self._seed = seed
        self._lock = threading.Lock()
        self._usage = Usage(cost=None if price is None else 0.0)

    def __repr__(self) -> str:
        return f"chat({self._backend})"

    @property
    def usage(self) -> Usage:
        """The totals so far."""
        return self._usage

    def ask(self, question: Question, *, sample: int = 0, **settings: Unpack[Settings]) -> Reply:
        """One reply.

        Args:
            question: text, which becomes a user's message, or chat messages.
            sample: another number, another reply.
            settings: see `Settings`.

        Raises:
            UserError: an endpoint that cannot be reached, refuses or keeps failing, or answers what is no chat
                completion; a question that is empty or does not fit the model; a cache that cannot be used.
        """
        return self._answer([("the question", question, sample)], 1, None, settings)[0]

    def ask_all(
        self,
        questions: Iterable[Question],
        *,
        sample: int = 0,
        jobs: int = 8,
        progress: Progress | None = None,
        **settings: Unpack[Settings],
    ) -> list[Reply]:
        """A reply for each question, in order; equal questions share one. One that fails ends it: see `attempt_all`.

        Args:
            questions: see `ask`.
            sample: another number, other replies.
            jobs: requests to an endpoint under way at a time; of a model here, questions in a batch.
            progress: called with the replies had and those to be had, after each or each batch.
            settings: see `Settings`.

        Raises:
            UserError: see `ask`; it names the question where it is at fault. Replies had until then are in the cache,
                those of requests under way included.
        """
        named = [(f"question {index}", question, sample) for index, question in enumerate(_listed(questions))]
        return self._answer(named, jobs, progress, settings)

    def attempt_all(
        self,
        questions: Iterable[Question],
        *,
        sample: int = 0,
        jobs: int = 8,
        progress: Progress | None = None,
        **settings: Unpack[Settings],
    ) -> list[Reply | UserError]:
        """As `ask_all`, but a question that gets no reply has its error instead, and the others go on.

        Errors are not kept: the next call asks again for what has no reply.

        Raises:
            UserError: when an endpoint has failed as often as `jobs` says, 3 times at least, and never replied: it is
                not the questions' fault.
        """
        named = [(f"question {index}", question, sample) for index, question in enumerate(_listed(questions))]
        return self._attempt(named, jobs, progress, settings)

    def samples(
        self,
        questions: Iterable[Question],
        n: int,
        *,
        jobs: int = 8,
        progress: Progress | None = None,
        **settings: Unpack[Settings],
    ) -> list[list[Reply]]:
        """n replies for each question: those of samples 0 to n - 1, each a request of its own. See `ask_all`."""
        if n < 1:
            raise ValueError(f"n is {n}; expected at least 1")
        listed = _listed(questions)
        named = [
            (f"question {index}", question, sample) for index, question in enumerate(listed) for sample in range(n)
        ]
        replies = self._answer(named, jobs, progress, settings)
        return [replies[at : at + n] for at in range(0, len(replies), n)]

    def _answer(
        self,
        named: list[tuple[str, Question, int]],
        jobs: int,
        progress: Progress | None,
        settings: Settings,
    ) -> list[Reply]:
        answers: list[Reply] = []
        for answer in self._attempt(named, jobs, progress, settings, stop=True):
            assert isinstance(answer, Reply)  # it would have stopped
            answers.append(answer)
        return answers

    def _attempt(
        self,
        named: list[tuple[str, Question, int]],
        jobs: int,
        progress: Progress | None,
        settings: Settings,
        stop: bool = False,
    ) -> list[Reply | UserError]:
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}; expected at least 1")
        chosen = _Chosen(**settings)
        self._backend.check(chosen)
        identity = self._backend.identity() if self._cache is not None else {}
        asked: list[str] = []
        requests: dict[str, _Request] = {}
        for name, question, sample in named:
            request = _Request(name, _messages(question, name, self._system), chosen, self._seed, sample)
            asked.append(request.key(identity))
            requests.setdefault(asked[-1], request)
        shares = Counter(asked)
        replies: dict[str, Reply | UserError] = {}

        def say(key: str, reply: Reply | UserError) -> None:
            if stop and isinstance(reply, UserError):
                raise reply
            replies[key] = reply
            if progress is not None:
                progress(sum(shares[key] for key in replies), len(asked))

        def keep(key: str, reply: Reply) -> None:
            if self._cache is not None:
                self._cache.put(key, requests[key].content(identity), reply)
            self._count(reply)

        if self._cache is not None:
            for key in requests:
                found = self._cache.get(key)
                if found is not None:
                    self._count(found)
                    say(key, found)
        self._backend.ask({key: request for key, request in requests.items() if key not in replies}, jobs, keep, say)
        return [replies[key] for key in asked]

    def _count(self, reply: Reply) -> None:
        with self._lock:
            total = self._usage
            if reply.cached:
                self._usage = replace(total, cached=total.cached + 1)
                return
            read, written = reply.prompt_tokens, reply.completion_tokens
            cost = None
            if self._price is not None and None not in (total.cost, read, written):
                cost = total.cost + (read * self._price[0] + written * self._price[1]) / 1e6  # type: ignore[operator]
            self._usage = replace(
                total,
                calls=total.calls + 1,
                prompt_tokens=total.prompt_tokens + (read or 0),
                completion_tokens=total.completion_tokens + (written or 0),
                cost=cost,
            )


# requests


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """Settings with their defaults."""

    max_tokens: int | None = 256
    temperature: float | None = 1.0
    top_p: float | None = 1.0
    stop: str | Sequence[str] = ()
    logprobs: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; expected at least 1")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; expected a number from 0 (greedy) up")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0, at most 1")
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        if not all(stop):
            raise ValueError("a stop string is empty; leave it out")
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "options", dict(self.options))


@dataclass(frozen=True)
class _Request:
    """One question, ready to be sent."""

    name: str
    messages: list[dict[str, Any]]
    settings: _Chosen
    seed: int | None
    sample: int

    def content(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        """All that its reply depends on."""
        return {
            **identity,
            "messages": self.messages,
            **asdict(self.settings),
            "seed": self.seed,
            "sample": self.sample,
        }

    def key(self, identity: Mapping[str, Any]) -> str:
        return _hash(self.content(identity))


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _listed(questions: Iterable[Question]) -> list[Question]:
    if isinstance(questions, str | Mapping):
        raise TypeError(f"questions is a {type(questions).__name__}; give a list, or use ask")
    return list(questions)


def _messages(question: Question, name: str, system: str | None) -> list[dict[str, Any]]:
    if isinstance(question, Mapping) or not isinstance(question, str | Sequence):
        raise TypeError(f"{name} is a {type(question).__name__}; expected text, or a list of messages")
    if not question:
        raise UserError(f"{name} is empty; there is nothing to answer")
    if isinstance(question, str):
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    else:
        for message in question:
            if not isinstance(message, Mapping) or "role" not in message:
                raise TypeError(f"{name} has the message {message!r:.80}; expected {{'role': ..., 'content': ...}}")
        messages = [dict(message) for message in question]
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


Keep: TypeAlias = Callable[[str, Reply], None]
Say: TypeAlias = "Callable[[str, Reply | UserError], None]"


class _Backend(Protocol):
    def check(self, settings: _Chosen) -> None:
        """Refuse settings that it does not have."""

    def identity(self) -> dict[str, Any]:
        """What tells its replies from those of another model."""

    def ask(self, requests: Mapping[str, _Request], jobs: int, keep: Keep, say: Say) -> None:
        """Answer all: `keep` each reply as soon as it is there, in any thread, then `say` it in the caller's.

        A question that gets none has its error said; saying may raise, which ends it.
        """


# endpoints


class _Endpoint:
    def __init__(self, url: str, model: str, api_key: str | None, retries: int, timeout: float) -> None:
        with extra("language"):
            import openai
        self.url, self.model, self.timeout = _bare(url), model, timeout
        self._openai: Any = openai
        key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the API key for {self.url} holds characters that no key has; see how it was read")
        self._key = key
        self._client: Any = openai.OpenAI(
            base_url=url,
            api_key=key or "none",
            max_retries=retries,
            timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)),
        )

    def __repr__(self) -> str:
        return f"{self.url!r}, model={self.model!r}"

    def check(self, settings: _Chosen) -> None:
        pass

    def identity(self) -> dict[str, Any]:
        return {"endpoint": self.url, "model": self.model}

    def ask(self, requests: Mapping[str, _Request], jobs: int, keep: Keep, say: Say) -> None:
        replied, failed = False, 0

        def work(key: str, request: _Request) -> Reply | UserError:
            try:
                reply = self._send(request)
            except UserError as problem:
                return problem
            keep(key, reply)
            return reply

        def tell(key: str, reply: Reply | UserError) -> None:
            nonlocal replied, failed
            if isinstance(reply, UserError):
                failed += 1
                if not replied and failed >= max(jobs, 3):
                    raise reply
            else:
                replied = True
            say(key, reply)

        if min(jobs, len(requests)) <= 1:
            for key, request in requests.items():
                tell(key, work(key, request))
            return
        pool = ThreadPoolExecutor(min(jobs, len(requests)), "counterproof-chat")
        futures = {pool.submit(work, key, request): key for key, request in requests.items()}
        try:
            for future in as_completed(futures):
                tell(futures[future], future.result())
        except BaseException as problem:
            # What is under way is kept when it comes; it is awaited unless someone is waiting at the keyboard.
            pool.shutdown(wait=isinstance(problem, Exception), cancel_futures=True)
            raise
        pool.shutdown()

    def _send(self, request: _Request) -> Reply:
        settings = request.settings
        body: dict[str, Any] = {
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "stop": settings.stop or None,
            "logprobs": settings.logprobs or None,
            "seed": None if request.seed is None else (request.seed + 1_000_003 * request.sample) % 2**31,
        }
        body = {name: value for name, value in body.items() if value is not None}
        started = time.perf_counter()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.model, messages=request.messages, extra_body=dict(settings.options), **body
            )
        except self._openai.APIError as problem:
            raise self._explained(problem, request.name) from None
        seconds = time.perf_counter() - started
        text = raw.http_response.text
        try:
            return _read(json.loads(text), seconds)
        except (ValueError, TypeError, LookupError, AttributeError):
            raise UserError(
                f"{self.url} answered what is no chat completion: {self._quoted(text)}; is it the address of an "
                "OpenAI-compatible endpoint, such as http://localhost:8000/v1?"
            ) from None

    def _explained(self, problem: Any, name: str) -> UserError:
        """What went wrong, for whom it can mend."""
        model = f"{self.url} (model {self.model!r})"
        tries = int(problem.request.headers.get("x-stainless-retry-count", 0)) + 1
        times = "once" if tries == 1 else f"{tries} times"
        connecting = type(problem.__cause__).__name__ == "ConnectTimeout"
        if isinstance(problem, self._openai.APITimeoutError) and not connecting:
            return UserError(
                f"{model} was asked {times} and gave no answer within {self.timeout:g} s; raise timeout=, lower "
                "max_tokens= or jobs=, or see whether the server is busy"
            )
        if isinstance(problem, self._openai.APIConnectionError):
            cause = self._quoted(str(problem.__cause__ or problem))
            return UserError(
                f"cannot reach {self.url} (tried {times}): {cause}; is the server running, and the address right?"
            )
        status = getattr(problem, "status_code", None)
        said = problem.body.get("message") if isinstance(problem.body, dict) else None
        said = self._quoted(str(said or problem.body or problem.message))
        if status in (401, 403):
            whose = "the API key" if self._key else "a request without an API key"
            return UserError(f"{model} refused {whose} ({status}): {said}; give api_key=, or set OPENAI_API_KEY")
        if status == 404:
            return UserError(
                f"{model} was not found (404): {said}; see that model= is one the endpoint serves, and that the "
                "address is that of its API, such as http://localhost:8000/v1"
            )
        if status == 429:
            wait = problem.response.headers.get("retry-after")
            later = f" (Retry-After: {wait})" if wait else ""
            return UserError(
                f"{model} was asked {times} and refused for too many requests (429): {said}{later}; wait, lower jobs=, "
                "or raise retries="
            )
        if status in (408, 409) or (status is not None and status >= 500):
            return UserError(f"{model} failed {times} ({status}): {said}; try again later, or raise retries=")
        return UserError(f"{model} did not accept {name} ({status}): {said}; change what it names")

    def _quoted(self, text: str) -> str:
        """On one line, not too long, and without the API key, should the endpoint repeat it."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:300] + "..."


def _bare(url: str) -> str:
    """An address without what may be secret in it: a password, a query."""
    parts = urlsplit(url)
    if not parts.hostname:
        raise UserError(f"{url!r} has no host; an endpoint's address is like http://localhost:8000/v1")
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path.rstrip('/')}"


def _read(answer: dict[str, Any], seconds: float) -> Reply:
    """A chat completion; what is none fails on the way, or is refused with a TypeError."""
    choice = answer["choices"][0]
    text = choice["message"].get("content")
    if text is None:
        text = choice["message"].get("refusal") or ""
    usage = answer.get("usage") or {}
    content = (choice.get("logprobs") or {}).get("content")
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    if not isinstance(text, str) or not all(count is None or isinstance(count, int) for count in counts):
        raise TypeError("content that is no text, or counts that are no numbers")
    return Reply(
        text=text,
        finish=str(choice.get("finish_reason") or "unknown"),
        prompt_tokens=counts[0],
        completion_tokens=counts[1],
        logprobs=None if content is None else tuple((str(one["token"]), float(one["logprob"])) for one in content),
        seconds=seconds,
    )


# a model that runs here


class _Local:
    def __init__(self, target: "Language | str | Path | None") -> None:
        from counterproof.language.models import Language, load

        self._own = not isinstance(target, Language)  # nobody else can train it
        self._language = target if isinstance(target, Language) else load(target)
        self._fingerprint: str | None = None
        self._lock = threading.Lock()  # generation sets the model's mode
        self._name = str(target or "smollm2") if self._own else type(self._language.model).__name__

    def __repr__(self) -> str:
        return self._name

    def check(self, settings: _Chosen) -> None:
        if settings.options:
            raise UserError(f"options are an endpoint's; a model that runs here has no {', '.join(settings.options)}")
        for name in ("max_tokens", "temperature", "top_p"):
            if getattr(settings, name) is None:
                raise ValueError(f"{name} is None, which leaves it to an endpoint; a model that runs here needs it")

    def identity(self) -> dict[str, Any]:
        if self._fingerprint is None or not self._own:
            self._fingerprint = fingerprint(self._language)
        return {"weights": self._fingerprint}

    def ask(self, requests: Mapping[str, _Request], jobs: int, keep: Keep, say: Say) -> None:
        from counterproof.language.sampling import encode, generations

        if not requests:
            return
        prompts: list[tuple[int, ...]] = []
        keys: list[str] = []
        for key, request in requests.items():
            try:
                prompts.append(encode(self._language, request.messages, request.name))
                keys.append(key)
            except UserError as problem:
                say(key, problem)
        if not keys:
            return
        # By what is asked, so that a reply is the same whatever is asked beside it.
        asked = [requests[key] for key in keys]
        seeds = [int(_hash([one.seed, one.sample, one.messages])[:16], 16) for one in asked]
        settings: Any = asked[0].settings
        decode = self._language.tokenizer.decode
        with self._lock:
            started = time.perf_counter()
            for batch in generations(
                self._language,
                prompts,
                max_new_tokens=settings.max_tokens,
                samples=1,
                temperature=settings.temperature,
                top_p=settings.top_p,
                stop=settings.stop,
                seed=seeds,
                batch_size=jobs,
            ):
                seconds = time.perf_counter() - started
                for index, _, one in batch:
                    reply = Reply(
                        text=one.text,
                        finish="length" if one.finish == "length" else "stop",
                        prompt_tokens=len(prompts[index]),
                        completion_tokens=len(one.tokens),
                        logprobs=tuple((str(decode([t])), p) for t, p in zip(one.tokens, one.logprobs, strict=True))
                        if settings.logprobs
                        else None,
                        seconds=seconds,
                    )
                    keep(keys[index], reply)
                    say(keys[index], reply)
                started = time.perf_counter()


def fingerprint(language: "Language") -> str:
    """A hash of all that a model's answers depend on: weights, adapters and their state, configuration, vocabulary."""
    import torch

    model, tokenizer = language
    model_: Any = model
    found = hashlib.sha256()

    def add(value: Any) -> None:
        found.update(json.dumps(value, sort_keys=True, default=_plain).encode() + b"\0")

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        add([name, str(tensor.dtype), list(tensor.shape)])
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    # Where it was read from, and by which version, is no part of a model.
    config = model.config.to_dict()
    add({name: config[name] for name in config if name not in ("_name_or_path", "transformers_version")})
    add([model_.generation_config.eos_token_id, tokenizer.eos_token_id, tokenizer.chat_template])
    add(tokenizer.get_vocab())
    if hasattr(model, "peft_config"):
        from peft.tuners.tuners_utils import BaseTunerLayer

        add({name: config.to_dict() for name, config in model_.peft_config.items()})
        add([getattr(model, "active_adapter", None), getattr(model, "_adapters_disabled", None)])
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                state = [module.active_adapters, module.disable_adapters, module.merged_adapters]
                add([name, state, getattr(module, "scaling", None)])
    return found.hexdigest()


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


# on disk


class _Cache:
    """A folder of replies, each in a file of its own, which is there in whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._make(folder)

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"cannot keep replies in {folder}: {problem.strerror}; name another folder") from None

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Reply | None:
        path = self._path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"cannot read the kept reply {path}: {problem}; delete it") from None
        try:
            found = json.loads(text)["reply"]
            logprobs = found.pop("logprobs")
            return Reply(**found, logprobs=logprobs and tuple((token, p) for token, p in logprobs), cached=True)
        except (ValueError, TypeError, LookupError, AttributeError) as problem:
            raise UserError(f"{path} is no kept reply ({problem}); delete it") from None

    def put(self, key: str, content: Mapping[str, Any], reply: Reply) -> None:
        path = self._path(key)
        self._make(path.parent)
        kept = asdict(reply)
        del kept["cached"]
        with replacing(path) as stream:
            json.dump({"request": content, "reply": kept}, stream, indent=1)
