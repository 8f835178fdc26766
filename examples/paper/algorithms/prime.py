"""PRIME (arXiv 2502.01456): process rewards from a model that only learns from outcomes.

A second language model π_φ starts as the base. What it says more than the base is a reward for
each token; it is trained, on the samples of each step, to tell right answers from wrong ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.surrogate import improve, leave_one_out
from paper.learner import Learner
from paper.model import log_probabilities, model_of


def process_rewards(logs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r_φ(y_t) = β log(π_φ(y_t) / π_ref(y_t)) (equation 3): (batch, answer)."""
    return beta * (logs - reference)


def outcome_loss(process: Tensor, rewards: Tensor) -> Tensor:
    """L = −mean of R log σ(Σ_t r_φ) + (1 − R) log(1 − σ(Σ_t r_φ)) (equation 4)."""
    return F.binary_cross_entropy_with_logits(process.sum(1), rewards)


def advantages_of(process: Tensor, rewards: Tensor, samples: int) -> Tensor:
    """A_t = Σ_{s≥t} (r_φ(y_s) − mean of the others' r̄_φ) + R − mean of the others' R (equation 5).

    r̄_φ is the mean over a sample's tokens. Process is (prompts · samples, answer), rewards
    (prompts · samples,); the result is as process.
    """
    outcome = leave_one_out(rewards.view(-1, samples)).view(-1, 1)
    means = process.mean(1).view(-1, samples)
    baseline = (means - leave_one_out(means)).view(-1, 1)  # the mean of the others
    centred = process - baseline
    return outcome + centred.flip(1).cumsum(1).flip(1)


class Steps(Algorithm):
    """Sample, teach the reward model on these samples, judge each token by it, improve."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        self.judge = model_of(learner.reference.shape, learner.reference.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.judge.parameters(), lr=self.run.side_lr, weight_decay=0.0
        )

    def kept(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"judge": self.judge, "judge_optimizer": self.optimizer}

    def step(self, number: int) -> Log:
        rollout = self.learner.rollout()
        prompts, answers = rollout.prompts, rollout.answers
        with torch.no_grad():
            reference = log_probabilities(self.learner.reference, prompts, answers)
        logs = log_probabilities(self.judge, prompts, answers)
        loss = outcome_loss(process_rewards(logs, reference, self.run.beta), rollout.rewards)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        with torch.no_grad():
            logs = log_probabilities(self.judge, prompts, answers)
        process = process_rewards(logs, reference, self.run.beta)
        told = ((process.sum(1) > 0) == (rollout.rewards > 0)).float().mean().item()
        advantages = advantages_of(process, rollout.rewards, self.run.samples)
        log = improve(self.learner, rollout, advantages)
        return {**log, "judge_loss": loss.item(), "judge_accuracy": told}
