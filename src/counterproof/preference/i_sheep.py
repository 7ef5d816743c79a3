"""I-SHEEP: rounds in which a model writes instructions, answers and grades them, and its base learns what passes.

Paper: arXiv 2408.08072.
Read beside: multimodal-art-projection/I-SHEEP (scripts, prompts, filters), by way of the brief.
Deviations: prompts are in our own words; a round counts proposals before the rules, so that its cost is fixed; options
    are recognised at the beginning of a line only, where the official pattern rejects any "a."; training weighs every
    pair alike, not every token; LoRA's rank and learning rate are unpublished; the density filter, whose details are
    not known to us, is left out.
"""

import copy
import hashlib
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from rapidfuzz.distance import LCSseq

from counterproof.errors import UserError, extra
from counterproof.files import replacing

with extra("preference"):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

from counterproof.language import Group, Language, batches, completion_logps
from counterproof.language.models import load
from counterproof.language.sampling import encode as prompt_tokens
from counterproof.language.sampling import generate
from counterproof.preference.data import Example, Text, encode
from counterproof.preference.forward import optimise
from counterproof.preference.objectives import SFT, Sample
from counterproof.preference.trainer import Trained, TrainSettings, save, train

__all__ = [
    "Grades",
    "ISheep",
    "ISheepTraining",
    "Instruction",
    "SelfAssessor",
    "SelfPair",
    "SheepRound",
    "apply_rules",
    "below_perplexity",
    "drop_duplicates",
    "fine_tune",
    "grades_above",
    "parse_instructions",
    "parse_score",
    "perplexities",
    "propose_instructions",
    "read_seed_tasks",
    "respond",
    "rouge_l",
]

META_PROMPT = """\
Write a list of 20 tasks that somebody could give to a language model. Keep to these rules:
1. Begin each task with another verb where you can.
2. Mix questions with requests.
3. Cover many kinds of work: open writing, sorting into classes, extracting, rewriting, explaining, reasoning, planning.
4. A language model without tools must be able to do it: nothing to see, hear, draw, book or remember.
5. Write in English.
6. Keep an instruction to one or two sentences.
7. Give an input where the task needs one: a specific and plausible example, no placeholder.
8. Keep an input below 100 words.
9. Where no input is needed, write "<noinput>" in its place.

List of 20 tasks:
"""
QUALITY_PROMPT = """\
Below are an instruction and a response to it. Rate the quality of the response from 1 (useless) to 10 (excellent): it \
should be correct, to the point and clear. Write the rating first, in the form <score>||<explanation>.

Instruction: {instruction}

Response: {response}

Rating: """
FOLLOWING_PROMPT = """\
Below are an instruction and a response to it. Rate from 1 (not at all) to 10 (fully) how well the response follows \
the instruction: it should answer instead of going on with other text, it should have the form that was asked for, and \
it should be clear what the instruction asks for. Write the rating first, in the form <score>||<explanation>.

Instruction: {instruction}

Response: {response}

Rating: """


@dataclass(frozen=True, slots=True)
class Instruction:
    """A task: what is asked, the input it is asked about ("" for none), and for seeds a perplexity if it is known."""

    instruction: str
    input: str = ""
    perplexity: float | None = None

    @property
    def text(self) -> str:
        """Instruction, and on a line of its own the input."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class SelfPair:
    """A task, the model's response to it, and the grades (1 to 10; None: not graded, or not understood)."""

    instruction: str
    input: str
    response: str
    quality: float | None = None
    following: float | None = None

    @property
    def text(self) -> str:
        """Instruction and input, as `Instruction.text`."""
        return Instruction(self.instruction, self.input).text

    def example(self, *, chat: bool = True) -> Example:
        """The pair for training: chat messages, or plain text with a newline behind the instruction."""
        answer: Text = [{"role": "assistant", "content": self.response}] if chat else self.response
        prompt = _prompt(self.text, chat)
        return Example(prompt=prompt, completions=(answer,), scores=(1.0,), kind="completion", where=self.text[:60])


def _prompt(text: str, chat: bool) -> Text:
    return [{"role": "user", "content": text}] if chat else f"{text}\n"


def read_seed_tasks(source: str | Path | Sequence[Any]) -> list[Instruction]:
    """Seed tasks from a JSONL file or a list.

    Args:
        source: a file whose records have ``instruction`` and perhaps ``input`` (or, as in Alpaca's seeds, a first of
            ``instances`` with one) and ``perplexity`` or ``ppl``; or a list of such records, texts, `Instruction` or
            `Example` with a plain prompt or a user's message last.

    Raises:
        UserError: no file, no task, or a record without instruction, by its place.
    """
    rows: list[tuple[str, Any]]
    if isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise UserError(f"{path} is not a file; give a JSONL file of seed tasks")
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append((f"{path}:{number}", json.loads(line)))
                except json.JSONDecodeError as problem:
                    raise UserError(f"{path}:{number}: not JSON: {problem}") from None
    else:
        rows = [(f"seed task {index}", row) for index, row in enumerate(source)]
    if not rows:
        raise UserError("there are no seed tasks; give at least one, better dozens of varied ones")
    return [_seed_task(row, where) for where, row in rows]


def _seed_task(row: Any, where: str) -> Instruction:
    if isinstance(row, Example):
        row = row.prompt if isinstance(row.prompt, str) else row.prompt[-1].get("content")
    if isinstance(row, str):
        row = Instruction(row)
    elif isinstance(row, Mapping):
        nested = (row.get("instances") or [{}])[0]
        row = Instruction(
            row.get("instruction") or "",
            row.get("input") or nested.get("input") or "",
            row.get("perplexity", row.get("ppl")),
        )
    if not isinstance(row, Instruction) or not isinstance(row.instruction, str) or not row.instruction.strip():
        raise UserError(f"{where} has no instruction; give a text, or a record with the field 'instruction'")
    return row


# instructions


def propose_instructions(
    language: Language,
    seed_tasks: Sequence[Instruction],
    n: int,
    *,
    demonstrations: int = 5,
    weights: Literal["uniform", "perplexity"] = "uniform",
    meta_prompt: str = META_PROMPT,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 1000,
    requests: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> list[Instruction]:
    """Let a model continue a numbered list of tasks that begins with sampled seeds.

    Args:
        language: model and tokenizer; it is asked in plain text.
        seed_tasks: what demonstrations are sampled from, without replacement.
        n: instructions wanted; fewer come when `requests` are used up.
        demonstrations: seeds in one request.
        weights: of the seeds: alike, or 1/perplexity, which a seed has, or else gets from `language`.
        meta_prompt: what stands before the list.
        temperature, top_p, max_new_tokens, batch_size: see `generate`.
        requests: most requests; None: n, and at least 4.
        seed: of demonstrations and generation.

    Raises:
        UserError: no seed tasks.
    """
    tasks = read_seed_tasks(seed_tasks)
    rng = np.random.default_rng(seed)
    chance = None
    if weights == "perplexity":
        missing = perplexities(language, [t.text for t in tasks if t.perplexity is None])
        known = [t.perplexity if t.perplexity is not None else missing.pop(0) for t in tasks]
        chance = 1 / np.asarray(known)
        chance = chance / chance.sum()
    found: list[Instruction] = []
    left = max(4, n) if requests is None else requests
    while len(found) < n and left > 0:
        # Each request brings about 20 tasks; no more requests at a time than are likely to be needed.
        count = min(left, batch_size, max(1, math.ceil((n - len(found)) / 10)))
        left -= count
        prompts = []
        for _ in range(count):
            chosen = rng.choice(len(tasks), size=min(demonstrations, len(tasks)), replace=False, p=chance)
            prompts.append(meta_prompt + _listed([tasks[index] for index in chosen]))
        drawn = generate(
            language,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=int(rng.integers(2**31)),
            batch_size=batch_size,
        )
        found += [task for own in drawn for task in parse_instructions(own[0].text)]
    return found[:n]


def _listed(tasks: Sequence[Instruction]) -> str:
    """A list of tasks up to where the next one begins."""
    items = [
        f"{k}. Instruction: {t.instruction}\n{k}. Input:\n{t.input or '<noinput>'}" for k, t in enumerate(tasks, 1)
    ]
    return "\n###\n".join([*items, f"{len(tasks) + 1}. Instruction:"])


def parse_instructions(text: str) -> list[Instruction]:
    """Tasks from the continuation of a numbered list, without the last one, which may have been cut.

    A part without its ``Input:`` is dropped; the input ``<noinput>`` is none.
    """
    found = []
    for part in text.split("###")[:-1]:
        match = re.fullmatch(r"\s*(?:\d+\.\s*)?(?:Instruction:)?(.*?)\n\s*(?:\d+\.\s*)?Input:(.*)", part, re.DOTALL)
        if match is not None:
            given = match[2].strip()
            found.append(Instruction(match[1].strip(), "" if given.lower().strip("<>. ") == "noinput" else given))
    return found


_TOOLS = re.compile(
    r"\b(images?|graphs?|pictures?|photos?|files?|maps?|draw|plots?|go to|videos?|audio|music|diagrams?|flowcharts?)\b",
    re.IGNORECASE,
)
INSTRUCTION_RULES: Mapping[str, Callable[[Instruction], bool]] = {
    "length": lambda task: not 4 <= len(task.instruction.split()) <= 150,
    "tools": lambda task: _TOOLS.search(task.instruction) is not None,
    "beginning": lambda task: re.match(r"[A-Za-z0-9]", task.instruction) is None,
    "url": lambda task: re.search(r"https?://|www\.", task.text) is not None,
    "label": lambda task: re.search(r"\b(Instruction|Input):", task.text) is not None,
    "noinput": lambda task: "noinput" in task.text.lower(),
}

_TURN = re.compile(r"\n\s*(Human|User|Assistant|Question|Instruction|Input|Q|###[^\n:]*):", re.IGNORECASE)
_OPTION = re.compile(r"^\s*(\(?[A-Da-d]\)|[A-Da-d]\.)\s", re.MULTILINE)
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]")
RESPONSE_RULES: Mapping[str, Callable[[SelfPair], bool]] = {
    "empty": lambda pair: not pair.response.strip(),
    "turn": lambda pair: _TURN.search("\n" + pair.response) is not None,
    "choices": lambda pair: "answer choices" in pair.response.lower(),
    "options": lambda pair: _OPTION.search(pair.response) is not None,
    "question": lambda pair: any(part.rstrip().endswith("?") for part in re.split(r"\n\s*\n", pair.response)[1:]),
    "noinput": lambda pair: "noinput" in pair.response.lower(),
    "cjk": lambda pair: _CJK.search(pair.response) is not None,
    "repeated": lambda pair: bool(pair.input.strip()) and pair.input.strip() in pair.instruction,
}


def apply_rules(items: Sequence[Any], rules: Mapping[str, Callable[[Any], bool]]) -> tuple[list[Any], dict[str, int]]:
    """Drop what a rule is true of, and count the drops of every rule; the first rule that is true counts."""
    kept, counts = [], dict.fromkeys(rules, 0)
    for item in items:
        broken = next((name for name, rule in rules.items() if rule(item)), None)
        if broken is None:
            kept.append(item)
        else:
            counts[broken] += 1
    return kept, counts


def rouge_l(a: str, b: str) -> float:
    """ROUGE-L's F-measure of two texts, on lower-case words of letters and digits, as ``rouge_score`` without stemming.

    Twice the longest common subsequence over the sum of the lengths; 0 when a text has no word.
    """
    return _overlap(_words(a), _words(b))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _overlap(a: list[str], b: list[str]) -> float:
    return 2 * LCSseq.similarity(a, b) / (len(a) + len(b)) if a and b else 0.0


def drop_duplicates(
    instructions: Sequence[Instruction], seeds: Sequence[Instruction] = (), *, bound: float = 0.7
) -> list[Instruction]:
    """In order, the instructions whose ROUGE-L to every seed and every one kept before is at most `bound`."""
    known = [_words(seed.instruction) for seed in seeds]
    kept = []
    for task in instructions:
        words = _words(task.instruction)
        # Lengths bound the likeness, at next to no cost.
        if all(
            2 * min(len(words), len(other)) <= bound * (len(words) + len(other)) or _overlap(words, other) <= bound
            for other in known
        ):
            kept.append(task)
            known.append(words)
    return kept


# responses and grades


def respond(
    language: Language,
    instructions: Sequence[Instruction],
    *,
    chat: bool = False,
    temperature: float = 1.0,
    top_p: float = 0.95,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
) -> list[SelfPair]:
    """Answer instructions without demonstrations: as plain text with a newline behind, or by the chat template."""
    drawn = generate(
        language,
        [_prompt(task.text, chat) for task in instructions],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        batch_size=batch_size,
        seed=seed,
    )
    return [
        SelfPair(task.instruction, task.input, own[0].text.strip())
        for task, own in zip(instructions, drawn, strict=True)
    ]


def parse_score(text: str) -> int | None:
    """The score that a grading begins with, else the number before ``||``; None without one, or outside 1 to 10.

    Decimals are rounded, halves to even. ``"9||good"`` is 9, ``" 8.6||"`` 9, ``"Score: 7"`` and ``"11"`` None.
    """
    match = re.match(r"\s*(\d+(?:\.\d+)?)", text) or re.search(r"(\d+(?:\.\d+)?)\s*\|\|", text)
    if match is None:
        return None
    score = round(float(match[1]))
    return score if 1 <= score <= 10 else None


class Grades(NamedTuple):
    """What a grader says of a pair, 1 to 10; None where it could not be understood, or was not asked."""

    quality: float | None
    following: float | None


@dataclass(frozen=True)
class SelfAssessor:
    """A language model that grades pairs by two prompts: the response's quality, and how it follows the instruction.

    Args:
        language: model and tokenizer.
        chat: ask by the chat template, instead of in plain text.
        quality_prompt, following_prompt: with ``{instruction}`` and ``{response}``; None does not ask for that grade.
        expected: False samples a grading and reads its score (as the official script). True: the mean of 1 to 10 by the
            probabilities of ``"1||"`` to ``"10||"``, a float, which is always there and has no sampling noise.
        temperature, max_new_tokens, batch_size: of the sampling.

    Raises:
        UserError: ``chat`` and no chat template, when pairs are graded.
    """

    language: Language
    chat: bool = False
    quality_prompt: str | None = QUALITY_PROMPT
    following_prompt: str | None = FOLLOWING_PROMPT
    expected: bool = False
    temperature: float = 1.0
    max_new_tokens: int = 32
    batch_size: int = 16

    def score(self, pairs: Sequence[SelfPair], *, seed: int = 0) -> list[Grades]:
        """Both grades of every pair, in order."""
        found = []
        for place, prompt in enumerate((self.quality_prompt, self.following_prompt)):
            if prompt is None or not pairs:
                found.append([None] * len(pairs))
                continue
            filled = [_filled(prompt, pair) for pair in pairs]
            texts = [_prompt(text, True) for text in filled] if self.chat else filled
            found.append(self._expected(texts) if self.expected else self._sampled(texts, (seed, place)))
        return [Grades(*both) for both in zip(*found, strict=True)]

    def _sampled(self, prompts: Sequence[Any], seed: tuple[int, int]) -> list[Any]:
        drawn = generate(
            self.language,
            prompts,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            batch_size=self.batch_size,
            seed=int(np.random.SeedSequence(seed).generate_state(1)[0]),
        )
        return [parse_score(own[0].text) for own in drawn]

    def _expected(self, prompts: Sequence[Any]) -> list[Any]:
        scores = [tuple(self.language.tokenizer(f"{k}||", add_special_tokens=False)["input_ids"]) for k in range(1, 11)]
        groups = [Group(prompt_tokens(self.language, p, f"grading {i}"), tuple(scores)) for i, p in enumerate(prompts)]
        sums = _sums(self.language, groups).reshape(-1, 10)
        return (sums.softmax(1) @ torch.arange(1.0, 11.0, dtype=sums.dtype)).tolist()  # type: ignore[no-any-return]


def _filled(prompt: str, pair: SelfPair) -> str:
    # Not str.format: braces in a text, or a field's name in a response, must stay what they are.
    texts = {"instruction": pair.text, "response": pair.response}
    return re.sub(r"\{(instruction|response)\}", lambda match: texts[match[1]], prompt)


def _sums(language: Language, groups: Sequence[Group]) -> torch.Tensor:
    """(completions,), float64: log-probabilities, without a graph."""
    training = language.model.training
    language.model.eval()
    try:
        with torch.no_grad():
            parts = [
                completion_logps(language.model, [groups[i] for i in run]).sum().double().cpu()
                for run in batches(groups, 4096)
            ]
    finally:
        language.model.train(training)
    return torch.cat(parts)


def perplexities(language: Language, texts: Sequence[str]) -> list[float]:
    """``exp`` of the mean negative log-probability of a text's tokens after its first; infinite for a single token."""
    ids = [tuple(language.tokenizer(text)["input_ids"]) for text in texts]
    groups = [Group(own[:1], (own[1:],)) for own in ids if len(own) > 1]
    sums = iter(_sums(language, groups).tolist() if groups else ())
    return [math.exp(-next(sums) / (len(own) - 1)) if len(own) > 1 else math.inf for own in ids]


def grades_above(
    pairs: Sequence[SelfPair], threshold: float = 8, *, by: Sequence[str] = ("quality", "following")
) -> list[SelfPair]:
    """The pairs whose grades all exceed the threshold; one without a grade is dropped.

    Args:
        pairs: graded.
        threshold: 8 leaves 9 and 10.
        by: which grades count; one alone is an ablation of the paper.
    """
    return [p for p in pairs if all((grade := getattr(p, name)) is not None and grade > threshold for name in by)]


def below_perplexity(language: Language, pairs: Sequence[SelfPair], bound: float = 50.0) -> list[SelfPair]:
    """The paper's ablation: the pairs whose response, and whose instruction with response, are both less perplexing."""
    alone = perplexities(language, [pair.response for pair in pairs])
    both = perplexities(language, [f"{pair.text}\n{pair.response}" for pair in pairs])
    return [pair for pair, a, b in zip(pairs, alone, both, strict=True) if a < bound and b < bound]


def fine_tune(
    language: Language,
    pairs: Sequence[SelfPair],
    *,
    chat: bool = True,
    peft_config: LoraConfig | None = None,
    epochs: float = 2,
    steps: int | None = None,
    batch: int = 8,
    learning_rate: float = 1e-4,
    max_length: int = 1024,
    seed: int = 0,
) -> Language:
    """Supervised fine-tuning of a copy by LoRA, on the responses' tokens alone, merged into a plain model.

    Args:
        language: model and tokenizer; left as they are.
        pairs: what to learn.
        chat: render pairs by the chat template.
        peft_config: None: rank 16 on all linear layers.
        epochs, steps: passes over the pairs, or optimizer steps in their place.
        batch, learning_rate: AdamW's, the rate constant after 5 steps.
        max_length: tokens of a pair; a longer instruction loses its beginning.
        seed: of adapter and order.
    """
    config = peft_config or LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    samples = [
        Sample(encode(pair.example(chat=chat), language.tokenizer, max_length=max_length).group, (1.0,))
        for pair in pairs
    ]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: Any = get_peft_model(copy.deepcopy(language.model), copy.deepcopy(config))  # type: ignore[arg-type]
    batch = min(batch, len(samples))
    optimise(
        model,
        SFT(),
        samples,
        steps=steps or math.ceil(epochs * len(samples) / batch),
        batch=batch,
        learning_rate=learning_rate,
        rng=np.random.default_rng(seed),
    )
    return Language(model.merge_and_unload().eval(), language.tokenizer)


# the loop


@dataclass(frozen=True, eq=False)
class SheepRound:
    """A finished round.

    Attributes:
        round: from 1.
        generated: pairs that passed the rules, with their grades.
        kept: those it was trained on, without what earlier rounds kept.
        counts: proposals, what every rule, duplicates, missing grades and the filter dropped, and what was kept.
        parse_rate: share of the gradings that were understood; 1 when none was asked for.
        precision: share of kept pairs that are true, if the loop was told the truth; else None.
        language: the model that came out, with its tokenizer: an ordinary one.
    """

    round: int
    generated: tuple[SelfPair, ...]
    kept: tuple[SelfPair, ...]
    counts: Mapping[str, int]
    parse_rate: float
    precision: float | None
    language: Language

    @property
    def model(self) -> Any:
        """The model that came out."""
        return self.language.model

    @property
    def yield_(self) -> float:
        """Kept pairs over proposals."""
        return len(self.kept) / self.counts["proposed"]


class ISheep:
    """Iterate over the rounds of I-SHEEP; each is done when it is asked for.

    A round: the generator (the base model, then each round's outcome) proposes instructions; rules and duplicates;
    responses; rules; grades; filter; training, by default of the *base* model on this round's pairs. When nothing
    passes the filter the iteration ends, ``stopped`` says why, and so does the value of its ``StopIteration``.

    The stages can be replaced by callables; the round's `number` and a `seed` come as keywords:
    ``propose(language, n, number=, seed=) -> [Instruction]``, ``answer(language, instructions, number=, seed=) ->
    [SelfPair]``, ``assess(grader, pairs, number=, seed=) -> [Grades]``, ``keep(pairs) -> [SelfPair]``,
    ``train(language, pairs, number=, seed=) -> Language`` (which must not change its input).

    Args:
        model: model and tokenizer, or what `counterproof.language.load` takes.
        seed_tasks: see `read_seed_tasks`.
        n_per_round: proposals in a round, before the rules (the paper: 10,000).
        rounds: at most so many.
        threshold: both grades must exceed it; None: pairs are neither graded nor filtered.
        grader: the base model in every round (as the official script), or each round's generator.
        train_from: the base with this round's pairs; the current model with them; or ("all") the base with all rounds'.
        chat: use the chat template in training, and with models that came out of a round. False: plain text.
        duplicates: most ROUGE-L to seeds and to this round's other instructions; None allows any.
        instruction_rules, response_rules: by name, what is true of a bad one.
        peft_config, training: of `fine_tune`; the latter its other options.
        max_new_tokens, batch_size: of responses, of all generation.
        propose, answer, assess, keep, train: see above.
        truth: of a pair, whether it is right, where that is known; only for `SheepRound.precision`.
        out: folder that rounds are kept in, and a run is resumed from; of callables only the names are compared.
        seed: of everything.

    Raises:
        UserError: no seed tasks; chat and no chat template; a peft model; a folder of another run; while iterating: no
            proposals, or gradings of which none has a score.
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        model: Language | str | Path | None,
        seed_tasks: str | Path | Sequence[Any],
        *,
        n_per_round: int = 200,
        rounds: int = 3,
        threshold: float | None = 8,
        grader: Literal["base", "current"] = "base",
        train_from: Literal["base", "current", "all"] = "base",
        chat: bool = True,
        duplicates: float | None = 0.7,
        instruction_rules: Mapping[str, Callable[[Instruction], bool]] = INSTRUCTION_RULES,
        response_rules: Mapping[str, Callable[[SelfPair], bool]] = RESPONSE_RULES,
        peft_config: LoraConfig | None = None,
        training: Mapping[str, Any] | None = None,
        max_new_tokens: int = 512,
        batch_size: int = 16,
        propose: Callable[..., Sequence[Instruction]] | None = None,
        answer: Callable[..., Sequence[SelfPair]] | None = None,
        assess: Callable[..., Sequence[Grades]] | None = None,
        keep: Callable[[Sequence[SelfPair]], Sequence[SelfPair]] | None = None,
        train: Callable[..., Language] | None = None,
        truth: Callable[[SelfPair], bool] | None = None,
        out: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        for name, number in (("n_per_round", n_per_round), ("rounds", rounds)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} is {number!r}; expected a whole number, at least 1")
        if grader not in ("base", "current"):
            raise ValueError(f"grader is {grader!r}; expected 'base' or 'current'")
        if train_from not in ("base", "current", "all"):
            raise ValueError(f"train_from is {train_from!r}; expected 'base', 'current' or 'all'")
        self.seed_tasks = read_seed_tasks(seed_tasks)
        self.base = model if isinstance(model, Language) else load(model)
        if isinstance(self.base.model, PeftModel):
            raise UserError("the model is one of peft; merge its adapter first (merge_and_unload)")
        if chat and self.base.tokenizer.chat_template is None:
            raise UserError(
                "this model's tokenizer has no chat template, which training uses; set tokenizer.chat_template, or "
                "choose chat=False for plain text"
            )
        self.n_per_round, self.rounds, self.threshold, self.seed = n_per_round, rounds, threshold, seed
        self.grader, self.train_from, self.chat, self.duplicates = grader, train_from, chat, duplicates
        self.instruction_rules, self.response_rules = instruction_rules, response_rules
        self.training = dict(training or {})
        self.peft_config, self.max_new_tokens, self.batch_size = peft_config, max_new_tokens, batch_size
        self.propose, self.answer, self.assess = (
            propose or self._propose,
            answer or self._answer,
            assess or self._assess,
        )
        self.keep = keep or (partial(grades_above, threshold=threshold) if threshold is not None else list)
        self.train = train or self._train
        self.truth = truth
        self.out = None if out is None else Path(out)
        self.stopped: str | None = None

    def _propose(self, language: Language, n: int, *, number: int, seed: int) -> list[Instruction]:
        return propose_instructions(language, self.seed_tasks, n, batch_size=self.batch_size, seed=seed)

    def _answer(self, language: Language, tasks: Sequence[Instruction], *, number: int, seed: int) -> list[SelfPair]:
        chat = self.chat and number > 1  # the base has not learnt the template
        return respond(
            language, tasks, chat=chat, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size, seed=seed
        )

    def _assess(self, language: Language, pairs: Sequence[SelfPair], *, number: int, seed: int) -> list[Grades]:
        chat = self.chat and number > 1 and self.grader == "current"
        return SelfAssessor(language, chat=chat, batch_size=self.batch_size).score(pairs, seed=seed)

    def _train(self, language: Language, pairs: Sequence[SelfPair], *, number: int, seed: int) -> Language:
        return fine_tune(language, pairs, chat=self.chat, peft_config=self.peft_config, seed=seed, **self.training)

    def __iter__(self) -> Iterator[SheepRound]:
        """Each round; those that the folder has are read, not made again."""
        self.stopped = None
        self._claim()
        current, earlier = self.base, list[SelfPair]()
        for number in range(1, self.rounds + 1):
            state = self._read(number)
            if state is None:
                state = self._run(number, current, earlier)
            if state is None:
                return self.stopped
            current = state.language
            earlier += state.kept
            yield state
        return None

    def _run(self, number: int, current: Language, earlier: Sequence[SelfPair]) -> SheepRound | None:
        """A round, written to the folder when it is done; None when nothing passed."""
        seeds = [int(s) for s in np.random.SeedSequence([self.seed, number]).generate_state(4)]
        pairs, counts, parsed = self._made(number, current, seeds)
        kept = list(self.keep(pairs))
        counts |= {"filter": len(pairs) - len(kept), "kept": len(kept)}
        if not kept:
            self.stopped = (
                f"round {number}: nothing is left to train on ("
                + ", ".join(f"{name} {count}" for name, count in counts.items() if count or name == "kept")
                + f"; threshold {self.threshold})"
            )
            return None
        start = current if self.train_from == "current" else self.base
        data = [*earlier, *kept] if self.train_from == "all" else kept
        language = self.train(start, data, number=number, seed=seeds[3])
        right = None if self.truth is None else sum(map(bool, map(self.truth, kept))) / len(kept)
        state = SheepRound(number, tuple(pairs), tuple(kept), counts, parsed, right, language)
        self._write(state)
        return state

    def _made(
        self, number: int, current: Language, seeds: Sequence[int]
    ) -> tuple[list[SelfPair], dict[str, int], float]:
        """Pairs with grades, counts, and the parse rate; read, if the round was stopped after they were made."""
        part = None if self.out is None else self.out / f"round-{number}.part" / "pairs.json"
        if part is not None and part.is_file():
            known = json.loads(part.read_text(encoding="utf-8"))
            return [SelfPair(**row) for row in known["pairs"]], known["counts"], known["parse_rate"]
        proposed = list(self.propose(current, self.n_per_round, number=number, seed=seeds[0]))
        if not proposed:
            raise UserError(f"round {number}: the model proposed no instruction in the list's form; use another model")
        tasks, dropped = apply_rules(proposed, self.instruction_rules)
        counts = {"proposed": len(proposed)} | {f"instruction/{name}": count for name, count in dropped.items()}
        if self.duplicates is not None:
            left = drop_duplicates(tasks, self.seed_tasks, bound=self.duplicates)
            counts["duplicate"], tasks = len(tasks) - len(left), left
        answered = list(self.answer(current, tasks, number=number, seed=seeds[1])) if tasks else []
        pairs, dropped = apply_rules(answered, self.response_rules)
        counts |= {f"response/{name}": count for name, count in dropped.items()}
        parsed = 1.0
        if self.threshold is not None and pairs:
            grader = current if self.grader == "current" else self.base
            grades = self.assess(grader, pairs, number=number, seed=seeds[2])
            pairs = [replace(p, quality=g[0], following=g[1]) for p, g in zip(pairs, grades, strict=True)]
            missing = Counter(grade is None for both in grades for grade in both)
            parsed = missing[False] / missing.total()
            counts["ungraded"] = sum(None in both for both in grades)
            if parsed == 0:
                raise UserError(
                    f"round {number}: none of {missing.total()} gradings has a score from 1 to 10; this model cannot "
                    "grade in that form: give assess= a SelfAssessor with expected=True, or another grader"
                )
        if part is not None:
            part.parent.mkdir(parents=True, exist_ok=True)
            with replacing(part) as stream:
                json.dump({"pairs": [asdict(p) for p in pairs], "counts": counts, "parse_rate": parsed}, stream)
        return pairs, counts, parsed

    # the folder

    def _claim(self) -> None:
        """Make the folder ours, or find that it is."""
        if self.out is None:
            return
        digest = hashlib.sha256()
        for name, value in sorted(self.base.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        stages = [self.propose, self.answer, self.assess, self.keep, self.train]
        same = {
            "model": digest.hexdigest(),
            "seed_tasks": hashlib.sha256(repr(self.seed_tasks).encode()).hexdigest(),
            "rules": [*self.instruction_rules, *self.response_rules],
            "stages": [getattr(getattr(f, "func", f), "__qualname__", type(f).__name__) for f in stages],
            "training": repr((self.peft_config, sorted(self.training.items()))),
        }
        names = ("n_per_round", "threshold", "grader", "train_from", "chat", "duplicates", "max_new_tokens", "seed")
        same |= {name: getattr(self, name) for name in names}
        mark = self.out / "i-sheep.json"
        if mark.is_file():
            known = json.loads(mark.read_text(encoding="utf-8"))
            if known != same:
                differ = ", ".join(name for name in same if known.get(name) != same[name])
                raise UserError(f"{self.out} holds another run (its {differ} differ); choose another folder")
            return
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is no run of I-SHEEP; choose a new folder")
        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(mark) as stream:
            json.dump(same, stream, indent=1)

    def _write(self, state: SheepRound) -> None:
        if self.out is None:
            return
        part = self.out / f"round-{state.round}.part"
        state.model.save_pretrained(part / "model")
        state.language.tokenizer.save_pretrained(part / "model")
        rest = {name: getattr(state, name) for name in ("round", "counts", "parse_rate", "precision")}
        with replacing(part / "round.json") as stream:
            lists = {name: [asdict(p) for p in getattr(state, name)] for name in ("generated", "kept")}
            json.dump(rest | lists, stream, indent=1)
        (part / "pairs.json").unlink()
        part.rename(self.out / f"round-{state.round}")

    def _read(self, number: int) -> SheepRound | None:
        folder = None if self.out is None else self.out / f"round-{number}"
        if folder is None or not folder.is_dir():
            return None
        known = json.loads((folder / "round.json").read_text(encoding="utf-8"))
        for name in ("generated", "kept"):
            known[name] = tuple(SelfPair(**row) for row in known[name])
        base: Any = self.base.model
        model = type(base).from_pretrained(folder / "model", dtype=base.dtype).to(base.device).eval()
        return SheepRound(**known, language=Language(model, self.base.tokenizer))


@dataclass(frozen=True)
class ISheepTraining:
    """I-SHEEP as the method ``i-sheep`` of `counterproof.preference.train`: the examples' prompts are the seed tasks.

    Args:
        n_per_round, rounds, threshold, grader, train_from, chat, max_new_tokens: see `ISheep`.
    """

    n_per_round: int = 200
    rounds: int = 3
    threshold: float | None = 8
    grader: Literal["base", "current"] = "base"
    train_from: Literal["base", "current", "all"] = "base"
    chat: bool = True
    max_new_tokens: int = 512
    name: ClassVar[str] = "i-sheep"

    def fit(self, language: Language, examples: Sequence[Example], *, settings: TrainSettings, out: Path) -> Trained:
        """Do the rounds, kept in ``rounds`` in the folder, each trained by transformers' Trainer; save the last model.

        Args:
            language: the base model and its tokenizer.
            examples: their prompts are seeds; completions play no part.
            settings: of each round's training; nothing is held out.
            out: folder that the merged model, tokenizer and history are written to.

        Raises:
            UserError: as `ISheep`, and when nothing passes the filter in the first round.
        """
        given = asdict(self)

        def trained(start: Language, pairs: Sequence[SelfPair], *, number: int, seed: int) -> Language:
            folder = out / "training"
            if (folder / "result.json").exists():
                shutil.rmtree(folder)
            copied = Language(copy.deepcopy(start.model), start.tokenizer)
            data = [pair.example(chat=self.chat) for pair in pairs]
            own = replace(settings, seed=seed % 2**31)
            model: Any = train(copied, data, method=SFT(), out=folder, held_out=(), settings=own).model
            shutil.rmtree(folder)
            return Language(
                (model.merge_and_unload() if isinstance(model, PeftModel) else model).eval(), start.tokenizer
            )

        loop = ISheep(language, examples, train=trained, out=out / "rounds", seed=settings.seed, **given)
        history: list[dict[str, float]] = []
        last = language
        for state in loop:
            history.append({"step": state.round, "yield": state.yield_, "parse_rate": state.parse_rate, **state.counts})
            last = state.language
        if not history:
            raise UserError(loop.stopped or "no round was done")
        notes = (loop.stopped,) if loop.stopped else ()
        finished = Trained(last.model, last.tokenizer, out, tuple(history), history[-1], notes)
        save(finished, out, {"method": self.name, "objective": repr(self)})
        return finished
