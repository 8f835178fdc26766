"""The table of tensors of a finished diff."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ckdiff.diffs.comparison import Comparison
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import hashing
from ckdiff.rules import RuleSet
from ckdiff.stores.collecting import Collected
from ckdiff.stores.table import MaskTable, hash_of_rows

#: dtypes that quantised weights are stored in: small ones, or words that several are packed into
_PACKING = {name for name, dtype in DTYPES.items() if dtype.bits <= 8 and name != "BOOL"} | {"I32"}


def table_of(collected: Collected, comparison: Comparison, rules: RuleSet) -> MaskTable:
    """The table of a finished diff."""
    columns = {rule: collected.changed[:, i] for i, rule in enumerate(rules.order)}
    hashes = [
        hashing.finish_all(collected.hashes[:, 2 * i : 2 * i + 2], side.nbytes)
        for i, side in enumerate(comparison.sides)
    ]
    for i, rows in comparison.pairing.resized.items():
        for of_side, count in zip(hashes, rows, strict=True):
            of_side[i] = hash_of_rows(of_side[i], min(rows), count)
    for i, text in comparison.known_by().items():
        hashes[0][i] = hashes[1][i] = text
    numeric = np.array([DTYPES[name].numeric for name in comparison.kinds], bool)
    return MaskTable(
        comparison.pairing.names,
        comparison.dtypes,
        comparison.shapes,
        comparison.layout.elements,
        comparison.layout.starts,
        {str(rule): columns[rule] for rule in rules.reported},
        base_hashes=hashes[0],
        tuned_hashes=hashes[1],
        statistics=collected.statistics(numeric),
        tuned_dtypes=comparison.sides[1].dtypes,
        resized=comparison.pairing.resized,
    )


def rounding_hint(comparison: Comparison, table: MaskTable, rules: RuleSet) -> str | None:
    """What to ask where a side is of a narrower float dtype, and nothing was asked in it."""
    narrow = {
        name
        for side in comparison.sides
        for i in comparison.pairing.retyped
        if (name := side.dtypes[i]) in ("BF16", "F16") and table.changed["exact"][i]
    }
    if len(narrow) != 1 or any("@" in str(rule) for rule in rules.reported):
        return None
    rule = f"exact@{narrow.pop().lower()}"
    return f"--rule {rule} counts what differs once both sides are rounded to it"


def quantised_notes(comparison: Comparison, table: MaskTable) -> list[str]:
    """What to say where values of quantised tensors would say something else than their bits."""
    if not any(map(_PACKING.__contains__, {*comparison.dtypes, *comparison.sides[1].dtypes})):
        return []
    from ckdiff.checkpoints.views.quantisedhint import notes

    tuned = replace(comparison.tuned.table, names=comparison.tuned_names)
    return notes(comparison.pairing, comparison.base.table, tuned, table.changed["exact"].tolist())
