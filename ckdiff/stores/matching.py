"""Several mask stores side by side: the tensors they share, where each holds them, what differs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.errors import PairingError, UsageError, printable
from ckdiff.layout import Layout
from ckdiff.naming import natural_key
from ckdiff.rules import Rule
from ckdiff.stores.maskstore import MaskStore, open_store
from ckdiff.stores.maskstream import MaskSource
from ckdiff.stores.objects import array_path, object_keys, objects_folder
from ckdiff.stores.table import UNKNOWN, content_of, is_content_hash
from ckdiff.stores.tally import Said

IntArray = npt.NDArray[np.int64]
StorePath = str | os.PathLike[str] | MaskStore

MOST_STORES = 64


@dataclass(slots=True, eq=False)
class Matched:
    """Some stores, one rule, and the tensors that all of them have."""

    stores: list[MaskStore]
    rule: str
    names: list[str]  #: of the shared tensors, in layout order
    dtypes: list[str]  #: of the first store
    shapes: list[tuple[int, ...]]
    positions: IntArray  #: (stores, tensors): where each store's table has the tensor
    changed: IntArray  #: (stores, tensors)
    layout: Layout  #: of the shared tensors
    starts: IntArray  #: (stores, tensors): byte of each store's flat mask where the tensor begins
    left_out: list[dict[str, Any]] = field(default_factory=list)
    #: shared tensors whose base content is not the same in all stores
    other_base: list[str] = field(default_factory=list)
    #: those of which that is not known, because a store did not read them
    unknown_base: list[str] = field(default_factory=list)
    #: (stores, tensors): content hashes of the base as the stores recorded them
    recorded: list[list[str]] = field(default_factory=list)
    #: shared tensors of which some store compared the first rows only: the most that any base has,
    #: and any tuned side; their masks have one shape all the same
    resized: dict[int, tuple[int, int]] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """What a user should know about stores that differ."""
        left_out = [str(entry["name"]) for entry in self.left_out]
        if left_out:
            tensors, are = ("tensor", "is") if len(left_out) == 1 else ("tensors", "are")
            yield (
                f"warning: {len(left_out):,} {tensors} {are} not in all stores with one shape and "
                f"{are} left out: {several(left_out)}"
            )
        if self.other_base:
            yield (
                f"warning: the stores have different bases: {len(self.other_base):,} of "
                f"{len(self.names):,} shared tensors differ in content"
            )
        if self.unknown_base:
            yield f"warning: {self._unknown()} (diff --verify does)"

    def require_one_base(self) -> None:
        """Raise PairingError unless all stores are known to have one base."""
        hint = "leave out --require-same-base to compare them all the same"
        if self.other_base:
            raise PairingError(
                f"the stores have different bases: {several(self.other_base)}", hint=hint
            )
        if self.unknown_base:
            raise PairingError(self._unknown(), hint="make them with diff --verify, or " + hint)

    def _unknown(self) -> str:
        return (
            f"whether the stores have one base is not known for {len(self.unknown_base):,} of "
            f"{len(self.names):,} shared tensors, which not every run read"
        )

    def base_hash(self, tensor: int) -> str:
        """The content hash of a shared tensor's base, from the stores that have it; UNKNOWN where
        none has, or where they disagree. It covers the rows that the masks have.
        """
        recorded = (hashes[tensor] for hashes in self.recorded)
        found = {content_of(text) for text in recorded if is_content_hash(text)}
        return found.pop() if len(found) == 1 else UNKNOWN

    def said(self) -> Said:
        """What the stores say of the tensors, for whoever walks all of them."""
        return Said(self.layout, self.sources(), self.names, self.changed)

    def sources(self) -> list[MaskSource]:
        """The masks, as another process can be told of them."""
        found = []
        for store in self.stores:
            keys = object_keys(self.rule, store.manifest["layout"]["addresses"] // 8)
            found.append(
                MaskSource(
                    f"{os.path.abspath(store.path)}/{objects_folder(self.rule)}",
                    printable(f"{store.path}/{array_path(self.rule)}"),
                    tuple(store.objects[key] for key in keys),
                )
            )
        return found


def match(
    paths: Sequence[StorePath],
    rule: str | Rule | None = None,
    *,
    least: int = 2,
    require_same_base: bool = False,
) -> Matched:
    """Open stores and find what they share.

    Tensors are matched by name and shape. Raises UsageError for too few or too many stores, and
    where the stores hold masks of different rules and none is named; PairingError where nothing is
    shared, or with ``require_same_base`` where bases differ.
    """
    stores = _opened(paths, least)
    text = common_rule(stores, rule)
    tables = [store.table for store in stores]
    shared, left_out = _shared(stores)
    if not shared:
        raise PairingError(
            "the stores have no tensor in common",
            hint="were they made from the same model? see ckdiff show --by tensor",
        )
    shared.sort(key=natural_key)
    positions = np.array([[table.find(name) for name in shared] for table in tables], np.int64)
    columns = list(zip(tables, positions, strict=True))
    first, places = columns[0]
    matched = Matched(
        stores,
        text,
        shared,
        [first.dtypes[i] for i in places],
        [first.shapes[i] for i in places],
        positions,
        np.stack([table.changed[text][index] for table, index in columns]),
        Layout(first.elements[places]),
        np.stack([table.starts[index] // 8 for table, index in columns]),
        left_out,
    )
    matched.resized = _resized(matched)
    _compare_bases(matched)
    if require_same_base:
        matched.require_one_base()
    return matched


def _opened(paths: Sequence[StorePath], least: int) -> list[MaskStore]:
    if isinstance(paths, (str, os.PathLike, MaskStore)):
        raise UsageError("give a list of stores, not a single one")
    paths = list(paths)
    if not least <= len(paths) <= MOST_STORES:
        wanted = f"{least} to {MOST_STORES} stores are compared, not {len(paths)}"
        raise UsageError(wanted, hint="name every store once")
    return [open_store(path) for path in paths]


def _resized(matched: Matched) -> dict[int, tuple[int, int]]:
    found: dict[int, tuple[int, int]] = {}
    for store, index in zip(matched.stores, matched.positions, strict=True):
        if not store.table.resized:
            continue
        for i, position in enumerate(index.tolist()):
            rows = store.table.resized.get(position)
            if rows is not None:
                before = found.get(i, rows)
                found[i] = max(rows[0], before[0]), max(rows[1], before[1])
    return found


def _compare_bases(matched: Matched) -> None:
    columns = zip(matched.stores, matched.positions, strict=True)
    matched.recorded = [[s.table.base_hashes[i] for i in index] for s, index in columns]
    whole = {_content_of_base(store) for store in matched.stores}
    one_base = len(whole) == 1 and None not in whole
    for name, *hashes in zip(matched.names, *matched.recorded, strict=True):
        contents = set(map(content_of, hashes))
        different = len(set(filter(is_content_hash, contents))) > 1
        same = one_base or (len(contents) == 1 and hashes[0] != UNKNOWN)
        if different:
            matched.other_base.append(name)
        elif not same:
            matched.unknown_base.append(name)


def _content_of_base(store: MaskStore) -> tuple[tuple[str, str], ...] | None:
    """The base's files by name and content hash, or None where one has no hash."""
    side = store.manifest.get("base")
    listed = side.get("files") if isinstance(side, dict) else None
    if not isinstance(listed, list) or not listed:
        return None
    found = []
    for file in listed:
        if not isinstance(file, dict) or not file.get("content"):
            return None
        found.append((str(file.get("name")), str(file["content"])))
    return tuple(sorted(found))


def common_rule(stores: list[MaskStore], rule: str | Rule | None) -> str:
    """The rule whose masks are read; every store must have one."""
    if rule is not None:
        text = str(Rule.parse(rule))
    else:
        common = [text for text in stores[0].masks if all(text in s.masks for s in stores)]
        every = {text for store in stores for text in store.masks}
        if "exact" in common:
            text = "exact"
        elif len(common) == 1 and len(every) == 1:
            text = common[0]
        else:
            held = "; ".join(f"{printable(str(s.path))}: {', '.join(s.masks)}" for s in stores)
            raise UsageError(
                f"the stores hold masks of different rules: {held}",
                hint="name the one to compare with --rule",
            )
    for store in stores:
        if text not in store.masks:
            raise UsageError(
                f"{printable(str(store.path))} has no mask for the rule {text}",
                hint=f"it has {', '.join(store.masks) or 'none'}",
            )
    return text


def _shared(stores: list[MaskStore]) -> tuple[list[str], list[dict[str, Any]]]:
    """(names that all stores have with one shape, what is left out and why)."""
    tables = [store.table for store in stores]
    shapes = [dict(zip(table.names, table.shapes, strict=True)) for table in tables]
    shared, left_out = [], []
    for name in dict.fromkeys(name for table in tables for name in table.names):
        found = [shape.get(name) for shape in shapes]
        missing = [i for i, shape in enumerate(found) if shape is None]
        if missing:
            left_out.append({"name": name, "reason": "missing", "stores": missing})
        elif any(shape != found[0] for shape in found):
            left_out.append(
                {"name": name, "reason": "reshaped", "shapes": [list(s or ()) for s in found]}
            )
        else:
            shared.append(name)
    left_out.sort(key=lambda entry: natural_key(str(entry["name"])))
    return shared, left_out


def misfit(
    side: str,
    name: str,
    found: tuple[int, ...] | None,
    wanted: tuple[int, ...],
    *,
    resized: bool = False,
) -> str | None:
    """Why a mask of shape ``wanted`` has no place in a tensor of shape ``found``, or None.

    One that is ``resized`` is that of the first rows of a tensor that may have more.
    """
    if resized and found is not None and first_rows(found, wanted):
        return None
    if found is None:
        return f"{side} lacks {printable(name)}"
    if found != wanted:
        return f"{printable(name)} is {list(found)} in {side} and {list(wanted)} in the store"
    return None


def first_rows(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether the first rows of a tensor of ``shape`` can have the shape ``wanted``."""
    same = shape[1:] == wanted[1:] and len(shape) == len(wanted) > 0
    return same and shape[0] >= wanted[0]


def several(names: list[str]) -> str:
    """The first few of some names, and how many there are besides."""
    shown = ", ".join(printable(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3:,} more"
