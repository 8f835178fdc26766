"""Projections that one side has as one tensor and the other as several: q, k, v; gate, up.

Inference engines and some models (Phi-3) store ``qkv_proj`` where most checkpoints have ``q_proj``,
``k_proj`` and ``v_proj``. Under these names the parts lie one after the other along dimension 0.
Other names (``c_attn``, ``query_key_value``, ``Wqkv``) stand for several layouts, which a shape
cannot tell apart; they are not guessed.

Only names and shapes here, no tensors. Names are plain ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ckdiff.errors import printable
from ckdiff.training.source import Piece

Shape: TypeAlias = tuple[int, ...]

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
#: the module a fused projection must be in, where the name alone has two layouts: CodeGen's
#: ``attn.qkv_proj`` holds four groups of q, v, k
_WITHIN = {"qkv_proj": "self_attn"}
_UNTOLD = {"Wqkv", "c_attn", "in_proj_bias", "in_proj_weight", "qkv", "query_key_value", "wqkv"}
_SINGLE = {
    "gate_proj", "k", "k_proj", "key", "q", "q_proj", "query", "up_proj", "v", "v_proj", "value",
    "wk", "wq", "wv",
}  # fmt: skip


@dataclass(slots=True)
class Fit:
    """What fused names explain."""

    pieces: dict[str, list[Piece]] = field(default_factory=dict)  #: by weight, in order
    #: weights and masks that have been spoken of, in a match or in a problem
    weights: set[str] = field(default_factory=set)
    masks: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def match(weights: Mapping[str, Shape], masks: Mapping[str, Shape]) -> Fit:
    """Match the weights and masks that nothing else has matched, where fused names tell how."""
    found = Fit()
    for whole, parts in _sites(weights):
        if _complete(found, whole, parts, masks, f"{printable(whole)}: no mask of"):
            found.weights.add(whole)
            shapes = [masks[part] for part in parts]
            if _adds_up(shapes, weights[whole]):
                found.pieces[whole] = [
                    Piece(part, 0, math.prod(shape))
                    for part, shape in zip(parts, shapes, strict=True)
                ]
            else:
                found.problems.append(_unequal(whole, weights[whole], "model", shapes, "masks"))
            found.masks.update(parts)
    for whole, parts in _sites(masks):
        if _complete(found, whole, parts, weights, f"the mask {printable(whole)}: no parameter"):
            found.masks.add(whole)
            shapes = [weights[part] for part in parts]
            if _adds_up(shapes, masks[whole]):
                at = 0
                for part, shape in zip(parts, shapes, strict=True):
                    found.pieces[part] = [Piece(whole, at, at + math.prod(shape))]
                    at += math.prod(shape)
            else:
                found.problems.append(_unequal(whole, masks[whole], "masks", shapes, "model"))
            found.weights.update(parts)
    return found


def untold(weights: Collection[str], masks: Collection[str]) -> list[str]:
    """Fused names that were left over and have separate counterparts in the same layer."""
    found = []
    for here, there in ((weights, masks), (masks, weights)):
        single = {_layer(name) for name in there if _leaf(name) in _SINGLE}
        found += [
            f"{printable(name)}: in which order it holds its parts cannot be told from its name"
            for name in here
            if _layer(name) in single
            and (_leaf(name) in _UNTOLD or (_leaf(name) in _PARTS and not _told(name)))
        ]
    return found


def _sites(names: Mapping[str, Shape]) -> Iterator[tuple[str, list[str]]]:
    """The fused names among ``names``, each with those of its parts."""
    for name in names:
        if _told(name):
            path, leaf, kind = _split(name)
            yield name, [".".join([*path, part, kind]) for part in _PARTS[leaf]]


def _told(name: str) -> bool:
    """Whether the name tells how the parts lie: those of experts, in one tensor, do not."""
    path, leaf, kind = _split(name)
    return leaf in _PARTS and kind != "" and path[-1:] == [_WITHIN.get(leaf, *path[-1:])]


def _split(name: str) -> tuple[list[str], str, str]:
    """``a.b.q_proj.weight`` -> ``[a, b]``, ``q_proj``, ``weight``."""
    *path, leaf = name.split(".")
    if leaf in ("weight", "bias") and path:
        return path[:-1], path[-1], leaf
    return path, leaf, ""


def _leaf(name: str) -> str:
    return _split(name)[1]


def _layer(name: str) -> str:
    """The name up to its first number."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _complete(
    found: Fit, whole: str, parts: list[str], others: Mapping[str, Shape], words: str
) -> bool:
    """Whether all parts are there; some but not all is a problem, none is no business of ours."""
    there = [part for part in parts if part in others]
    if there and len(there) < len(parts):
        lacking = ", ".join(_leaf(part) for part in parts if part not in others)
        found.problems.append(f"{words} {lacking} for {', '.join(map(_leaf, there))}")
        found.weights.update([whole, *there])
        found.masks.update([whole, *there])
    return len(there) == len(parts)


def _adds_up(parts: list[Shape], whole: Shape) -> bool:
    """Whether the parts lie along dimension 0 of the whole."""
    return (
        len(whole) > 0
        and all(part[1:] == whole[1:] and len(part) == len(whole) for part in parts)
        and sum(part[0] for part in parts) == whole[0]
    )


def _unequal(whole: str, shape: Shape, here: str, parts: list[Shape], there: str) -> str:
    names = ", ".join(_PARTS[_leaf(whole)])
    shapes = ", ".join(str(list(part)) for part in parts)
    return f"{printable(whole)} is {list(shape)} in the {here}, {names} are {shapes} in the {there}"
