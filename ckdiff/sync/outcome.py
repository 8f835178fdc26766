"""What publishing gives, and what publishers are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckdiff.deltas.versions.checksums import check_checksum
from ckdiff.deltas.versions.form import check_encoding
from ckdiff.errors import DeltaError, UsageError, printable
from ckdiff.options import checked_int


@dataclass(slots=True)
class Published:
    """What was published. ``to_dict()`` is JSON-able."""

    version: int
    full: bool
    tensors: int  #: that the version has
    changed_bytes: int  #: bytes of tensors that differ; of a full version all of them
    #: of the version's files; of a full one that is still being written, those of its tensors
    bytes: int
    density: float  #: changed elements / elements; 1 of a full version
    seconds: float  #: that the call took

    def to_dict(self) -> dict[str, Any]:
        """For ``json.dumps``."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Settings:
    """How versions are made."""

    encoding: str
    checksum: str
    anchor: int | None  #: so many versions after a full one there is another
    background: bool

    @classmethod
    def checked(
        cls, encoding: str, checksum: str, anchor: int | None, background: bool
    ) -> Settings:
        """Raises UsageError for what makes no sense."""
        check_encoding(encoding)
        check_checksum(checksum)
        if background not in (True, False):
            raise UsageError(
                f"background must be True or False, not {printable(str(background)[:60])}"
            )
        anchor = None if anchor is None else checked_int("anchor_every", anchor)
        if anchor is not None and anchor < 1:
            raise UsageError(f"anchor_every must be at least 1, not {anchor}")
        return cls(encoding, checksum, anchor, background)

    def is_due(self, number: int, last_full: int) -> bool:
        """Whether version ``number`` is to be a full one; version 0 is whole as well."""
        return self.anchor is not None and number - last_full >= self.anchor


def cannot_say(why: str) -> DeltaError:
    """The error for what no delta can say."""
    return DeltaError(
        f"a weight version cannot say this: {why}",
        hint="publish a full version: publish(model, full=True)",
    )
