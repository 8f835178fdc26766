"""The one place where failures become a line and an exit code, and signals a clean stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

from ckdiff.cli import starting
from ckdiff.cli.output import flush, reopen_missing_streams, say
from ckdiff.errors import CkdiffError, Interrupted, lacking, printable

ERROR = 2
_TICK = 0.005  # seconds between looks at whether an exception may be raised
_PATIENCE = 1.0  # seconds: a wrapper may pass on the Ctrl-C that the terminal sent as well


class _Signals:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread, once.

    The engine turns that into Interrupted, and the work directory stays resumable. A second signal
    ends the process at once, which the work directory survives just as it survives kill -9.

    In some places the exception waits until the main thread has left them: in an import, where it
    would leave Python's import lock taken, for which other threads then wait forever; in the
    compiler, which would free some of its memory twice; in a finalizer, where it goes nowhere.
    Python prints those that go nowhere: not this one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}
        self._hook: Any = None

    def __enter__(self) -> _Signals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # also where a script's background job was started with SIGINT ignored: stopping
                # loses nothing, and whoever sends it means it
                self._previous[number] = signal.signal(number, self._stop)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        return self

    def __exit__(self, *exception: object) -> None:
        if signal.SIGALRM in self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if self._previous:
            sys.unraisablehook = self._hook
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            self._raise(number, frame)
        elif time.monotonic() - self._since > _PATIENCE:
            os._exit(128 + number)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if not _is_delicate(frame):
            raise KeyboardInterrupt
        if signal.SIGALRM not in self._previous:
            self._previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._raise)
        signal.setitimer(signal.ITIMER_REAL, _TICK)

    def _unraisable(self, what: Any) -> None:
        if self.received is None or what.exc_type is not KeyboardInterrupt:
            self._hook(what)


def _is_delicate(frame: FrameType | None) -> bool:
    """Whether a signal came, below :func:`run`, into code that an exception there would harm."""
    while frame is not None and frame.f_code is not run.__code__:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "__del__":
            return True
        if str(frame.f_globals.get("__name__")).startswith(("numba.", "llvmlite.")):
            return True
        frame = frame.f_back
    return False


_signals = _Signals()


def raise_if_stopped() -> None:
    """Raise KeyboardInterrupt if a signal came and its exception was lost.

    Python drops an exception that a handler raises while a finalizer happens to run.
    """
    if _signals.received is not None:
        raise KeyboardInterrupt


def run(action: Callable[[], int]) -> int:
    """What the process exits with; failures of every kind are reported here and only here."""
    reopen_missing_streams()
    try:
        with _signals:
            code = action()
        flush()
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _usage(error)
    except CkdiffError as error:
        return _report(error)
    except (KeyboardInterrupt, click.Abort):
        return _report(Interrupted("interrupted"))
    except BrokenPipeError:  # --help | head -1
        flush()
        return 0
    except MemoryError:
        return _fail("out of memory (lower --memory or --workers, or free some)")
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        return _fail(reason if error.filename is None else f"{error.filename}: {reason}")
    except Exception as error:
        if _signals.received is not None:  # a library made something else of the interruption
            return _report(Interrupted("interrupted"))
        return _unforeseen(error)
    return code


def _unforeseen(error: Exception) -> int:
    """What is missing here, or a bug, with its traceback."""
    if sys.platform != "linux":
        return _fail(f"ckdiff runs on Linux, and this is {sys.platform} (use WSL 2 or a container)")
    missing = lacking(error) if isinstance(error, ModuleNotFoundError) else None
    if missing is not None:
        return _report(missing)
    import traceback

    say(traceback.format_exc().rstrip(), prefix="", escape=False)
    return _fail(f"this is a bug in ckdiff: {type(error).__name__}: {error}")


def _report(error: CkdiffError) -> int:
    if isinstance(error, Interrupted) and _signals.received == signal.SIGTERM:
        error = Interrupted("stopped by SIGTERM", hint=error.hint, exit_code=143)
    starting.done(error.exit_code)  # a second Ctrl-C must not say the same again
    _fail(error.one_line())
    return error.exit_code


def _usage(error: click.ClickException) -> int:
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if context is not None:
        message = f"{message.removesuffix('.')} (see {context.command_path} --help)"
    return _fail(message)


def _fail(message: str) -> int:
    say(f"error: {printable(message)}")
    sys.stderr.flush()
    return ERROR
