"""What a mask store says of where it comes from, and of what was not compared."""

from __future__ import annotations

from typing import Any

from ckdiff.diffs.result import unpaired_names
from ckdiff.stores.maskstore import MaskStore


def provenance(store: MaskStore) -> dict[str, Any]:
    """Of a diff ``base`` and ``tuned`` (how they are called), ``commits`` of those on the hub,
    ``unpaired`` (reason -> names) and ``unpaired_details``; of a derived store ``made_by``. Of both
    ``retyped`` and ``resized``, the tensors whose sides differ in dtype or rows.
    """
    manifest, table = store.manifest, store.table
    unlike = {"retyped": table.retyped_tensors(), "resized": table.resized_tensors()}
    if "made_by" in manifest:
        return {"made_by": manifest["made_by"], **unlike}
    sides = {side: manifest[side] for side in ("base", "tuned")}
    commits = {side: said["commit"] for side, said in sides.items() if "commit" in said}
    return {
        **{side: said["label"] for side, said in sides.items()},
        **({"commits": commits} if commits else {}),
        "unpaired": unpaired_names(manifest["unpaired"]),
        "unpaired_details": manifest["unpaired"],
        **unlike,
    }
