"""The programs of ``examples/paper``, importable, and a small matrix of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))

if TYPE_CHECKING:
    from paper.train import Setting

#: of the small matrix: two algorithms, seeds, an arm, and a mask of each way of making one
NAMES = (
    "grpo-sort-1",
    "dpo-sort-1",
    "grpo-sort-2",
    "grpo-sort-1-sgd",
    "grpo-sort-1+seed",
    "grpo-sort-1+random1",
    "grpo-sort-1+principal",
    "grpo-sort-1+early33",
    "grpo-sort-1+kept",
    "grpo-sort-1+percent",
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As the programs run: threads that wait for each other take longer than models this small."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


def small_setting(root: Path) -> Setting:
    """The setting of the small matrix."""
    from paper.base import Recipe
    from paper.build import Build
    from paper.commands import SMALL, SMALL_RECIPE
    from paper.train import Setting

    return Setting(Build(root), matrix="small", **SMALL, recipe=Recipe(**SMALL_RECIPE))
