"""RLOO (arXiv 2402.14740): REINFORCE with the other samples of a prompt as the baseline.

The gradient of the first step on a batch is that of the paper,
mean over i of (R_i − 1/(k−1) Σ_{j≠i} R_j) ∇ log π(y_i): where π = π_old the surrogate has it.
"""

from __future__ import annotations

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.surrogate import improve, leave_one_out


class Steps(Algorithm):
    """Sample, take the others' mean off each reward, improve."""

    def step(self, number: int) -> Log:
        rollout = self.learner.rollout()
        groups = rollout.rewards.view(self.run.prompts, self.run.samples)
        return improve(self.learner, rollout, leave_one_out(groups).view(-1, 1))
