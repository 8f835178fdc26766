"""Fused against per-part names: what becomes of tables, and of what must be left alone."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.unfusing import unfuse
from tests.helpers.naive_pieces import Array, Tensors, table_of, viewed

P = "model.layers.0."
E = P + "mlp.experts."


_COUNTER = itertools.count()


def some(*shape: int) -> Array:
    """An array in which every element is another."""
    size = int(np.prod(shape))
    return np.array(list(itertools.islice(_COUNTER, size)), np.int32).reshape(shape)


def both_ways(one: Tensors, other: Tensors) -> tuple[str, ...]:
    """The notes; whatever side is which, all pairs and is equal."""
    notes: tuple[str, ...] = ()
    for base, tuned in ((one, other), (other, one)):
        result = unfuse(table_of(base), table_of(tuned))
        left, right = viewed(base, result.base), viewed(tuned, result.tuned)
        assert set(left) == set(right)
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name], name)
        notes = result.notes
    return notes


def untouched(base: Tensors, tuned: Tensors) -> tuple[str, ...]:
    """The notes of two checkpoints that stay as they are, whatever side is which."""
    notes: tuple[str, ...] = ()
    for one, other in ((tuned, base), (base, tuned)):
        result = unfuse(table_of(one), table_of(other))
        assert result.base is None
        assert result.tuned is None
        notes = result.notes
    return notes


def experts(count: int = 3, wide: int = 4, hidden: int = 6) -> Tensors:
    parts: Tensors = {}
    for n in range(count):
        parts[f"{E}{n}.gate_proj.weight"] = some(wide, hidden)
        parts[f"{E}{n}.up_proj.weight"] = some(wide, hidden)
        parts[f"{E}{n}.down_proj.weight"] = some(hidden, wide)
    return parts


def fuse(parts: Tensors, *, turned: bool = False, alternate: bool = False) -> Tensors:
    """Experts on top of each other, by numpy alone."""
    count = 1 + max(int(name.removeprefix(E).split(".")[0]) for name in parts)
    every = []
    for n in range(count):
        gate, up = (parts[f"{E}{n}.{role}.weight"] for role in ("gate_proj", "up_proj"))
        if alternate:
            both = np.stack([gate, up], 1).reshape(-1, gate.shape[1])
        else:
            both = np.concatenate([gate, up])
        every.append(both.T if turned else both)
    down = [parts[f"{E}{n}.down_proj.weight"] for n in range(count)]
    return {
        f"{E}gate_up_proj": np.stack(every),
        f"{E}down_proj": np.stack([each.T if turned else each for each in down]),
    }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("wide", "hidden"), [(4, 6), (3, 6), (4, 4), (1, 5)])
def test_experts(turned: bool, wide: int, hidden: int) -> None:
    # 2 * 3 == 6 makes gate and up square, 4 == 4 the other one: the one tells of the other
    parts = experts(3, wide, hidden)
    (note,) = both_ways(parts, fuse(parts, turned=turned))
    assert "2 fused tensors of base compared as 9 parts" in note


def test_gate_and_up_alternate_where_there_are_biases() -> None:
    parts = experts()
    fused = fuse(parts, turned=True, alternate=True)
    biases: dict[str, list[Array]] = {"gate_proj": [], "up_proj": [], "down_proj": []}
    for n in range(3):
        for role, length in (("gate_proj", 4), ("up_proj", 4), ("down_proj", 6)):
            parts[f"{E}{n}.{role}.bias"] = some(length)
            biases[role].append(parts[f"{E}{n}.{role}.bias"])
    both = np.stack([np.stack(biases["gate_proj"]), np.stack(biases["up_proj"])], 2)
    fused[f"{E}gate_up_proj_bias"] = both.reshape(3, 8)
    fused[f"{E}down_proj_bias"] = np.stack(biases["down_proj"])
    both_ways(parts, fused)
    # a family that classifies tokens has biases too, and halves
    fused["score.weight"] = parts["score.weight"] = some(2, 2)
    result = unfuse(table_of(fused), table_of(parts))
    assert result.base is not None
    assert f"{E}gate_up_proj" in result.base.names
    assert any("alternate" in note for note in result.notes)


def test_one_changed_element_is_one_changed_element_of_its_part() -> None:
    parts = experts()
    fused = fuse(parts)
    fused[f"{E}gate_up_proj"][1, 4 + 2, 5] += 1
    result = unfuse(table_of(parts), table_of(fused))
    seen = viewed(fused, result.tuned)
    changed = {name: np.argwhere(seen[name] != array).tolist() for name, array in parts.items()}
    assert {name: at for name, at in changed.items() if at} == {f"{E}1.up_proj.weight": [[2, 5]]}


@pytest.mark.parametrize(
    ("fused", "parts"),
    [
        ("self_attn.qkv_proj.weight", ("q_proj", "k_proj", "v_proj")),
        ("self_attn.qkv_proj.bias", ("q_proj", "k_proj", "v_proj")),
        ("self_attn.Wqkv.weight", ("q_proj", "k_proj", "v_proj")),
        ("attn.qkv.weight", ("q", "k", "v")),
        ("attn.in_proj_weight", ("q_proj", "k_proj", "v_proj")),
        ("attn.in_proj_bias", ("q_proj", "k_proj", "v_proj")),
        ("attn.to_qkv.weight", ("to_q", "to_k", "to_v")),
        ("self_attn.fused_qkv_a_proj.weight", ("q_a_proj", "kv_a_proj_with_mqa")),
        ("mlp.gate_up_proj.weight", ("gate_proj", "up_proj")),
        ("mlp.up_gate_proj.weight", ("up_proj", "gate_proj")),
        ("mlp.w12.weight", ("w1", "w2")),
        ("linear_attn.conv1d.weight", ("q_conv1d", "k_conv1d", "v_conv1d")),
    ],
)
def test_rows(fused: str, parts: tuple[str, ...]) -> None:
    module, tail = fused.rpartition(".")[0], "bias" if fused.endswith("bias") else "weight"
    home = module.rpartition(".")[0] if fused.endswith(".weight") or "qkv" in fused else module
    rest = () if tail == "bias" else (1, 3) if "conv" in fused else (5,)
    lengths = (8, 2, 2)[: len(parts)]
    apart = {
        f"{P}{home}.{leaf}.{tail}": some(n, *rest) for leaf, n in zip(parts, lengths, strict=True)
    }
    both_ways(apart, {P + fused: np.concatenate(list(apart.values()))})


def test_stacked_gates_and_shards() -> None:
    apart = {E + "gate_proj": some(2, 3, 4), E + "up_proj": some(2, 3, 4)}
    both_ways(apart, {E + "gate_up_proj": np.concatenate(list(apart.values()), 1)})
    apart = {f"ngram.shard_{n}.weight": some(n + 1, 4) for n in range(11)}
    both_ways(apart, {"ngram.weight": np.concatenate(list(apart.values()))})


def test_renames_go_by_the_side_that_has_the_parts() -> None:
    old = {name.replace("mlp", "block_sparse_moe"): a for name, a in experts().items()}
    for new, leaf in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        old = {name.replace(leaf, new): a for name, a in old.items()}
    parts = {
        name.replace("block_sparse_moe", "mlp")
        .replace("w1", "gate_proj")
        .replace("w3", "up_proj")
        .replace("w2", "down_proj"): array
        for name, array in old.items()
    }
    fused = fuse(parts)
    fused[P + "mlp.gate.weight"] = old[P + "block_sparse_moe.gate.weight"] = some(3, 6)
    (note,) = both_ways(old, fused)
    assert "1 tensor of base compared under tuned's names" in note
    result = unfuse(table_of(fused), table_of(old))
    assert result.base is not None
    assert result.base.names == [P + "block_sparse_moe.gate.weight"]
    assert result.tuned is None


def test_a_spelling_that_does_not_fit_is_not_believed() -> None:
    # One family calls the second norm by what another calls the first.
    one = {f"layers.{n}.norm{i}.weight": some(4) for n in (0, 1) for i in (1, 2)}
    leaves = ("input_layernorm", "post_attention_layernorm")
    other = {f"layers.{n}.{leaf}.weight": some(4) for n in (0, 1) for leaf in leaves}
    assert untouched(one, other) == ()
    # The rows of these are in another order where they are called q_proj and k_proj.
    one = {f"layers.0.attention.w{leaf}.weight": some(4, 4) for leaf in "qkvo"}
    one |= {"layers.0.attention_norm.weight": some(4), "tok_embeddings.weight": some(9, 4)}
    other = {f"layers.0.self_attn.{leaf}_proj.weight": some(4, 4) for leaf in "qkvo"}
    other |= {"layers.0.input_layernorm.weight": some(4), "embed_tokens.weight": some(9, 4)}
    assert untouched(one, other) == ()


def test_a_spelling_is_believed_where_a_partner_is_missing() -> None:
    old = {name.replace("mlp", "block_sparse_moe"): a for name, a in experts().items()}
    fused = fuse(experts())
    old[P + "block_sparse_moe.gate.weight"] = some(3, 6)
    result = unfuse(table_of(old), table_of(fused))
    assert viewed(old, result.base).keys() ^ viewed(fused, result.tuned).keys() == {
        P + "block_sparse_moe.gate.weight"
    }


def test_a_stack_that_is_stored_either_way() -> None:
    # The square one has the same name and shape on both sides, and its sibling tells of it.
    gate, down = some(2, 4, 4), some(2, 4, 2)
    one = {E + "gate_up_proj": gate, E + "down_proj": down}
    other = {name: array.transpose(0, 2, 1).copy() for name, array in one.items()}
    both_ways(one, other)


def test_what_is_missing_is_missing_under_its_own_name() -> None:
    parts = experts()
    fused = fuse(parts)
    gone = [f"{E}1.up_proj.weight", f"{E}2.down_proj.weight"]
    for name in gone:
        del parts[name]
    for base, tuned in ((parts, fused), (fused, parts)):
        result = unfuse(table_of(base), table_of(tuned))
        seen = viewed(base, result.base), viewed(tuned, result.tuned)
        assert sorted(set(seen[0]) ^ set(seen[1])) == gone
        for name in parts:
            np.testing.assert_array_equal(seen[0][name], seen[1][name])
    apart = {P + "self_attn.k_proj.weight": some(2, 5), P + "self_attn.v_proj.weight": some(2, 5)}
    whole = np.concatenate([some(8, 5), *apart.values()])
    result = unfuse(table_of(apart), table_of({P + "self_attn.qkv_proj.weight": whole}))
    seen_tuned = viewed({P + "self_attn.qkv_proj.weight": whole}, result.tuned)
    assert seen_tuned[P + "self_attn.q_proj.weight"].shape == (8, 5)
    np.testing.assert_array_equal(seen_tuned[P + "self_attn.v_proj.weight"], whole[10:])


def test_the_same_spelling_on_both_sides_is_left() -> None:
    parts = experts()
    other = {name: array + 1 for name, array in parts.items()}
    assert untouched(parts, other) == ()
    assert untouched(fuse(parts), fuse(other)) == ()
    grown = fuse(experts(4))
    assert untouched(fuse(parts), grown) == ()
    # a part of the model moved, as in a model that also sees: that is for --rename
    text = {"model.layers.0.mlp.up_proj.weight": some(2, 2), "model.norm.weight": some(2)}
    seen = {name.replace("model.", "model.language_model."): a for name, a in text.items()}
    seen["model.visual.blocks.0.attn.qkv.weight"] = some(6, 2)
    assert untouched(text, seen) == ()


def _with(name: str, *shape: int) -> Callable[[Tensors], None]:
    return lambda parts: parts.update({name: some(*shape)})


@pytest.mark.parametrize(
    "spoil",
    [
        _with(f"{E}999999999999.gate_proj.weight", 4, 6),
        _with(f"{E}3.gate_proj.weight", 4, 6),
        _with(f"{E}1.gate_proj.weight", 3, 6),
        _with(f"{E}1.gate_proj.weight", 6, 4),
        _with(f"{E}1.gate_proj_weight", 4, 6),
        _with(f"{E}gate_projs.1.weight", 4, 6),
        _with(f"{E}01.gate_proj.weight", 4, 6),
    ],
)
def test_odd_parts(spoil: Callable[[Tensors], None]) -> None:
    parts = experts()
    fused = fuse(parts)
    spoil(parts)
    for base, tuned in ((parts, fused), (fused, parts)):
        result = unfuse(table_of(base), table_of(tuned))
        left, right = viewed(base, result.base), viewed(tuned, result.tuned)
        # Whatever does pair is right.
        for name in left.keys() & right.keys():
            if left[name].shape == right[name].shape:
                np.testing.assert_array_equal(left[name], right[name])
        # The down projections are as they should be.
        assert f"{E}0.down_proj.weight" in left.keys() & right.keys()


def test_names_that_are_taken() -> None:
    parts = experts()
    fused = fuse(parts)
    fused[f"{E}1.up_proj.weight"] = some(9)
    result = unfuse(table_of(parts), table_of(fused))
    assert result.tuned is not None
    assert f"{E}gate_up_proj" in result.tuned.names
    assert any("name" in note for note in result.notes)
    assert f"{E}1.down_proj.weight" in viewed(fused, result.tuned)


@pytest.mark.parametrize(
    ("fused", "shape", "why"),
    [
        ("attention.query_key_value.weight", (6, 5), "order of its rows"),
        ("attention.c_attn.weight", (5, 6), "order of its rows"),
        ("attention.wqkv.weight", (6, 5), "order of its rows"),
        ("attention.in_proj.weight", (6, 5), "order of its rows"),
        ("attention.qkv_proj.weight", (7, 5), "do not add up to it"),
        ("attention.qkv_proj.weight", (6, 4), "do not add up to it"),
    ],
)
def test_what_cannot_be_told_apart_is_left_with_a_note(
    fused: str, shape: tuple[int, ...], why: str
) -> None:
    apart = {f"{P}attention.{leaf}_proj.weight": some(2, 5) for leaf in "qkv"}
    (note,) = untouched(apart, {P + fused: some(*shape)})
    assert why in note
    assert fused in note


def test_rows_that_are_stored_head_by_head() -> None:
    home = P + "self_attn."
    apart = {f"{home}{leaf}_proj.weight": some(2, 5) for leaf in "qkv"}
    fused = {home + "qkv_proj.weight": some(6, 5)}
    gate = {home + "output_gate.weight": some(5, 5)}
    (note,) = untouched(apart | gate, fused | gate)
    assert "order of its rows" in note
    apart = {f"transformer.h.0.attn.{leaf}_proj.weight": some(2, 5) for leaf in "qkv"}
    assert untouched(apart, {"transformer.h.0.attn.qkv_proj.weight": some(6, 5)})


def test_dtypes() -> None:
    parts = experts()
    fused = fuse(parts)
    one, other = table_of(parts), table_of(fused, "BF16")
    other.nbytes //= 2
    assert unfuse(one, other).tuned is not None  # bfloat16 against float32 is compared by value
    one.dtypes[0] = "BF16"
    result = unfuse(one, other)
    assert any("several dtypes" in note for note in result.notes)
    for dtype in ("F4", "F6_E2M3"):
        assert unfuse(table_of(parts), table_of(fused, dtype)).tuned is None


def test_scales_go_with_their_weights() -> None:
    parts = experts()
    fused = fuse(parts)
    for n in range(3):
        for role in ("gate_proj", "up_proj", "down_proj"):
            parts[f"{E}{n}.{role}.weight_scale_inv"] = some(1, 1)
    every = [
        [parts[f"{E}{n}.{role}.weight_scale_inv"] for role in ("gate_proj", "up_proj")]
        for n in range(3)
    ]
    fused[E + "gate_up_proj_scale_inv"] = np.stack([np.concatenate(each) for each in every])
    fused[E + "down_proj_scale_inv"] = np.stack(
        [parts[f"{E}{n}.down_proj.weight_scale_inv"] for n in range(3)]
    )
    both_ways(parts, fused)


WORDS = """
    model layers experts mlp block_sparse_moe moe 0 1 2 00 gate_up_proj qkv_proj q_proj k_proj
    v_proj w1 w2 w3 w13 gate_proj up_proj down_proj gate weight bias shard_0 norm1 in_proj_weight
    in_proj_bias c_attn attention text_moe vision_moe
"""
NAMES = st.lists(
    st.lists(
        st.sampled_from([*WORDS.split(), "", "\n", "²", "x" * 300]),
        min_size=1,
        max_size=5,
    ).map(".".join),
    unique=True,
    max_size=20,
)
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_names_and_shapes(data: st.DataObject) -> None:
    sides = []
    for _ in range(2):
        names = data.draw(NAMES)
        sides.append({name: some(*data.draw(SHAPES)) for name in names})
    base, tuned = sides
    result = unfuse(table_of(base), table_of(tuned))
    left, right = viewed(base, result.base), viewed(tuned, result.tuned)
    # Nothing is lost or there twice, and what paired before still does, unless it is turned.
    for before, after in ((base, left), (tuned, right)):
        assert sum(a.size for a in before.values()) == sum(a.size for a in after.values())
        values = np.concatenate([a.reshape(-1) for a in after.values()] or [np.zeros(0)])
        assert len(np.unique(values)) == len(values)
    for name in base.keys() & tuned.keys():
        if base[name].shape == tuned[name].shape:
            assert left[name].shape == right[name].shape
    assert all("\n" not in note for note in result.notes)


@given(
    count=st.integers(1, 4),
    wide=st.integers(1, 4),
    hidden=st.integers(1, 6),
    turned=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_experts_of_any_size(count: int, wide: int, hidden: int, turned: bool) -> None:
    parts = experts(count, wide, hidden)
    fused = fuse(parts, turned=turned)
    result = unfuse(table_of(fused), table_of(parts))
    left = viewed(fused, result.base)
    assert set(left) == set(parts)
    for name, array in parts.items():
        np.testing.assert_array_equal(left[name], array)


def test_a_hundred_thousand_tensors() -> None:
    old: dict[str, tuple[int, ...]] = {}
    new: dict[str, tuple[int, ...]] = {}
    for layer in range(65):
        home = f"model.layers.{layer}."
        for n in range(512):
            for leaf, shape in (("w1", (2, 3)), ("w3", (2, 3)), ("w2", (3, 2))):
                old[f"{home}block_sparse_moe.experts.{n}.{leaf}.weight"] = shape
        new[home + "mlp.experts.gate_up_proj"] = (512, 4, 3)
        new[home + "mlp.experts.down_proj"] = (512, 3, 2)
    before = time.process_time()
    result = unfuse(_shapes(old), _shapes(new))
    assert result.tuned is not None
    assert len(result.tuned.parts) == len(old) == 99_840
    assert {part.name for part in result.tuned.parts} == set(old)
    assert time.process_time() - before < 60  # not a timing: what is quadratic takes an hour


def _shapes(shapes: dict[str, tuple[int, ...]]) -> TensorTable:
    size = [4 * int(np.prod(shape)) for shape in shapes.values()]
    return TensorTable(list(shapes), ["F32"] * len(shapes), list(shapes.values()), np.array(size))


def test_what_a_file_declares_takes_no_memory() -> None:
    fused = {E + "gate_up_proj": (10**9, 4, 3), E + "down_proj": (10**9, 3, 2)}
    parts: dict[str, tuple[int, ...]] = {}
    for n in range(3):
        parts |= {f"{E}{n}.gate_proj.weight": (2, 3), f"{E}{n}.up_proj.weight": (2, 3)}
        parts[f"{E}{n}.down_proj.weight"] = (3, 2)
    result = unfuse(_shapes(fused), _shapes(parts))
    assert result.base is None
    assert any("do not add up to it" in note for note in result.notes)
    long = {"vision_tower" * 100_000 + ".attention.wq.weight": (2, 3)}
    assert unfuse(_shapes(long), _shapes(parts)).base is None
