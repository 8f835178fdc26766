"""The algorithms, one file each: an objective with its equation, and a step of its loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paper.algorithms.algorithm import Algorithm
    from paper.learner import Learner


def algorithm_of(learner: Learner) -> Algorithm:
    """The algorithm that a learner's run names."""
    import importlib

    name = learner.run.algorithm
    module = importlib.import_module(f"paper.algorithms.{name}")
    found: Algorithm = module.Steps(learner)
    return found
