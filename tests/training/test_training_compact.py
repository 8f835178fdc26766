"""How the compact optimizer moves elements: the kernels against torch, batches, threads, shards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import optim
from training_processes import run_together
from training_support import STEPS, Tiny, all_bits, alone, one_thread, some_masks, train

import ckdiff
from ckdiff.kernels.abi import TILE_ELEMENTS
from ckdiff.training import SubnetworkOptimizer, compact, freeze_unmasked, moving
from ckdiff.training.moving import Move, gather, scatter
from ckdiff.training.selection import Selection

__all__ = ["one_thread"]  # a fixture

DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def some_mask(rng: np.random.Generator, size: int, density: float) -> torch.Tensor:
    """Random flags with an empty and a full stretch among them."""
    flags = rng.random(size) < density
    low, middle, high = sorted(rng.integers(0, size + 1, 3).tolist())
    if rng.random() < 0.5:
        flags[low:middle], flags[middle:high] = False, True
    return torch.from_numpy(flags)


def some_bits(rng: np.random.Generator, size: int, width: int, offset: int) -> torch.Tensor:
    """Random bits, many of them NaN, that begin ``offset`` bytes past an aligned address."""
    data = np.frombuffer(bytearray(rng.bytes(size * width + 8)), np.uint8)
    held = data[offset : offset + size * width].view(f"V{width}").view(f"i{width}")
    held[::3] |= np.array(-1 << 8 * width - 9 if width == 2 else -1 << 8 * width - 13, held.dtype)
    return torch.from_numpy(held).view(DTYPES[width])


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    width=st.sampled_from([2, 4, 8]),
    sizes=st.lists(
        st.sampled_from([0, 1, 63, 64, 65, 1000, TILE_ELEMENTS, TILE_ELEMENTS * 2 + 17]),
        min_size=1,
        max_size=3,
    ),
    density=st.sampled_from([0.0, 0.0005, 0.01, 0.06, 0.07, 0.5, 1.0]),
    offset=st.integers(0, 7),
    threads=st.integers(1, 3),
)
def test_the_kernels_move_what_torch_moves(
    seed: int, width: int, sizes: list[int], density: float, offset: int, threads: int
) -> None:
    rng = np.random.default_rng(seed)
    integer = INTEGERS[width]
    moves, before = [], []
    for size in sizes:
        mask = some_mask(rng, size, density)
        selection = Selection(mask)
        assert selection.count == int(mask.sum())
        assert selection.whole == bool(mask.all())
        if selection.whole:  # nothing to be moved: it stands for itself
            continue
        index = selection.index(torch.device("cpu"))
        assert torch.equal(index.long(), mask.nonzero().view(-1))
        whole, other = (some_bits(rng, size, width, offset) for _ in range(2))
        room = selection.count + int(rng.integers(0, 70))
        buffer = torch.full((2, room), -1, dtype=integer).view(DTYPES[width])
        moves.append(Move(selection, whole, other, buffer[0], buffer[1]))
        before.append((mask, whole.clone().view(integer)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving, "_SHARE", 1)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        gather(moves)
        for move, (mask, _) in zip(moves, before, strict=True):
            count = move.selection.count
            for wide, small in ((move.whole, move.compact), (move.other, move.beside)):
                assert torch.equal(small[:count].view(integer), wide.view(integer)[mask])
                assert not small[count:].view(integer).any(), "the padding is zero"
            move.compact.view(integer).bitwise_not_()
        scatter(moves)
    for move, (mask, old) in zip(moves, before, strict=True):
        new = move.whole.view(integer)
        assert torch.equal(new[mask], ~old[mask])
        assert torch.equal(new[~mask], old[~mask])


@pytest.mark.parametrize("density", [0.001, 0.03, 0.1, 0.9])
def test_a_selection_takes_the_smaller_of_positions_and_bits(density: float) -> None:
    size = 40 * TILE_ELEMENTS
    mask = torch.rand(size, generator=torch.Generator().manual_seed(1)) < density
    selection = Selection(mask)
    table = 40 * 4 * 8
    assert selection.nbytes <= min(2 * selection.count, size // 8) + table + 64
    assert Selection(mask).digest == selection.digest
    mask[7] = ~mask[7]
    assert Selection(mask).digest != selection.digest
    assert Selection(mask.view(40, -1)).digest != Selection(mask).digest


def test_what_has_no_kernel_is_left_to_torch() -> None:
    mask = torch.rand(8, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    selection = Selection(mask)
    for whole in (torch.randn(6, 8).t(), torch.randint(0, 99, (8, 6), dtype=torch.uint8)):
        old = whole.clone()
        buffer = whole.new_ones(2, 64)
        move = Move(selection, whole, whole, buffer[0], buffer[1])
        gather([move])
        assert torch.equal(buffer[1, : selection.count], old[mask])
        assert not buffer[:, selection.count :].any()
        buffer += 1
        scatter([move])
        assert torch.equal(whole, torch.where(mask, old + 1, old))


@pytest.mark.parametrize("at_once", [1, 200, 1 << 19])
@pytest.mark.parametrize("threads", [1, 2])
def test_batches_and_threads_change_nothing(
    at_once: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "_AT_ONCE", at_once)
    monkeypatch.setattr(moving, "_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    models = [Tiny(), Tiny()]
    for model in models:
        model.norm.double()  # two dtypes among the others
        model.norm.register_forward_pre_hook(lambda _, args: (args[0].double(),))
        model.norm.register_forward_hook(lambda _, args, out: out.float())
    dense, small = models
    masks = some_masks(dense)
    usual = optim.AdamW(dense.parameters(), lr=0.01)
    freeze_unmasked(dense, usual, masks)
    train(dense, usual)
    train(small, SubnetworkOptimizer(optim.AdamW, small, masks, lr=0.01))
    assert all(map(torch.equal, dense.parameters(), small.parameters()))


def test_groups_may_be_added_later() -> None:
    dense, small = Tiny(), Tiny()
    masks = some_masks(dense)
    usual = optim.AdamW([dense.up.weight, dense.norm.weight], lr=0.01)
    freeze = freeze_unmasked(dense, usual, masks)
    first = [small.up.weight, small.norm.weight]
    optimizer = SubnetworkOptimizer(optim.AdamW, small, masks, params=first, lr=0.01)
    train(dense, usual, 3)
    train(small, optimizer, 3)
    freeze.remove()
    usual.add_param_group({"params": [dense.embed.weight], "weight_decay": 0.1})
    freeze_unmasked(dense, usual, masks)
    optimizer.add_param_group({"params": [small.embed.weight], "weight_decay": 0.1})
    assert optimizer.masked == sum(
        int(masks[n].sum()) for n in ("up.weight", "norm.weight", "embed.weight")
    )
    train(dense, usual, STEPS)
    train(small, optimizer, STEPS)
    assert all(map(torch.equal, all_bits(dense).values(), all_bits(small).values()))
    assert optimizer.param_groups[1]["lr"] == 0.01
    with pytest.raises(ckdiff.UsageError, match="each parameter once"):
        optimizer.add_param_group({"params": [small.up.weight]})
    with pytest.raises(ckdiff.UsageError, match="no further parameters"):
        copy.deepcopy(optimizer).add_param_group({"params": [small.up.bias]})


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    model = Tiny()
    optimizer = SubnetworkOptimizer(optim.AdamW, model, some_masks(model), lr=0.01)
    train(model, optimizer, 1)
    before = all_bits(model)

    def stop(*_: Any) -> None:
        raise ArithmeticError

    assert optimizer._inner is not None
    hook = optimizer._inner.register_step_pre_hook(stop)
    with pytest.raises(ArithmeticError):
        train(model, optimizer, 1)
    hook.remove()
    assert all(map(torch.equal, all_bits(model).values(), before.values()))
    assert all(part.compact.numel() == 0 and part.compact.grad is None for part in optimizer._parts)
    train(model, optimizer, 1)


def test_a_new_pool_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    mask = torch.arange(4 * TILE_ELEMENTS) % 5 == 0
    whole = torch.arange(mask.numel()).float()

    def taken() -> torch.Tensor:
        selection = Selection(mask)
        buffer = torch.empty(2, selection.count)
        gather([Move(selection, whole, whole, buffer[0], buffer[1])])
        return buffer[0]

    expected = taken()
    pool = moving._pool(1)
    moving._pool.cache_clear()  # as in a child after a fork
    assert moving._pool(1) is not pool
    assert torch.equal(taken(), expected)


def test_sharded_by_fsdp2(tmp_path: Path) -> None:
    """Two processes give what one does; each has the state of its own parts."""
    run_together("compact_worker.py", "compact", 2, tmp_path)
    found, expected = torch.load(tmp_path / "compact.pt"), alone()
    differing = {
        name: int((bits != found[name].view(torch.int32)).sum()) for name, bits in expected.items()
    }
    assert differing == dict.fromkeys(expected, 0)
