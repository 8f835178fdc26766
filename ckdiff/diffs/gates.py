"""Gates: what a diff is held against in CI, and what each of them says of it.

Pure: a result and what was asked of it give verdicts. Whoever runs a diff under a gate checks first
that every glob matches something (``refuse_unmatched``): a gate on nothing would always be passed.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ckdiff.diffs.result import DiffResult, Verdict
from ckdiff.errors import UsageError, printable
from ckdiff.options import several_texts

if TYPE_CHECKING:
    from ckdiff.diffs.comparison import Comparison

__all__ = ["Gates", "Verdict", "judge", "refuse_unmatched", "unmatched"]

_NAMED = 5  #: tensors that a reason names
_LONGEST = 200  #: characters of a name in a reason
_CHANGED, _IDENTICAL = "not bit-identical", "bit-identical"  #: what a tensor is, in words


@dataclass(slots=True)
class Gates:
    """What is asked of a diff; the command line's options have the same names.

    Raises UsageError for a density that is no number from 0 to 1.
    """

    fail_above: float | None = None  #: the highest density, under the first rule, that passes
    fail_below: float | None = None  #: the lowest one
    exit_code: bool = False  #: nothing may differ, nor have other rows
    #: ``exit_code`` asks for the first rule that was given, and not for ``exact`` and dtypes
    by_rule: bool = False
    expect_changed: Sequence[str] = ()  #: globs of tensors, each of which must have a changed bit
    #: globs of tensors that must be bit-identical, and of the same rows and dtype
    expect_unchanged: Sequence[str] = ()
    allow_unpaired: bool = False  #: a density speaks of the compared tensors only

    def __post_init__(self) -> None:
        for name in ("fail_above", "fail_below"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= 1):
                raise UsageError(f"{name} must be a number from 0 to 1, not {value!r}")
        for name in ("exit_code", "by_rule", "allow_unpaired"):
            if getattr(self, name) not in (True, False):
                raise UsageError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("expect_changed", "expect_unchanged"):
            setattr(self, name, several_texts(name, getattr(self, name)))

    @property
    def asked(self) -> bool:
        """Whether there is any gate."""
        densities = self.fail_above is not None or self.fail_below is not None
        return densities or self.exit_code or bool(self.expected)

    @property
    def expected(self) -> list[tuple[str, str]]:
        """The options and the globs of all expectations."""
        return [
            *(("--expect-changed", glob) for glob in self.expect_changed),
            *(("--expect-unchanged", glob) for glob in self.expect_unchanged),
        ]


def judge(result: DiffResult, gates: Gates) -> list[Verdict]:
    """What each gate says of ``result``, in the order densities, unpaired, exit code, expectations.

    Raises UsageError where a glob, of the selection too, matches no tensor.
    """
    if not gates.asked:
        return []
    names = [*result.table.names, *(detail["name"] for detail in result.unpaired_details)]
    refuse_unmatched([*result.unmatched, *_without_match(gates.expected, names)])
    loose = _uncompared(result)
    found = list[Verdict]()
    if gates.fail_above is not None:
        found.append(_density(result, gates.fail_above, above=True))
    if gates.fail_below is not None:
        found.append(_density(result, gates.fail_below, above=False))
    if found and not gates.allow_unpaired:
        found.append(_unpaired(result, loose))
    if gates.exit_code:
        found.append(_exit_code(result, loose, by_rule=gates.by_rule))
    found += [_expected(result, loose, glob, changed=True) for glob in gates.expect_changed]
    found += [_expected(result, loose, glob, changed=False) for glob in gates.expect_unchanged]
    return found


# globs


def unmatched(comparison: Comparison, expected: Iterable[tuple[str, str]] = ()) -> list[str]:
    """The globs that match nothing, as they were asked for: those of the selection among all names
    of both sides, after renaming, and pairs of an option and a glob in ``expected`` among what the
    selection leaves.
    """
    chosen, pairing = comparison.selection, comparison.pairing
    left = [*pairing.names, *(tensor.name for tensor in pairing.unpaired)]
    selecting = [
        *(("--include", glob) for glob in chosen.include),
        *(("--exclude", glob) for glob in chosen.exclude),
    ]
    found = list[str]()
    if selecting:
        found = _without_match(
            selecting, [*left, *comparison.base.table.names, *comparison.tuned_names]
        )
    return found + _without_match(expected, left)


def refuse_unmatched(globs: Sequence[str]) -> None:
    """Raise UsageError where there are globs that match nothing: for a run under a gate."""
    if globs:
        several = "match" if len(globs) > 1 else "matches"
        raise UsageError(
            f"{' and '.join(globs)} {several} no tensor",
            hint="a gate on nothing would always be passed; without a gate this is a warning",
        )


def _without_match(globs: Iterable[tuple[str, str]], names: Sequence[str]) -> list[str]:
    return [f"{option} {glob!r}" for option, glob in globs if not any(map(_matcher(glob), names))]


def _matcher(glob: str) -> Callable[[str], object]:
    """What ``fnmatchcase`` does, compiled once."""
    return re.compile(fnmatch.translate(glob)).match


# gates


def _uncompared(result: DiffResult) -> list[dict[str, Any]]:
    """The unpaired tensors that count: a tied one is compared under its other name."""
    tied = {item["name"] for item in result.tied}
    return [detail for detail in result.unpaired_details if detail["name"] not in tied]


def _density(result: DiffResult, limit: float, *, above: bool) -> Verdict:
    rule, counts = next(iter(result.rules.items()))
    density = float(counts["density"])
    ok = density <= limit if above else density >= limit
    gate = "fail-above" if above else "fail-below"
    shown, against = f"{density:.6g}", f"{limit:g}"
    if not ok and float(shown) == float(against):
        shown, against = repr(density), repr(limit)
    how = "keeps to" if ok else "exceeds" if above else "is below"
    reason = f"the {rule} density {shown} {how} --{gate} {against}"
    return Verdict(gate, float(limit), density, ok, reason)


def _unpaired(result: DiffResult, loose: Sequence[dict[str, Any]]) -> Verdict:
    count, total = len(loose), len(loose) + len(result.table)
    if not loose:
        part = f", {len(result.resized):,} of them in part" if result.resized else ""
        if tied := len(result.unpaired_details):
            part += f"; {tied:,} more on one side only, tied to others of it"
        return Verdict("unpaired", 0, 0, True, f"all {total:,} tensors were compared{part}")
    reason = f"{count:,} of {total:,} tensors {_were(count)} not compared, {_such_as(loose)}"
    return Verdict("unpaired", 0, count, False, f"{reason}; --allow-unpaired lets that pass")


def _exit_code(result: DiffResult, loose: Sequence[dict[str, Any]], *, by_rule: bool) -> Verdict:
    rule = next(iter(result.rules)) if by_rule else "exact"
    changed = int(result.rules[rule]["changed"])
    said = list[str]()
    if changed:
        first = int(np.flatnonzero(result.table.changed[rule])[0])
        name = named(result.table.names[first])
        said.append(f"{_counted(changed, 'element')} changed under {rule}, such as in {name}")
    if loose:
        said.append(f"{_counted(len(loose), 'tensor')} unpaired, {_such_as(loose)}")
    unlike = [(result.resized, "number of rows")]
    if not by_rule:
        unlike.append((result.retyped, "dtype"))
    for items, what in unlike:
        if items:
            count = _counted(len(items), "tensor")
            said.append(f"{count} of another {what}, such as {named(items[0]['name'])}")
    value = changed + len(loose) + sum(len(items) for items, _ in unlike)
    reason = "; ".join(said) or f"nothing differs under {rule}"
    return Verdict("exit-code", 0, value, not value, reason)


def _expected(
    result: DiffResult, loose: Sequence[dict[str, Any]], glob: str, *, changed: bool
) -> Verdict:
    """Whether each tensor that matches is as expected; one that was not compared is not.

    Nor is one without a changed element whose sides differ in rows or dtype: nothing shows that it
    was trained, and it is not the same.
    """
    gate = "expect-changed" if changed else "expect-unchanged"
    match = _matcher(glob)
    found = {name: what for name, what in _outcomes(result) if match(name)}
    wrong = {n: w for n, w in found.items() if w != (_CHANGED if changed else _IDENTICAL)}
    lost = [detail["name"] for detail in loose if match(detail["name"])]
    against, total = (*wrong, *lost), len(found) + len(lost)
    said = [
        f"{count:,} of {total:,} matching tensors {_are(count)} {what}"
        for what, count in Counter(wrong.values()).items()
    ]
    if lost:
        said.append(f"{len(lost):,} of {total:,} matching tensors {_were(len(lost))} not compared")
    told = " and ".join(said)
    if against:
        shown = ", ".join(map(named, against[:_NAMED]))
        more = f" and {len(against) - _NAMED:,} more" if len(against) > _NAMED else ""
        told += f": {shown}{more}"
    elif total:
        every = "the matching tensor is" if total == 1 else f"all {total:,} matching tensors are"
        told = f"{every} {'changed' if changed else 'bit-identical'}"
    else:
        told = "what matches is tied to another tensor, and was compared under its name only"
    reason = f"--{gate} {printable(repr(glob))}: {told}"
    return Verdict(gate, 0, len(against), not against, reason, glob, against)


def _outcomes(result: DiffResult) -> Iterator[tuple[str, str]]:
    """Of each compared tensor the name, and in words what it is."""
    grown = {item["name"] for item in result.resized}
    retyped = {item["name"] for item in result.retyped}
    counts = result.table.changed["exact"].tolist()
    for name, count in zip(result.table.names, counts, strict=True):
        if count:
            yield name, _CHANGED
        elif name in grown:
            yield name, "equal only in the rows that both sides have"
        else:
            yield name, "equal in value but of two dtypes" if name in retyped else _IDENTICAL


# words


def named(name: str) -> str:
    """A tensor's name in one line of text: short, and safe for a terminal."""
    text = printable(name[: 4 * _LONGEST])
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _such_as(details: Sequence[dict[str, Any]]) -> str:
    return f"such as {named(details[0]['name'])} ({details[0]['reason']})"


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"
