"""What a worker of a cluster makes of a recipe is what is compared here, whatever it has to see."""

from __future__ import annotations

import json
import pickle
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import ckdiff
from ckdiff.checkpoints.opening import recipe_for_workers
from ckdiff.diffs.comparison import DiffRecipe
from ckdiff.diffs.plan import plan
from ckdiff.options import Options

EXCHANGED = ("q[.]=x.", "embed[.]=q.", "x[.]=embed.")
_NOISE = torch.Generator().manual_seed(3)


def noise(*shape: int) -> Any:
    return torch.randn(shape, generator=_NOISE).bfloat16()


def lay(folder: Path) -> None:
    """Checkpoints of several kinds."""
    gate, up, down = ([noise(*s) for _ in range(2)] for s in ((6, 10), (6, 10), (10, 6)))
    experts = "model.layers.0.mlp.experts"
    parts = {
        f"{experts}.{i}.{kind}_proj.weight": held[i]
        for i in range(2)
        for kind, held in (("gate", gate), ("up", up), ("down", down))
    }
    both = [torch.cat(pair).t() for pair in zip(gate, up, strict=True)]
    fused = {f"{experts}.gate_up_proj": torch.stack(both).mT.float() + 1}
    fused[f"{experts}.down_proj"] = torch.stack(down)
    plain = {"m.q.weight": noise(8, 8), "m.embed.weight": noise(16, 8)}
    grown = {
        "m.q.weight": plain["m.q.weight"].float(),
        "m.embed.weight": torch.cat([noise(16, 8), noise(3, 8)]),
    }
    torch.save(parts, folder / "parts.pt")
    torch.save(fused, folder / "fused.pt")
    torch.save({"model": plain, "ema": {n: t + 1 for n, t in plain.items()}}, folder / "plain.pt")
    torch.save({"ema": {n: t.t().contiguous().t() for n, t in grown.items()}}, folder / "grown.pt")
    (folder / "adapter").mkdir()
    at = "base_model.model.m.q.lora_"
    matrices = {f"{at}A.weight": noise(2, 8).float(), f"{at}B.weight": noise(8, 2).float()}
    save_file(matrices, folder / "adapter/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("base", "tuned", "more"),
    [
        ("parts.pt", "fused.pt", {}),
        ("fused.pt", "parts.pt", {"include": ("*.0.*",), "stats": True}),
        ("plain.pt", "grown.pt", {"key": "ema", "common_rows": True}),
        ("plain.pt", "grown.pt", {"key": "ema"}),
        ("plain.pt", "plain.pt", {"key": "model", "tuned_adapter": "adapter"}),
        ("plain.pt", "plain.pt", {"key": "model", "base_adapter": "adapter"}),
        ("plain.pt", "plain.pt", {"key": "model", "common_rows": True, "rename": EXCHANGED}),
    ],
)
def test_a_worker_sees_the_same(
    base: str, tuned: str, more: dict[str, Any], tmp_path: Path
) -> None:
    lay(tmp_path)
    for name in ("base_adapter", "tuned_adapter"):
        if name in more:
            more = more | {name: str(tmp_path / more[name])}
    sides = str(tmp_path / base), str(tmp_path / tuned)
    wanted = ckdiff.diff(*sides, **more)
    options = Options(**more)
    with plan(*sides, None, options) as planned, ExitStack() as stack:
        comparison = planned.comparison
        first, second = (
            recipe_for_workers(given, side)
            for given, side in zip(sides, planned.sides, strict=True)
        )
        recipe = DiffRecipe(
            (first, second),
            comparison.selection,
            rules=("exact",),
            with_statistics=options.stats,
            window=1 << 20,
            seen=comparison.seen(),
            out=None,
            work=None,
            plan="",
            same=comparison.same,
        )
        there = pickle.loads(pickle.dumps(recipe)).make(stack)
        result = there(0, threading.Event())
    changed = dict(zip(result.tensors.tolist(), result.changed[:, 0].tolist(), strict=True))
    assert wanted.rules["exact"]["changed"] > 0
    assert [changed[i] for i in range(len(wanted.table))] == [
        record.changed["exact"] for record in wanted.table
    ]
