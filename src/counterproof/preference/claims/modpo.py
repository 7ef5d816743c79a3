"""Claims of "Multi-Objective Direct Preference Optimization" (arXiv 2310.03708).

Two rewards that are known exactly and pull apart: to stay on the topic, which longer answers do more of, and to be
short and civil. So the optimum of multi-objective reinforcement learning is known too, and policies are measured
against it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from counterproof.bench.task import Trial
    from counterproof.language import Language
    from counterproof.preference.objectives import Objective, Sample
    from counterproof.preference.rollout import Answer

    Policies = Callable[[Mapping[str, float]], Language]

HERE = "counterproof.preference.claims.modpo"
TOPIC, WORD, RUDE = 0.75, 0.3, 0.75  # log-odds of a preference per word on the topic, word, and rude word
OBJECTIVES = ("topic", "brief")
# For the hypervolume: no word on the topic; the longest answer of the world's people, 12 words, two of them rude.
WORST = (0.0, -12 * WORD - 2 * RUDE)


@dataclass
class Study:
    """What an arm is given.

    Attributes:
        language: pi_0.
        pairs: per objective the same pairs of answers, labelled by it (Bradley-Terry), with references and the column
            ``brief``: the true other reward of each completion.
        beta: of the KL penalty.
        fit: ``fit(model, objective, samples)`` trains in place; every call takes the same steps and order of samples.
            On the pairs of two objectives a step has twice the pairs.
        runs: how many fits the arm will make; for the progress bar.
    """

    language: "Language"
    pairs: "Mapping[str, list[Sample]]"
    beta: float
    fit: "Callable[[nn.Module, Objective, Sequence[Sample]], None]"
    runs: int = 3


def modpo(study: Study, *, margin: Literal["rule", "learned"] = "rule") -> "Policies":
    """MODPO on the pairs labelled by topic; the margin is the true other reward, or one learned from its labels."""
    from dataclasses import replace

    from counterproof.preference.modpo import modpo_policies

    samples = study.pairs["topic"]
    if margin == "rule":
        marked = [replace(s, columns={"margins": [(value,) for value in s.columns["brief"]]}) for s in samples]
    else:
        import copy

        from counterproof.language import Language
        from counterproof.preference.modpo import implicit_reward
        from counterproof.preference.objectives import DPO

        study.runs += 1
        expert = copy.deepcopy(study.language.model)
        study.fit(expert, DPO(study.beta), study.pairs["brief"])
        reward = implicit_reward(
            Language(expert, study.language.tokenizer), reference=study.language.model, beta=study.beta
        )
        values = iter(reward.of_groups([s.group for s in samples]).tolist())
        marked = [replace(s, columns={"margins": [(next(values),) for _ in s.scores]}) for s in samples]
    return modpo_policies(study.language, marked, trained="topic", fit=study.fit, beta=study.beta)


def loss_weighting(study: Study) -> "Policies":
    """DPO loss weighting on the pairs of both objectives."""
    from counterproof.preference.modpo import loss_weighting_policies

    return loss_weighting_policies(study.language, study.pairs, fit=study.fit, beta=study.beta)


def soups(study: Study) -> "Policies":
    """Two DPO policies, one for each objective, and their parameters interpolated."""
    from counterproof.preference.modpo import soup_policies

    study.runs = 2
    return soup_policies(study.language, study.pairs, fit=study.fit, beta=study.beta)


def run_two_rewards(arm: Arm, trial: "Trial") -> dict[str, float]:
    """A policy for each of the weights, against the optimum for them."""
    import numpy as np

    from counterproof.language.tiny import TinyWorld, pretrain
    from counterproof.preference.forward import optimise, referenced
    from counterproof.preference.rollout import answer_logps, draw, ranked_sample

    chosen = trial.settings
    world, beta = TinyWorld(), chosen["beta"]

    def topic(prompt: str, answer: str) -> float:
        return TOPIC * sum(word in world.TOPICS[prompt.split()[0]] for word in answer.split())

    def brief(prompt: str, answer: str) -> float:
        words = answer.split()
        return -WORD * len(words) - RUDE * sum(word in world.RUDE for word in words)

    rewards = {"topic": topic, "brief": brief}
    cost = {"gradient_steps": 0, "scored_tokens": 0, "fits": 0}

    def ask(language: "Language", prompts: Sequence[str], samples: int, purpose: str) -> "list[list[Answer]]":
        seed = int(trial.rng(purpose).integers(2**31))
        return draw(language, prompts, samples=samples, seed=seed, max_new_tokens=24)

    def means(answers: "Sequence[Sequence[Answer]]") -> "dict[str, np.ndarray]":
        return {k: np.array([[r(a.prompt, a.text) for a in own] for own in answers]) for k, r in rewards.items()}

    with trial.off_clock():
        texts = trial.rng("texts")
        lines = [f"{prompt}{world.answer(texts, prompt)}" for prompt in world.prompts(texts, chosen["texts"])]
        language = pretrain(
            lines,
            world.tokenizer(),
            seed=int(trial.rng("start").integers(2**31)),
            steps=chosen["pretraining"],
            device=trial.device,
            context=32,
            hidden=chosen["hidden"],
            layers=chosen["layers"],
        )
        answers = ask(language, world.prompts(trial.rng("prompts"), chosen["pairs"]), 2, "answers")
        answers = [own for own in answers if own[0].group != own[1].group]
        known = means(answers)
        pairs = {}
        for name in OBJECTIVES:
            first = 1 / (1 + np.exp(known[name][:, 1] - known[name][:, 0]))
            wins = trial.rng(f"labels {name}").random(len(answers)) < first
            pairs[name] = [
                ranked_sample(own, (1.0, 0.0) if win else (0.0, 1.0), brief=other)
                for own, win, other in zip(answers, wins, known["brief"].tolist(), strict=True)
            ]
        sampled_tokens = sum(len(a.group.completions[0]) for own in answers for a in own)
        tokens = {name: referenced(language.model, samples) for name, samples in pairs.items()}

        held_out = world.prompts(trial.rng("held-out prompts"), chosen["test_prompts"])
        reference = means(ask(language, held_out, chosen["reference_samples"], "reference answers"))

    def fit(model: "nn.Module", objective: "Objective", samples: "Sequence[Sample]") -> None:
        sets = len(samples) / len(answers)
        batch = round(chosen["batch"] * sets)
        order = trial.rng("order")
        rows = [sum(map(len, sample.group.completions)) for sample in samples]

        def watch(step: int, output: Any) -> None:
            cost["gradient_steps"] += 1
            if step % max(1, chosen["steps"] // 5) == 0:
                done = (cost["fits"] + step / chosen["steps"]) / study.runs
                trial.log(
                    0.95 * min(done, 1.0), step=cost["gradient_steps"], accuracy=output.metrics["rewards/accuracies"]
                )

        try:
            optimise(
                model,
                objective,
                samples,
                steps=chosen["steps"],
                batch=batch,
                learning_rate=chosen["learning_rate"],
                rng=order,
                watch=watch,
            )
        except ArithmeticError as problem:
            raise Diverged(str(problem)) from problem
        cost["fits"] += 1
        cost["scored_tokens"] += round(chosen["steps"] * batch * sum(rows) / len(rows))

    study = Study(language, tokens, beta, fit)
    policies = arm.load()(study, **arm.settings)
    result: dict[str, float] = {}
    front = []
    for share in chosen["weights"]:
        policy = policies({"topic": share, "brief": 1 - share})
        with trial.off_clock():
            drawn = ask(policy, held_out, chosen["test_samples"], "answers to held-out prompts")
            own = means(drawn)
            flat = [answer for each in drawn for answer in each]
            kl = float((answer_logps(policy.model, flat) - answer_logps(language.model, flat)).double().mean())
            value = share * float(own["topic"].mean()) + (1 - share) * float(own["brief"].mean()) - beta * kl
            weighted = share * reference["topic"] + (1 - share) * reference["brief"]
            best = beta * optimum(weighted / beta)
            number = round(100 * share)
            result[f"regret_{number}"] = best - value
            result[f"start_{number}"] = best - float(weighted.mean())
            result[f"kl_{number}"] = kl
            front.append((float(own["topic"].mean()), float(own["brief"].mean())))
    regrets = [result[f"regret_{round(100 * share)}"] for share in chosen["weights"]]
    trial.log(1.0, step=cost["gradient_steps"], regret=sum(regrets) / len(regrets))
    return {
        "regret": sum(regrets) / len(regrets),
        **result,
        "hypervolume": area(front, WORST),
        "gradient_steps": float(cost["gradient_steps"]),
        "scored_tokens": float(cost["scored_tokens"]),
        "sampled_tokens": float(sampled_tokens),
    }


def optimum(values: "np.ndarray") -> float:
    """The mean over rows (m, n) of ``log E exp``; the bias of n samples, of order 1 / n, taken off by halves."""
    import numpy as np
    from scipy.special import logsumexp

    half = values.shape[1] // 2
    whole, *halves = (logsumexp(v, axis=1) - np.log(v.shape[1]) for v in (values, values[:, :half], values[:, half:]))
    return float(np.mean(2 * whole - (halves[0] + halves[1]) / 2))


def area(points: "Sequence[tuple[float, float]]", worst: tuple[float, float]) -> float:
    """The hypervolume of two rewards, counted here so that the measure does not depend on the method's module."""
    total, height = 0.0, worst[1]
    for x, y in sorted(points, reverse=True):
        if x > worst[0] and y > height:
            total += (x - worst[0]) * (y - height)
            height = y
    return total


def _per_weight(kind: str, better: Literal["lower", "higher"], unit: str, says: str) -> dict[str, Metric]:
    return {f"{kind}_{n}": Metric(better, unit, f"{says}, {n} % of the weight on topic") for n in (25, 50, 75)}


_QUICK = MappingProxyType(
    {
        "beta": 0.5,
        "weights": [0.25, 0.5, 0.75],
        "texts": 8192,
        "pretraining": 300,
        "hidden": 48,
        "layers": 2,
        "pairs": 4096,
        "steps": 110,
        "batch": 64,
        "learning_rate": 5e-4,
        "test_prompts": 32,
        "reference_samples": 256,
        "test_samples": 32,
    }
)
_STANDARD = {
    **_QUICK,
    "texts": 16_384,
    "pretraining": 600,
    "hidden": 96,
    "layers": 3,
    "pairs": 16_384,
    "steps": 440,
    "test_prompts": 64,
    "reference_samples": 512,
}

TWO_REWARDS = Task(
    name="two-rewards",
    says=(
        "a tiny Llama trained on made-up text; Bradley-Terry labels by two known rewards that conflict; one policy for "
        "each of three weights, measured against the exact optimum of the weighted reward with a KL penalty"
    ),
    run=f"{HERE}:run_two_rewards",
    metrics={
        "regret": Metric(
            "lower", "reward", "J* - J(policy), mean over the three weights; J = weighted reward - beta KL"
        ),
        **_per_weight("regret", "lower", "reward", "J* - J(policy)"),
        "hypervolume": Metric(
            "higher", "", f"area that the three policies' mean rewards dominate above {WORST[0]:g}, {WORST[1]:g}"
        ),
        **_per_weight("kl", "lower", "nats", "divergence from the start, per answer"),
        **_per_weight("start", "lower", "reward", "J* - J(start): the regret before training"),
        "gradient_steps": Metric("lower", "steps", "optimizer steps for all weights, margin models included"),
        "scored_tokens": Metric("lower", "tokens", "completion tokens passed through in training"),
        "sampled_tokens": Metric("lower", "tokens", "tokens of the data set's answers; no arm samples while it trains"),
    },
    budgets={
        "quick": Budget(settings=_QUICK, seeds=(5, 8), minutes=3.0),
        "standard": Budget(settings=_STANDARD, seeds=(5, 12), minutes=30, trial_minutes=30),
        "full": Budget(
            settings={
                **_STANDARD,
                "texts": 131_072,
                "pretraining": 3000,
                "hidden": 256,
                "layers": 6,
                "pairs": 65_536,
                "steps": 1500,
                "learning_rate": 2e-4,
                "reference_samples": 4096,
                "test_samples": 128,
            },
            seeds=(5, 12),
            minutes=None,
            trial_minutes=120,
        ),
    },
    plug=(
        "method(study, **settings) -> policies, with policies({'topic': w, 'brief': 1 - w}) -> Language: the study has "
        "the start, the labelled pairs of both rewards, beta, and fit(model, objective, samples)"
    ),
)

LOSS_WEIGHTING = Arm("dpo-loss-weighting", f"{HERE}:loss_weighting")
SOUPS = Arm("dpo-soups", f"{HERE}:soups")
RULE = Arm("modpo-rule", f"{HERE}:modpo", {"margin": "rule"})
LEARNED = Arm("modpo-learned", f"{HERE}:modpo", {"margin": "learned"})

FRONTS = "safety and long-form answers, 7B: fronts above DPO soups and loss weighting at beta 0.1 and 0.5 (plots)"


def _claim(
    name: str, says: str, metric: str = "regret", *, method: Arm = RULE, baseline: Arm = LOSS_WEIGHTING
) -> Claim:
    volume = metric == "hypervolume"
    return Claim(
        paper="modpo",
        name=name,
        says=says,
        task=TWO_REWARDS,
        baseline=baseline,
        method=method,
        metric=metric,
        better="higher" if volume else "lower",
        effect="ratio" if volume else "difference",
        # 0.01 of reward is beta * 0.02 nats from the optimal policy.
        smallest=1.02 if volume else 0.01,
        reported=FRONTS,
    )


CLAIMS = (
    _claim("main", "with the other reward as a rule margin, policies are nearer to the optimum of the weighted reward"),
    *(
        _claim(
            f"weight-{n}",
            f"with a rule margin and {n} % of the weight on the labelled reward, less is lost",
            f"regret_{n}",
        )
        for n in (25, 50, 75)
    ),
    _claim("front", "with a rule margin the policies dominate more of the plane of the two rewards", "hypervolume"),
    _claim(
        "learned",
        "with the margin learned by DPO from labels of its own, policies are nearer to the optimum",
        method=LEARNED,
    ),
    _claim("soups", "with a rule margin, policies are nearer to the optimum than interpolated ones", baseline=SOUPS),
    _claim(
        "learned-soups",
        "with a learned margin, policies are nearer to the optimum than interpolated ones",
        method=LEARNED,
        baseline=SOUPS,
    ),
    _claim(
        "learned-front",
        "with a learned margin the policies dominate more of the plane of the two rewards than interpolated ones",
        "hypervolume",
        method=LEARNED,
        baseline=SOUPS,
    ),
)
