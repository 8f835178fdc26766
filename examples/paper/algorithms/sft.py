"""SFT: supervised fine-tuning on right answers."""

from __future__ import annotations

from torch import Tensor

from paper.algorithms.algorithm import Algorithm, Log
from paper.model import log_probabilities
from paper.tasks import draw, prompts_of


def sft_loss(logs: Tensor) -> Tensor:
    """L = −mean over tokens of log π(y_t | x, y_<t): logs are (batch, answer)."""
    return -logs.mean()


class Steps(Algorithm):
    """Draw prompts, learn their right answers: as many as RL would have samples."""

    def step(self, number: int) -> Log:
        learner = self.learner
        digits = draw(self.run.prompts * self.run.samples, learner.generator)
        prompts = prompts_of(learner.task, digits)
        loss = sft_loss(log_probabilities(learner.policy, prompts, learner.task.right(digits)))
        learner.update(loss)
        return {"loss": loss.item()}
