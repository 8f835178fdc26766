"""The program: its list of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, cast

import click

from ckdiff._version import __version__
from ckdiff.cli import exits, starting, voice
from ckdiff.cli.output import say
from ckdiff.errors import CkdiffError, nearest

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: command -> the line that ``ckdiff --help`` shows; the command lives in the module of its name
COMMANDS = {
    "diff": "Compare two checkpoints, element by element.",
    "show": "Tables of what changed, from a mask store.",
    "overlap": "How much runs agree, and whether it is more than chance.",
    "timeline": "When the weights of a run changed, checkpoint by checkpoint.",
    "structure": "Which rows, columns and blocks of the matrices changed.",
    "report": "One HTML file with maps, curves and tables, to share.",
    "spectrum": "Rank and norm of the update of each matrix.",
    "combine": "Intersection, union, difference of masks.",
    "random": "Make a random mask of the same size as a store's.",
    "principal": "A mask of a checkpoint's principal or smallest weights.",
    "delta": "Write what is needed to rebuild TUNED from BASE.",
    "apply": "Rebuild a checkpoint from a base and deltas.",
    "convert-delta": "Write a delta in another encoding.",
    "squash": "Merge several weight versions into one.",
    "graft": "Write BASE with the tuned elements where a mask has ones.",
    "convert": "Write any checkpoint as safetensors, also in another dtype.",
    "export": "Write masks in a format that other tools read.",
    "import": "Make a mask store from masks of other tools.",
    "info": "What a file or directory is, and what it holds.",
    "check": "Verify every byte of a mask store, a delta or a stream.",
    "clean": "Remove what stopped runs left behind.",
}


# Our threads share the cores already; BLAS, where it is needed, must not start its own: on a busy
# machine its threads wait for each other, and a decomposition takes several times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Program(click.Group):
    """A group that imports a command when it is used, and ends every failure in one place."""

    _completes = False  #: whether a shell asks what it can complete

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ckdiff.cli.{cmd_name.replace('-', '_')}")
        command = cast(click.Command, module.command)
        if self._completes:
            from ckdiff.cli.completing import complete

            complete(command)
        if not any("--quiet" in parameter.opts for parameter in command.params):
            command.params += [*voice.options(), _version(command)]
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands, none of which is imported for it, and options."""
        from click.shell_completion import CompletionItem

        names = [name for name in COMMANDS if name.startswith(incomplete)]
        found = [CompletionItem(name, help=COMMANDS[name]) for name in names]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was named; raises UsageError, which says which was meant."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            near = nearest(name, COMMANDS)
            meant = "" if near is None else f"; did you mean {near}?"
            raise click.UsageError(f"No such command {name!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run and exit; the only way out, whatever happens."""
        began = time.monotonic()
        if "_CKDIFF_COMPLETE" in os.environ:  # a shell asks for completions
            self._completes = True
            super().main(args, "ckdiff", complete_var, standalone_mode=True, **extra)

        def run() -> int:
            arguments = list(sys.argv[1:] if args is None else args)
            try:
                with self.make_context("ckdiff", arguments, **extra) as ctx:
                    return int(self.invoke(ctx) or 0)
            except CkdiffError as error:
                _say_which_path(error, arguments)
                raise

        try:
            code = exits.run(run)
            if voice.voice.verbose:
                took = time.monotonic() - began
                say(f"took {took:.2f} s, of which {time.process_time():.2f} s on processors")
        finally:
            voice.voice.end()
        starting.done(code)
        raise SystemExit(code)


def _version(command: click.Command) -> click.Option:
    """``-V`` after the name of a command; ``--version`` too, where it means nothing else there."""

    def show(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"ckdiff {__version__}")
            ctx.exit()

    taken = any("--version" in parameter.opts for parameter in command.params)
    names = ["-V"] if taken else ["-V", "--version"]
    return click.Option(
        [*names, "ckdiff_version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        hidden=True,
        help="print the version",
        callback=show,
    )


#: what errors say of a path that is not there
_ABSENT = re.compile("does not exist|there is no|No such file|no directory")


def _say_which_path(error: CkdiffError, arguments: Sequence[str]) -> None:
    """Where an error is about a path that is not there, its hint becomes one that is like it."""
    if "did you mean" in (error.hint or "") or _ABSENT.search(error.message) is None:
        return
    for argument in arguments:
        path = argument.partition("=")[2] if argument.startswith("--") else argument
        named = re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])", error.message)
        if not path or not named or "://" in path or os.path.lexists(path):
            continue
        from ckdiff.checkpoints.explaining import alike_path
        from ckdiff.checkpoints.folders import called

        near = alike_path(path)
        if near is not None:
            error.hint = f"did you mean {called(near)}?"
            return


@click.group(
    cls=Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Data goes to stdout, everything else to stderr. Exit status: 0 done, 1 a gate "
    "failed, 2 an error, 130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Find out which weights differ between two checkpoints: exactly, in bounded memory, at the
    speed of the disk.

    Begin with `ckdiff diff BASE TUNED`. `ckdiff COMMAND --help` explains a command; docs/cli.md has
    all details.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


main.params += voice.options(variable=True)
