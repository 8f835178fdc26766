"""ORPO (arXiv 2403.07691): supervised fine-tuning with a penalty by odds, without a reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.preferences import of_pairs


def log_odds(mean: Tensor) -> Tensor:
    """log(P / (1 − P)) of P = exp(mean log probability of a token): (pairs,).

    P is kept away from 1, where odds are infinite.
    """
    return mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-6))


def orpo_loss(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    """L = mean of −1/|y_w| log π(y_w) − λ log σ(log(odds(y_w) / odds(y_l))) (equations 6 and 7).

    ``chosen`` and ``rejected`` are mean log probabilities of a token, (pairs,); λ is ``weight``.
    """
    penalty = F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    return (-chosen - weight * penalty).mean()


class Steps(Algorithm):
    """Learn the right answers, and that the wrong ones are less likely."""

    def step(self, number: int) -> Log:
        _, chosen, rejected = of_pairs(self.learner, number)
        better, worse = chosen.mean(1), rejected.mean(1)
        loss = orpo_loss(better, worse, self.run.beta)
        self.learner.update(loss)
        return {"loss": loss.item(), "told_apart": (better > worse).float().mean().item()}
