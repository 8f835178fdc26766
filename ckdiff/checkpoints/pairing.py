"""Two checkpoints -> what can be compared, and why the rest cannot."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ckdiff.checkpoints.protocol import IntArray, TensorTable
from ckdiff.errors import PairingError, UsageError
from ckdiff.naming import natural_key

__all__ = ["Pairing", "Reason", "Unpaired", "natural_key", "pair"]

Reason = Literal["added", "removed", "reshaped", "retyped"]

#: what training frameworks put in front of names
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.", "model.")
_WRAPPER_DEPTH = 4
_SAMPLE = 500
#: a renaming is worth suggesting when it pairs this share of the smaller checkpoint
_NEARLY_ALL = 0.9


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
    hint: str | None  #: a renaming that would pair (nearly) everything
    warnings: list[str]  #: one line each

    def __len__(self) -> int:
        return len(self.names)


def pair(
    base: TensorTable,
    tuned: TensorTable,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
) -> Pairing:
    """Pair the tensors of two checkpoints by name.

    ``rename`` items ``REGEX=REPL`` are applied to the tuned names in order; the globs then select
    among the names of both sides, and ``exclude`` wins. Raises UsageError for a renaming that
    cannot be read, and PairingError where two names collide or nothing can be compared.
    """
    tuned_names, unused = _renamed(tuned.names, rename)
    in_base = {name: i for i, name in enumerate(base.names)}
    in_tuned = {name: i for i, name in enumerate(tuned_names)}
    if len(in_tuned) != len(tuned_names):
        raise _collision(tuned.names, tuned_names)

    every = list(in_base)
    every += [name for name in tuned_names if name not in in_base]
    names, warnings = _selected(every, include, exclude)
    warnings = [*unused, *warnings]
    excluded = len(every) - len(names)
    names.sort(key=natural_key)

    paired: list[str] = []
    base_index: list[int] = []
    tuned_index: list[int] = []
    unpaired: list[Unpaired] = []
    for name in names:
        i, j = in_base.get(name), in_tuned.get(name)
        if i is None or j is None:
            reason: Reason = "added" if i is None else "removed"
        elif base.shapes[i] != tuned.shapes[j]:
            reason = "reshaped"
        elif base.dtypes[i] != tuned.dtypes[j]:
            reason = "retyped"
        else:
            paired.append(name)
            base_index.append(i)
            tuned_index.append(j)
            continue
        detail = _side("base", base, i) | _side("tuned", tuned, j)
        unpaired.append(Unpaired(name, reason, detail))

    hint = _wrapper_hint(in_base, in_tuned)
    if not paired:
        raise _nothing(base, tuned, unpaired, excluded, hint)
    return Pairing(
        paired,
        np.array(base_index, np.int64),
        np.array(tuned_index, np.int64),
        unpaired,
        excluded,
        hint,
        warnings,
    )


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


def _nothing(
    base: TensorTable,
    tuned: TensorTable,
    unpaired: list[Unpaired],
    excluded: int,
    hint: str | None,
) -> PairingError:
    counts = dict.fromkeys(("removed", "added", "reshaped", "retyped"), 0)
    for item in unpaired:
        counts[item.reason] += 1
    said = {
        "removed": "only in base",
        "added": "only in tuned",
        "reshaped": "of another shape",
        "retyped": "of another dtype",
    }
    parts = [f"{count:,} {said[reason]}" for reason, count in counts.items() if count]
    if excluded:
        parts.append(f"{excluded:,} excluded")
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
        hint=hint or "check that both are checkpoints of the same model, and the globs",
    )


def _wrapper_hint(in_base: dict[str, int], in_tuned: dict[str, int]) -> str | None:
    """The ``--rename`` that removes, adds or swaps a known wrapper prefix, if that pairs a lot."""
    smaller = min(len(in_base), len(in_tuned))
    already = len(in_base.keys() & in_tuned.keys())
    if already >= _NEARLY_ALL * smaller:
        return None
    # Only what pairs something of an even sample of the names is counted on all of them.
    sample = list(in_tuned)[:: max(1, len(in_tuned) // _SAMPLE)]
    best: tuple[int, int, str, str] | None = None
    for old in sorted(_stacks(in_tuned), key=len):
        for new in sorted(_stacks(in_base), key=len):
            if old == new:
                continue
            if not any(_rewrapped(name, old, new) in in_base for name in sample):
                continue
            found = {_rewrapped(name, old, new) for name in in_tuned}
            if len(found) != len(in_tuned):
                continue  # the suggestion would collide
            score = len(found & in_base.keys())
            candidate = (score, -len(old) - len(new), old, new)
            if score > already and (best is None or candidate[:2] > best[:2]):
                best = candidate
    if best is None or best[0] < _NEARLY_ALL * smaller:
        return None
    score, _, old, new = best
    return f"--rename '^{re.escape(old)}={new}' would pair {score:,} of {smaller:,} names"


def _rewrapped(name: str, old: str, new: str) -> str:
    return new + name[len(old) :] if name.startswith(old) else name


def _stacks(names: dict[str, int]) -> set[str]:
    """The stacked wrapper prefixes that names begin with, such as ``module.`` and
    ``module.model.``, and the empty one."""
    found = {""}
    for _ in range(_WRAPPER_DEPTH):
        more = {
            stack + wrapper
            for stack in found
            for wrapper in _WRAPPERS
            if any(name.startswith(stack + wrapper) for name in names)
        }
        if more <= found:
            break
        found |= more
    return found
