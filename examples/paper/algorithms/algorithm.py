"""What every algorithm is: a step that is taken again and again."""

from __future__ import annotations

import torch
from torch import nn

from paper.learner import Learner

Log = dict[str, float]  #: what a step says of itself, by name


class Algorithm:
    """One algorithm at work on a learner."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.run = learner.run

    def step(self, number: int) -> Log:
        """Take step ``number``, counted from 0; gives what is to be logged."""
        raise NotImplementedError

    def kept(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What else has a state, so that a run that was stopped goes on as if it had not been."""
        return {}
