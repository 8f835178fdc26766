"""Which names mean several tensors in one, and what the parts are called.

A name is read as a *home* (what stands before its last parts), a *leaf* and a *tail*: what kind of
tensor of the leaf it is. ``model.layers.0.mlp.experts.gate_up_proj`` has the leaf ``gate_up_proj``
and the tail ``weight``, as if it ended in ``.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
    ("q_linear", "k_linear", "v_linear"),
    ("wq", "wk", "wv"),
)
_GATE_UP = (("gate_proj", "up_proj"), ("w1", "w3"))

#: parts that follow each other along the rows of the fused tensor (or, in a stack of experts, along
#: the rows of each), by the leaf of the fused one: each way to call the parts, in their order
ROWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "qkv_proj": _QKV,
    "Wqkv": _QKV,
    "w_qkv": _QKV,
    "qkv": _QKV,
    "att_proj": _QKV,
    "in_proj_": _QKV,  # torch.nn.MultiheadAttention: in_proj_weight and in_proj_bias
    "to_qkv": (("to_q", "to_k", "to_v"),),
    "to_kv": (("to_k", "to_v"),),
    "kv_proj": (("k_proj", "v_proj"),),
    "to_added_qkv": (("add_q_proj", "add_k_proj", "add_v_proj"),),
    "gqkv_proj": (("gate_proj", "q_proj", "k_proj", "v_proj"),),
    "fused_qkv_a_proj": (("q_a_proj", "kv_a_proj_with_mqa"),),
    "fused_qkv_a_proj_with_mqa": (("q_a_proj", "kv_a_proj_with_mqa"),),
    "conv1d": (("q_conv1d", "k_conv1d", "v_conv1d"),),
    "gate_up_proj": _GATE_UP,
    "gate_up": _GATE_UP,
    "w13": (("w1", "w3"), ("gate_proj", "up_proj")),
    "linear_fc1": (("gate_proj", "up_proj"),),
    "up_gate_proj": (("up_proj", "gate_proj"),),
    "ff_proj": (("up_proj", "gate_proj"),),
    "w12": (("gate_proj", "up_proj"), ("w1", "w2")),
    "weights_in": (("gate_proj", "up_proj"),),
    "gate_up_interleaved": (("gate_proj", "up_proj"),),
}

#: experts on top of each other, by the leaf of the fused tensor: as ``ROWS``, for each expert
STACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": _GATE_UP,
    "gate_up_interleaved": _GATE_UP,
    "w13": (("w1", "w3"), ("gate_proj", "up_proj")),
    "gate_proj": (("w1",),),
    "up_proj": (("w3",),),
    "down_proj": (("w2",),),
    "w1": (("gate_proj",),),
    "w2": (("down_proj",),),
    "w3": (("up_proj",),),
    "v1": (("w3",), ("up_proj",)),
}

#: leaves of which each name is right and the order of rows is not the same everywhere: by head, by
#: group, rotated, transposed. They are never taken apart.
UNSAFE: dict[str, tuple[tuple[str, ...], ...]] = {
    "query_key_value": _QKV,
    "linear_qkv": _QKV,
    "wqkv": _QKV,
    "c_attn": _QKV,
    "in_proj": _QKV,
    "in_proj_qkv": _QKV,
    "in_proj_qkvz": (("in_proj_qkv", "in_proj_z"),),
    "in_proj_ba": (("in_proj_b", "in_proj_a"),),
    "rotated_qkv": _QKV,
}
#: the parts of these are every second row (or column)
INTERLEAVED = frozenset({"gate_up_interleaved"})

_TAIL = re.compile(r"[._](weight|bias)((?:_scale(?:_inv)?)?)\Z|(_scale(?:_inv)?)\Z")
#: digits of an expert's number that is believed
_DIGITS = 9


class Reading(NamedTuple):
    """A name, taken apart."""

    home: str  #: what stands before the leaf, without the dot
    leaf: str
    tail: str  #: ``weight``, ``bias``, ``weight_scale_inv``, ...


class Share(NamedTuple):
    """Which of the numbers a stack has: those of one of so many equal stacks."""

    which: int  #: from 0
    of: int


Key = tuple[str, str, str]
WHOLE = Share(0, 1)
#: experts of two kinds that are numbered through where they are apart
HALVES = (".text_moe.experts", ".vision_moe.experts")


def read(name: str) -> Reading:
    """The parts of a name; every name has a reading."""
    if name.endswith(".weight"):  # nearly all of them, and quicker
        home, _, leaf = name[:-7].rpartition(".")
        return Reading(home, leaf, "weight") if leaf else Reading("", "weight", "weight")
    found = _TAIL.search(name)
    tail = "weight"
    if found is not None:
        kind, scale, alone = found.groups()
        tail = f"{kind}{scale}" if kind else f"weight{alone}"
        stem = name[: found.start()]
        if stem.endswith("in_proj") and name[found.start()] == "_":
            stem += "_"  # not the leaf of in_proj.weight, of which the order of rows is unknown
        if stem:
            name = stem
    home, _, leaf = name.rpartition(".")
    return Reading(home, leaf, tail)


def member(reading: Reading) -> tuple[Key, int] | None:
    """What a name is as one of a numbered row: the row's key, and its number.

    ``experts.3.w1.weight`` is number 3 of ``experts``, ``w1``; ``experts.w1s.3`` of ``experts``,
    ``w1s``; None where it is none, or has a number that nobody writes.
    """
    home, leaf, tail = reading
    front, _, number = home.rpartition(".")
    kind = leaf
    if leaf.isdigit():
        kind, number = number, leaf
    elif leaf.startswith("shard_"):
        front, kind, number = home, "shard", leaf[6:]
    if not plain(number):
        return None
    return (front, kind, tail), int(number)


def plain(number: str) -> bool:
    """Whether it is a number as programs write it: ASCII digits, no zeros in front, not absurd."""
    return (
        number.isdigit()
        and number.isascii()
        and len(number) <= _DIGITS
        and (number[0] != "0" or len(number) == 1)
    )


def rows_of(reading: Reading) -> Iterator[tuple[Key, ...]]:
    """The parts that a tensor of this name may have as rows: keys, for each way to call them."""
    for leaves in ROWS.get(reading.leaf, ()):
        yield tuple((reading.home, leaf, reading.tail) for leaf in leaves)


def stacks_of(reading: Reading) -> Iterator[tuple[tuple[Key, ...], Share]]:
    """The numbered rows that a tensor of this name may hold: keys of ``member``, for each way to
    call them, and which share of the numbers is its own."""
    home, leaf, tail = reading
    share = WHOLE
    for half, part in enumerate(HALVES):
        if home.endswith(part):
            home, share = home[: -len(part)] + ".experts", Share(half, 2)
    for leaves in STACKS.get(leaf, ()):
        yield tuple((home, each, tail) for each in leaves), share
    yield ((home, leaf, tail),), share
    yield ((home, f"{leaf}s", tail),), share


def shards_of(reading: Reading) -> Key:
    """The key of the shards that follow each other in a tensor of this name."""
    home, leaf, tail = reading
    return (f"{home}.{leaf}" if home else leaf, "shard", tail)


def unsafe_of(reading: Reading) -> Iterator[tuple[Key, ...]]:
    """As ``rows_of``, for tensors that are never taken apart."""
    for leaves in UNSAFE.get(reading.leaf, ()):
        yield tuple((reading.home, leaf, reading.tail) for leaf in leaves)
