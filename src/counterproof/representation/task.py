"""What the papers of this room are compared on."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from counterproof.bench.task import Arm, Budget, Diverged, Metric, Task, Trial

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = {"conv1": "relu1", "conv2": "relu2", "conv3": "relu3", "fc1": "relu4"}  # read after the ReLU
TRAIN, FIT = 1200, 300  # images for the nets and for the mapping; the remaining 297 of the 1797 are for the metrics
USED = 1e-3  # a weight between standardised units counts as a predictor above this size

_QUALITY = {
    "correlation": Metric("higher", says="correlation of a unit with its prediction from the other net"),
    "r2": Metric("higher", says="share of a unit's variance that its prediction explains"),
    "predictors": Metric("lower", "units", "units of the other net used to predict a unit"),
    "mapped": Metric("higher", says="share of units predicted from at least one unit of the other net"),
}

UNIT_MAPPINGS = Task(
    name="unit-mappings",
    says=(
        "small conv nets from different random starts, trained alike on scikit-learn's digits (8x8, 1-pixel shifts): "
        "how well a mapping predicts the units of one net from those of another, on images new to nets and mapping"
    ),
    run="counterproof.representation.task:run_unit_mappings",
    metrics={
        **_QUALITY,
        **{
            f"{name}_{layer}": Metric(metric.better, metric.unit, f"{metric.says}; {layer} alone")
            for name, metric in _QUALITY.items()
            for layer in LAYERS
        },
        "accuracy": Metric("higher", says="held-out accuracy, mean of the nets"),
        "dead": Metric("lower", says="share of units left out because they are constant on the images"),
    },
    budgets={
        "quick": Budget(settings={"nets": 3, "epochs": 25, "width": 1}, seeds=(4, 12)),
        "standard": Budget(settings={"nets": 6, "epochs": 60, "width": 2}, seeds=(6, 20), minutes=30.0),
        "full": Budget(
            settings={"nets": 6, "epochs": 100, "width": 4}, seeds=(8, 24), minutes=None, trial_minutes=60.0
        ),
    },
    plug=(
        "mapping(a, b, **settings) -> weights: a, b (samples, units) are two nets' activations on the fit images, one "
        "image after the other; weights (units of a, units of b) predict b's standardised units from a's. None: least "
        "squares from all units. The setting `epochs` is the task's own: 0 leaves the nets at their random start."
    ),
)


def run_unit_mappings(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """Train a group of nets, map every pair once, layer by layer; metrics are means over pairs (and layers)."""
    import torch

    settings = dict(arm.settings)
    epochs = settings.pop("epochs", trial.settings["epochs"])
    mapping = arm.load() or least_squares
    train, fit, test = digits(trial)
    count = trial.settings["nets"]
    nets = []
    for index in range(count):
        net = digit_net(trial, f"start of net {index}", trial.settings["width"])
        for epoch, loss in enumerate(train_digit_net(net, *train, epochs, trial, f"batches of net {index}"), 1):
            if epoch % 5 == 0:
                trial.log(0.8 * (index + epoch / epochs) / count, step=index * epochs + epoch, loss=loss)
        nets.append(net)

    with trial.off_clock(), torch.no_grad():
        accuracy = fmean(float((net(test[0]).argmax(1) == test[1]).float().mean()) for net in nets)
        on_fit = [layer_activations(net, fit[0]) for net in nets]
        on_test = [layer_activations(net, test[0]) for net in nets]
    quality: dict[str, list[Mapping[str, float]]] = {layer: [] for layer in LAYERS}
    pairs = list(combinations(range(count), 2))
    for done, pair in enumerate(pairs, 1):
        for layer in LAYERS:
            # From the net with more live units, so that a one-to-one mapping can reach every live unit of the other.
            a, b = sorted(pair, key=lambda net: -np.count_nonzero(np.ptp(on_fit[net][layer], axis=0)))
            weights = mapping(on_fit[a][layer], on_fit[b][layer], **settings)
            with trial.off_clock():
                values = (on_fit[a][layer], on_fit[b][layer], on_test[a][layer], on_test[b][layer])
                quality[layer].append(mapping_quality(weights, *values))
        trial.log(0.8 + 0.2 * done / len(pairs))

    metrics = {"accuracy": accuracy}
    for name in (*_QUALITY, "dead"):
        by_layer = {layer: fmean(pair[name] for pair in quality[layer]) for layer in LAYERS}
        metrics[name] = fmean(by_layer.values())
        if name in _QUALITY:
            metrics |= {f"{name}_{layer}": value for layer, value in by_layer.items()}
    return metrics


def digits(trial: Trial) -> tuple[tuple["Tensor", "Tensor"], ...]:
    """scikit-learn's digits, split by the trial's seed: for the nets, for the mapping, for the metrics.

    Returns:
        Three pairs of images in [0, 1] and labels. The first holds images (shifts, images, 1, 8, 8), so that training
        can draw a shift for each; the others are (images * shifts, 1, 8, 8), the nine shifts of an image in a row.
    """
    import torch
    from sklearn.datasets import load_digits
    from torch.nn.functional import pad

    pixels, labels = load_digits(return_X_y=True)
    order = trial.rng("split").permutation(len(pixels))
    images = pad(torch.tensor(pixels[order] / 16, dtype=torch.float32).view(-1, 1, 8, 8), (1, 1, 1, 1))
    target = torch.tensor(labels[order])
    shifted = torch.stack([images[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)])
    shifted, target = shifted.to(trial.device), target.to(trial.device)
    train, fit, test = slice(TRAIN), slice(TRAIN, TRAIN + FIT), slice(TRAIN + FIT, None)
    return (
        (shifted[:, train], target[train]),
        *(
            (shifted[:, part].transpose(0, 1).flatten(0, 1), target[part].repeat_interleave(len(shifted)))
            for part in (fit, test)
        ),
    )


def digit_net(trial: Trial, purpose: str, width: int = 1) -> "nn.Sequential":
    """Three convolutions (16, 32, 32 channels times `width`) and a hidden layer (64 times `width`), in torch's default
    random start, drawn from the trial's stream of that name."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(trial.rng(purpose).integers(2**63)))
        return nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 16 * width, 3, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(16 * width, 32 * width, 3, padding=1),
                relu2=nn.ReLU(),
                pool2=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32 * width, 32 * width, 3, padding=1),
                relu3=nn.ReLU(),
                pool3=nn.MaxPool2d(2),
                flatten=nn.Flatten(),
                fc1=nn.Linear(32 * width * 4, 64 * width),
                relu4=nn.ReLU(),
                fc2=nn.Linear(64 * width, 10),
            )
        ).to(trial.device)


def train_digit_net(
    net: "nn.Module", images: "Tensor", labels: "Tensor", epochs: int, trial: Trial, purpose: str
) -> Iterator[float]:
    """Train in place: Adam 2e-3, batches of 64, a random shift for every image; yields each epoch's mean loss.

    Raises:
        Diverged: the loss is not finite.
    """
    import torch
    from torch.nn.functional import cross_entropy

    generator = trial.torch_generator(purpose)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        losses = []
        for batch in torch.split(torch.randperm(len(labels), generator=generator), 64):
            shifts = torch.randint(len(images), batch.shape, generator=generator)
            loss: Any = cross_entropy(net(images[shifts, batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        if not np.isfinite(losses).all():
            raise Diverged(f"training loss {losses[-1]}")
        yield fmean(losses)


def layer_activations(net: "nn.Sequential", images: "Tensor") -> dict[str, NDArray[np.float64]]:
    """(samples, units) of every layer of `LAYERS`; each position of a map is a sample, image after image."""
    values, result = images, {}
    layers = {module: layer for layer, module in LAYERS.items()}
    for name, module in net.named_children():
        values = module(values)
        if name in layers:
            rows = values.movedim(1, -1).reshape(-1, values.shape[1])
            result[layers[name]] = rows.double().cpu().numpy()
    return result


def least_squares(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Weights of the best linear map from all units of a to every unit of b, both standardised; 0 for dead units."""
    a, b = standardise(a, a), standardise(b, b)
    weights: NDArray[np.float64] = np.linalg.pinv(a.T @ a, rcond=1e-10, hermitian=True) @ (a.T @ b)
    return weights


def standardise(values: NDArray[Any], reference: NDArray[Any]) -> NDArray[np.float64]:
    """Columns in units of the reference's mean and standard deviation; 0 where the reference is constant."""
    std = np.where(np.ptp(reference, axis=0) > 0, reference.std(0), np.inf)
    result: NDArray[np.float64] = (values - reference.mean(0)) / std
    return result


def mapping_quality(
    weights: NDArray[Any],
    fit_a: NDArray[Any],
    fit_b: NDArray[Any],
    test_a: NDArray[Any],
    test_b: NDArray[Any],
) -> dict[str, float]:
    """The task's metrics for one layer of one pair of nets, on the test samples; means over the live units of b.

    A unit that nothing predicts counts with correlation 0; units of b that are constant on either set are left out.

    Raises:
        ValueError: weights of another shape than (units of a, units of b).
        Diverged: weights that are not finite, or no live unit.
    """
    if weights.shape != (fit_a.shape[1], fit_b.shape[1]):
        raise ValueError(f"weights must be {(fit_a.shape[1], fit_b.shape[1])}, not {weights.shape}")
    live = (np.ptp(fit_b, axis=0) > 0) & (np.ptp(test_b, axis=0) > 0)
    if not np.isfinite(weights).all() or not live.any():
        raise Diverged("weights that are not finite" if live.any() else "every unit of a layer is constant")
    prediction = standardise(test_a, fit_a) @ weights[:, live]
    target = standardise(test_b, fit_b)[:, live]
    spread = prediction.std(0) * target.std(0)
    covariance = ((prediction - prediction.mean(0)) * (target - target.mean(0))).mean(0)
    used = np.abs(weights[:, live]) > USED
    return {
        "correlation": float(np.mean(covariance / np.where(spread > 0, spread, np.inf))),
        "r2": float(np.mean(1 - ((target - prediction) ** 2).mean(0) / target.var(0))),
        "predictors": float(used.sum(0).mean()),
        "mapped": float(used.any(0).mean()),
        "dead": float(1 - live.mean()),
    }
