"""What a shell completes: for each kind of argument, told by what ``--help`` calls it.

Asked for by the shell through click, once for each press of a key: nothing heavy is imported, and
what is looked at is one directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem

from ckdiff.naming import OPERATIONS

Finder = Callable[[str], list[CompletionItem]]

_LOOKED_AT = 2000  #: entries of a directory
_PLAIN = re.compile(r"[\w@%+./,~-]+")  #: what no shell takes for anything but text
_RULES = ("exact", "atol=1e-5", "rtol=1e-3", "ulp=1")
_ROUNDED = ("bf16", "f16", "f32")
_SIZES = ("256MiB", "512MiB", "1GiB", "2GiB", "4GiB", "8GiB")
_COLUMNS = ("name", "group", "dtype", "shape", "elements", "changed", "density")


def files(incomplete: str) -> list[CompletionItem]:
    """Any path: the shell does it best."""
    return [CompletionItem(incomplete, type="file")]


def folders(incomplete: str) -> list[CompletionItem]:
    """Directories, as the shell knows them."""
    return [CompletionItem(incomplete, type="dir")]


def stores(incomplete: str) -> list[CompletionItem]:
    """Mask stores, then directories that may hold some; where there is no store, any path."""
    begun = incomplete.rpartition("/")[2]
    before = incomplete[: len(incomplete) - len(begun)]
    found, others = list[str](), list[str]()
    try:
        with os.scandir(os.path.expanduser(before) or ".") as entries:
            for entry, _ in zip(entries, range(_LOOKED_AT), strict=False):
                name = entry.name
                if not name.startswith(begun) or not entry.is_dir() or not _PLAIN.fullmatch(name):
                    continue
                if _is_store(entry.path):
                    found.append(before + name)
                elif begun or not name.startswith("."):
                    others.append(f"{before}{name}/")
    except OSError:
        pass
    if not found:
        return files(incomplete)
    return [CompletionItem(path) for path in (*sorted(found), *sorted(others))]


def _is_store(path: str) -> bool:
    """Whether a directory looks like a mask store, without opening it."""
    return all(os.path.lexists(os.path.join(path, name)) for name in ("manifest.json", "masks"))


def rules(incomplete: str) -> list[CompletionItem]:
    """Rules with usual values; after an ``@`` what both sides can be rounded to."""
    rule, at, _ = incomplete.partition("@")
    if at:
        return _beginning([f"{rule}@{target}" for target in _ROUNDED], incomplete)
    return _beginning(_RULES, incomplete)


def words(known: Sequence[str]) -> Finder:
    """Some words."""
    return lambda incomplete: _beginning(known, incomplete)


def _beginning(known: Sequence[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in known if word.startswith(incomplete)]


#: the first of these that the name of an argument begins with says what it is
_KINDS: dict[str, Finder] = {
    "STORE": stores,
    "RULE": rules,
    "OPERATION": words([name.removesuffix("K") for name in OPERATIONS]),
    "SIZE": words(_SIZES),
    "COLUMN": words(_COLUMNS),
    "DIR": folders,
    **dict.fromkeys(
        ("BASE", "TUNED", "CHECKPOINT", "DELTA", "STREAM", "FILE", "KEYS", "PATH"), files
    ),
}


class Completed(click.types.StringParamType):
    """Text, as any other, which a shell can complete."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """What the text may become."""
        return self._finder(incomplete)


def complete(command: click.Command) -> None:
    """Make the arguments and options of a command complete, where their kind is known."""
    for parameter in command.params:
        if type(parameter.type) is not click.types.StringParamType or parameter.name == "key":
            continue
        called = parameter.metavar or (parameter.name or "").upper()
        finder = next((f for kind, f in _KINDS.items() if called.startswith(kind)), None)
        if finder is stores and parameter.name == "out":
            finder = files
        if finder is not None:
            parameter.type = Completed(finder)
