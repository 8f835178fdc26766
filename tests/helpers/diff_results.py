"""Results of diffs made by hand: what no pair of files gives yet, or only a large one."""

from __future__ import annotations

from typing import Any

import numpy as np

from ckdiff.diffs.result import DiffResult, unpaired_names
from ckdiff.stores.summaries import rule_counts
from ckdiff.stores.table import MaskTable

#: no character of it may act anywhere
HOSTILE = "a|`b``<script>&\"'*_[x](y)\\|\n\x1b[31m\x00\u202e\ud800]]>@team -->"


def result(
    changed: dict[str, int],
    *,
    elements: int = 10,
    rules: dict[str, dict[str, int]] | None = None,
    unpaired: list[dict[str, Any]] | None = None,
    **more: Any,
) -> DiffResult:
    """Tensors of ``elements`` elements of BF16, of which so many are changed under ``exact``.

    ``rules`` go before ``exact`` and have counts of their own.
    """
    names = list(changed)
    counts = {**(rules or {}), "exact": changed}
    columns = {rule: np.array([c[n] for n in names], np.int64) for rule, c in counts.items()}
    sizes = np.full(len(names), elements, np.int64)
    table = MaskTable(
        names, ["BF16"] * len(names), [(elements,)] * len(names), sizes,
        np.arange(len(names), dtype=np.int64) * 512, columns, [""] * len(names),
        [""] * len(names),
    )  # fmt: skip
    totals = {rule: int(column.sum()) for rule, column in columns.items()}
    details = unpaired or []
    return DiffResult(
        table=table,
        rules=rule_counts(totals, table.total_elements),
        unpaired=unpaired_names(details),
        unpaired_details=details,
        excluded=0,
        exact_only={},
        bytes_read=0,
        bytes_resumed=0,
        bytes_known_equal=0,
        seconds=0.5,
        device="cpu",
        device_why=None,
        **({"base": "base", "tuned": "tuned"} | more),
    )


def lacking(name: str, reason: str = "added", shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    """An unpaired tensor, as the engine describes it."""
    sides = {"added": ["tuned"], "removed": ["base"], "missing": ["base"]}
    detail: dict[str, Any] = {"name": name, "reason": reason}
    for side in sides.get(reason, ["base", "tuned"]):
        detail |= {f"{side}_dtype": "BF16", f"{side}_shape": list(shape)}
    return detail
