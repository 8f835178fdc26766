"""Small models of every kind of tensor, and steps that change a little of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support import Tensor, write_index, write_safetensors

#: name -> dtype, shape, bytes; the last is larger than what is worked on at a time
KINDS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "model.scale": ("F32", (), 4),
    "model.flag": ("BOOL", (), 1),
    "model.nothing": ("BF16", (0, 8), 0),
    "model.small": ("F16", (3, 5), 30),
    "model.four": ("F4", (10, 6), 30),
    "model.six": ("F6_E2M3", (16, 4), 48),
    "model.bytes": ("U8", (777,), 777),
    "model.eight": ("F8_E4M3", (33, 31), 1023),
    "model.long": ("I64", (40,), 320),
    "model.complex": ("C64", (9, 9), 648),
    "model.matrix": ("BF16", (150, 999), 299_700),
    "model.kept": ("F64", (4, 4), 128),
    "model.large": ("BF16", (2200, 1000), 4_400_000),
}
NANS = {"model.matrix": b"\x01\x7f\xc0\x7f\xff\xff", "model.scale": b"\x01\x00\x80\x7f"}


def first_model() -> dict[str, Tensor]:
    """Random bits, with payloads of NaN among them."""
    rng = np.random.default_rng(1)
    found = {}
    for name, (dtype, shape, nbytes) in KINDS.items():
        data = rng.integers(0, 2, nbytes) if dtype == "BOOL" else rng.integers(0, 256, nbytes)
        raw = data.astype(np.uint8).tobytes()
        nan = NANS.get(name, b"")
        found[name] = dtype, shape, nan + raw[len(nan) :]
    return found


def stepped(model: dict[str, Tensor], seed: int, share: float = 0.02) -> dict[str, Tensor]:
    """The model with a share of its bytes changed, at least one in every tensor but ``kept``."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, (dtype, shape, raw) in model.items():
        data = np.frombuffer(raw, np.uint8).copy()
        if len(data) and not name.endswith("kept"):
            where = np.flatnonzero(rng.random(len(data)) < share)
            where = np.union1d(where, [rng.integers(len(data))])
            change = rng.integers(1, 256, len(where), dtype=np.uint8)
            data[where] ^= 1 if dtype == "BOOL" else change
        found[name] = dtype, shape, data.tobytes()
    return found


def save(folder: Path, model: dict[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint directory with a config; with an index if it is in several files."""
    names = list(model)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", model)
    else:
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            mine = {name: model[name] for name in names[i::shards]}
            write_safetensors(folder / file, mine, {"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        write_index(folder, weight_map)
    (folder / "config.json").write_text('{"model_type": "toy"}')
    return folder
