"""Probabilities of every whole score as a model's reply; what prompts share is read once, what was found is kept."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from counterproof.errors import UserError, extra
from counterproof.judging.rubrics import mark_of

with extra("judging"):
    import torch

    from counterproof.language.scoring import Group, batches, causal_model, completion_logps, head_logps

if TYPE_CHECKING:
    from counterproof.language.models import Language

__all__ = ["ScoreStore", "labels_of", "score_labels"]

LEAD = "Score:"  # what the model's reply is begun with
BATCH_TOKENS = 4096  # in one forward pass


def labels_of(language: "Language", maximum: int) -> list[tuple[int, ...]]:
    """Token ids of a reply for each score 0, ..., maximum.

    Where one is the beginning of another (1 and 10), all are followed by the end of the turn; so no reply is counted in
    two scores.
    """
    tokenizer = language.tokenizer
    labels = [
        tuple(tokenizer(f"{LEAD} {score}", add_special_tokens=False)["input_ids"]) for score in range(maximum + 1)
    ]
    if any(a != b and b[: len(a)] == a for a in labels for b in labels):
        labels = [(*one, tokenizer.eos_token_id) for one in labels]
    if len(set(labels)) < len(labels):
        raise UserError(f"the model's tokenizer writes two scores of 0 to {maximum} alike; take another model")
    return labels


def score_labels(
    language: "Language", prompts: Sequence[tuple[int, ...]], labels: Sequence[tuple[int, ...]], store: "ScoreStore"
) -> "Iterator[tuple[range, list[np.ndarray[Any, np.dtype[np.float64]]]]]":
    """Log-probabilities of every label after every prompt, batch by batch; what all the prompts share is read once."""
    if not prompts:
        return
    model = language.model
    common = 0
    shortest = min(map(len, prompts))
    while common < shortest - 1 and len({ids[common] for ids in prompts}) == 1:
        common += 1
    lead = 0
    while all(len(one) > lead + 1 for one in labels) and len({one[lead] for one in labels}) == 1:
        lead += 1
    heads = [one[lead:] for one in labels]
    single = all(len(one) == 1 for one in heads)
    if single:
        # One token decides: a single forward pass over what differs between the students, and its last state.
        rests = [(*ids[common:], *labels[0][:lead], heads[0][0]) for ids in prompts]
        pieces = [Group(prompts[0][:common] or rests[0][:1], (rest,)) for rest in rests] if common else []
        if not common:
            pieces = [Group(rest[:1], (rest[1:],)) for rest in rests]
        runs = []
        start, held = 0, common
        for index, rest in enumerate(rests):
            if index > start and held + len(rest) > BATCH_TOKENS:
                runs.append(range(start, index))
                start, held = index, common
            held += len(rest)
        runs.append(range(start, len(rests)))
    else:
        pieces = [Group((*ids, *labels[0][:lead]), tuple(heads)) for ids in prompts]
        runs = list(batches(pieces, BATCH_TOKENS))
    for run in runs:
        keys = [mark_of(store.model, prompts[index], labels) for index in run]
        known = [store.get(key) for key in keys]
        if any(one is None for one in known):
            with torch.no_grad():
                if single and common:
                    groups = [Group(pieces[0].prompt, tuple(pieces[index].completions[0] for index in run))]
                else:
                    groups = [pieces[index] for index in run]
                scored = completion_logps(model, groups, hidden=single)
                if single:
                    assert scored.hidden is not None
                    states = scored.hidden[scored.lengths.cumsum(0) - 1]
                    targets = torch.tensor([one[0] for one in heads], device=states.device).repeat(len(run))
                    logps = head_logps(causal_model(model), states.repeat_interleave(len(heads), 0), targets)
                else:
                    logps = scored.sum()
            fresh = list(logps.double().cpu().numpy().reshape(len(run), len(labels)))
            for key, values in zip(keys, fresh, strict=True):
                store.put(key, values)
            known = [*fresh]
        yield run, [one for one in known if one is not None]


class ScoreStore:
    """Log-probabilities that were computed, kept line by line as they come.

    Args:
        path: a file, or None to keep them in memory.
        model: a hash of the model.

    Raises:
        UserError: a file that cannot be read or written.
    """

    def __init__(self, path: Path | None, model: str) -> None:
        self.model = model
        self._path = path
        self._found: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
            if lines and lines[-1]:  # a line that was being written when the run ended
                with path.open("a", encoding="utf-8") as stream:
                    stream.write("\n")
        except OSError as problem:
            raise UserError(f"cannot keep scores in {path}: {problem.strerror}; name another folder") from None
        for line in lines:
            try:
                one = json.loads(line)
                self._found[one["key"]] = np.array(one["logps"], np.float64)
            except (ValueError, TypeError, LookupError):
                continue  # torn: it is computed again

    def get(self, key: str) -> "np.ndarray[Any, np.dtype[np.float64]] | None":
        """What was found under a key, or None."""
        return self._found.get(key)

    def put(self, key: str, values: "np.ndarray[Any, np.dtype[np.float64]]") -> None:
        """Keep it."""
        self._found[key] = values
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"key": key, "logps": values.tolist()}) + "\n")
