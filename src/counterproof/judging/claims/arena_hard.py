"""Claims of "From Crowdsourced Data to High-Quality Benchmarks" (arXiv 2406.11939)."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from counterproof.bench.task import Arm, Budget, Claim, Metric, Task, Trial

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from counterproof.judging.battles import Battles

HERE = "counterproof.judging.claims.arena_hard"

SELECTION = Task(
    name="benchmark-selection",
    says=(
        "choose prompts of a simulated crowd for a benchmark of 20 models of known ability, judge them against a "
        "baseline, rate them, and compare with a simulated arena of people's votes"
    ),
    run=f"{HERE}:run_selection",
    metrics={
        "agreement": Metric(
            "higher", says="agreement with confidence with the arena: mean over pairs of models, -1 to 1"
        ),
        "separability": Metric("higher", says="share of pairs of models whose 95 % intervals do not overlap"),
        "brier": Metric("lower", says="squared error of the predicted order of a pair, mean over pairs"),
        "spearman": Metric("higher", says="rank correlation with the arena"),
        "prompts": Metric("higher", says="prompts in the benchmark"),
    },
    budgets={
        "quick": Budget(
            settings={"models": 20, "crowd": 6000, "topics": 300, "chosen": 200, "rounds": 300}, seeds=(6, 24)
        ),
        "standard": Budget(
            settings={"models": 40, "crowd": 20_000, "topics": 800, "chosen": 500, "rounds": 1000},
            seeds=(12, 60),
            minutes=30.0,
        ),
        "full": Budget(
            settings={"models": 80, "crowd": 200_000, "topics": 4000, "chosen": 500, "rounds": 1000},
            seeds=(20, 200),
            minutes=None,
        ),
    },
    plug="method(texts, embed=, annotate=, clusters=, per_cluster=, seed=) returns the places of the chosen prompts",
    sample="instance",
)

INTERVALS = Task(
    name="benchmark-intervals",
    says=(
        "rate 12 simulated models by two games on each of 100 prompts against a baseline, judged at five levels, many "
        "times over; the models' true scores are those over all prompts"
    ),
    run=f"{HERE}:run_intervals",
    metrics={
        "coverage": Metric("higher", says="share of the 95 % intervals that hold the true score"),
        "width": Metric("lower", "log-odds", "mean width of the intervals"),
    },
    budgets={
        "quick": Budget(settings={"models": 12, "prompts": 100, "studies": 20, "rounds": 200}, seeds=(6, 24)),
        "standard": Budget(
            settings={"models": 12, "prompts": 500, "studies": 60, "rounds": 500}, seeds=(12, 40), minutes=30.0
        ),
        "full": Budget(
            settings={"models": 40, "prompts": 500, "studies": 200, "rounds": 1000}, seeds=(12, 40), minutes=None
        ),
    },
    plug="method(battles, rounds=, seed=) returns (rounds, models) log-odds against the baseline, the last model",
    sample="instance",
)

# How a prompt tells models apart, by the number of criteria it truly meets: hardly, with none; well, with all seven.
FLATTEST, STEEPEST = 0.2, 2.0


def run_selection(arm: Arm, trial: Trial) -> Mapping[str, float]:
    import numpy as np

    from counterproof.judging.arena_hard import agreement, brier, rank_correlations, separability
    from counterproof.judging.bradley_terry import BradleyTerry

    select: Callable[..., Sequence[int]] = arm.load()
    settings, world = trial.settings, trial.rng("world")
    models, crowd, topics = settings["models"], settings["crowd"], settings["topics"]
    ability = world.normal(size=models)
    # A topic is a direction in which its prompts' vectors lie, and how often its prompts have a property.
    topic = world.integers(topics, size=crowd)
    centres = world.normal(size=(topics, 32))
    vectors = centres[topic] + 0.25 * world.normal(size=(crowd, 32))
    chance = world.beta(1.2, 1.2, size=topics)
    met = world.random((crowd, 7)) < chance[topic][:, None]
    steepness = FLATTEST + (STEEPEST - FLATTEST) * met.mean(axis=1)
    flipped = trial.rng("annotator").random((crowd, 7)) < settings["flip"]
    noted = [tuple(int(n) + 1 for n in np.flatnonzero(row)) for row in met ^ flipped]
    texts = [str(place) for place in range(crowd)]
    chosen = np.asarray(
        select(
            texts,
            embed=lambda asked: vectors[[int(text) for text in asked]],
            annotate=lambda asked: [noted[int(text)] for text in asked],
            prompt_threshold=settings["prompt_threshold"],
            cluster_threshold=settings["cluster_threshold"],
            clusters=settings["chosen"] // 2,
            per_cluster=2,
            seed=trial.seed,
            **arm.settings,
        )
    )
    if not len(chosen):
        # A benchmark of nothing separates nothing.
        return {"agreement": 0.0, "separability": 0.0, "brier": 0.25, "spearman": 0.0, "prompts": 0.0}
    games = _games(ability, steepness[chosen], trial.rng("judge"))
    base = models // 2
    judged = _battles_against(games, base, models)
    own = BradleyTerry().fit(judged).bootstrap(settings["rounds"], seed=trial.seed)
    votes = _arena(ability, 400 * models, trial.rng("arena"))
    people = BradleyTerry().fit(votes).bootstrap(settings["rounds"], seed=trial.seed + 1)
    return {
        "agreement": agreement(own, people),
        "separability": separability(own),
        "brier": brier(own, people),
        "spearman": rank_correlations(own, people)["spearman"],
        "prompts": float(len(chosen)),
    }


def _games(ability: "NDArray[np.float64]", steepness: "NDArray[np.float64]", rng: "np.random.Generator") -> Any:
    """Advantage of each model's answer over the others', as a judge feels it: (prompts, 2 orders, models)."""
    prompts, models = len(steepness), len(ability)
    # Luck of an answer is shared by both orders; what the judge adds is not.
    answers = steepness[:, None] * ability + rng.normal(size=(prompts, models)) * 0.7
    return answers[:, None, :] + rng.logistic(size=(prompts, 2, models)) * 0.5


def _battles_against(games: Any, base: int, models: int) -> "Battles":
    """Every model against the baseline, on five levels, "much better" counting three times."""
    import numpy as np

    from counterproof.judging.battles import Battles

    prompts = len(games)
    lead = games - games[:, :, [base]]
    others = [model for model in range(models) if model != base]
    lead = lead[:, :, others].reshape(-1)
    model = np.tile(others, prompts * 2)
    prompt = np.repeat(np.arange(prompts), 2 * len(others))
    outcome = np.where(np.abs(lead) < 0.3, 0.5, (lead > 0).astype(float))
    weight = np.where(np.abs(lead) > 2.0, 3.0, 1.0)
    upper = model < base
    return Battles(
        models=tuple(f"m{number:03d}" for number in range(models)),
        first=np.where(upper, model, base),
        second=np.where(upper, base, model),
        outcome=np.where(upper, outcome, 1 - outcome),
        count=np.ones(len(model)),
        weight=weight,
        prompt=prompt,
    )


def _arena(ability: "NDArray[np.float64]", votes: int, rng: "np.random.Generator") -> "Battles":
    """Votes of people on random pairs, each on a prompt of its own."""
    import numpy as np

    from counterproof.judging.battles import Battles

    models = len(ability)
    a = rng.integers(models, size=votes)
    b = (a + rng.integers(1, models, size=votes)) % models
    first, second = np.minimum(a, b), np.maximum(a, b)
    won = rng.random(votes) < 1 / (1 + np.exp(ability[second] - ability[first]))
    return Battles(
        models=tuple(f"m{number:03d}" for number in range(models)),
        first=first,
        second=second,
        outcome=won.astype(float),
        count=np.ones(votes),
        weight=np.ones(votes),
    )


def random_prompts(texts: Sequence[str], **settings: Any) -> Sequence[int]:
    """As many as BenchBuilder would choose, so that the benchmarks cost the same."""
    import numpy as np

    count = len(selected_prompts(texts, **settings))
    found: list[int] = np.random.default_rng(settings["seed"]).permutation(len(texts))[:count].tolist()
    return found


def selected_prompts(texts: Sequence[str], **settings: Any) -> Sequence[int]:
    from counterproof.judging.arena_hard import select_prompts

    return [int(one.text) for one in select_prompts(texts, **settings).chosen]


def run_intervals(arm: Arm, trial: Trial) -> Mapping[str, float]:
    import numpy as np

    from counterproof.judging.battles import count_battles  # noqa: F401  # the schema that the arms' battles have
    from counterproof.judging.bradley_terry import BradleyTerry

    rate: Callable[..., NDArray[np.float64]] = arm.load()
    settings = trial.settings
    models, prompts = settings["models"], settings["prompts"]
    base = models - 1
    ability = trial.rng("world").normal(size=models) * 0.7

    def study(count: int, rng: np.random.Generator) -> "Battles":
        return _battles_against(_games(ability, rng.uniform(FLATTEST, STEEPEST, size=count), rng), base, models)

    with trial.off_clock():
        truth = BradleyTerry().fit(study(20_000, trial.rng("truth"))).ratings_
    truth = truth - truth[base]
    rng = trial.rng("studies")
    held, widths = [], []
    for number in range(settings["studies"]):
        scores = rate(study(prompts, rng), rounds=settings["rounds"], seed=number, **arm.settings)
        low, high = np.quantile(scores[:, :base], [0.025, 0.975], axis=0)
        held.append((low <= truth[:base]) & (truth[:base] <= high))
        widths.append(high - low)
        trial.log((number + 1) / settings["studies"])
    return {"coverage": float(np.mean(held)), "width": float(np.mean(widths))}


def resampled(battles: "Battles", *, rounds: int, seed: int, unit: str) -> "NDArray[np.float64]":
    from counterproof.judging.bradley_terry import BradleyTerry

    found = BradleyTerry().fit(battles).bootstrap(rounds, unit=unit, seed=seed)  # type: ignore[arg-type]
    return found - found[:, [-1]]


RANDOM = Arm("random", f"{HERE}:random_prompts")
SELECTED = Arm("benchbuilder", f"{HERE}:selected_prompts")
GAMES = Arm("games", f"{HERE}:resampled", {"unit": "battle"})
PROMPTS = Arm("prompts", f"{HERE}:resampled", {"unit": "prompt"})

WILD = "WildChat, 250 prompts each: "


# What the paper keeps; and, of its code's two rounds, what the cheaper annotator's keeps.
STRONG = {"prompt_threshold": 6, "cluster_threshold": 5}
WEAK = {"prompt_threshold": 5, "cluster_threshold": 3}


def _selection(name: str, metric: str, says: str, *, flip: float, smallest: float, reported: str) -> Claim:
    return Claim(
        paper="arena-hard",
        name=name,
        says=says,
        task=SELECTION,
        baseline=RANDOM,
        method=SELECTED,
        metric=metric,
        better=SELECTION.metrics[metric].better,
        smallest=smallest,
        reported=reported,
        settings={"flip": flip, **(STRONG if flip < 0.3 else WEAK)},
    )


CLAIMS = (
    _selection(
        "main",
        "agreement",
        "prompts chosen by criteria and topics rank models as people do, better than as many random ones, by",
        flip=0.15,
        smallest=0.02,
        reported=WILD + "agreement 36.4 % -> 88.6 %",
    ),
    _selection(
        "separability",
        "separability",
        "prompts chosen by criteria and topics tell more pairs of models apart than as many random ones, by",
        flip=0.15,
        smallest=0.02,
        reported=WILD + "separability 75.6 % -> 86.7 %",
    ),
    _selection(
        "brier",
        "brier",
        "prompts chosen by criteria and topics predict people's order of models with less error than random ones, by",
        flip=0.15,
        smallest=0.002,
        reported="Brier score .069 (MT-Bench .09, AlpacaEval 2 LC .11); not reported for random prompts",
    ),
    _selection(
        "poor-annotator",
        "separability",
        "chosen by an annotator that is wrong on 40 % of the criteria, prompts still tell more models apart, by",
        flip=0.4,
        smallest=0.02,
        reported="not reported; a weaker annotator (Llama-3-70B) was used to save cost",
    ),
    _selection(
        "blind-annotator",
        "separability",
        "chosen by an annotator that tosses coins, prompts tell more models apart than random ones, by",
        flip=0.5,
        smallest=0.02,
        reported="not claimed: this one should not hold",
    ),
    Claim(
        paper="arena-hard",
        name="prompt-bootstrap",
        says="intervals that resample prompts hold the true score more often than those that resample games, by",
        task=INTERVALS,
        baseline=GAMES,
        method=PROMPTS,
        metric="coverage",
        better="higher",
        smallest=0.02,
        reported="not reported; the released code resamples games, two of which share a prompt",
    ),
)
