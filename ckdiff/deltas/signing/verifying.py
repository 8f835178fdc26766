"""Verifying who signed deltas and weight versions; and using exactly the bytes that were verified.

What is used of a signed delta is a copy that nobody else can write, made while it is hashed: what
lies where the delta came from may change at any moment, and a check of it says nothing about later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ckdiff.deltas.signing.keys import Key, read_keys
from ckdiff.deltas.signing.manifest import FIRST, manifest, signature_path
from ckdiff.deltas.signing.sshsig import read_signature, signer
from ckdiff.errors import DeltaError, UsageError, printable
from ckdiff.options import checked_path
from ckdiff.outputs.place import Place, write_errors

_SIGN = "ssh-keygen -Y sign -n ckdiff -f KEY MANIFEST, of what `ckdiff check --manifest` writes"
_SHOWN = 5  # versions that are named


class Signers:
    """Those who may sign. ``keys`` is the path of a file of their public keys."""

    def __init__(
        self, keys: str | os.PathLike[str], signature: str | os.PathLike[str] | None = None
    ) -> None:
        self._keys: list[Key] = read_keys(checked_path("the keys", keys))
        self._signature = None if signature is None else checked_path("the signature", signature)

    def one_only(self, count: int) -> None:
        """Raise UsageError where one signature is given for several deltas."""
        if self._signature is not None and count != 1:
            raise UsageError(
                "one signature belongs to one delta, but there are several",
                hint="leave it out: ckdiff looks for each signature beside its delta",
            )

    def verify(self, path: str, into: Path | None = None) -> tuple[str, Path]:
        """Who signed the delta or version at ``path``, and where it is: copied to the directory
        ``into``, where that is given.

        Raises DeltaError unless one of the keys signed it, and what ``manifest`` raises.
        """
        at = self._signature or signature_path(path)
        shown = printable(path)
        if not os.path.lexists(at):
            raise DeltaError(f"{shown} is not signed: there is no {printable(at)}", hint=_SIGN)
        signature = read_signature(at)
        text, where = manifest(path, into)
        try:
            found = signer(signature, text, self._keys)
        except DeltaError as error:
            raise DeltaError(f"{shown}: {error.message}", hint=error.hint) from None
        if found is None:
            raise DeltaError(
                f"{shown} is not what was signed: {printable(at)} is the signature of other bytes",
                hint="fetch it and its signature again",
            )
        return printable(str(found)), where

    def verify_all(self, paths: Sequence[str]) -> list[str]:
        """Who signed each. Raises DeltaError that names those which nobody did."""
        self.one_only(len(paths))
        found: list[str] = []
        faults: list[tuple[str, DeltaError]] = []
        for path in paths:
            try:
                found.append(self.verify(path)[0])
            except DeltaError as error:
                faults.append((os.path.basename(path), error))
        if len(faults) == 1 or (faults and len(paths) == 1):
            raise faults[0][1]
        if faults:
            names = ", ".join(printable(name) for name, _ in faults[:_SHOWN])
            more = f" and {len(faults) - _SHOWN:,} more" if len(faults) > _SHOWN else ""
            raise DeltaError(
                f"{len(faults):,} of {len(paths):,} versions are not signed by one of the keys: "
                f"{names}{more}; of the first: {faults[0][1].message}",
                hint=faults[0][1].hint,
            )
        return found

    @contextmanager
    def copies(self, paths: Sequence[str], beside: Path) -> Iterator[list[str]]:
        """Copies of what is signed, verified, in a directory of ours beside an output.

        Raises what ``verify`` raises, and OutputError.
        """
        self.one_only(len(paths))
        out = beside.with_name(f"{beside.name}.verified")
        Place(beside, directory=True, overwrite=False).keep_away_from(inputs=list(map(Path, paths)))
        with Place(out, directory=True, overwrite=False) as place:
            found = []
            for number, path in enumerate(paths):
                folder = place.path / str(number)
                with write_errors(out):
                    folder.mkdir()
                    found.append(os.fspath(self.verify(path, folder)[1]))
            yield found


def write_manifest(path: str, out: str | os.PathLike[str] | None) -> bytes:
    """The manifest of a delta or a version, which is also written to ``out``, if that is given.

    A manifest that is there is replaced. Raises what ``manifest`` raises, and OutputError.
    """
    text, _ = manifest(path)
    if out is None:
        return text
    where = Path(checked_path("the manifest", out))
    place = Place(where, directory=False, overwrite=True, in_the_way=_no_manifest)
    with place, write_errors(where):
        place.path.write_bytes(text)
        place.commit()
    return text


def _no_manifest(path: Path) -> str | None:
    """What a file is that must not be replaced; None for a manifest."""
    try:
        with open(path, "rb") as file:
            begin = file.read(len(FIRST))
    except OSError:
        begin = b""
    return None if begin == FIRST.encode() else "is not a manifest"
