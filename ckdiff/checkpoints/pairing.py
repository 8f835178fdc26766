"""Two checkpoints -> what can be compared, and why the rest cannot."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ckdiff.checkpoints.prefixes import Fit, as_option, best_renaming
from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.dtypes import DTYPES, common
from ckdiff.errors import PairingError, UsageError
from ckdiff.naming import natural_key, natural_sorted

__all__ = ["Pairing", "Reason", "Unpaired", "natural_key", "pair"]

Reason = Literal["added", "removed", "missing", "reshaped", "retyped"]
REASONS: tuple[Reason, ...] = ("added", "removed", "missing", "reshaped", "retyped")


@dataclass(frozen=True, slots=True)
class Unpaired:
    """A tensor that is not compared."""

    name: str  #: after renaming
    reason: Reason
    #: ``base_dtype``, ``base_shape``, ``tuned_dtype``, ``tuned_shape`` as far as they exist
    detail: dict[str, Any]


@dataclass(slots=True)
class Pairing:
    """Which tensors are compared, in natural order of their names; columns of equal length."""

    names: list[str]  #: after renaming
    base_index: IntArray  #: position in the base's table
    tuned_index: IntArray  #: position in the tuned table
    unpaired: list[Unpaired]  #: in natural order
    excluded: int  #: distinct names that the globs left out
    hint: str | None  #: what would pair more
    warnings: list[str]  #: one line each
    #: for pairs of two float dtypes, by position: the dtype by whose values they are compared
    retyped: dict[int, str] = field(default_factory=dict)
    #: for pairs of which only the first rows are compared, by position: the rows of both
    resized: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def shapes(self, base: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """What is compared of each pair; ``base`` are the shapes of the base's table."""
        found = [base[i] for i in self.base_index.tolist()]
        for position, rows in self.resized.items():
            found[position] = (min(rows), *found[position][1:])
        return found


@dataclass(frozen=True, slots=True)
class Matching:
    """What counts as a pair besides tensors of one dtype and one shape."""

    by_value: bool = False  #: two float dtypes, whose values are compared in one that holds both
    common_rows: bool = False  #: two shapes with other first dimensions: the rows that both have


def pair(
    base: TensorTable,
    tuned: TensorTable,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    matching: Matching | None = None,
    options: bool = True,
) -> Pairing:
    """Pair the tensors of two checkpoints by name.

    ``rename`` items ``REGEX=REPL`` are applied to the tuned names in order; the globs then select
    among the names of both sides, and ``exclude`` wins. Without ``options`` the caller has none of
    a diff's, and no hint names one. Raises UsageError for a renaming that
    cannot be read, and PairingError where two names collide or nothing can be compared.
    """
    matching = matching or Matching()
    tuned_names, unused = renamed(tuned.names, rename)
    in_base = {name: i for i, name in enumerate(base.names)}
    in_tuned = {name: i for i, name in enumerate(tuned_names)}
    absent = set(base.absent) | set(_renamed(tuned.absent, rename)[0])
    every = list(in_base)
    every += [name for name in tuned_names if name not in in_base]
    every += sorted(absent.difference(in_base, in_tuned), key=natural_key)
    names, warnings = _selected(every, include, exclude)
    warnings = [*unused, *warnings]
    excluded = len(every) - len(names)

    found = Pairing([], _NONE, _NONE, [], excluded, None, warnings)
    indexes: list[tuple[int, int]] = []
    for name in natural_sorted(names):
        i, j = in_base.get(name), in_tuned.get(name)
        reason: Reason | None
        if i is None or j is None:
            reason = "missing" if name in absent else "added" if i is None else "removed"
        elif base.shapes[i] == tuned.shapes[j] and base.dtypes[i] == tuned.dtypes[j]:
            reason = None
        else:
            reason = _pair(found, base, i, tuned, j, matching)
        if reason is None:
            assert i is not None
            assert j is not None
            found.names.append(name)
            indexes.append((i, j))
            continue
        detail = _side("base", base, i) | _side("tuned", tuned, j)
        found.unpaired.append(Unpaired(name, reason, detail))

    if found.unpaired or excluded:  # else all names of both sides pair

        def fit(one: str, other: str) -> bool:
            return _alike(base.shapes[in_base[one]], tuned.shapes[in_tuned[other]])

        found.hint = _hint(found.unpaired, in_base, in_tuned, fit, options)
    if not indexes:
        raise _nothing(base, tuned, found, options)
    found.base_index, found.tuned_index = np.array(indexes, np.int64).T.copy()
    if emptied := _placeholders(found.unpaired):
        found.warnings.append(f"{emptied[0]} ({emptied[1]})")
    return found


#: names that only PEFT's adapters have
_ADAPTER = re.compile(
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.|$)|\.(vera|ia3|oft)_"
)
_WRAPPED = "base_model."  # what PEFT puts before all names
_KEPT = ".base_layer."  # the base's own tensors, where a wrapped model was saved whole
_NONE: IntArray = np.zeros(0, np.int64)


def _pair(
    found: Pairing, base: TensorTable, i: int, tuned: TensorTable, j: int, matching: Matching
) -> Reason | None:
    """Why two tensors of one name are not compared, or None: then ``found`` knows how they are."""
    position = len(found.names)
    one, other = base.dtypes[i], tuned.dtypes[j]
    rows = base.shapes[i] != tuned.shapes[j]
    if rows and not (matching.common_rows and _common_rows(base, i, tuned, j)):
        return "reshaped"
    if one != other:
        wide = common(one, other) if matching.by_value else None
        if wide is None:
            return "retyped"
        found.retyped[position] = wide
    if rows:
        found.resized[position] = base.shapes[i][0], tuned.shapes[j][0]
    return None


def _common_rows(base: TensorTable, i: int, tuned: TensorTable, j: int) -> bool:
    """Whether two tensors differ in their first dimension only, and have rows in common."""
    one, other = base.shapes[i], tuned.shapes[j]
    if not one or not other or one[1:] != other[1:] or not min(one[0], other[0]):
        return False
    # rows of less than whole bytes do not end where bytes do
    return all(side.nbytes[at] * min(one[0], other[0]) % side.shapes[at][0] == 0
               for side, at in ((base, i), (tuned, j)))  # fmt: skip


def renamed(names: list[str], rename: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names after each ``REGEX=REPL`` in order, and a warning for each that changes none.

    Raises UsageError for one that cannot be read, and PairingError where two names collide.
    """
    found, unused = _renamed(names, rename)
    if len(set(found)) != len(found):
        raise _collision(names, found)
    return found, unused


def _renamed(names: list[str], rename: Sequence[str]) -> tuple[list[str], list[str]]:
    """The new names, and a warning for each renaming that changes none."""
    warnings = []
    for item in rename:
        pattern, equals, replacement = item.rpartition("=")
        if not equals:
            raise UsageError(f"cannot read the renaming {item!r}", hint="write it as REGEX=REPL")
        try:
            sub = re.compile(pattern).sub
            sub(replacement, "")  # a bad replacement is only noticed when it is used
            before, names = names, [sub(replacement, name) for name in names]
        except (re.error, IndexError, OverflowError, RecursionError) as error:
            raise UsageError(
                f"the renaming {item!r} is not a valid regular expression: {error}",
                hint="write it as REGEX=REPL in the syntax of Python's re.sub",
            ) from None
        if names == before:
            warnings.append(f"--rename {item} changes no name")
    return names, warnings


def _collision(originals: list[str], renamed: list[str]) -> PairingError:
    first: dict[str, str] = {}
    for original, name in zip(originals, renamed, strict=True):
        if name in first:
            return PairingError(
                f"renaming gives both {first[name]!r} and {original!r} the name {name!r}",
                hint="make the --rename expression more specific",
            )
        first[name] = original
    raise AssertionError("no two names collide")


def _selected(
    names: list[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The names that the globs leave, and warnings about globs that match nothing."""
    warnings: list[str] = []
    included = _matching(names, "--include", include, warnings)
    excluded = _matching(names, "--exclude", exclude, warnings)
    if included is None and excluded is None:
        return list(names), warnings
    return [
        name
        for name in names
        if (included is None or name in included) and (excluded is None or name not in excluded)
    ], warnings


def _matching(
    names: list[str], option: str, globs: Sequence[str], warnings: list[str]
) -> set[str] | None:
    """The names that any of the globs matches, or None where there are no globs."""
    if not globs:
        return None
    result: set[str] = set()
    for glob in globs:
        match = re.compile(fnmatch.translate(glob)).match  # what fnmatchcase does, compiled once
        found = [name for name in names if match(name)]
        if not found:
            warnings.append(f"{option} {glob!r} matches no tensor of either checkpoint")
        result.update(found)
    return result


def _side(side: str, table: TensorTable, position: int | None) -> dict[str, Any]:
    if position is None:
        return {}
    return {
        f"{side}_dtype": table.dtypes[position],
        f"{side}_shape": list(table.shapes[position]),
    }


_SAID = {
    "removed": "only in base",
    "added": "only in tuned",
    "missing": "named but not there, or not readable",
    "reshaped": "of another shape",
    "retyped": "of another dtype",
}


def _nothing(base: TensorTable, tuned: TensorTable, found: Pairing, options: bool) -> PairingError:
    unpaired = found.unpaired
    if emptied := _placeholders(unpaired):
        return PairingError(f"nothing to compare: {emptied[0]}", hint=emptied[1])
    counts = {reason: sum(u.reason == reason for u in unpaired) for reason in _SAID}
    parts = [f"{count:,} {_SAID[reason]}" for reason, count in counts.items() if count]
    if found.excluded:
        parts.append(f"{found.excluded:,} excluded")
    detail = f": {', '.join(parts)}" if parts else ""
    example = next((u for u in unpaired if u.reason in ("reshaped", "retyped")), None)
    if example is not None:
        old, new = (
            f"{example.detail[f'{side}_dtype']} {example.detail[f'{side}_shape']}"
            for side in ("base", "tuned")
        )
        detail += f"; {example.name!r} is {old} in base and {new} in tuned"
    elif unpaired:
        detail += f"; for example {unpaired[0].name!r}"
    return PairingError(
        f"nothing to compare between {len(base):,} and {len(tuned):,} tensors{detail}",
        hint=found.hint or _remedy(base, tuned, found, options),
    )


def _remedy(base: TensorTable, tuned: TensorTable, found: Pairing, options: bool) -> str:
    """What to do where nothing is compared, and no other name or shape would help."""
    if found.excluded and not found.unpaired:
        wanted = next((w for w in found.warnings if w.startswith("--include")), None)
        if wanted is not None:
            return f"{wanted}; a glob has to match the whole name, as '*embed*' does"
        return "the globs leave nothing: check --include and --exclude"
    quantised = {"I8", "U8", *(name for name, d in DTYPES.items() if d.bits <= 8 and d.bits > 1)}
    dtypes = ({side.dtypes[i] for i in range(len(side))} for side in (base, tuned))
    one, other = (bool(found_ & quantised) for found_ in dtypes)
    if one != other and any(u.reason == "retyped" for u in found.unpaired):
        if not options:
            return "one side looks quantised: give two that are both quantised, or neither"
        return "one side looks quantised: --dequantize compares the values that it stands for"
    if any(u.reason == "reshaped" for u in found.unpaired):
        return "the shapes are those of another model: check the paths"
    both = "check that both are checkpoints of the same model"
    return f"{both}, and the globs" if options else both


def _hint(
    unpaired: Sequence[Unpaired],
    in_base: Collection[str],
    in_tuned: Collection[str],
    fit: Fit,
    options: bool,
) -> str | None:
    """What would pair more: a renaming, or the rows that both have."""
    adapters = [is_adapter(names) for names in (in_base, in_tuned)]
    for side, adapter in zip(("base", "tuned"), adapters, strict=True):
        if adapter and not all(adapters):
            said = f"the {side} side is an adapter, not a model: "
            if not options:
                return f"{said}merge it, as PEFT's merge_and_unload does, and give what that saves"
            return (
                f"{said}give the model that it was trained on there, and the adapter with "
                f"--{side}-adapter"
            )
    best = best_renaming(in_base, in_tuned, fit)
    if best is not None:
        renaming, pairs = best
        smaller = min(len(in_base), len(in_tuned))
        if not options:
            return (
                f"{renaming.in_words()}: saved under the same names, {pairs:,} of {smaller:,} "
                "would pair"
            )
        return f"{as_option(renaming)} would pair {pairs:,} of {smaller:,} names"
    rows = [u for u in unpaired if u.reason == "reshaped" and _rows_differ(u.detail)]
    others = [u for u in unpaired if u.reason == "reshaped" and not _rows_differ(u.detail)]
    if not options or not rows or len(others) > len(rows):  # then it is another model
        return None
    tensors = "1 tensor" if len(rows) == 1 else f"{len(rows):,} tensors"
    return (
        f"--common-rows would compare the rows that both sides have of {tensors}, such as "
        f"{rows[0].name!r}"
    )


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two shapes are the same, or one is that of a placeholder."""
    return tuple(one) == tuple(other) or 0 in one or 0 in other


def names_hint(base: Collection[str], tuned: Collection[str]) -> str | None:
    """What would pair more by name, for whoever has none of a diff's options."""
    return _hint((), dict.fromkeys(base), tuned, lambda *_: True, False)


def is_adapter(names: Collection[str]) -> bool:
    """Whether tensors of these names are an adapter, and no model.

    An adapter may also bring modules whole; PEFT gives these the prefix of its wrapper.
    """
    others = [name for name in names if not _ADAPTER.search(name)]
    return len(others) < len(names) and all(
        name.startswith(_WRAPPED) and _KEPT not in name for name in others
    )


def _rows_differ(detail: dict[str, Any]) -> bool:
    one, other = detail["base_shape"], detail["tuned_shape"]
    return bool(one and other and one[1:] == other[1:] and min(one[0], other[0]))


def _placeholders(unpaired: Sequence[Unpaired]) -> tuple[str, str] | None:
    """What to say where a side has empty tensors for full ones, and what to do, or None."""
    for side, other in (("base", "tuned"), ("tuned", "base")):
        empty = [
            u.name
            for u in unpaired
            if u.reason == "reshaped"
            and 0 in u.detail[f"{side}_shape"]
            and 0 not in u.detail[f"{other}_shape"]
        ]
        if empty:
            many = f"{len(empty):,} tensors are" if len(empty) > 1 else "1 tensor is"
            return (
                f"{many} empty in {side} and full in {other}, such as {empty[0]!r}: placeholders, "
                "as DeepSpeed ZeRO-3 saves them where it does not gather the weights",
                "save it with stage3_gather_16bit_weights_on_model_save, or make it whole with "
                "zero_to_fp32.py",
            )
    return None
