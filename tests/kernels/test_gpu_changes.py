"""Counts, positions and values of what changed between tensors, as their device is asked for them.

Here on torch's CPU device, with the CPU's kernels; what a GPU runs is in test_gpu_fused.
"""

from __future__ import annotations

import pytest
import torch
from device_changes import changes_agree

from ckdiff.dtypes import DTYPES
from ckdiff.errors import UsageError
from ckdiff.kernels.gpu import compact, counting
from ckdiff.kernels.gpu.compact import changed_positions
from ckdiff.kernels.gpu.counting import count_changed
from ckdiff.rules import EXACT


@pytest.mark.parametrize("dtype", ["U8", "F8_E4M3", "BF16", "F16", "U16", "F32", "F64", "I64"])
def test_against_the_kernels_of_the_cpu(dtype: str) -> None:
    assert changes_agree(dtype, 30) == ""


def test_other_devices_have_no_code() -> None:
    with pytest.raises(UsageError, match="tensors on mps are compared there by Triton, which is"):
        counting.slot_for("BF16", (EXACT,), torch.device("mps"))


def test_long_tensors_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the code counts in 32 bits ends long before."""
    monkeypatch.setattr(compact, "MOST", 1 << 12)
    monkeypatch.setattr(counting, "MOST", 1 << 12)
    monkeypatch.setattr(counting, "_ROWS", 2)
    noise = torch.Generator().manual_seed(1)
    base = torch.randint(-9, 9, (100, 173), generator=noise, dtype=torch.int32)
    tuned = torch.where(torch.rand((100, 173), generator=noise) < 0.01, base + 1, base)
    positions, values = changed_positions(base, tuned, "I32")
    assert positions.tolist() == (base != tuned).view(-1).nonzero().view(-1).tolist()
    assert (values == tuned.view(-1)[positions]).all()
    several = [(base, tuned), (base, base), (tuned, base)]
    changed = len(positions)
    assert changed_positions(base, tuned, "I32", most=changed) is not None
    assert changed_positions(base, tuned, "I32", most=changed - 1) is None
    assert count_changed(several, ["I32"] * 3).tolist() == [[changed], [0], [changed]]


def test_many_tensors_of_several_dtypes() -> None:
    kinds = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "F4": torch.uint8}
    pairs, names, expected = [], [], []
    for i in range(40):
        name = list(kinds)[i % 4]
        base = torch.zeros(i * 37, dtype=kinds[name])
        tuned = base.clone()
        tuned[: i % 5] = 1
        pairs.append((base, tuned))
        names.append(name)
        expected.append([min(i % 5, len(base))])
    assert count_changed(pairs, names).tolist() == expected
    assert count_changed([], []).shape == (0, 1)
    two = count_changed(pairs, names, (EXACT, EXACT))
    assert two.tolist() == [line * 2 for line in expected]


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_parts_of_bytes_have_no_values(dtype: str) -> None:
    side = torch.zeros(3 * DTYPES[dtype].bits, dtype=torch.uint8)
    with pytest.raises(UsageError, match=f"elements of {dtype} have no values of their own"):
        changed_positions(side, side, dtype)


@pytest.mark.parametrize(
    ("base", "tuned", "said"),
    [
        (torch.zeros(4), torch.zeros(5), "one is torch.float32 of 16 bytes, the other"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32), "the other torch.int32 of 16"),
        (torch.zeros(4, 4).t(), torch.zeros(4, 4), "they do not lie in one piece"),
        (torch.zeros(4, device="meta"), torch.zeros(4), "one is on meta, the other on cpu"),
        (torch.zeros(4).double(), torch.zeros(4).double(), "torch.float64 is not F32"),
    ],
)
def test_tensors_that_cannot_be_compared(
    base: torch.Tensor, tuned: torch.Tensor, said: str
) -> None:
    for ask in (
        lambda: changed_positions(base, tuned, "F32"),
        lambda: count_changed([(base, tuned)], ["F32"]),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)
