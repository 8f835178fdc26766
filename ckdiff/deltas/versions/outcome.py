"""What publishing gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckdiff.deltas.versions.form import version_text


@dataclass(slots=True)
class VersionReport:
    """What was published. ``to_dict()`` is JSON-able."""

    path: Path
    version: int
    full: bool
    tensors: int  #: that the version has
    changed_bytes: int  #: bytes of tensors that differ; of a full version all of them
    bytes: int  #: of the version's files
    density: float  #: changed elements / elements
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return found | {"path": str(self.path), "version": version_text(self.version)}
