"""What is exported: tensors with their bits in the wanted polarity, a piece at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ckdiff._version import __version__
from ckdiff.errors import StoreCorrupt, printable
from ckdiff.kernels.memory import Bytes
from ckdiff.layout import Layout
from ckdiff.rules import Rule
from ckdiff.stores.maskstore import MaskStore
from ckdiff.stores.maskwalk import walk
from ckdiff.stores.matching import match
from ckdiff.stores.table import IntArray

FORMAT = "ckdiff-masks"  #: ``format`` in the metadata of everything exported
CHANGED, FROZEN = "1 = changed", "1 = frozen"
_PIECE = 1 << 20  # elements


class Piece(NamedTuple):
    """Neighbouring elements of one tensor."""

    tensor: int  #: its position
    first: int  #: element inside the tensor, a multiple of 512
    elements: int
    packed: Bytes  #: little-endian bits, those past the end zero

    def flags(self) -> Bytes:
        """One byte for each element, 0 or 1."""
        return np.unpackbits(self.packed, count=self.elements, bitorder="little")


class Masks:
    """The masks of one rule of a store, with ones where something changed, or where nothing did."""

    def __init__(self, store: MaskStore, rule: str | Rule | None, *, invert: bool) -> None:
        matched = match([store], rule, least=1)
        self._matched = matched
        self._store = store
        self._invert = invert
        self.rule = matched.rule
        self.polarity = FROZEN if invert else CHANGED
        self.names = matched.names  #: in natural order
        self.dtypes = matched.dtypes
        self.shapes = matched.shapes
        #: rows of base and tuned where only those were compared that both have, by position
        self.resized = matched.resized
        self.elements: IntArray = matched.layout.elements
        changed = matched.changed[0]
        if (changed < 0).any() or (changed > self.elements).any():
            raise StoreCorrupt(
                f"{printable(str(store.path))} counts more changed elements than it has"
            )
        self.ones: IntArray = self.elements - changed if invert else changed

    def metadata(self, encoding: str, chosen: IntArray) -> dict[str, str]:
        """What a file says about the masks in it: nothing in it depends on when or where."""
        manifest = self._store.manifest
        data = {
            "format": FORMAT,
            "encoding": encoding,
            "polarity": self.polarity,
            "rule": self.rule,
            "store": self._store.manifest_digest(),
            "ckdiff_version": __version__,
        }
        for side in ("base", "tuned"):
            identity = manifest.get(side)
            if isinstance(identity, dict):
                data[side] = str(identity.get("label", ""))
        if "made_by" in manifest:
            data["made_by"] = compact(manifest["made_by"])
        rows = {self.names[i]: self.resized[i] for i in chosen.tolist() if i in self.resized}
        if rows:
            data["resized"] = compact(rows)
        tensors = {self.names[i]: [self.dtypes[i], self.shapes[i]] for i in chosen.tolist()}
        return data | {"tensors": compact(tensors)}

    def counts(self, chosen: IntArray) -> dict[str, int]:
        """How many tensors, elements and ones those at the positions ``chosen`` are."""
        return {
            "tensors": len(chosen),
            "elements": int(self.elements[chosen].sum()),
            "ones": int(self.ones[chosen].sum()),
        }

    def pieces(self, chosen: IntArray) -> Iterator[Piece]:
        """The bits of the tensors at the positions ``chosen``, which ascend, in order.

        Every count is held against the table at the end: raises StoreCorrupt.
        """
        layout = Layout(self.elements[chosen])
        starts = self._matched.starts[:, chosen]
        counted = np.zeros(len(chosen), np.int64)
        for window in walk(layout, starts, self._matched.sources(), 0, layout.total):
            spans = window.spans
            columns = (spans.tensors, spans.starts, spans.elements, window.places[0])
            for row, first, elements, place in zip(*(c.tolist() for c in columns), strict=True):
                for low in range(0, elements, _PIECE):
                    count = min(_PIECE, elements - low)
                    at = place + low // 8
                    held = window.memory[at : at + -(-count // 8)].copy()
                    packed = self._packed(held, count, int(chosen[row]))
                    counted[row] += int(np.bitwise_count(packed).sum(dtype=np.int64))
                    yield Piece(int(chosen[row]), first + low, count, packed)
        wrong = np.flatnonzero(counted != self.ones[chosen])
        if wrong.size:
            raise self._damaged(int(chosen[wrong[0]]), "disagrees with its count")

    def by_tensor(self, chosen: IntArray) -> Iterator[tuple[int, Iterator[Piece]]]:
        """Each tensor's position and pieces; one without elements has none.

        The pieces must be taken before the next tensor is asked for.
        """
        groups = groupby(self.pieces(chosen), key=lambda piece: piece.tensor)
        for position in chosen.tolist():
            yield (position, iter(())) if self.elements[position] == 0 else next(groups)
        for _ in groups:  # the end of the pieces is where counts are compared
            pass

    def _packed(self, packed: Bytes, elements: int, position: int) -> Bytes:
        rest = elements % 8
        if rest and packed[-1] >> rest:
            raise self._damaged(position, "has padding bits that are set")
        if self._invert:
            packed = ~packed
            if rest:
                packed[-1] &= (1 << rest) - 1
        return packed

    def _damaged(self, position: int, what: str) -> StoreCorrupt:
        name, path = printable(self.names[position]), printable(str(self._store.path))
        return StoreCorrupt(f"the {self.rule} mask of {name} in {path} {what}")


def compact(data: Any) -> str:
    """JSON on one line, everything as it is."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def text_label(label: str) -> str:
    """A label with escapes for what is no text: files can be called anything."""
    return label.encode("utf-8", "backslashreplace").decode()


def encoded(text: str) -> bytes:
    """UTF-8; raises StoreCorrupt for names that are no text."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise StoreCorrupt("the store has a name that is not valid text") from None


def everything(masks: Masks) -> IntArray:
    """The positions of all tensors."""
    return np.arange(len(masks.names), dtype=np.int64)
