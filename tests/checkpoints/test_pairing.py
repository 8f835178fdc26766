"""Pairing: names, renaming, globs, and what to say about the rest."""

from __future__ import annotations

import fnmatch
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckdiff.checkpoints.pairing import Pairing, natural_key, pair
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.errors import PairingError, UsageError
from ckdiff.naming import natural_sorted


def table(*names: str, **kinds: tuple[str, tuple[int, ...]]) -> TensorTable:
    """A table of ``names``, all BF16 [2], and of ``kinds``."""
    every = dict.fromkeys(names, ("BF16", (2,))) | kinds
    return TensorTable(
        list(every),
        [dtype for dtype, _ in every.values()],
        [shape for _, shape in every.values()],
        np.full(len(every), 4, np.int64),
    )


def reasons(pairing: Pairing) -> dict[str, str]:
    return {item.name: item.reason for item in pairing.unpaired}


# -- the order of names ----------------------------------------------------------------------------


def naive_parts(name: str) -> list[Any]:
    return [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", name))]


@given(st.lists(st.text("ab.0129", max_size=8), max_size=8))
def test_natural_order_is_the_order_of_the_parts(names: list[str]) -> None:
    expected = sorted(names, key=lambda name: (naive_parts(name), name))
    assert sorted(names, key=natural_key) == expected


@given(st.lists(st.text() | st.text("0\u0661\u00b2\u00bd\0\u096f", max_size=4), unique=True))
def test_natural_order_is_total(names: list[str]) -> None:
    expected = sorted(names, key=natural_key)
    random.shuffle(names)
    assert sorted(names, key=natural_key) == natural_sorted(names) == expected
    assert len({natural_key(name) for name in names}) == len(names)


@given(
    st.lists(
        st.sampled_from(["a", "\x7f", "10", "0", "1" * 127, "9" * 10, "\n", "\0"]), max_size=8
    ),
    st.integers(0, 3),
)
def test_many_names_are_sorted_as_one_is(parts: list[str], width: int) -> None:
    names = ["".join(parts[i : i + width]) for i in range(len(parts))]
    assert natural_sorted(names) == sorted(names, key=natural_key)
    many = [f"{name}{i % 11}" for i in range(300) for name in names]
    assert natural_sorted(many) == sorted(many, key=natural_key)


def test_natural_order_of_layers_and_odd_numbers() -> None:
    names = ["l.10", "l.9", "l.2.b", "l.2", "l", "l.1" + "0" * 6000, "l.9" + "0" * 5999, "l.02"]
    assert sorted(names, key=natural_key) == [
        "l", "l.02", "l.2", "l.2.b", "l.9", "l.10", "l.9" + "0" * 5999, "l.1" + "0" * 6000,
    ]  # fmt: skip


# -- pairing ---------------------------------------------------------------------------------------


def test_pairs_in_natural_order_whatever_the_tables_order() -> None:
    got = pair(table("l.10", "l.9", "x", "l.2"), table("x", "l.2", "l.9", "l.10"))
    assert got.names == ["l.2", "l.9", "l.10", "x"]
    assert got.base_index.tolist() == [3, 1, 0, 2]
    assert got.tuned_index.tolist() == [1, 2, 3, 0]
    assert got.base_index.dtype == got.tuned_index.dtype == np.int64
    assert (got.unpaired, got.excluded, got.hint, got.warnings) == ([], 0, None, [])
    assert len(got) == 4


def test_why_tensors_are_not_paired() -> None:
    base = table("same", gone=("F32", (1,)), s=("F32", (1, 2)), t=("F32", (3,)), both=("F32", ()))
    tuned = table("same", new=("F32", (4,)), s=("F32", (2, 1)), t=("F16", (3,)), both=("I8", (1,)))
    got = pair(base, tuned)
    assert got.names == ["same"]
    assert [(u.name, u.reason, u.detail) for u in got.unpaired] == [
        (
            "both",
            "reshaped",
            {"base_dtype": "F32", "base_shape": [], "tuned_dtype": "I8", "tuned_shape": [1]},
        ),
        ("gone", "removed", {"base_dtype": "F32", "base_shape": [1]}),
        ("new", "added", {"tuned_dtype": "F32", "tuned_shape": [4]}),
        (
            "s",
            "reshaped",
            {
                "base_dtype": "F32",
                "base_shape": [1, 2],
                "tuned_dtype": "F32",
                "tuned_shape": [2, 1],
            },
        ),
        (
            "t",
            "retyped",
            {"base_dtype": "F32", "base_shape": [3], "tuned_dtype": "F16", "tuned_shape": [3]},
        ),
    ]


small = st.lists(st.sampled_from(["a", "b", "a.1", "b.1", "b.2", "c"]), unique=True, max_size=6)
globs = st.lists(st.sampled_from(["*", "a*", "*.1", "?", "[!a]*", "b.[12]", "zz"]), max_size=2)


@given(base=small, tuned=small, include=globs, exclude=globs)
def test_against_the_obvious_way(
    base: list[str], tuned: list[str], include: list[str], exclude: list[str]
) -> None:
    def kept(name: str) -> bool:
        wanted = not include or any(fnmatch.fnmatchcase(name, glob) for glob in include)
        return wanted and not any(fnmatch.fnmatchcase(name, glob) for glob in exclude)

    both = {name for name in base if name in tuned and kept(name)}
    every = set(base) | set(tuned)
    if not both:
        with pytest.raises(PairingError):
            pair(table(*base), table(*tuned), include=include, exclude=exclude)
        return
    got = pair(table(*base), table(*tuned), include=include, exclude=exclude)
    assert got.names == sorted(both, key=natural_key)
    assert [base[i] for i in got.base_index] == got.names
    assert [tuned[i] for i in got.tuned_index] == got.names
    assert reasons(got) == {
        name: "added" if name in tuned else "removed"
        for name in every
        if kept(name) and name not in both
    }
    assert got.excluded == sum(not kept(name) for name in every)
    dead = {g for g in include + exclude if not any(fnmatch.fnmatchcase(n, g) for n in every)}
    assert all(any(repr(glob) in warning for warning in got.warnings) for glob in dead)
    assert bool(got.warnings) == bool(dead)


def test_globs_are_case_sensitive_and_exclude_wins() -> None:
    both = table("A.w", "a.w", "a.b")
    got = pair(both, both, include=["a.*"], exclude=["*.b", "nothing*"])
    assert (got.names, got.excluded, got.unpaired) == (["a.w"], 2, [])
    assert got.warnings == ["--exclude 'nothing*' matches no tensor of either checkpoint"]


# -- renaming --------------------------------------------------------------------------------------


def test_renaming_is_applied_to_tuned_in_order() -> None:
    base = table("a.x", "m.b")
    got = pair(base, table("m.A.x", "m.b"), rename=[r"^m\.(A)=\1", "^A=a"])
    assert got.names == ["a.x", "m.b"]


def test_renaming_is_split_at_the_last_equals_sign() -> None:
    assert pair(table("w"), table("a=w"), rename=["^a==", "^$="]).names == ["w"]


def test_globs_see_the_new_names() -> None:
    base, tuned = table("a.x", "b.x"), table("m.a.x", "m.b.x")
    got = pair(base, tuned, rename=[r"^m\.="], exclude=["b.*"])
    assert (got.names, got.excluded) == (["a.x"], 1)


@pytest.mark.parametrize(
    "item", ["", "abc", "(=x", r"a=\9", r"a=\g<x>", r"a=\g<", "*=", "a{=" + "\\"]
)
def test_renamings_that_cannot_be_read(item: str) -> None:
    with pytest.raises(UsageError, match="renaming") as caught:
        pair(table("a"), table("a"), rename=[item])
    assert caught.value.hint


def test_a_collision_names_both() -> None:
    with pytest.raises(PairingError, match=r"'m\.a' and 'n\.a' the name 'a'"):
        pair(table("a"), table("m.a", "n.a"), rename=[r"^.\.="])


# -- hints -----------------------------------------------------------------------------------------

MODEL = ["model.embed.weight", *(f"model.layers.{i}.w" for i in range(40)), "lm_head.weight"]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model.", "model.",
                                     "module._orig_mod.", "base_model.model.model."])  # fmt: skip
def test_a_wrapper_on_either_side_gets_the_exact_option(wrapper: str) -> None:
    wrapped = [wrapper + name for name in MODEL]
    for base, tuned in ((MODEL, wrapped), (wrapped, MODEL)):
        with pytest.raises(PairingError, match="only in base") as caught:
            pair(table(*base), table(*tuned))
        option = re.search(r"--rename '([^']*)'", caught.value.hint or "")
        assert option is not None
        assert pair(table(*base), table(*tuned), rename=[option[1]]).names == sorted(
            base, key=natural_key
        )


def test_the_exact_text_of_a_hint() -> None:
    for base, tuned, option in (
        ("a", "module.a", r"--rename '^module\.='"),
        ("module.a", "a", "--rename '^=module.'"),
        ("_orig_mod.a", "module.a", r"--rename '^module\.=_orig_mod.'"),
    ):
        with pytest.raises(PairingError) as caught:
            pair(table(base), table(tuned))
        assert (caught.value.hint or "").startswith(option)


def test_wrappers_inside_names_are_taken_out_by_one_option() -> None:
    wrapped = [
        name.replace("model.", "_fsdp_wrapped_module.model.").replace(
            ".w", "._fsdp_wrapped_module._checkpoint_wrapped_module.w"
        )
        for name in MODEL
    ]
    with pytest.raises(PairingError) as caught:
        pair(table(*MODEL), table(*wrapped))
    option = re.search(r"--rename '([^']*)' would pair 42 of 42", caught.value.hint or "")
    assert option is not None
    got = pair(table(*MODEL), table(*wrapped), rename=[option[1]])
    assert got.names == sorted(MODEL, key=natural_key)


def test_a_model_that_an_adapter_wraps_needs_two_options() -> None:
    wrapped = ["base_model.model." + name.replace(".w", ".base_layer.w") for name in MODEL[:-1]]
    adapter = [f"base_model.model.model.layers.{i}.lora_A.default.weight" for i in range(40)]
    with pytest.raises(PairingError) as caught:
        pair(table(*MODEL), table("base_model.model.lm_head.weight", *wrapped))
    options = re.findall(r"--rename '([^']*)'", caught.value.hint or "")
    assert options == [r"^base_model\.model\.=", r"base_layer\.="]
    got = pair(table(*MODEL), table("base_model.model.lm_head.weight", *wrapped), rename=options)
    assert got.names == sorted(MODEL, key=natural_key)
    with pytest.raises(PairingError) as caught:  # with the adapter's own tensors it is the same
        pair(table(*MODEL), table("base_model.model.lm_head.weight", *wrapped, *adapter))
    assert re.findall(r"--rename '([^']*)'", caught.value.hint or "") == options


def test_only_some_layers_are_wrapped() -> None:
    wrapped = [re.sub(r"layers\.(\d*[05])\.", r"layers.\1._wrapped.", name) for name in MODEL]
    hint = pair(table(*MODEL), table(*wrapped)).hint
    assert hint == r"--rename '_wrapped\.=' would pair 42 of 42 names"


def test_names_whose_shapes_differ_are_not_what_a_renaming_pairs() -> None:
    base = table(**{f"h.{part}.w": ("F32", (8, 8)) for part in "qkv"}, n=("F32", (2,)))
    fused = table(**{"h.qkv.w": ("F32", (24, 8))}, n=("F32", (2,)))
    assert pair(base, fused).hint is None


def test_a_hint_when_little_is_paired_and_one_head_is_left_over() -> None:
    inner = [name.removeprefix("model.") for name in MODEL]
    for base, tuned, option in (
        (MODEL, inner, "--rename '^=model.' would pair 41 of 42 names"),
        (inner, MODEL, r"--rename '^model\.=' would pair 42 of 42 names"),
    ):
        got = pair(table(*base), table(*tuned))
        assert got.names == ["lm_head.weight"]
        assert got.hint == option


def test_no_hint_where_it_would_not_help() -> None:
    assert pair(table("a", "b", "model.c"), table("a", "b", "c")).hint is None
    with pytest.raises(PairingError) as caught:
        pair(table("a", "b"), table("module.x", "module.y"))
    assert "--rename" not in (caught.value.hint or "")


# -- nothing to compare ----------------------------------------------------------------------------


def test_nothing_comparable_says_what_is_there() -> None:
    def message(base: TensorTable, tuned: TensorTable, **options: Any) -> str:
        with pytest.raises(PairingError, match="nothing to compare") as caught:
            pair(base, tuned, **options)
        assert caught.value.hint
        return str(caught.value)

    text = message(table("a", "b"), table("c"))
    assert "between 2 and 1 tensors: 2 only in base, 1 only in tuned" in text
    text = message(table(w=("F32", (2,))), table(w=("BF16", (2,))))
    assert "1 of another dtype; 'w' is F32 [2] in base and BF16 [2] in tuned" in text
    assert "1 of another shape" in message(table(w=("F32", (2,))), table(w=("F32", (3,))))
    assert "1 excluded" in message(table("w"), table("w"), include=["x"])
    assert "between 0 and 0 tensors" in message(table(), table())


def test_a_hundred_thousand_names() -> None:
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.weight" for i in range(100_000)]
    shuffled = random.Random(1).sample(names, len(names))
    got = pair(table(*shuffled), table(*names))
    assert got.names == names
    assert got.tuned_index.tolist() == list(range(len(names)))


def test_a_renaming_that_changes_nothing_is_said() -> None:
    found = pair(table("a", "b"), table("a", "b"), rename=[r"^module\.=", "b=b"])
    assert found.warnings == [
        r"--rename ^module\.= changes no name",
        "--rename b=b changes no name",
    ]


def test_what_to_do_where_nothing_is_compared() -> None:
    def hint(base: TensorTable, tuned: TensorTable, **options: Any) -> str:
        with pytest.raises(PairingError) as caught:
            pair(base, tuned, **options)
        return caught.value.hint or ""

    one = table(**{"l.0.w": ("F32", (4, 4)), "l.1.w": ("F32", (4, 4))})
    other = table(**{"l.0.w": ("F32", (8, 6)), "l.1.w": ("F32", (8, 6))})
    assert "another model" in hint(one, other)
    assert "*embed*" in hint(one, one, include=["embed"])
    assert "--exclude" in hint(one, one, exclude=["*"])
    packed = table(**{"l.0.w": ("I8", (4, 4)), "l.1.w": ("I8", (4, 4))})
    assert "--dequantize" in hint(one, packed)
    lora = table("m.lora_A.weight", "m.lora_B.weight")
    assert "--tuned-adapter" in hint(one, lora)
    assert pair(lora, lora).hint is None
