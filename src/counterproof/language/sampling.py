"""Continue prompts with a causal language model: in batches, reproducibly, with the log-probability of every token.

The decoding loop and its cache are those of transformers' ``generate``. Sampling is exact and yet decodes greedily: the
tempered and truncated log-probabilities plus Gumbel noise have their maximum at token i with just probability p_i. The
noise of a sample comes from a stream of its own, so that neither the batch around it nor any global generator matters,
and two models asked with the same seed get the same noise: the more alike they are, the more often they say the same.
"""

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from counterproof.errors import UserError, extra
from counterproof.language.scoring import causal_model

with extra("language"):
    import torch
    from jinja2 import TemplateError
    from torch import Tensor
    from transformers import (
        DynamicCache,
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        StoppingCriteria,
        StoppingCriteriaList,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )
    from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from counterproof.language.models import Language

__all__ = ["Generation", "Prompt", "generate"]

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Sequence[int]
Finish: TypeAlias = Literal["eos", "stop", "length"]


class Generation(NamedTuple):
    """One continuation of a prompt.

    Attributes:
        text: without special tokens, and cut before the first stop string.
        tokens: as generated. With ``finish == "eos"`` the end token is the last one. With ``"stop"`` they are the
            fewest whose text begins with `text`: the last of them may run on into the stop string.
        logprobs: in nats, one for each token, under the model's own distribution: at temperature 1, over the whole
            vocabulary, whatever it was sampled from.
        finish: ``"eos"`` an end token came, ``"stop"`` a stop string did, ``"length"`` neither before there were
            `max_new_tokens` or the context was full.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish

    @property
    def logprob(self) -> float:
        """``log p(tokens | prompt)``: the sum of `logprobs`."""
        return sum(self.logprobs)


def generate(
    language: "Language",
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int | Sequence[int] = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Generation]]:
    """Sample continuations of every prompt.

    Of the model's own generation settings only the end tokens count; the tokenizer's end token is one too. The model,
    which may be one of peft, is in eval mode meanwhile. Samples in one batch share the pass over their prompt.

    Args:
        language: model and tokenizer, from `load`.
        prompts: each a text, chat messages (which the tokenizer's chat template renders, up to where the answer
            begins), or token ids.
        max_new_tokens: at most so many tokens, the end token included; fewer when the context ends before.
        samples: continuations per prompt.
        temperature: of the sampling; 0 decodes greedily.
        top_p: sample from the fewest tokens that have this probability together (after tempering), in (0, 1].
        stop: end a continuation once its text contains one of these. One that spells a special token is recognised too.
        seed: one for all: sample j of prompt i depends on (seed, i, j). Or one for each prompt: then it depends on the
            prompt's seed and j, wherever the prompt stands. The batch plays no part but for rounding errors, which may
            tip a near-tie, about once in 1e5 tokens (float32).
        batch_size: sequences in one pass.
        progress: called after every batch with the continuations done and those to do in all.

    Returns:
        Per prompt its continuations, in order.

    Raises:
        UserError: a prompt that is empty, reaches the model's context length, holds an id outside the vocabulary, or is
            chat messages that the tokenizer has no chat template for; it names the prompt's index.
        TypeError: what is no list of prompts.
        ValueError: another argument out of its range.
        FloatingPointError: logits that are not a number.
    """
    if isinstance(prompts, str | Mapping):
        raise TypeError(f"prompts is a {type(prompts).__name__}; give a list of prompts")
    encoded = [encode(language, prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
    found: list[list[Generation | None]] = [[None] * samples for _ in encoded]
    done = 0
    for batch in generations(
        language,
        encoded,
        max_new_tokens=max_new_tokens,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        seed=seed,
        batch_size=batch_size,
    ):
        for index, sample, generation in batch:
            found[index][sample] = generation
        done += len(batch)
        if progress is not None:
            progress(done, len(encoded) * samples)
    return found  # type: ignore[return-value]  # every place is filled by now


def encode(language: "Language", prompt: Prompt, name: str) -> tuple[int, ...]:
    """Token ids of a prompt that the model can continue.

    Args:
        name: what errors call it, such as ``"prompt 3"``.

    Raises:
        UserError: see `generate`.
        TypeError: neither text, nor messages, nor token ids.
    """
    model, tokenizer = language
    if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, str | Sequence | np.ndarray | Tensor):
        remedy = "put the messages in a list" if isinstance(prompt, Mapping) else "give text, messages or token ids"
        raise TypeError(f"{name} is a {type(prompt).__name__}; {remedy}")
    if len(prompt) == 0:
        raise UserError(f"{name} is empty; there is nothing to continue")
    if isinstance(prompt, str):
        ids = list(tokenizer.encode(prompt))
    elif all(isinstance(message, Mapping) for message in prompt):
        ids = _render(tokenizer, prompt, name)  # type: ignore[arg-type]
    else:
        try:
            ids = [operator.index(token) for token in prompt]  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                f"{name} is neither text nor messages, and holds more than token ids: {prompt!r:.80}"
            ) from None
    if not ids:
        raise UserError(f"{name} has no token; there is nothing to continue")
    config = causal_model(model).config.get_text_config()
    outside = next((token for token in ids if not 0 <= token < config.vocab_size), None)
    if outside is not None:
        raise UserError(
            f"{name} has the token id {outside}, the model's vocabulary is 0 to {config.vocab_size - 1}; "
            "do model and tokenizer belong together?"
        )
    context = _context(model)
    if context is not None and len(ids) >= context:
        raise UserError(
            f"{name} has {len(ids)} tokens, and the model's context of {context} leaves no room to continue; shorten "
            "it, or take a model with a longer context"
        )
    return tuple(ids)


def generations(
    language: "Language",
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    samples: int,
    temperature: float,
    top_p: float,
    stop: str | Sequence[str],
    seed: int | Sequence[int],
    batch_size: int,
) -> Iterator[list[tuple[int, int, Generation]]]:
    """What `generate` does, of encoded prompts, as it comes: a batch at a time, of (prompt, sample, continuation)."""
    for argument, number in (("max_new_tokens", max_new_tokens), ("samples", samples), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"{argument} is {number}; expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; expected a number from 0 (greedy) up")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected more than 0, at most 1")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(stop):
        raise ValueError("a stop string is empty; leave it out")
    if isinstance(seed, Sequence):
        seeds: list[tuple[int, ...]] = [(operator.index(each),) for each in seed]
    else:
        seeds = [(operator.index(seed), index) for index in range(len(prompts))]
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one for each, or one for all")
    if any(each[0] < 0 for each in seeds):
        raise ValueError(f"seed is {min(seeds)[0]}; expected 0 or more")

    context = _context(language.model)
    rooms = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
    # Alike in room and length, so that no batch outgrows the context and little is padded; equal prompts side by side.
    # The longest come first: what does not fit in memory shows at once.
    order = sorted(range(len(prompts)), key=lambda index: (rooms[index], len(prompts[index]), prompts[index], index))
    rows = [(index, sample) for index in reversed(order) for sample in range(samples)]
    decoder = _Decoder(language, temperature, top_p, stop)
    # With virtual tokens (peft's prompt learning) padding would come to stand between them and the prompt.
    padded = _virtual(language.model) == 0
    for _, alike in itertools.groupby(rows, key=lambda row: (rooms[row[0]], padded or len(prompts[row[0]]))):
        same = list(alike)
        for batch in (same[at : at + batch_size] for at in range(0, len(same), batch_size)):
            streams = [np.random.default_rng((*seeds[index], sample)) for index, sample in batch]
            found = decoder.decode([prompts[index] for index, _ in batch], streams, rooms[batch[0][0]])
            yield [(*row, generation) for row, generation in zip(batch, found, strict=True)]


def _context(model: Any) -> int | None:
    """Positions that a model has for tokens; None: no limit."""
    context = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else context - _virtual(model)


def _virtual(model: Any) -> int:
    """Virtual tokens that peft's prompt learning puts before every prompt."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if getattr(config, "is_prompt_learning", False) else 0


def _render(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Mapping[str, Any]], name: str) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{name} is chat messages, and this model's tokenizer has no chat template; use a chat model, give plain "
            "text, or set tokenizer.chat_template"
        )
    try:
        return list(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], add_generation_prompt=True, tokenize=True, return_dict=False
            )
        )
    except TemplateError as problem:
        raise UserError(f"{name} does not suit the model's chat template: {problem}") from None


class _Decoder:
    """A model and how to sample from it."""

    def __init__(self, language: "Language", temperature: float, top_p: float, stop: tuple[str, ...]) -> None:
        self.model: Any = language.model
        self.tokenizer: Any = language.tokenizer
        self.core = causal_model(self.model)
        self.temperature = temperature
        self.warpers: list[LogitsProcessor] = []
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if temperature > 0 and top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        ends = self.core.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        if self.tokenizer.eos_token_id is not None:
            self.ends.add(self.tokenizer.eos_token_id)
        # Special tokens are not in the text, so these stop strings are looked for among the tokens.
        special = {str(token): index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.stops = {special[text] for text in stop if text in special} - self.ends
        self.stop = tuple(text for text in stop if text not in special)

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @torch.no_grad()
    def decode(self, prompts: list[tuple[int, ...]], streams: list[np.random.Generator], room: int) -> list[Generation]:
        """A continuation of at most `room` tokens for each prompt; equal ones are read once."""
        device = self.core.get_input_embeddings().weight.device
        longest = max(map(len, prompts))
        padding = next(iter(self.ends), 0)  # any id does: the mask tells
        ids = torch.full((len(prompts), longest), padding)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        sampler = _Sampler(self.warpers, streams if self.temperature > 0 else None)
        stopper = _Stopper(self, longest, len(prompts))
        settings: Any = GenerationConfig  # untyped
        config = settings(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(self.ends | self.stops) or None,
            pad_token_id=padding,
            use_cache=True,
        )
        with _own_settings(self.core, self.model, config):
            shared = self._read_once(prompts, ids, mask)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stopper] if self.stop else []),
                **({"past_key_values": shared} if shared is not None else {}),
            )
        tokens = out[:, longest:].tolist()
        logprobs = torch.stack(sampler.logprobs, 1).tolist()
        return [self._finish(*row) for row in zip(tokens, logprobs, stopper.at, strict=True)]

    def _read_once(self, prompts: list[tuple[int, ...]], ids: Tensor, mask: Tensor) -> DynamicCache | None:
        """The cache after all tokens of the prompts but the last, when some are equal and it can be dealt out."""
        firsts = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
        if len(firsts) == len(prompts) or min(map(len, prompts)) < 2 or _virtual(self.model):
            return None
        kept = sorted(firsts.values())
        cache = self.model.generate(
            input_ids=ids[kept, :-1], attention_mask=mask[kept, :-1], max_new_tokens=1, return_dict_in_generate=True
        ).past_key_values
        if not isinstance(cache, DynamicCache) or not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            return None
        places = {prompts[row]: place for place, row in enumerate(kept)}
        rows: Any = torch.tensor([places[prompt] for prompt in prompts], device=ids.device)
        cache.reorder_cache(rows)
        return cache

    def _finish(self, tokens: list[int], logprobs: list[float], stopped: int | None) -> Generation:
        """Cut what was decoded at its end token or stop string."""
        finish: Finish = "length"
        text = None
        ended = next((at for at, token in enumerate(tokens) if token in self.ends or token in self.stops), None)
        if stopped is not None and (ended is None or stopped <= ended):
            finish, size = "stop", stopped
            whole = self.text(tokens[:size])
            text = whole[: min(at for at in map(whole.find, self.stop) if at >= 0)]
            while size and self.text(tokens[: size - 1]).startswith(text):
                size -= 1
        elif ended is not None:
            finish = "eos" if tokens[ended] in self.ends else "stop"
            size = ended + (finish == "eos")
            text = self.text(tokens[:ended])
        else:
            size = len(tokens)
        if text is None:
            text = self.text(tokens)
        return Generation(text, tuple(tokens[:size]), tuple(logprobs[:size]), finish)


class _Sampler(LogitsProcessor):
    """Scores whose largest is a sample, and the log-probability of that token."""

    def __init__(self, warpers: Sequence[LogitsProcessor], streams: list[np.random.Generator] | None) -> None:
        self.warpers = warpers
        self.streams = streams
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise FloatingPointError("the model's logits are not a number; have its weights diverged?")
        chosen = scores
        for warper in self.warpers:
            chosen = warper(input_ids, chosen)
        if self.streams is not None:
            # -log of a standard exponential is Gumbel; drawn on the CPU, so that every device gives the same sample.
            waits = np.stack([stream.standard_exponential(scores.shape[1]) for stream in self.streams])
            chosen = chosen - torch.from_numpy(waits).to(scores.device, scores.dtype).log()
        picked = chosen.argmax(1, keepdim=True)
        self.logprobs.append((scores.gather(1, picked)[:, 0] - scores.logsumexp(1)).cpu())
        return chosen


class _Stopper(StoppingCriteria):
    """Ends the rows whose text contains a stop string, and notes after how many tokens."""

    def __init__(self, decoder: _Decoder, prompt: int, rows: int) -> None:
        self.decoder = decoder
        self.prompt = prompt
        self.at: list[int | None] = [None] * rows
        self.ended = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ends = self.decoder.ends | self.decoder.stops
        for row, tokens in enumerate(input_ids[:, self.prompt :].tolist()):
            if self.at[row] is None and not self.ended[row]:
                self.ended[row] = tokens[-1] in ends
                text = self.decoder.text(tokens)
                if not self.ended[row] and any(stop in text for stop in self.decoder.stop):
                    self.at[row] = len(tokens)
        return torch.tensor([at is not None for at in self.at], device=input_ids.device)


@contextmanager
def _own_settings(core: Any, model: Any, config: GenerationConfig) -> Iterator[None]:
    """Eval mode and our generation settings; a checkpoint's own, such as a repetition penalty, would be mixed in."""
    before = core.generation_config
    training = [module for module in model.modules() if module.training]
    core.generation_config = config
    model.eval()
    try:
        yield
    finally:
        core.generation_config = before
        for module in training:
            module.training = True
