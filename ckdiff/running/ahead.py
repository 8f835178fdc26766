"""Windows that are asked of a source before they are needed, so that nobody waits for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TypeVar

from ckdiff.running.threads import Stopped

W = TypeVar("W")

AHEAD = 3  #: windows asked of the source before they are needed


def looked_ahead(
    windows: Iterator[W], prefetch: Callable[[W], None], stop: threading.Event
) -> Iterator[W]:
    """The windows in order; ``prefetch`` is called with each AHEAD windows before its turn.

    Raises Stopped once ``stop`` is set.
    """
    ahead = deque(islice(windows, AHEAD))
    for window in ahead:
        prefetch(window)
    while ahead:
        window = ahead.popleft()
        if stop.is_set():
            raise Stopped
        coming = next(windows, None)
        if coming is not None:
            ahead.append(coming)
            prefetch(coming)
        yield window
