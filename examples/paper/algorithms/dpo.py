"""DPO (arXiv 2305.18290): preferences without a reward model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.preferences import of_pairs


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """L = −mean of log σ(β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l)) (equation 7).

    ``chosen`` and ``rejected`` are the log ratios of whole answers, (pairs,).
    """
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


class Steps(Algorithm):
    """Learn which answer of a pair is the right one."""

    def step(self, number: int) -> Log:
        pairs, chosen, rejected = of_pairs(self.learner, number)
        better = (chosen - pairs.chosen_reference).sum(1)
        worse = (rejected - pairs.rejected_reference).sum(1)
        loss = dpo_loss(better, worse, self.run.beta)
        self.learner.update(loss)
        return {"loss": loss.item(), "told_apart": (better > worse).float().mean().item()}
