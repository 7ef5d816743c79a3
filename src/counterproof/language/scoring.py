"""Log-probabilities of completions, token by token, differentiable, without padding and without logits of prompts.

The completions of a prompt share it: a batch is one row of tokens, each group laid out as prompt, completion 1, ...,
completion K. A completion attends to its prompt and to itself; its positions go on where the prompt ends. Linear layers
see the one row; attention is computed group by group through transformers' attention interface, so no model's code is
touched. The output head is applied only where the next token belongs to a completion.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.errors import UserError, extra

with extra("language"):
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
    from transformers import AttentionInterface, AttentionMaskInterface

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from counterproof.language.models import Language

    Messages = Sequence[dict[str, Any]]

__all__ = ["Group", "LogProb", "Logps", "batches", "completion_logps", "log_probs", "supports_packing", "tokenize"]

PACKED = "counterproof_packed"
SHORT = 256  # tokens of the longest group up to which groups are attended to side by side instead of one by one
HEAD_ROWS = 512  # positions whose logits exist at a time


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, as token ids; an end token is part of its completion.

    Raises:
        ValueError: an empty prompt (nothing would predict the first token), no completion, or an empty one.
    """

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("a prompt has no token; a completion's first token needs one before it, such as a BOS")
        if not self.completions or not all(self.completions):
            raise ValueError("a group needs at least one completion, and every completion at least one token")

    @property
    def tokens(self) -> int:
        """Tokens that the model reads: the prompt once, every completion."""
        return len(self.prompt) + sum(map(len, self.completions))


def tokenize(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "str | Messages",
    completions: "Sequence[str | Messages]",
    *,
    eos: bool = True,
    **template: Any,
) -> Group:
    """Token ids of a prompt and its completions, split where no token straddles the boundary.

    Prompt and completion are tokenised together; the prompt is the longest prefix that it shares, token by token, with
    each of the whole texts. So a space that merges into the completion's first word is scored with it, as in TRL.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text, or chat messages, which the tokenizer's chat template renders.
        completions: of the same kind as the prompt.
        eos: end plain completions with the tokenizer's end token; a chat template brings its own.
        template: further arguments of the chat template, such as ``tools``.

    Raises:
        UserError: messages and no chat template; a completion without tokens; no token that all share.
    """
    if isinstance(prompt, str):
        start = list(tokenizer(prompt)["input_ids"])
        end = tokenizer.eos_token if eos and tokenizer.eos_token is not None else ""
        wholes = [
            list(
                tokenizer(f"{prompt}{text}" if end and str(text).endswith(end) else f"{prompt}{text}{end}")["input_ids"]
            )
            for text in completions
        ]
    else:
        if tokenizer.chat_template is None:
            raise UserError(
                "the data are chat messages, and this model's tokenizer has no chat template; use a chat model, or "
                "give prompts and completions as plain text"
            )

        def render(messages: "list[dict[str, Any]]", **more: Any) -> list[int]:
            ids: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **more, **template)
            return list(ids)

        opened = bool(prompt) and prompt[-1].get("role") == "assistant"
        start = render(
            list(prompt), **({"continue_final_message": True} if opened else {"add_generation_prompt": True})
        )
        wholes = [render([*prompt, *messages]) for messages in completions]
    shared = min((_common(start, whole) for whole in wholes), default=0)
    if shared == 0 and tokenizer.bos_token_id is not None:
        wholes, shared = [[tokenizer.bos_token_id, *whole] for whole in wholes], 1
    if shared == 0:
        raise UserError("the prompt shares no token with prompt and completion together; an empty prompt needs a BOS")
    if any(len(whole) <= shared for whole in wholes):
        raise UserError("a completion has no token of its own")
    return Group(tuple(wholes[0][:shared]), tuple(tuple(whole[shared:]) for whole in wholes))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


@dataclass(frozen=True)
class Logps:
    """Log-probabilities of the tokens of n completions, one after the other.

    Attributes:
        token: (tokens,), in nats; float32, or the model's dtype when that is wider.
        owner: (tokens,), int64; which completion a token belongs to, counted over the batch.
        position: (tokens,), int64; its place in the completion, from 0.
        lengths: (n,), int64; tokens per completion, the end token included.
        hidden: (tokens, d); the hidden state that each token was predicted from, when it was asked for.
    """

    token: Tensor
    owner: Tensor
    position: Tensor
    lengths: Tensor
    hidden: Tensor | None = None

    def sum(self) -> Tensor:
        """(n,): ``log p(completion | prompt)``."""
        return self.total(self.token)

    def mean(self) -> Tensor:
        """(n,): the same per token."""
        return self.sum() / self.lengths

    def total(self, values: Tensor) -> Tensor:
        """(n,): the sum of per-token values over each completion."""
        return values.new_zeros(len(self.lengths)).index_add(0, self.owner, values)

    def with_tokens(self, token: Tensor) -> "Logps":
        """The same completions with other per-token values (tokens,), such as those of a reference model."""
        return replace(self, token=token.to(self.token), hidden=None)

    def detach(self) -> "Logps":
        """Cut off from the graph."""
        return replace(self, token=self.token.detach(), hidden=None)

    @classmethod
    def of(cls, groups: Sequence[Group], token: Tensor, hidden: Tensor | None = None) -> "Logps":
        """From the per-token values (tokens,) of the groups' completions in order."""
        sizes = torch.tensor([len(c) for group in groups for c in group.completions], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        position = torch.arange(len(owner)) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
        device = token.device
        return cls(token, owner.to(device), position.to(device), sizes.to(device), hidden)


def completion_logps(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    prefixes: Sequence[Tensor | None] | None = None,
    hidden: bool = False,
    packed: bool | None = None,
) -> Logps:
    """Log-probabilities of the groups' completions under a causal language model of transformers, or a peft one.

    Differentiable once with respect to the model's parameters and the prefixes.

    Args:
        model: any ``AutoModelForCausalLM`` model, with or without peft adapters; its mode (train or eval) is kept.
        groups: what to score; one packed row, so the caller bounds its size (see `batches`).
        prefixes: per group, embeddings (m, d) of virtual tokens before the prompt, or None.
        hidden: also return the hidden states that predict the tokens.
        packed: False pads instead, a row for each completion; None packs where the model can (`supports_packing`).

    Raises:
        ValueError: a group longer than the model's context, or an argument that does not fit the groups.
    """
    groups = list(groups)
    if not groups:
        raise ValueError("no group to score")
    if prefixes is not None and len(prefixes) != len(groups):
        raise ValueError(f"{len(prefixes)} prefixes for {len(groups)} groups")
    core = causal_model(model)
    virtual = [
        0 if prefixes is None or prefix is None else len(prefix) for prefix in (prefixes or [None] * len(groups))
    ]
    longest = max(m + len(g.prompt) + max(map(len, g.completions)) for m, g in zip(virtual, groups, strict=True))
    context = getattr(core.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(f"a prompt and completion of {longest} tokens do not fit the model's context of {context}")
    if packed is None:
        packed = supports_packing(core, longest)
    rows = _Row(groups, virtual) if packed else _Padded(groups, virtual)
    return rows.score(core, prefixes, keep_hidden=hidden)


def causal_model(model: Any) -> Any:
    """The transformers model inside a peft one: adapters are part of its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def supports_packing(model: nn.Module, longest: int = 0) -> bool:
    """Whether a model takes its attention from transformers' interface and attends to all that came before.

    Args:
        longest: tokens of the longest prompt and completion; a sliding window that is no shorter does no harm.
    """
    core = causal_model(model)
    config = core.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    return bool(
        getattr(core, "_supports_attention_backend", False)
        and kinds <= {"full_attention", "sliding_attention"}
        and (window is None or not getattr(config, "use_sliding_window", True) or longest <= window)
        and getattr(config, "attn_logit_softcapping", None) is None
    )


class _Row:
    """Groups in one row."""

    def __init__(self, groups: list[Group], virtual: list[int]) -> None:
        self.groups, self.virtual = groups, virtual
        self.spans: list[tuple[int, int, tuple[int, ...]]] = []
        positions, predicts, at = [], [], 0
        targets: list[int] = []
        for group, m in zip(groups, virtual, strict=True):
            prompt = m + len(group.prompt)
            positions.append(torch.arange(prompt))
            inner = at + prompt
            for completion in group.completions:
                size = len(completion)
                positions.append(torch.arange(prompt, prompt + size))
                # The first token of every completion is predicted by the prompt's last.
                predicts.append(torch.tensor([at + prompt - 1, *range(inner, inner + size - 1)]))
                targets += completion
                inner += size
            self.spans.append((at, prompt, tuple(map(len, group.completions))))
            at = inner
        self.tokens = at
        self.positions = torch.cat(positions)
        self.predicts = torch.cat(predicts)
        self.targets = torch.tensor(targets)

    def score(self, core: Any, prefixes: Sequence[Tensor | None] | None, *, keep_hidden: bool) -> Logps:
        device = core.get_input_embeddings().weight.device
        ids = torch.tensor([t for g in self.groups for t in (*g.prompt, *(t for c in g.completions for t in c))])
        ids = ids.to(device)
        inputs: dict[str, Any] = {"input_ids": ids[None]}
        if prefixes is not None:
            inputs = {"inputs_embeds": self._embed(core, ids, prefixes)[None]}
        plan = _Attention.plan(self.spans, self.tokens, device)
        with _packed_attention(core):
            states = core.get_decoder()(
                **inputs, position_ids=self.positions[None].to(device), use_cache=False, packing=plan
            ).last_hidden_state[0]
        states = states.index_select(0, self.predicts.to(device))
        token = head_logps(core, states, self.targets.to(device))
        return Logps.of(self.groups, token, states if keep_hidden else None)

    def _embed(self, core: Any, ids: Tensor, prefixes: Sequence[Tensor | None]) -> Tensor:
        table = core.get_input_embeddings()(ids)
        pieces, at = [], 0
        for group, prefix in zip(self.groups, prefixes, strict=True):
            if prefix is not None:
                pieces.append(prefix.to(table))
            pieces.append(table[at : at + group.tokens])
            at += group.tokens
        return torch.cat(pieces)


class _Padded:
    """A row for each completion, padded on the right: for models whose attention cannot be told what to attend to."""

    def __init__(self, groups: list[Group], virtual: list[int]) -> None:
        self.groups, self.virtual = groups, virtual

    def score(self, core: Any, prefixes: Sequence[Tensor | None] | None, *, keep_hidden: bool) -> Logps:
        embedding = core.get_input_embeddings()
        device = embedding.weight.device
        rows, starts, sizes = [], [], []
        targets: list[int] = []
        for index, (group, m) in enumerate(zip(self.groups, self.virtual, strict=True)):
            for completion in group.completions:
                ids = torch.tensor((*group.prompt, *completion), device=device)
                prefix = None if prefixes is None else prefixes[index]
                if prefixes is not None:
                    embedded = embedding(ids)
                    rows.append(embedded if prefix is None else torch.cat([prefix.to(embedded), embedded]))
                else:
                    rows.append(ids)
                starts.append(m + len(group.prompt))
                sizes.append(len(completion))
                targets += completion
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.zeros(padded.shape[:2], dtype=torch.int64, device=device)
        for index, row in enumerate(rows):
            mask[index, : len(row)] = 1
        name = "input_ids" if prefixes is None else "inputs_embeds"
        states = core.get_decoder()(**{name: padded}, attention_mask=mask, use_cache=False).last_hidden_state
        states = torch.cat(
            [states[i, start - 1 : start - 1 + size] for i, (start, size) in enumerate(zip(starts, sizes, strict=True))]
        )
        token = head_logps(core, states, torch.tensor(targets, device=device))
        return Logps.of(self.groups, token, states if keep_hidden else None)


# attention


class _Attention:
    """Which tokens of a row attend to which: the whole plan, made once and used in every layer."""

    def __init__(self, spans: list[tuple[int, int, tuple[int, ...]]], tokens: int) -> None:
        self.spans = spans
        self.tokens = tokens
        self.gather: Tensor | None = None
        self.scatter = self.allowed = torch.empty(0)
        self.masks: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def plan(cls, spans: list[tuple[int, int, tuple[int, ...]]], tokens: int, device: torch.device) -> "_Attention":
        plan = cls(spans, tokens)
        sizes = [prompt + sum(completions) for _, prompt, completions in spans]
        longest = max(sizes)
        if len(spans) > 1 and longest <= SHORT:
            # Where each group's tokens stand in the row, and the other way round; a pad reads the row's first token.
            place = torch.arange(longest)
            starts = torch.tensor([start for start, _, _ in spans])
            real = place < torch.tensor(sizes)[:, None]
            plan.gather = torch.where(real, starts[:, None] + place, 0).to(device)
            plan.scatter = real.flatten().nonzero()[:, 0].to(device)
            part = torch.zeros(len(spans), longest, dtype=torch.int64)  # 0 prompt, k completion k, -1 pad
            for row, (_, prompt, completions) in enumerate(spans):
                at = prompt
                for number, size in enumerate(completions, 1):
                    part[row, at : at + size] = number
                    at += size
                part[row, at:] = -1
            same = part[:, :, None] == part[:, None, :]
            allowed = (same | (part[:, None, :] == 0)) & (place[:, None] >= place)
            plan.allowed = allowed[:, None].to(device)
        return plan

    def mask(self, prompt: int, size: int, device: torch.device) -> Tensor:
        """(size, prompt + size): a completion sees its whole prompt and what of itself came before."""
        if (prompt, size) not in self.masks:
            mask = torch.ones(size, prompt + size, dtype=torch.bool, device=device)
            self.masks[prompt, size] = mask.tril(prompt)
        return self.masks[prompt, size]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """(1, heads, tokens, d) each -> (1, tokens, heads, d)."""
        if self.gather is not None:
            query, key, value = (part[0][:, self.gather].transpose(0, 1) for part in (query, key, value))
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=self.allowed, **options)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, self.scatter)[None]
        pieces = []
        for start, prompt, completions in self.spans:
            first = slice(start, start + prompt + completions[0])
            pieces.append(
                F.scaled_dot_product_attention(
                    query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True, **options
                )
            )
            at = first.stop
            for size in completions[1:]:
                keys, values = (
                    torch.cat([part[:, :, start : start + prompt], part[:, :, at : at + size]], dim=2)
                    for part in (key, value)
                )
                mask = self.mask(prompt, size, query.device)
                pieces.append(
                    F.scaled_dot_product_attention(query[:, :, at : at + size], keys, values, attn_mask=mask, **options)
                )
                at += size
        return torch.cat(pieces, dim=2).transpose(1, 2)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: _Attention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    assert packing is not None, "this attention is used by completion_logps alone"
    grouped = query.shape[1] != key.shape[1]
    out = packing.attend(query, key, value, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    return out.contiguous(), None


AttentionInterface.register(PACKED, _attention_forward)
AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)


@contextmanager
def _packed_attention(core: Any) -> Iterator[None]:
    config = core.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = before


# the head


def head_logps(core: Any, states: Tensor, targets: Tensor) -> Tensor:
    """(n,): log-probabilities of the targets (n,), int64, from the hidden states (n, d) that predict them."""
    head = core.get_output_embeddings()
    config = core.config.get_text_config()
    bent = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    if type(head) is nn.Linear and all(value is None or value == 1 for value in bent):
        token: Tensor = _HeadLogps.apply(states, head.weight, head.bias, targets)  # type: ignore[no-untyped-call]
        return token
    pieces = []
    for rows, wanted in zip(states.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = head(rows)
        soft_cap, times, divisor = bent
        if times is not None:
            logits = logits * times
        if divisor is not None:
            logits = logits / divisor
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        pieces.append(-F.cross_entropy(_wide(logits), wanted, reduction="none"))
    return torch.cat(pieces)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _HeadLogps(torch.autograd.Function):
    """Linear head, log-softmax and choice of the target, in chunks of rows whose logits never outlive them.

    With a frozen head the gradient of each log-probability with respect to its hidden state, ``W[y] - softmax @ W``, is
    ready after the forward pass, and the backward pass multiplies it by a number. A trained head is passed through once
    more backwards.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        trained = wants_weight or wants_bias
        pieces, jacobians, normalisers = [], [], []
        for rows, wanted in zip(states.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = _wide(F.linear(rows, weight, bias))
            normaliser = logits.logsumexp(1)
            pieces.append(logits.gather(1, wanted[:, None])[:, 0] - normaliser)
            if trained:
                normalisers.append(normaliser)
            elif wants_states:
                softmax = logits.sub_(normaliser[:, None]).exp_().to(weight.dtype)
                jacobians.append(weight[wanted] - softmax @ weight)
        if trained:
            ctx.save_for_backward(states, weight, bias, targets, torch.cat(normalisers))
        elif wants_states:
            ctx.save_for_backward(torch.cat(jacobians))
        ctx.trained = trained
        return torch.cat(pieces)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if not ctx.trained:
            (jacobian,) = ctx.saved_tensors
            return grad.to(jacobian.dtype)[:, None] * jacobian, None, None, None
        states, weight, bias, targets, normalisers = ctx.saved_tensors
        to_states: list[Tensor] = []
        to_weight = torch.zeros_like(weight) if wants_weight else None
        to_bias = torch.zeros_like(bias) if wants_bias else None
        parts = (part.split(HEAD_ROWS) for part in (states, targets, normalisers, grad))
        for rows, wanted, normaliser, upstream in zip(*parts, strict=True):
            # d log p(y) / d logits = onehot(y) - softmax
            slope = _wide(F.linear(rows, weight, bias)).sub_(normaliser[:, None]).exp_().neg_()
            slope[torch.arange(len(wanted), device=wanted.device), wanted] += 1
            slope = slope.mul_(upstream[:, None]).to(weight.dtype)
            if wants_states:
                to_states.append(slope @ weight)
            if to_weight is not None:
                to_weight.addmm_(slope.T, rows)
            if to_bias is not None:
                to_bias += slope.sum(0)
        return torch.cat(to_states) if wants_states else None, to_weight, to_bias, None


# in bulk


def batches(groups: Sequence[Group], tokens: int) -> Iterator[range]:
    """Cut groups, in order, into runs of at most so many tokens each (a single group may be longer)."""
    start, held = 0, 0
    for index, group in enumerate(groups):
        if index > start and held + group.tokens > tokens:
            yield range(start, index)
            start, held = index, 0
        held += group.tokens
    if groups:
        yield range(start, len(groups))


class LogProb(NamedTuple):
    """A completion's tokens and their log-probabilities in nats."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """``log p(completion | prompt)``."""
        return sum(self.logprobs)


def log_probs(
    language: "Language",
    prompts: "Iterable[str | Messages]",
    completions: "Iterable[Sequence[str | Messages]]",
    *,
    eos: bool = True,
    batch_tokens: int = 4096,
) -> list[list[LogProb]]:
    """What a model thinks of completions: per prompt, the token log-probabilities of each of its completions.

    Args:
        language: model and tokenizer, from `load`.
        prompts: texts, or chat messages.
        completions: for each prompt its completions, of the same kind.
        eos: end plain completions with the end token, and score it.
        batch_tokens: tokens in one forward pass, about.

    Raises:
        UserError: what cannot be tokenised, see `tokenize`.
        ValueError: prompts and completions of different number, a group longer than the context.
    """
    model, tokenizer = language
    groups = [tokenize(tokenizer, prompt, list(own), eos=eos) for prompt, own in zip(prompts, completions, strict=True)]
    training = model.training
    model.eval()
    found: list[list[LogProb]] = []
    try:
        with torch.no_grad():
            for run in batches(groups, batch_tokens):
                part = [groups[index] for index in run]
                values = iter(completion_logps(model, part).token.tolist())
                for group in part:
                    found.append([LogProb(c, tuple(next(values) for _ in c)) for c in group.completions])
    finally:
        model.train(training)
    return found
