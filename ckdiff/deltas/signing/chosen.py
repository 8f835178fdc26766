"""Which versions of a signed stream are used, so that only these are verified and copied."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckdiff.deltas.room import Room
from ckdiff.deltas.signing.verifying import Signers
from ckdiff.deltas.versions.given import STREAM, asked_versions, given_versions, kind_of
from ckdiff.deltas.versions.reading import WeightStream, check_complete
from ckdiff.errors import UsageError


def signers_of(
    keys: str | os.PathLike[str] | None, signature: str | os.PathLike[str] | None
) -> Signers | None:
    """Those who may sign; None where nobody has to. Raises UsageError."""
    if keys is not None:
        return Signers(keys, signature)
    if signature is not None:
        raise UsageError(
            "a signature needs keys to check it with", hint="give --verify-signature KEYS"
        )
    return None


@contextmanager
def verified(
    signers: Signers, paths: Sequence[str], beside: Path, target: int | None, at: int
) -> Iterator[tuple[list[str], int | None]]:
    """What to apply instead of ``paths``, and to which version: copies that were verified.

    ``paths`` are deltas in files, or a stream or versions that are applied to a checkpoint at
    version ``at``. Raises DeltaError for what is not signed, and what a chain raises.
    """
    if kind_of(paths[0]) is None:
        with signers.copies(paths, beside) as used:
            yield used, target
        return
    target, asked = asked_versions(target, at)
    with given_versions(paths, Room()) as versions:
        chain = versions.chain(target, base_version=asked or 0)
    seed = [] if chain.seed is None else [chain.seed]
    chosen = [version.path for version in (*seed, *chain.deltas)]
    if not chosen:  # it is there already, and nothing of them is used
        yield list(paths), chain.target
        return
    with signers.copies(chosen, beside) as used:
        yield used, chain.target


def all_of(path: str, target: int | None) -> list[str]:
    """A delta or a version; of a stream all versions up to ``target``, or all that are complete."""
    if kind_of(path) != STREAM:
        return [path]
    target, _ = asked_versions(target, None)
    with given_versions([path], Room()) as stream:
        assert isinstance(stream, WeightStream)
        numbers = [number for number in stream.numbers if target is None or number <= target]
        found = [stream.where(number) for number in numbers]
    for where in found:
        check_complete(where)
    return [os.path.normpath(where) for where in found]
