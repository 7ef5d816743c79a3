"""How many of their words, weighted by rarity, an answer and the instructor's share: what any grader has to beat."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from counterproof.errors import extra

with extra("judging"):
    from sklearn.feature_extraction.text import TfidfVectorizer

__all__ = ["tfidf_cosine"]


def tfidf_cosine(model_answers: Sequence[str], answers: Sequence[str]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Cosine of the TF-IDF vectors of each answer and its model answer.

    Args:
        model_answers, answers: n texts each; frequencies are those in all of them.

    Returns:
        (n,), float64, 0 to 1; 0 where they share no word.
    """
    try:
        vectors = TfidfVectorizer(sublinear_tf=True).fit_transform([*model_answers, *answers])
    except ValueError:  # not one word in all of them
        return np.zeros(len(answers))
    n = len(answers)
    return np.asarray(vectors[:n].multiply(vectors[n:]).sum(axis=1), np.float64).ravel()
