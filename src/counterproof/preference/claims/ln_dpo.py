"""Does dividing by length make DPO sturdier and briefer? Quality over whole grids; length and KL at equal quality."""

from typing import Any

from counterproof.bench.task import Arm, Claim
from counterproof.preference.task import ARMS, PREFERENCE

DPO, SIMPO = (next(arm for arm in ARMS[PREFERENCE.name] if arm.name == name) for name in ("dpo", "simpo"))
# DPO's grid, each beta as strong as its own on completions of mean length.
LN_DPO = Arm(
    "ln-dpo",
    method="counterproof.preference.ln_dpo:LNDPO",
    settings={
        "beta": [f"match:{beta}" for beta in DPO.settings["beta"]],
        "learning_rate": DPO.settings["learning_rate"],
    },
)

# The shares are of words on the topic: a hundredth is the least that would decide between two methods.
QUALITY = {"effect": "difference", "smallest": 0.01}
SHARE = {"effect": "ratio", "smallest": 0.95}


def _claim(
    name: str,
    says: str,
    metric: str,
    *,
    size: dict[str, Any],
    reported: str,
    method: Arm = LN_DPO,
    labeller: str = "neutral",
) -> Claim:
    return Claim(
        paper="ln-dpo",
        name=name,
        says=says,
        task=PREFERENCE,
        baseline=DPO,
        method=method,
        metric=metric,
        better=PREFERENCE.metrics[metric].better,
        reported=reported,
        settings={} if labeller == "neutral" else {"labeller": labeller},
        **size,
    )


STURDIER = (
    "LN-DPO is more stable over hyper-parameters and improves on DPO; at their best points DPO, LN-DPO and SimPO are "
    "alike (Safe-RLHF and HH-RLHF, reward model as judge; abstracts, no figure read)"
)
BRIEFER = "LN-DPO's answers are shorter, without loss of quality (abstracts; no figure read)"

CLAIMS = (
    _claim(
        "main",
        "over a grid of betas and learning rates, matched to DPO's, mean quality is higher",
        "quality_mean",
        size=QUALITY,
        reported=STURDIER,
    ),
    _claim(
        "worst-point",
        "at the worst point of the grid quality is higher",
        "quality_worst",
        size=QUALITY,
        reported=STURDIER,
    ),
    _claim(
        "median-point",
        "at the median point of the grid quality is higher",
        "quality_median",
        size=QUALITY,
        reported=STURDIER,
    ),
    _claim(
        "spread",
        "quality varies less over the grid",
        "quality_sd",
        size=SHARE,
        reported=STURDIER,
    ),
    _claim(
        "shorter",
        "where the labeller does not care for length, answers of equal quality are shorter",
        "length_at_quality",
        size=SHARE,
        reported=BRIEFER,
    ),
    _claim(
        "nearer",
        "where the labeller does not care for length, a model of equal quality is nearer to its start",
        "kl_at_quality",
        size=SHARE,
        reported="not compared at equal quality; DPO's answers stay very near the SFT model's (abstract)",
    ),
    _claim(
        "simpo",
        "SimPO's mean quality over its grid is higher than DPO's",
        "quality_mean",
        size=QUALITY,
        reported=(
            "SimPO and LN-DPO hold up better than DPO away from the best point, all three are alike at it (abstract of "
            "the second version; no figure read)"
        ),
        method=SIMPO,
    ),
    _claim(
        "labeller-likes-length",
        "where the labeller likes length for its own sake, answers of equal quality are shorter",
        "length_at_quality",
        size=SHARE,
        reported=BRIEFER,
        labeller="likes-length",
    ),
    _claim(
        "longer-says-more",
        "where longer answers truly say more, answers of equal quality are shorter",
        "length_at_quality",
        size=SHARE,
        reported=BRIEFER,
        labeller="longer-says-more",
    ),
)
