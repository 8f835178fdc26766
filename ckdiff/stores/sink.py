"""Where the mask objects of a chunk are written."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ckdiff.stores.objects import ObjectWriter, object_key
from ckdiff.stores.workdir import store_errors


@dataclass(frozen=True, slots=True)
class ObjectSink:
    """A store in the making, as those see it who write its objects."""

    folder: Path  #: where the objects go
    out: Path  #: how errors of writing name the store
    elsewhere: bool = False  #: whether the work directory is another process's

    def begin(self, chunk: int, rules: Sequence[str], stack: ExitStack) -> dict[str, ObjectWriter]:
        """A writer for the mask of each rule, by the object's key; abandoned with ``stack``, in
        which an OSError is a StoreError from now on.
        """
        stack.enter_context(store_errors(self.out))
        writers = {}
        for key in (object_key(rule, chunk) for rule in rules):
            writers[key] = writer = ObjectWriter(self.folder / key, elsewhere=self.elsewhere)
            stack.callback(writer.abandon)
        return writers
