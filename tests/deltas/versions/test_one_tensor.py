"""``Delta.tensor``: one tensor out of a delta, as the tuned checkpoint has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import Tensor, write_safetensors
from version_models import start, step, write_model, write_steps
from weight_streams import read_model

import ckdiff
from ckdiff.errors import CkdiffError, DeltaError, UsageError

ENCODINGS = ["packed", "indices", "xor", "overwrite"]


def made(base: Path, tuned: Path, out: Path, encoding: str) -> Path:
    found = ckdiff.delta(base, tuned, out, encoding=encoding)
    return found.out if isinstance(found, ckdiff.DeltaResult) else found.path


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_tensor_is_the_tuned_one(tmp_path: Path, encoding: str) -> None:
    base, tuned = write_steps(tmp_path, 1)
    wanted = read_model(tuned)
    with ckdiff.Delta(made(base, tuned, tmp_path / "d", encoding)) as delta:
        assert delta.encoding == encoding
        assert set(delta.names) <= set(wanted)
        for name, (dtype, shape, data) in wanted.items():
            found = delta.tensor(name, base)
            assert isinstance(found, np.ndarray)
            assert (found.shape, found.tobytes()) == (shape, data)
            assert found.dtype == {"BF16": "u2", "F16": "f2", "F32": "f4", "I8": "i1"}[dtype]
        with pytest.raises(UsageError, match="has no tensor nonsense"):
            delta.tensor("nonsense", base)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_base_is_refused(tmp_path: Path, encoding: str) -> None:
    base, tuned = write_steps(tmp_path, 1)
    other = write_model(tmp_path / "other", step(start(), 6, 0.5))
    with ckdiff.Delta(made(base, tuned, tmp_path / "d", encoding)) as delta:
        wrong, model = 0, read_model(other)
        for name in delta.names:
            if model[name] != read_model(base)[name]:
                with pytest.raises(DeltaError):
                    delta.tensor(name, other)
                wrong += 1
        assert wrong >= 2


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tensors_of_many_windows_among_others(tmp_path: Path, encoding: str) -> None:
    rng = np.random.default_rng(0)
    sizes = {"a": 5, "big": (9 << 20) + 3, "z": 7}
    base: dict[str, Tensor] = {n: ("U8", (k,), rng.bytes(k)) for n, k in sizes.items()}
    tuned = {n: (d, s, bytes(b ^ (i % 997 == 0) for i, b in enumerate(data[:1000])) + data[1000:])
             for n, (d, s, data) in base.items()}  # fmt: skip
    one = write_safetensors(tmp_path / "one.safetensors", base)
    two = write_safetensors(tmp_path / "two.safetensors", tuned)
    with ckdiff.Delta(made(one, two, tmp_path / "d", encoding)) as delta:
        for name in sizes:
            assert delta.tensor(name, one).tobytes() == tuned[name][2]


def test_elements_of_less_than_a_byte_and_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    base: dict[str, Tensor] = {"q": ("F4", (6,), b"abc"), "w": ("BF16", (2, 2), bytes(8))}
    tuned: dict[str, Tensor] = {"q": ("F4", (6,), b"abd"), "w": ("BF16", (2, 2), b"\x80\x3f" * 4)}
    one, two = (write_model(tmp_path / n, m) for n, m in (("one", base), ("two", tuned)))
    with ckdiff.Delta(made(one, two, tmp_path / "d", "packed")) as delta:
        assert delta.tensor("q", one).tobytes() == b"abd"
        found = delta.tensor("w", one, as_torch=True)
        assert torch.equal(found, torch.ones(2, 2, dtype=torch.bfloat16))


def test_full_versions_and_what_is_no_delta_are_refused(tmp_path: Path) -> None:
    (base,) = write_steps(tmp_path, 0)
    ckdiff.delta(base, base, tmp_path / "s", encoding="xor", full=True)
    for path in (tmp_path / "s" / "weight_v000001", tmp_path / "s", base):
        with pytest.raises(CkdiffError):
            ckdiff.Delta(path)
