"""Compiling kernels to plain C functions, and keeping the machine code on disk.

numba's own disk cache numbers its files through a shared index, and two processes that compile
at the same moment can leave an index entry pointing at the other's code: for a tool that must
never print a wrong count that is not good enough. Here a file is named by everything that its
content depends on, carries a checksum, and is written to one side and renamed. Whatever is wrong
with a file or with the directory, the kernel is simply compiled again.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import config
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult

_MAGIC = b"ckdiff kernel 1\n"
#: what reading or writing a cache file may raise: never a reason for a run to fail
_CACHE_TROUBLE = (
    OSError, RuntimeError, pickle.PickleError, EOFError, ValueError, TypeError, AttributeError,
    ImportError, LookupError,
)  # fmt: skip
_lock = threading.Lock()
_compiled: dict[tuple[str, str], Any] = {}
#: called with a kernel's name just before it is compiled (not when it is found on disk)
on_compile: list[Callable[[str], None]] = []


def cache_directory() -> Path:
    """Where machine code is kept: NUMBA_CACHE_DIR, else the user's cache directory."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return Path(chosen) / "ckdiff"
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "ckdiff" / "kernels"


@cache
def _sources() -> str:
    """Digest of the code that generates kernels: a changed generator must not find old files."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in [*sorted(here.glob("*.py")), here.parent / "dtypes.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class _DiskCache:
    """What CFunc expects of a cache: load_overload and save_overload."""

    def __init__(self, name: str, kind: str) -> None:
        self._name, self._kind = name, kind

    def _path(self, signature: Any, target: Any) -> Path:
        key = repr((
            self._name, self._kind, str(signature), target.codegen().magic_tuple(), _sources(),
            numba.__version__, llvmlite.__version__, sys.version_info[:2],
        ))  # fmt: skip
        return cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"

    def load_overload(self, signature: Any, target: Any) -> Any:
        target.refresh()
        try:
            data = self._path(signature, target).read_bytes()
            head, payload = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
            if head == _MAGIC + hashlib.sha256(payload).digest():
                return CompileResult._rebuild(target, *pickle.loads(payload))
        except _CACHE_TROUBLE:
            pass
        for report in on_compile:
            report(f"{self._name} {self._kind}".strip())
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        try:
            path = self._path(signature, result.target_context)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            payload = pickle.dumps(result._reduce())
            temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            try:
                temporary.write_bytes(_MAGIC + hashlib.sha256(payload).digest() + payload)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except _CACHE_TROUBLE:  # read-only home, full disk: compile anew next time
            pass


def c_function(name: str, kind: str, signature: Any, make: Callable[[], Callable[..., Any]]) -> Any:
    """The compiled function ``name`` of a ``kind``, as numba's CFunc (``.address``, ``.ctypes``).

    ``make`` gives the Python function; it is called once a process. Thread-safe.
    """
    with _lock:
        found = _compiled.get((name, kind))
        if found is None:
            found = CFunc(make(), (signature.args, signature.return_type), {}, {"nopython": True})
            found._cache = _DiskCache(name, kind)
            # NUMBA_DISABLE_JIT asks for @jit functions to stay Python; with it numba cannot type
            # what it implements by such functions itself, and a kernel has no Python to fall to.
            disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
            try:
                found.compile()
            finally:
                config.DISABLE_JIT = disabled
            _compiled[name, kind] = found
        return found
