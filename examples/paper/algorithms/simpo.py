"""SimPO (arXiv 2405.14734): preferences by mean log probability, without a reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.preferences import of_pairs


def simpo_loss(chosen: Tensor, rejected: Tensor, beta: float, margin: float) -> Tensor:
    """L = −mean of log σ(β/|y_w| log π(y_w) − β/|y_l| log π(y_l) − γ) (equation 6).

    ``chosen`` and ``rejected`` are mean log probabilities of a token, (pairs,); γ is ``margin``.
    """
    return -F.logsigmoid(beta * (chosen - rejected) - margin).mean()


class Steps(Algorithm):
    """Learn to prefer the right answer by a margin."""

    def step(self, number: int) -> Log:
        _, chosen, rejected = of_pairs(self.learner, number)
        better, worse = chosen.mean(1), rejected.mean(1)
        loss = simpo_loss(better, worse, self.run.beta, self.run.margin)
        self.learner.update(loss)
        return {"loss": loss.item(), "told_apart": (better > worse).float().mean().item()}
