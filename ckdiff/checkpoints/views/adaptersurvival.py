"""Did a merge survive? What became of an adapter's changes in a merged model that somebody saved.

Three values of an element are looked at, as stored: the base's, the one that base and adapter make,
and the one in the merged model. All counts are sums over elements, in any order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ckdiff.kernels.memory import Bytes


@dataclass(frozen=True, slots=True)
class Survival:
    """Counts of elements of the tensors that an adapter's matrices change."""

    elements: int = 0
    #: the product of the matrices is not zero there: the adapter wants another value
    asked: int = 0
    #: base and adapter make a value that is not the base's: the change is not lost to rounding
    visible: int = 0
    arrived: int = 0  #: visible, and the merged model has that value
    lost: int = 0  #: visible, and the merged model has the base's value still
    other: int = 0  #: visible, and the merged model has a third value
    extra: int = 0  #: not visible, and the merged model does not have the base's value

    def __add__(self, more: Survival) -> Survival:
        return Survival(
            self.elements + more.elements,
            self.asked + more.asked,
            self.visible + more.visible,
            self.arrived + more.arrived,
            self.lost + more.lost,
            self.other + more.other,
            self.extra + more.extra,
        )

    @property
    def share(self) -> float | None:
        """The share of the visible changes that arrived; None where there are none."""
        return self.arrived / self.visible if self.visible else None

    @property
    def rounded_away(self) -> int:
        """Changes that the adapter asks for, and that the dtype of the weights cannot show."""
        return max(0, self.asked - self.visible)


def survival(base: Bytes, expected: Bytes, found: Bytes, width: int, asked: int = 0) -> Survival:
    """Count elements of ``width`` bytes (1, 2, 4 or 8) by their bits.

    The bytes of the same elements in the base, in base and adapter, and in the merged model; and
    how many of them the adapter asks to change, as ``AdapterReader.asked`` says.
    """
    kind = np.dtype(f"<u{width}")
    before, wanted, after = (data.view(kind) for data in (base, expected, found))
    visible, there, kept = wanted != before, after == wanted, after == before
    arrived, lost = (int(np.count_nonzero(visible & one)) for one in (there, kept))
    seen = int(np.count_nonzero(visible))
    extra = int(np.count_nonzero(~visible & ~kept))
    return Survival(len(before), asked, seen, arrived, lost, seen - arrived - lost, extra)


def survival_of_counts(visible: int, both: int) -> tuple[int, int]:
    """(arrived, visible) of two masks: ``visible`` is the number of elements in which base and
    base + adapter differ, ``both`` how many of those differ as well between base + adapter and the
    merged model. What is equal there has arrived.
    """
    return visible - both, visible
