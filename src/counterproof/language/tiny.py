"""A language model small enough to be trained from nothing in seconds, and a world of text whose truth is known.

For tests, and for comparisons that need many trials: a Llama of transformers with two layers of width 48 (50,000
parameters), on words as tokens. What holds of it need not hold of a large model; that its log-probabilities, its
samples and the rewards of its answers can all be computed exactly is what it is for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from counterproof.errors import extra

with extra("language"):
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from counterproof.language.models import Language

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TinyWorld", "pretrain", "tiny_model", "tiny_tokenizer"]

PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def tiny_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words between blanks; every text begins with ``<s>``.

    Args:
        words: the vocabulary; 0, 1 and 2 are ``<pad>``, ``<s>`` and ``</s>``, the words follow in the order given.
            Other words are unknown, and an error when they are tokenised.
    """
    vocabulary = {word: index for index, word in enumerate([PAD, BOS, EOS, *dict.fromkeys(words)])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token=None))
    # A special token keeps its meaning when it is written right behind a word, as in "wave</s>".
    inner.add_special_tokens([PAD, BOS, EOS])
    inner.pre_tokenizer = WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    hidden: int = 48,
    layers: int = 2,
    heads: int = 2,
    context: int = 64,
) -> LlamaForCausalLM:
    """A Llama for a tokenizer, in transformers' random start; float32, on the processor, in eval mode.

    Args:
        tokenizer: its vocabulary and special tokens are the model's.
        seed: of the start; torch's own generator is left as it was.
        hidden, layers, heads: width, depth and attention heads.
        context: the longest text in tokens.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = LlamaForCausalLM(config)
    return model.to(torch.float32).eval()  # type: ignore[arg-type]


def pretrain(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    steps: int = 300,
    batch: int = 64,
    learning_rate: float = 5e-3,
    device: str = "cpu",
    **shape: int,
) -> Language:
    """Train a tiny model to continue texts: next-token likelihood by AdamW, with warm-up and a cosine decay.

    Args:
        texts: words between blanks; each is learnt with its end.
        tokenizer: from `tiny_tokenizer`.
        seed: of start and order of the texts.
        steps, batch, learning_rate: 300 steps of 64 texts of 13 words take about 5 s on one core.
        device: where it is trained, and stays.
        shape: hidden, layers, heads and context of `tiny_model`.

    Returns:
        The model, in eval mode, and the tokenizer.
    """
    order = np.random.default_rng(seed)
    model: nn.Module = tiny_model(tokenizer, seed=seed, **shape).to(device)  # type: ignore[arg-type]
    rows = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(list(texts))["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    labels = torch.where(torch.arange(tokens.shape[1], device=device) < lengths[:, None], tokens, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    model.train()
    for _ in range(steps):
        chosen = torch.from_numpy(order.integers(len(rows), size=batch)).to(device)
        width = int(lengths[chosen].max())
        loss = model(input_ids=tokens[chosen, :width], labels=labels[chosen, :width]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    return Language(model.eval(), tokenizer)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TinyWorld:
    """Prompts that name a topic, and answers of words that are on it, off it, or rude.

    A prompt is a topic, two hints, a colon and a blank: ``"sea star hay : "``. An answer has 3 to 12 words, each
    length as likely as the others; each of its words is on the topic with probability `on_topic`, rude with
    probability `rude`, one of the two hints with probability a quarter, and any word that is not rude otherwise. So a
    model has to look at the prompt for the topic, at the hints, and at how long it has been talking.

    Args:
        on_topic, rude: probabilities of a word that is on the topic on purpose, and of a rude one.
    """

    on_topic: float = 0.25
    rude: float = 0.1

    TOPICS: ClassVar[dict[str, tuple[str, ...]]] = {
        "sea": ("wave", "tide", "fish", "salt"),
        "sky": ("cloud", "wind", "star", "moon"),
        "farm": ("cow", "hay", "barn", "mud"),
        "town": ("shop", "tram", "bell", "lamp"),
    }
    RUDE = ("damn", "fool")
    LONGEST = 12

    @property
    def plain(self) -> tuple[str, ...]:
        """All words that are not rude."""
        return tuple(word for words in self.TOPICS.values() for word in words)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Of all words of the world; 25 tokens and three special ones."""
        return tiny_tokenizer([*self.TOPICS, ":", *self.plain, *self.RUDE])

    def prompts(self, rng: np.random.Generator, count: int) -> list[str]:
        """So many prompts, drawn with replacement from the 1024 there are."""
        topics, plain = list(self.TOPICS), self.plain
        return [
            f"{topics[rng.integers(4)]} {plain[rng.integers(16)]} {plain[rng.integers(16)]} : " for _ in range(count)
        ]

    def answer(self, rng: np.random.Generator, prompt: str) -> str:
        """An answer as the world's people give it: the text a model is trained on."""
        topic, first, second, _ = prompt.split()
        words = []
        for _ in range(int(rng.integers(3, self.LONGEST + 1))):
            kind = rng.random()
            if kind < self.on_topic:
                words.append(self.TOPICS[topic][rng.integers(4)])
            elif kind < self.on_topic + self.rude:
                words.append(self.RUDE[rng.integers(2)])
            elif kind < self.on_topic + self.rude + 0.25:
                words.append((first, second)[rng.integers(2)])
            else:
                words.append(self.plain[rng.integers(16)])
        return " ".join(words)

    def language(self, seed: int, *, texts: int = 8192, steps: int = 300, device: str = "cpu") -> Language:
        """A model trained on the world's text: what fine-tuning starts from, and the reference it is held to."""
        rng = np.random.default_rng(seed)
        prompts = self.prompts(rng, texts)
        lines = [f"{prompt}{self.answer(rng, prompt)}" for prompt in prompts]
        return pretrain(lines, self.tokenizer(), seed=seed, steps=steps, device=device, context=32)

    def relevance(self, prompt: str, answer: str) -> float:
        """Share of an answer's words that are on the prompt's topic; 0 for no words."""
        words = answer.split()
        return sum(word in self.TOPICS[prompt.split()[0]] for word in words) / len(words) if words else 0.0

    def rudeness(self, answer: str) -> float:
        """Share of an answer's words that are rude; 0 for no words."""
        words = answer.split()
        return sum(word in self.RUDE for word in words) / len(words) if words else 0.0
