"""Honest comparison: tasks, arms, trials, claims, verdicts; the journal that keeps them and the engine that runs them.

What a room or a paper declares comes from `counterproof.bench.task`; the other modules' public names are offered here,
each imported on first use.
"""

from counterproof.exports import lazy_exports

__getattr__, __dir__ = lazy_exports(__name__, __file__)
