"""Each objective against a value worked out by hand."""

from __future__ import annotations

import math

import example_programs  # noqa: F401  # makes the programs importable
import pytest
import torch
from paper.algorithms import grpo, ppo, prime
from paper.algorithms.dpo import dpo_loss
from paper.algorithms.kto import kto_loss
from paper.algorithms.orpo import log_odds, orpo_loss
from paper.algorithms.sft import sft_loss
from paper.algorithms.simpo import simpo_loss
from paper.algorithms.surrogate import kl_penalty, leave_one_out, surrogate
from torch import Tensor, tensor


def near(found: Tensor, *wanted: float) -> None:
    assert found.flatten().tolist() == pytest.approx(list(wanted), abs=1e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_sft_is_the_mean_over_tokens() -> None:
    # four tokens of probability 1/2, 1/4, 1/2, 1/4: −(−1 −2 −1 −2)/4 · log 2
    near(sft_loss(tensor([[0.5, 0.25], [0.5, 0.25]]).log()), 1.5 * math.log(2))


def test_rft_learns_what_sft_does_from_the_chosen_answers() -> None:
    from paper.algorithms import rft

    assert vars(rft)["sft_loss"] is sft_loss


def test_the_surrogate_is_clipped_where_it_would_go_too_far() -> None:
    old = tensor([[1.0, 1.0, 1.0, 1.0]]).log()
    ratio = tensor([[1.5, 1.5, 0.5, 0.5]])
    good = tensor([[1.0, -1.0, 1.0, -1.0]])
    # min(ρA, clip(ρ)A): 1.2, −1.5, 0.5, −0.8; clipping took the first and the last
    loss, clipped = surrogate(ratio.log() + old, old, good, 0.2)
    near(loss, -(1.2 - 1.5 + 0.5 - 0.8) / 4)
    near(clipped, 0.5)
    loss, clipped = surrogate(ratio.log() + old, old, good, 0.0)
    near(loss, -(1.5 - 1.5 + 0.5 - 0.5) / 4)
    near(clipped, 0.0)


def test_clipped_tokens_have_no_gradient() -> None:
    logs = tensor([[1.5, 0.5]]).log().requires_grad_()
    loss, _ = surrogate(logs, torch.zeros(1, 2), tensor([[1.0, 1.0]]), 0.2)
    (gradient,) = torch.autograd.grad(loss, logs)
    near(gradient, 0.0, -0.25)  # −ρA / 2 of the second


def test_kl_penalty() -> None:
    # π_ref/π = 2 and 1/2: 2 − log 2 − 1 and 1/2 + log 2 − 1
    found = kl_penalty(tensor([[0.2, 0.4]]).log(), tensor([[0.4, 0.2]]).log())
    near(found, ((1 - math.log(2)) + (math.log(2) - 0.5)) / 2)


def test_grpo_advantages() -> None:
    # 1, 0, 0, 0: mean 1/4, sample deviation 1/2; none right: nothing to learn
    found = grpo.group_advantages(tensor([[1.0, 0.0, 0.0, 0.0], [0.0] * 4]))
    near(found, 0.75 / 0.5001, *[-0.25 / 0.5001] * 3, *[0.0] * 4)


def test_rloo_advantages() -> None:
    # 1 − (0 + 0 + 1)/3; 0 − (1 + 0 + 1)/3 twice; 1 − 1/3
    near(leave_one_out(tensor([[1.0, 0.0, 0.0, 1.0]])), 2 / 3, -2 / 3, -2 / 3, 2 / 3)


def test_ppo_rewards_and_advantages() -> None:
    old, reference = tensor([[0.5, 0.5]]).log(), tensor([[0.25, 1.0]]).log()
    rewards = ppo.shaped(tensor([1.0]), old, reference, 0.1)
    near(rewards, -0.1 * math.log(2), 1 + 0.1 * math.log(2))
    # δ2 = 1 − 0.5, δ1 = 0 + 0.5 − 0.25; A2 = δ2, A1 = δ1 + 0.9 δ2
    found = ppo.advantages_of(tensor([[0.0, 1.0]]), tensor([[0.25, 0.5]]), 0.9)
    near(found, 0.25 + 0.9 * 0.5, 0.5)


def test_ppo_with_lambda_one_is_the_return_less_the_value() -> None:
    rewards, values = torch.rand(3, 5), torch.rand(3, 5)
    returns = rewards.flip(1).cumsum(1).flip(1)
    near(ppo.advantages_of(rewards, values, 1.0), *(returns - values).flatten().tolist())


def test_prime_rewards_and_loss() -> None:
    process = prime.process_rewards(tensor([[0.5, 0.5]]).log(), tensor([[0.25, 1.0]]).log(), 0.2)
    near(process, 0.2 * math.log(2), -0.2 * math.log(2))
    found = prime.outcome_loss(tensor([[1.0, 1.0], [0.5, 0.5]]), tensor([1.0, 0.0]))
    near(found, -(math.log(sigmoid(2)) + math.log(1 - sigmoid(1))) / 2)


def test_prime_advantages() -> None:
    # two samples: baselines are the other's mean, 0.4 and 0.2; outcomes 1 − 0 and 0 − 1
    process = tensor([[0.1, 0.3], [0.4, 0.4]])
    found = prime.advantages_of(process, tensor([1.0, 0.0]), 2)
    near(found, 1 + (-0.3 - 0.1), 1 - 0.1, -1 + (0.2 + 0.2), -1 + 0.2)


def test_dpo() -> None:
    found = dpo_loss(tensor([2.0, -1.0]), tensor([1.0, 1.0]), 0.5)
    near(found, -(math.log(sigmoid(0.5)) + math.log(sigmoid(-1.0))) / 2)
    near(dpo_loss(torch.zeros(3), torch.zeros(3), 0.1), math.log(2))


def test_simpo() -> None:
    found = simpo_loss(tensor([-0.5]), tensor([-1.0]), 2.0, 1.0)
    near(found, -math.log(sigmoid(2.0 * 0.5 - 1.0)))


def test_kto() -> None:
    # 1 − σ(β (r − z)) of the good one, 1 − σ(β (z − r)) of the bad one
    found = kto_loss(tensor([2.0]), tensor([-1.0]), tensor(0.5), 0.1)
    near(found, ((1 - sigmoid(0.15)) + (1 - sigmoid(0.15))) / 2)


def test_orpo() -> None:
    half, fifth = math.log(0.5), math.log(0.2)
    near(log_odds(tensor([half, fifth])), 0.0, math.log(0.25))
    found = orpo_loss(tensor([half]), tensor([fifth]), 0.5)
    near(found, math.log(2) - 0.5 * math.log(sigmoid(math.log(4))))
    assert log_odds(tensor([0.0])).isfinite().all(), "a certain answer has finite odds"
