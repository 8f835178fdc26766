"""GRPO (arXiv 2402.03300): rewards are compared within the samples of one prompt."""

from __future__ import annotations

from torch import Tensor

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.surrogate import improve


def group_advantages(rewards: Tensor) -> Tensor:
    """A_i = (R_i − mean(R)) / std(R) over the samples of a prompt (section 4.1.2).

    Rewards are (prompts, samples). 1e-4 is added to the deviation, so that a group in which all
    are right, or none, asks for nothing.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4)


class Steps(Algorithm):
    """Sample, compare within groups, improve by the clipped surrogate (with KL if beta > 0)."""

    def step(self, number: int) -> Log:
        rollout = self.learner.rollout()
        groups = rollout.rewards.view(self.run.prompts, self.run.samples)
        return improve(self.learner, rollout, group_advantages(groups).view(-1, 1))
