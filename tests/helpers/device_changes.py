"""What changed on a device, held against numpy: used in this process, and in one for Triton."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_runs import kernels, run

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.gpu.compact import changed_positions
from ckdiff.kernels.gpu.counting import count_changed
from ckdiff.rules import EXACT, Rule

LENGTHS = [1, 31, 32, 33, 511, 512, 513, 4095, 4096, 4097, 9000]
RULE = Rule.parse("atol=0.5")


@st.composite
def pairs(draw: st.DrawFn, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random sides of which none, few, many or all elements differ, perhaps not aligned."""
    width = DTYPES[dtype].bits // 8
    count = draw(st.sampled_from(LENGTHS) | st.integers(0, 5000))
    noise = np.random.default_rng(draw(st.integers(0, 99)))
    kind = torch.uint8 if width == 1 else {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    base = torch.from_numpy(noise.integers(0, 256, (count + 1) * width, np.uint8)).view(kind)
    tuned = base.clone()
    share = draw(st.sampled_from([0, 0.001, 0.01, 0.5, 1]))
    chosen = torch.from_numpy(noise.random(count + 1) < share)
    tuned[chosen] ^= torch.tensor(draw(st.sampled_from([1, 64])), dtype=kind)
    first = draw(st.integers(0, 1))
    return base[first : first + count], tuned[first : first + count]


def changes_agree(dtype: str, examples: int = 12) -> str:
    """What is wrong with what is found, if anything."""

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.lists(pairs(dtype), min_size=1, max_size=3))
    def agree(sides: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        counts = count_changed(sides, [dtype] * len(sides), (RULE, EXACT)).tolist()
        for (base, tuned), found in zip(sides, counts, strict=True):
            texts = [str(RULE)]
            bytes_ = [side.numpy().tobytes() for side in (base, tuned)]
            outcome = run(dtype, texts, *bytes_)
            assert found == [outcome.changed[str(RULE)], outcome.changed["exact"]]
            for rule in (RULE, EXACT):
                flags = outcome.flags(str(rule), tuned.numel())
                positions, values = changed_positions(base, tuned, dtype, rule=rule)
                assert positions.tolist() == np.flatnonzero(flags).tolist()
                assert values.dtype == tuned.dtype
                assert (values == tuned[torch.from_numpy(flags)]).all()

    kernels((dtype,), ("exact", str(RULE)))
    return _failure(agree)


def _failure(test: Callable[[], None]) -> str:
    try:
        test()
    except AssertionError as error:
        return str(error) or "they differ"
    return ""
