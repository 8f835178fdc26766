"""What a comparison of bits does not see of quantised tensors."""

from __future__ import annotations

from collections.abc import Sequence

from ckdiff.checkpoints.formats.strictjson import shown
from ckdiff.checkpoints.pairing import Pairing
from ckdiff.checkpoints.protocol import TensorTable
from ckdiff.checkpoints.views.quantised import Quantised, quantised


def notes(
    pairing: Pairing, base: TensorTable, tuned: TensorTable, changed: Sequence[int]
) -> list[str]:
    """What to say after both were compared as they are stored, one line each.

    Names of ``tuned`` are those after every renaming, and ``changed`` counts the elements of each
    pair whose bits differ.
    """
    sides = quantised(base), quantised(tuned)
    found = [
        f"note: compared as bits, as they are stored: {packed}; one stored element may hold "
        "several weights"
        for packed in dict.fromkeys(side.packed for side in sides if side.packed is not None)
    ]
    said = _hint(pairing, sides, (base, tuned), changed)
    return found if said is None else [*found, f"hint: {said}"]


def _hint(
    pairing: Pairing,
    sides: tuple[Quantised, Quantised],
    stored: tuple[TensorTable, TensorTable],
    changed: Sequence[int],
) -> str | None:
    """What a comparison of values would say otherwise."""
    if not any(side.scaled for side in sides):
        return None
    scales = _only_scales(pairing, sides[0], changed)
    apart = _apart(sides, stored)
    said = []
    if scales:
        said.append(f"only the scales of {_some(scales)} changed")
    if apart:
        said.append(f"{_some(apart)} {_is_are(apart)} quantised on one side only, or otherwise")
    return f"{'; '.join(said)}: --dequantize compares values" if said else None


def _only_scales(pairing: Pairing, side: Quantised, changed: Sequence[int]) -> list[str]:
    pairs = {position: pair for pair, position in enumerate(pairing.base_index.tolist())}
    found = []
    for at, how in sorted(side.scaled.items()):
        elements, scales = pairs.get(how.elements), pairs.get(how.scales)
        if elements is None or scales is None:
            continue
        if changed[scales] and not changed[elements]:
            found.append(side.table.names[at])
    return found


def _apart(
    sides: tuple[Quantised, Quantised], stored: tuple[TensorTable, TensorTable]
) -> list[str]:
    """The tensors of both sides that are not stored alike."""
    places = [{name: at for at, name in enumerate(side.table.names)} for side in sides]
    found = []
    for name, one in places[0].items():
        other = places[1].get(name)
        if other is None:
            continue
        kinds = [
            _stored(side, table, at)
            for side, table, at in zip(sides, stored, (one, other), strict=True)
        ]
        if any(kinds) and kinds[0] != kinds[1]:
            found.append(name)
    return found


def _stored(side: Quantised, table: TensorTable, at: int) -> list[tuple[str, str, object]]:
    """How a tensor that has scales, and they, are stored."""
    how = side.scaled.get(at)
    if how is None:
        return []
    return [(table.names[i], table.dtypes[i], table.shapes[i]) for i in (how.elements, how.scales)]


def _some(names: list[str]) -> str:
    name = shown(names[0], 80)
    return name if len(names) == 1 else f"{len(names):,} tensors, such as {name},"


def _is_are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
