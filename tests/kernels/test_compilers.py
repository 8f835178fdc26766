"""Which numba and llvmlite make our kernels."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


@pytest.mark.parametrize("name", ["numba", "llvmlite"])
def test_the_compiler_is_one_that_was_tried(name: str) -> None:
    """What turns a kernel into machine code is none of numba's interface: ``CFunc`` and its
    ``_library``, ``_get_compiled_object`` and ``serialize_using_object_code`` of that, the object
    file's layout, ``config._env_reloader``. A version in which they mean something else could
    make code that counts wrong. Whoever raises a cap has run these tests with the new version.
    """
    wanted = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["dependencies"]
    (caps,) = (re.fullmatch(rf"{name}>=([\d.]+),<([\d.]+)", text) for text in wanted
               if text.startswith(name))  # fmt: skip
    assert caps is not None, "a lowest version and a cap"
    assert numbers(caps[1]) <= numbers(version(name)) < numbers(caps[2])
