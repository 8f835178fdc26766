"""Pairs of small checkpoints in bytes, and what the twin says about them."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive
import numpy as np
from kernel_runs import some_elements
from support import write_safetensors

#: one of each kind, with and without rounding first
RULES = ["exact", "atol=1e-3", "rtol=1e-3", "ulp=1", "exact@bf16", "atol=1e-5@f16", "ulp=0@f32"]


@dataclass
class Pair:
    """One tensor of both sides."""

    dtype: str
    shape: tuple[int, ...]
    base: bytes
    tuned: bytes

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def masks(self, rules: Sequence[str]) -> dict[str, Any]:
        sides = [naive.as_bits(self.dtype, data) for data in (self.base, self.tuned)]
        twin = naive.Pairs(self.dtype, *sides)
        return {rule: twin.changed(rule) for rule in rules}


Model = Mapping[str, Pair]


def some_pair(dtype: str, shape: tuple[int, ...], seed: int) -> Pair:
    return Pair(dtype, shape, *some_elements(dtype, math.prod(shape), seed))


def some_model(seed: int, tensors: int = 12, largest: int = 1200) -> dict[str, Pair]:
    """Random tensors of random dtypes and shapes; some without elements, some 0-d."""
    noise = random.Random(seed)
    model = {}
    for i in range(tensors):
        dtype = noise.choice(list(naive.FORMATS))
        step = naive.per_byte(dtype)
        shape: tuple[int, ...] = (noise.randrange(largest) // step * step,)
        if noise.random() < 0.3:
            shape = (noise.randrange(1, 9), 3, noise.randrange(8) * step)
        elif noise.random() < 0.2 and step == 1:
            shape = ()
        name = f"model.layers.{noise.randrange(120)}.{noise.choice('qkvo')}.{i}"
        model[name] = some_pair(dtype, shape, noise.randrange(1 << 30))
    return model


def write_side(folder: Path, model: Model, side: str, seed: int) -> Path:
    """Write one side: any order, any number of shards, any alignment."""
    noise = random.Random(seed)
    names = list(model)
    noise.shuffle(names)
    count = noise.randrange(1, 4)
    for shard in range(count):
        mine = names[shard::count]
        tensors = {n: (model[n].dtype, model[n].shape, getattr(model[n], side)) for n in mine}
        file = folder / f"model-{shard}.safetensors"
        write_safetensors(file, tensors, pad=noise.randrange(9))
    return folder


def write_sparse(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    written: Mapping[str, Sequence[tuple[int, bytes]]],
) -> Path:
    """Write a file of zeros (holes, where the file system has them) with some bytes in it.

    ``written`` gives (byte offset in the tensor, bytes) by tensor name.
    """
    header, begin, offsets = {}, 0, {}
    for name, (dtype, shape) in tensors.items():
        offsets[name] = begin
        end = begin + math.prod(shape) * naive.FORMATS[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
        for name, pieces in written.items():
            for offset, data in pieces:
                file.seek(8 + len(text) + offsets[name] + offset)
                file.write(data)
    return path


def files_of(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by relative path."""
    return {
        str(Path(folder, name).relative_to(root)): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(root)
        for name in names
    }


def same_statistics(found: dict[str, Any] | None, expected: dict[str, Any]) -> None:
    """Compare with the twin; sums may differ in the last digits, counts may not."""
    assert found is not None
    scale = expected["l2_base"] * expected["l2_tuned"]
    for key, want in expected.items():
        if key == "dot":
            cosine = found["cosine"]
            assert (cosine is None) == (scale == 0)
            if cosine is not None:
                assert abs(cosine - want / scale) < 1e-11
        elif key in ("max_abs_delta", "sign_flips", "nonfinite", "ulp_histogram"):
            assert found[key] == want, key
        else:
            assert math.isclose(found[key], want, rel_tol=1e-11), key


def check_masks(store: Any, model: Model, rules: Sequence[str]) -> None:
    """Hold everything that a store says about masks against the twin."""
    flat = {rule: store.array(rule)[:] for rule in rules}
    end = 0
    for record in store.tensors:
        pair = model[record.name]
        assert (record.dtype, record.shape) == (pair.dtype, pair.shape)
        assert record.elements == pair.elements
        assert record.start == end
        end += -(-pair.elements // 512) * 512
        assert record.base_hash == naive.content_hash(pair.dtype, pair.base)
        assert record.tuned_hash == naive.content_hash(pair.dtype, pair.tuned)
        noise = random.Random(record.name)
        for rule, want in pair.masks(rules).items():
            assert record.changed[rule] == int(want.sum()), (record.name, rule)
            mask = store.mask(record.name, rule)
            assert mask.dtype == bool
            assert mask.shape == pair.shape
            assert (mask.ravel() == want).all(), (record.name, rule)
            bits = naive.packed(want)
            packed = store.packed(record.name, rule)
            assert packed.dtype == np.uint8
            assert packed.tobytes() == bits
            first = record.start // 8
            assert flat[rule][first : end // 8].tobytes() == bits.ljust(end // 8 - first, b"\0")
            start, stop = sorted(noise.randrange(pair.elements + 1) for _ in range(2))
            part = store.mask(record.name, rule, start=start, stop=stop)
            assert part.shape == (stop - start,)
            assert (part == want[start:stop]).all()
    assert {len(array) for array in flat.values()} == {end // 8}
