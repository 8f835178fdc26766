"""The bound on memory is kept whatever is gathered, widened and taken apart meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_memory import MIB, measure

import ckdiff
from ckdiff.diffs.plan import plan
from ckdiff.options import Options

_ROWS, _COLUMNS = 8192, 6144  # 96 MiB of bf16
_EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One matrix in three ways, and experts in two."""
    folder: Path = tmp_path_factory.mktemp("large")
    matrix = torch.arange(_ROWS * _COLUMNS, dtype=torch.int32).remainder_(251).bfloat16()
    matrix = matrix.view(_ROWS, _COLUMNS)
    kinds = ("gate", "up", "down")
    parts = {
        f"{_EXPERTS}.{i}.{kind}_proj.weight": matrix[i * 512 : i * 512 + 512, j : j + 1024]
        for i in range(16)
        for kind, j in zip(kinds, (0, 1024, 2048), strict=True)
    }
    gate, up, down = (
        [parts[f"{_EXPERTS}.{i}.{kind}_proj.weight"] for i in range(16)] for kind in kinds
    )
    down = [one.reshape(1024, 512) for one in down]
    parts |= {f"{_EXPERTS}.{i}.down_proj.weight": one for i, one in enumerate(down)}
    both = [torch.cat(pair).t() for pair in zip(gate, up, strict=True)]
    found = {
        "packed": {"w": matrix},
        "by columns": {"w": matrix.t().contiguous().t()},
        "wide": {"w": matrix.float()},
        "parts": parts,
        "fused": {
            f"{_EXPERTS}.gate_up_proj": torch.stack(both),
            f"{_EXPERTS}.down_proj": torch.stack([one.t() for one in down]),
        },
    }
    for name, state in found.items():
        torch.save(state, folder / f"{name}.pt")
    return {name: str(folder / f"{name}.pt") for name in found}


@pytest.mark.parametrize(
    ("base", "tuned"),
    [("packed", "by columns"), ("by columns", "wide"), ("parts", "fused")],
)
def test_memory_is_bounded(checkpoints: dict[str, str], base: str, tuned: str) -> None:
    sides = {"base": checkpoints[base], "tuned": checkpoints[tuned]}
    used = measure({**sides, "memory": 128 * MIB, "workers": 1})
    assert used.rules is not None
    assert used.rules["exact"]["changed"] == 0
    assert 0 < used.anonymous <= 128 * MIB


def test_what_is_copied_is_in_what_a_dry_run_says(checkpoints: dict[str, str]) -> None:
    needed = []
    # what the first one imports is counted too
    for name in ("wide", "packed", "by columns", "wide"):
        options = Options(workers=1, dry_run=True)
        with plan(checkpoints["packed"], checkpoints[name], None, options) as planned:
            estimate = planned.estimate()
            needed.append(estimate.memory_needed)
            window = estimate.window * 2  # bytes of the narrower side
    _, packed, gathered, widened = needed
    slack = 1 << 19
    assert gathered >= packed + window - slack
    # of what is widened a block at a time is made
    assert packed <= widened < packed + slack
    with pytest.raises(ckdiff.BudgetError):
        ckdiff.diff(checkpoints["packed"], checkpoints["wide"], memory="8MiB")
