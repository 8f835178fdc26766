"""The header reader: every way a header can lie; the library's verdict, but for listed reasons."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
import tracemalloc
import zipfile
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from support import safetensors_header, write_raw, write_safetensors

from ckdiff.checkpoints.formats.safetensors import HEADER_LIMIT, Header, parse_header, read_header
from ckdiff.dtypes import DTYPES
from ckdiff.errors import HeaderError

U8_EMPTY = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}


def read(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd, os.fstat(fd).st_size, str(path))
    finally:
        os.close(fd)


def refused(path: Path, *words: str) -> HeaderError:
    """Reading ``path`` is a HeaderError on one line that names the file and holds ``words``."""
    with pytest.raises(HeaderError) as caught:
        read(path)
    line = caught.value.one_line()
    assert str(path) in line
    assert "\n" not in line
    assert len(line) < 1000
    for word in words:
        assert word in line
    return caught.value


def entry(**changed: Any) -> bytes:
    """A header with one one-byte tensor ``w``, some fields replaced by raw JSON text."""
    fields = {"dtype": '"U8"', "shape": "[1]", "data_offsets": "[0,1]"} | changed
    inside = ",".join(f'"{key}":{value}' for key, value in fields.items() if value is not None)
    return f'{{"w":{{{inside}}}}}'.encode()


# -- what is accepted ------------------------------------------------------------------------------


def test_reads_columns(tmp_path: Path) -> None:
    tensors = {
        "odd": ("U8", (3,), b"abc"),
        "w": ("F32", (2, 2), bytes(16)),
        "scalar": ("F64", (), bytes(8)),
        "empty": ("BF16", (0, 7), b""),
        "nibbles": ("F4", (6,), b"xyz"),
    }
    path = write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt"}, pad=5)
    header = read(path)
    start = header.data_start
    assert header.names == list(tensors)
    assert header.dtypes == ["U8", "F32", "F64", "BF16", "F4"]
    assert header.shapes == [(3,), (2, 2), (), (0, 7), (6,)]
    assert header.begins.tolist() == [start, start + 3, start + 19, start + 27, start + 27]
    assert header.nbytes.tolist() == [3, 16, 8, 0, 3]
    assert header.metadata == {"format": "pt"}
    assert path.stat().st_size == start + 30


def test_tensors_need_not_be_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    header = {
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "none": {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]},
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    got = read(write_raw(tmp_path / "a", header, b"123"))
    assert (got.begins - got.data_start).tolist() == [1, 1, 0]


@pytest.mark.parametrize("order", list(permutations(["dtype", "shape", "data_offsets"])))
def test_fields_in_any_order_and_with_blanks(tmp_path: Path, order: tuple[str, ...]) -> None:
    fields = {"dtype": '"U8"', "shape": "[ 1 ,\t2]", "data_offsets": "[ 0 , 2 ]"}
    inside = " , ".join(f'"{key}" : {fields[key]}' for key in order)
    header = f'{{ "__metadata__" : {{ }} , "w"\n:\r{{ {inside} }} }}'.encode()
    got = read(write_raw(tmp_path / "a", header, b"12"))
    assert (got.names, got.shapes, got.nbytes.tolist()) == (["w"], [(1, 2)], [2])


def test_no_tensors_at_all(tmp_path: Path) -> None:
    for text in (b"{}", b"{ }", b"{}   ", b'{"__metadata__":{}}'):
        assert read(write_raw(tmp_path / "a", text)).names == []


BLANKS = ["", " ", "\n", "\t\r\n ", " " * 20, "\r" * 5000]


@pytest.mark.parametrize("before", BLANKS)
@pytest.mark.parametrize("after", BLANKS)
def test_blanks_around_the_object(tmp_path: Path, before: str, after: str) -> None:
    text = before.encode() + entry() + after.encode()
    got = read(write_raw(tmp_path / "a", text, b"x"))
    assert (got.names, got.begins.tolist()) == (["w"], [8 + len(text)])
    assert library_view(tmp_path / "a") == {"w": ("U8", [1], b"x")}


NULL = b'"__metadata__":null'


@pytest.mark.parametrize("blank", [b"", b" ", b"\n\t"])
def test_null_for_metadata(tmp_path: Path, blank: bytes) -> None:
    null, tensor = NULL.replace(b":", b":" + blank) + blank, entry()[1:-1]
    for inside in (null, null + b"," + tensor, tensor + b"," + null):
        data = b"x" if tensor in inside else b""
        got = read(write_raw(tmp_path / "a", b"{" + inside + b"}", data))
        assert (got.metadata, len(got.names)) == ({}, len(data))
        assert library_view(tmp_path / "a") is not None
    for wrong in (b"nul", b"nulll", b"Null", b"null null", b"none"):
        text = b"{" + inside.replace(b"null", wrong) + b"}"
        refused(write_raw(tmp_path / "a", text, b"x"), "__metadata__")
        assert library_view(tmp_path / "a") is None


UNKNOWN = [
    '"x"', "null", "true", "1", "-0", "1.5", "-1e-7", "1e-999", "9" * 300, "[]", "{}", '["a",[{}]]',
    '{"dtype":"F64","data_offsets":[0,99]}', '"\\u0061\\ud83d\\ude00"', '"é"',
    '"' + "y" * 5000 + '"', "[" * 125 + "]" * 125, '{"a":' * 125 + "1" + "}" * 125,
]  # fmt: skip
NOT_UNKNOWN = [
    "", "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "9" * 400, "01", "1.", ".5", "+1", "nul",
    "'x'", '"\\x"', '"\\ud800"', '"\n"', "[1,]", "{1:2}", '{"a"}', "[" * 126 + "]" * 126,
    '{"\\udc00":1}', '{"a":' * 126 + "1" + "}" * 126, "[NaN]", '"\\u12"', "-", "--1", "1 2",
]  # fmt: skip


@pytest.mark.parametrize("value", UNKNOWN, ids=lambda value: value[:20])
@pytest.mark.parametrize("place", range(4))
def test_unknown_fields(tmp_path: Path, value: str, place: int) -> None:
    fields = ['"dtype":"U8"', '"shape":[1]', '"data_offsets":[0,1]']
    fields.insert(place, f'"sha256" : {value}')
    text = f'{{"v":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}},"w":{{{",".join(fields)}}}}}'
    got = read(write_raw(tmp_path / "a", text.encode(), b"x"))
    assert (got.names, got.nbytes.tolist()) == (["v", "w"], [0, 1])
    assert library_view(tmp_path / "a") is not None


@pytest.mark.parametrize("value", NOT_UNKNOWN, ids=lambda value: value[:20])
def test_unknown_fields_are_json(tmp_path: Path, value: str) -> None:
    refused(write_raw(tmp_path / "a", entry(more=value), b"x"), "tensor 'w'")
    assert library_view(tmp_path / "a") is None


@pytest.mark.parametrize(
    "text",
    [
        '{"w":["U8",[1],[0,1]]}',
        '{"w":{"dtype":{"U8":null},"shape":[1],"data_offsets":[0,1]}}',
        '{"w":{"dtype":"\\u00558","shape":[1],"data_offsets":[0,1]}}',
        '{"w":{"\\u0064type":"U8","sh\\u0061pe":[1],"data_offsets":[0,1]}}',
        '{"\\u005f_metadata__":null,"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    ],
)
def test_what_the_library_reads_otherwise_written(tmp_path: Path, text: str) -> None:
    got = read(write_raw(tmp_path / "a", text.encode(), b"x"))
    assert (got.names, got.dtypes, got.shapes, got.nbytes.tolist()) == (["w"], ["U8"], [(1,)], [1])
    assert library_view(tmp_path / "a") == {"w": ("U8", [1], b"x")}


def test_many_entries_with_more_fields_are_not_looked_at_twice() -> None:
    names, text = many(3_000)
    text = text.replace(b'{"dtype"', b'{"sha256":"' + b"0" * 64 + b'","dtype"')
    assert parse_header(text, 6_000, "many").names == names


def test_every_dtype_of_the_library(tmp_path: Path) -> None:
    tensors = {name: (name, (8,), bytes(dtype.bits)) for name, dtype in DTYPES.items()}
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    assert read(path).dtypes == list(DTYPES)
    assert len(deserialize(path.read_bytes())) == len(DTYPES)


@pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "\0", '"', "\\", "日本", "\U0001f600", ""])
def test_names_are_exact_whatever_is_in_them(tmp_path: Path, name: str) -> None:
    for ascii_only in (True, False):
        text = json.dumps({name: U8_EMPTY}, ensure_ascii=ascii_only).encode()
        assert read(write_raw(tmp_path / "a", text)).names == [name]


def test_a_hostile_name_is_escaped_in_the_message(tmp_path: Path) -> None:
    header = {"\x1b[2J\n" + "x" * 10_000: U8_EMPTY | {"shape": [2]}}
    line = refused(write_raw(tmp_path / "a", header), "\\x1b[2J\\n").one_line()
    assert line.isprintable()


def many(count: int) -> tuple[list[str], bytes]:
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.weight" for i in range(count)]
    return names, safetensors_header(dict.fromkeys(names, ("U8", (2, 1), b"ab")))


def test_a_hundred_thousand_tensors() -> None:
    names, text = many(100_000)
    header = parse_header(text, 200_000, "many")
    start = header.data_start
    assert header.names == names
    assert header.begins.tolist() == list(range(start, start + 200_000, 2))


@pytest.mark.parametrize("at", [0, 1023, 1024, 1025, 2999])
def test_one_of_many_is_wrong_or_written_otherwise(at: int) -> None:
    names, text = many(3000)
    whole = parse_header(text, 6_000, "many")
    key = json.dumps(names[at]).encode()
    place = text.index(key)

    def changed(old: bytes, new: bytes) -> bytes:
        return text[:place] + text[place:].replace(old, new, 1)

    odd = parse_header(changed(b'{"dtype":"U8"', b'{"more":0,"dtype":"U8"'), 6_000, "many")
    assert (odd.names, odd.shapes) == (whole.names, whole.shapes)
    assert (odd.begins - odd.data_start).tolist() == (whole.begins - whole.data_start).tolist()
    escaped = parse_header(changed(key, b'"\\u00e9\\n"'), 6_000, "many")
    assert escaped.names == [*names[:at], "\u00e9\n", *names[at + 1 :]]
    for bad in (changed(b'"U8"', b'"U9"'), changed(b"[2,1]", b"[9223372036854775807,2]")):
        with pytest.raises(HeaderError, match=re.escape(f"tensor {names[at]!r}: ")):
            parse_header(bad + b"}", 6_000, "many")
    with pytest.raises(HeaderError, match="goes on after its closing"):
        parse_header(changed(b"},", b"}},") if at < 2999 else text + b"}", 6_000, "many")


def test_parsing_costs_little_more_memory_than_the_names() -> None:
    _, text = many(10_000)
    tracemalloc.start()
    parse_header(text, 20_000, "many")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * len(text)


def test_more_than_two_to_the_33_elements_in_a_sparse_file(tmp_path: Path) -> None:
    size = 2**33 + 3
    path = write_raw(
        tmp_path / "a", {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    )
    os.truncate(path, path.stat().st_size + size)
    assert read(path).nbytes.tolist() == [size]


# -- rows 1 and 15: the length, and files of another kind ------------------------------------------


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\x02" + bytes(size - 1) if size else b"")
    refused(path, "too short")


@pytest.mark.parametrize("length", [0, 1, 3, 100, HEADER_LIMIT + 1, 2**63, 2**64 - 1])
def test_a_declared_length_that_lies(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    tracemalloc.start()
    refused(path, "header of", "bytes")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_header_over_the_cap_in_a_file_that_has_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", HEADER_LIMIT + 1) + b"{}")
    os.truncate(path, HEADER_LIMIT + 100)
    refused(path, "100,000,001")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was executed",))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_pickle_is_refused_and_never_executed(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps([Bomb(), "x" * 1000], protocol=protocol))
    refused(path, "pickle", "never unpickles")


def test_other_files_get_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    refused(path, "zip", "never unpickles")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "Git LFS")
    path.write_bytes(b"<!DOCTYPE html><html></html>")
    refused(path, "HTML")
    path.write_bytes(b'{"weight_map": {}}')
    refused(path, "JSON")


# -- row 2: text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf{}",
        " {}".encode("utf-16"),
        "{}".encode("utf-16-le"),
        "{}".encode("utf-32-le"),
        b"\x0c{}",
        b"\0{}",
        b"{}\x0b",
        b" \xef\xbb\xbf{}",
        b" " * 100,
        b"{}\0",
        b"{}{}",
        b"[]",
        b"null",
        b"{",
        b"{,}",
        b'{"__metadata__":{},}',
        b'{"__metadata__":{"a":"b",}}',
        b'{"__metadata__":{"a":"b"}',
        b'{"__metadata__"',
        b"{'w':{}}",
        b"{w:1}",
        b'{"w"}',
        b'{"w":}',
        b'{"w":{}',
        b"{//\n}",
    ],
)
def test_text_that_is_not_a_plain_object(tmp_path: Path, text: bytes) -> None:
    refused(write_raw(tmp_path / "a", text))


@pytest.mark.parametrize(
    "bad", [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2"]
)
def test_bad_utf8_anywhere(tmp_path: Path, bad: bytes) -> None:
    name = entry().replace(b'"w"', b'"w' + bad + b'"')
    refused(write_raw(tmp_path / "a", name, b"x"), "UTF-8")
    metadata = b'{"__metadata__":{"k":"' + bad + b'"}}'
    refused(write_raw(tmp_path / "a", metadata), "UTF-8")
    refused(write_raw(tmp_path / "a", entry(dtype='"?"').replace(b"?", bad), b"x"), "'w'", "UTF-8")


@pytest.mark.parametrize(
    "name", [rb"\ud800", rb"\udc00x", rb"\x41", rb"\u12", b"\n", b"\x1f", b"\\"]
)
def test_strings_that_are_not_json(tmp_path: Path, name: bytes) -> None:
    refused(write_raw(tmp_path / "a", entry().replace(b'"w"', b'"' + name + b'"'), b"x"))


# -- rows 3 and 4: numbers and nesting -------------------------------------------------------------

NOT_NUMBERS = [
    "NaN", "Infinity", "-Infinity", "true", "false", "null", "1.0", "1e0", "-1", "-0", "01", "+1",
    "0x1", "1_0", '"1"', "[1]", "{}", str(2**63), str(2**64), "9" * 5000, "-" + "9" * 5000,
    "\uff11",
]  # fmt: skip


@pytest.mark.parametrize("number", NOT_NUMBERS)
def test_a_number_that_is_not_a_plain_one(tmp_path: Path, number: str) -> None:
    refused(write_raw(tmp_path / "a", entry(shape=f"[{number}]"), b"x"), "tensor 'w'")
    refused(write_raw(tmp_path / "a", entry(data_offsets=f"[0,{number}]"), b"x"), "tensor 'w'")
    refused(write_raw(tmp_path / "a", entry(data_offsets=f"[{number},1]"), b"x"), "tensor 'w'")
    refused(write_raw(tmp_path / "a", entry(shape=f"[1,{number},1]"), b"x"), "tensor 'w'")


@pytest.mark.parametrize("offsets", ["[]", "[0]", "[0,1,1]", "[0 1]", "[0,,1]", "[0,1,]", '"0,1"'])
def test_offsets_must_be_two_numbers(tmp_path: Path, offsets: str) -> None:
    refused(write_raw(tmp_path / "a", entry(data_offsets=offsets), b"x"), "tensor 'w'")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(tmp_path: Path, opening: str) -> None:
    deep = opening * 200_000
    refused(write_raw(tmp_path / "a", entry(shape=deep), b"x"), "tensor 'w'", "deep")
    refused(write_raw(tmp_path / "a", entry(more=deep), b"x"), "tensor 'w'", "deep")
    refused(write_raw(tmp_path / "a", f'{{"w":{deep}'.encode()), "tensor 'w'", "deep")
    refused(write_raw(tmp_path / "a", f'{{"__metadata__":{{"k":{deep}'.encode()), "__metadata__")


def test_long_hostile_text_takes_no_long_time(tmp_path: Path) -> None:
    size = 3_000_000
    for text in (
        b'{"' + b"\\n" * size,
        b'{"' + b"\\",
        b'{"w":{"dtype":"U8","shape":[' + b"1," * size,
        b'{"w":{"dtype":"U8","shape":[' + b" " * size,
        b"{" + b" " * size,
        b'{"w":{' + b'"a":1,' * 150_000 + b'"a":1}}',
    ):
        refused(write_raw(tmp_path / "a", text))


# -- row 5: duplicates, unknown and missing fields -------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b'{"w":%s,"w":%s}',
        b'{"w":%s,"\\u0077":%s}',
        b'{"__metadata__":{},"w":%s,"__metadata__":{}}',
        b'{"__metadata__":{"a":"1","a":"1"},"w":%s}',
        b'{"__metadata__":{"a":"1","\\u0061":"1"},"w":%s}',
    ],
)
def test_duplicate_keys(tmp_path: Path, text: bytes) -> None:
    text = text.replace(b"%s", json.dumps(U8_EMPTY).encode())
    refused(write_raw(tmp_path / "a", text), "duplicate key")


def test_duplicate_fields(tmp_path: Path) -> None:
    twice = entry().replace(b'"shape":[1]', b'"shape":[1],"shape":[1]')
    refused(write_raw(tmp_path / "a", twice, b"x"), "tensor 'w'", "duplicate key 'shape'")
    instead = entry(dtype=None).replace(b'"shape":[1]', b'"shape":[1],"shape":[1]')
    refused(write_raw(tmp_path / "a", instead, b"x"), "tensor 'w'", "duplicate key 'shape'")


def test_these_three_fields_must_be_there(tmp_path: Path) -> None:
    for field in ("dtype", "shape", "data_offsets"):
        refused(write_raw(tmp_path / "a", entry(**{field: None}), b"x"), "tensor 'w'", field)
    for value in ("null", "[]", '"U8"', "1", "{}"):
        refused(write_raw(tmp_path / "a", f'{{"w":{value}}}'.encode(), b"x"), "tensor 'w'")


@pytest.mark.parametrize(
    "dtype", ['"u8"', '"F31"', '""', '"U8 "', "null", "8", '["U8"]', '"\\u0055x"']
)
def test_unknown_dtypes(tmp_path: Path, dtype: str) -> None:
    refused(write_raw(tmp_path / "a", entry(dtype=dtype), b"x"), "tensor 'w'", "dtype")


@pytest.mark.parametrize(
    "value",
    [
        "[]",
        '""',
        "1",
        '{"a":1}',
        '{"a":null}',
        '{"a":{"b":"c"}}',
        '{"a"}',
        json.dumps(U8_EMPTY),
    ],
)
def test_metadata_must_be_strings(tmp_path: Path, value: str) -> None:
    refused(write_raw(tmp_path / "a", f'{{"__metadata__":{value}}}'.encode()), "__metadata__")


# -- rows 6, 7 and 8: ranges and sizes -------------------------------------------------------------


def ranges(*pairs: tuple[int, int]) -> dict[str, Any]:
    return {
        f"t{i}": {"dtype": "U8", "shape": [max(0, end - begin)], "data_offsets": [begin, end]}
        for i, (begin, end) in enumerate(pairs)
    }


@pytest.mark.parametrize(
    ("pairs", "data", "words"),
    [
        ([(0, 4), (2, 6)], 6, ("'t1'", "overlaps 't0'")),
        ([(0, 4), (0, 4)], 4, ("'t1'", "overlaps 't0'")),
        ([(0, 6), (2, 4)], 6, ("'t1'", "overlaps 't0'")),
        ([(0, 6), (3, 3)], 6, ("'t1'", "overlaps 't0'")),
        ([(0, 2), (3, 4)], 4, ("'t1'", "hole")),
        ([(1, 4)], 4, ("'t0'", "hole")),
        ([(4, 2)], 4, ("'t0'", "begins at 4 but ends at 2")),
        ([(0, 5)], 4, ("'t0'", "only 4")),
        ([(2**62, 2**62 + 1)], 4, ("'t0'", "only 4")),
        ([(0, 2**63 - 1)], 4, ("'t0'", "only 4")),
        ([(0, 4)], 5, ("1 bytes after the last tensor",)),
        ([(0, 4), (4, 4)], 5, ("1 bytes after the last tensor",)),
        ([], 1, ("1 bytes after the last tensor",)),
    ],
)
def test_ranges_cover_the_data_exactly(
    tmp_path: Path, pairs: list[tuple[int, int]], data: int, words: tuple[str, ...]
) -> None:
    refused(write_raw(tmp_path / "a", ranges(*pairs), bytes(data)), *words)


def test_missing_and_trailing_bytes(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a", {"w": ("F32", (4,), bytes(16))})
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "'w'", "only 15", "the file was cut: fetch it or save it again")
    path.write_bytes(whole + b"\0")
    refused(path, "1 bytes after")


@pytest.mark.parametrize(
    "shape",
    [
        [2**62, 2, 2],
        [2**40, 2**40, 0],
        [0, 2**40, 2**40],
        [2**40, 0, 2**40],
        [2**32, 2**32],
        [0, 2**62, 2**62],
        [2**60, 16],
        [2**31] * 3,
    ],
)
def test_shapes_that_overflow_in_either_order(tmp_path: Path, shape: list[int]) -> None:
    for dims in (shape, shape[::-1]):
        for dtype in ("U8", "F64", "F4"):
            header = {"w": {"dtype": dtype, "shape": dims, "data_offsets": [0, 0]}}
            refused(write_raw(tmp_path / "a", header), "tensor 'w'")


def test_bits_that_overflow_though_elements_do_not(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F64", "shape": [2**58], "data_offsets": [0, 0]}}
    refused(write_raw(tmp_path / "a", header), "tensor 'w'", "overflow")


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [("F32", [1], 3), ("F32", [1], 5), ("U8", [], 0), ("U8", [0], 1), ("F4", [3], 1),
     ("F4", [3], 2), ("F6_E2M3", [1], 1), ("F4", [2], 2), ("BOOL", [8], 1)],
)  # fmt: skip
def test_a_span_of_another_size(tmp_path: Path, dtype: str, shape: list[int], size: int) -> None:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    refused(write_raw(tmp_path / "a", header, bytes(size)), "tensor 'w'", dtype)


def test_more_dimensions_than_numpy_has(tmp_path: Path) -> None:
    assert read(write_raw(tmp_path / "a", entry(shape=str([1] * 64)), b"x")).shapes == [(1,) * 64]
    refused(write_raw(tmp_path / "a", entry(shape=str([1] * 65)), b"x"), "65 dimensions")


# -- row 9: against the library --------------------------------------------------------------------


def library_view(path: Path) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What the library reads, both of its ways agreeing; None where either of them refuses."""
    blob = path.read_bytes()
    try:
        items = {n: (d["dtype"], d["shape"], bytes(d["data"])) for n, d in deserialize(blob)}
        with safe_open(path, "np") as file:
            assert sorted(file.keys()) == sorted(items)
    except SafetensorError:
        return None
    return items


def reading(path: Path) -> Header | str:
    """What we read; or why we do not."""
    try:
        return read(path)
    except HeaderError as error:
        return str(error)


#: why a header is refused that the library takes: it has two meanings, or numbers that we lack
STRICTER = (
    "duplicate key",
    "too large (overflow)",
    "its shape is not a list of whole numbers",  # 2**63 and more beside a dimension of 0
    "more than 64",  # dimensions
    "a value longer than 1048576 bytes",
)


def agrees_with_the_library(path: Path, header: bytes, data: bytes) -> None:
    write_raw(path, header, data)
    theirs = library_view(path)
    ours = reading(path)
    if isinstance(ours, str):
        event(f"refused, library {'refuses' if theirs is None else 'accepts'}")
        assert theirs is None or any(reason in ours for reason in STRICTER), ours
        return
    event("accepted")
    assert theirs is not None, "accepted what the library rejects"
    blob = path.read_bytes()
    assert sorted(ours.names) == sorted(theirs)
    for name, dtype, shape, begin, size in zip(
        ours.names,
        ours.dtypes,
        ours.shapes,
        ours.begins.tolist(),
        ours.nbytes.tolist(),
        strict=True,
    ):
        assert theirs[name] == (dtype, list(shape), blob[begin : begin + size])


@st.composite
def valid_tensors(draw: st.DrawFn) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    result: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name in draw(st.lists(st.text(max_size=5), unique=True, max_size=4)):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        elements = 1
        for dim in shape:
            elements *= dim
        size = DTYPES[dtype].nbytes(elements)
        if size is not None and name != "__metadata__":
            result[name] = (dtype, shape, bytes(size))
    return result


one_file = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@one_file
@given(tensors=valid_tensors(), pad=st.integers(0, 9), metadata=st.none() | st.dictionaries(
    st.text(max_size=3), st.text(max_size=3), max_size=2))  # fmt: skip
def test_every_valid_file_is_accepted(
    tmp_path: Path, tensors: dict[str, Any], pad: int, metadata: dict[str, str] | None
) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", tensors, metadata, pad)
    got = read(path)
    assert got.names == list(tensors)
    assert got.metadata == (metadata or {})
    assert library_view(path) is not None


numbers = st.integers(-1, 20) | st.sampled_from(
    [2**31, 2**32, 2**40, 2**62, 2**63, 2**64, 1.0, True]
)
values = st.one_of(
    numbers,
    st.none(),
    st.text(max_size=2),
    st.lists(numbers, max_size=3),
    st.sampled_from(list(DTYPES)),
)


@st.composite
def near_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A header that would be right but for some changed fields, and its bytes of data."""
    header: dict[str, Any] = {}
    begin = 0
    for name in draw(st.permutations("abc"))[: draw(st.integers(0, 3))]:
        dtype = draw(st.sampled_from(["U8", "BF16", "F4", "F6_E3M2", "F64"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4]), max_size=3))
        end = begin + math.prod(shape) * DTYPES[dtype].bits // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.just({"k": "v"}) | values)
    for name in draw(st.lists(st.sampled_from(sorted(header) or ["a"]), max_size=2)):
        change = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", "item", "drop"]))
        fields = header.get(name)
        if not isinstance(fields, dict) or change == "drop":
            header.pop(name, None)
        elif change == "item" and fields.get("shape"):
            lists = [v for v in fields.values() if isinstance(v, list) and v]
            draw(st.sampled_from(lists))[0] = draw(numbers)
        else:
            fields[change] = draw(values)
    items = draw(st.permutations(sorted(header)))
    return {name: header[name] for name in items}, max(0, begin + draw(st.sampled_from([0, 0, 1])))


@one_file
@given(
    near=near_headers(),
    before=st.sampled_from(["", "", " ", "\n\t", "\x0c"]),
    pad=st.sampled_from(["", "", " ", "\n", "}", "\0"]),
)
def test_random_headers_against_the_library(
    tmp_path: Path, near: tuple[dict[str, Any], int], before: str, pad: str
) -> None:
    header, data = near
    text = before + json.dumps(header) + pad
    agrees_with_the_library(tmp_path / "a.safetensors", text.encode(), bytes(data))


PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b" ", b"\n", b"0", b"1", b"-", b".", b"e1",
    b"\xff", b"\xc3\xa9", b"\\u0061", b"\\ud800", b"NaN", b"true", b"null", b'"dtype"', b'"shape"',
    b"\0", b'"__metadata__":{},', b"00", b"18446744073709551616", b'"__metadata__":null,',
    b'"k":"v",', b'"k":[1e5],', b',"dtype":"U8"', b"1e400",
]  # fmt: skip
edits = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(PIECES) | st.binary(max_size=2)),
    max_size=3,
)


@one_file
@given(tensors=valid_tensors(), edits=edits, metadata=st.none() | st.just({"k": "v"}))
def test_mutated_headers_against_the_library(
    tmp_path: Path, tensors: dict[str, Any], edits: list[Any], metadata: dict[str, str] | None
) -> None:
    text = safetensors_header(tensors, metadata)
    for where, cut, piece in edits:
        at = int(where * len(text))
        text = text[:at] + piece + text[at + cut :]
    data = b"".join(data for _, _, data in tensors.values())
    agrees_with_the_library(tmp_path / "a.safetensors", text, data)


@one_file
@given(
    blob=st.binary(max_size=40)
    | st.binary(max_size=40).map(lambda b: b"\x02" + bytes(7) + b"{}" + b)
)
def test_random_bytes_against_the_library(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(blob)
    try:
        read(path)
    except HeaderError:
        return
    assert library_view(path) is not None
