"""A checkpoint by value: quantised tensors as the floats that they stand for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from math import log2
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from ckdiff.checkpoints.formats.strictjson import any_value, skip_blank
from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.checkpoints.views.blockscalereader import SCRATCH, ScaledReader, wanted
from ckdiff.checkpoints.views.blockscaleturned import Turning
from ckdiff.checkpoints.views.quantised import Quantised, quantised
from ckdiff.checkpoints.views.quantisedgrid import Declared
from ckdiff.checkpoints.views.wrapping import View
from ckdiff.dtypes import DTYPES
from ckdiff.errors import printable
from ckdiff.layout import bits_of

_CONFIG = "config.json"
_DOUBLED = 2  # times, at most
_CONFIG_LIMIT = (1 << 20) - 1  # bytes of a configuration that are looked at


def dequantised(inner: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """``inner`` by value, which owns it, and what is to be said of it, one line each.

    Quantised tensors are F32, float32(element) * float32(scale), and their scales are gone. What is
    quantised in a way that is not known stays as it is stored, and a note says so. Where nothing is
    quantised it is ``inner`` itself.
    """
    found = quantised(inner.table, declared_beside(inner))
    notes = [f"{printable(inner.label)}: {note}" for note in found.notes]
    return (ScaledView(inner, found) if found.scaled else inner), notes


class ScaledView(View):
    """What ``found`` says of ``inner``."""

    def __init__(self, inner: Checkpoint, found: Quantised) -> None:
        super().__init__(inner, found.table)
        self.within, self.scaled = found.within, found.scaled
        self._made = np.array([*found.scaled], np.int64)
        self._turned = any(how.turned for how in found.scaled.values())

    @cached_property
    def file_index(self) -> npt.NDArray[np.int32]:
        """See Checkpoint. What is computed is in no file."""
        found = self.inner.file_index[self.within]
        found[self._made] = -1
        return found

    @cached_property
    def offset(self) -> IntArray:
        """See Checkpoint."""
        found = self.inner.offset[self.within]
        found[self._made] = -1
        return found

    @property
    def borders(self) -> Mapping[int, IntArray]:
        """See Checkpoint: those of what it shows as it is."""
        inner = self.inner.borders
        places = {at: inner.get(source) for at, source in enumerate(self.within.tolist())}
        return {at: b for at, b in places.items() if b is not None and at not in self.scaled}

    @property
    def longer(self) -> int:
        """See Checkpoint."""
        elements = int((self.table.nbytes * 8 // bits_of(self.table.dtypes)).sum())
        times = 2 * elements / max(1, int(self.inner.table.nbytes.sum()))
        return min(max(0, round(log2(max(times, 1)))), _DOUBLED)

    def reader(self) -> ScaledReader:
        """See Checkpoint."""
        aside = self.inner.reader() if self._turned else None
        return ScaledReader(self.within, self.scaled, self.inner.reader(), aside)

    def reader_memory(self, window: int) -> int:
        """See Checkpoint: values, scratch, and what the inner reader takes for all that is asked.

        A value needs at most a scale besides its element.
        """
        asked = window
        for how in self.scaled.values():
            if how.scaling is not None and not how.turned:
                bits = DTYPES[how.scaling.dtype].bits + DTYPES[how.scaling.scale_dtype].bits
                asked = max(asked, window * bits // 32)
        turned = self._turned * (self.inner.reader_memory(asked) + Turning.memory(window))
        return self.inner.reader_memory(asked) + turned + window + SCRATCH

    def share(self, spool: int, connections: int) -> None:
        """See Checkpoint. Turned tensors are read by a reader of their own."""
        self.inner.share(spool // 2 if self._turned else spool, connections)

    def read_ahead(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See Checkpoint."""
        asked = wanted(self.within, self.scaled, (tensors, starts, nbytes))
        self.inner.read_ahead(*asked.columns)

    def _way(self) -> str:
        digest = xxhash.xxh3_128(self.within.tobytes())
        for item in self.scaled.items():
            digest.update(repr(item).encode())
        return f"values {digest.hexdigest()}"


def declared_beside(checkpoint: Checkpoint) -> Declared:
    """What ``config.json`` beside weights on this machine says of their quantisation.

    Nothing where there is none, or none that can be read: shapes and names say the rest.
    """
    config = _config_beside(checkpoint)
    found = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(found, dict):
        return Declared()
    blocks = [found.get("weight_block_size")]
    groups = found.get("config_groups")
    for group in [*groups.values()] if isinstance(groups, dict) else []:
        weights = group.get("weights") if isinstance(group, dict) else None
        blocks.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    known = {block for block in map(_block, blocks) if block is not None}
    fp4 = found.get("quant_method") == "fp8" and found.get("expert_dtype") == "fp4"
    return Declared(known.pop() if len(known) == 1 else None, fp4)


def _block(given: Any) -> tuple[int, int] | None:
    if isinstance(given, str):
        given = [int(n) if n.isascii() and n.isdigit() and len(n) < 10 else 0
                 for n in given.split("x")]  # fmt: skip
    if not isinstance(given, list) or len(given) != 2:
        return None
    down, across = given
    if not all(type(n) is int and 1 <= n < 1 << 31 for n in (down, across)):
        return None
    return down, across


def _config_beside(checkpoint: Checkpoint) -> Any:
    directory = checkpoint.directory
    if directory is None and checkpoint.open_files:
        directory = os.path.dirname(checkpoint.open_files[0].path)
    path = os.path.join(directory or "", _CONFIG)
    if directory is None or not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            raw = file.read(_CONFIG_LIMIT + 1)
        if len(raw) > _CONFIG_LIMIT:
            return None
        return any_value(raw, skip_blank(raw, 0), whole_numbers=True)[0]
    except (OSError, ValueError):
        return None
