"""Files that cannot be mapped are read all the same, with the same result."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conformance import CheckpointTests, Source
from support import write_safetensors
from test_conformance import Local

import ckdiff
from ckdiff.checkpoints.opening import open_checkpoint
from ckdiff.checkpoints.places import mapped
from ckdiff.checkpoints.places.copied import CopyingReader


@pytest.fixture(params=[errno.ENODEV, errno.EACCES])
def unmapped(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> int:
        ctypes.set_errno(request.param)
        return ctypes.c_void_p(-1).value or 0

    class Library:
        mmap = staticmethod(refuse)

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    real = mapped._libc
    monkeypatch.setattr(mapped, "_libc", Library())
    return


@pytest.mark.usefixtures("unmapped")
class TestCopied(CheckpointTests):
    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return Local(tmp_path / "model")


def test_a_diff_of_files_that_cannot_be_mapped(tmp_path: Path, unmapped: None) -> None:
    noise = np.random.default_rng(1).integers(0, 1 << 16, (3000, 512), np.uint16)
    other = noise.copy()
    other[::7, 3] ^= 1
    for name, array in (("a", noise), ("b", other)):
        tensors = {"w": ("BF16", array.shape, array.tobytes()), "v": ("U8", (3,), b"abc")}
        write_safetensors(tmp_path / f"{name}.safetensors", tensors)
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with open_checkpoint(a) as opened:
        assert opened.reader_memory(1 << 20) >= 1 << 20  # it is in the sum of memory
        reader = opened.reader()
        assert isinstance(reader._inner, CopyingReader)  # type: ignore[attr-defined]
        reader.close()
    found = ckdiff.diff(a, b, tmp_path / "x.zarr")
    assert found.rules["exact"]["changed"] == int((noise != other).sum())
    with pytest.raises(ckdiff.BudgetError):
        ckdiff.diff(a, b, memory="1MiB")


def test_another_reason_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"v": ("U8", (3,), b"abc")})

    class Library:
        @staticmethod
        def mmap(*arguments: Any) -> int:
            ctypes.set_errno(errno.ENOMEM)
            return ctypes.c_void_p(-1).value or 0

    monkeypatch.setattr(mapped, "_libc", Library())
    with pytest.raises(ckdiff.CheckpointError, match=os.strerror(errno.ENOMEM)):
        ckdiff.diff(tmp_path / "a.safetensors", tmp_path / "a.safetensors", verify=True)
