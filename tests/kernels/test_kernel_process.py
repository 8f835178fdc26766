"""The kernels and the process around them: the cache of machine code, memory, float modes."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import light_kernels
import naive
import numpy as np
import pytest
from kernel_runs import kernels, run
from light_kernels import KERNELS

from ckdiff.kernels import compiled
from ckdiff.kernels.casting import narrow, widen
from ckdiff.kernels.scaling import Scaling, scale

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def flushing_denormals() -> Iterator[None]:
    """This thread as a library built with -ffast-math leaves it."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("sets the mode the x86-64 way")
    libm = ctypes.CDLL("libm.so.6")
    before = (ctypes.c_uint32 * 8)()
    assert libm.fegetenv(before) == 0
    changed = (ctypes.c_uint32 * 8)(*before)
    changed[7] |= 0x8040  # MXCSR: flush to zero, denormals are zero
    assert libm.fesetenv(changed) == 0
    try:
        yield
    finally:
        assert libm.fesetenv(before) == 0


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_subnormals_count_in_any_floating_point_mode(dtype: str, flushing_denormals: None) -> None:
    width = naive.FORMATS[dtype].bits // 8
    base = np.arange(100, dtype=f"<u{width}").tobytes()
    tuned = np.arange(1, 101, dtype=f"<u{width}").tobytes()
    rules = ["atol=0", "rtol=0", "ulp=0"]
    found = run(dtype, rules, base, tuned, stats=True)
    assert found.changed == {"exact": 100, "atol=0": 100, "rtol=0": 100, "ulp=0": 100}
    counted: list[dict[str, int]] = []
    thread = threading.Thread(target=lambda: counted.append(run(dtype, rules, base, tuned).changed))
    thread.start()  # a new thread inherits the mode
    thread.join()
    assert counted == [found.changed]
    assert np.float64(5e-324) * 1.0 == 0.0, "the caller's mode was not put back"


def test_subnormals_are_cast_and_scaled_in_any_mode(flushing_denormals: None) -> None:
    """What is expected are bits, or normal numbers: numpy computes in this mode, too."""
    steps = np.arange(1, 128)
    for source, target, step in [("F16", "F32", 2.0**-24), ("F32", "F64", 2.0**-149)]:
        wide = {"F32": np.float32, "F64": np.float64}[target]
        bits = steps.astype(f"<u{naive.FORMATS[source].bits // 8}")
        out = np.zeros(wide().itemsize * len(bits), np.uint8)
        widen(bits.view(np.uint8), source, target, out)
        assert np.array_equal(out.view(wide), (steps * step).astype(wide))
    bits, small = (steps << 16).astype("<u4"), np.zeros(2 * len(steps), np.uint8)
    assert narrow(bits.view(np.uint8), "F32", "BF16", small) == 0
    assert np.array_equal(small.view("<u2"), steps)
    out = np.zeros(8, np.uint8)
    elements = np.array([0x30, 0x40], np.uint8)  # a half, and two
    factors = np.array([0x00800000, 3], "<u4").view(np.uint8)
    scale(elements, Scaling("F8_E4M3", "F32", 1, 2, (1, 1)), 0, factors, 0, out)
    assert out.view("<u4").tolist() == [0x00400000, 6]
    scale(elements, Scaling("F8_E4M3", "BF16", 1, 2, (1, 2)), 0, factors[4:6], 0, out)
    assert out.view("<u4").tolist() == [3 << 15, 6 << 16]
    scale(elements, Scaling("F8_E4M3", "F8_E8M0", 1, 2, (1, 2)), 0, np.zeros(1, np.uint8), 0, out)
    assert out.view("<u4").tolist() == [1 << 21, 1 << 23]
    assert np.float64(5e-324) * 1.0 == 0.0, "the caller's mode was not put back"


def child(script: str, **environment: str) -> subprocess.Popen[bytes]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests" / "helpers")])
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=kept | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def output(process: subprocess.Popen[bytes]) -> Any:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (process.returncode, err.decode())
    return json.loads(out)


COUNT = """
import json
import light_kernels
from ckdiff.kernels import compiled
seen = []
compiled.on_compile.append(seen.append)
print(json.dumps([light_kernels.found(), sorted(seen)]))
"""


def test_cache_files_are_shared_verified_and_replaced(tmp_path: Path) -> None:
    cache_dir = {"NUMBA_CACHE_DIR": str(tmp_path)}
    # two processes that compile the same kernels at the same time
    both = [child(COUNT, **cache_dir) for _ in range(2)]
    right = light_kernels.expected()
    for found in [output(process) for process in both]:
        assert found[0] == right
    files = sorted((tmp_path / "ckdiff").iterdir())
    assert len(files) == len(KERNELS)
    whole = {path: path.read_bytes() for path in files}
    assert output(child(COUNT, **cache_dir)) == [right, []]

    damages = [
        lambda data: data[: len(data) // 2],
        lambda data: b"" if len(data) % 2 else random.Random(0).randbytes(len(data)),
        lambda data: data[:1000] + bytes([data[1000] ^ 1]) + data[1001:],
    ]
    for path, damage in zip(files, cycle(damages), strict=False):
        path.write_bytes(damage(whole[path]))
    # the first file's content under the last one's name is another kernel's code
    files[-1].write_bytes(whole[files[0]])
    assert output(child(COUNT, **cache_dir)) == [right, KERNELS]
    assert output(child(COUNT, **cache_dir)) == [right, []]
    assert sorted((tmp_path / "ckdiff").iterdir()) == files


def test_no_place_for_the_cache(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"not a directory")
    places = [
        {"NUMBA_CACHE_DIR": str(file)},
        {"NUMBA_CACHE_DIR": str(file / "below")},
        {"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": "/proc/nowhere"},
        # not about the cache: a debugging aid that must not break the kernels
        {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "1"},
    ]
    for pair in (places[:2], places[2:]):
        for found in [output(process) for process in [child(COUNT, **place) for place in pair]]:
            assert found == [light_kernels.expected(), KERNELS]
    assert file.read_bytes() == b"not a directory"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(compiled, "_compiled", {})
    kernels.cache_clear()
    try:
        assert run("U8", [], b"abc", b"abd").changed == {"exact": 1}
    finally:
        kernels.cache_clear()


FENCED = """
import ctypes, json, mmap
import numpy as np
from kernel_runs import DTYPES, Results, kernels
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
rules = ("exact", "atol=0", "rtol=0", "ulp=0", "exact@bf16")
page, middle = mmap.PAGESIZE, 80 * mmap.PAGESIZE
areas, ends = [], []
for side in range(2):
    area = mmap.mmap(-1, middle + 2 * page)
    start = np.frombuffer(area, np.uint8).ctypes.data
    for fence in (start, start + page + middle):
        assert libc.mprotect(fence, page, 0) == 0
    areas.append((area, start + page))
compared = kernels(tuple(DTYPES), rules, True)
total = 0
for dtype in DTYPES.values():
    for count in (4, 64, 68, 132, 508, 512, 1020, 65536 // max(dtype.bits // 8, 1)):
        size = count * dtype.bits // 8
        for place in (0, middle - size):  # right behind a fence, and right before one
            masks = [np.zeros(1 << 14, np.uint8) for _ in rules]
            addresses = [start + place for _, start in areas]
            into = Results(1, len(rules), with_statistics=True)
            row = [*addresses, count, 0, compared.slot_of[dtype.name], 0, 0]
            compared.run(np.array([row], np.int64), masks, into)
            total += int(into.changed.sum())
print(json.dumps(total))
"""


def test_nothing_outside_a_tensor_is_read(tmp_path: Path) -> None:
    """Tensors between pages that must not be touched: one byte too far and the child dies."""
    place = {"NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR", "")}
    assert output(child(FENCED, **place)) == 0


def test_kernels_are_compiled_once_in_a_process() -> None:
    run("U8", ["atol=1"], b"abc", b"abd")
    seen: list[str] = []
    compiled.on_compile.append(seen.append)
    try:
        kernels.cache_clear()
        run("U8", ["atol=1"], b"abc", b"abd")
    finally:
        compiled.on_compile.remove(seen.append)
    assert seen == []
