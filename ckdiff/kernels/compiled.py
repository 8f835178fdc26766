"""Compiling kernels to plain C functions, and keeping the machine code on disk.

numba's own disk cache numbers its files through a shared index, and two processes that compile
at the same moment can leave an index entry pointing at the other's code: for a tool that must
never print a wrong count that is not good enough. Here a file is named by everything that its
content depends on, carries a checksum, and is written to one side and renamed. Whatever is wrong
with a file or with the directory, the kernel is simply compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import pickle
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
from numba.core import config
from numba.core.ccallback import CFunc
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python
from numba.core.typing.ctypes_utils import to_ctypes

_MAGIC = b"ckdiff kernel 1\n"
#: what reading or writing a cache file may raise: never a reason for a run to fail
_CACHE_TROUBLE = (
    OSError, RuntimeError, pickle.PickleError, EOFError, ValueError, TypeError, AttributeError,
    ImportError, LookupError,
)  # fmt: skip
_lock = threading.Lock()
_compiled: dict[tuple[str, str], Function] = {}
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


class Function:
    """A compiled C function. Keeps its machine code alive."""

    def __init__(self, library: Any, symbol: str, signature: Any) -> None:
        self._library = library
        self.address: int = library.get_pointer_to_function(symbol)
        kinds = [to_ctypes(kind) for kind in (signature.return_type, *signature.args)]
        #: callable from Python; releases the GIL
        self.ctypes = ctypes.CFUNCTYPE(*kinds)(self.address)


def _path(name: str, kind: str, signature: Any) -> Path | None:
    """Where a kernel is kept; None where there is no place for it."""
    try:
        key = repr((
            name, kind, str(signature), _codegen().magic_tuple(), _sources(), numba.__version__,
            llvmlite.__version__, sys.version_info[:2],
        ))  # fmt: skip
        return cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    except _CACHE_TROUBLE:  # a user without a home, sources that cannot be read
        return None


def _codegen() -> Any:
    return cpu_target.target_context.codegen()


@cache
def _add_runtime_symbols() -> None:
    """Tell the linker where numba's runtime is: code that can raise refers to it, and LLVM ends
    the process when it meets an unknown symbol. Compiling does the same as a side effect."""
    for name, address in _nrt_python.c_helpers.items():
        llvmlite.binding.add_symbol(name if name.startswith("_") else f"NRT_{name}", address)


def _load(path: Path, signature: Any) -> Function | None:
    # Only the machine code is kept, not numba's whole CompileResult: rebuilding that would first
    # load numba's typing registries, a quarter of a second at every start.
    try:
        data = path.read_bytes()
        head, payload = data[: len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
        if head != _head(path, payload):
            return None
        library, symbol = pickle.loads(payload)
        _add_runtime_symbols()
        return Function(_codegen().unserialize_library(library), symbol, signature)
    except _CACHE_TROUBLE:
        return None


def _save(path: Path, library: Any, symbol: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        payload = pickle.dumps((library.serialize_using_object_code(), symbol))
        try:
            temporary.write_bytes(_head(path, payload) + payload)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except _CACHE_TROUBLE:  # read-only home, full disk: compile anew next time
        pass


def _compile(signature: Any, make: Callable[[], Callable[..., Any]]) -> tuple[Any, str]:
    """(library, symbol) of a freshly compiled C function."""
    function: Any = CFunc(make(), (signature.args, signature.return_type), {}, {"nopython": True})
    # NUMBA_DISABLE_JIT asks for @jit functions to stay Python; with it numba cannot type
    # what it implements by such functions itself, and a kernel has no Python to fall to.
    disabled, config.DISABLE_JIT = config.DISABLE_JIT, 0
    try:
        function.compile()
    finally:
        config.DISABLE_JIT = disabled
    return function._library, function.native_name


def _head(path: Path, payload: bytes) -> bytes:
    """What a file starts with; the name is checked too, so that no file can pass for another."""
    return _MAGIC + hashlib.sha256(path.stem.encode() + payload).digest()


def c_function(
    name: str, kind: str, signature: Any, make: Callable[[], Callable[..., Any]]
) -> Function:
    """The compiled function ``name`` of a ``kind``, from disk or freshly compiled.

    ``make`` gives the Python function and is called only to compile. Thread-safe.
    """
    with _lock:
        found = _compiled.get((name, kind))
        if found is None:
            path = _path(name, kind, signature)
            found = None if path is None else _load(path, signature)
            if found is None:
                for report in on_compile:
                    report(f"{name} {kind}".strip())
                library, symbol = _compile(signature, make)
                if path is not None:
                    _save(path, library, symbol)
                found = Function(library, symbol, signature)
            _compiled[name, kind] = found
        return found
