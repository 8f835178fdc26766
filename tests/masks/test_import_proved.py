"""Whoever fills something proves that it is full: what a mask file declares is held against it."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import ok
from mask_files import (
    Entry,
    mapping,
    notes,
    npy,
    npy_header,
    npz_bytes,
    number,
    pickled,
    refused,
    tensor,
    text,
    torch_bytes,
    zip_bytes,
)
from support import write_safetensors

import ckdiff
from ckdiff.layout import CHUNK, Layout
from ckdiff.masks.exporting.masks import Masks
from ckdiff.masks.importing import importing, maskfile
from ckdiff.masks.importing.maskfile import Item, Kind, MaskFile, Notes
from ckdiff.masks.importing.staging import Staging

ONES = np.ones(100, bool)


def imported(path: Path, out: Path, content: bytes) -> ckdiff.MaskStore:
    path.write_bytes(content)
    return ckdiff.import_masks(path, out)


#: kind and type of the items, how many are declared, elements of the tensor, all bytes
Case = tuple[Kind, str, int, int, bytes]

# -- one place counts ------------------------------------------------------------------------------


def stage(case: Case, pieces: list[bytes], out: Path) -> Any:
    """The bytes of mask that a reader's pieces become."""
    kind, dtype, length, elements, _ = case
    item = Item("layers.0.w", kind, (length,), np.dtype(dtype), lambda: iter(pieces))
    layout = Layout(np.array([elements, 64], np.int64))
    with ExitStack() as stack:
        staging = Staging(layout, out, stack)
        staging.add(item, 0, elements)
        staging.finish()
        mask = np.zeros(layout.total // 8, np.uint8)
        staging.read(0, mask)
        return mask


WHOLE: list[Case] = [
    ("flags", "u1", 1000, 1000, b"\1" * 1000),
    ("packed", "u1", 125, 1000, b"\xff" * 125),
    ("indices", "<i4", 1000, 1000, np.arange(1000, dtype="<i4").tobytes()),
    ("indices", "<u8", 1000, 1000, np.arange(1000, dtype="<u8")[::-1].tobytes()),
]


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("cut", [1, 7, 8, 64, 999, 10_000])
def test_pieces_of_any_size_are_put_together(case: Case, cut: int, tmp_path: Path) -> None:
    data = case[-1]
    pieces = [data[at : at + cut] for at in range(0, len(data), cut)]
    mask = stage(case, pieces, tmp_path / "out")
    assert mask[:125].tolist() == [255] * 125
    assert not mask[125:].any()


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("left_out", [1, 8, 100, 125])
def test_what_ends_early_is_never_unchanged(case: Case, left_out: int, tmp_path: Path) -> None:
    data = case[-1]
    with pytest.raises(ckdiff.CheckpointError, match=r"mask of layers\.0\.w ends early"):
        stage(case, [data[: len(data) - left_out]], tmp_path / "out")


@pytest.mark.parametrize("case", WHOLE, ids=lambda case: f"{case[0]}-{case[1]}")
@pytest.mark.parametrize("more", [1, 8, 64, 5000])
def test_what_is_too_much_never_reaches_the_next_tensor(
    case: Case, more: int, tmp_path: Path
) -> None:
    data = case[-1]
    with pytest.raises(ckdiff.CheckpointError, match=r"mask of layers\.0\.w goes on after its"):
        stage(case, [data, bytes(more)], tmp_path / "out")


@pytest.mark.parametrize("kind", ["flags", "packed"])
def test_what_is_declared_must_fill_the_tensor(kind: Kind, tmp_path: Path) -> None:
    size = 800 if kind == "flags" else 100
    for elements in (700, 1000):
        with pytest.raises(ckdiff.CheckpointError, match=f"does not fill its {elements:,}"):
            stage((kind, "u1", size, elements, b""), [bytes(size)], tmp_path / "out")


def test_a_reader_that_lies_is_found_whatever_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lying(path: str, stack: ExitStack) -> MaskFile:
        item = Item("a", "flags", (1000,), np.dtype("u1"), lambda: iter([b"\1" * 100]))
        return MaskFile("new", [item], [], Notes(), {})

    monkeypatch.setattr(importing, "open_mask_file", lying)
    assert "the mask of a ends early: 100 items of 1,000" in refused(tmp_path / "f", tmp_path / "o")


@pytest.mark.parametrize("kind", ["safetensors", "npz", "torch"])
def test_a_file_that_is_cut_while_it_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = np.ones(3 << 20, bool)
    path = tmp_path / "f"
    if kind == "safetensors":
        write_safetensors(path, {"a": ("BOOL", flags.shape, flags.tobytes())})
    elif kind == "npz":
        path.write_bytes(npz_bytes({"a": flags}))
    else:
        content = pickled(mapping({"a": tensor("0", flags.size, flags.shape)}))
        path.write_bytes(torch_bytes(content, {"0": flags.tobytes()}))
    whole = maskfile.items_of

    def cut(item: Item) -> Iterator[Any]:
        for piece in whole(item):
            yield piece
            os.truncate(path, 1 << 20)

    monkeypatch.setattr("ckdiff.masks.importing.staging.items_of", cut)
    assert "was truncated" in refused(path, tmp_path / "o")


def test_a_file_that_is_rewritten_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(npz_bytes({"a": ONES}))
    finish = Staging.finish

    def rewritten(self: Staging) -> None:
        finish(self)
        path.write_bytes(npz_bytes({"a": ~ONES}))
        os.utime(path, (1, 1))  # whatever the clock of the file system

    monkeypatch.setattr(Staging, "finish", rewritten)
    assert "was rewritten" in refused(path, tmp_path / "o")


# -- npz -------------------------------------------------------------------------------------------

GOOD = npy(ONES)


def one(**changes: Any) -> bytes:
    """An archive of one mask with one lie."""
    return zip_bytes([Entry(b"a.npy", **({"data": GOOD} | changes))])


def shaped(dims: str, data: bytes = b"", descr: str = "|b1", order: str = "False") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {dims}, }}"
    return zip_bytes([Entry(b"a.npy", npy_header(text + "\n", data))])


def wide(size: int, packed: int) -> bytes:
    return b"\1\0\x10\0" + size.to_bytes(8, "little") + packed.to_bytes(8, "little")


def twice_packed() -> bytes:
    """A member whose bytes go on behind the end of the stream."""
    raw = zlib.compress(GOOD)[2:-4] + b"more"
    lies: dict[str, Any] = {"method": 8, "size": len(GOOD), "checksum": zlib.crc32(GOOD)}
    entry = zip_bytes([Entry(b"a.npy", raw, **(lies | {"method": 0}))])
    return entry.replace(b"\0\0\0\0\x21\0", b"\x08\0\0\0\x21\0")


ALL = 0xFFFFFFFF
HOSTILE_NPZ: dict[str, Callable[[], bytes]] = {
    # sizes
    "header declares more": lambda: shaped("(1000,)", b"\1" * 100),
    "header says less": lambda: shaped("(10,)", b"\1" * 100),
    "directory declares more": lambda: one(size=len(GOOD) + 900, packed=len(GOOD) + 900),
    "directory says less": lambda: one(size=len(GOOD) - 9, packed=len(GOOD) - 9),
    "both say less": lambda: one(size=len(GOOD) - 1, packed=len(GOOD) - 1, checksum=1),
    "stored in two sizes": lambda: one(size=len(GOOD) - 1),
    "unpacks to less": lambda: one(method=8, size=len(GOOD) + 1),
    "unpacks to more": lambda: one(method=8, size=len(GOOD) - 1),
    "ends early": lambda: one(data=GOOD[:-10], size=len(GOOD), packed=len(GOOD)),
    "unpacked ends early": lambda: one(data=GOOD[:-10], size=len(GOOD), method=8),
    "unpacked goes on": lambda: one(data=GOOD + b"\1" * 10, size=len(GOOD), method=8),
    "another stream follows": lambda: twice_packed(),
    "packed is cut": lambda: one(method=8, packed=30),
    "packed goes on": lambda: one(method=8, packed=len(GOOD)),
    "wide sizes lie": lambda: one(size=ALL, packed=ALL, extra=wide(1 << 40, 1 << 40)),
    "wide sizes are huge": lambda: one(size=ALL, packed=ALL, extra=wide(1 << 63, 1 << 63)),
    "wide sizes are cut": lambda: one(size=ALL, packed=ALL, extra=b"\1\0\x08\0" + bytes(8)),
    "no wide sizes": lambda: one(size=ALL, packed=ALL),
    "damaged extra": lambda: one(extra=b"\1\0\xff\0"),
    # told twice, in two ways
    "local size": lambda: one(local={"size": len(GOOD) - 1}),
    "local packed": lambda: one(local={"packed": 1}),
    "local checksum": lambda: one(local={"checksum": 1}),
    "local method": lambda: one(local={"method": 8}),
    "local flags": lambda: one(local={"flags": 8}),
    "local name": lambda: one(local={"name": b"b.npy"}),
    "local wide": lambda: one(local={"size": ALL, "packed": ALL, "extra": wide(1, 1)}),
    "sizes that follow": lambda: one(flags=8, local={"size": 7, "packed": 0, "checksum": 0}),
    "second name": lambda: one(extra=b"\x75\x70\x06\0\1aaaab"),
    # bytes
    "checksum": lambda: one(checksum=zlib.crc32(GOOD) ^ 1),
    "no checksum": lambda: one(checksum=0),
    "encrypted": lambda: one(flags=1),
    "patched": lambda: one(flags=0x20),
    "method": lambda: zip_bytes([Entry(b"a.npy", GOOD, local={"method": 12}, method=12)]),
    "offset": lambda: one(offset=3),
    "offset past the end": lambda: one(offset=1 << 30),
    "before": lambda: zip_bytes([Entry(b"a.npy", GOOD, offset=0)], before=b"PK\3\4" * 20),
    "twice": lambda: zip_bytes([Entry(b"a.npy", GOOD), Entry(b"a.npy", GOOD)]),
    "shared": lambda: zip_bytes([Entry(b"a.npy", GOOD), Entry(b"b.npy", GOOD, offset=0)]),
    "inside another": lambda: zip_bytes(
        [
            Entry(b"a.npy", npy(np.frombuffer(zip_bytes([Entry(b"b.npy", GOOD)]), np.uint8))),
            Entry(b"b.npy", GOOD, offset=30 + 5 + 128),
        ]
    ),
    "two ends": lambda: one()[:-2] + (len(one()).to_bytes(2, "little") + one()),
    "cut": lambda: one()[:-1],
    "empty": lambda: b"PK\3\4",
    "more behind": lambda: one() + b"x",
    # names
    "nul": lambda: zip_bytes([Entry(b"a\0b.npy", GOOD)]),
    "not utf-8": lambda: zip_bytes([Entry(b"\xff.npy", GOOD, flags=0x800)]),
    "surrogate": lambda: zip_bytes([Entry(b"\xed\xa0\x80.npy", GOOD, flags=0x800)]),
    "folder": lambda: zip_bytes([Entry(b"a/", b"")]),
    # headers
    "no shape": lambda: shaped("100", b"\1" * 100),
    "in brackets": lambda: shaped("(100)", b"\1" * 100),
    "bool shape": lambda: shaped("(True,)", b"\1"),
    "float shape": lambda: shaped("(1e2,)", b"\1" * 100),
    "negative": lambda: shaped("(-1, -100)", b"\1" * 100),
    "called": lambda: shaped("(len('a'),)", b"\1"),
    "huge by nothing": lambda: shaped("(0, 99999999999999999999)"),
    "65 dimensions": lambda: shaped("(" + "1," * 65 + ")", b"\1"),
    "too many": lambda: shaped("(1152921504606846976, 1152921504606846976)"),
    "wraps": lambda: shaped("(4294967296, 4294967296)"),
    "fortran": lambda: shaped("(2, 3)", b"\1" * 6, order="True"),
    "fortran is 1": lambda: shaped("(6,)", b"\1" * 6, order="1"),
    "deep": lambda: shaped("(" * 9000 + ")" * 9000),
    "long": lambda: zip_bytes([Entry(b"a.npy", npy_header(" " * 65_535))]),
    "very long": lambda: zip_bytes([Entry(b"a.npy", b"\x93NUMPY\2\0" + b"\xff" * 4 + bytes(99))]),
    "short": lambda: zip_bytes([Entry(b"a.npy", b"\x93NUMPY\1\0")]),
    "header twice": lambda: shaped("(1,), 'shape': (2,)", b"\1"),
    "another field": lambda: shaped("(1,), 'x': (2,)", b"\1"),
    "version 4": lambda: zip_bytes([Entry(b"a.npy", npy_header("", version=4))]),
    **{
        f"dtype {descr}": (lambda d: lambda: shaped("(1,)", bytes(8), d))(descr)
        for descr in ("|O", "|V8", "<M8[s]", "<f8", "<c8", "|S8", "<U2", "<i16", "i0", "<b1x", "")
    },
    "structured": lambda: shaped("(1,)", b"\1", "|u1')], 'x': [('f', '|b1"),
    "padding": lambda: npz_bytes(
        {"a": np.array([255], np.uint8)}, notes({"a": ["U8", [7]]}, encoding="packed")
    ),
    # metadata
    "json": lambda: npz_bytes({"a": ONES}, b"{nonsense"),
    "json goes on": lambda: npz_bytes({"a": ONES}, b"{} {}"),
    "json deep": lambda: npz_bytes({"a": ONES}, b"[" * 100_000),
    "json NaN": lambda: npz_bytes({"a": ONES}, b'{"format": NaN}'),
    "ours and a number": lambda: npz_bytes({"a": ONES}, b'{"format": "ckdiff-masks", "rule": 1}'),
    "ours and cut": lambda: npz_bytes({"a": ONES}, b'{"format": "ckdiff-masks", "rule": "ex'),
    "ours twice": lambda: npz_bytes(
        {"a": ONES}, b'{"format":"ckdiff-masks","rule":"exact","rule":"ulp=1"}'
    ),
    "surrogate in the rule": lambda: npz_bytes({"a": ONES}, notes({}, rule="\ud800")),
    "long rule": lambda: npz_bytes({"a": ONES}, notes({}, rule="x" * 10**6)),
    "tensor twice": lambda: npz_bytes(
        {"a": ONES}, notes({}) | {"tensors": '{"a": ["U8", [100]], "a": ["U8", [100]]}'}
    ),
    "long name": lambda: npz_bytes({"a" * 60_000: np.ones(3)}),
}


@pytest.mark.parametrize("case", HOSTILE_NPZ)
def test_hostile_npz(case: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(HOSTILE_NPZ[case]())
    line = refused(tmp_path / "f", tmp_path / "out")
    assert line.startswith((str(tmp_path / "f"), "the mask of a "))
    assert WORDS.get(case, "") in line


#: where another check might find something as well, later or by chance
WORDS = {
    "unpacked ends early": "has another size than the zip says",
    "unpacked goes on": "has another size than the zip says",
    "inside another": "share bytes",
    "two ends": "two directories",
    "second name": "second name",
    "begins late": "declares more elements than it holds",
    "long strides": "declares more elements than it holds",
    "storage is short": "are declared and 100 are there",
    "storage is long": "are declared and 100 are there",
}
HONEST_NPZ: dict[str, Callable[[], bytes]] = {
    "as it is": one,
    "packed": lambda: one(method=8),
    "a comment": lambda: zip_bytes([Entry(b"a.npy", GOOD)], comment=b"made by hand"),
    "sizes that follow": lambda: one(flags=8, local={"size": 0, "packed": 0, "checksum": 0}),
    "wide before the data": lambda: one(
        local={"size": ALL, "packed": ALL, "extra": wide(len(GOOD), len(GOOD))}
    ),
    "no blanks": lambda: zip_bytes(
        [
            Entry(
                b"a.npy",
                npy_header('{"shape":(100,),"descr":"|b1","fortran_order":False}', bytes(ONES)),
            )
        ]
    ),
    "an int64": lambda: shaped("(100L,)", b"\1" * 100),
    "a question mark": lambda: shaped("(100,)", b"\1" * 100, "|?"),
    "unsigned": lambda: shaped("(100,)", b"\1" * 100, "|u1"),
    "foreign metadata": lambda: npz_bytes({"a": ONES}, {"step": 3, "nested": {"a": [1.5]}}),
    **{
        f"version {version}": (
            lambda v: (
                lambda: zip_bytes(
                    [Entry(b"a.npy", npy_header(GOOD[10:128].decode(), b"\1" * 100, v))]
                )
            )
        )(version)
        for version in (2, 3)
    },
}


@pytest.mark.parametrize("case", HONEST_NPZ)
def test_honest_npz(case: str, tmp_path: Path) -> None:
    store = imported(tmp_path / "f", tmp_path / "out", HONEST_NPZ[case]())
    assert store.tensors[0].name == "a"
    assert store.mask("a").tolist() == [True] * 100


def test_names_are_what_numpy_reads(tmp_path: Path) -> None:
    names = ["/etc/passwd", "../../up", "a\\b", "é", "", "layers.2.npy", "C:x", "\n\x1b[31m"]
    np.savez(tmp_path / "f.npz", **dict.fromkeys(names, ONES))  # type: ignore[arg-type]
    store = ckdiff.import_masks(tmp_path / "f.npz", tmp_path / "out")
    assert sorted(t.name for t in store.tensors) == sorted(names)
    entry = Entry(b"\x82.npy", GOOD)  # cp437, as zips without the flag are read
    store = imported(tmp_path / "g", tmp_path / "out2", zip_bytes([entry]))
    assert [t.name for t in store.tensors] == ["é"]
    with np.load(tmp_path / "g") as archive:
        assert archive.files == ["é"]


def test_archives_that_numpy_streams(tmp_path: Path) -> None:
    class Pipe:
        """A file that cannot go back, so that sizes follow the data."""

        def __init__(self, file: Any) -> None:
            self.write, self.flush = file.write, file.flush

    with open(tmp_path / "f", "wb") as file, zipfile.ZipFile(Pipe(file), "w", 8) as archive:  # type: ignore[call-overload]
        for name in "ab":
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                member.write(GOOD)
    store = ckdiff.import_masks(tmp_path / "f", tmp_path / "out")
    assert [t.changed["exact"] for t in store.tensors] == [100, 100]


def test_more_members_than_a_zip_counts(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f", "w") as archive:
        for i in range(65_536):
            archive.writestr(f"{i}.npy", npy(np.ones((), bool)) if i < 2 else b"")
    assert "2.npy is not an array" in refused(tmp_path / "f", tmp_path / "out")


# -- torch -----------------------------------------------------------------------------------------

BYTES = {"0": b"\1" * 100}


def saved(view: bytes, storages: dict[str, bytes] | None = None, **options: Any) -> bytes:
    return torch_bytes(pickled(mapping({"a": view})), storages or BYTES, **options)


def content(raw: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    return torch_bytes(pickled(raw), storages or BYTES)


REBUILD = b"ctorch._utils\n_rebuild_"
HOSTILE_TORCH: dict[str, Callable[[], bytes]] = {
    # sizes
    "storage is short": lambda: saved(tensor("0", 1000, [1000])),
    "storage is long": lambda: saved(tensor("0", 50, [50])),
    "storage is not there": lambda: saved(tensor("1", 100, [100])),
    "storage leads out": lambda: saved(tensor("../version", 2, [2])),
    "negative storage": lambda: saved(tensor("0", -100, [100])),
    "declares more": lambda: saved(tensor("0", 100, [1000])),
    "begins late": lambda: saved(tensor("0", 100, [100], offset=1)),
    "begins before": lambda: saved(tensor("0", 100, [50], offset=-1)),
    "begins far out": lambda: saved(tensor("0", 100, [1], offset=1 << 62)),
    "expanded": lambda: saved(tensor("0", 100, [1 << 40], [0])),
    "expanded twice": lambda: saved(tensor("0", 100, [20, 20], [0, 1])),
    "long strides": lambda: saved(tensor("0", 100, [10, 10], [11, 1])),
    "negative strides": lambda: saved(tensor("0", 100, [10], [-1], offset=50)),
    "strides wrap": lambda: saved(tensor("0", 100, [2, 2], [1 << 63, 1 << 63])),
    "negative shape": lambda: saved(tensor("0", 100, [-10, -10], [10, 1])),
    "more strides": lambda: saved(tensor("0", 100, [100], [1, 1])),
    "65 dimensions": lambda: saved(tensor("0", 100, [1] * 65, [1] * 65)),
    "wide elements": lambda: saved(tensor("0", 100, [100], storage="IntStorage")),
    "float": lambda: saved(tensor("0", 25, [25], storage="FloatStorage")),
    "bfloat": lambda: saved(tensor("0", 50, [50], storage="BFloat16Storage")),
    "unknown storage": lambda: saved(tensor("0", 100, [100], storage="QUInt8Storage")),
    "two": lambda: saved(tensor("0", 100, [100]), {"0": b"\2" * 100}),
    # the archive
    "compressed": lambda: saved(tensor("0", 100, [100]), method=8),
    "checksum": lambda: saved(tensor("0", 100, [100])).replace(b"\1" * 100, b"\1" * 99 + b"\0"),
    "big-endian": lambda: saved(tensor("0", 100, [100]), order=b"big"),
    "long order": lambda: saved(tensor("0", 100, [100]), order=b"little" * 10),
    "two pickles": lambda: zip_bytes([Entry(b"a/data.pkl", b"."), Entry(b"b/data.pkl", b".")]),
    "deeper": lambda: zip_bytes([Entry(b"a/b/data.pkl", pickled(b"}"))]),
    "script": lambda: zip_bytes([
        Entry(b"a/data.pkl", pickled(b"}")), Entry(b"a/constants.pkl", b"")
    ]),
    # the pickle
    "code": lambda: content(b"cos\nmkdir\n" + text("bomb") + b"\x85R"),
    "code among masks": lambda: content(
        mapping({"masks": b"}", "x": b"cos\nmkdir\n" + text("bomb") + b"\x85R"})
    ),
    "new object": lambda: content(b"cos\nmkdir\n)\x81"),
    "stack global": lambda: content(text("os") + text("mkdir") + b"\x93"),
    "instance": lambda: content(b"(ios\nmkdir\n"),
    "extension": lambda: content(b"\x82\1"),
    "memory": lambda: content(b"cbuiltins\nbytearray\n" + number(1 << 62) + b"\x85R"),
    "a tensor of nothing": lambda: content(b"ctorch\nTensor\n" + number(1 << 40) + b"\x85R"),
    "meta": lambda: content(mapping({"a": REBUILD + b"meta_tensor_no_storage\n)R"})),
    "sparse": lambda: content(mapping({"a": REBUILD + b"sparse_tensor\n)R"})),
    "quantized": lambda: content(mapping({"a": REBUILD + b"qtensor\n)R"})),
    "wrong arguments": lambda: content(mapping({"a": REBUILD + b"tensor_v2\n)R"})),
    "long text": lambda: content(b"X\xff\xff\xff\x7fabc"),
    "long bytes": lambda: content(b"\x8e" + b"\xff" * 8),
    "long number": lambda: content(mapping({"a": b"\x8a\xff" + b"\1" * 255})),
    "far memo": lambda: content(b"}r\xff\xff\xff\x7f"),
    "no memo": lambda: content(b"h\0"),
    "no stack": lambda: content(b"s"),
    "no mark": lambda: content(b"t"),
    "no end": lambda: torch_bytes(b"\x80\2}", BYTES),
    "goes on": lambda: torch_bytes(pickled(b"}") + b"x", BYTES),
    "nothing": lambda: torch_bytes(b"", BYTES),
    "surrogate": lambda: content(mapping({"\ud800": tensor("0", 100, [100])})),
    "twice": lambda: content(b"}(" + (text("a") + tensor("0", 100, [100])) * 2 + b"u"),
    "number": lambda: content(b"}(" + number(1) + tensor("0", 100, [100]) + b"u"),
    "tuple": lambda: content(b"}" + b"N" + b"\x85" * 100_000 + b"Ns"),
    "itself": lambda: content(b"}q\0" + text("a") + b"h\0s"),
    "list": lambda: content(b"]" + tensor("0", 100, [100]) + b"a"),
    "text": lambda: content(mapping({"a": text("b")})),
    "no names": lambda: content(b"N"),
    "deep": lambda: content(b"]" + b"]" * 50_000 + b"a" * 50_000),
    "padding": lambda: content(
        mapping({
            "masks": mapping({"a": tensor("0", 1, [1], storage="ByteStorage")}),
            "metadata": mapping({
                k: text(v) for k, v in notes({"a": ["U8", [7]]}, encoding="packed").items()
            }),
        }),
        {"0": b"\xff"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_TORCH)
def test_hostile_torch(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_bytes(HOSTILE_TORCH[case]())
    assert WORDS.get(case, "") in refused(tmp_path / "f", tmp_path / "out")
    assert os.listdir(tmp_path) == ["f"]


def test_views_of_one_storage(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).random(120) < 0.5
    views = {
        "all": ([120], None, 0),
        "part": ([50], None, 33),
        "transposed": ([10, 12], [1, 10], 0),
        "every third": ([40], [3], 1),
        "windows": ([7, 11], [2, 1], 5),
        "scalar": ([], None, 7),
        "empty": ([0, 5], None, 0),
        "single": ([1, 120, 1], [999, 1, 999], 0),
        "far steps": ([1, 60], [(1 << 60) - 1, 2], 1),
    }
    items = {
        name: tensor("0", 120, shape, strides, offset)
        for name, (shape, strides, offset) in views.items()
    }
    raw = torch_bytes(pickled(mapping(items)), {"0": bits.tobytes()})
    store = imported(tmp_path / "f", tmp_path / "out", raw)
    for name, (shape, strides, offset) in views.items():
        step = [1] if strides is None and len(shape) == 1 else strides or [5, 1][: len(shape)]
        wanted = np.lib.stride_tricks.as_strided(bits[offset:], shape, step)
        assert np.array_equal(store.mask(name), wanted), name


def test_what_torch_really_writes(tmp_path: Path) -> None:
    import torch

    flags = torch.arange(1000) % 3 == 0
    base = torch.arange(100, dtype=torch.int16)
    tagged = flags.clone()
    tagged.note = "mine"  # type: ignore[attr-defined]
    masks: dict[str, Any] = {
        "plain": flags,
        "bytes": flags.to(torch.uint8),
        "signed": flags.to(torch.int8),
        "view": flags[100:200],
        "columns": flags.reshape(20, 50).T[3:7],
        "parameter": torch.nn.Parameter(flags.clone(), requires_grad=False),
        "tagged": tagged,
    }
    wanted = {name: np.asarray(mask.detach().numpy(), bool) for name, mask in masks.items()}
    for checksums in (True, False):
        torch.serialization.set_crc32_options(checksums)
        try:
            torch.save(masks, tmp_path / "f")
        finally:
            torch.serialization.set_crc32_options(True)
        store = ckdiff.import_masks(tmp_path / "f", tmp_path / f"{checksums}.zarr")
        for name, mask in wanted.items():
            assert np.array_equal(store.mask(name), mask), name
    said = {"metadata": notes({"a": ["F32", [100]], "b": ["F32", [200]]}, encoding="indices")}
    positions = {"a.indices": base[::3], "b.indices": base.to(torch.uint16)}
    torch.save({"masks": positions} | said, tmp_path / "g")
    store = ckdiff.import_masks(tmp_path / "g", tmp_path / "g.zarr")
    assert np.flatnonzero(store.mask("a")).tolist() == list(range(0, 100, 3))
    assert np.flatnonzero(store.mask("b")).tolist() == list(range(100))
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict with versions
    for name in list(state):
        state[name] = state[name] > 0
    torch.save(state, tmp_path / "h")
    assert len(ckdiff.import_masks(tmp_path / "h", tmp_path / "h.zarr").tensors) == 2


def test_reading_needs_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    store = imported(tmp_path / "f", tmp_path / "out", saved(tensor("0", 100, [100])))
    assert store.tensors[0].changed["exact"] == 100


# -- what is only declared -------------------------------------------------------------------------


def positions_file(path: Path, shape: list[int], positions: Any, dtype: str = "I64") -> Path:
    told = notes({"a": ["BF16", shape]}, encoding="indices")
    data = np.asarray(positions, {"I64": "<i8", "I32": "<i4"}[dtype])
    return write_safetensors(path, {"a.indices": (dtype, data.shape, data.tobytes())}, told)


def test_a_sparse_mask_of_a_large_model_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    finish = Staging.finish

    def watched(self: Staging) -> None:
        finish(self)
        sizes.append(os.fstat(self._fd).st_size)

    monkeypatch.setattr(Staging, "finish", watched)
    elements = 8 * CHUNK + 5
    wanted = [3, CHUNK - 1, CHUNK, 5 * CHUNK + 77, elements - 1]
    file = positions_file(tmp_path / "f", [elements], wanted)
    store = ckdiff.import_masks(file, tmp_path / "out")
    assert store.tensors[0].changed["exact"] == 5
    for place in wanted:
        low = max(0, place - 1)
        found = np.flatnonzero(store.mask("a", start=low, stop=min(place + 2, elements))) + low
        assert place in found.tolist()
    assert sizes[0] < 1000
    used = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*") if f.is_file())
    assert used < 64 << 10


@pytest.mark.parametrize("order", ["backwards", "shuffled", "interleaved"])
def test_positions_in_any_order(order: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    elements = 3 * CHUNK + 1000
    positions = np.unique(rng.integers(0, elements, 5000))
    if order == "backwards":
        given = positions[::-1]
    elif order == "shuffled":
        given = rng.permutation(positions)
    else:
        given = np.concatenate([positions[::2], positions[1::2]])
    store = ckdiff.import_masks(positions_file(tmp_path / "f", [elements], given), tmp_path / "o")
    assert store.tensors[0].changed["exact"] == len(positions)
    for place in positions[::500].tolist():
        assert store.mask("a", start=place, stop=place + 1).all()
    twice = np.concatenate([given, given[-1:]])
    file = positions_file(tmp_path / "g", [elements], twice)
    assert "names a position twice" in refused(file, tmp_path / "p")
    file = positions_file(tmp_path / "h", [elements], np.concatenate([given, [elements]]))
    assert "outside its" in refused(file, tmp_path / "p")


@pytest.mark.parametrize(
    ("shape", "words"),
    [([1 << 37], "only a few bytes for them"), ([1 << 30, 1 << 29], "only a few bytes for them")],
)
def test_absurd_declarations_are_refused(shape: list[int], words: str, tmp_path: Path) -> None:
    assert words in refused(positions_file(tmp_path / "f", shape, [0]), tmp_path / "out")


def test_all_that_is_declared_is_bounded_too(tmp_path: Path) -> None:
    shapes = {f"layers.{i}": ["BF16", [1 << 36]] for i in range(65)}
    tensors = {f"{name}.indices": ("I64", (0,), b"") for name in shapes}
    file = write_safetensors(tmp_path / "f", tensors, notes(shapes, encoding="indices"))
    assert "more than any model has" in refused(file, tmp_path / "out")


def test_a_full_disk_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckdiff.outputs.checks.free_space", lambda folder: 10_000)
    monkeypatch.setattr(importing, "Staging", None)
    file = positions_file(tmp_path / "f", [1 << 30], [0])
    with pytest.raises(ckdiff.BudgetError, match="needs at least"):
        ckdiff.import_masks(file, tmp_path / "out")


def test_unsorted_positions_need_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckdiff.masks.importing.staging.free_space", lambda folder: 1000)
    file = positions_file(tmp_path / "f", [2 * CHUNK], range(2 * CHUNK - 1, 2 * CHUNK - 999, -2))
    assert ckdiff.import_masks(file, tmp_path / "a")  # in one part: nothing to put in order
    file = positions_file(tmp_path / "g", [2 * CHUNK], [CHUNK + 1, *range(500)])
    with pytest.raises(ckdiff.BudgetError, match="to put the positions of a in order"):
        ckdiff.import_masks(file, tmp_path / "b")


@pytest.mark.parametrize("kind", ["flags", "positions"])
def test_a_disk_that_fills_up_is_an_error(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckdiff.masks.importing.staging.write_all", full)
    file = tmp_path / "f"
    if kind == "flags":
        file.write_bytes(npz_bytes({"a": ONES}))
    else:
        positions_file(file, [2 * CHUNK], [CHUNK + 1, 0])
    assert "No space left" in refused(file, tmp_path / "out")


def test_a_tensor_table_of_what_is_not_there_is_passed_over(tmp_path: Path) -> None:
    shapes = {"a": ["BF16", [8]], "b": ["BF16", [1 << 50]]}
    file = write_safetensors(tmp_path / "f", {"a": ("BOOL", (8,), b"\1" * 8)}, notes(shapes))
    store = ckdiff.import_masks(file, tmp_path / "out")
    assert [(t.name, t.dtype) for t in store.tensors] == [("a", "BF16")]


# -- names that are no text ------------------------------------------------------------------------


def test_a_file_whose_name_is_no_text(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.npz")
    Path(path).write_bytes(npz_bytes({"a": ONES}))
    first = ckdiff.import_masks(path, tmp_path / "out")
    assert first.manifest["made_by"]["files"][0]["label"] == "m\\udcff.npz"
    found = json.loads(ok("import", path, "-o", str(tmp_path / "again"), "--json").stdout)
    assert found["made_by"]["files"][0]["label"] == "m\\udcff.npz"
    assert first.manifest_digest() == ckdiff.open_store(tmp_path / "again").manifest_digest()
    for to in ("safetensors", "npz", "torch"):
        out = os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")
        exported = ok("export", str(tmp_path / "out"), "--to", to, "-o", out, "--json")
        assert json.loads(exported.stdout)["to"] == to
        assert ckdiff.import_masks(out, tmp_path / to).mask("a").all()
        ok("export", str(tmp_path / "out"), "--to", to, "-o", out, "--overwrite")
        os.unlink(os.fsencode(out))


@pytest.mark.parametrize("where", ["name", "metadata", "tensors"])
def test_half_a_surrogate_pair_is_no_text(where: str, tmp_path: Path) -> None:
    told = notes({"a": ["BF16", [8]]})
    name = "\ud800" if where == "name" else "a"
    if where == "metadata":
        told["rule"] = "\ud800"
    elif where == "tensors":
        told["tensors"] = '{"\\ud800": ["BF16", [8]], "a": ["BF16", [8]]}'
    file = write_safetensors(tmp_path / "f", {name: ("BOOL", (8,), bytes(8))}, told)
    assert refused(file, tmp_path / "out")


def test_a_store_with_such_a_name_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = imported(tmp_path / "f", tmp_path / "s", npz_bytes({"a": ONES}))
    monkeypatch.setattr(Masks, "pieces", None)  # nothing is read
    before = Masks.__init__

    def named(self: Masks, *args: Any, **options: Any) -> None:
        before(self, *args, **options)
        self.names = ["\ud800"]

    monkeypatch.setattr(Masks, "__init__", named)
    kinds: list[str] = ["safetensors", "indices", "npz", "torch"]
    for to in kinds:
        with pytest.raises(ckdiff.StoreCorrupt, match="not valid text"):
            ckdiff.export_masks(store, tmp_path / "out", to=to)
    assert sorted(os.listdir(tmp_path)) == ["f", "s"]
