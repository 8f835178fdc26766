"""Mask stores with chosen bits, made without checkpoints: for tests that need large ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

import ckdiff
from ckdiff.layout import Layout, Spans
from ckdiff.naming import natural_key
from ckdiff.stores.building import Bytes, Derived, Maker, OnBytes, Target
from ckdiff.stores.table import IntArray


class FirstBits(Maker):
    """Sets the first bits of each tensor."""

    total = 1

    def __init__(self, changed: list[int], *, padding: bool = False) -> None:
        self._changed = changed
        self._padding = padding

    def make(
        self, first: int, spans: Spans, mask: Bytes, changed: IntArray, done: OnBytes
    ) -> Iterator[int]:
        """See Maker."""
        columns = (spans.tensors, spans.starts, spans.elements, spans.addresses)
        for row, (tensor, start, elements, address) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True)
        ):
            count = min(max(self._changed[tensor] - start, 0), elements)
            at = (address - first) // 8
            mask[at : at + count // 8] = 255
            mask[at + count // 8] |= (1 << count % 8) - 1 if count % 8 else 0
            changed[row] = count
            if self._padding:
                mask[at + elements // 8] |= 1 << elements % 8
        yield 0


def first_bits(
    out: Path,
    tensors: Mapping[str, tuple[int, int]],
    *,
    rule: str = "exact",
    padding: bool = False,
) -> ckdiff.MaskStore:
    """A store of one-dimensional tensors: name -> (elements, how many of the first are changed)."""
    tensors = {name: tensors[name] for name in sorted(tensors, key=natural_key)}
    elements = [n for n, _ in tensors.values()]
    derived = Derived(
        list(tensors),
        ["BF16"] * len(tensors),
        [(n,) for n in elements],
        Layout(np.array(elements, np.int64)),
        [f"{i:032x}" for i in range(len(tensors))],
        rule,
        {"operation": "test"},
    )
    target = Target(out, overwrite=False, workers=1, observer=None)
    return target.write(derived, FirstBits([k for _, k in tensors.values()], padding=padding))


def tree(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its path in it."""
    return {
        str(Path(folder, name).relative_to(store)): Path(folder, name).read_bytes()
        for folder, _, names in os.walk(store)
        for name in names
    }


def fails_after(chunks: int, maker: type[Maker], error: BaseException) -> Callable[..., object]:
    """A replacement of ``maker.make`` that fails when so many chunks have been made."""
    make, made = maker.make, []

    def failing(self: Maker, *arguments: object) -> Iterator[int]:
        if len(made) >= chunks:
            raise error
        yield from make(self, *arguments)  # type: ignore[arg-type]
        made.append(1)

    return failing
