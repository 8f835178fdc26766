"""Signals before the program can answer them properly, and after it has.

Python meets a Ctrl-C during an import, or while it shuts down, with a traceback. Nothing has begun
then, or everything is done: the process can just end. This is imported first and imports next to
nothing, so that hardly anything runs before it.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
_guarded: list[signal.Signals] = []
_code: list[int] = []  # what the finished program exits with


def guard() -> None:
    """Answer signals until the program does; only where this process is the program.

    Elsewhere they belong to whoever imported us. A signal that our caller had us ignore stays so.
    """
    if not _is_program():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)
            _guarded.append(number)
    atexit.register(_ignore)  # the first one: it runs last


def done(code: int) -> None:
    """From now on a signal cuts short nothing but the way out: the exit status is known."""
    _code[:] = [code]


def _is_program() -> bool:
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    name = os.path.basename(getattr(main, "__file__", None) or "") if spec is None else spec.name
    return name in ("ckdiff", "ckdiff.__main__")


def _end(number: int, frame: FrameType | None) -> None:
    if _code:
        os._exit(_code[0])
    try:
        os.write(2, f"ckdiff: error: {_SIGNALS[signal.Signals(number)]}\n".encode())
    finally:  # whether anyone reads it or not
        os._exit(128 + number)


def _ignore() -> None:
    """Python is taken to pieces now, in milliseconds, and no handler of ours runs any more."""
    for number in _guarded:
        signal.signal(number, signal.SIG_IGN)
