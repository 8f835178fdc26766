"""What was worked out for windows that were asked for ahead, until they are read."""

from __future__ import annotations

from typing import Generic, TypeVar

from ckdiff.checkpoints.protocol import IntArray

T = TypeVar("T")
_MOST = 4  # windows: those that nobody came for make room


class Asked(Generic[T]):
    """Remembers what was worked out for the last few windows."""

    def __init__(self) -> None:
        self._known: dict[bytes, T] = {}

    def __len__(self) -> int:
        return len(self._known)

    def note(self, value: T, *columns: IntArray) -> None:
        """Remember it for the window that has these spans."""
        while len(self._known) >= _MOST:
            del self._known[next(iter(self._known))]
        self._known[_key(columns)] = value

    def take(self, *columns: IntArray) -> T | None:
        """What was noted for a window, which is forgotten; None where nothing was."""
        return self._known.pop(_key(columns), None)

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()


def _key(columns: tuple[IntArray, ...]) -> bytes:
    return b"".join(column.tobytes() for column in columns)
