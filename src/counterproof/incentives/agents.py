"""Agents to ask: a model that runs here, one behind an endpoint, any callable, and a scripted one that is known."""

import hashlib
import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from counterproof.errors import UserError, extra
from counterproof.files import replacing
from counterproof.incentives.shopping import INFORMATION, Scenario

with extra("incentives"):
    import torch

from counterproof.language.conversation import Usage, chat, fingerprint
from counterproof.language.models import Language, load
from counterproof.language.scoring import Group, batches, completion_logps

__all__ = ["Agent", "EndpointAgent", "HFAgent", "Question", "Responder", "Response", "UtilityAgent"]

Floats = NDArray[np.float64]
Progress: TypeAlias = Callable[[int, int], None]
Mode = Literal["logprob", "explained", "sample"]

GIVE_UP = 8  # failures in a row after which an endpoint is not asked any more in this run
SCORED_TOKENS = 2048  # in one forward pass, about


def digest(text: str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Question:
    """One answer that is wanted: a cell of the design, and which replication.

    Attributes:
        scenario: with the prices that the prompt shows.
        prices: ``"own"`` or ``"equal"``.
        wording, information, case: by name.
        swapped: the second product is listed first.
        temperature: of sampling; None for an agent that has none.
        replication: from 0.
        text: the prompt.
    """

    scenario: Scenario
    prices: str
    wording: str
    information: str
    swapped: bool
    case: str
    temperature: float | None
    replication: int
    text: str

    @property
    def prompt(self) -> str:
        """SHA-256 of the text."""
        return digest(self.text)

    @property
    def key(self) -> tuple[str, float | None, int]:
        """What tells it from the other questions of an experiment."""
        return self.prompt, self.temperature, self.replication


@dataclass(frozen=True, kw_only=True)
class Response:
    """What came of a question.

    Attributes:
        text: the answer; None when there was none.
        first: instead of a choice, the probability of the product listed first, of the two.
        mass: probability of both ids together, where it was computed.
        finish: how the text ended.
        error: why there is no answer; it is asked again by the next run.
        rendered: all that the model was given, chat template included.
    """

    text: str | None = None
    first: float | None = None
    mass: float | None = None
    finish: str = ""
    error: str = ""
    rendered: str = ""


class Responder(Protocol):
    """What an experiment asks; the agents below, or your own."""

    deterministic: bool  # every replication would be the same, and there is no temperature

    def describe(self) -> dict[str, Any]:
        """Plain values that tell this agent's answers from another's."""

    def respond(self, questions: Sequence[Question], seed: int, progress: Progress) -> list[Response]:
        """A response to each question, in order."""


def _ask_each(
    questions: Sequence[Question], ask: Callable[[Question], Response], jobs: int, progress: Progress
) -> list[Response]:
    """Each on its own; once nothing but failures comes, the rest is left for another run."""
    lock = threading.Lock()
    failures, last = 0, ""

    def work(question: Question) -> Response:
        nonlocal failures, last
        with lock:
            if failures >= GIVE_UP:
                return Response(error=f"not asked after {failures} failures in a row; the last: {last}")
        response = ask(question)
        with lock:
            failures, last = (failures + 1, response.error) if response.error else (0, last)
        return response

    found: dict[int, Response] = {}
    if jobs == 1:
        for at, question in enumerate(questions):
            found[at] = work(question)
            progress(len(found), len(questions))
    else:
        pool = ThreadPoolExecutor(jobs, "counterproof-agent")
        futures = {pool.submit(work, question): at for at, question in enumerate(questions)}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress(len(found), len(questions))
        except BaseException as problem:
            # What is under way ends by itself; it is awaited unless someone is waiting at the keyboard.
            pool.shutdown(wait=isinstance(problem, Exception), cancel_futures=True)
            raise
        pool.shutdown()
    return [found[at] for at in range(len(questions))]


def _seed_at(seed: int, temperature: float | None) -> int:
    """One for each temperature, so that answers at different ones do not share their draws."""
    return seed + round(1_000_000 * (temperature or 0.0))


class Agent:
    """Any callable from prompt to answer, such as a call of an API client.

    Args:
        function: ``str -> str``; what it raises makes a failed answer, asked again when the run is resumed.
        name: of the agent in results; None: the function's.
        deterministic: ask each prompt once; else the replications are asked at each temperature, which the function
            does not learn of, so give the experiment one temperature.
    """

    def __init__(self, function: Callable[[str], str], *, name: str | None = None, deterministic: bool = False) -> None:
        self.function, self.deterministic = function, deterministic
        self.name = name or getattr(function, "__name__", type(function).__name__)

    def describe(self) -> dict[str, Any]:
        """Its name."""
        return {"agent": self.name, "mode": "sample"}

    def respond(self, questions: Sequence[Question], seed: int, progress: Progress) -> list[Response]:
        """One call after the other; the seed is the function's own business.

        Raises:
            TypeError: the function returns something else than text.
        """

        def ask(question: Question) -> Response:
            try:
                text = self.function(question.text)
            except Exception as problem:  # whatever a client raises; it stays in the table, in its words
                return Response(error=f"{type(problem).__name__}: {problem}", rendered=question.text)
            if not isinstance(text, str):
                raise TypeError(f"{self.name} returned a {type(text).__name__}; an agent returns its answer as text")
            return Response(text=text, rendered=question.text)

        return _ask_each(questions, ask, 1, progress)


class EndpointAgent:
    """A model behind an OpenAI-compatible endpoint, asked through `counterproof.language.conversation.chat`.

    Args:
        url, model: address, and which of its models.
        api_key, retries, timeout, price: see `chat`.
        cache: a folder of replies, so that a run that was broken off goes on where it was; failures are not kept.
        jobs: requests under way at a time.
        max_tokens: longest answer.
        top_p: None leaves it to the endpoint.
        system: a system message before the prompt; it changes behaviour, and is part of what is stored.
    """

    deterministic = False

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        cache: str | Path | None = None,
        retries: int = 4,
        timeout: float = 120.0,
        price: tuple[float, float] | None = None,
        jobs: int = 8,
        max_tokens: int = 512,
        top_p: float | None = None,
        system: str | None = None,
    ) -> None:
        if jobs < 1:
            raise ValueError(f"jobs is {jobs}; expected at least 1")
        self.url, self.model, self.jobs = url, model, jobs
        self.max_tokens, self.top_p, self.system = max_tokens, top_p, system
        self._options = dict(api_key=api_key, cache=cache, retries=retries, timeout=timeout, price=price)
        self.usage: Usage | None = None

    def describe(self) -> dict[str, Any]:
        """Address, model and settings; never the key."""
        settings = {"max_tokens": self.max_tokens, "top_p": self.top_p, "system": self.system}
        address = self.url.partition("?")[0].rpartition("@")[2]  # a query or a password may be secret
        return {"agent": self.model, "mode": "sample", "endpoint": address, **settings}

    def respond(self, questions: Sequence[Question], seed: int, progress: Progress) -> list[Response]:
        """Several at a time; a request that keeps failing or times out becomes a failed answer.

        Afterwards `usage` holds calls, tokens and cost.
        """
        talks = {
            temperature: chat(self.url, model=self.model, seed=_seed_at(seed, temperature), **self._options)  # type: ignore[arg-type]
            for temperature in dict.fromkeys(question.temperature for question in questions)
        }

        def ask(question: Question) -> Response:
            messages = [{"role": "user", "content": question.text}]
            if self.system is not None:
                messages.insert(0, {"role": "system", "content": self.system})
            rendered = json.dumps(messages, ensure_ascii=False)
            try:
                reply = talks[question.temperature].ask(
                    messages,
                    sample=question.replication,
                    temperature=question.temperature,
                    max_tokens=self.max_tokens,
                    top_p=self.top_p,
                )
            except UserError as problem:
                return Response(error=str(problem), rendered=rendered)
            return Response(text=reply.text, finish=reply.finish, rendered=rendered)

        found = _ask_each(questions, ask, self.jobs, progress)
        used = [talk.usage for talk in talks.values()]
        costs = [one.cost for one in used]
        self.usage = Usage(
            calls=sum(one.calls for one in used),
            cached=sum(one.cached for one in used),
            prompt_tokens=sum(one.prompt_tokens for one in used),
            completion_tokens=sum(one.completion_tokens for one in used),
            cost=None if None in costs else math.fsum(cost for cost in costs if cost is not None),
        )
        return found


class HFAgent:
    """A causal language model of transformers.

    Args:
        model: the model; or with no tokenizer a `Language`, or what `counterproof.language.load` takes (None: the
            embedded SmolLM2-135M-Instruct).
        tokenizer: of a model given as an object.
        mode: ``"logprob"``: both answers are scored behind ``Choice:``, without any explanation, so an answer is a
            probability and exact; ``"explained"``: an explanation is sampled first, whose audience is what varies, then
            scored behind it; ``"sample"``: the whole answer is sampled and read.
        max_tokens: longest sampled text.
        batch_size: prompts sampled at a time.
        cache: a folder of replies and scores, so that a run that was broken off goes on where it was.
        name: of the agent in results; None: the model's path or class.
    """

    def __init__(
        self,
        model: Any = None,
        tokenizer: Any = None,
        *,
        mode: Mode = "logprob",
        max_tokens: int = 256,
        batch_size: int = 8,
        cache: str | Path | None = None,
        name: str | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(get_args(Mode))}")
        if tokenizer is not None:
            self.language = Language(model, tokenizer)
        else:
            self.language = model if isinstance(model, Language) else load(model)
        named = "smollm2" if model is None else str(model) if isinstance(model, str | Path) else None
        self.name = name or named or type(self.language.model).__name__
        self.mode, self.max_tokens, self.batch_size = mode, max_tokens, batch_size
        self.cache = None if cache is None else Path(cache)
        self._fingerprint: str | None = None

    @property
    def deterministic(self) -> bool:
        """Whether it samples nothing."""
        return self.mode == "logprob"

    def describe(self) -> dict[str, Any]:
        """Name, mode, and a hash of the weights."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self.language)
        sampled = {} if self.mode == "logprob" else {"max_tokens": self.max_tokens}
        return {"agent": self.name, "mode": self.mode, "weights": self._fingerprint, **sampled}

    def respond(self, questions: Sequence[Question], seed: int, progress: Progress) -> list[Response]:
        """Score or sample.

        Raises:
            UserError: a prompt that does not fit the model's context; in the scoring modes ids of which one begins the
                other.
        """
        rendered = [self._render(question.text) for question in questions]
        if self.mode == "logprob":
            scored = self._score(questions, rendered, [""] * len(questions), progress)
            return [
                Response(first=first, mass=mass, rendered=text + _field(question))
                for (first, mass), text, question in zip(scored, rendered, questions, strict=True)
            ]
        if self.mode == "sample":
            replies = self._sample(questions, seed, (), progress)
            return [
                Response(text=reply.text, finish=reply.finish, rendered=text)
                for reply, text in zip(replies, rendered, strict=True)
            ]
        stop = ("Choice:", "CHOICE:", "choice:")
        replies = self._sample(questions, seed, stop, lambda had, of: progress(had // 2, of))
        behind = [reply.text.strip() + "\n" for reply in replies]
        scored = self._score(questions, rendered, behind, lambda had, of: progress((of + had) // 2, of))
        return [
            Response(text=reply.text, first=first, mass=mass, finish=reply.finish, rendered=text)
            for (first, mass), reply, text in zip(scored, replies, rendered, strict=True)
        ]

    def _render(self, text: str) -> str:
        tokenizer = self.language.tokenizer
        if tokenizer.chat_template is None:
            return text + "\n\n"
        messages = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _sample(self, questions: Sequence[Question], seed: int, stop: Sequence[str], progress: Progress) -> list[Any]:
        places: dict[float | None, list[int]] = defaultdict(list)
        for at, question in enumerate(questions):
            places[question.temperature].append(at)
        found: dict[tuple[float | None, str, int], Any] = {}
        done = 0

        def tell(before: int, share: int) -> Progress:
            return lambda had, of: progress(before + share * had // of, len(questions))

        for temperature, those in places.items():
            texts = list(dict.fromkeys(questions[at].text for at in those))
            talk = chat(
                self.language,
                cache=None if self.cache is None else self.cache / "replies",
                seed=_seed_at(seed, temperature),
            )
            replies = talk.samples(
                texts,
                1 + max(questions[at].replication for at in those),
                jobs=self.batch_size,
                progress=tell(done, len(those)),
                temperature=temperature,
                max_tokens=self.max_tokens,
                stop=stop,
            )
            for text, group in zip(texts, replies, strict=True):
                found.update({(temperature, text, sample): reply for sample, reply in enumerate(group)})
            done += len(those)
        return [found[one.temperature, one.text, one.replication] for one in questions]

    def _score(
        self, questions: Sequence[Question], rendered: Sequence[str], behind: Sequence[str], progress: Progress
    ) -> list[tuple[float, float]]:
        """Probability of the id listed first, of the two, and the mass of both."""
        model, tokenizer = self.language
        groups = []
        for question, start, text in zip(questions, rendered, behind, strict=True):
            answers = [str(number) for number in question.scenario.ids]
            if answers[0].startswith(answers[1]) or answers[1].startswith(answers[0]):
                raise UserError(
                    f"scenario {question.scenario.name!r}: of the ids {' and '.join(answers)} one begins the other, so "
                    "its probability holds both; give other ids, or use mode='sample'"
                )
            field = _field(question)
            special = tokenizer.chat_template is None  # a template has written them already
            ids = [
                list(tokenizer(start + text + field + answer, add_special_tokens=special)["input_ids"])
                for answer in ("", *answers)
            ]
            # Where a blank merges with the number, both belong to the answer; else both belong to the prefix.
            shared = min(_common(ids[0], whole) for whole in ids[1:])
            groups.append(Group(tuple(ids[1][:shared]), tuple(tuple(whole[shared:]) for whole in ids[1:])))
        logps: list[tuple[float, float]] = []
        training = model.training
        model.eval()
        try:
            for run in batches(groups, SCORED_TOKENS):
                part = [groups[at] for at in run]
                files = [self._score_file(group) for group in part]
                kept = [None if file is None or not file.exists() else json.loads(file.read_text()) for file in files]
                fresh = [group for group, one in zip(part, kept, strict=True) if one is None]
                if fresh:
                    try:
                        with torch.no_grad():
                            sums = iter(completion_logps(model, fresh).sum().double().reshape(-1, 2).tolist())
                    except ValueError as problem:
                        raise UserError(f"{problem}; shorten the scenarios, or take another model") from None
                    for at, one in enumerate(kept):
                        if one is None:
                            kept[at] = pair = next(sums)
                            if not all(map(math.isfinite, pair)):
                                raise UserError(f"{self.name} gives log-probabilities that are no numbers: {pair}")
                            if (file := files[at]) is not None:
                                file.parent.mkdir(parents=True, exist_ok=True)
                                with replacing(file) as stream:
                                    json.dump(kept[at], stream)
                logps += [(one[0], one[1]) for one in kept if one is not None]
                progress(len(logps), len(groups))
        finally:
            model.train(training)
        return [(float(expit(a - b)), math.exp(a) + math.exp(b)) for a, b in logps]

    def _score_file(self, group: Group) -> Path | None:
        if self.cache is None:
            return None
        key = digest(json.dumps([self.describe()["weights"], group.prompt, group.completions]))
        return self.cache / "scores" / key[:2] / f"{key}.json"


def _field(question: Question) -> str:
    """What stands before the number."""
    return {"upper": "CHOICE: ", "lower": "choice: "}.get(question.case, "Choice: ")


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((at for at, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


@dataclass(frozen=True, eq=False)
class UtilityAgent:
    """A scripted agent whose behaviour is known, to test the instrument with.

    Its log odds for the customer's first preference are ``w_c + w_p (1 + sees) + position``, where the second term is
    negative if the principal prefers the other product, ``sees`` counts only where the principal sees the explanation,
    and ``position`` is negative where that product is listed second.

    Args:
        weights: (w_c, w_p), of the customer and of the principal; each may be an array, for `probabilities`.
        sees: by how much more the principal counts when it sees (kappa of the brief).
        position: liking of the product that is listed first (beta).
        refuses: share of its answers against the customer that come as a refusal where the principal does not see.
        mode: ``"sample"`` writes answers; ``"logprob"`` gives exact probabilities, and refuses nothing.
    """

    weights: tuple[Any, Any] = (1.0, 1.0)
    sees: Any = 0.0
    position: Any = 0.0
    refuses: Any = 0.0
    mode: Literal["sample", "logprob"] = "sample"

    def __post_init__(self) -> None:
        if self.mode not in ("sample", "logprob"):
            raise ValueError(f"mode is {self.mode!r}; expected 'sample' or 'logprob'")
        if not np.all((np.asarray(self.refuses) >= 0) & (np.asarray(self.refuses) <= 1)):
            raise ValueError(f"refuses is {self.refuses!r}; expected a share from 0 to 1")

    @property
    def deterministic(self) -> bool:
        """Whether it draws nothing."""
        return self.mode == "logprob"

    def describe(self) -> dict[str, Any]:
        """Its parameters."""
        names = ("weights", "sees", "position", "refuses")
        parameters = {name: np.asarray(getattr(self, name)).tolist() for name in names}
        return {"agent": "utility", "mode": self.mode, **parameters}

    def probabilities(
        self, principal_sees: ArrayLike, first: ArrayLike, agree: ArrayLike = False
    ) -> tuple[Floats, Floats]:
        """What it would choose, and how often its choice of the other product is a refusal.

        Args:
            principal_sees: bool.
            first: bool, whether the customer's first preference is listed first.
            agree: bool, whether the principal has the same first preference.

        Returns:
            The probability that it would choose the customer's first preference, and the share of the other choices
            that come as refusals; of the shape that arguments and parameters broadcast to.
        """
        w_c, w_p = self.weights
        sees = np.asarray(principal_sees, bool)
        pull = np.asarray(w_p) * (1 + np.asarray(self.sees) * sees) * np.where(agree, 1.0, -1.0)
        odds = np.asarray(w_c) + pull + np.asarray(self.position) * np.where(first, 1.0, -1.0)
        refused = np.asarray(self.refuses) * ~sees
        chosen, refused = np.broadcast_arrays(expit(odds), refused)
        return chosen, refused

    def respond(self, questions: Sequence[Question], seed: int, progress: Progress) -> list[Response]:
        """A draw depends on seed, prompt, temperature and replication alone."""
        found = []
        for question in questions:
            scenario = question.scenario
            listed = (1, 0) if question.swapped else (0, 1)  # which product stands where
            place = listed.index(scenario.preferred["customer"])
            chosen, refused = self.probabilities(
                INFORMATION[question.information][0], place == 0, not scenario.conflict
            )
            if self.mode == "logprob":
                found.append(Response(first=float(chosen if place == 0 else 1 - chosen), mass=1.0))
            else:
                key = int(digest(repr(question.key))[:16], 16)
                draw, refusal = np.random.default_rng([seed, key]).random(2)
                if draw >= chosen:
                    place = 1 - place
                    if refusal < refused:
                        found.append(Response(text="I would rather not choose.", finish="stop"))
                        continue
                text = f"Explanation: the better of the two.\nChoice: {scenario.ids[place]}"
                found.append(Response(text=text, finish="stop"))
        progress(len(questions), len(questions))
        return found
