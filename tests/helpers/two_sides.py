"""Mask stores of tensors whose sides differ in dtype or rows, made without a diff.

Counts, masks and hashes come from the definitions: what both sides are is told by fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import naive
import numpy as np
import numpy.typing as npt
from support import write_safetensors

import ckdiff
from ckdiff.layout import Layout
from ckdiff.naming import natural_key
from ckdiff.stores.maskcodec import MaskEncoder
from ckdiff.stores.objects import INNER, OBJECT, ObjectWriter, object_key
from ckdiff.stores.table import MaskTable, hash_of_rows
from ckdiff.stores.writer import write_tables

Side = tuple[str, tuple[int, ...], bytes]  #: dtype, shape, content


@dataclass(frozen=True)
class Pair:
    """A tensor of both sides."""

    base: Side
    tuned: Side

    @property
    def shape(self) -> tuple[int, ...]:
        """What is compared of it."""
        one, other = self.base[1], self.tuned[1]
        return one if one == other else (min(one[0], other[0]), *one[1:])

    def compared(self) -> list[bytes]:
        """The bytes of both sides that are compared."""
        count = int(np.prod(self.shape))
        return [data[: count * naive.FORMATS[dtype].bits // 8] for dtype, _, data in self.sides]

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.base, self.tuned

    def changed(self) -> npt.NDArray[np.bool_]:
        """Which elements differ: in their bits, or where dtypes differ in their values."""
        kinds = [side[0] for side in self.sides]
        both = [
            naive.elements(kind, data) for kind, data in zip(kinds, self.compared(), strict=True)
        ]
        if kinds[0] != kinds[1]:  # tests have neither NaN nor negative zeros there
            both = [
                [naive.value(kind, bits) for bits in side]
                for kind, side in zip(kinds, both, strict=True)
            ]
        flags = [a != b for a, b in zip(*both, strict=True)]
        return np.array(flags, bool).reshape(self.shape)

    def hashes(self) -> list[str]:
        """As a store records them."""
        return [
            hash_of_rows(naive.content_hash(dtype, data), self.shape[0], shape[0])
            if shape
            else naive.content_hash(dtype, data)
            for (dtype, shape, _), data in zip(self.sides, self.compared(), strict=True)
        ]


def numbers(dtype: str, values: npt.NDArray[Any]) -> bytes:
    """Numbers as a float dtype stores them, toward zero."""
    single = np.asarray(values, np.float32)
    if dtype == "BF16":
        return (single.view(np.uint32) >> 16).astype("<u2").tobytes()
    return single.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()


def two_sided(
    out: Path,
    pairs: Mapping[str, Pair],
    *,
    unpaired: Sequence[dict[str, Any]] = (),
    tied: Sequence[dict[str, Any]] = (),
    origin: Mapping[str, str] | None = None,
) -> ckdiff.MaskStore:
    """The store of a diff of these tensors under ``exact``, and checkpoints of both sides.

    It was run with ``--common-rows``; ``origin`` is what is said of the base's.
    """
    names = sorted(pairs, key=natural_key)
    chosen = [pairs[name] for name in names]
    flags = [pair.changed() for pair in chosen]
    layout = Layout(np.array([flag.size for flag in flags], np.int64))
    hashes = [pair.hashes() for pair in chosen]
    rows = [[side[1][0] if side[1] else 0 for side in pair.sides] for pair in chosen]
    table = MaskTable(
        names,
        [pair.base[0] for pair in chosen],
        [pair.shape for pair in chosen],
        layout.elements,
        layout.starts,
        {"exact": np.array([int(flag.sum()) for flag in flags], np.int64)},
        [base for base, _ in hashes],
        [tuned for _, tuned in hashes],
        tuned_dtypes=[pair.tuned[0] for pair in chosen],
        resized={i: (a, b) for i, (a, b) in enumerate(rows) if a != b},
    )
    files = {}
    for side, at in (("base", 0), ("tuned", 1)):
        content = {name: pair.sides[at] for name, pair in zip(names, chosen, strict=True)}
        path = out.with_suffix(".checkpoints") / side / "model.safetensors"
        write_safetensors(path, content)
        files[side] = [{"name": path.name, "size": path.stat().st_size}]
    manifest = write_tables(
        out,
        table,
        layout,
        masks=["exact"],
        rules=["exact"],
        objects=_objects(out, layout, flags),
        provenance={
            "base": {"label": "base", **(origin or {}), "files": files["base"]},
            "tuned": {"label": "tuned", "files": files["tuned"]},
            "unpaired": [*unpaired],
            "selection": {"include": [], "exclude": [], "rename": [], "common_rows": True},
        },
        tied=tied,
    )
    (out / "manifest.json").write_bytes(manifest)
    return ckdiff.open_store(out)


def _objects(
    out: Path, layout: Layout, flags: Sequence[npt.NDArray[np.bool_]]
) -> dict[str, tuple[int, str]]:
    bits = np.zeros(-(-layout.total // 8 // INNER) * INNER, np.uint8)
    for start, flag in zip(layout.starts.tolist(), flags, strict=True):
        packed = np.packbits(flag.reshape(-1), bitorder="little")
        bits[start // 8 : start // 8 + len(packed)] = packed
    assert len(bits) <= OBJECT
    if not len(bits):
        return {}
    writer = ObjectWriter(out / object_key("exact", 0))
    encoder = MaskEncoder()
    writer.add([encoder.encode(bits[at : at + INNER]) for at in range(0, len(bits), INNER)])
    return {object_key("exact", 0): writer.finish()}


def some_pairs(seed: int) -> dict[str, Pair]:
    """One of each kind: alike, of two dtypes, longer on either side, and both at once."""
    rng = np.random.default_rng(seed)

    def pair(
        dtypes: tuple[str, str], shapes: tuple[tuple[int, ...], tuple[int, ...]], share: float
    ) -> Pair:
        most = max(int(np.prod(shape)) for shape in shapes)
        base = np.exp2(rng.integers(-6, 6, most)) * rng.choice([-1, 1], most)
        tuned = np.where(rng.random(most) < share, base * 1.5, base)
        sides = [
            (dtype, shape, numbers(dtype, values[: int(np.prod(shape))]))
            for dtype, shape, values in zip(dtypes, shapes, (base, tuned), strict=True)
        ]
        return Pair(sides[0], sides[1])

    same = (40, 7), (40, 7)
    return {
        "alike": pair(("BF16", "BF16"), same, 0.1),
        "embed": pair(("BF16", "BF16"), ((20, 30), (24, 30)), 0.2),
        "layers.0.w": pair(("BF16", "F32"), same, 0.3),
        "layers.1.w": pair(("F32", "BF16"), same, 0),
        "lm_head": pair(("F16", "F32"), ((24, 30), (20, 30)), 0.1),
        "padded": pair(("BF16", "BF16"), ((24, 30), (20, 30)), 0),
    }


#: what a diff of them may have left out
UNPAIRED: list[dict[str, Any]] = [
    {"name": "gone", "reason": "missing"},
    {"name": "half", "reason": "missing", "base_dtype": "BF16", "base_shape": [3]},
    {"name": "head", "reason": "added", "tuned_dtype": "BF16", "tuned_shape": [40, 7]},
]
TIED = [{"name": "head", "same_as": "alike", "side": "tuned"}]
