"""PPO (arXiv 1707.06347) as RLHF has it: a critic, GAE, and a KL penalty inside the reward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper.algorithms.algorithm import Algorithm, Log
from paper.algorithms.surrogate import improve
from paper.learner import Learner, Rollout
from paper.model import Model, answer_logits, log_probabilities

GAE = 0.95  #: λ; nothing is discounted, γ = 1
WARMUP = 15  #: batches that only the critic learns from, before the first step


def shaped(rewards: Tensor, old: Tensor, reference: Tensor, beta: float) -> Tensor:
    """r_t = −β (log π_old − log π_ref) for each token, and the task's reward on the last one.

    Rewards are (batch,), the logs and the result (batch, answer) (arXiv 2203.02155, equation 2).
    """
    out = -beta * (old - reference)
    out[:, -1] += rewards
    return out


def advantages_of(rewards: Tensor, values: Tensor, lam: float = GAE) -> Tensor:
    """A_t = Σ_l λ^l δ_{t+l}, with δ_t = r_t + V_{t+1} − V_t and V = 0 after the end.

    (arXiv 1506.02438, equation 16 with γ = 1). All are (batch, answer).
    """
    out = torch.zeros_like(values)
    ahead = torch.zeros(len(values))
    following = torch.zeros(len(values))
    for place in reversed(range(values.shape[1])):
        delta = rewards[:, place] + following - values[:, place]
        ahead = delta + lam * ahead
        following = values[:, place]
        out[:, place] = ahead
    return out


def critic_of(reference: Model) -> Model:
    """A copy of the base that says one number, at first 0, at each place."""
    critic = Model(reference.shape, outputs=1)
    weights = {k: v for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    critic.load_state_dict(weights, strict=False)
    nn.init.zeros_(critic.lm_head.weight)
    return critic


class Steps(Algorithm):
    """Sample, judge each token by the critic, improve the policy, then the critic."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(learner)
        self.critic = critic_of(learner.reference)
        self.optimizer = torch.optim.AdamW(
            self.critic.parameters(), lr=self.run.side_lr, weight_decay=0.0
        )

    def kept(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        return {"critic": self.critic, "critic_optimizer": self.optimizer}

    def values(self, rollout: Rollout) -> Tensor:
        """What the critic expects before each token: (batch, answer)."""
        return answer_logits(self.critic, rollout.prompts, rollout.answers).squeeze(2)

    def judged(self) -> tuple[Rollout, Tensor, Tensor, float]:
        """Samples, their advantages and returns, and their KL from the base."""
        rollout = self.learner.rollout()
        with torch.no_grad():
            values = self.values(rollout)
            reference = log_probabilities(self.learner.reference, rollout.prompts, rollout.answers)
        rewards = shaped(rollout.rewards, rollout.old, reference, self.run.beta)
        advantages = advantages_of(rewards, values)
        kl = (rollout.old - reference).sum(1).mean().item()
        return rollout, advantages, advantages + values, kl

    def teach(self, rollout: Rollout, returns: Tensor) -> float:
        """One step of the critic towards the returns: mean of (V − return)²."""
        loss = F.mse_loss(self.values(rollout), returns)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return loss.item()

    def step(self, number: int) -> Log:
        if number == 0:
            for _ in range(WARMUP):
                rollout, _, returns, _ = self.judged()
                self.teach(rollout, returns)
        rollout, advantages, returns, kl = self.judged()
        spread = advantages.std() + 1e-6
        log = improve(self.learner, rollout, (advantages - advantages.mean()) / spread)
        return {**log, "kl": kl, "critic_loss": self.teach(rollout, returns)}
