"""Why a diff would be refused, and why earlier work cannot be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import BudgetError, StoreError
from ckdiff.outputs.checks import check_disk
from ckdiff.stores.workdir import check_early, store_errors


def refusal(out: Path, most: int, *, overwrite: bool) -> str | None:
    """Why a run that writes at most ``most`` bytes would be refused as things stand, or None."""
    try:
        with store_errors(out):
            check_early(out, overwrite=overwrite)
        check_disk(out, most, note=lambda message: None)
    except (StoreError, BudgetError) as error:
        return error.one_line()
    return None


#: for what the plan of a diff holds, how people call it
_PARTS = {
    "base": "base",
    "tuned": "tuned checkpoint",
    "same": "files known to be equal, or --verify,",
    "tensors": "tensors",
    "rules": "rules",
    "masks": "rules",
    "statistics": "--stats",
    "ckdiff": "version of ckdiff",
}


def starting_anew(differing: Sequence[str], base: Checkpoint, tuned: Checkpoint) -> str:
    """The warning that earlier work cannot be resumed, because of these parts of its plan."""
    parts = list(dict.fromkeys(_PARTS.get(key, "plan") for key in differing))
    text = f"its {' and '.join(parts)} {'were' if len(parts) > 1 else 'was'} not the same"
    moved = [
        f"{side.label} is at {origin['commit'][:7]} now"
        for key, side in (("base", base), ("tuned", tuned))
        if key in differing and "commit" in (origin := side.origin)
    ]
    where = f" ({', '.join(moved)}; @COMMIT names one for good)" if moved else ""
    return f"warning: an earlier run was stopped here, but {text}: starting again{where}"
