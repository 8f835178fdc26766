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

from ckdiff.cli.output import flush, reopen_missing_streams, say
from ckdiff.errors import CkdiffError, Interrupted, printable

ERROR = 2
_PATIENCE = 1.0  # seconds: a wrapper may pass on the Ctrl-C that the terminal sent as well


class _Signals:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt in the main thread, once.

    The engine turns that into Interrupted, and the work directory stays resumable. A second signal
    ends the process at once, which the work directory survives just as it survives kill -9.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # also where a script's background job was started with SIGINT ignored: stopping
                # loses nothing, and whoever sends it means it
                self._previous[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._since > _PATIENCE:
            os._exit(128 + number)


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
        import traceback

        say(traceback.format_exc().rstrip(), prefix="", escape=False)
        return _fail(f"this is a bug in ckdiff: {type(error).__name__}: {error}")
    return code


def _report(error: CkdiffError) -> int:
    if isinstance(error, Interrupted) and _signals.received == signal.SIGTERM:
        error = Interrupted("stopped by SIGTERM", hint=error.hint, exit_code=143)
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
