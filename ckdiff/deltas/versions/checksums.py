"""The digests of tensors in weight versions, over bytes that come a part at a time."""

from __future__ import annotations

import re
import zlib
from typing import Protocol

import numpy as np
import xxhash

from ckdiff.deltas.versions.form import CHECKSUMS, CONTENT
from ckdiff.errors import UsageError, install, one_of, printable
from ckdiff.kernels.contents import ContentHasher
from ckdiff.kernels.memory import Bytes, UInt64

_DIGITS = {"xxh3-128": 32, "blake3": 64, "adler32": 8}
_HEX = re.compile(r"[0-9a-fA-F]+", re.ASCII)


class Digester(Protocol):
    """Takes a tensor's bytes in their order."""

    def update(self, data: Bytes) -> None:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Of what was taken so far, in lower case."""

    def copy(self) -> Digester:
        """Another one that has taken the same."""


class _Xxh3:
    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, data: Bytes) -> None:
        self._state.update(data.data)

    def hexdigest(self) -> str:
        return str(self._state.hexdigest())

    def copy(self) -> _Xxh3:
        other = _Xxh3()
        other._state = self._state.copy()
        return other


class _Adler32:
    def __init__(self, value: int = 1) -> None:
        self._value = value

    def update(self, data: Bytes) -> None:
        self._value = zlib.adler32(data.data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"

    def copy(self) -> _Adler32:
        return _Adler32(self._value)


class _Blake3:
    def __init__(self) -> None:
        from blake3 import blake3

        self._state = blake3()

    def update(self, data: Bytes) -> None:
        self._state.update(data.data)

    def hexdigest(self) -> str:
        return str(self._state.hexdigest())

    def copy(self) -> _Blake3:
        other = _Blake3.__new__(_Blake3)
        other._state = self._state.copy()
        return other


class _Content:
    """Content hashes, as packed versions have them; parts are whole units but for the last."""

    def __init__(self, bits: int) -> None:
        self._bits, self._at = bits, 0
        self._sums, self._hasher = np.zeros(2, np.uint64), ContentHasher()

    def update(self, data: Bytes) -> None:
        self._hasher.add(self._sums, data, self._at, self._bits)
        self._at += len(data)

    def hexdigest(self) -> str:
        return content_digest(self._sums)

    def copy(self) -> _Content:
        other = _Content(self._bits)
        other._sums, other._at = self._sums.copy(), self._at
        return other


def content_digest(sums: UInt64) -> str:
    """A content hash as text, its low and its high half."""
    return "".join(f"{int(half):016x}" for half in sums)


def check_checksum(name: str) -> None:
    """Raise UsageError for a checksum that the format does not have, or that is not installed."""
    if name not in CHECKSUMS:
        raise UsageError(f"there is no checksum {printable(name)!r}", hint=one_of(name, CHECKSUMS))
    if name == "blake3":
        digester(name)


def digester(name: str, bits: int = 8) -> Digester:
    """A new digester, of one of CHECKSUMS, or CONTENT of elements of so many bits.

    Raises UsageError where blake3 is not installed.
    """
    if name == CONTENT:
        return _Content(bits)
    if name == "adler32":
        return _Adler32()
    if name == "xxh3-128":
        return _Xxh3()
    try:
        return _Blake3()
    except ImportError:
        raise UsageError(
            "blake3 checksums need the package blake3", hint=install("blake3")
        ) from None


def plain_digest(name: str, text: str) -> str | None:
    """A digest as ``hexdigest`` would give it; None for what can be none.

    Leading zeros of the short one may be left out, as some writers do.
    """
    digits = _DIGITS[name]
    if not _HEX.fullmatch(text) or len(text) > digits:
        return None
    if name == "adler32":
        return text.lower().zfill(digits)
    return text.lower() if len(text) == digits else None
