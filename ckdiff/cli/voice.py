"""How much is said on stderr: ``-q``, ``-v``, ``--log-level`` and ``CKDIFF_LOG``.

Every command has these options, and so has ``ckdiff`` itself. What is chosen on the way (files,
workers, memory) is logged under ``ckdiff`` where it is chosen; here it is only shown.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from ckdiff.cli.options import Choice
from ckdiff.cli.output import say, set_quiet

if TYPE_CHECKING:
    import logging

LEVELS = ("debug", "info", "warning", "error")
VARIABLE = "CKDIFF_LOG"
_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"  # downloads have bars that are not ours
_PLAIN, _FULL = "%(message)s", "%(asctime)s %(levelname)s %(name)s: %(message)s"


class Voice:
    """What was asked for, while the program runs."""

    def __init__(self) -> None:
        self.quiet = self.verbose = False
        self._handler: logging.Handler | None = None
        self._level = 0
        self._bars: str | None = None

    @property
    def logs(self) -> bool:
        """Whether what is logged is shown: then nobody else needs to show it."""
        return self._handler is not None

    def hush(self) -> None:
        """Nothing but data, warnings and errors."""
        if not self.quiet:
            self._bars = os.environ.get(_BARS)
            os.environ[_BARS] = "1"
        self.quiet = True
        set_quiet(True)

    def show(self, level: str, layout: str) -> None:
        """Print what is logged from ``level`` on."""
        import logging

        class Lines(logging.Handler):
            """Prints what is logged."""

            def emit(self, record: logging.LogRecord) -> None:
                say(self.format(record))

        logger = logging.getLogger("ckdiff")
        if self._handler is None:
            self._handler, self._level = Lines(), logger.level
            logger.addHandler(self._handler)
        self._handler.setFormatter(logging.Formatter(layout))
        self._handler.setLevel(level)
        logger.setLevel(level)

    def end(self) -> None:
        """As if nothing had been asked for."""
        if self._handler is not None:
            import logging

            logger = logging.getLogger("ckdiff")
            logger.removeHandler(self._handler)
            logger.setLevel(self._level)
        if self.quiet:
            del os.environ[_BARS]
            if self._bars is not None:
                os.environ[_BARS] = self._bars
        set_quiet(False)
        self.quiet = self.verbose = False
        self._handler = self._bars = None


voice = Voice()


def _quiet(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:  # else a shell only asks for completions
        _not_both(ctx, voice.verbose)
        voice.hush()


def _verbose(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        _not_both(ctx, voice.quiet)
        voice.verbose = True
        if not voice.logs:
            voice.show("DEBUG", _PLAIN)


def _not_both(ctx: click.Context, other: bool) -> None:
    if other:
        raise click.UsageError("--quiet and --verbose cannot be used together", ctx)


def _level(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        voice.show(value.upper(), _FULL)


def options(*, variable: bool = False) -> list[click.Option]:
    """New ``-q``, ``-v`` and ``--log-level``; with ``variable`` the last can be in CKDIFF_LOG."""
    shared: dict[str, Any] = {"expose_value": False}
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            callback=_quiet,
            help="No progress, notes or hints: print only data, warnings and errors.",
            **shared,
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            callback=_verbose,
            help="Also print which files are read, and how many workers and how much memory are "
            "used.",
            **shared,
        ),
        click.Option(
            ["--log-level"],
            type=Choice(LEVELS, case_sensitive=False),
            metavar="LEVEL",
            callback=_level,
            envvar=VARIABLE if variable else None,
            show_envvar=variable,
            help=f"Log from this level on: {', '.join(LEVELS)}.",
            **shared,
        ),
    ]
