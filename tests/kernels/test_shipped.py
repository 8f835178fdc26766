"""Kernels that came with the package: for which processor, and what is not taken for one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from source import ROOT

import ckdiff.kernels
from ckdiff.errors import CkdiffError
from ckdiff.kernels import compiled, shipped

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="images are for x86-64"
)
SHIPPED = "survey", "merge 16f"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two kernels for the least and the most of what this processor can do."""
    folder = tmp_path_factory.mktemp("images")
    able = [known for known in shipped.LEVELS if shipped.processor() >= known.features.keys()]
    making = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "package/images.py"), name, str(folder / name), *SHIPPED]
        )
        for name in {able[0].name, able[-1].name}
    ]
    assert [process.wait() for process in making] == [0] * len(making)
    return folder


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels are looked for as a new process does; gives what is compiled."""
    made: list[str] = []
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(compiled, "on_compile", [made.append])
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/proc/nowhere")
    shipped._archive.cache_clear()
    yield made
    shipped._archive.cache_clear()


def counted() -> list[int]:
    """Ones and zero bytes of 128 words 0xFF."""
    words, out = (ctypes.c_uint64 * 128)(*([0xFF] * 128)), (ctypes.c_int64 * 2)()
    kernel = compiled.c_function("survey").ctypes
    kernel(ctypes.addressof(words), 128, ctypes.addressof(out))
    return list(out)


RIGHT = [8 * 128, 7 * 128]


def test_every_level_counts_alike_and_compiles_nothing(
    archives: Path, monkeypatch: pytest.MonkeyPatch, new_process: list[str]
) -> None:
    for path in archives.iterdir():
        found = shipped._opened(path)
        assert found is not None
        assert sorted(found.places) == sorted(SHIPPED)
        with monkeypatch.context() as patch:
            patch.setattr(shipped, "_archive", lambda found=found: found)
            compiled._compiled.clear()
            assert counted() == RIGHT
    assert new_process == []


@pytest.mark.parametrize(
    ("processor", "level"),
    [
        (shipped._V2 | shipped._V3_BMI2 | {"avx512f": ""}, "x86-64-v3"),
        (shipped._V4_VBMI2, "x86-64-v4-vbmi2"),
        (shipped._V3, "x86-64-v3-without-bmi2"),
        (shipped._V2, "x86-64-v2"),
        ({"sse4_2": ""}, None),
    ],
)
def test_the_best_that_a_processor_can_do(
    processor: dict[str, str], level: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in shipped.LEVELS:
        shipped.write(tmp_path / known.name, "of these sources", {("survey", ""): b"i"})
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "processor", lambda: frozenset(processor))
    found = shipped._archive()
    assert (None if found is None else found.path.name) == level
    assert shipped.find("survey", "", "of these sources") == (None if level is None else b"i")
    assert shipped.find("survey", "", "of other sources") is None
    assert shipped.find("survey", "2", "of these sources") is None


def cpuinfo(vendor: str, family: int) -> bytes:
    return f"vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: avx2 bmi2\n".encode()


@pytest.mark.parametrize(
    ("said", "flags"),
    [
        (cpuinfo("GenuineIntel", 6), {"avx2", "bmi2"}),
        (cpuinfo("AuthenticAMD", 25), {"avx2", "bmi2"}),
        (cpuinfo("AuthenticAMD", 23), {"avx2"}),  # it takes a hundred cycles there
        (cpuinfo("HygonGenuine", 24), {"avx2"}),
        (b"", set()),
        (b"\xff: \xff\nflags", set()),
    ],
)
def test_what_a_processor_says(
    said: bytes, flags: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "first_core", lambda: said)
    assert shipped.processor.__wrapped__() == flags


def test_damage_is_noticed_and_the_kernel_is_compiled(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_process: list[str]
) -> None:
    source = next(archives.iterdir())
    whole, name = source.read_bytes(), shipped.LEVELS[-1].name
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    size = len(whole)
    for at in (0, 17, 40, *range(size - 4000, size, 97)):
        (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        shipped._archive.cache_clear()
        payloads = [shipped.find(*title.split(), *[""] * (title == "survey"), compiled.sources())
                    for title in SHIPPED]  # fmt: skip
        assert None in payloads
    for short in (b"", whole[:10], whole[:60], whole[: size - 1]):
        (tmp_path / name).write_bytes(short)
        shipped._archive.cache_clear()
        shipped.find("survey", "", compiled.sources())
    (tmp_path / name).write_bytes(b"")
    shipped._archive.cache_clear()
    assert counted() == RIGHT
    assert new_process == ["survey"]


def test_without_a_compiler_it_is_said_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("numba", "numba.core", "llvmlite"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "ckdiff.kernels.codegen", raising=False)
    monkeypatch.delattr(ckdiff.kernels, "codegen", raising=False)
    with pytest.raises(CkdiffError, match=r"'blend 32'.*numba.*pip install ckdiff"):
        compiled.c_function("blend", "32")
