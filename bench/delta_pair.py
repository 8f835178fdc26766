"""Two bf16 checkpoints that differ the way training makes them, and the entropy of what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from common import Tensor, header, write_index

SLICE = 1 << 21  # elements drawn, or counted, at a time
KINDS = ("steps", "rl")

Bits = npt.NDArray[np.uint16]


def shapes(gib: float) -> list[Tensor]:
    """Tensors of a small llama, ``gib`` GiB together; what no layer fits into is the embedding."""
    elements = round(gib * 2**29)
    wide = 2048 if gib >= 0.25 else 256
    layer = [
        ("self_attn.q_proj", (wide, wide)),
        ("self_attn.k_proj", (wide // 4, wide)),
        ("self_attn.v_proj", (wide // 4, wide)),
        ("self_attn.o_proj", (wide, wide)),
        ("mlp.gate_proj", (4 * wide, wide)),
        ("mlp.up_proj", (4 * wide, wide)),
        ("mlp.down_proj", (wide, 4 * wide)),
        ("input_layernorm", (wide,)),
        ("post_attention_layernorm", (wide,)),
    ]
    layers, rest = divmod(elements, sum(int(np.prod(shape)) for _, shape in layer))
    if not layers:
        raise SystemExit("--gib is too small for a layer: 0.002 at least")
    embedding: list[Tensor] = [("model.embed_tokens.weight", "BF16", (rest // wide, wide))]
    return embedding + [
        (f"model.layers.{i}.{name}.weight", "BF16", shape)
        for i in range(layers)
        for name, shape in layer
    ]


def bf16(values: npt.NDArray[np.float32]) -> Bits:
    """Rounded to the nearest bfloat16, ties to even, as bits."""
    word = values.view(np.uint32)
    return ((word + 0x7FFF + ((word >> 16) & 1)) >> 16).astype(np.uint16)


def ordered(bits: Bits) -> Bits:
    """Bits as integers in the order of the values, so that the next number is one more."""
    return np.where(bits & 0x8000, ~bits, bits | 0x8000)


def unordered(order: Bits) -> Bits:
    return np.where(order & 0x8000, order & 0x7FFF, ~order)


def steps(base: Bits, density: float, draw: np.random.Generator) -> Bits:
    """Changes anywhere: half of them one step, half 1 + geometric(1/2), either way."""
    at = np.flatnonzero(draw.random(len(base), dtype=np.float32) < density)
    step = np.where(draw.random(len(at)) < 0.5, 1, 1 + draw.geometric(0.5, len(at)))
    step = np.where(draw.random(len(at)) < 0.5, -step, step)
    tuned = base.copy()
    tuned[at] = unordered((ordered(base[at]) + step).astype(np.uint16))
    return tuned


def update_size(density: float) -> float:
    """Deviation of the update that changes ``density`` of the weights once both are rounded."""
    draw = np.random.default_rng(0)
    weights, update = draw.standard_normal((2, 1 << 19), dtype=np.float32)
    weights *= np.float32(0.02)
    low, high = 0.0, 0.02
    for _ in range(30):
        middle = (low + high) / 2
        moved = bf16(weights) != bf16(weights + np.float32(middle) * update)
        low, high = (middle, high) if moved.mean() < density else (low, middle)
    return low


@dataclass(frozen=True)
class Recipe:
    """How one pair is drawn; every slice of every tensor has a generator of its own."""

    kind: str
    density: float
    update: float  #: deviation of the update, of kind "rl"

    def draw(self, tensor: int, start: int, count: int) -> tuple[Bits, Bits]:
        """(base, tuned) of ``count`` elements of a tensor."""
        draw = np.random.default_rng([tensor, start])
        weights = draw.standard_normal(count, dtype=np.float32) * np.float32(0.02)
        base = bf16(weights)
        if self.kind == "steps":
            return base, steps(base, self.density, draw)
        weights += np.float32(self.update) * draw.standard_normal(count, dtype=np.float32)
        return base, bf16(weights)


def write_pair(root: Path, gib: float, density: float, kind: str, threads: int) -> None:
    """root/base and root/tuned: two shards and an index each. No slice repeats another."""
    recipe = Recipe(kind, density, update_size(density) if kind == "rl" else 0.0)
    tensors = shapes(gib)
    half = sum(int(np.prod(shape)) for _, _, shape in tensors) // 2
    shards: list[list[tuple[int, Tensor]]] = [[], []]
    before = 0
    for number, tensor in enumerate(tensors):
        shards[before >= half].append((number, tensor))
        before += int(np.prod(tensor[2]))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for side in ("base", "tuned"):
        (root / side).mkdir(parents=True)
        listed = [[tensor for _, tensor in shard] for shard in shards]
        write_index(root / side, dict(zip(names, listed, strict=True)))
    with ThreadPoolExecutor(threads) as pool:
        for name, shard in zip(names, shards, strict=True):
            head = header([tensor for _, tensor in shard])[0]
            with (
                open(root / "base" / name, "wb") as base,
                open(root / "tuned" / name, "wb") as tuned,
            ):
                base.write(head)
                tuned.write(head)
                for number, (_, _, shape) in shard:
                    size = int(np.prod(shape))
                    starts = range(0, size, SLICE)
                    counts = [min(SLICE, size - start) for start in starts]
                    for a, b in pool.map(recipe.draw, [number] * len(starts), starts, counts):
                        base.write(a.data)
                        tuned.write(b.data)


def slices(base: Path, tuned: Path) -> Iterator[tuple[Bits, Bits]]:
    """The elements of two files of one layout, in slices."""
    with open(base, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    left, right = (np.memmap(path, np.uint16, "r", offset=start) for path in (base, tuned))
    for at in range(0, len(left), SLICE):
        yield left[at : at + SLICE], right[at : at + SLICE]


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Bits to tell which of the classes each of ``counts.sum()`` things is in, together."""
    counts = counts[counts > 0]
    total = counts.sum()
    return float((counts * np.log2(total / counts)).sum()) if total else 0.0


@dataclass(frozen=True)
class Floor:
    """What the changes of a pair take at least; sizes in bytes."""

    elements: int
    changed: int
    one_step: float  #: share of the changes that are one representable step
    positions: float
    positions_given: float  #: where the base's binade is known
    steps: float
    steps_given: float

    @property
    def plain(self) -> float:
        return self.positions + self.steps

    @property
    def given(self) -> float:
        return self.positions_given + self.steps_given


def floor(base: Path, tuned: Path) -> Floor:
    """Empirical entropy of which elements changed and by how many steps.

    An element is taken as drawn by itself, first from one distribution, then from one for each
    binade (sign apart) of the base's value, which whoever applies a delta knows.
    """
    elements = np.zeros(256, np.int64)
    moves = np.zeros(256 << 16, np.int64)  # by binade and step modulo 2**16
    for path in sorted(base.glob("*.safetensors")):
        for a, b in slices(path, tuned / path.name):
            elements += np.bincount((a >> 7) & 255, minlength=256)
            at = np.flatnonzero(a != b)
            step = ordered(b[at]) - ordered(a[at])
            keys, counts = np.unique(
                (((a[at] >> 7) & 255).astype(np.uint32) << 16) | step, return_counts=True
            )
            moves[keys] += counts
    table = moves.reshape(256, -1)
    changed = table.sum(axis=1)
    by_step = table.sum(axis=0)
    total, all_changed = int(elements.sum()), int(changed.sum())
    pairs = np.stack([changed, elements - changed], axis=1)
    return Floor(
        elements=total,
        changed=all_changed,
        one_step=float(by_step[1] + by_step[-1]) / max(1, all_changed),
        positions=entropy(pairs.sum(axis=0)) / 8,
        positions_given=sum(entropy(pair) for pair in pairs) / 8,
        steps=entropy(by_step) / 8,
        steps_given=sum(entropy(row) for row in table) / 8,
    )


def tensors_of(folder: Path) -> dict[str, tuple[Path, int, int, str]]:
    """Name -> (file, first byte, last byte, dtype and shape) of every tensor of a checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(8)
            entries = json.loads(file.read(start - 8))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            what = f"{entry['dtype']} {entry['shape']}"
            found[name] = path, start + first, start + last, what
    return found


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same names, dtypes, shapes and bits, in whatever files."""
    left, right = tensors_of(a), tensors_of(b)
    if left.keys() != right.keys():
        return False
    for name, (path, first, last, what) in left.items():
        other, start, end, kind = right[name]
        if what != kind or last - first != end - start:
            return False
        with open(path, "rb") as one, open(other, "rb") as two:
            one.seek(first)
            two.seek(start)
            while first < last:
                size = min(1 << 22, last - first)
                if one.read(size) != two.read(size):
                    return False
                first += size
    return True
