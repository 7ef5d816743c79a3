"""Answers drawn from a model, preferences made of them by a known reward, and what has become of a policy."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from counterproof.errors import extra

with extra("preference"):
    import numpy as np
    import torch

import itertools

from counterproof.language import Group, Language, completion_logps, tokenize
from counterproof.language.sampling import generate
from counterproof.language.scoring import batches
from counterproof.preference.objectives import Sample

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Answer", "Assessment", "answer_logps", "assess", "draw", "ranked_sample", "score_pairs"]

Reward = Callable[[str, str], float]


class Answer(NamedTuple):
    """An answer as a model gave it: its text, its token ids, and the prompt's."""

    prompt: str
    text: str
    group: Group


def draw(
    language: Language, prompts: Sequence[str], *, samples: int, seed: int, max_new_tokens: int, batch_size: int = 256
) -> list[list[Answer]]:
    """Answers at temperature 1 from the model's whole distribution; none is empty, since an end is a token.

    Args:
        language: model and tokenizer.
        prompts: plain texts.
        samples: answers for each prompt.
        seed: the same noise for every model that is asked with it.
        max_new_tokens: longest answer in tokens, its end included.
    """
    starts = [tokenize(language.tokenizer, prompt, [""]).prompt for prompt in prompts]
    drawn = generate(language, starts, samples=samples, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return [
        [Answer(prompt, one.text, Group(start, (one.tokens,))) for one in own]
        for prompt, start, own in zip(prompts, starts, drawn, strict=True)
    ]


def ranked_sample(answers: Sequence[Answer], scores: Sequence[float], **columns: Sequence[float]) -> Sample:
    """The answers to one prompt, with a score each, as a sample."""
    completions = tuple(answer.group.completions[0] for answer in answers)
    return Sample(Group(answers[0].group.prompt, completions), tuple(map(float, scores)), columns, answers[0].prompt)


def score_pairs(
    answers: Sequence[Sequence[Answer]], reward: Reward, rng: np.random.Generator, *, certainty: float | None = None
) -> list[Sample]:
    """A pair of each prompt's first two answers that differ, chosen by a known reward.

    Args:
        answers: per prompt, from `draw`.
        reward: of (prompt, answer).
        rng: for labels that are drawn.
        certainty: Bradley-Terry's scale: the first is chosen with probability ``sigmoid(certainty * difference)``.
            None: the better one always is, and equals make no pair.
    """
    found: list[Sample] = []
    for own in answers:
        first = own[0]
        second = next((other for other in own[1:] if other.group != first.group), None)
        if second is None:
            continue
        gap = reward(first.prompt, first.text) - reward(second.prompt, second.text)
        if certainty is None:
            if gap == 0:
                continue
            wins = gap > 0
        else:
            wins = bool(rng.random() < 1 / (1 + np.exp(-certainty * gap)))
        found.append(ranked_sample([first, second] if wins else [second, first], (1.0, 0.0)))
    return found


def answer_logps(model: "nn.Module", answers: Sequence[Answer], *, batch_tokens: int = 8192) -> "torch.Tensor":
    """(n,): log-probabilities of answers under a model, without a graph."""
    groups = [answer.group for answer in answers]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [completion_logps(model, [groups[i] for i in run]).sum() for run in batches(groups, batch_tokens)]
    finally:
        model.train(training)
    return torch.cat(parts)


class Assessment(NamedTuple):
    """What a policy does when it is asked.

    Attributes:
        reward: mean true reward of its answers.
        length: mean number of tokens, the end included.
        kl: Kullback-Leibler divergence from the reference in nats per answer: the mean of ``log pi - log reference``
            over the policy's own samples.
        capped: share of answers cut at the longest length.
        distinct: share of the answers' word pairs that are different ones.
        rewards: mean of every further reward, by name.
    """

    reward: float
    length: float
    kl: float
    capped: float
    distinct: float
    rewards: Mapping[str, float]


def assess(
    policy: Language,
    reference: "nn.Module",
    prompts: Sequence[str],
    reward: Reward,
    *,
    seed: int,
    max_new_tokens: int,
    samples: int = 1,
    also: Mapping[str, Reward] | None = None,
) -> Assessment:
    """Sample the policy on prompts and measure.

    Args:
        policy: what has been trained, with its tokenizer.
        reference: what it began as.
        prompts: plain texts it was not trained on.
        reward: the true one, of (prompt, answer).
        seed: the same noise for every policy of a comparison.
        max_new_tokens, samples: see `draw`.
        also: further rewards by name.
    """
    answers = [
        a for own in draw(policy, prompts, samples=samples, seed=seed, max_new_tokens=max_new_tokens) for a in own
    ]
    ratio = answer_logps(policy.model, answers) - answer_logps(reference, answers)
    lengths = [len(answer.group.completions[0]) for answer in answers]
    end = policy.tokenizer.eos_token_id
    pairs = [pair for a in answers for words in [a.text.split()] for pair in itertools.pairwise(words)]
    return Assessment(
        reward=float(np.mean([reward(a.prompt, a.text) for a in answers])),
        length=float(np.mean(lengths)),
        kl=float(ratio.double().mean()),
        capped=float(np.mean([a.group.completions[0][-1] != end for a in answers])),
        distinct=len(set(pairs)) / len(pairs) if pairs else 0.0,
        rewards={
            name: float(np.mean([other(a.prompt, a.text) for a in answers])) for name, other in (also or {}).items()
        },
    )
