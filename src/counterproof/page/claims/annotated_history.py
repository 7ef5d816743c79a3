"""Claims of "Annotated History of Modern AI and Deep Learning" (arXiv 2212.11279).

The survey measures nothing. What is checked is whether credit that flows back along shares finds what the present
depends on, where the truth is known because ideas are taken away; and whether the survey's closing pattern is more than
a choice of milestones.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.bench.task import Arm, Budget, Claim, Metric, Task, Trial

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

HERE = "counterproof.page.claims.annotated_history"

IDEAS = Task(
    name="idea-credit",
    says=(
        "rank the older ideas of a simulated history by how much the latest ones would lose without each; rules see "
        "who builds on whom and what noisy annotators say about shares"
    ),
    run=f"{HERE}:run_ideas",
    metrics={
        "spearman": Metric("higher", says="rank correlation with the loss when the idea is taken away"),
        "top": Metric("higher", says="share of the tenth that matters most that is found among the first tenth"),
    },
    budgets={
        "quick": Budget(
            settings={"ideas": 250, "present": 40, "value": "linear", "noise": 0.5, "missing": 0.0}, seeds=(6, 24)
        ),
        "standard": Budget(
            settings={"ideas": 1000, "present": 100, "value": "linear", "noise": 0.5, "missing": 0.0},
            seeds=(12, 60),
            minutes=30.0,
        ),
        "full": Budget(
            settings={"ideas": 4000, "present": 400, "value": "linear", "noise": 0.5, "missing": 0.0},
            seeds=(20, 200),
            minutes=None,
            trial_minutes=60.0,
        ),
    },
    plug="method(view) returns a score per idea; view has later, earlier, shares, own (as annotators say), present",
    sample="instance",
)

PATTERN = Task(
    name="milestone-pattern",
    says=(
        "fit a straight line to the logarithms of turning points' years before an end point; the survey's list, or one "
        "made of random times"
    ),
    run=f"{HERE}:run_pattern",
    metrics={
        "r_squared": Metric("higher", says="share of the variance of the logarithms that the line explains"),
        "misfit": Metric("lower", "log-years", "root of the mean squared residual"),
    },
    budgets={
        "quick": Budget(settings={"lists": 20, "pool": 1000}, seeds=(6, 24)),
        "standard": Budget(settings={"lists": 200, "pool": 1000}, seeds=(12, 60), minutes=30.0),
        "full": Budget(settings={"lists": 2000, "pool": 1000}, seeds=(20, 200), minutes=None),
    },
    plug="method(generator, pool=) returns falling years before the end point",
    sample="instance",
)


class View(NamedTuple):
    """A history as annotators see it. Ideas are numbered by time; an edge leads from a later to an earlier one."""

    later: "NDArray[np.int64]"
    earlier: "NDArray[np.int64]"
    shares: "NDArray[np.float64]"
    own: "NDArray[np.float64]"
    present: "NDArray[np.int64]"


def simulate(ideas: int, rng: "np.random.Generator") -> "tuple[Any, Any, Any, Any, Any]":
    """Who builds on whom and by which shares: later, earlier, shares, own parts, and the worth of each own part.

    Ideas attach to what is popular and recent; about three roots each. Shares with the own part sum to 1.
    """
    import numpy as np

    later, earlier, shares, own = [], [], [], np.ones(ideas)
    popular = np.ones(ideas)
    for idea in range(5, ideas):
        recent = np.exp((np.arange(idea) - idea) / (0.25 * ideas))
        chance = popular[:idea] * recent
        count = min(1 + rng.poisson(2.0), idea)
        chosen = rng.choice(idea, size=count, replace=False, p=chance / chance.sum())
        own[idea] = rng.beta(2.0, 3.0)
        shares.append((1 - own[idea]) * rng.dirichlet(np.ones(count)))
        later.append(np.full(count, idea))
        earlier.append(chosen)
        popular[chosen] += 1.0
    worth = np.exp(0.5 * rng.standard_normal(ideas))
    return np.concatenate(later), np.concatenate(earlier), np.concatenate(shares), own, worth


def losses(
    later: "NDArray[np.int64]",
    earlier: "NDArray[np.int64]",
    shares: "NDArray[np.float64]",
    own: "NDArray[np.float64]",
    worth: "NDArray[np.float64]",
    present: "NDArray[np.int64]",
    rule: str,
) -> "NDArray[np.float64]":
    """What the present's summed value loses when each idea's value is set to zero: (n,).

    The value of an idea is own worth + shares of its roots' values ("linear"), or the root of the sum of their squares
    ("root-sum-square"), under which the method's model is wrong.
    """
    import numpy as np

    count = len(own)
    power = {"linear": 1, "root-sum-square": 2}[rule]
    value = np.zeros((count + 1, count))  # a row for each idea taken away, and one for none
    starts = np.searchsorted(later, np.arange(count + 1))
    for idea in range(count):
        inside = slice(starts[idea], starts[idea + 1])
        parts = (own[idea] * worth[idea]) ** power + ((value[:, earlier[inside]] * shares[inside]) ** power).sum(axis=1)
        value[:, idea] = parts ** (1 / power)
        value[idea, idea] = 0.0
    total = value[:, present].sum(axis=1)
    lost: NDArray[np.float64] = total[-1] - total[:-1]
    return lost


def run_ideas(arm: Arm, trial: Trial) -> Mapping[str, float]:
    import numpy as np
    from scipy.stats import spearmanr

    settings = trial.settings
    ideas = int(settings["ideas"])
    later, earlier, shares, own, worth = simulate(ideas, trial.rng("history"))
    present = np.arange(ideas - int(settings["present"]), ideas)
    trial.log(0.2)
    with trial.off_clock():
        lost = losses(later, earlier, shares, own, worth, present, settings["value"])
    trial.log(0.8)
    rng = trial.rng("annotators")
    seen = rng.random(len(later)) >= settings["missing"]
    noisy = shares * np.exp(settings["noise"] * rng.standard_normal(len(shares)))
    rest = own * np.exp(settings["noise"] * rng.standard_normal(ideas))
    later, earlier, noisy = later[seen], earlier[seen], noisy[seen]
    total = rest + np.bincount(later, noisy, minlength=ideas)
    score = arm.load()(View(later, earlier, noisy / total[later], rest / total, present))
    # The present itself is what is asked about, so it is not among what is ranked.
    older = slice(0, ideas - len(present))
    score, lost = np.asarray(score, float)[older], lost[older]
    tenth = max(len(lost) // 10, 1)
    first = set(np.argsort(-score, kind="stable")[:tenth].tolist())
    truth = set(np.argsort(-lost, kind="stable")[:tenth].tolist())
    return {"spearman": float(spearmanr(score, lost).statistic), "top": len(first & truth) / tenth}


def in_degree(view: View) -> "NDArray[np.float64]":
    """How many build on it."""
    import numpy as np

    count: NDArray[np.float64] = np.bincount(view.earlier, minlength=len(view.own)).astype(float)
    return count


def in_degree_by_age(view: View) -> "NDArray[np.float64]":
    """How many build on it for each idea that came since."""
    import numpy as np

    count = len(view.own)
    rate: NDArray[np.float64] = in_degree(view) / np.arange(count, 0, -1)
    return rate


def pagerank(view: View, *, damping: float = 0.85) -> "NDArray[np.float64]":
    """Rank that flows from later to earlier ideas, damped; ideas without roots spread theirs over all."""
    import numpy as np

    count = len(view.own)
    out = np.bincount(view.later, minlength=count)
    rank = np.full(count, 1 / count)
    for _ in range(1000):
        flow = np.bincount(view.earlier, rank[view.later] / out[view.later], minlength=count)
        now: NDArray[np.float64] = (1 - damping) / count + damping * (flow + rank[out == 0].sum() / count)
        if np.abs(now - rank).sum() < 1e-12:
            return now
        rank = now
    raise ArithmeticError("PageRank did not settle in 1000 steps")


def backward_equal(view: View) -> "NDArray[np.float64]":
    """Credit backwards, an idea and its k roots getting 1 / (k + 1) each."""
    import numpy as np

    from counterproof.page.annotated_history import backward_credit

    roots = np.bincount(view.later, minlength=len(view.own))
    return backward_credit(view.later, view.earlier, 1 / (1.0 + roots[view.later]), _weights(view))


def backward_annotated(view: View) -> "NDArray[np.float64]":
    """Credit backwards along the annotators' shares."""
    from counterproof.page.annotated_history import backward_credit

    return backward_credit(view.later, view.earlier, view.shares, _weights(view))


def _weights(view: View) -> "NDArray[np.float64]":
    import numpy as np

    weights = np.zeros(len(view.own))
    weights[view.present] = 1.0
    return weights


def run_pattern(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Means over lists; the survey's is the same every time."""
    import numpy as np

    from counterproof.page.annotated_history import acceleration

    rng = trial.rng("lists")
    fits = []
    for number in range(int(trial.settings["lists"])):
        fits.append(acceleration(arm.load()(rng, pool=int(trial.settings["pool"]), **arm.settings)))
        trial.log((number + 1) / trial.settings["lists"])
    return {
        "r_squared": float(np.mean([fit.r_squared for fit in fits])),
        "misfit": float(np.mean([fit.misfit for fit in fits])),
    }


def as_given(generator: "np.random.Generator", *, pool: int, before: list[float]) -> "NDArray[np.float64]":
    import numpy as np

    return np.array(before)


def at_random(generator: "np.random.Generator", *, pool: int) -> "NDArray[np.float64]":
    from counterproof.page.annotated_history import random_milestones

    return random_milestones(generator)


def chosen_to_fit(generator: "np.random.Generator", *, pool: int) -> "NDArray[np.float64]":
    from counterproof.page.annotated_history import selected_milestones

    return selected_milestones(generator, pool=pool)


IN_DEGREE = Arm("in-degree", f"{HERE}:in_degree")
BY_AGE = Arm("in-degree-by-age", f"{HERE}:in_degree_by_age")
PAGERANK = Arm("pagerank", f"{HERE}:pagerank")
EQUAL = Arm("backward-equal", f"{HERE}:backward_equal")
ANNOTATED = Arm("backward-annotated", f"{HERE}:backward_annotated")
RANDOM = Arm("random-times", f"{HERE}:at_random")
CHOSEN = Arm("chosen-to-fit", f"{HERE}:chosen_to_fit")
# Years before the end point, as in history/milestones.yaml; here too, so that a trial's key covers them.
GIVEN = [13.8e9, 3.5e9, 0.9e9, 220e6, 55e6, 13e6, 3.5e6, 850e3, 210e3, 50e3, 13e3, 3.3e3, 800.0, 200.0, 50.0, 12.0]
SURVEY = Arm("survey", f"{HERE}:as_given", {"before": GIVEN})

ARMS = {
    IDEAS.name: (PAGERANK, IN_DEGREE, BY_AGE, EQUAL, ANNOTATED),
    PATTERN.name: (CHOSEN, RANDOM, SURVEY),
}
NOTHING = "nothing was measured; the survey argues that popular accounts misattribute"


def _ideas(name: str, says: str, baseline: Arm, method: Arm = ANNOTATED, **settings: Any) -> Claim:
    return Claim(
        paper="annotated-history",
        name=name,
        says=says,
        task=IDEAS,
        baseline=baseline,
        method=method,
        metric="spearman",
        better="higher",
        smallest=0.02,
        reported=NOTHING,
        settings=settings,
    )


def _pattern(name: str, says: str, baseline: Arm, **settings: Any) -> Claim:
    return Claim(
        paper="annotated-history",
        name=name,
        says=says,
        task=PATTERN,
        baseline=baseline,
        method=SURVEY,
        metric="r_squared",
        better="higher",
        smallest=0.01,
        reported="intervals that shrink to about a quarter from step to step; no test against chance",
        settings=settings,
    )


CREDIT = "credit that flows back along noisy shares finds what the present depends on better than"
CLAIMS = (
    _ideas("main", f"{CREDIT} PageRank, by", PAGERANK),
    _ideas("wrong-model", f"{CREDIT} PageRank, where values add up as root of squares, by", PAGERANK,
           value="root-sum-square"),
    _ideas("in-degree", f"{CREDIT} counting what builds on an idea, by", IN_DEGREE),
    _ideas("age", f"{CREDIT} counting it for each idea that came since, by", BY_AGE),
    _ideas("links-only", "credit that flows back in equal parts, without any annotator, does better than PageRank, by",
           PAGERANK, EQUAL),
    _ideas("shares", f"{CREDIT} equal parts, by", EQUAL),
    _ideas("noise-1", f"{CREDIT} equal parts, when shares are off by a factor e, by", EQUAL, noise=1.0),
    _ideas("noise-2", f"{CREDIT} equal parts, when shares are off by a factor e squared, by", EQUAL, noise=2.0),
    _ideas("missing-30", f"{CREDIT} PageRank on the same graph, with 30 % of the edges missing, by", PAGERANK,
           missing=0.3),
    _ideas("missing-60", f"{CREDIT} PageRank on the same graph, with 60 % of the edges missing, by", PAGERANK,
           missing=0.6),
    _pattern("acceleration", "the survey's turning points lie nearer to a line than ones chosen among 1000 random times"
             " to fit it, by", CHOSEN),
    _pattern("acceleration-unchosen", "the survey's turning points lie nearer to a line than random times in order, by",
             RANDOM),
)  # fmt: skip
