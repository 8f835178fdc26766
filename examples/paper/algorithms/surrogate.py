"""What GRPO, RLOO, PPO and PRIME share: the clipped surrogate and advantages within a group."""

from __future__ import annotations

import torch
from torch import Tensor

from paper.algorithms.algorithm import Log
from paper.learner import Learner, Rollout
from paper.model import log_probabilities


def surrogate(logs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of PPO (arXiv 1707.06347, equation 7), to be minimised.

    L = −mean over tokens of min(ρ A, clip(ρ, 1 − ε, 1 + ε) A), with ρ = π(token) / π_old(token).

    All are (batch, answer) but advantages, which may be (batch, 1); ``clip`` is ε, 0 for none.
    Also gives the share of tokens where clipping took the gradient away.
    """
    ratio = (logs - old).exp()
    plain = ratio * advantages
    if clip == 0:
        return -plain.mean(), torch.zeros(())
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped).mean(), (clipped < plain).float().mean()


def kl_penalty(logs: Tensor, reference: Tensor) -> Tensor:
    """The estimate of KL(π‖π_ref) that GRPO adds (arXiv 2402.03300, equation 4).

    mean over tokens of π_ref / π − log(π_ref / π) − 1, which is never negative.
    """
    difference = reference - logs
    return (difference.exp() - difference - 1).mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = R_i − mean of the others' R_j (arXiv 2402.14740, section 2): (groups, samples)."""
    others = rewards.shape[1] - 1
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / others


def improve(learner: Learner, rollout: Rollout, advantages: Tensor) -> Log:
    """The optimizer's steps on one batch of samples, with the KL term where there is a beta.

    One step by default; several epochs and minibatches make clipping mean something.
    """
    run = learner.run
    count = len(rollout.prompts)
    log: Log = {}
    with_kl = run.beta if run.algorithm in ("grpo", "rloo") else 0.0
    for _ in range(run.epochs):
        order = torch.arange(count)
        if run.epochs * run.minibatches > 1:
            order = torch.randperm(count, generator=learner.generator)
        for part in order.chunk(run.minibatches):
            prompts, answers = rollout.prompts[part], rollout.answers[part]
            logs = log_probabilities(learner.policy, prompts, answers)
            loss, clipped = surrogate(logs, rollout.old[part], advantages[part], run.clip)
            log = {"clip_fraction": max(log.get("clip_fraction", 0.0), clipped.item())}
            if with_kl > 0:
                with torch.no_grad():
                    reference = log_probabilities(learner.reference, prompts, answers)
                penalty = kl_penalty(logs, reference)
                loss = loss + with_kl * penalty
                log["kl_penalty"] = penalty.item()
            learner.update(loss)
    return {"reward": rollout.rewards.mean().item(), **log}
