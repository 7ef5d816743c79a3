"""LN-DPO: DPO in which each completion's log-ratio is divided by the completion's length.

Paper: arXiv 2407.15229 (Ahrabian et al.; in its second version "A Practical Analysis of Human Alignment with *PO",
Findings of NAACL 2025).
Read beside: huggingface/trl 1.16.0, `DPOTrainer` with ``loss_type="sigmoid_norm"``, whose values this has; TRL credits
that loss to an ablation of SimPO (arXiv 2405.14734) and to Tulu 3 (arXiv 2411.15124).
Deviations: beta may be given as DPO's and is then scaled by the data's mean length (ours). The paper's study of whole
grids of hyper-parameters is `counterproof.preference.RobustnessStudy`.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from counterproof.errors import UserError, extra

with extra("preference"):
    from torch.nn.functional import logsigmoid

from counterproof.preference.objectives import Batch, Objective, Output, log_ratios, pair_output, positive

if TYPE_CHECKING:
    from counterproof.language import Logps

__all__ = ["LNDPO"]

MATCH = "match:"


@dataclass(frozen=True)
class LNDPO(Objective):
    """Length-normalised DPO, ``-log sigmoid(beta (D_w / n_w - D_l / n_l))``.

    ``D`` is a completion's summed log-probability under the policy less that under the reference, ``n`` its number of
    tokens, the end token included. So a long completion cannot outweigh a short one by its length alone. Where all have
    N tokens, LN-DPO with beta is DPO with ``beta / N``: so the betas of DPO are one or two orders too
    small here, and leave the policy nearly where it was.

    Args:
        beta: a number, applied to log-ratios per token; or ``"match:b"``, ``b`` times the mean length of the training
            completions, which is found by `calibrated`: as strong as DPO with b on completions of that length.

    Raises:
        ValueError: a beta that is not positive, or is text of another form.
    """

    beta: float | str = "match:0.1"
    name: ClassVar[str] = "ln-dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "pairs"})

    def __post_init__(self) -> None:
        if isinstance(self.beta, str):
            matched(self.beta)
        else:
            positive(self.beta, "beta")

    def calibrated(self, mean_length: float) -> "LNDPO":
        """The objective with its beta as a number.

        Args:
            mean_length: tokens of the training completions on average, chosen and rejected, ends included.

        Raises:
            ValueError: a length that is not positive.
        """
        if not isinstance(self.beta, str):
            return self
        if not (math.isfinite(mean_length) and mean_length > 0):
            raise ValueError(f"mean_length must be a positive number of tokens, not {mean_length!r}")
        return replace(self, beta=matched(self.beta) * mean_length)

    def __call__(self, policy: "Logps", reference: "Logps | None", batch: Batch) -> Output:
        """Losses (groups,).

        Raises:
            ValueError: a completion without tokens, naming its row.
            UserError: a beta that waits for `calibrated`; no reference; groups that are not pairs.
        """
        if isinstance(self.beta, str):
            length = "the mean number of tokens of a completion of the training set"
            raise UserError(f"beta={self.beta!r} depends on the data; call calibrated({length}), or give a number")
        empty = (policy.lengths == 0).nonzero()
        if len(empty):
            row = batch.name(int(batch.group[empty[0, 0]]))
            raise ValueError(f"{row}has a completion of 0 tokens, which has no mean; leave it out, or end it with EOS")
        chosen, rejected = batch.pairs()
        rewards = self.beta * log_ratios(policy, reference) / policy.lengths
        return pair_output(-logsigmoid(rewards[chosen] - rewards[rejected]), rewards, policy, batch)


def matched(beta: str) -> float:
    """The b of ``"match:b"``.

    Raises:
        ValueError: text of another form, or a b that is not positive.
    """
    try:
        value = float(beta.removeprefix(MATCH)) if beta.startswith(MATCH) else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"beta must be a positive number, or 'match:b' with DPO's beta b such as 'match:0.1', not {beta!r}"
        )
    return value
