"""RFT (arXiv 2308.01825): supervised fine-tuning on the base's own right samples.

L = −mean over tokens of log π(y_t | x, y_<t), with y sampled from the base and kept if right.
"""

from __future__ import annotations

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.sft import sft_loss
from paper.model import log_probabilities


class Steps(Algorithm):
    """Learn the chosen answers of the pool."""

    def step(self, number: int) -> Log:
        pairs = self.learner.pairs(number, self.run.prompts * self.run.samples)
        loss = sft_loss(log_probabilities(self.learner.policy, pairs.prompts, pairs.chosen))
        self.learner.update(loss)
        return {"loss": loss.item()}
