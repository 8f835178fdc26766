"""Masks of the values that quantised tensors stand for, where the stored elements are to be moved.

A code means nothing without its scale: one that is taken over beside another scale is another
number, and nobody would notice.
"""

from __future__ import annotations

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.quantised import quantised
from ckdiff.errors import PairingError, printable
from ckdiff.kernels.scaling import QUANTISED
from ckdiff.stores.matching import Matched

_HINT = "make the store again without --dequantize, of these two checkpoints"


def refuse_values(matched: Matched, *sides: TensorTable) -> None:
    """Raise PairingError for masks by which no stored elements can be taken over: those of a store
    that was made with ``--dequantize``; and where another was made of such, or of a model that was
    not quantised, those of tensors that ``sides``, as they are stored, have quantised.
    """
    for store in matched.stores:
        selection = store.manifest.get("selection", {})
        if isinstance(selection, dict) and selection.get("dequantize"):
            raise PairingError(
                f"{printable(str(store.path))} was made with --dequantize: its mask is of decoded "
                "values, not of the stored codes",
                hint=_HINT,
            )
    codes = [_codes(side) for side in sides]
    columns = zip(matched.names, matched.dtypes, matched.changed[0].tolist(), strict=True)
    for name, dtype, changed in columns:
        coded = [name in found for found in codes]
        if not changed or not any(coded):
            continue
        if dtype not in (*QUANTISED, "U8"):
            raise PairingError(
                f"the mask of {printable(name)} is of {dtype} values, but the files hold codes",
                hint=_HINT,
            )
        if not all(coded):
            raise PairingError(
                f"{printable(name)} is quantised on one side only: the other side has no such "
                "codes",
                hint="give two checkpoints that are both quantised, or neither",
            )


def _codes(table: TensorTable) -> set[str]:
    """The names of quantised tensors, as they are stored and by value."""
    found = quantised(table)
    stored = {table.names[how.elements] for how in found.scaled.values()}
    return stored | {found.table.names[at] for at in found.scaled}
