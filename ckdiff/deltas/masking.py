"""A delta of what a mask marks, and of nothing else."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.deltas.blueprint import Blueprint
from ckdiff.deltas.form import FRAME_BYTES
from ckdiff.errors import PairingError, StoreCorrupt, printable
from ckdiff.kernels.blending import Blend
from ckdiff.layout import bits_of
from ckdiff.rules import Rule
from ckdiff.running.threads import PerThread
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.matching import Matched, first_rows, match, misfit
from ckdiff.stores.ofvalues import refuse_values

Bytes = npt.NDArray[np.uint8]


class Masking:
    """Puts the base's elements into tuned windows wherever a mask has no one. For all threads."""

    def __init__(
        self,
        mask: str | os.PathLike[str] | MaskStore,
        rule: str | Rule | None,
        base: TensorTable,
        blueprint: Blueprint | TensorTable,
        shapes: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """``shapes`` are those that masks have to have, where they are not the blueprint's: of
        tensors with more rows than the base has they are those of the base's rows.
        """
        shapes = blueprint.shapes if shapes is None else shapes
        self.store = open_store(mask)
        self.inputs = [self.store.path]
        matched = match([self.store], rule, least=1)
        tuned = blueprint.names, blueprint.dtypes, blueprint.shapes, blueprint.nbytes
        refuse_values(matched, base, TensorTable(*tuned))
        self.rule = matched.rule
        self._digest = self.store.manifest_digest()
        wanted = dict(zip(blueprint.names, shapes, strict=True))
        self._check(matched, base, wanted)
        held = dict(zip(matched.names, matched.shapes, strict=True))
        #: None without a mask; one of another shape has no ones, as was checked
        self._names = [
            name if held.get(name) == tuple(shape) else None
            for name, shape in zip(blueprint.names, shapes, strict=True)
        ]
        self._bits = bits_of(blueprint.dtypes)
        self._blends = {bits: Blend(bits) for bits in set(self._bits.tolist())}
        self._buffer = PerThread(lambda: np.empty(FRAME_BYTES, np.uint8))
        self._lock = threading.Lock()
        self._ones = np.zeros(len(blueprint.names), np.int64)  # of each tensor, as they were met
        self._merged = np.zeros(len(blueprint.names), np.bool_)

    def to_dict(self, left_out: int) -> dict[str, Any]:
        """What a delta says about it."""
        return {"mask": self._digest, "rule": self.rule, "left_out": left_out}

    def merge(self, tensor: int, base: Bytes, tuned: Bytes, start: int) -> tuple[Bytes, int]:
        """See Merger."""
        bits = int(self._bits[tensor])
        first, elements = start * 8 // bits, len(base) * 8 // bits
        name = self._names[tensor]
        if name is None:
            mask = np.zeros(-(-elements // 8), np.uint8)
        else:
            mask = self.store.packed(name, self.rule, start=first, stop=first + elements)
        merged, blend = self._buffer()[: len(base)], self._blends[bits]
        _, left_out = blend(base, tuned, ~mask, merged, elements)
        ones, _ = blend(base, tuned, mask, merged, elements)
        with self._lock:
            self._ones[tensor] += ones
            self._merged[tensor] = True
        return merged, left_out

    def check(self) -> None:
        """Hold the ones of all tensors that were merged against the store's counts.

        Raises StoreCorrupt.
        """
        changed = self.store.table.changed[self.rule]
        for tensor in np.flatnonzero(self._merged).tolist():
            name = self._names[tensor]
            if name is None or self._ones[tensor] == changed[self.store.table.find(name)]:
                continue
            raise StoreCorrupt(
                f"the {self.rule} mask of {printable(name)} in {printable(str(self.store.path))} "
                "disagrees with its count",
                hint="ckdiff did not write it like this: make the store again",
            )

    def _check(
        self, matched: Matched, base: TensorTable, wanted: dict[str, tuple[int, ...]]
    ) -> None:
        """Raise PairingError for a mask with ones that cannot be followed."""
        held = dict(zip(base.names, base.shapes, strict=True))
        for name, count, shape in zip(
            matched.names, matched.changed[0].tolist(), matched.shapes, strict=True
        ):
            if not count:
                continue
            found = held.get(name)
            # of a base with more rows the mask may be of the first ones
            first = found is not None and name in wanted and first_rows(found, wanted[name])
            problem = misfit("base", name, wanted[name] if first else found, shape)
            problem = problem or misfit("tuned", name, wanted.get(name), shape)
            if problem is not None:
                raise PairingError(
                    f"the mask does not fit: {problem}",
                    hint="use a mask of this model, or leave those tensors out of it",
                )
