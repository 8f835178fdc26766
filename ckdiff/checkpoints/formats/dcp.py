"""Checkpoints of ``torch.distributed.checkpoint``: the pieces of tensors in ``.distcp`` files.

``.metadata`` is a pickle of which pieces there are of each tensor, and where in the files each of
them is stored. It is read like every pickle here: nothing is called. Only the weights among what it
lists are looked for in the files; optimizers and the like are passed over.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from ckdiff.checkpoints.formats.covering import Joining, Shape, is_shape
from ckdiff.checkpoints.formats.dcpitems import Item, ItemReader
from ckdiff.checkpoints.formats.dcppieces import saved_offsets
from ckdiff.checkpoints.formats.dcprows import RowMachine
from ckdiff.checkpoints.formats.pickledvalues import Odd, Record, Row, Storage, Tensor, Word, shown
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.checkpoints.formats.safetensors import Header, header_from
from ckdiff.checkpoints.formats.torcharchive import TORCH_DTYPES, Placed, unsupported
from ckdiff.checkpoints.formats.torchzip import (
    check_repeated,
    chosen_weights,
    key_text,
    left_out,
    named_weights,
    nothing_named,
)
from ckdiff.checkpoints.pieces import Contents, Piece, packed_strides
from ckdiff.checkpoints.places.place import Files
from ckdiff.errors import CheckpointError, printable

_HINT = "copy all of the directory, or save the checkpoint again"
#: bytes of the metadata: some 240,000 pieces. To read them takes five times as much memory.
_LONGEST = 1 << 25
_PART = 1 << 20  # bytes of it that the reader of pickles takes, and copies, at a time
_RECORDS = (Record, Row)
_DEEPEST = 24  # keys that lead to a tensor
#: how names begin that are an optimizer's, where nothing else says it: ``optimizer.state.``
_OPTIMIZER = re.compile(r"(?:chained_[0-9]{1,4}\.)?opt(?:im(?:izers?)?)?(?:_states?(?:_dict)?)?\.")
_OPTIMIZER_KEY = "optimizer"
#: where Megatron says of which tensors the shapes are not theirs
_MEGATRON, _RESHAPED = "mcore_data", "nd_reformulated_orig_global_shape"


@dataclass(slots=True)
class _Chunk:
    """One piece of a tensor, as the metadata has it."""

    tensor: int  #: which of the tensors that are compared
    at: Shape
    shape: Shape
    item: Item


def read_contents(files: Files) -> Contents:
    """What a directory of ``torch.distributed.checkpoint`` holds. Raises CheckpointError."""
    return _Reading(files).contents()


class _Reading:
    """Reads one."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self.where = files.described  # the path of .metadata
        raw = files.index() or b""
        if len(raw) > _LONGEST:
            raise CheckpointError(
                f"{self.where}: has {len(raw):,} bytes, more than the {_LONGEST:,} that are read",
                hint="save the model without the optimizer, or make one file of it with `python -m "
                "torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE`",
            )
        parts = (raw[i : i + _PART] for i in range(0, len(raw), _PART))
        metadata = read_pickle(parts, len(raw), self.where, machine=RowMachine)
        if type(metadata) is not Record or metadata.what.qualname != "Metadata":
            raise self._wrong("is not the metadata of a torch.distributed.checkpoint")
        self._metadata = metadata
        self._listed = self._dict(metadata, "state_dict_metadata")
        self._stored = self._dict(metadata, "storage_data")
        paths = metadata.field("planner_data")
        self._paths = paths if type(paths) is dict else {}
        self._names = {files.name(i): i for i in range(len(files))}
        self._tensors: list[tuple[str, str, Shape, Record]] = []  # key, dtype, shape, entry

    def contents(self) -> Contents:
        files = self._files
        path, chosen, notes = chosen_weights(files.described, self._content(), files.key)
        text = key_text(path, files.key)
        rows: list[tuple[str, int]] = []
        left: list[tuple[str, str]] = []
        for name, tensor in named_weights(chosen, path, files.described, text, notes):
            reason = unsupported(tensor)
            if reason is None:
                rows.append((name, int(tensor.storage.key)))
            else:
                left.append((name, reason))
        if not rows:
            raise nothing_named(files.described, text, left)
        if left:
            notes.append(left_out(files.described, left))
        self._check_shapes([tensor for _, tensor in rows])
        pieces = self._located([tensor for _, tensor in rows])
        joining = Joining(files.described, files.first)
        for name, tensor in rows:
            _, dtype, shape, _ = self._tensors[tensor]
            joining.add(name, TORCH_DTYPES[dtype], shape, pieces[tensor])
        return joining.finish(notes, [name for name, _ in left])

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}", hint=_HINT)

    def _dict(self, metadata: Record, name: str) -> dict[Any, Any]:
        found = metadata.field(name)
        if type(found) is not dict:
            raise self._wrong(f"has no {name}")
        return found

    # which tensors there are

    def _content(self) -> dict[Any, Any]:
        """The tensors as the state dict had them that was saved, nested as it was."""
        content: dict[Any, Any] = {}
        for key, entry in self._listed.items():
            if type(key) is not str or type(entry) is not Record:
                raise self._wrong("lists an entry that is not a tensor")
            if entry.what.qualname != "TensorStorageMetadata":
                continue  # bytes: what is no tensor is pickled
            dtype, shape = _dtype(entry), entry.field("size")
            if not is_shape(shape) or dtype is None:
                raise self._wrong(f"lists {shown(key)} without a possible shape and dtype")
            storage = Storage(str(len(self._tensors)), None, 0)
            self._tensors.append((key, dtype, shape, entry))
            inner = content
            *above, last = self._path(key)
            for part in above:
                inner = inner.setdefault(part, {})
                if type(inner) is not dict:
                    raise self._wrong(f"has {shown(key)} inside of a tensor")
            if last in inner:
                raise self._wrong(f"lists {shown(key)} twice")
            inner[last] = Tensor(storage, dtype, 0, shape, packed_strides(shape))
        return content

    def _path(self, key: str) -> tuple[str, ...]:
        """The keys that led to a tensor in what was saved."""
        path = self._paths.get(key)
        if type(path) is not tuple or not 0 < len(path) <= _DEEPEST:
            path = (key,)
        if not all(type(part) in (str, int) and part not in ("", ".") for part in path):
            path = (key,)
        parts = tuple(map(str, path))
        # saved flat: what an optimizer has is known by how its names begin
        flat = _OPTIMIZER.match(parts[0]) if len(parts) == 1 else None
        return parts if flat is None else (_OPTIMIZER_KEY, parts[0])

    def _check_shapes(self, tensors: list[int]) -> None:
        """Refuse tensors that Megatron gave other shapes, with the parts of a rank side by side."""
        said = self._metadata.field(_MEGATRON)
        if type(said) is not dict:
            return
        for tensor in tensors:
            key = self._tensors[tensor][0]
            of = said.get(key)
            if type(of) is dict and _RESHAPED in of:
                raise CheckpointError(
                    f"{self.where}: Megatron gave {shown(key)} another shape to save it "
                    f"({_RESHAPED}), which ckdiff does not read",
                    hint="load it with Megatron and export the model, for example to Hugging Face",
                )

    # where their pieces are

    def _located(self, tensors: list[int]) -> dict[int, list[Piece]]:
        """For each of the tensors its pieces in the files."""
        chunks = self._chunks(tensors)
        self._check_apart(chunks)
        found: dict[int, list[Piece]] = {tensor: [] for tensor in tensors}
        items, packs = ItemReader(self._files), _Packs(self._files)
        placed: list[Placed] = []
        before: _Chunk | None = None
        for chunk in chunks:
            item = chunk.item
            key, dtype, _, _ = self._tensors[chunk.tensor]
            where = f"{self._files.where(item.file)}: the piece of {shown(key)} at {list(chunk.at)}"
            head = items.head(item)
            if head[8:9] == b"{":
                one = packs.place(item, key, chunk.at, where)
            else:
                if before is not None and before.item[:2] == item[:2]:
                    raise self._shared(before, chunk)
                before = chunk
                one = items.place(item, head, where)
            if one.shape != chunk.shape or one.dtype != TORCH_DTYPES[dtype]:
                raise CheckpointError(
                    f"{where} is {one.dtype} {list(one.shape)} where .metadata has "
                    f"{TORCH_DTYPES[dtype]} {list(chunk.shape)}",
                    hint=_HINT,
                )
            if one.strides is not None:
                placed.append(one)
            strides = packed_strides(one.shape) if one.strides is None else one.strides
            file = self._files.first + item.file
            found[chunk.tensor].append(Piece(file, one.begin, chunk.at, chunk.shape, strides))
        check_repeated(placed, self._files.described)
        for file in sorted({chunk.item.file for chunk in chunks}):
            self._files.check(file)  # what was read is worth something if it is still the same
        return found

    def _chunks(self, tensors: list[int]) -> list[_Chunk]:
        """Their pieces that have elements, in the order of the files."""
        wanted = {self._tensors[tensor][0] for tensor in tensors}
        stored = self._storage(wanted)
        chunks: list[_Chunk] = []
        for tensor in tensors:
            key, _, _, entry = self._tensors[tensor]
            listed = entry.field("chunks")
            if type(listed) is not list:
                raise self._wrong(f"has no pieces of {shown(key)}")
            for record in listed:
                at, extent = (
                    record.field(name) if type(record) in _RECORDS else None
                    for name in ("offsets", "sizes")
                )
                if not is_shape(at) or not is_shape(extent):
                    raise self._wrong(f"has a piece of {shown(key)} without a possible place")
                if 0 in extent:
                    continue
                item = stored.get((key, at))
                if item is None:
                    raise self._wrong(f"does not say where {shown(key)} at {list(at)} is stored")
                chunks.append(_Chunk(tensor, at, extent, self._item(item, key, at)))
        return sorted(chunks, key=lambda chunk: chunk.item)

    def _storage(self, wanted: set[str]) -> dict[tuple[str, Shape], Record | Row]:
        """What is said of where pieces are stored, by tensor and index of the first element."""
        found: dict[tuple[str, Shape], Record | Row] = {}
        while self._stored:  # there are very many: none is kept longer than it is of use
            odd, info = self._stored.popitem()
            index = odd.value if type(odd) is Odd else odd
            if type(index) not in _RECORDS or type(info) not in _RECORDS:
                raise self._wrong("has a storage_data that cannot be read")
            key, at = index.field("fqn"), index.field("offset")
            if type(key) is not str or key not in wanted:
                continue
            if not is_shape(at) or (key, at) in found:
                raise self._wrong(f"does not say once where {shown(key)} is stored")
            found[key, at] = info
        return found

    def _item(self, info: Record | Row, key: str, at: Shape) -> Item:
        name, offset, length = (info.field(n) for n in ("relative_path", "offset", "length"))
        if type(name) is not str or type(offset) is not int or type(length) is not int:
            raise self._wrong(f"does not say where {shown(key)} at {list(at)} is stored")
        if info.field("transform_descriptors"):
            raise self._wrong(
                f"says that {shown(key)} is compressed or otherwise transformed, which ckdiff does "
                "not read"
            )
        file = self._names.get(name)
        if file is None:
            raise self._wrong(f"names a file that is not there, {shown(name)}")
        if offset < 0 or length <= 0 or offset + length > self._files.size(file):
            raise self._wrong(
                f"has {shown(key)} at bytes {offset:,} to {offset + length:,} of "
                f"{printable(name)}, which has {self._files.size(file):,}"
            )
        return Item(file, offset, length)

    def _check_apart(self, chunks: list[_Chunk]) -> None:
        """Refuse what has the same bytes twice; ``chunks`` are in the order of the files."""
        for before, chunk in itertools.pairwise(chunks):
            one, other = before.item, chunk.item
            if one.file == other.file and one.offset + one.length > other.offset > one.offset:
                raise self._shared(before, chunk)

    def _shared(self, before: _Chunk, chunk: _Chunk) -> CheckpointError:
        names = [shown(self._tensors[one.tensor][0]) for one in (before, chunk)]
        return self._wrong(f"has pieces of {names[0]} and {names[1]} in the same bytes")


def _dtype(entry: Record) -> str | None:
    """The dtype of a tensor that is listed, as torch calls it."""
    properties = entry.field("properties")
    if type(properties) is not Record:
        return None
    state = properties.state
    found = state[0] if type(state) is tuple and state else properties.field("dtype")
    return found.qualname if type(found) is Word and found.module == "torch" else None


class _Packs:
    """The safetensors that some writers put into a file, instead of an item for each tensor."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._read: dict[tuple[int, int], tuple[Header, dict[str, int], dict[str, Shape]]] = {}
        self._given: set[tuple[int, int, str]] = set()

    def place(self, item: Item, key: str, at: Shape, where: str) -> Placed:
        """Where the elements of the tensor ``key`` are, whose piece is ``at``. CheckpointError."""
        place = item.file, item.offset
        if place not in self._read:
            self._read[place] = self._header(item)
        header, positions, offsets = self._read[place]
        row = positions.get(key)
        if row is None or (*place, key) in self._given:
            raise CheckpointError(f"{where} is not in the file", hint=_HINT)
        self._given.add((*place, key))
        if offsets.get(key, at) != at:
            raise CheckpointError(f"{where} is at {list(offsets[key])} there", hint=_HINT)
        begin = int(header.begins[row]) + item.offset
        return Placed(header.dtypes[row], header.shapes[row], begin, int(header.nbytes[row]), None)

    def _header(self, item: Item) -> tuple[Header, dict[str, int], dict[str, Shape]]:
        files, where = self._files, self._files.where(item.file)
        size = files.size(item.file) - item.offset

        def read(offset: int, nbytes: int) -> bytes:
            return files.read(item.file, item.offset + offset, nbytes)

        header = header_from(read, size, where)
        return header, {n: i for i, n in enumerate(header.names)}, saved_offsets(header, where)
