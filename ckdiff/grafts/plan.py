"""What a graft blends and what it copies: two checkpoints and a mask, held against each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.dtypes import DTYPES
from ckdiff.errors import PairingError, StoreCorrupt, printable
from ckdiff.layout import Layout, bits_of
from ckdiff.naming import natural_key
from ckdiff.stores.matching import Matched, first_rows, misfit, several
from ckdiff.stores.tally import Tally, recount


class Plan:
    """Which tensors are blended and which copied, and where everything is."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint, matched: Matched) -> None:
        self.base, self.tuned, self.matched = base, tuned, matched
        in_base = {name: i for i, name in enumerate(base.table.names)}
        in_tuned = {name: i for i, name in enumerate(tuned.table.names)}
        shared = [
            name in in_base and self._fits(row, base.table.shapes[in_base[name]])
            for row, name in enumerate(matched.names)
        ]
        #: positions of the blended tensors in the matched store
        self.rows: IntArray = np.flatnonzero(matched.changed[0])
        self._check(in_base, in_tuned, any(shared))
        chosen = [matched.names[i] for i in self.rows]
        #: positions of the blended tensors in the tables of both checkpoints
        self.base_index = np.array([in_base[name] for name in chosen], np.int64)
        self.tuned_index = np.array([in_tuned[name] for name in chosen], np.int64)
        self.all_bits = bits_of(base.table.dtypes)
        counts = base.table.nbytes * 8 // np.maximum(self.all_bits, 1)
        self.elements = int(counts.sum())
        blended = matched.layout.elements[self.rows]
        self.blending = Layout(blended)
        self._lay_out_copied(counts, blended)
        held = {name for name, fits in zip(matched.names, shared, strict=True) if fits}
        #: tensors of the base about which the masks say nothing
        self.unmasked = sorted((n for n in in_base if n not in held), key=natural_key)
        self.left_out = sorted((n for n in in_tuned if n not in in_base), key=natural_key)
        of_tuned = int((blended * self.all_bits[self.base_index] // 8).sum())
        self.bytes_to_read = int(base.table.nbytes.sum()) + of_tuned
        #: tensors with rows that the mask is not of
        self.partly = [
            name
            for name, row, i, j in zip(
                chosen, self.rows.tolist(), self.base_index, self.tuned_index, strict=True
            )
            if {base.table.shapes[i], tuned.table.shapes[j]} != {matched.shapes[row]}
        ]

    def _lay_out_copied(self, counts: IntArray, blended: IntArray) -> None:
        """What is copied: tensors that are not blended, and the rows after those that are."""
        base = self.base
        whole = np.setdiff1d(np.arange(len(base.table)), self.base_index)
        rest = np.flatnonzero(counts[self.base_index] > blended)
        copied = np.concatenate([whole, self.base_index[rest]])
        begins = np.concatenate([np.zeros_like(whole), blended[rest]])
        nbytes = begins * self.all_bits[copied] // 8
        # in the order of their bytes on the disk
        order = np.lexsort((base.offset[copied] + nbytes, base.file_index[copied]))
        self.copied: IntArray = copied[order]  #: positions in the base's table
        self.copied_from: IntArray = nbytes[order]  #: the byte of each from which on it is copied
        self.copying = Layout((counts[copied] - begins)[order])

    def _fits(self, row: int, shape: tuple[int, ...]) -> bool:
        """Whether a mask is that of a tensor of a shape, or of its first rows."""
        wanted = self.matched.shapes[row]
        return shape == wanted or (row in self.matched.resized and first_rows(shape, wanted))

    def notes(self) -> Iterator[str]:
        """What a user should know before the result is taken for more than it is."""
        if self.unmasked:
            yield (
                f"of the base's tensors {len(self.unmasked):,} are not in the mask store and stay "
                f"as they are: {several(self.unmasked)}"
            )
        if self.partly:
            yield (
                f"of {len(self.partly):,} tensors the mask is of the first rows only: the base's "
                f"others stay as they are, the tuned ones are left out: {several(self.partly)}"
            )
        if self.left_out:
            yield (
                f"of the tuned tensors {len(self.left_out):,} are not in the base and are left "
                f"out: {several(self.left_out)}"
            )

    def check_counts(self, found: IntArray) -> None:
        """Hold what was blended against the store's own counts; raises StoreCorrupt."""
        matched = self.matched
        wrong = np.flatnonzero(found[:, 0] != matched.changed[0][self.rows])
        if wrong.size:
            name = printable(matched.names[int(self.rows[wrong[0]])])
            raise StoreCorrupt(
                f"the {matched.rule} mask of {name} in {printable(str(matched.stores[0].path))} "
                "disagrees with its count"
            )

    def check_copied(self) -> None:
        """Hold the masks of tensors that are not blended against their counts, which are zero.

        Raises StoreCorrupt.
        """
        matched = self.matched
        rest = np.flatnonzero(matched.changed[0] == 0)
        said = matched.said().only(rest)
        recount(said, matched.starts[:, rest], [(0, said.layout.total)], Tally(said))

    def _cuts_a_byte(self, row: int, position: int) -> bool:
        """Whether the last element that is blended shares a byte with one that is not."""
        bits = DTYPES[self.base.table.dtypes[position]].bits
        return int(self.matched.layout.elements[row]) * bits % 8 != 0

    def _check(self, in_base: dict[str, int], in_tuned: dict[str, int], shares: bool) -> None:
        """Raise PairingError for a mask with ones that cannot be followed."""
        matched, base, tuned = self.matched, self.base.table, self.tuned.table
        problems = []
        for row in self.rows.tolist():
            name, shape = matched.names[row], matched.shapes[row]
            i, j = in_base.get(name), in_tuned.get(name)
            for side, position, table in (("base", i, base), ("tuned", j, tuned)):
                held = None if position is None else table.shapes[position]
                problem = misfit(side, name, held, shape, resized=row in matched.resized)
                if problem is not None:
                    problems.append(problem)
                    break
            else:
                if i is not None and j is not None and base.dtypes[i] != tuned.dtypes[j]:
                    problems.append(
                        f"{printable(name)} is {base.dtypes[i]} in base and {tuned.dtypes[j]} in "
                        "tuned"
                    )
                elif i is not None and self._cuts_a_byte(row, i):
                    problems.append(f"the rows of {printable(name)} do not end where bytes do")
        if problems:
            more = f"; and {len(problems) - 1:,} more" if len(problems) > 1 else ""
            raise PairingError(
                f"the mask does not fit: {problems[0]}{more}",
                hint="use a mask of this model, or leave those tensors out of it",
            )
        if not shares:
            raise PairingError(
                f"{printable(self.base.label)} and the mask store have no tensor in common",
                hint="use a mask of this model",
            )
