"""What numba may see of its surroundings while it works for us: nothing that could set it.

numba reads ``.numba_config.yaml`` in the current directory, and every ``NUMBA_`` variable, when it
is imported and again before each compilation. Whoever can put a file where we are started could
make it print into our output, change the code that counts, or keep us from compiling at all. The
variables are the user's own, but they are meant for the user's functions: a kernel that was tested
is one that was compiled with numba's defaults.

So numba gets its defaults from us, and everyone else gets numba back as it would have been.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib.abc
import importlib.machinery
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

_CONFIG = "numba.core.config"
#: settings of numba that change nothing about our code
_HARMLESS = {"CACHE_DIR", "DISABLE_JIT", "NUMBA_NUM_THREADS"}
_lock = threading.RLock()
_ours: list[ModuleType] = []  # numba's settings, where numba was imported here
#: what numba is told: nothing, unless this process compiles for other machines than this one. Set
#: before numba is imported.
told: dict[str, str] = {}


@contextlib.contextmanager
def numba_alone() -> Iterator[bool]:
    """In here numba has its default settings, whatever the surroundings say. For importing it too.

    Gives whether it has had them since it was imported: it keeps some of what it once read. No
    other thread compiles meanwhile.
    """
    with _lock:
        if "numba" in sys.modules:
            with _set_for_us() as usual:
                yield usual
        else:
            with _imported_for_us():
                yield True


def machine() -> tuple[str, str, str]:
    """What numba compiles for, as LLVM sees it: triple, processor, features."""
    with numba_alone():
        from numba.core.registry import cpu_target

        triple, processor, features = cpu_target.target_context.codegen().magic_tuple()
        return str(triple), str(processor), str(features)


def has(feature: str) -> bool:
    """Whether the machine that numba compiles for has a feature, as LLVM calls it."""
    return f"+{feature}" in machine()[2].split(",")


@contextlib.contextmanager
def _set_for_us() -> Iterator[bool]:
    from numba.core import config  # waits, where another thread is importing it
    from numba.core.compiler_lock import global_compiler_lock

    with global_compiler_lock:
        before, reloaded_from = _settings(config), config._env_reloader.old_environ
        outside = config.os  # not os itself, where this is asked for while we compile
        # numba refuses another number of threads once it has started them
        config.os = _Surroundings({"NUMBA_NUM_THREADS": str(config.NUMBA_NUM_THREADS)} | told)
        try:
            config._env_reloader.reset()
            now = _settings(config)
            changed = {name for name in now if now[name] != before.get(name)} - _HARMLESS
            yield config in _ours or not changed
        finally:
            config.os = outside
            vars(config).update(before)
            config._env_reloader.old_environ = reloaded_from


@contextlib.contextmanager
def _imported_for_us() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)
        config = sys.modules.get(_CONFIG)
        if config is not None and finder.used:
            _ours.append(config)
            _give_back(config)


def _give_back(config: Any) -> None:
    """Leave numba with the variables that others may have set for it.

    The file waits until somebody else compiles, and so does what numba says about a bad value.
    """
    config.os, config.warnings = _Surroundings(dict(os.environ)), _Silent()
    try:
        config._env_reloader.reset()
    finally:
        config.os = os
        config.warnings = sys.modules["warnings"]
        config._env_reloader.old_environ = {}


def _settings(config: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if name.isupper()}


class _Surroundings:
    """Stands for the module ``os``: an environment of our choice, and no file in this directory."""

    def __init__(self, environ: dict[str, str]) -> None:
        self.environ = environ
        self.path = _Paths()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


class _Paths:
    """Stands for ``os.path``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os.path, name)

    @staticmethod
    def exists(path: str) -> bool:
        return os.path.isabs(path) and os.path.exists(path)

    isfile = exists


class _Silent:
    """Stands for the module ``warnings``."""

    @staticmethod
    def warn(*arguments: object, **options: object) -> None:
        pass


class _Finder(importlib.abc.MetaPathFinder):
    """Finds numba's settings, to be loaded in surroundings of our choice."""

    def __init__(self) -> None:
        self.used = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _CONFIG:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader):
            spec.loader = _Loader(spec.loader)
            self.used = True
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.InspectLoader) -> None:
        self._real = real

    def exec_module(self, module: ModuleType) -> None:
        code = self._real.get_code(module.__name__)
        # The module reads its surroundings while it is executed, through what it imports as os.
        surroundings = _Surroundings(told)

        def imported(name: str, *rest: Any, **more: Any) -> Any:
            return surroundings if name == "os" else builtins.__import__(name, *rest, **more)

        vars(module)["__builtins__"] = {**vars(builtins), "__import__": imported}
        exec(code or "", vars(module))
        vars(module)["__builtins__"] = builtins
