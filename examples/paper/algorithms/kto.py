"""KTO (arXiv 2402.01306): each answer is judged by itself, as desirable or not."""

from __future__ import annotations

import torch
from torch import Tensor

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.preferences import of_pairs
from paper.learner import Learner, Pairs
from paper.model import log_probabilities


def kto_loss(chosen: Tensor, rejected: Tensor, kl: Tensor, beta: float) -> Tensor:
    """L = mean over all answers of 1 − v(x, y) (equation 8 with λ_D = λ_U = 1).

    v = σ(β (r − z)) of a desirable answer and σ(β (z − r)) of an undesirable one, with
    r = log π(y)/π_ref(y), here ``chosen`` and ``rejected``, (pairs,), and z = ``kl``, a scalar
    that no gradient goes through.
    """
    values = torch.cat((beta * (chosen - kl), beta * (kl - rejected))).sigmoid()
    return (1 - values).mean()


@torch.no_grad()
def reference_point(learner: Learner, pairs: Pairs) -> Tensor:
    """z = max(0, mean of log π(y')/π_ref(y')) over answers y' of other prompts (section 4.1)."""
    prompts = torch.cat((pairs.prompts, pairs.prompts))
    answers = torch.cat((pairs.chosen, pairs.rejected)).roll(1, 0)
    ours = log_probabilities(learner.policy, prompts, answers)
    theirs = log_probabilities(learner.reference, prompts, answers)
    return (ours - theirs).sum(1).mean().clamp(min=0)


class Steps(Algorithm):
    """Learn to value right answers more than the reference point, and wrong ones less."""

    def step(self, number: int) -> Log:
        pairs, chosen, rejected = of_pairs(self.learner, number)
        kl = reference_point(self.learner, pairs)
        better = (chosen - pairs.chosen_reference).sum(1)
        worse = (rejected - pairs.rejected_reference).sum(1)
        loss = kto_loss(better, worse, kl, self.run.beta)
        self.learner.update(loss)
        return {"loss": loss.item(), "kl": kl.item()}
