"""Can the pull of a margin loss on both answers be foretold, where does it come from, and does normalising undo it?"""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from counterproof.bench.task import Arm, Budget, Claim, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from counterproof.preference.objectives import Objective, Sample

PAPER = "gradient-entanglement"
HERE = "counterproof.preference.claims.gradient_entanglement"
METHOD = "counterproof.preference.gradient_entanglement"

# Answers in three formats: the label, and how many tokens that both answers share come after it.
SUFFIXES = ("none", "short", "long")
DATA = (
    "made-up film reviews, labelled positive or negative by the words they are made of; at quick a language model of "
    "50,000 parameters trained from nothing on such text, at standard SmolLM2-135M-Instruct"
)
QUICK = {"model": "tiny", "sft": 120, "sft_batch": 16, "sft_rate": 1e-3, "batch": 16, "rate": 1e-4, "fall": 5e-5}
SMOL = {"model": "smollm2", "sft": 24, "sft_batch": 8, "sft_rate": 2e-5, "batch": 8, "rate": 5e-6, "fall": 1e-3}


def _budgets(quick: dict[str, Any], standard: dict[str, Any], full: dict[str, Any]) -> dict[str, Budget]:
    return {
        "quick": Budget(settings={**QUICK, **quick}, seeds=(6, 12)),
        "standard": Budget(settings={**SMOL, **standard}, seeds=(4, 8), minutes=30.0, trial_minutes=30.0),
        "full": Budget(settings={**SMOL, "sft": 60, **full}, seeds=(6, 16), minutes=None, trial_minutes=240.0),
    }


FORECAST = Task(
    name="entanglement-forecast",
    says=f"{DATA}; after supervised tuning, forecasts for single pairs are held against a small gradient step",
    run=f"{HERE}:run_forecast",
    metrics={
        "right": Metric("higher", says="share of pairs whose log-probabilities both move in the foretold direction"),
        "error": Metric(
            "lower", says="error of the foretold changes in shares of the margin's change, mean over pairs"
        ),
        "synchronised": Metric("lower", says="share of pairs whose log-probabilities both rise or both fall"),
    },
    budgets=_budgets({"pairs": 48}, {"pairs": 24}, {"pairs": 96}),
    plug=(
        "forecast(model, samples, objective=...) -> report; report.pairs[i].chosen_change and .rejected_change are "
        "the changes of the pair's log-probabilities in nats per unit of step size"
    ),
)

FORMATS = Task(
    name="entanglement-formats",
    says=f"{DATA}; after supervised tuning DPO on answers of one format: gradients before, log-probabilities during",
    run=f"{HERE}:run_formats",
    metrics={
        "synchronised": Metric(
            "higher", says="share of held-out pairs whose log-probabilities a step would move alike"
        ),
        "cosine": Metric("higher", says="cosine of chosen and rejected gradient before DPO, mean over held-out pairs"),
        "ratio": Metric("higher", says="inner product over the smaller squared norm, median over held-out pairs"),
        "moved_together": Metric(
            "higher", says="share of steps on which the two mean held-out log-probabilities move alike"
        ),
        "ended_together": Metric("higher", says="share of held-out pairs whose log-probabilities both rose or fell"),
        "chosen_gain": Metric(
            "higher", "nats", "what the chosen answers' mean log-probability gained by DPO, held out"
        ),
        "accuracy": Metric("higher", says="share of held-out pairs whose chosen answer is likelier, before DPO"),
    },
    budgets=_budgets({"pairs": 48, "steps": 40}, {"pairs": 16, "steps": 16}, {"pairs": 64, "steps": 40}),
    plug=(
        "diagnose(model, samples) -> report with .pairs[i].cosine, .ratio and .synchronised. The setting `suffix` is "
        "the task's own: the format of the answers (none, short, long)"
    ),
)

REMEDY = Task(
    name="entanglement-remedy",
    says=(
        f"{DATA}; answers of all three formats; after supervised tuning trained to equal held-out margin, how many "
        "pairs' log-probabilities moved alike"
    ),
    run=f"{HERE}:run_remedy",
    metrics={
        "synchronised": Metric("lower", says="share of held-out pairs whose log-probabilities both rose or fell"),
        "synchronised_first": Metric("lower", says="the same for one small step on each pair alone, measured"),
        "chosen_gain": Metric("higher", "nats", "what the chosen answers' mean log-probability gained, held out"),
        "margin": Metric("higher", "nats", "mean margin gained on held-out pairs at the end; the target unless missed"),
        "steps": Metric("lower", says="optimizer steps to the target margin"),
    },
    budgets=_budgets(
        {"pairs": 48, "steps": 80, "margin": 2.0, "length": 0.01},
        {"pairs": 12, "steps": 12, "margin": 1.0, "length": 0.01},
        {"pairs": 66, "steps": 60, "margin": 2.0, "length": 0.01},
    ),
    plug=(
        "an Objective, whose loss is minimised, or gradients(model, objective=DPO) with .backward(samples), which adds "
        "to the parameters' .grad"
    ),
)


# data


class World(NamedTuple):
    """A model and reviews for it.

    Attributes:
        model: tuned on nothing yet.
        draw: of a generator, a number, and a format or None (a third each): pairs, chosen answer first.
    """

    model: "nn.Module"
    draw: "Callable[[np.random.Generator, int, str | None], list[Sample]]"


def world(trial: Trial) -> World:
    """The world of the trial's settings; building it is nobody's cost."""
    with trial.off_clock():
        return tiny_world(trial) if trial.settings["model"] == "tiny" else large_world(trial)


GOOD = ("lovely", "warm", "clever", "funny", "superb", "moving", "bright", "tender")
BAD = ("dull", "cold", "clumsy", "boring", "awful", "hollow", "grey", "shallow")
PLAIN = (
    "film",
    "plot",
    "cast",
    "scene",
    "music",
    "first",
    "last",
    "long",
    "short",
    "half",
    "and",
    "with",
    "very",
    "so",
)
TAIL = ("is", "what", "this", "text", "says", "to", "all", "of", "those", "who", "read", "it", "to", "the", "end")
LABELS = ("positive", "negative")


def tiny_review(rng: "np.random.Generator") -> tuple[str, bool]:
    """Six words, of which six in ten tell the truth and one in ten the opposite, and whether it is a good review."""
    good = bool(rng.random() < 0.5)
    words = []
    for _ in range(6):
        kind = rng.random()
        source = (GOOD if good else BAD) if kind < 0.6 else (BAD if good else GOOD) if kind < 0.7 else PLAIN
        words.append(source[rng.integers(len(source))])
    return " ".join(words) + " : ", good


def tiny_world(trial: Trial) -> World:
    """Words for tokens; the model has read reviews whose label is right in nine of ten, and then any words."""
    from counterproof.language import pretrain, tiny_tokenizer, tokenize
    from counterproof.preference.objectives import Sample

    tokenizer = tiny_tokenizer([*GOOD, *BAD, *PLAIN, ":", *LABELS, *TAIL])
    rng, every = trial.rng("text"), (*PLAIN, *TAIL)
    texts = []
    for _ in range(8192):
        prompt, good = tiny_review(rng)
        label = LABELS[good == (rng.random() < 0.1)]
        texts.append(f"{prompt}{label} " + " ".join(every[i] for i in rng.integers(len(every), size=rng.integers(16))))
    seed = int(trial.rng("start").integers(2**31))
    model = pretrain(texts, tokenizer, seed=seed, steps=300, context=32, device=trial.device).model.double()
    sizes = {"none": 0, "short": 3, "long": 15}

    def draw(rng: "np.random.Generator", count: int, suffix: str | None) -> "list[Sample]":
        pairs = []
        for index in range(count):
            prompt, good = tiny_review(rng)
            tail = TAIL[: sizes[suffix or SUFFIXES[index % 3]]]
            answers = [" ".join((LABELS[label], *tail)) for label in (not good, good)]
            pairs.append(Sample(tokenize(tokenizer, prompt, answers, eos=False), (1.0, 0.0)))
        return pairs

    return World(model, draw)


FRAMES = (
    "The {0} was {3}, the {1} {4}, and the {2} {5}.",
    "A {3} {0}, a {4} {1}, and a rather {5} {2}.",
    "I found the {0} {3} and the {1} {4}, while the {2} seemed {5} to me.",
    "With its {3} {0}, {4} {1} and {5} {2}, this film stays with me.",
    "Two hours of {3} {0}, {4} {1} and {5} {2}.",
    "My friends called the {0} {3}; I would add that the {1} is {4} and the {2} {5}.",
)
PARTS = ("plot", "acting", "music", "camera work", "dialogue", "ending", "humour", "editing", "lead actor", "script")
PRAISE = ("brilliant", "charming", "wonderful", "gripping", "touching", "hilarious", "superb", "delightful", "fresh")
BLAME = ("dull", "clumsy", "awful", "tedious", "lifeless", "embarrassing", "terrible", "annoying", "predictable")
ENDINGS = {
    "none": "",
    "short": " sentiment.",
    "long": " sentiment, as far as one can tell from the words of this review alone.",
}


def large_world(trial: Trial) -> World:
    """SmolLM2, or the model given; sentences from templates, in which two of three adjectives agree with the label."""
    from counterproof.language import tokenize
    from counterproof.language.models import load
    from counterproof.preference.objectives import Sample

    model, tokenizer = load(trial.model or "smollm2", device=trial.device)

    def draw(rng: "np.random.Generator", count: int, suffix: str | None) -> "list[Sample]":
        pairs = []
        for index in range(count):
            good = bool(rng.random() < 0.5)
            own, other = (PRAISE, BLAME) if good else (BLAME, PRAISE)
            words = rng.permutation([*rng.choice(own, 2, replace=False), rng.choice(other)])
            text = FRAMES[rng.integers(len(FRAMES))].format(*rng.choice(PARTS, 3, replace=False), *words)
            end = ENDINGS[suffix or SUFFIXES[index % 3]]
            answers = [f" {LABELS[label]}{end}" for label in (not good, good)]
            group = tokenize(tokenizer, f"Review: {text}\nSentiment:", answers, eos=False)
            pairs.append(Sample(group, (1.0, 0.0)))
        return pairs

    return World(model, draw)


def tune(model: "nn.Module", world: World, trial: Trial, suffix: str | None) -> None:
    """Supervised tuning on the chosen answers, in place: what preference training starts from."""
    from counterproof.language import Group
    from counterproof.preference.forward import optimise
    from counterproof.preference.objectives import SFT, Sample

    settings = trial.settings
    pairs = world.draw(trial.rng("tuning"), settings["sft"] * settings["sft_batch"], suffix)
    good = [Sample(Group(pair.group.prompt, pair.group.completions[:1]), (1.0,)) for pair in pairs]
    with trial.off_clock():
        optimise(
            model,
            SFT(),
            good,
            steps=settings["sft"],
            batch=settings["sft_batch"],
            learning_rate=settings["sft_rate"],
            rng=trial.rng("tuning order"),
        )


def pair_logps(model: "nn.Module", samples: "Sequence[Sample]") -> "Tensor":
    """(pairs, 2): log-probabilities of chosen and rejected, float64, no gradient."""
    import torch

    from counterproof.preference.forward import reference_logps, referenced

    values: Tensor = reference_logps(referenced(model, samples)).sum().double().view(-1, 2)
    if not bool(torch.isfinite(values).all()):
        raise Diverged("a log-probability is not finite")
    return values


def moved_alike(change: "Tensor") -> "Tensor":
    """Whether the two columns of (pairs, 2) changes have the same sign, neither being zero."""
    return change.prod(-1).gt(0)


def small_step(
    model: "nn.Module", sample: "Sample", backward: "Callable[[list[Sample]], object]", fall: float
) -> tuple["Tensor", float]:
    """Change of a pair's two log-probabilities by a gradient step that lowers the loss by `fall` to first order.

    Returns:
        (2,) changes, and the step size; the model is put back.
    """
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = pair_logps(model, [sample])[0]
    model.zero_grad()
    backward([sample])
    square = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)
    if square == 0:
        return torch.zeros_like(before), 0.0
    size = fall / square
    kept = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=size)
        after = pair_logps(model, [sample])[0]
        for parameter, old in zip(parameters, kept, strict=True):
            parameter.copy_(old)
    model.zero_grad()
    return after - before, size


def loss_gradients(model: "nn.Module", objective: "Objective") -> "Callable[[list[Sample]], object]":
    """The usual backward pass of an objective's loss."""
    from counterproof.preference.forward import objective_output

    def backward(samples: "list[Sample]") -> None:
        objective_output(model, objective, samples).loss.backward()

    return backward


# tasks


def unentangled(model: "nn.Module", samples: "Sequence[Sample]", *, objective: "Objective") -> SimpleNamespace:
    """What a margin loss is taken to do: the chosen gradient moves the chosen answer, the rejected one the rejected."""
    import torch

    from counterproof.language import completion_logps
    from counterproof.preference.forward import referenced
    from counterproof.preference.objectives import Batch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = []
    for sample in samples if "reference" not in objective.needs else referenced(model, samples):
        policy = completion_logps(model, [sample.group])
        token = policy.token.detach().requires_grad_()
        reference = None if sample.reference is None else policy.with_tokens(sample.reference)
        loss = objective(policy.with_tokens(token), reference, Batch.of([sample])).loss
        (slopes,) = torch.autograd.grad(loss, token)
        changes = []
        for index in (0, 1):
            total = policy.total(policy.token)[index]
            gradients = torch.autograd.grad(total, parameters, retain_graph=index == 0)
            square = sum(float(gradient.double().square().sum()) for gradient in gradients)
            changes.append(-float(slopes[policy.owner == index].mean()) * square)
        pairs.append(SimpleNamespace(chosen_change=changes[0], rejected_change=changes[1]))
    return SimpleNamespace(pairs=pairs)


def run_forecast(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Tune, forecast pair by pair, make the step, compare. The objectives of the claim take turns."""
    import torch

    from counterproof.preference import objectives
    from counterproof.preference.forward import referenced

    forecast = arm.load()
    here = world(trial)
    model = here.model
    tune(model, here, trial, None)
    samples = here.draw(trial.rng("pairs"), trial.settings["pairs"], None)
    samples = [samples[i] for i in trial.rng("order").permutation(len(samples))]
    samples = referenced(model, samples)
    losses = [getattr(objectives, name)() for name in trial.settings.get("objectives", ("DPO",))]
    right, alike, errors = [], [], []
    for index, sample in enumerate(samples):
        objective = losses[index % len(losses)]
        (pair,) = forecast(model, [sample], objective=objective).pairs
        with trial.off_clock():
            change, size = small_step(model, sample, loss_gradients(model, objective), trial.settings["fall"])
            foretold = size * torch.tensor([pair.chosen_change, pair.rejected_change], dtype=torch.float64)
        right.append(bool((torch.sign(foretold) == torch.sign(change)).all()))
        alike.append(bool(moved_alike(change)))
        errors.append(float((foretold - change).abs().max() / (change[0] - change[1]).abs()))
        trial.log((index + 1) / len(samples), step=index + 1, right=sum(right) / len(right))
    count = len(samples)
    return {"right": sum(right) / count, "error": sum(errors) / count, "synchronised": sum(alike) / count}


def run_formats(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Tune on one format, diagnose held-out pairs, then DPO with an eye on them."""
    import numpy as np
    import torch

    from counterproof.preference.forward import optimise, referenced
    from counterproof.preference.objectives import DPO

    diagnose = arm.load()
    suffix, settings = arm.settings["suffix"], trial.settings
    here = world(trial)
    model = here.model
    tune(model, here, trial, suffix)
    held_out = referenced(model, here.draw(trial.rng("pairs"), settings["pairs"], suffix))
    pairs = diagnose(model, held_out, objective=DPO(), batch=False).pairs
    train = referenced(model, here.draw(trial.rng("preferences"), settings["steps"] * settings["batch"], suffix))
    start = pair_logps(model, held_out)
    path = [start]

    def watch(step: int, output: object) -> None:
        with trial.off_clock():
            path.append(pair_logps(model, held_out))
            gain = (path[-1] - start).mean(0)
        trial.log(step / settings["steps"], step=step, chosen_gain=float(gain[0]), rejected_gain=float(gain[1]))

    try:
        optimise(
            model,
            DPO(),
            train,
            steps=settings["steps"],
            batch=settings["batch"],
            learning_rate=settings["rate"],
            rng=trial.rng("order"),
            watch=watch,
        )
    except ArithmeticError as problem:
        raise Diverged(str(problem)) from None
    means = torch.stack([values.mean(0) for values in path])
    total = path[-1] - start
    return {
        "synchronised": float(np.mean([pair.synchronised for pair in pairs])),
        "cosine": float(np.mean([pair.cosine for pair in pairs])),
        "ratio": float(np.median([pair.ratio for pair in pairs])),
        "moved_together": float(moved_alike(means.diff(dim=0)).double().mean()),
        "ended_together": float(moved_alike(total).double().mean()),
        "chosen_gain": float(total[:, 0].mean()),
        "accuracy": float((start[:, 0] > start[:, 1]).double().mean()),
    }


def run_remedy(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Tune, take a small step on each held-out pair alone, then train until the held-out margin reaches the target.

    Training is by gradient steps of one length, or by AdamW (the setting `optimizer`).
    """
    import torch

    from counterproof.preference.forward import referenced
    from counterproof.preference.objectives import DPO, Objective

    settings = trial.settings
    here = world(trial)
    model = here.model.eval()
    tune(model, here, trial, None)
    plugged = arm.load()
    if issubclass(plugged, Objective):
        backward = loss_gradients(model, plugged(**arm.settings))
    else:
        backward = plugged(model, objective=DPO(), **arm.settings).backward
    held_out = referenced(model, here.draw(trial.rng("pairs"), settings["pairs"], None))
    start = pair_logps(model, held_out)
    with trial.off_clock():
        first = [bool(moved_alike(small_step(model, sample, backward, settings["fall"])[0])) for sample in held_out]
    train = referenced(model, here.draw(trial.rng("preferences"), settings["batch"] * settings["steps"], None))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = settings.get("optimizer") == "adamw"
    optimizer: torch.optim.Optimizer = (
        torch.optim.AdamW(parameters, lr=settings["rate"], weight_decay=0.0)
        if adam
        else torch.optim.SGD(parameters, lr=settings["length"])
    )
    step, gain, margin = 0, torch.zeros_like(start), 0.0
    while step < settings["steps"] and margin < settings["margin"]:
        optimizer.zero_grad()
        backward(train[step * settings["batch"] : (step + 1) * settings["batch"]])
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not 0 < norm < float("inf"):
            raise Diverged(f"step {step + 1}: the gradient's norm is {norm}")
        if not adam:  # steps of equal length, so that both arms go as far in the space of parameters
            torch._foreach_mul_(gradients, 1 / norm)
        optimizer.step()
        step += 1
        with trial.off_clock():
            gain = pair_logps(model, held_out) - start
            margin = float((gain[:, 0] - gain[:, 1]).mean())
        trial.log(
            min(1.0, max(step / settings["steps"], margin / settings["margin"])),
            step=step,
            chosen_gain=float(gain[:, 0].mean()),
            synchronised=float(moved_alike(gain).double().mean()),
        )
    return {
        "synchronised": float(moved_alike(gain).double().mean()),
        "synchronised_first": sum(first) / len(first),
        "chosen_gain": float(gain[:, 0].mean()),
        "margin": margin,
        "steps": step,
    }


# claims

UNENTANGLED = Arm("unentangled", method=f"{HERE}:unentangled")
DIAGNOSED = Arm("diagnosed", method=f"{METHOD}:diagnose")
ONE_TOKEN = Arm("one-token", method=f"{METHOD}:diagnose", settings={"suffix": "none"})
LONG_SUFFIX = Arm("long-suffix", method=f"{METHOD}:diagnose", settings={"suffix": "long"})
DPO_ARM = Arm("dpo", method="counterproof.preference.objectives:DPO", settings={"beta": 0.1})
NORMALISED = Arm("pairwise-normalised", method=f"{METHOD}:PairwiseNormalized")

FAMILY = ["IPO", "SimPO", "CPO", "SLiC", "RDPO", "DPOP"]


def _formats(name: str, says: str, metric: str, smallest: float | None, reported: str) -> Claim:
    return Claim(
        paper=PAPER,
        name=name,
        says=says,
        task=FORMATS,
        baseline=ONE_TOKEN,
        method=LONG_SUFFIX,
        metric=metric,
        better="higher",
        smallest=smallest,
        reported=reported,
    )


CLAIMS = (
    Claim(
        paper=PAPER,
        name="main",
        says="norms and inner product of the two gradients foretell which way a small DPO step moves both answers",
        task=FORECAST,
        baseline=UNENTANGLED,
        method=DIAGNOSED,
        metric="right",
        better="higher",
        smallest=0.05,
        reported="derived for every margin loss, to first order: exact conditions for both up, both down, as desired",
    ),
    Claim(
        paper=PAPER,
        name="family",
        says="with the slopes of the loss, they do so for IPO, SimPO, CPO, SLiC, R-DPO and DPOP as well",
        task=FORECAST,
        baseline=UNENTANGLED,
        method=DIAGNOSED,
        metric="right",
        better="higher",
        smallest=0.05,
        settings={"objectives": FAMILY},
        reported="derived for the whole family of margin losses, with a weight for each of the two gradients",
    ),
    _formats(
        "suffix",
        "with a long text after the label that both answers share, DPO's gradients would move more pairs alike",
        "synchronised",
        0.1,
        "GPT-2 on sentiment: chosen and rejected separate with one-token labels, synchronise with a suffix (curves)",
    ),
    _formats(
        "alignment",
        "with a long shared text after the label, chosen and rejected gradients are more parallel",
        "cosine",
        None,
        "token by token, shared text after the first difference contributes large positive inner products (heat maps)",
    ),
    _formats(
        "dynamics",
        "with a long shared text after the label, chosen and rejected move alike on more steps of DPO",
        "moved_together",
        0.1,
        "GPT-2 on sentiment: the longer the shared suffix, the more both log-probabilities move together (curves)",
    ),
    Claim(
        paper=PAPER,
        name="normalised-step",
        says="with normalised gradients, a small step on a pair moves fewer pairs' answers alike",
        task=REMEDY,
        baseline=DPO_ARM,
        method=NORMALISED,
        metric="synchronised_first",
        better="lower",
        reported="never, to first order (Cauchy-Schwarz)",
    ),
    Claim(
        paper=PAPER,
        name="normalised",
        says="by gradient descent to equal margin with normalised gradients, fewer held-out pairs' answers moved alike",
        task=REMEDY,
        baseline=DPO_ARM,
        method=NORMALISED,
        metric="synchronised",
        better="lower",
        smallest=0.1,
        reported="a proof of concept, without figures",
    ),
    Claim(
        paper=PAPER,
        name="normalised-adamw",
        says="the same when AdamW makes the steps, for which nothing is derived",
        task=REMEDY,
        baseline=DPO_ARM,
        method=NORMALISED,
        metric="synchronised",
        better="lower",
        smallest=0.1,
        settings={"optimizer": "adamw"},
        reported="not measured in the paper",
    ),
)
