"""The pickle of a ``.metadata``, of which every piece of a tensor has three records.

There are hundreds of thousands of them. So of each only what is looked at is kept, shapes that are
equal are one object, and the dicts that the records were made of go at once.
"""

from __future__ import annotations

import struct
from typing import Any

from ckdiff.checkpoints.formats.picklebytes import refuse
from ckdiff.checkpoints.formats.picklecalls import MAX_DIMS
from ckdiff.checkpoints.formats.pickledvalues import Row, Word
from ckdiff.checkpoints.formats.pickles import CONTAINER, NUMBER, OBJECT, PAIR, TUPLE, Machine

#: attributes that are kept of the records of these classes
KEPT = {
    "ChunkStorageMetadata": ("offsets", "sizes"),
    "MetadataIndex": ("fqn", "offset"),
    "_StorageInfo": ("relative_path", "offset", "length", "transform_descriptors"),
}
_ROW = 80  # bytes of one, about
_NEAR = 32  # values that the memo may have got since a record's dict was begun
_MOST_SHAPES = 1 << 8  # that are kept for those that are equal


class RowMachine(Machine):
    """The instructions of pickles, with what they make of many small records."""

    def __init__(self, *source: Any) -> None:
        super().__init__(*source)
        self._shapes: dict[tuple[Any, ...], tuple[Any, ...]] = {}

    def number(self, form: struct.Struct) -> None:
        """See Machine: small whole numbers are there anyway."""
        super().number(form)
        value = self._stack[-1]
        if type(value) is int and -6 < value < 257:
            self.bytes.charge(-NUMBER)

    def tuple_of(self, count: int) -> None:
        """See Machine: whole numbers, or one tuple of them, are made once."""
        super().tuple_of(count)
        items = self._stack[-1]
        numbers = items[0] if count == 1 and type(items[0]) is tuple else items
        if len(numbers) > MAX_DIMS or not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
            return  # what takes long to hash, or is the same to it
        if len(self._shapes) == _MOST_SHAPES:
            self._shapes.clear()
        known = self._shapes.setdefault(items, items)
        self.bytes.charge(PAIR if known is items else -TUPLE - 8 * count)
        self._stack[-1] = known

    def call(self) -> None:
        """See Machine: a ``torch.Size`` of a tuple is that tuple."""
        args = self._stack[-1]
        super().call()
        if args and self._stack[-1] is args[0]:
            self.bytes.charge(-OBJECT)

    def _object(self, kind: Any, args: Any, names: Any) -> None:
        kept = KEPT.get(kind.qualname) if type(kind) is Word else None
        if kept is None or args or names is not None:
            super()._object(kind, args, names)
        else:
            self._new(Row(kept), _ROW)

    def build(self) -> None:
        """See Machine: a record takes what is kept, and leaves the dict empty."""
        target, state = self._stack[-2], self._stack[-1]
        if type(target) is not Row:
            super().build()
            return
        self._stack.pop()
        if target.is_set or type(state) is not dict:
            refuse("it sets what no object has")
        target.set(state)
        self.bytes.charge(-PAIR * len(state))
        state.clear()
        for place in range(len(self._memo) - 1, max(len(self._memo) - _NEAR, 0) - 1, -1):
            if self._memo[place] is state:
                self._memo[place] = None
                self.bytes.charge(-CONTAINER)
                break
