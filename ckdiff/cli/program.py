"""The program: its list of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import click

from ckdiff._version import __version__
from ckdiff.cli import exits, starting, voice
from ckdiff.cli.output import say

#: command -> the line that ``ckdiff --help`` shows; the command lives in the module of its name
COMMANDS = {
    "diff": "Compare two checkpoints, element by element.",
    "show": "Tables of what changed, from a mask store.",
    "overlap": "How much runs agree, and whether that is more than chance.",
    "timeline": "When the weights of a run moved, checkpoint by checkpoint.",
    "structure": "Where in its matrices an update is: rows, columns, blocks.",
    "report": "One HTML file that shows all of it, to pass on.",
    "spectrum": "Ranks and norms of what an update added to each matrix.",
    "combine": "Set algebra: a mask store from several others.",
    "random": "A random mask with as many changed elements as a store.",
    "principal": "A mask of a checkpoint's principal weights, or of its smallest.",
    "delta": "Everything needed to rebuild the tuned checkpoint from the base.",
    "apply": "Rebuild a checkpoint from a base and deltas.",
    "convert-delta": "A delta in another encoding.",
    "squash": "Several weight versions as one.",
    "graft": "The base, with the tuned elements wherever a mask has ones.",
    "convert": "Any checkpoint as sharded safetensors, in another dtype if asked for.",
    "export": "Masks in a format that other tools read.",
    "import": "A mask store from masks made elsewhere.",
    "info": "What a file or directory is, and what it holds.",
    "check": "Verify every byte of a mask store, a delta or a stream.",
    "clean": "Remove what stopped runs left behind.",
}


# Our threads share the cores already; BLAS, where it is needed, must not start its own: on a busy
# machine its threads wait for each other, and a decomposition takes several times as long.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


class Program(click.Group):
    """A group that imports a command when it is used, and ends every failure in one place."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"ckdiff.cli.{cmd_name.replace('-', '_')}")
        command = cast(click.Command, module.command)
        if not any("--quiet" in parameter.opts for parameter in command.params):
            command.params += voice.options()
        return command

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
            super().main(args, "ckdiff", complete_var, standalone_mode=True, **extra)

        def run() -> int:
            arguments = list(sys.argv[1:] if args is None else args)
            with self.make_context("ckdiff", arguments, **extra) as ctx:
                return int(self.invoke(ctx) or 0)

        try:
            code = exits.run(run)
            if voice.voice.verbose:
                took = time.monotonic() - began
                say(f"took {took:.2f} s, of which {time.process_time():.2f} s on processors")
        finally:
            voice.voice.end()
        starting.done(code)
        raise SystemExit(code)


@click.group(
    cls=Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Data goes to stdout, everything else to stderr. Exit status: 0 done, 1 a difference "
    "(where asked for), 2 an error, 130 interrupted.",
)
@click.version_option(__version__, "-V", "--version", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Which weights differ between two checkpoints: exactly, in bounded memory, at the speed of
    the disk.

    Begin with `ckdiff diff BASE TUNED`; `ckdiff COMMAND --help` and docs/cli.md say more.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


main.params += voice.options(variable=True)
