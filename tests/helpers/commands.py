"""The commands that the command line has, and their options, as click knows them."""

from __future__ import annotations

import click

from ckdiff.cli import main


def command_names() -> list[str]:
    return main.list_commands(click.Context(main))


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def option_names(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in (*parameter.opts, *parameter.secondary_opts)
    }
