"""What is told of running work inside a notebook: one line with a bar, which is updated.

Only where a kernel of IPython runs. IPython is never imported for that: where nobody has imported
it there is no notebook.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from ckdiff.budget import format_size
from ckdiff.errors import printable

_EVERY = 0.2  # seconds between two updates
_NOTES = 5  # of notes the last ones stay

#: shows a bundle of MIME types, and gives what replaces it by another one
Show = Callable[[dict[str, str]], Callable[[dict[str, str]], None]]


class Line:
    """How far a piece of work is, in one output of a cell."""

    def __init__(self, show: Show, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._show = show
        self._clock = clock
        self._replace: Callable[[dict[str, str]], None] | None = None
        self._said = clock()
        self._last = ""  # the words that are shown
        self._bar = ""
        self._notes: list[str] = []
        self._silent = False

    def progress(self, done: int, total: int, seconds: float, resumed: int) -> None:
        """``done`` of ``total`` bytes, of which ``resumed`` were done by an earlier run."""
        now, finished = self._clock(), done >= total
        if not finished and now - self._said < _EVERY:
            return
        self._said = now
        words = _finished(total, seconds, resumed) if finished else _words(done, total, seconds)
        if words == self._last:
            return
        self._last = words
        self._bar = "" if finished else f'<progress value="{done}" max="{total}"></progress> '
        self._draw()

    def note(self, message: str) -> None:
        """A warning or a hint, below the line."""
        self._notes = [*self._notes, message][-_NOTES:]
        self._draw()

    def _draw(self) -> None:
        import html  # nobody else needs it to start

        lines = [self._last, *map(printable, self._notes)]
        first, *notes = [html.escape(line) for line in lines]
        below = "".join(f'<div style="opacity: 0.8">{note}</div>' for note in notes)
        bundle = {
            "text/plain": "\n".join(filter(None, lines)),
            "text/html": f"<div>{self._bar}{first}</div>{below}",
        }
        if self._silent:
            return
        try:
            if self._replace is None:
                self._replace = self._show(bundle)
            else:
                self._replace(bundle)
        except Exception:  # a browser that went away must not end the work
            self._silent = True


def line() -> Line | None:
    """A line in the cell that runs; None where there is none: no kernel, or another thread."""
    module = sys.modules.get("IPython")
    if module is None or threading.current_thread() is not threading.main_thread():
        return None
    try:
        shell = module.get_ipython()
    except Exception:  # half imported, or something else by that name
        return None
    return None if getattr(shell, "kernel", None) is None else Line(_show)


def _show(bundle: dict[str, str]) -> Callable[[dict[str, str]], None]:
    from IPython.display import display

    handle: Any = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]

    def replace(new: dict[str, str]) -> None:
        handle.update(new, raw=True)

    return replace


def _words(done: int, total: int, seconds: float) -> str:
    return f"{format_size(done)} of {format_size(total)}, {seconds:.0f} s"


def _finished(total: int, seconds: float, resumed: int) -> str:
    fresh = total - resumed
    known = f", {format_size(resumed)} of it by an earlier run" if resumed else ""
    speed = f", {format_size(fresh / seconds)}/s" if seconds >= 0.05 and fresh > 0 else ""
    return f"done: {format_size(total)} in {seconds:.1f} s{known}{speed}"
