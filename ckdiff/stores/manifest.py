"""The manifest: what a finished store says about itself, and how every byte of it is pinned.

It is written last, so that a directory without one is not a store. It names every other file of
the store with its size and XXH3-128 digest, and ends with a digest of itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ckdiff.checkpoints.mistaken import seen_instead
from ckdiff.errors import StoreCorrupt, StoreIncomplete, printable
from ckdiff.outputs.ownership import SUFFIX
from ckdiff.outputs.placing import MANIFEST
from ckdiff.stores.schema import FORMAT_VERSION, TABLE
from ckdiff.stores.sealed import dump_json, read_sealed, seal

__all__ = ["FORMAT_VERSION", "TABLE", "dump_json", "read_manifest", "seal"]


def read_manifest(root: Path) -> dict[str, Any]:
    """The verified manifest of the store at ``root``, with every value checked.

    Raises StoreIncomplete where there is none, StoreCorrupt where it is damaged, newer or makes no
    sense.
    """
    shown = printable(str(root))
    try:
        return read_sealed(root)
    except FileNotFoundError:
        raise _no_store(root) from None
    except NotADirectoryError:
        raise (
            _mistaken(root) or StoreIncomplete(f"{shown} is not a mask store but a file")
        ) from None
    except OSError as error:
        raise StoreCorrupt(f"cannot read {shown}/{MANIFEST}: {error.strerror}") from error


def _no_store(root: Path) -> StoreIncomplete:
    shown = printable(str(root))
    root = Path(os.path.abspath(root))  # "." has no name of its own
    if root.name.endswith(SUFFIX) or (root / "journal").is_dir():
        return StoreIncomplete(
            f"{shown} is left over from a run that did not finish",
            hint="the same command resumes it",
        )
    if not root.exists() and root.with_name(root.name + SUFFIX).is_dir():
        return StoreIncomplete(
            f"there is no store {shown} yet: the run that writes it was stopped or is still "
            "running",
            hint="the same command resumes it",
        )
    if shown.startswith("hf:/"):  # pathlib has taken the second slash
        return StoreIncomplete(
            f"hf://{shown[4:].lstrip('/')} is on the hub, but mask stores must be on this machine",
            hint="ckdiff diff -o makes one",
        )
    if not root.exists():
        return StoreIncomplete(f"there is no store {shown}", hint="ckdiff diff -o makes one")
    return _mistaken(root) or StoreIncomplete(
        f"{shown} has no {MANIFEST}: it is not a mask store, or not a whole one",
        hint="ckdiff diff -o makes one",
    )


def _mistaken(root: Path) -> StoreIncomplete | None:
    """The error for something else of ours, or a checkpoint."""
    seen = seen_instead(str(root))
    if seen is None:
        return None
    return StoreIncomplete(f"{printable(str(root))} {seen[0]}, not a mask store", hint=seen[1])
