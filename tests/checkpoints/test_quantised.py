"""Which tensors are quantised: what is known, and what is left as it is stored, and said."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.checkpoints.pairing import Matching, pair
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.quantised import quantised
from ckdiff.checkpoints.views.quantisedgrid import Declared, Kind, grid_of, mx_grid
from ckdiff.checkpoints.views.quantisedhint import notes
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.scaling import Scaling

Kinds = Mapping[str, tuple[str, tuple[int, ...]]]
F8 = "F8_E4M3"


def table(kinds: Kinds) -> TensorTable:
    sizes = [prod(shape) * DTYPES[dtype].bits // 8 for dtype, shape in kinds.values()]
    return TensorTable(
        [*kinds],
        [dtype for dtype, _ in kinds.values()],
        [shape for _, shape in kinds.values()],
        np.array(sizes, np.int64),
    )


WEIGHT = {"x.weight": (F8, (256, 384))}
NF4 = {"x.weight": ("U8", (8, 1)), "x.weight.absmax": ("F32", (1,)),
       "x.weight.quant_map": ("F32", (16,)),
       "x.weight.quant_state.bitsandbytes__nf4": ("U8", (80,))}  # fmt: skip

#: kinds of which nothing is scaled, and what the one note about them says
LEFT: dict[str, tuple[Kinds, str]] = {
    "no scales": (WEIGHT, "no scales: 'x.weight'"),
    "another's scales": (WEIGHT | {"y.weight_scale": ("F32", ())}, "no scales: 'x.weight'"),
    "integers without scales": ({"x.weight": ("I8", (4, 4))}, "no scales: 'x.weight'"),
    "groups without scales": ({"x_blocks": ("U8", (4, 2, 16))}, "no scales: 'x_blocks'"),
    "rows too many": (WEIGHT | {"x.weight_scale": ("F32", (257, 1))}, "(F8_E4M3 [256, 384], and"),
    "columns as a vector": (WEIGHT | {"x.weight_scale": ("F32", (384,))}, "F32 [384]"),
    "no size of block": (WEIGHT | {"x.weight_scale_inv": ("F32", (2, 130))}, "[2, 130]"),
    "one size or another": (
        {"x.weight": (F8, (60, 128)), "x.weight_scale": ("F32", (4, 1))}, "[4, 1]",
    ),
    "a scale for each": (WEIGHT | {"x.weight_scale": ("F32", (256, 384))}, "F32 [256, 384]"),
    "none": (WEIGHT | {"x.weight_scale": ("F32", (0,))}, "F32 [0]"),
    "another stack": (
        {"x": (F8, (3, 256, 256)), "x_scale_inv": ("F32", (2, 2, 2))}, "F32 [2, 2, 2]",
    ),
    "two scales": (
        WEIGHT | {"x.weight_scale": ("F32", ()), "x.weight_scale_inv": ("F32", (2, 3))},
        "which scale",
    ),
    "groups of another size": (
        {"x_blocks": ("U8", (4, 2, 8)), "x_scales": ("U8", (4, 2))}, "which scale",
    ),
    "groups with floats": (
        {"x_blocks": ("U8", (4, 2, 16)), "x_scales": ("F32", (4, 2))}, "which scale",
    ),
    "groups beside their values": (
        {"x": ("BF16", (4, 64)), "x_blocks": ("U8", (4, 2, 16)), "x_scales": ("U8", (4, 2))},
        "which scale",
    ),
    "bytes with floats": (
        {"x.weight": ("U8", (4, 32)), "x.weight_scale": ("F32", (4, 2))}, "which scale",
    ),
    "bytes as a scale of rows": (WEIGHT | {"x.weight_scale": ("U8", (256, 2, 1))}, "which scale"),
    "MX of integers": (
        {"x.weight": ("I8", (4, 64)), "x.weight_scale": ("F8_E8M0", (4, 2))}, "which scale",
    ),
    "FP4, odd rows": (
        {"x.weight": ("F4", (4, 33)), "x.weight_scale": ("F8_E8M0", (4, 2))}, "which scale",
    ),
    "NVFP4": (
        {"x.weight": ("U8", (4, 32)), "x.weight_scale": (F8, (4, 4)),
         "x.weight_scale_2": ("F32", ()), "x.input_scale": ("F32", ())},
        "two scales ('x.weight')",
    ),
    "NVFP4, packed": (
        {"x.weight_packed": ("U8", (4, 32)), "x.weight_scale": (F8, (4, 4)),
         "x.weight_global_scale": ("F32", (1,))},
        "two scales ('x.weight_packed')",
    ),
    "zero points": (
        {"x.weight": ("I8", (4, 4)), "x.weight_scale": ("F32", (4, 1)),
         "x.weight_zero_point": ("I8", (4, 1))},
        "zero points or an order of their own ('x.weight')",
    ),
    "scales of another dtype": (WEIGHT | {"x.weight_scale_inv": ("I32", (2, 3))}, "I32 [2, 3]"),
    "experts either way": (
        {"x.down": (F8, (3, 20, 20)), "x.down_scale": ("F32", (3, 20, 1))}, "which scale",
    ),
    "offsets": (
        {"x.weight": ("I8", (4, 4)), "x.weight_scale": ("F32", (4, 1)),
         "x.weight_offset": ("F32", (4, 1))},
        "zero points or an order of their own ('x.weight')",
    ),
    "an order": (
        {"x.weight": ("I8", (4, 4)), "x.weight_scale": ("F32", (4, 1)),
         "x.weight_g_idx": ("I32", (4,))},
        "zero points or an order of their own ('x.weight')",
    ),
    "packed integers": (
        {"x.weight_packed": ("I32", (4, 8)), "x.weight_scale": ("BF16", (4, 2)),
         "x.weight_shape": ("I64", (2,))},
        "packed integers ('x.weight_packed')",
    ),
    "bitsandbytes": (NF4, "bitsandbytes ('x.weight')"),
    "bitsandbytes, 8 bits": (
        {"x.weight": ("I8", (4, 4)), "x.SCB": ("F32", (4,)), "x.weight_format": ("U8", ())},
        "bitsandbytes ('x.weight')",
    ),
    "GPTQ": (
        {"x.qweight": ("I32", (4, 4)), "x.qzeros": ("I32", (1, 1)), "x.scales": ("F16", (1, 4)),
         "x.g_idx": ("I32", (32,))},
        "GPTQ or AWQ ('x.qweight')",
    ),
    "two of AWQ": (
        {"x.qweight": ("I32", (4, 4)), "y.qweight": ("I32", (4, 4))},
        "GPTQ or AWQ (2 tensors, such as 'x.qweight')",
    ),
    "quanto": (
        {"x.weight._data": ("I8", (4, 4)), "x.weight._scale": ("F32", (4, 1))},
        "quanto ('x.weight._data')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_is_said(name: str) -> None:
    kinds, said = LEFT[name]
    before = table(kinds)
    found = quantised(before)
    assert not found.scaled
    assert (found.table.names, found.table.dtypes) == (before.names, before.dtypes)
    assert found.table.shapes == before.shapes
    (note,) = found.notes
    assert said in note
    assert "\n" not in note


NOTHING: list[Kinds] = [
    {},
    {"x.weight": ("BF16", (4, 4)), "x.weight_scale": ("F32", ())},
    {"x.bytes": ("U8", (4, 4)), "x.k_scale": ("F32", ())},
    {"x": ("BF16", (4, 4)), "x_offset": ("F32", (4,)), "x_zero_point": ("F32", (4,))},
    {"position": ("I8", (4,)), "x.scale": ("F32", (4,)), "x.scales": ("F32", (4,))},
]


@pytest.mark.parametrize("kinds", NOTHING)
def test_nothing_is_said_of_what_is_not_quantised(kinds: Kinds) -> None:
    found = quantised(table(kinds))
    assert (found.scaled, found.notes) == ({}, [])
    assert found.within.tolist() == [*range(len(kinds))]


def test_scales_of_activations_are_no_weights() -> None:
    kinds: Kinds = {
        "x.weight": (F8, (4, 4)),
        "x.weight_scale": ("F32", ()),
        "x.input_scale": ("F32", ()),
        "attn.k_scale": ("F32", ()),
        "attn.v_scale": ("F32", ()),
        "x.output_scale": ("F32", ()),
        "x.bias": ("BF16", (4,)),
    }
    found = quantised(table(kinds))
    # what belongs to a module without quantised weights stays
    assert found.table.names == ["x.weight", "attn.k_scale", "attn.v_scale", "x.bias"]
    assert found.table.dtypes[0] == "F32"
    assert found.table.nbytes[0] == 64
    assert found.within.tolist() == [0, 3, 4, 6]
    kinds = {f"attn.{name}".replace("attn.attn", "attn"): kind for name, kind in kinds.items()}
    assert quantised(table(kinds)).table.names == ["attn.x.weight", "attn.x.bias"]


def test_one_scale_is_not_for_two() -> None:
    """Both names of a weight are there, as it is and packed."""
    kinds: Kinds = {
        "x.weight": (F8, (4, 32)),
        "x.weight_packed": ("U8", (4, 16)),
        "x.weight_scale": ("F8_E8M0", (4, 1)),
    }
    found = quantised(table(kinds))
    assert not any(found.table.names[at] == "x.weight_packed" for at in found.scaled)
    assert any("x.weight_packed" in note for note in found.notes)


def test_two_do_not_get_one_name() -> None:
    groups, powers = ("U8", (4, 2, 16)), ("U8", (4, 2))
    both: Kinds = {"x_blocks": groups, "x_scales": powers, "x.blocks": groups, "x.scales": powers}
    found = quantised(table(both))
    assert (found.scaled, found.table.names) == ({}, [*both])
    (note,) = found.notes
    assert "which scale belongs to which tensor: 2 tensors" in note


def test_no_elements_have_no_scales() -> None:
    kinds: Kinds = {"x.weight": (F8, (0, 4)), "x.weight_scale_inv": ("F32", (0, 1))}
    found = quantised(table(kinds))
    assert (found.table.names, found.table.dtypes) == (["x.weight"], ["F32"])
    assert found.table.nbytes.tolist() == [0]


@pytest.mark.parametrize(
    ("sizes", "counts", "declared", "block"),
    [
        ((576, 7168), (5, 56), None, (128, 128)),
        ((64, 64), (1, 1), None, None),  # one for all
        ((1536, 1536), (12, 12), None, (128, 128)),
        ((512, 512), (8, 8), None, (64, 64)),
        ((100, 100), (4, 4), None, None),  # 25 or 32
        ((101, 101), (4, 4), None, (32, 32)),
        ((300, 96), (3, 3), None, (128, 32)),
        ((200, 300), (5, 1), None, (40, 300)),  # and no power of two
        ((200, 300), (100, 1), None, None),  # none is so small
        ((60, 60), (4, 4), None, None),  # 15 or 16
        ((60, 60), (4, 4), (15, 15), (15, 15)),
        ((60, 60), (4, 4), (16, 16), (16, 16)),
        ((192, 192), (2, 2), (96, 96), (96, 96)),
        ((192, 192), (2, 2), (1, 32), (128, 128)),  # of other tensors
        ((40, 96), (40, 3), (128, 128), (1, 32)),
    ],
)
def test_sizes_of_blocks(
    sizes: tuple[int, int], counts: tuple[int, int], declared: Any, block: Any
) -> None:
    found = grid_of(Kind(F8, sizes), Kind("F32", counts), Declared(declared))
    if counts == (1, 1):
        assert found is not None
        assert found.scaling == Scaling(F8, "F32", 1, prod(sizes), (1, prod(sizes)))
    elif block is None:
        assert found is None
    else:
        assert found is not None
        assert found.scaling == Scaling(F8, "F32", *sizes, block)


def test_integers_that_are_fp4_by_declaration() -> None:
    kinds = Kind("I8", (4, 32)), Kind("F32", (4, 2))
    found = grid_of(*kinds, Declared(fp4=True))
    assert found is not None
    assert found.shape == (4, 64)
    found = grid_of(*kinds, Declared())
    assert found is not None
    assert found.shape == (4, 32)


_SHAPES = st.lists(st.integers(0, 300), max_size=4).map(tuple)


@given(st.sampled_from([*DTYPES]), _SHAPES, st.sampled_from([*DTYPES]), _SHAPES, st.booleans())
def test_whatever_a_file_says_has_all_its_scales(
    dtype: str, shape: tuple[int, ...], of: str, scales: tuple[int, ...], fp4: bool
) -> None:
    """Never an error, and never a scale that is not there."""
    for found in (
        grid_of(Kind(dtype, shape), Kind(of, scales), Declared((128, 64), fp4)),
        mx_grid(Kind(dtype, shape), Kind(of, scales), turned=fp4),
    ):
        if found is not None and found.scaling is not None:
            bits = DTYPES[found.scaling.dtype].bits
            assert found.scaling.elements == prod(found.shape)
            assert found.scaling.elements * bits == prod(shape) * DTYPES[dtype].bits
            assert found.scaling.scales == prod(scales)
    names = table({"x.weight": (dtype, shape), "x.weight_scale": (of, scales)})
    assert len(quantised(names).table) in (1, 2)


# what a comparison of bits says


def said(base: Kinds, tuned: Kinds, changed: Mapping[str, int]) -> str | None:
    sides = table(base), table(tuned)
    pairing = pair(*sides, matching=Matching(by_value=True))
    found = notes(pairing, *sides, [changed.get(name, 0) for name in pairing.names])
    assert len(found) < 2
    return found[0].removeprefix("hint: ") if found else None


SCALED: Kinds = WEIGHT | {"x.weight_scale_inv": ("F32", (2, 3)), "bias": ("BF16", (4,))}


def test_a_hint_where_only_scales_changed() -> None:
    assert said(SCALED, SCALED, {"x.weight_scale_inv": 1}) == (
        "only the scales of 'x.weight' changed: --dequantize compares values"
    )
    assert said(SCALED, SCALED, {"x.weight_scale_inv": 1, "x.weight": 2}) is None
    assert said(SCALED, SCALED, {"x.weight": 2, "bias": 1}) is None
    assert said(SCALED, SCALED, {}) is None


def test_packed_words_are_not_called_weights() -> None:
    """An int32 of GPTQ has eight weights: the density is not one of weights."""
    packed: Kinds = {
        "x.qweight": ("I32", (4, 8)),
        "x.qzeros": ("I32", (1, 1)),
        "x.scales": ("F16", (1, 8)),
    }
    note = said(packed, packed, {"x.qweight": 3})
    assert note is not None
    assert note.startswith("note: compared as bits, as they are stored: GPTQ or AWQ ('x.qweight')")
    assert note.endswith("may hold several weights")


def test_a_hint_where_one_side_is_quantised() -> None:
    plain: Kinds = {"x.weight": ("BF16", (256, 384)), "bias": ("BF16", (4,))}
    wanted = "'x.weight' is quantised on one side only, or otherwise: --dequantize compares values"
    assert said(SCALED, plain, {}) == wanted
    assert said(plain, SCALED, {}) == wanted
    rows: Kinds = WEIGHT | {"x.weight_scale": ("F32", (256, 1))}
    assert said(SCALED, rows, {}) == wanted
    assert said(plain, plain, {"x.weight": 1}) is None
    grouped: Kinds = {"y_blocks": ("U8", (4, 2, 16)), "y_scales": ("U8", (4, 2))}
    both = said({**SCALED, **grouped}, {**plain, "y": ("BF16", (4, 64))}, {})
    assert both is not None
    assert both.startswith("2 tensors, such as 'x.weight', are quantised on one side only")


def test_a_hint_finds_scales_among_renamed_ones() -> None:
    """By position, whatever the order of both sides is."""
    back = dict(reversed([*SCALED.items()]))
    assert said(SCALED, back, {"x.weight_scale_inv": 1}) is not None
    assert said(back, SCALED, {"x.weight_scale_inv": 1}) is not None
