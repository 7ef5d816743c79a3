"""Claims of "Online Information Acquisition: Hiring Multiple Agents" (arXiv 2307.06210)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Budget, Claim, Metric, Task, Trial
from counterproof.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

HERE = "counterproof.incentives.claims.hiring_agents"

MECHANISM_VALUE = Task(
    name="mechanism-value",
    says=(
        "random problems of paying two agents for information, solved exactly: correlated recommendations, pay by "
        "peers' reports or by own ones; the principal's value, where a right decision is worth 1"
    ),
    run=f"{HERE}:run_mechanisms",
    metrics={
        "value": Metric("higher", says="utility of the decision minus payments, mean over a block of instances"),
        "captured": Metric(
            "higher",
            says=(
                "share of the value that the first best (efforts and signals public) has over hiring nobody, summed "
                "over the block before dividing"
            ),
        ),
        "workers": Metric("higher", says="expected number of agents recommended to work"),
    },
    budgets={
        "quick": Budget(settings={"family": "common-noise", "instances": 64}, seeds=(4, 16)),
        "standard": Budget(settings={"family": "common-noise", "instances": 256}, seeds=(4, 16), minutes=30.0),
        "full": Budget(settings={"family": "common-noise", "instances": 1024}, seeds=(4, 16), minutes=None),
    },
    plug="a function (P, costs, utility, max_payment, **settings) -> a mechanism with .value and .mu",
    sample="instance",
)

ONLINE_HIRING = Task(
    name="online-hiring",
    says=(
        "two unknown agents who see the same noisy view of a fair binary state, hired for up to 10^10 rounds by "
        "explore-then-commit; after the principal commits, agents play an equilibrium, not what they are told"
    ),
    run=f"{HERE}:run_online",
    metrics={
        "slope": Metric("lower", says="slope of log mean regret on log rounds, over the horizons"),
        "regret": Metric("lower", says="regret at the longest horizon, mean over runs, over rounds^(2/3)"),
        "obeyed": Metric(
            "higher",
            says="share of the runs, of all horizons, in which every agent chooses the recommended efforts",
        ),
        "alpha": Metric("lower", says="weight of the known rules in the payments at the longest horizon"),
    },
    budgets={
        "quick": Budget(settings={"horizons": [1e6, 1e7, 1e8, 1e9, 1e10], "runs": 32}, seeds=(4, 12)),
        "standard": Budget(
            settings={"horizons": [1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12], "runs": 128}, seeds=(4, 12), minutes=30.0
        ),
        "full": Budget(
            settings={"horizons": [1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12], "runs": 512}, seeds=(4, 12), minutes=None
        ),
    },
    plug="a learner class, called (problem, rounds, **settings), with .simulate(generator) -> a run as `Learning`",
)


def shared_view(prior: "Floats", view: "Floats", agents: "list[list[Floats]]") -> "Floats":
    """P of two agents whose signals depend on a view of the state, and are independent given it.

    Args:
        prior: (states,).
        view: (states, views) what there is to see.
        agents: per agent and effort, (views, signals).
    """
    import numpy as np

    return np.stack(
        [
            np.stack([np.einsum("k,kw,ws,wt->stk", prior, view, first, second) for second in agents[1]])
            for first in agents[0]
        ]
    )


def common_noise(rng: "np.random.Generator") -> dict[str, Any]:
    """A binary state, a view of it that errs for both agents alike, and what each misreads itself."""
    import numpy as np

    prior = np.array([0.0, rng.uniform(0.35, 0.65)])
    prior[0] = 1 - prior[1]
    right = rng.uniform(0.55, 0.9)
    view = np.array([[right, 1 - right], [1 - right, right]])
    agents = []
    for misread in rng.uniform(0, 0.25, 2):
        agents.append([np.full((2, 2), 0.5), np.array([[1 - misread, misread], [misread, 1 - misread]])])
    costs = [[0.0, cost] for cost in rng.uniform(0.01, 0.08, 2)]
    return {"P": shared_view(prior, view, agents), "costs": costs, "utility": np.eye(2), "max_payment": 2.0}


def complementary(rng: "np.random.Generator") -> dict[str, Any]:
    """Three states; one agent can tell the first from the others, the other the last: to decide takes both."""
    import numpy as np

    prior = rng.dirichlet(np.full(3, 20.0))
    right = rng.uniform(0.7, 0.95)
    view = np.full((3, 3), (1 - right) / 2) + (right - (1 - right) / 2) * np.eye(3)
    agents = []
    for threshold, misread in zip((1, 2), rng.uniform(0, 0.25, 2)):
        above = np.where(np.arange(3) >= threshold, 1 - misread, misread)
        agents.append([np.full((3, 2), 0.5), np.column_stack([1 - above, above])])
    costs = [[0.0, cost] for cost in rng.uniform(0.01, 0.08, 2)]
    return {"P": shared_view(prior, view, agents), "costs": costs, "utility": np.eye(3), "max_payment": 2.0}


FAMILIES = {"common-noise": common_noise, "complementary": complementary}


def solve(P: "Floats", costs: Any, utility: "Floats", max_payment: float, *, payments: str) -> Any:
    from counterproof.incentives import InformationAcquisition

    return InformationAcquisition(P, costs, utility, max_payment).optimal(payments)


def run_mechanisms(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """A block of instances of one family, the same for every arm."""
    import numpy as np

    method = arm.load()
    if method is None:
        raise UserError(f"arm {arm.name} has no method; {MECHANISM_VALUE.plug}")
    rng = trial.rng("instances")
    count = trial.settings["instances"]
    values, shares, workers = [], np.zeros(2), []
    for k in range(count):
        instance = FAMILIES[trial.settings["family"]](rng)
        found = method(**instance, **arm.settings)
        with trial.off_clock():
            P, utility = instance["P"], instance["utility"]
            worth = (P @ utility.T).max(-1).sum((-2, -1))  # of deciding on both signals, by efforts
            cost = np.add.outer(*instance["costs"])
            idle = worth[0, 0]
            shares += found.value - idle, (worth - cost).max() - idle
            values.append(found.value)
            workers.append(float((found.mu * np.add.outer([0, 1], [0, 1])).sum()))
            if (k + 1) % max(1, count // 16) == 0:
                trial.log((k + 1) / count, value=float(np.mean(values)))
    return {
        "value": float(np.mean(values)),
        "captured": float(shares[0] / shares[1]),
        "workers": float(np.mean(workers)),
    }


def reference_instance() -> dict[str, Any]:
    """Two agents; view right with 0.7, read right with 0.95 by work at 0.05 and with 0.5 by none; pay up to 1."""
    import numpy as np

    view, idle = np.array([[0.7, 0.3], [0.3, 0.7]]), np.full((2, 2), 0.5)
    work = np.array([[0.95, 0.05], [0.05, 0.95]])
    P = shared_view(np.full(2, 0.5), view, [[idle, work], [idle, work]])
    return {"P": P, "costs": [[0.0, 0.05]] * 2, "utility": np.eye(2), "max_payment": 1.0}


def run_online(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Runs at every horizon; the samples are the same for every arm."""
    import numpy as np

    from counterproof.incentives import InformationAcquisition

    learner = arm.load()
    if learner is None:
        raise UserError(f"arm {arm.name} has no method; {ONLINE_HIRING.plug}")
    horizons, count = trial.settings["horizons"], trial.settings["runs"]
    problem = InformationAcquisition(**reference_instance())
    means, obeyed, alpha = [], [], 0.0
    for k, rounds in enumerate(horizons):
        plan = learner(problem, rounds, **arm.settings)
        rng = trial.rng(f"samples {rounds:g}")
        runs = [plan.simulate(rng) for _ in range(count)]
        means.append(float(np.mean([run.regret for run in runs])))
        obeyed += [run.obeyed for run in runs]
        alpha = runs[-1].alpha
        trial.log((k + 1) / len(horizons), rounds=rounds, regret=means[-1] / rounds ** (2 / 3))
    x, y = np.log(horizons), np.log(means)
    return {
        "slope": float(np.polyfit(x, y, 1)[0]),
        "regret": means[-1] / horizons[-1] ** (2 / 3),
        "obeyed": float(np.mean(obeyed)),
        "alpha": alpha,
    }


OWN, PEER, CORRELATED = (Arm(name, f"{HERE}:solve", {"payments": name}) for name in ("own", "peer", "correlated"))
LEARNER = "counterproof.incentives.hiring_agents:ExploreThenCommit"
MIXED = Arm("mixed", LEARNER)
PLUG_IN = Arm("plug-in", LEARNER, {"alpha": 0.0})
RULES_ONLY = Arm("rules-only", LEARNER, {"alpha": 1.0})

# More arms for `counterproof compare`.
ARMS = {
    MECHANISM_VALUE.name: (OWN, PEER, CORRELATED),
    ONLINE_HIRING.name: (
        MIXED,
        PLUG_IN,
        RULES_ONLY,
        Arm("mixed-own", LEARNER, {"payments": "own"}),
        Arm("mixed-costs-learned", LEARNER, {"costs": "learned"}),
    ),
}

THEOREM = "theory: optimal mechanisms correlate efforts and payments; no experiment"
RATE = "theory: regret O~(T^(2/3)); no experiment"


def _value(name: str, says: str, family: str, baseline: Arm, method: Arm, reported: str = THEOREM) -> Claim:
    return Claim(
        paper="hiring-agents",
        name=name,
        says=says,
        task=MECHANISM_VALUE,
        baseline=baseline,
        method=method,
        metric="value",
        better="higher",
        smallest=0.001,
        reported=reported,
        settings={"family": family},
    )


def _online(name: str, says: str, baseline: Arm, metric: str, smallest: float, reported: str = RATE) -> Claim:
    return Claim(
        paper="hiring-agents",
        name=name,
        says=says,
        task=ONLINE_HIRING,
        baseline=baseline,
        method=MIXED,
        metric=metric,
        better=ONLINE_HIRING.metrics[metric].better,
        smallest=smallest,
        reported=reported,
    )


# `smallest`: a thousandth of what a right decision is worth; 0.2 of a power of T; a tenth of the runs.
CLAIMS = (
    _value(
        "main",
        "agents who err together: correlated recommendations, against pay by own reports, give the principal a higher "
        "value",
        "common-noise",
        OWN,
        CORRELATED,
    ),
    _value(
        "over-peers",
        "agents who err together: correlated recommendations, against one profile paid by all reports, give a higher "
        "value",
        "common-noise",
        PEER,
        CORRELATED,
    ),
    _value(
        "peers-alone",
        "agents who err together: pay by all reports without correlated recommendations gives a higher value",
        "common-noise",
        OWN,
        PEER,
        "theory: correlation is needed; an earlier run on this family found that peers' reports alone add nothing",
    ),
    _value(
        "complementary",
        "agents who know different things: correlated recommendations, against pay by own reports, give a higher value",
        "complementary",
        OWN,
        CORRELATED,
    ),
    _value(
        "complementary-over-peers",
        "agents who know different things: correlated recommendations, against one profile paid by all reports, give a "
        "higher value",
        "complementary",
        PEER,
        CORRELATED,
    ),
    _value(
        "complementary-peers-alone",
        "agents who know different things: pay by all reports without correlated recommendations gives a higher value",
        "complementary",
        OWN,
        PEER,
    ),
    _online(
        "learns",
        "explore-then-commit, against paying by the known rules for ever, has a lower slope of log regret",
        RULES_ONLY,
        "slope",
        0.2,
    ),
    _online(
        "obeyed",
        "mixing the known rules into the payments, against the plug-in optimum, gives a larger share of obeyed runs",
        PLUG_IN,
        "obeyed",
        0.1,
        "theory: the mixture makes the estimated mechanism incentive compatible; no experiment",
    ),
    _online(
        "regret-of-plug-in",
        "mixing the known rules into the payments, against the plug-in optimum that agents may leave, has lower regret",
        PLUG_IN,
        "regret",
        1.0,
        "theory: the mixture has regret O~(T^(2/3)), the plug-in optimum no such bound; no experiment",
    ),
)
