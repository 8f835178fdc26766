"""Compiled kernels as C functions, and keeping their machine code on disk.

numba's own disk cache numbers its files through a shared index, and two processes that compile
at the same moment can leave an index entry pointing at the other's code: for a tool that must
never print a wrong count that is not good enough. Here a file is named by everything that its
content depends on, carries a checksum, and is written to one side and renamed. Whatever is wrong
with a file or with the directory, the kernel is simply compiled again.

numba is imported only to compile: what is found on disk, or came with the package, is loaded
without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ckdiff.errors import CkdiffError, lacking, whole
from ckdiff.kernels import image, keeping, numbaview, shipped
from ckdiff.kernels.abi import SIGNATURES

_IMAGE, _LIBRARY = b"i", b"l"  # first byte of a payload: an image, or what only numba can load
_LENGTHS = struct.Struct("<4Q")  # of the parts of what only numba can load
_lock = threading.Lock()
_compiled: dict[tuple[str, str], Function] = {}
#: called with a kernel's name just before it is compiled (not when it is found on disk)
on_compile: list[Callable[[str], None]] = []


class Function:
    """A C function. Keeps its machine code alive."""

    def __init__(self, name: str, address: int, owner: object = None) -> None:
        self._owner = owner
        self.address = address
        kinds: list[Any] = [
            None if kind == "void" else getattr(ctypes, f"c_{kind}")
            for kind in re.findall(r"\w+", SIGNATURES[name])
        ]
        #: callable from Python; releases the GIL
        self.ctypes = ctypes.CFUNCTYPE(*kinds)(address)


def c_function(name: str, kind: str = "") -> Function:
    """The kernel ``name`` (of a ``kind``, where it has kinds), from disk or freshly compiled.

    Thread-safe. Raises CkdiffError where neither this package nor anything here has it.
    """
    with _lock:
        found = _compiled.get((name, kind))
        if found is None:
            found = _compiled[name, kind] = _find(name, kind)
        return found


def _find(name: str, kind: str) -> Function:
    payload = _shipped(name, kind)
    found = None if payload is None else _restore(name, payload)
    if found is not None:
        return found
    file = _file(name, kind)
    payload, may_be_kept = (None, False) if file is None else keeping.load(file)
    found = None if payload is None else _restore(name, payload)
    if found is not None:
        return found
    found, payload = _compile(name, kind)
    if file is not None and payload is not None and may_be_kept:
        keeping.save(file, payload)
    return found


def _shipped(name: str, kind: str) -> bytes | None:
    try:
        return shipped.find(name, kind, sources())
    except OSError:  # sources that cannot be read
        return None


def _compile(name: str, kind: str) -> tuple[Function, bytes | None]:
    """The kernel, and what to keep of it: None where it is not what another process would make."""
    title = f"{name} {kind}".strip()
    try:
        from ckdiff.kernels import codegen
    except ModuleNotFoundError as error:
        if lacking(error) is None:  # a module of ours
            raise
        raise CkdiffError(
            f"for this processor no machine code for {title!r} came with ckdiff, and compiling it "
            "needs numba",
            hint=whole(),
        ) from None
    for report in on_compile:
        report(title)
    made = codegen.compile_kernel(name, kind, SIGNATURES[name])
    try:
        payload = image_of(made)
        # Run what later processes will run.
        function = Function(name, image.load(payload[1:]))
    except (ValueError, OSError):  # another kind of machine, or no memory may be made executable
        payload = _LIBRARY + _packed(made.dump())
        function = Function(name, made.address, made)
    return function, payload if made.usual else None


def image_of(made: Any) -> bytes:
    """What is kept of a kernel that :func:`ckdiff.kernels.codegen.compile_kernel` made.

    Raises ValueError where only a linker could load it.
    """
    return _IMAGE + image.build(made.object_code, made.symbol)


def _restore(name: str, payload: bytes) -> Function | None:
    """The kernel in a payload; None if it cannot be loaded here."""
    try:
        if payload[:1] == _IMAGE:
            return Function(name, image.load(payload[1:]))
        parts = _unpacked(payload[1:])
    except (OSError, ValueError):
        return None
    from ckdiff.kernels import codegen

    made = codegen.restore(parts)
    return Function(name, made.address, made)


def _packed(parts: Sequence[bytes]) -> bytes:
    return _LENGTHS.pack(*map(len, parts)) + b"".join(parts)


def _unpacked(data: bytes) -> list[bytes]:
    """Raises ValueError for what :func:`_packed` did not make."""
    if len(data) < _LENGTHS.size:
        raise ValueError("no lengths")
    parts, at = [], _LENGTHS.size
    for length in _LENGTHS.unpack_from(data):
        parts.append(data[at : at + length])
        at += length
    if at != len(data):
        raise ValueError("sizes do not agree")
    return parts


def _file(name: str, kind: str) -> str | None:
    """The name under which a kernel is kept; None where that cannot be known."""
    try:
        key = repr((name, kind, SIGNATURES[name], sources(), _compiler(), _machine()))
        return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    except (OSError, ImportError, ValueError):  # sources that cannot be read
        return None


@cache
def sources() -> str:
    """Digest of the code that generates kernels: a changed generator must not find old files."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted(here.rglob("*.py")), here.parent / "dtypes.py", here.parent / "rules.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def _compiler() -> Any:
    """Which numba and LLVM would compile: known without importing them.

    How they are set is no part of it: they compile for us as :mod:`ckdiff.kernels.numbaview` says.
    """
    versions = []
    for package in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(package)
        versions.append(Path(spec.origin).with_name("_version.py").read_bytes())
    return versions, sys.version_info[:2]


@cache
def _machine() -> Any:
    """The CPU that the code is for, with its features."""
    wanted = (
        b"vendor_id", b"cpu family", b"model", b"stepping", b"flags",  # x86
        b"CPU ", b"Features",  # ARM
    )  # fmt: skip
    block = shipped.first_core()
    if b"flags" in block or b"Features" in block:
        known = [line for line in block.splitlines() if line.startswith(wanted)]
        return sys.platform, os.uname().machine, known
    return numbaview.machine()
