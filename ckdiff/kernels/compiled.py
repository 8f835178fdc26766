"""Compiled kernels as C functions, and keeping their machine code on disk.

numba's own disk cache numbers its files through a shared index, and two processes that compile
at the same moment can leave an index entry pointing at the other's code: for a tool that must
never print a wrong count that is not good enough. Here a file is named by everything that its
content depends on, carries a checksum, and is written to one side and renamed. Whatever is wrong
with a file or with the directory, the kernel is simply compiled again.

numba is imported only to compile: what is found on disk is loaded without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from ckdiff.kernels import image
from ckdiff.kernels.abi import SIGNATURES

_MAGIC = b"ckdiff kernel 2\n"
_IMAGE, _LIBRARY = b"i", b"l"  # first byte of a payload: an image, or what only numba can load
#: what reading or writing a cache file may raise: never a reason for a run to fail
_CACHE_TROUBLE = (
    OSError, RuntimeError, pickle.PickleError, EOFError, ValueError, TypeError, AttributeError,
    ImportError, LookupError,
)  # fmt: skip
#: variables of numba that change nothing about the code
_HARMLESS = {"NUMBA_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_DISABLE_JIT"}
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

    Thread-safe.
    """
    with _lock:
        found = _compiled.get((name, kind))
        if found is None:
            path = _path(name, kind)
            found = None if path is None else _load(path, name)
            if found is None:
                found = _compile(path, name, kind)
            _compiled[name, kind] = found
        return found


def cache_directory() -> Path:
    """Where machine code is kept: NUMBA_CACHE_DIR, else the user's cache directory."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "ckdiff"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ckdiff" / "kernels"


def _compile(path: Path | None, name: str, kind: str) -> Function:
    from ckdiff.kernels import codegen

    for report in on_compile:
        report(f"{name} {kind}".strip())
    made = codegen.compile_kernel(name, kind, SIGNATURES[name])
    try:
        payload = _IMAGE + image.build(made.object_code, made.symbol)
        # Run what later processes will run.
        function = Function(name, image.load(payload[1:]))
    except (ValueError, OSError):  # another kind of machine, or no memory may be made executable
        payload = _LIBRARY + pickle.dumps(made.dump())
        function = Function(name, made.address, made)
    if path is not None:
        _save(path, payload)
    return function


def _load(path: Path, name: str) -> Function | None:
    try:
        data = path.read_bytes()
        head, payload = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
        if head != _head(path, payload):
            return None
        if payload[:1] == _IMAGE:
            return Function(name, image.load(payload[1:]))
        from ckdiff.kernels import codegen

        made = codegen.restore(pickle.loads(payload[1:]))
        return Function(name, made.address, made)
    except _CACHE_TROUBLE:
        return None


def _save(path: Path, payload: bytes) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            temporary.write_bytes(_head(path, payload) + payload)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except _CACHE_TROUBLE:  # read-only home, full disk: compile anew next time
        pass


def _head(path: Path, payload: bytes) -> bytes:
    """What a file starts with; the name is checked too, so that no file can pass for another."""
    return _MAGIC + hashlib.sha256(path.stem.encode() + payload).digest()


def _path(name: str, kind: str) -> Path | None:
    """Where a kernel is kept; None where there is no place for it."""
    try:
        key = repr((name, kind, SIGNATURES[name], _sources(), _compiler(), _machine()))
        return cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    except _CACHE_TROUBLE:  # a user without a home, sources that cannot be read
        return None


@cache
def _sources() -> str:
    """Digest of the code that generates kernels: a changed generator must not find old files."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted(here.rglob("*.py")), here.parent / "dtypes.py", here.parent / "rules.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _compiler() -> Any:
    """Which numba and LLVM would compile, and how they are set: known without importing them."""
    versions = []
    for package in ("numba", "llvmlite"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ImportError(package)
        versions.append(Path(spec.origin).with_name("_version.py").read_bytes())
    settings = Path(".numba_config.yaml")
    return (
        versions,
        sorted(
            i for i in os.environ.items() if i[0].startswith("NUMBA_") and i[0] not in _HARMLESS
        ),
        settings.read_bytes() if settings.exists() else b"",
        sys.version_info[:2],
    )


@cache
def _machine() -> Any:
    """The CPU that the code is for, with its features."""
    wanted = (
        b"vendor_id", b"cpu family", b"model", b"stepping", b"flags",  # x86
        b"CPU ", b"Features",  # ARM
    )  # fmt: skip
    try:
        with open("/proc/cpuinfo", "rb", buffering=0) as file:
            block = file.read(1 << 14).partition(b"\n\n")[0]  # the first core
    except OSError:
        block = b""
    if b"flags" in block or b"Features" in block:
        known = [line for line in block.splitlines() if line.startswith(wanted)]
        return sys.platform, os.uname().machine, known
    from ckdiff.kernels import codegen

    return codegen.machine()
