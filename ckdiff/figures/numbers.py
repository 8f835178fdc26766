"""Numbers as people read them, on a terminal, in files and in notebooks."""

from __future__ import annotations


def percent(part: int, whole: int) -> str:
    """A share: ``36.04 %``. Only nothing is ``0 %``, and only as much is ``100 %``.

    What is more, such as a delta that is larger than its model, is ``104.17 %``, or ``1,204 %``.
    """
    if part == 0 or whole == 0:
        return "0 %"
    if part == whole:
        return "100 %"
    value = 100 * part / whole
    if value < 0.01:
        return f"{value:.2g} %"
    if value >= 1000:
        return f"{value:,.0f} %"
    for digits in range(2, 13):  # as many as it takes to tell it from 100
        text = f"{value:.{digits}f}"
        if float(text) != 100:
            return f"{text} %"
    return "99.999999999999 %" if part < whole else "100.000000000001 %"


def share(value: float | None) -> str:
    """A ratio as a percentage of three digits; of None nothing."""
    return "" if value is None else f"{100 * value:.3g} %"


def counted(count: int, thing: str) -> str:
    """``1 tensor``, ``39 tensors``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def extent(elements: int, tensors: int) -> str:
    """``445,536 elements in 39 tensors``."""
    return f"{counted(elements, 'element')} in {counted(tensors, 'tensor')}"
