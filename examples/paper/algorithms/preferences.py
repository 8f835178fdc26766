"""What DPO, SimPO, KTO and ORPO share: both answers of a pair through the policy at once."""

from __future__ import annotations

import torch
from torch import Tensor

from paper.learner import Learner, Pairs
from paper.model import log_probabilities


def of_pairs(learner: Learner, number: int) -> tuple[Pairs, Tensor, Tensor]:
    """A step's pairs, and log π of the tokens of the chosen and of the rejected answers.

    Half as many pairs as RL has samples, so as many answers; logs are (pairs, answer).
    """
    count = learner.run.prompts * learner.run.samples // 2
    pairs = learner.pairs(number, count)
    prompts = torch.cat((pairs.prompts, pairs.prompts))
    logs = log_probabilities(learner.policy, prompts, torch.cat((pairs.chosen, pairs.rejected)))
    return pairs, logs[:count], logs[count:]
