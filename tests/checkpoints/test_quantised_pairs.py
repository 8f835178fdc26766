"""Quantised models against what they were made of, and against each other, as a diff compares."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import ml_dtypes
import naive_values as twin
import numpy as np
import numpy.typing as npt
import pytest
from support import Tensor, write_safetensors

from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.views.blockscale import dequantised
from ckdiff.diffs.comparison import Selection, side_by_side
from ckdiff.rules import RuleSet

Floats = npt.NDArray[np.float32]


def changed(base: Path, tuned: Path, *, window: int = 1 << 16) -> dict[str, int]:
    """Elements that differ by value, of each pair; nothing is unpaired."""
    with ExitStack() as stack:
        sides = [dequantised(open_checkpoint(path))[0] for path in (base, tuned)]
        for side in sides:
            stack.enter_context(side)
            side.fetch()
        comparison = side_by_side(sides[0], sides[1], Selection())
        assert comparison.pairing.unpaired == []
        rules = RuleSet.of(["exact"])
        task = comparison.task(rules, with_statistics=False, window=window, sink=None)
        counts = np.zeros(len(comparison.pairing), np.int64)
        for chunk in range(comparison.layout.chunks):
            found = task(chunk, threading.Event())
            counts[found.tensors] += found.changed[:, 0]
        return dict(zip(comparison.pairing.names, counts.tolist(), strict=True))


def weights(*shape: int) -> Floats:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def bf16(values: Floats) -> Tensor:
    return "BF16", values.shape, values.astype(ml_dtypes.bfloat16).tobytes()


def fp8(values: Floats, block: tuple[int, int]) -> tuple[dict[str, Tensor], Floats]:
    """``x.weight`` in blocks, scaled by powers of two, and the values."""
    *_, rows, columns = values.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    scales = 2.0 ** np.random.default_rng(1).integers(-9, -6, (down, across)).astype(np.float32)
    wide = scales.repeat(block[0], 0).repeat(block[1], 1)[:rows, :columns].astype(np.float32)
    held = (values / wide).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    tensors: dict[str, Tensor] = {
        "x.weight": ("F8_E4M3", values.shape, held.tobytes()),
        "x.weight_scale_inv": ("F32", scales.shape, scales.astype(np.float32).tobytes()),
        "norm.weight": bf16(weights(9)),
    }
    return tensors, held.astype(np.float32) * wide


def put(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    return write_safetensors(path / "model.safetensors", tensors)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("one", "other")]
    for folder in found:
        folder.mkdir()
    return found


def test_blocks_against_what_they_stand_for(folders: list[Path]) -> None:
    """Values of FP8 and powers of two are numbers of BF16: nothing is changed but what is."""
    quantised, values = fp8(weights(300, 200), (128, 128))
    plain = {"x.weight": bf16(values), "norm.weight": quantised["norm.weight"]}
    paths = put(folders[0], quantised), put(folders[1], plain)
    nothing = {"norm.weight": 0, "x.weight": 0}
    assert changed(*paths) == changed(*reversed(paths)) == nothing
    for at in ((0, 0), (127, 128), (299, 199)):
        values[at] += 1
    put(folders[1], plain | {"x.weight": bf16(values)})
    assert changed(*paths) == changed(*reversed(paths)) == nothing | {"x.weight": 3}


def test_only_a_scale_changed(folders: list[Path]) -> None:
    """All of its block changes by value, but for zeros; no bit of the weights does."""
    quantised, values = fp8(weights(300, 200), (128, 128))
    dtype, shape, data = quantised["x.weight_scale_inv"]
    scales = np.frombuffer(data, np.float32).reshape(shape).copy()
    scales[1, 1] *= 2
    other = quantised | {"x.weight_scale_inv": (dtype, shape, scales.tobytes())}
    paths = put(folders[0], quantised), put(folders[1], other)
    wanted = int(np.count_nonzero(values[128:256, 128:]))
    assert changed(*paths) == {"norm.weight": 0, "x.weight": wanted}


def test_two_quantisations_of_one_model(folders: list[Path]) -> None:
    """In blocks, and in rows that have the same scales."""
    quantised, values = fp8(weights(256, 200), (128, 200))
    _, _, data = quantised["x.weight_scale_inv"]
    rows = np.frombuffer(data, np.float32).repeat(128)
    other = {name: tensor for name, tensor in quantised.items() if name != "x.weight_scale_inv"}
    other["x.weight_scale"] = "F32", (256, 1), rows.tobytes()
    paths = put(folders[0], quantised), put(folders[1], other)
    assert values.any()
    assert changed(*paths) == {"norm.weight": 0, "x.weight": 0}
    rows[3] *= 2
    put(folders[1], other | {"x.weight_scale": ("F32", (256, 1), rows.tobytes())})
    assert changed(*paths)["x.weight"] == int(np.count_nonzero(values[3]))


def test_quantised_parts_against_a_fused_whole(folders: list[Path]) -> None:
    """Experts as they are quantised, one by one, and as transformers holds them."""
    parts: dict[str, Tensor] = {"norm.weight": bf16(weights(9))}
    stacks: dict[str, list[Floats]] = {"gate": [], "up": [], "down": []}
    for expert in range(3):
        for kind, stack in stacks.items():
            shape = (256, 192) if kind == "down" else (192, 256)
            quantised, values = fp8(weights(*shape, expert + 1)[..., expert], (128, 128))
            stack.append(values)
            name = f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"
            parts[name] = quantised["x.weight"]
            parts[f"{name}_scale_inv"] = quantised["x.weight_scale_inv"]
    both = np.concatenate([np.stack(stacks["gate"]), np.stack(stacks["up"])], 1)
    both[2, 200, 3] += 1
    experts = "model.layers.0.mlp.experts"
    whole = {
        f"{experts}.gate_up_proj": bf16(both),
        f"{experts}.down_proj": bf16(np.stack(stacks["down"])),
        "norm.weight": parts["norm.weight"],
    }
    paths = put(folders[0], parts), put(folders[1], whole)
    for found in (changed(*paths), changed(*reversed(paths))):
        assert len(found) == 10
        assert {name for name, count in found.items() if count} == {f"{experts}.2.up_proj.weight"}


def experts(shape: tuple[int, int, int]) -> tuple[dict[str, Tensor], Floats]:
    """Experts as gpt-oss saves them, and their values, turned."""
    count, rows, columns = shape
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (count, rows, columns // 32, 16), np.uint8)
    powers = rng.integers(110, 125, data.shape[:-1], np.uint8)
    numbers = twin.F4[np.stack([data & 15, data >> 4], -1).reshape(shape)]
    scales = (2.0 ** (powers.astype(np.float32) - 127)).repeat(32, -1).astype(np.float32)
    name = "layers.0.mlp.experts.gate_up_proj"
    tensors: dict[str, Tensor] = {
        f"{name}_blocks": ("U8", data.shape, data.tobytes()),
        f"{name}_scales": ("U8", powers.shape, powers.tobytes()),
        f"{name}_bias": bf16(weights(count, rows)),
    }
    return tensors, np.ascontiguousarray((numbers * scales).swapaxes(1, 2))


def test_groups_against_what_they_stand_for(folders: list[Path]) -> None:
    quantised, values = experts((3, 200, 96))
    name = "layers.0.mlp.experts.gate_up_proj"
    plain = {name: bf16(values), f"{name}_bias": quantised[f"{name}_bias"]}
    paths = put(folders[0], plain), put(folders[1], quantised)
    nothing = {name: 0, f"{name}_bias": 0}
    assert changed(*paths) == changed(*reversed(paths)) == nothing
    assert changed(paths[1], paths[1]) == nothing
    values[1, 5, 7] += 1
    values[2, 95, 199] = 9
    put(folders[0], plain | {name: bf16(values)})
    assert changed(*paths) == nothing | {name: 2}
