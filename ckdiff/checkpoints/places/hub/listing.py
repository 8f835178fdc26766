"""Which files of a repository an address means: the rules of a local directory, on a list."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass

from ckdiff.checkpoints.choosing import INDEX_SUFFIX, SUFFIX, choose
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.errors import CheckpointError, printable
from ckdiff.naming import natural_key


@dataclass(frozen=True, slots=True)
class Meant:
    """The files that an address means. Names are paths in the repository."""

    index: str | None  #: the index that decides which shards count
    shards: tuple[str, ...]  #: in natural order; empty where there is an index
    folder: str  #: which names of shards are relative to


def meant_by(address: HubAddress, names: Sequence[str]) -> Meant:
    """What ``address`` means in a repository that holds ``names``. Raises CheckpointError."""
    if address.names_file:
        if address.path not in names:
            raise _no_such(address, names)
        folder = posixpath.dirname(address.path)
        if address.path.endswith(INDEX_SUFFIX):
            return Meant(address.path, (), folder)
        return Meant(None, (address.path,), folder)
    index, shards = choose(str(address), _inside(address, names))
    return Meant(
        None if index is None else posixpath.join(address.path, index),
        tuple(posixpath.join(address.path, name) for name in shards),
        address.path,
    )


def shards_in(
    address: HubAddress, meant: Meant, listed: Sequence[str], names: Sequence[str]
) -> tuple[str, ...]:
    """The paths of the shards that the index lists; CheckpointError where one is missing."""
    shards = tuple(posixpath.join(meant.folder, name) for name in listed)
    missing = set(shards).difference(names)
    if missing:
        first = printable(min(missing, key=natural_key))
        raise CheckpointError(
            f"{address}: {len(missing):,} of the {len(shards):,} files that the index names are "
            f"not there, such as {first}",
            hint="they are not in the repository, or offline not in the cache",
        )
    return shards


def _inside(address: HubAddress, names: Sequence[str]) -> list[str]:
    """The names in the address's folder, relative to it; raises CheckpointError."""
    start = f"{address.path}/" if address.path else ""
    inside = [name.removeprefix(start) for name in names if name.startswith(start)]
    if address.path in names:
        raise CheckpointError(
            f"{address}: is neither a safetensors file nor an index of some",
            hint="name a folder, or a file that is called .safetensors",
        )
    if address.path and not inside:
        raise _no_such(address, names)
    here = sorted((n for n in inside if "/" not in n and not n.startswith(".")), key=natural_key)
    if not any(name.endswith((SUFFIX, INDEX_SUFFIX)) for name in here):
        deeper = sorted({posixpath.dirname(n) for n in inside if n.endswith(SUFFIX)})
        if deeper:
            raise CheckpointError(
                f"{address}: holds .safetensors files only in {_some(deeper)}",
                hint=f"name the folder, such as {address}/{printable(deeper[0])}",
            )
    if not here:
        raise CheckpointError(
            f"{address}: holds {f'only {_some(sorted(inside))}' if inside else 'no file'}",
            hint="is it the right repository and revision?",
        )
    return here


def _no_such(address: HubAddress, names: Sequence[str]) -> CheckpointError:
    tops = sorted({name.split("/")[0] for name in names if not name.startswith(".")})
    return CheckpointError(
        f"{address}: there is no {printable(address.path)}, but {_some(tops) or 'nothing'}",
        hint="a slash in the name of a revision is written as %2F",
    )


def _some(names: list[str], limit: int = 5) -> str:
    text = ", ".join(map(printable, names[:limit]))
    return text if len(names) <= limit else f"{text} and {len(names) - limit:,} more"
