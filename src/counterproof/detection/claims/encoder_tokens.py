"""What an encoder knows before its decoder: can objects be read off its tokens by a straight line?"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from counterproof.bench.task import Arm, Claim, Metric, Trial
from counterproof.detection.task import DETECTION, METRICS, train_detector

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from counterproof.detection.task import Outcome

__all__ = ["CLAIMS", "ENCODER_TOKENS", "probe_auc", "run_encoder_tokens"]

ENCODER_TOKENS = replace(
    DETECTION,
    name="encoder-tokens",
    says=(
        "a small Deformable DETR trained as in the task `detection`; then a linear probe on the output of its encoder "
        "tells tokens inside objects from tokens outside, on held-out pictures"
    ),
    run=f"{__name__}:run_encoder_tokens",
    metrics={
        "token_auc": Metric(
            "higher", says="area under the probe's ROC curve; it is fitted on half the held-out pictures"
        ),
        **METRICS,
    },
)


# A task; the claims on it stand with their papers.
CLAIMS: tuple[Claim, ...] = ()


def run_encoder_tokens(arm: Arm, trial: Trial) -> Mapping[str, float]:
    """The training of the task `detection`, and the probe."""
    outcome = train_detector(arm, trial)
    with trial.off_clock():
        tokens, inside, picture = _tokens(outcome, trial.device)
        fitted = picture % 2 == 0
        found = probe_auc(tokens[fitted], inside[fitted], tokens[~fitted], inside[~fitted])
    return {"token_auc": found, **outcome.metrics}


def probe_auc(
    tokens: "NDArray[np.floating]",
    inside: "NDArray[np.bool_]",
    others: "NDArray[np.floating]",
    truth: "NDArray[np.bool_]",
) -> float:
    """How well a linear probe, fitted by ridge regression on some tokens, ranks others: area under its ROC curve.

    Args:
        tokens: (n, d), `inside`: (n,), what the probe is fitted on.
        others: (m, d), `truth`: (m,), what it is judged on; equal scores count half.

    Returns:
        the share of pairs of a token inside and one outside that are ranked right; 0.5 where one kind is missing.
    """
    import numpy as np
    from scipy.stats import rankdata

    mean, spread = tokens.mean(0), tokens.std(0) + 1e-6
    design = np.column_stack([(tokens - mean) / spread, np.ones(len(tokens))]).astype(np.float64)
    wanted = np.where(inside, 1.0, -1.0)
    weights = np.linalg.solve(design.T @ design + 1e-3 * len(design) * np.eye(design.shape[1]), design.T @ wanted)
    ranks = rankdata(((others - mean) / spread) @ weights[:-1])
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        return 0.5
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _tokens(outcome: "Outcome", device: str) -> "tuple[NDArray[np.floating], NDArray[np.bool_], NDArray[np.int64]]":
    """Tokens of the encoder's finest map (n, d), whether their cell's centre lies in a box, and their picture."""
    import numpy as np
    import torch

    from counterproof.detection.batches import collate, resized

    data, pixels, detector = outcome.held_out, outcome.pixels, outcome.trainee.detector
    seen: dict[str, torch.Tensor] = {}
    body = detector.model  # type: ignore[union-attr]
    encoder = body.encoder.register_forward_hook(  # type: ignore[operator,union-attr]
        lambda _module, _args, output: seen.update(memory=output[0])
    )
    decoder = body.decoder.register_forward_pre_hook(  # type: ignore[operator,union-attr]
        lambda _module, _args, given: seen.update(shapes=given["spatial_shapes"]), with_kwargs=True
    )
    detector.eval()
    tokens, inside, picture = [], [], []
    try:
        with torch.no_grad():
            for index, about in enumerate(data.pictures):
                shrunk, factors = resized(data.pixels(index), pixels.side, pixels.stretch)
                boxes = about.boxes * factors
                inputs = collate([shrunk], [boxes], [about.labels], pixels)
                detector(pixel_values=inputs["pixel_values"].to(device), pixel_mask=inputs["pixel_mask"].to(device))
                high, wide = (int(number) for number in seen["shapes"][0])
                height, width = inputs["pixel_values"].shape[-2:]
                y = np.repeat((np.arange(high) + 0.5) * height / high, wide)
                x = np.tile((np.arange(wide) + 0.5) * width / wide, high)
                real = (x < shrunk.shape[1]) & (y < shrunk.shape[0])
                centre = np.stack([x, y], -1)[:, None]
                covered = np.all((centre > boxes[:, :2]) & (centre < boxes[:, 2:]), axis=-1)
                within = np.any(covered, axis=1)
                tokens.append(seen["memory"][0, : high * wide].float().cpu().numpy()[real])
                inside.append(within[real])
                picture.append(np.full(int(real.sum()), index))
    finally:
        encoder.remove()
        decoder.remove()
    return np.concatenate(tokens), np.concatenate(inside), np.concatenate(picture)
