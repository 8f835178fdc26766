"""Progress on stderr: a bar on a terminal, a plain line every 30 s in a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ckdiff.budget import format_size
from ckdiff.cli.exits import raise_if_stopped
from ckdiff.cli.formats import duration, rate
from ckdiff.cli.output import remark, say
from ckdiff.cli.voice import voice

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from ckdiff.options import Observer

_EVERY = 30.0  # seconds between the lines of a log
_PATIENCE = 0.4  # seconds that are over before a bar would help
_FIELDS = {"amount": "", "speed": "cyan", "left": "dim"}  # beside the bar, with their styles
_WARM_UP = 0.5  # seconds without which a speed means little


class Reporter:
    """Says how far a piece of work is. Use as a context manager."""

    def __init__(self, verb: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb = verb  #: what was done to the bytes: ``compared``
        self._clock = clock
        self._began = self._said = clock()
        self._terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: Bar | None = None
        self._silent = voice.quiet
        self._said_below = _Lines()

    def __enter__(self) -> Reporter:
        # on a terminal downloads have bars of their own
        self._listens = not self._terminal and not voice.logs
        if self._listens:
            logger = logging.getLogger("ckdiff")
            logger.addHandler(self._said_below)
            self._level, level = logger.level, logger.getEffectiveLevel()
            logger.setLevel(min(level, logging.INFO))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._listens:
            logger = logging.getLogger("ckdiff")
            logger.removeHandler(self._said_below)
            logger.setLevel(self._level)
        if self._bar is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()
            self._bar = None

    def observer(self, wording: Callable[[str], str] = str) -> Observer:
        """What a diff reports to; ``wording`` is how a note of it is put."""
        from ckdiff.options import Observer

        return Observer(
            progress=lambda p: self.update(p.done, p.total, p.resumed, p.seconds),
            note=lambda message: self.note(wording(message)),
        )

    def note(self, message: str) -> None:
        """A warning or a hint, on a line of its own."""
        with self._drawing():
            if self._bar is not None:
                self._bar.stop()
                self._bar = None
        remark(message)

    def update(self, done: int, total: int, resumed: int = 0, seconds: float | None = None) -> None:
        """``done`` of ``total`` bytes, of which ``resumed`` were done by an earlier run."""
        raise_if_stopped()
        now = self._clock()
        seconds = now - self._began if seconds is None else seconds
        if self._silent or now - self._began < _PATIENCE:
            return
        if self._terminal:
            with self._drawing():
                self._draw(done, total, describe(done, total, resumed, seconds))
        elif now - self._said >= _EVERY and done < total:
            self._said = now
            share = 100 * done // total
            amount, speed, left = describe(done, total, resumed, seconds)
            say(f"{self._verb} {amount} ({share} %), {speed}{', ' if left else ''}{left}")

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """A terminal that went away must not end the work."""
        try:
            yield
        except OSError:
            self._silent = True
            self._bar = None

    def _draw(self, done: int, total: int, texts: tuple[str, str, str]) -> None:
        fields: dict[str, Any] = dict(zip(_FIELDS, texts, strict=True))
        if self._bar is None:
            self._bar = _make_bar()
            self._bar.add_task(self._verb, total=max(total, 1), **fields)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, refresh=True, **fields)


class _Lines(logging.Handler):
    """Hands on what modules say while there is nobody yet to report to."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            say(record.getMessage())
        elif record.levelno >= logging.INFO:
            remark(record.getMessage())


def _make_bar() -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=sys.stderr, markup=False, emoji=False, highlight=False)
    texts = [
        TextColumn(f"{{task.fields[{field}]}}", style=style or "none", markup=False)
        for field, style in _FIELDS.items()
    ]
    # no refreshing thread and no redirected streams: every byte is written from our own calls
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        *texts,
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )


def describe(done: int, total: int, resumed: int, seconds: float) -> tuple[str, str, str]:
    """(how much, how fast, how long it will take); the last is empty while nobody can know."""
    fresh = done - resumed
    left = ""
    if fresh > 0 and seconds >= _WARM_UP:
        left = f"{duration((total - done) * seconds / fresh)} left"
    return f"{format_size(done)} of {format_size(total)}", rate(fresh, seconds), left


@contextlib.contextmanager
def compilation_noted(reporter: Reporter) -> Iterator[None]:
    """Say once that kernels are being compiled, if they are: it takes seconds, without progress.

    Where it will be so each time, because what lies in the cache cannot be trusted, say that.
    """
    from ckdiff.kernels.compiled import on_compile
    from ckdiff.kernels.keeping import on_refusal

    def note(kernel: str) -> None:
        raise_if_stopped()  # while a kernel is compiled nothing can be raised
        if not told:
            told.append(kernel)
            reporter.note("compiling kernels (first run only)")

    def refused(message: str) -> None:
        told.append(message)
        reporter.note(message)

    told: list[str] = []
    on_compile.append(note)
    on_refusal.append(refused)
    try:
        yield
    finally:
        on_compile.remove(note)
        on_refusal.remove(refused)
