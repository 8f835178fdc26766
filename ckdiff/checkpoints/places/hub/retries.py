"""Trying again: how often, and how long to wait in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

ATTEMPTS = 5  #: in a row without any progress, before it is given up
_FIRST, _LONGEST = 0.5, 8.0  # seconds
_ASKED_LONGEST = 60.0  # seconds that a server may ask us to wait

#: statuses that another try may change
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504, *range(520, 525)})


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


@dataclass(slots=True)
class Backoff:
    """Counts failures in a row and waits longer after each."""

    attempts: int = ATTEMPTS
    wait: Callable[[float], None] | None = None  #: instead of sleeping; may raise to give up
    _failed: int = 0

    def again(self, asked: float | None = None) -> bool:
        """Note a failure: wait and give True, or False where it is time to give up.

        ``asked`` is how many seconds the server asked us to wait.
        """
        self._failed += 1
        if self._failed >= self.attempts:
            return False
        seconds = min(_FIRST * 2 ** (self._failed - 1), _LONGEST)
        if asked is not None:
            seconds = min(max(seconds, asked), _ASKED_LONGEST)
        (self.wait or _sleep)(seconds)
        return True

    def progress(self) -> None:
        """Something arrived: what failed before does not count any more."""
        self._failed = 0
