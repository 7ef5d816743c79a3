"""D2O: learn from responses that were marked bad, with the model's own samples in place of a good one.

Paper: arXiv 2403.03419 (abstracts of v1 and v2; the loss and the conditions of v2 as a course excerpt quotes them).
Read beside: no official repository was found.
Deviations: self-samples that are equal or nearly equal to the negative are dropped; the paper's decoding settings are
    not known, so samples are drawn from the whole distribution at temperature 1 unless told otherwise; when and from
    what v1's online variant draws anew is not known, `OnlineSamples` draws from the current policy at fixed intervals.
"""

import copy
import json
import math
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, overload

from counterproof.errors import UserError, extra

with extra("preference"):
    import torch
    import torch.nn.functional as F
    from peft import PeftModel
    from torch import Tensor, nn
    from transformers import TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

from counterproof.language import Group, Language, Logps
from counterproof.language.sampling import encode as prompt_tokens
from counterproof.language.sampling import generate
from counterproof.preference.data import Example, Text, encode
from counterproof.preference.forward import referenced
from counterproof.preference.objectives import Batch, Objective, Output, Sample, log_ratios, not_negative
from counterproof.preference.trainer import (
    PreferenceTrainer,
    Trained,
    TrainSettings,
    lora_config,
    rows_per_step,
    save,
    training_arguments,
)

__all__ = [
    "D2O",
    "D2OTraining",
    "GradientAscent",
    "OnlineSamples",
    "SelfSamples",
    "SelfSampling",
    "Unlikelihood",
    "self_sample",
    "two_references",
]

NEGATIVE, SELF_SAMPLE = -1.0, 0.0  # scores; what a human called good has more
FORGOTTEN = -1.0  # nats per token that a self-sample may lose
UNEQUAL = 0.3  # share by which mean lengths may differ before it is said
APPLICATION = 0x0D20D20D  # marks a cache as one of ours


# the objectives


@dataclass(frozen=True)
class D2O(Objective):
    """Distributional dispreference, ``-log sigmoid(beta mean_i D_i - alpha D_l)``.

    ``D_i`` are the log-ratios of a prompt's K self-samples, ``D_l`` that of its negative (arXiv 2403.03419). The mean
    stands inside the log-sigmoid: with ``L_i = -log sigmoid(beta D_i - alpha D_l)``, the losses with a single sample
    (DPO's where alpha = beta), convexity gives ``D2O <= mean_i L_i``, equal when all D_i are. So the objective that is
    maximised, ``-D2O``, is an upper bound of the mean of DPO's.

    A group is one negative, score -1, and at least one self-sample, score 0, in any order and of any number: see
    `self_sample`. A completion that somebody called good (a score above 0) is refused: D2O takes none. The log-ratios
    are sums over tokens, so long self-samples weigh more than a short negative. Metrics, beside TRL's (chosen: the mean
    over a prompt's self-samples):

    - ``self_samples/log_ratio``: mean D of the self-samples, in nats;
    - ``self_samples/log_ratio_per_token``: the same per token; below about -1 the model is forgetting what it could do;
    - ``self_samples/forgotten``: share of the self-samples that have lost more than 1 nat per token.

    Args:
        alpha: weight of the negative's log-ratio, >= 0; 0 leaves the anchor alone.
        beta: weight of the self-samples' mean log-ratio (the anchor), >= 0; 0 leaves bounded forgetting.

    Raises:
        ValueError: a weight that is negative or not finite, or both 0.
    """

    alpha: float = 0.1
    beta: float = 0.1
    name: ClassVar[str] = "d2o-samples"
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})

    def __post_init__(self) -> None:
        not_negative(self.alpha, "alpha")
        not_negative(self.beta, "beta")
        if self.alpha == self.beta == 0:
            raise ValueError("alpha and beta are both 0, which leaves nothing to learn; make one of them positive")

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,).

        Raises:
            UserError: a group without negative or self-sample, or with a completion called good, by name; no reference.
        """
        negative, sampled = _dispreferred(batch)
        ratios = log_ratios(policy, reference)

        def per_prompt(values: Tensor) -> Tensor:
            """(groups,): the mean of (n,) over each prompt's self-samples."""
            return values.new_zeros(batch.groups).index_add(0, owner, values[sampled]) / count

        owner = batch.group[sampled]
        count = torch.bincount(owner, minlength=batch.groups).to(ratios)
        anchor, forgetting = per_prompt(ratios), ratios[negative]
        margins = self.beta * anchor - self.alpha * forgetting
        sums, rates = policy.sum().detach(), (ratios.detach() / policy.lengths)[sampled]
        metrics = {
            "rewards/chosen": self.beta * anchor,
            "rewards/rejected": self.alpha * forgetting,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).to(margins),
            "logps/chosen": per_prompt(sums),
            "logps/rejected": sums[negative],
            "self_samples/log_ratio": anchor,
            "self_samples/log_ratio_per_token": rates,
            "self_samples/forgotten": (rates < FORGOTTEN).to(rates),
        }
        return Output(-F.logsigmoid(margins), {name: float(value.detach().mean()) for name, value in metrics.items()})


def _dispreferred(batch: Batch) -> tuple[Tensor, Tensor]:
    """(groups,) indices of the negatives, (n,) which completions are self-samples."""
    score = batch.score
    positive = (score > SELF_SAMPLE).nonzero()
    if len(positive):
        raise UserError(
            f"{batch.name(int(batch.group[positive[0, 0]]))}has a completion that is marked good, and D2O takes no "
            "human positives; make its data of the negatives with self_sample (on the command line: method d2o)"
        )
    bad = score < SELF_SAMPLE
    negatives = torch.bincount(batch.group[bad], minlength=batch.groups)
    samples = torch.bincount(batch.group[~bad], minlength=batch.groups)
    odd = ((negatives != 1) | (samples == 0)).nonzero()
    if len(odd):
        group = int(odd[0, 0])
        raise UserError(
            f"{batch.name(group)}has {int(negatives[group])} negatives (score -1) and {int(samples[group])} "
            "self-samples (score 0); D2O needs one negative and at least one self-sample for each prompt"
        )
    return bad.nonzero()[:, 0], ~bad


@dataclass(frozen=True)
class GradientAscent(Objective):
    """Gradient ascent on the negatives' likelihood, ``+s_l``: what D2O is compared with. Unbounded; it collapses.

    The negative of a group is its completion with the lowest score, the first of equals.
    """

    name: ClassVar[str] = "gradient-ascent"

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,).

        Raises:
            UserError: a group of nothing but a good completion.
        """
        sums = policy.sum()[_lowest(batch)]
        return Output(sums, {"logps/rejected": float(sums.detach().mean())})


@dataclass(frozen=True)
class Unlikelihood(Objective):
    """Unlikelihood of the negatives' tokens, ``-sum_t log(1 - p_t)`` (Welleck et al. 2019, arXiv 1908.04319, eq. 4).

    The negative of a group is its completion with the lowest score, the first of equals.
    """

    name: ClassVar[str] = "unlikelihood"

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,).

        Raises:
            UserError: a group of nothing but a good completion.
        """
        negative = _lowest(batch)
        # A token the model is certain of would cost infinitely much: kept finite, a hair below certainty.
        certain = -torch.finfo(policy.token.dtype).eps
        losses = policy.total(-torch.log(-torch.expm1(policy.token.clamp(max=certain))))[negative]
        return Output(losses, {"logps/rejected": float(policy.sum().detach()[negative].mean())})


def _lowest(batch: Batch) -> Tensor:
    """(groups,): indices of the negatives of any kind of group."""
    lowest = replace(batch, score=-batch.score).best()
    alone = torch.bincount(batch.group, minlength=batch.groups) == 1
    odd = (alone & (batch.score[lowest] > 0.5)).nonzero()
    if len(odd):
        raise UserError(
            f"{batch.name(int(odd[0, 0]))}has a good completion and no bad one; leave out rows with label true"
        )
    return lowest


# self-samples


@dataclass(frozen=True, kw_only=True)
class SelfSampling:
    """What `self_sample` did.

    Attributes:
        negatives: rows with a negative.
        ignored: rows left out because their completion is marked good (label true).
        prompts: different prompts; rows with the same prompt share its samples.
        cached: prompts that were answered from the cache.
        generated: tokens that were generated for the others.
        equal, near: samples dropped because they are equal, or nearly, to their row's negative.
        capped: share of the samples that stopped at `max_new_tokens` without an end.
        sample_length, negative_length: mean tokens, ends included.
        cut: prompts that lost their beginning to fit `max_length`.
        kept: of a later drawing, rows that kept their samples because all new ones were dropped.
    """

    negatives: int
    ignored: int
    prompts: int
    cached: int
    generated: int
    equal: int
    near: int
    capped: float
    sample_length: float
    negative_length: float
    cut: int
    kept: int = 0

    @property
    def unequal(self) -> bool:
        """Whether the mean lengths differ by more than 30 % of the longer."""
        return abs(self.sample_length - self.negative_length) > UNEQUAL * max(self.sample_length, self.negative_length)

    @property
    def text(self) -> str:
        """The same in words."""
        parts = [
            f"{self.negatives:,} negatives ({self.prompts:,} prompts, {self.cached:,} of them answered from the cache)",
            f"{self.ignored:,} rows marked good ignored",
            f"{self.generated:,} tokens generated",
            f"{self.equal:,} samples equal to their negative and {self.near:,} nearly equal dropped",
            f"{self.capped:.1%} of the samples cut off",
            f"mean length {self.sample_length:.1f} (samples), {self.negative_length:.1f} (negatives)",
        ]
        if self.cut:
            parts.append(f"{self.cut:,} prompts cut at their beginning")
        if self.kept:
            parts.append(f"{self.kept:,} rows kept their samples: all new ones were dropped")
        return "; ".join(parts)


class _Row(NamedTuple):
    """A negative, and what the model is asked for its samples (with an instruction, more than it is scored under)."""

    ask: tuple[int, ...]
    prompt: tuple[int, ...]
    negative: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class _Decoding:
    """How samples are drawn."""

    k: int
    max_new_tokens: int
    temperature: float
    top_p: float
    near: float
    batch_size: int

    def __post_init__(self) -> None:
        for name in ("k", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature is {self.temperature!r}; samples need a positive one (1: the model's own)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected more than 0, at most 1")
        if not 0 < self.near <= 1:
            raise ValueError(f"near is {self.near!r}; expected more than 0, at most 1 (only equal samples are dropped)")


class SelfSamples(Sequence[Sample]):
    """Negatives with the model's own samples, as token ids: what `D2O` is trained on.

    Each `Sample` is a prompt, its self-samples (score 0) and its negative (score -1), the last. Give it to
    `PreferenceTrainer` or `optimise` as it is, or with references from `two_references`.

    Attributes:
        report: what was drawn, dropped and ignored.
    """

    def __init__(
        self, samples: Sequence[Sample], report: SelfSampling, rows: Sequence[_Row], how: _Decoding, seed: int
    ):
        self._samples, self.report, self._rows, self._how, self._seed = tuple(samples), report, tuple(rows), how, seed

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self._samples[index]

    def __len__(self) -> int:
        return len(self._samples)

    def redrawn(self, language: Language, number: int) -> "SelfSamples":
        """The same rows with new samples from the model as it is now, without references; nothing is cached.

        A row whose new samples are all equal or nearly equal to its negative keeps those it has.

        Args:
            language: model and tokenizer.
            number: of the drawing, from 1; each has noise of its own.
        """
        drawn, counts = _drawn(language, self._rows, self._how, (self._seed, number), None, None)
        return _assembled(self._rows, drawn, counts, self._how, self._seed, before=self)


def self_sample(
    language: Language,
    examples: Iterable[Example],
    *,
    k: int = 11,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    near: float = 0.9,
    instruction: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> SelfSamples:
    """Draw k answers of the model itself to the prompt of every negative: once, before training.

    Of pairs only the rejected completion is used, of rankings the one with the lowest score, of unpaired rows those
    with label false; what was called good is never read. Everything is kept as token ids, and what a chat template
    renders behind an answer's end token is left out, since a sample ends there. With a temperature other than 1, a
    `top_p` below 1 or an instruction, samples are not from the model's own distribution; the loss takes them as well.

    Args:
        language: model and tokenizer; the model as it is, adapters included.
        examples: from `counterproof.preference.data.read`; pairs, unpaired or ranked.
        k: samples for each different prompt.
        max_new_tokens: longest sample, its end included.
        temperature, top_p: of the sampling.
        near: drop samples that share so much with their row's negative, from 0 to 1: twice the length of the longest
            common subsequence of tokens over the sum of both lengths (ROUGE-L's F), ends aside. 1 drops only equals.
        instruction: put before the prompt for sampling (chat: in the system message), and not for scoring.
        max_length: tokens of prompt and negative; a longer prompt loses its beginning. None: no limit.
        seed: of the samples. A prompt's samples depend on it and on the prompt's tokens, not on where it stands.
        cache: file (SQLite) that samples are kept in as they come, by model, prompt, decoding settings and seed; an
            interrupted call goes on from there. None: nothing is kept.
        batch_size: sequences in one pass.
        progress: told how many prompts are done and how many there are.

    Returns:
        A row for each negative, and a report.

    Warns:
        UserWarning: the mean lengths of samples and negatives differ by more than 30 %.

    Raises:
        UserError: naming the row: an example without a negative of its own, an empty negative, no sample left after
            dropping; no negative at all; a cache that is not one.
        ValueError: an argument out of its range.
    """
    how = _Decoding(k, max_new_tokens, temperature, top_p, near, batch_size)
    rows: list[_Row] = []
    ignored = cut = 0
    for example in examples:
        negative = _negative(example)
        if negative is None:
            ignored += 1
            continue
        encoded = encode(negative, language.tokenizer, max_length=max_length, trim_after_eos=True)
        (tokens,) = encoded.group.completions
        if not _content(tokens, language.tokenizer.eos_token_id):
            raise UserError(f"{example.where}: the negative is empty; give it text, or drop the record")
        ask = encoded.group.prompt
        if instruction is not None:
            ask = prompt_tokens(language, _instructed(example.prompt, instruction), example.where)
        rows.append(_Row(ask, encoded.group.prompt, tokens, example.where))
        cut += encoded.cut > 0
    if not rows:
        raise UserError(
            f"there is no negative among the examples ({ignored} rows are marked good); give pairs, rankings, or rows "
            "with label false"
        )
    place = None if cache is None else Path(cache)
    drawn, counts = _drawn(language, rows, how, (seed, 0), place, progress)
    made = _assembled(rows, drawn, {**counts, "ignored": ignored, "cut": cut}, how, seed)
    if made.report.unequal:
        warnings.warn(
            f"self-samples have {made.report.sample_length:.1f} tokens on average, negatives "
            f"{made.report.negative_length:.1f}; D2O's log-ratios are sums, so length itself may be learnt. Change "
            "max_new_tokens, or choose negatives of the samples' length",
            stacklevel=2,
        )
    return made


def _negative(example: Example) -> Example | None:
    """The example with nothing but its negative; None for one that is marked good."""
    scores = example.scores
    if example.kind == "unpaired":
        return example if scores[0] == 0 else None
    if example.kind not in ("pair", "ranked"):
        raise UserError(
            f"{example.where}: {example.kind}: nothing says what is bad; give pairs, rankings, or rows with label false"
        )
    if min(scores) == max(scores):
        raise UserError(f"{example.where}: all scores are {scores[0]:g}, so none is the negative; drop the record")
    worst = example.completions[scores.index(min(scores))]
    return replace(example, kind="unpaired", completions=(worst,), scores=(0.0,))


def _instructed(prompt: Text, instruction: str) -> Text:
    if isinstance(prompt, str):
        return instruction + prompt
    if prompt[0]["role"] == "system":
        return [{**prompt[0], "content": f"{instruction}\n\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": instruction}, *prompt]


def _drawn(
    language: Language,
    rows: Sequence[_Row],
    how: _Decoding,
    seed: tuple[int, int],
    cache: Path | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[tuple[int, ...], list[tuple[int, ...]]], dict[str, Any]]:
    """Samples by what is asked, and how many were cached and generated."""
    asks = sorted({row.ask for row in rows}, key=lambda ask: (-len(ask), ask))
    keys = dict.fromkeys(asks, "")
    found: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    with _Cache(cache) if cache is not None else nullcontext() as kept:
        if kept is not None:
            same = (_fingerprint(language), how.k, how.max_new_tokens, how.temperature, how.top_p, seed)
            keys = {ask: blake2b(repr((same, ask)).encode(), digest_size=20).hexdigest() for ask in asks}
            found = {ask: own for ask in asks if (own := kept.get(keys[ask])) is not None}
        cached = len(found)
        todo = [ask for ask in asks if ask not in found]
        at_a_time = max(1, 4 * how.batch_size // how.k)
        generated = 0
        for start in range(0, len(todo), at_a_time):
            part = todo[start : start + at_a_time]
            answers = generate(
                language,
                part,
                samples=how.k,
                max_new_tokens=how.max_new_tokens,
                temperature=how.temperature,
                top_p=how.top_p,
                seed=[int.from_bytes(blake2b(repr((seed, ask)).encode(), digest_size=8).digest()) for ask in part],
                batch_size=how.batch_size,
            )
            new = {ask: [one.tokens for one in own] for ask, own in zip(part, answers, strict=True)}
            if kept is not None:
                kept.put({keys[ask]: own for ask, own in new.items()})
            found |= new
            generated += sum(len(tokens) for own in new.values() for tokens in own)
            if progress is not None:
                progress(cached + start + len(part), len(asks))
    ends = language.tokenizer.eos_token_id
    return found, {"prompts": len(asks), "cached": cached, "generated": generated, "end": ends}


def _assembled(
    rows: Sequence[_Row],
    drawn: dict[tuple[int, ...], list[tuple[int, ...]]],
    counts: dict[str, Any],
    how: _Decoding,
    seed: int,
    before: SelfSamples | None = None,
) -> SelfSamples:
    """Rows with their samples, without those that say what the negative says."""
    end = counts.pop("end")
    samples: list[Sample] = []
    equal = near = capped = kept = 0
    for index, row in enumerate(rows):
        bad = _content(row.negative, end)
        likeness = [_likeness(_content(tokens, end), bad) for tokens in drawn[row.ask]]
        left = [tokens for tokens, like in zip(drawn[row.ask], likeness, strict=True) if like < how.near]
        equal += sum(like == 1 for like in likeness)
        near += sum(how.near <= like < 1 for like in likeness)
        if not left:
            if before is None:
                raise UserError(
                    f"{row.where or f'row {index}'}: all {len(likeness)} self-samples are equal or nearly equal to the "
                    "negative, so none is left; draw more (k), raise temperature or near, or drop the record"
                )
            kept += 1
            left = list(before[index].group.completions[:-1])
        capped += sum(tokens[-1] != end for tokens in left)
        scores = (*(SELF_SAMPLE for _ in left), NEGATIVE)
        samples.append(Sample(Group(row.prompt, (*left, row.negative)), scores, where=row.where))
    sizes = [len(tokens) for sample in samples for tokens in sample.group.completions[:-1]]
    earlier = {} if before is None else {"ignored": before.report.ignored, "cut": before.report.cut}
    report = SelfSampling(
        negatives=len(rows),
        equal=equal,
        near=near,
        kept=kept,
        capped=capped / len(sizes),
        sample_length=sum(sizes) / len(sizes),
        negative_length=sum(len(row.negative) for row in rows) / len(rows),
        **earlier,
        **counts,
    )
    return SelfSamples(samples, report, rows, how, seed)


def _content(tokens: tuple[int, ...], end: int | None) -> tuple[int, ...]:
    return tokens[:-1] if tokens and tokens[-1] == end else tokens


def _likeness(a: Sequence[int], b: Sequence[int]) -> float:
    """ROUGE-L's F of two token sequences; 1 for two empty ones."""
    if not a and not b:
        return 1.0
    if a == b:
        return 1.0
    # The longest common subsequence, a bit for each token of `a` (Hyyro 2004): a row of the usual table at a time.
    places: dict[int, int] = {}
    for index, token in enumerate(a):
        places[token] = places.get(token, 0) | 1 << index
    whole = (1 << len(a)) - 1
    row = whole
    for token in b:
        met = row & places.get(token, 0)
        row = (row + met | row - met) & whole
    return 2 * (len(a) - row.bit_count()) / (len(a) + len(b))


class _Cache:
    """Samples as token ids by key, in an SQLite file: a drawing is there whole, or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.parent.is_dir():
            raise UserError(f"cannot write {path}: there is no folder {path.parent}; make it, or name another file")

    @contextmanager
    def _clear(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            raise UserError(
                f"{self.path} cannot be used as a cache of self-samples ({problem}); nothing of it was changed. Name "
                "another file, or free some space if the disk is full"
            ) from None

    def __enter__(self) -> "_Cache":
        with self._clear():
            self.db = sqlite3.connect(self.path, timeout=60)
            try:
                mark = self.db.execute("PRAGMA application_id").fetchone()[0]
                if mark != APPLICATION:
                    if mark or self.db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                        raise UserError(
                            f"{self.path} is a database of another program; name another file for the cache"
                        )
                    with self.db:
                        self.db.execute(
                            "CREATE TABLE IF NOT EXISTS samples (key TEXT PRIMARY KEY, tokens TEXT NOT NULL)"
                        )
                        self.db.execute(f"PRAGMA application_id = {APPLICATION}")
            except BaseException:
                self.db.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.db.close()

    def get(self, key: str) -> list[tuple[int, ...]] | None:
        with self._clear():
            row = self.db.execute("SELECT tokens FROM samples WHERE key = ?", (key,)).fetchone()
        return None if row is None else [tuple(tokens) for tokens in json.loads(row[0])]

    def put(self, samples: dict[str, list[tuple[int, ...]]]) -> None:
        with self._clear(), self.db:
            self.db.executemany(
                "INSERT OR REPLACE INTO samples VALUES (?, ?)", [(key, json.dumps(own)) for key, own in samples.items()]
            )


def _fingerprint(language: Language) -> str:
    """Digest of the weights and of the tokens that end an answer."""
    digest = blake2b(digest_size=20)
    settings = getattr(language.model, "generation_config", None)
    digest.update(repr((getattr(settings, "eos_token_id", None), language.tokenizer.eos_token_id)).encode())
    for name, value in sorted(language.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# references


def two_references(
    model: nn.Module,
    samples: Sequence[Sample],
    *,
    minus: nn.Module | None = None,
    plus: nn.Module | None = None,
    batch_tokens: int = 4096,
) -> list[Sample]:
    """The samples with their references: self-samples under one frozen model, the negative under another.

    D2O's ``r-`` is a model more harmful than the policy, ``r+`` a more helpful one; in the paper's experiments both are
    the model that training starts from.

    Args:
        model: the policy before training, in place of a reference that is not given; a peft model without its adapters.
        samples: groups as `D2O` takes them; any reference they have is replaced.
        minus, plus: the references of the self-samples and of the negatives.
        batch_tokens: tokens in one forward pass, about.

    Raises:
        ValueError: a sample without negative or without self-sample, by name.
    """
    parts: dict[bool, list[Sample]] = {True: [], False: []}
    for sample in samples:
        bad = [score < SELF_SAMPLE for score in sample.scores]
        if sum(bad) != 1 or len(bad) < 2:
            raise ValueError(
                f"{sample.where or 'a sample'} is not one negative (score -1) and at least one self-sample"
            )
        for kind in parts:
            own = tuple(c for c, is_bad in zip(sample.group.completions, bad, strict=True) if is_bad == kind)
            parts[kind].append(Sample(Group(sample.group.prompt, own), (0.0,) * len(own)))
    known: dict[bool, Iterator[Tensor]] = {}
    for kind, given in ((False, minus), (True, plus)):
        chosen = model if given is None else given
        with chosen.disable_adapter() if given is None and isinstance(chosen, PeftModel) else nullcontext():
            done = referenced(chosen, parts[kind], batch_tokens=batch_tokens)
        known[kind] = iter(
            tokens
            for sample in done
            for tokens in sample.reference.split([len(c) for c in sample.group.completions])  # type: ignore[union-attr]
        )
    return [
        replace(sample, reference=torch.cat([next(known[score < SELF_SAMPLE]) for score in sample.scores]))
        for sample in samples
    ]


class OnlineSamples(Sequence[Sample]):
    """Self-samples that are drawn anew from the current policy at intervals (the online variant of the paper's v1).

    A sequence of samples with references for a training loop, and what tells it that a step is done: call it with the
    step's number, as `optimise` does with its ``watch``; `callback` is the same for transformers' Trainer. References
    stay what they are: the model as it is when this is made (with peft: its adapters off), or those given.

    Args:
        language: model and tokenizer; the model is the policy that is going to be trained.
        samples: from `self_sample`.
        every: steps between two drawings; None never draws again.
        minus, plus: see `two_references`.

    Attributes:
        report: of the last drawing.
        drawings: how often samples were drawn again.

    Raises:
        ValueError: `every` below 1.
    """

    def __init__(
        self,
        language: Language,
        samples: SelfSamples,
        every: int | None,
        *,
        minus: nn.Module | None = None,
        plus: nn.Module | None = None,
    ) -> None:
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"every is {every!r}; expected a whole number of steps, at least 1, or None")
        self.language, self.every, self.drawings = language, every, 0
        self._given, self._minus, self._plus = samples, minus, plus
        self._start: nn.Module = language.model
        if every is not None and not isinstance(self._start, PeftModel) and (minus is None or plus is None):
            self._start = copy.deepcopy(self._start).eval().requires_grad_(False)
        self._samples = two_references(self._start, samples, minus=minus, plus=plus)

    @property
    def report(self) -> SelfSampling:
        """What the last drawing did."""
        return self._given.report

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        return self._samples[index]

    def __len__(self) -> int:
        return len(self._samples)

    def __call__(self, step: int, output: Output | None = None) -> None:
        """A step, counted from 1, is done; draws anew when it is time."""
        if self.every is not None and step % self.every == 0:
            self.drawings += 1
            self._given = self._given.redrawn(self.language, self.drawings)
            self._samples = two_references(self._start, self._given, minus=self._minus, plus=self._plus)

    def callback(self) -> TrainerCallback:
        """For a `PreferenceTrainer` that trains on these samples, in one process."""
        return _Redraw(self)


class _Redraw(TrainerCallback):
    def __init__(self, online: OnlineSamples) -> None:
        self.online = online

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        every = self.online.every
        if every is not None and state.global_step >= every:
            # A resumed run: the last drawing again, from the policy as it is by now.
            self.online.drawings = state.global_step // every - 1
            self._redraw(state.global_step // every * every, more["train_dataloader"].dataset)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._redraw(state.global_step, more["train_dataloader"].dataset)

    def _redraw(self, step: int, dataset: list[Any]) -> None:
        before = self.online.drawings
        self.online(step)
        if self.online.drawings > before:
            dataset[:] = [(sample, stranger) for sample, (_, stranger) in zip(self.online, dataset, strict=True)]


# the whole method


@dataclass(frozen=True)
class D2OTraining:
    """Self-samples, then D2O, by transformers' Trainer: method ``d2o`` of `counterproof.preference.train`.

    Args:
        alpha, beta: see `D2O`.
        k, max_new_tokens, temperature, top_p, near, instruction: see `self_sample`.
        resample_every: steps after which the samples are drawn anew from the policy; None: drawn once, before training.

    Raises:
        ValueError: an argument out of its range.
    """

    alpha: float = 0.1
    beta: float = 0.1
    k: int = 11
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    near: float = 0.9
    instruction: str | None = None
    resample_every: int | None = None
    name: ClassVar[str] = "d2o"

    def __post_init__(self) -> None:
        D2O(self.alpha, self.beta)
        _Decoding(self.k, self.max_new_tokens, self.temperature, self.top_p, self.near, 1)
        every = self.resample_every
        if every is not None and (isinstance(every, bool) or not isinstance(every, int) or every < 1):
            raise ValueError(f"resample_every is {every!r}; expected a whole number of steps, at least 1, or None")

    @property
    def objective(self) -> D2O:
        """What is minimised."""
        return D2O(self.alpha, self.beta)

    def sample(self, language: Language, examples: Iterable[Example], *, seed: int, **more: Any) -> SelfSamples:
        """`self_sample` with this method's settings; `more` are its other arguments."""
        return self_sample(
            language,
            examples,
            k=self.k,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            near=self.near,
            instruction=self.instruction,
            seed=seed,
            **more,
        )

    def fit(self, language: Language, examples: Sequence[Example], *, settings: TrainSettings, out: Path) -> Trained:
        """Draw the samples, kept in ``self-samples.sqlite`` in the folder, train, and save.

        Args:
            language: model and tokenizer.
            examples: as for `self_sample`.
            settings: see `TrainSettings`; ``held_out``, ``samples`` and ``evaluate_every`` play no part: nothing is
                evaluated but the loss and what `D2O` watches.
            out: folder that model or adapter, tokenizer and history are written to.

        Raises:
            UserError: as `self_sample`, or a folder that cannot be written.
        """
        drawn = self.sample(
            language, examples, seed=settings.seed, max_length=settings.max_length, cache=out / "self-samples.sqlite"
        )
        total = settings.steps or math.ceil(settings.epochs * math.ceil(len(drawn) / rows_per_step(settings)))
        arguments = training_arguments(
            settings,
            language.model,
            out,
            total,
            save_strategy="steps",
            save_steps=settings.checkpoint_every or max(1, total // 10),
            save_total_limit=2,
        )
        lora = lora_config(settings, language.model)
        trainer = PreferenceTrainer(
            language.model,
            self.objective,
            arguments,
            drawn,
            (),
            language.tokenizer,
            lora,
            max_length=settings.max_length,
            micro_tokens=settings.micro_tokens,
        )
        if self.resample_every is not None:
            policy: Any = trainer.model
            online = OnlineSamples(Language(policy, language.tokenizer), drawn, self.resample_every)
            trainer.add_callback(online.callback())
        last = get_last_checkpoint(str(out))
        trainer.train(resume_from_checkpoint=last)
        logs = tuple(trainer.state.log_history)
        final = next((row for row in reversed(logs) if "loss" in row), {})
        notes = (*trainer.notes, drawn.report.text, *(() if last is None else (f"resumed from {last}",)))
        model = trainer.accelerator.unwrap_model(trainer.model)
        finished = Trained(model, language.tokenizer, out, logs, final, notes)
        if trainer.args.should_save:
            save(finished, out, {"method": self.name, "objective": repr(self)})
        return finished
