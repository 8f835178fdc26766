"""A model as it is published, against torch's own rounding; and where a snapshot is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ckdiff
from ckdiff.checkpoints.places.memory import open_memory
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.kernels.memory import bytes_at
from ckdiff.sync import snapshot
from ckdiff.sync.casting import as_published

# not F64: torch rounds it twice on its way to 16 bits
KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def table(kinds: dict[str, str], state: dict[str, torch.Tensor]) -> TensorTable:
    bits = [KINDS[kind].itemsize * state[name].numel() for name, kind in kinds.items()]
    shapes = [tuple(state[name].shape) for name in kinds]
    return TensorTable(list(kinds), list(kinds.values()), shapes, np.array(bits, np.int64))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_spans_are_what_torch_rounds(data: st.DataObject) -> None:
    kind = st.sampled_from(list(KINDS))
    pairs = data.draw(st.lists(st.tuples(kind, kind), min_size=1, max_size=4))
    counts = [data.draw(st.integers(0, 40)) for _ in pairs]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    state = {f"w{i}": (torch.randn(n, dtype=torch.float64) * 100).to(KINDS[one])
             for i, ((one, _), n) in enumerate(zip(pairs, counts, strict=True))}  # fmt: skip
    kinds = {f"w{i}": other for i, (_, other) in enumerate(pairs)}
    order = data.draw(st.permutations(list(kinds)))
    kinds = {name: kinds[name] for name in order}
    opened = open_memory(state)
    assert opened is not None
    with opened:
        view = as_published(opened, table(kinds, state), None, {})
        assert (view.table.names, view.table.dtypes) == (order, list(kinds.values()))
        spans = []
        for at, name in enumerate(order):
            low = data.draw(st.integers(0, state[name].numel()))
            spans.append((at, name, low, data.draw(st.integers(low, state[name].numel()))))
        width = [KINDS[kinds[name]].itemsize for name in order]
        tensors = np.array([at for at, *_ in spans])
        starts = np.array([low * width[at] for at, _, low, _ in spans])
        sizes = np.array([(high - low) * width[at] for at, _, low, high in spans])
        reader = view.reader()
        addresses = reader.acquire(tensors, starts, sizes)
        for (_, name, low, high), address, size in zip(spans, addresses, sizes, strict=True):
            wanted = state[name][low:high].to(KINDS[kinds[name]]).view(torch.uint8).numpy()
            assert bytes_at(int(address), int(size)).tobytes() == wanted.tobytes()
        reader.release()
        reader.close()


def test_where_a_snapshot_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = TensorTable(["w"], ["U8"], [(1 << 20,)], np.array([1 << 20]))
    assert not snapshot.Snapshot(tensors, "auto", tmp_path).on_disk
    little: Any = lambda: 1 << 19  # noqa: E731
    monkeypatch.setattr(snapshot, "available_memory", little)
    kept = snapshot.Snapshot(tensors, "auto", tmp_path)
    assert kept.on_disk
    kept.tensor(0)[:] = 7
    assert kept.tensor(0).tobytes() == b"\7" * (1 << 20)
    kept.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ckdiff.BudgetError, match='snapshot="disk"'):
        snapshot.Snapshot(tensors, "memory", tmp_path)
    monkeypatch.setattr(snapshot, "free_space", lambda path: 1 << 19)
    with pytest.raises(ckdiff.BudgetError, match=r"512\.0 KiB free"):
        snapshot.Snapshot(tensors, "disk", tmp_path)
