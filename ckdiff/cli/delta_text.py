"""What deltas are, in words: shared by the commands that make, apply and describe them.

Whoever prints the lines makes them printable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckdiff.budget import format_size
from ckdiff.cli import formats


def changes(
    changed: int, elements: int, tensors: int, unpaired: Mapping[str, Sequence[str]]
) -> str:
    """How much changed, and which tensors have no counterpart."""
    others = ", ".join(f"{len(names):,} {reason}" for reason, names in unpaired.items() if names)
    text = f"{formats.extent(elements, tensors)}: {changed:,} changed"
    text += f", {formats.percent(changed, elements)}"
    return text + (f"; tensors: {others}" if others else "")


_SHOWN = 3  # tensors that are named of many


def odd_lines(
    resized: Sequence[Mapping[str, Any]], parts: Sequence[Mapping[str, str]]
) -> list[str]:
    """Which tensors are not made from all of the tensor of their name."""
    said = [
        f"{item['name']} {item['base'][0]:,} -> {item['tuned'][0]:,}" for item in resized[:_SHOWN]
    ]
    within = [f"{item['name']} from {item['base']}" for item in parts[:_SHOWN]]
    lines = []
    for what, shown, count in (
        ("of other rows than in the base", said, len(resized)),
        ("made from a tensor of another name in the base, or from part of one", within, len(parts)),
    ):
        if count:
            more = f" and {count - _SHOWN:,} more" if count > _SHOWN else ""
            tensors = "1 tensor is" if count == 1 else f"{count:,} tensors are"
            lines.append(f"{tensors} {what}: {', '.join(shown)}{more}")
    return lines


def sizes(size: int, rebuilt: int) -> str:
    """The size of a delta, and its share of what it rebuilds."""
    return f"{format_size(size)}, {formats.percent(size, rebuilt)} of {format_size(rebuilt)}"


def lossy_line(lossy: Mapping[str, Any]) -> str:
    """What a delta leaves out."""
    return (
        f"lossy: {lossy['left_out']:,} changed elements are left out, which the "
        f"{lossy['rule']} mask does not mark"
    )
