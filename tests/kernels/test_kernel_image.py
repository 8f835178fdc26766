"""Machine code as images: loaded without numba, and refused where only a linker will do."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import light_kernels
import pytest
from numba import cfunc

from ckdiff.kernels import compiled, image, keeping
from ckdiff.kernels.abi import SIGNATURES
from ckdiff.kernels.codegen import Compiled, compile_kernel

REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="images are for x86-64"
)

RUN = """
import json, sys
import light_kernels
found = light_kernels.found()
print(json.dumps([found, sorted({"numba", "llvmlite"} & set(sys.modules))]))
"""


def counted(cache: Path, before: str = "") -> list[object]:
    """What RUN prints in a process of its own, after the statements ``before``."""
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers")])
    environment = os.environ | {"PYTHONPATH": paths, "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", before + RUN], env=environment, capture_output=True, check=True
    )
    found: list[object] = json.loads(done.stdout)
    return found


def test_a_kernel_found_on_disk_is_loaded_without_numba(tmp_path: Path) -> None:
    right = light_kernels.expected()
    assert counted(tmp_path) == [right, ["llvmlite", "numba"]]
    assert counted(tmp_path) == [right, []]


@pytest.mark.parametrize("name", ["build", "load"])
def test_where_no_image_can_be_had_numba_keeps_and_loads_the_code(
    name: str, tmp_path: Path
) -> None:
    error = {"build": "ValueError", "load": "OSError"}[name]
    refuse = f"""
from ckdiff.kernels import image
def refuse(*arguments):
    raise {error}("not here")
image.{name} = refuse
"""
    first = counted(tmp_path, refuse)
    assert first == [light_kernels.expected(), ["llvmlite", "numba"]]
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.bin")}
    assert kept
    assert counted(tmp_path, refuse) == first
    # an image could be made here, but this is not asked again
    assert counted(tmp_path) == first
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.bin")} == kept


def kernel() -> Compiled:
    return compile_kernel("survey", "", SIGNATURES["survey"])


def test_an_image_computes_what_the_linked_code_computes() -> None:
    made = kernel()
    data = ctypes.create_string_buffer(bytes(range(256)) * 4, 1024)
    outcomes = []
    for address in (made.address, image.load(image.build(made.object_code, made.symbol))):
        out = (ctypes.c_int64 * 2)()
        function = compiled.Function("survey", address).ctypes
        function(ctypes.addressof(data), 128, ctypes.addressof(out))
        outcomes.append(list(out))
    assert outcomes == [[4096, 4]] * 2


#: a kind of each kernel that has kinds
KINDS = {
    "agree": "2", "blend": "16", "cells": "BF16", "changes": "portable", "combine": "at-least:2",
    "compare": "F32:rtol", "encode": "1", "gather": "4", "merge": "16f", "moves": "8",
    "narrow": "F64>F16", "paths": "BF16", "runs": "2", "scale": "F4", "scatter": "4",
    "split": "16f portable", "statistics": "BF16", "strided": "tiles 2,1", "sweep": "W16:exact",
    "tally": "16f",
    "widen": "F16>F32",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(set(SIGNATURES) - {"guard"}))
def test_every_kernel_is_kept_as_an_image(name: str) -> None:
    """One that can raise is not: every process that needs it would have to import numba."""
    kind = KINDS.get(name, "")
    compiled.c_function(name, kind)
    file = compiled._file(name, kind)
    payload = None if file is None else keeping.load(file)[0]
    if payload is None:  # it came with the package, or there is no place where it could be kept
        payload = compiled.image_of(compile_kernel(name, kind, SIGNATURES[name]))
    assert payload[:1] == compiled._IMAGE


def test_code_that_refers_to_anything_outside_is_refused() -> None:
    divide = cfunc("int64(int64, int64)")(lambda a, b: a // b)  # can raise ZeroDivisionError
    made = Compiled(divide._library, divide.native_name)
    with pytest.raises(ValueError, match="outside"):
        image.build(made.object_code, made.symbol)
    with pytest.raises(ValueError, match="no symbol"):
        image.build(kernel().object_code, "nonsense")


def test_no_object_file_breaks_the_builder() -> None:
    made = kernel()
    whole = made.object_code
    arm = whole[:18] + b"\xb7\x00" + whole[20:]
    for data in (b"", b"\x7fELF", bytes(100), arm):
        with pytest.raises(ValueError, match="object file"):
            image.build(data, made.symbol)
    for size in range(0, len(whole) - 1, 7):  # the section table is at the end
        with pytest.raises(ValueError, match=r"\w"):
            image.build(whole[:size], made.symbol)


def test_a_damaged_image_is_not_loaded() -> None:
    made = kernel()
    whole = image.build(made.object_code, made.symbol)
    for data in (b"", whole[:31], whole[:-1], whole + b"x", bytes(len(whole))):
        with pytest.raises(ValueError, match=r"\w"):
            image.load(data)
