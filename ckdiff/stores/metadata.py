"""The Zarr metadata of a store: what we write is all that we read.

A ``zarr.json`` that says anything else, such as another separator, codec, dtype or fill value,
makes a Zarr reader see other bits than we do, whatever its digest is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ckdiff.stores.objects import GROUP, array_metadata, array_path
from ckdiff.stores.schema import FORMAT
from ckdiff.stores.sealed import unique_keys


def documents(masks: Sequence[str], length: int, version: int) -> dict[str, dict[str, Any]]:
    """Every ``zarr.json`` of a store with these masks of ``length`` bytes, by its path.

    ``version`` is that of the store's format.
    """
    group: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    top = group | {"attributes": {"ckdiff": {"format": FORMAT, "format_version": version}}}
    arrays = {f"{array_path(rule)}/zarr.json": array_metadata(length) for rule in masks}
    return {"zarr.json": top, f"{GROUP}/zarr.json": group, **arrays}


def same_document(raw: bytes, wanted: dict[str, Any]) -> bool:
    """Whether a ``zarr.json`` says just that; 3.0 is not 3, and true is not 1."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    except (ValueError, RecursionError, TypeError):
        return False
