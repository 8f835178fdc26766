"""The marker of a local checkpoint: written last, and removed before anything changes."""

from __future__ import annotations

from ckdiff.checkpoints.halfway import MARKER_NAME
from ckdiff.deltas.versions.form import marker_bytes
from ckdiff.deltas.versions.lock import SyncFolder
from ckdiff.outputs.placing import write_file


def put_marker(folder: SyncFolder, version: int) -> None:
    """Say, on the disk too, that the checkpoint is whole and at a version. OSError passes."""
    write_file(folder.inside / MARKER_NAME, marker_bytes(version))
    folder.sync()


def drop_marker(folder: SyncFolder) -> None:
    """Say, on the disk too, that it is at no version. OSError passes through."""
    folder.remove(MARKER_NAME)
    folder.sync()
