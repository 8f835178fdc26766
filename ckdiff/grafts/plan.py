"""What a graft blends and what it copies: two checkpoints and a mask, held against each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckdiff.checkpoints.pairing import names_hint
from ckdiff.checkpoints.protocol import Checkpoint, IntArray
from ckdiff.dtypes import DTYPES
from ckdiff.errors import PairingError, StoreCorrupt, printable
from ckdiff.grafts.blending import Kinds, can_take
from ckdiff.grafts.fused import fused_of
from ckdiff.layout import Layout, bits_of
from ckdiff.naming import natural_key
from ckdiff.stores.matching import Matched, first_rows, misfit, several
from ckdiff.stores.ofvalues import refuse_values
from ckdiff.stores.seeing import Seen, seen_by
from ckdiff.stores.tally import Tally, recount


class Plan:
    """Which tensors are blended and which copied, and where everything is."""

    def __init__(
        self, files: Checkpoint, tuned: Checkpoint, matched: Matched, *, unfuse: bool = True
    ) -> None:
        """``files`` is a base that says what its files are; both as they are stored. Without
        ``unfuse`` fused tensors are not looked into.
        """
        refuse_values(matched, files.table, tuned.table)
        self.files, self.matched = files, matched  #: the base as it is stored
        seen, other = Seen(files, {}), Seen(tuned, {})
        if unfuse:
            seen = seen_by(matched, files, tuned.table, whole=True)
            other = seen_by(matched, tuned, files.table)
        self.base, self.tuned = seen.checkpoint, other.checkpoint  #: by the store's names
        base, tuned = self.base, self.tuned
        #: what each tensor is called by the store, and its shape: of fused ones their parts
        self._shape_of = dict(zip(base.table.names, base.table.shapes, strict=True))
        for position, parts in seen.woven.items():
            del self._shape_of[base.table.names[position]]
            self._shape_of |= {part.name: part.shape for part in parts}
        #: of the matched store's tensors those that fit the base's
        self._held = {
            name
            for row, name in enumerate(matched.names)
            if name in self._shape_of and self._fits(row, self._shape_of[name])
        }
        problems: list[str] = []
        #: fused tensors that are blended as they lie in the base's files
        self.fused = fused_of(matched, (base.table, tuned.table), seen.woven, problems)
        self._choose(problems)
        self._lay_out()

    def _choose(self, problems: list[str]) -> None:
        """Find the tensors that are blended. Raises PairingError."""
        base, tuned = self.base.table, self.tuned.table
        in_base, in_tuned = ({n: i for i, n in enumerate(side.names)} for side in (base, tuned))
        woven = [row for rows in self.fused.rows for row in rows]
        #: positions of the blended tensors in the matched store, but for fused ones
        self.rows: IntArray = np.setdiff1d(
            np.flatnonzero(self.matched.changed[0]), np.array(woven, np.int64)
        )
        if not problems:
            self._check(in_base, in_tuned, problems)
        self._raise(problems, shares=bool(self._held))
        chosen = [self.matched.names[i] for i in self.rows]
        #: positions of these in the tables of both checkpoints
        self.base_index = np.array([in_base[name] for name in chosen], np.int64)
        self.tuned_index = np.array([in_tuned[name] for name in chosen], np.int64)
        columns = list(zip(self.rows.tolist(), self.base_index, self.tuned_index, strict=True))
        #: the dtypes of base and tuned of each
        self.kinds = [(base.dtypes[i], tuned.dtypes[j]) for _, i, j in columns]
        #: tensors with rows that the mask is not of
        self.partly = [
            self.matched.names[row]
            for row, i, j in columns
            if {base.shapes[i], tuned.shapes[j]} != {self.matched.shapes[row]}
        ]
        #: tensors of the base about which the masks say nothing
        self.unmasked = sorted(self._shape_of.keys() - self._held, key=natural_key)
        self.left_out = sorted(in_tuned.keys() - self._shape_of.keys(), key=natural_key)

    def _lay_out(self) -> None:
        table = self.base.table
        self.all_bits = bits_of(table.dtypes)
        self.tuned_bits = bits_of([kind for _, kind in self.kinds])
        counts = table.nbytes * 8 // np.maximum(self.all_bits, 1)
        self.elements = int(counts.sum())
        blended = self.matched.layout.elements[self.rows]
        self.blending, self.weaving = Layout(blended), Layout(counts[self.fused.index])
        self._lay_out_copied(counts, blended)
        of_tuned = int((blended * self.tuned_bits // 8).sum()) + self.fused.bytes_read
        self.bytes_to_read = int(table.nbytes.sum()) + of_tuned

    def _lay_out_copied(self, counts: IntArray, blended: IntArray) -> None:
        """What is copied: tensors that are not blended, and the rows after those that are."""
        base = self.base
        blended_too = np.concatenate([self.base_index, self.fused.index])
        whole = np.setdiff1d(np.arange(len(base.table)), blended_too)
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
                "tensors of the base that are not in the mask store stay as they are "
                f"({len(self.unmasked):,}): {several(self.unmasked)}"
            )
        if self.partly:
            yield (
                f"the mask has only the first rows of {len(self.partly):,} tensors: the base's "
                f"others stay as they are, the tuned ones are left out: {several(self.partly)}"
            )
        retyped = sum(one != other for one, other in self.every_kind)
        if retyped:
            yield (
                f"{retyped:,} tensor{'s have' if retyped > 1 else ' has'} another dtype in tuned: "
                "their values are converted to the base's, rounded to the nearest if necessary"
            )
        if self.left_out:
            yield (
                f"tuned tensors that are not in the base are left out ({len(self.left_out):,}): "
                f"{several(self.left_out)}"
            )

    def check_counts(self, found: IntArray) -> None:
        """Hold what was blended against the store's own counts; raises StoreCorrupt."""
        matched = self.matched
        groups = [[row] for row in self.rows.tolist()] + self.fused.rows
        said = np.array([int(matched.changed[0][rows].sum()) for rows in groups], np.int64)
        wrong = np.flatnonzero(found[:, 0] != said)
        if wrong.size:
            name = printable(matched.names[groups[int(wrong[0])][0]])
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

    def _check(
        self, in_base: dict[str, int], in_tuned: dict[str, int], problems: list[str]
    ) -> None:
        """Say of each mask with ones why it cannot be followed."""
        matched, base, tuned = self.matched, self.base.table, self.tuned.table
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
                if (
                    i is not None
                    and j is not None
                    and not can_take((base.dtypes[i], tuned.dtypes[j]))
                ):
                    problems.append(
                        f"{printable(name)} is {base.dtypes[i]} in base and {tuned.dtypes[j]} in "
                        "tuned"
                    )
                elif i is not None and self._cuts_a_byte(row, i):
                    problems.append(f"the rows of {printable(name)} do not end where bytes do")

    def _raise(self, problems: list[str], *, shares: bool) -> None:
        """Raise PairingError for masks that cannot be followed, or of another model."""
        if problems:
            more = f"; and {len(problems) - 1:,} more" if len(problems) > 1 else ""
            raise PairingError(
                f"the mask does not fit: {problems[0]}{more}",
                hint=names_hint(self.base.table.names, self.tuned.table.names)
                or "use a mask of this model, or leave those tensors out of it",
            )
        if not shares:
            raise PairingError(
                f"{printable(self.base.label)} and the mask store have no tensor in common",
                hint="use a mask of this model",
            )

    @property
    def every_kind(self) -> list[Kinds]:
        """The dtypes of both sides of all that is blended: of ``rows``, then of fused tensors."""
        return self.kinds + self.fused.kinds
