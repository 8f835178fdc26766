"""Headers written in an unusual way come back to the last byte, and cost what they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import write_index, write_raw, write_safetensors

import ckdiff
from ckdiff.checkpoints.formats.safetensors import parse_header
from ckdiff.deltas.room import OWN_TENSOR, TENSOR, header_cost

BASE = {"a": ("BF16", (8,), bytes(range(16))), "b": ("F32", (3,), bytes(12))}
DATA = bytes([*range(15), 99, *bytes(11), 7])  # one element of each has changed
ENTRIES: dict[str, Any] = {
    "a": {"dtype": "BF16", "shape": [8], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]},
}


def text(entries: dict[str, Any] = ENTRIES, **metadata: Any) -> bytes:
    return json.dumps({**metadata, **entries}).encode()


WRITTEN = {
    "null": text(__metadata__=None),
    "null behind": b'{"a":%s,"b":%s,"__metadata__":null}'
    % tuple(json.dumps(entry).encode() for entry in ENTRIES.values()),
    "blanks before": b" \n\t" + text(),
    "blanks behind": text() + b"\r\n\t ",
    "blanks everywhere": b"\n" + json.dumps(ENTRIES, indent=3).encode() + b"\n\n",
    "a checksum": text({name: {"sha256": "x", **entry} for name, entry in ENTRIES.items()}),
    "more": text({name: {**entry, "x": {"dtype": [1.5, None]}} for name, entry in ENTRIES.items()}),
    "order": text({name: dict(reversed(entry.items())) for name, entry in ENTRIES.items()}),
    "escapes": text().replace(b"dtype", b"\\u0064type").replace(b'"a"', b'"\\u0061"'),
    "lists": text({name: list(entry.values()) for name, entry in ENTRIES.items()}),
}


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("written", WRITTEN)
def test_unusual_headers_come_back(tmp_path: Path, written: str, encoding: str) -> None:
    base = write_safetensors(tmp_path / "base" / "model.safetensors", BASE)
    tuned = write_raw(tmp_path / "tuned" / "model.safetensors", WRITTEN[written], DATA)
    for side in (base, tuned):
        write_index(side.parent, dict.fromkeys(BASE, side.name))
    for i, (start, end) in enumerate([(base, tuned), (tuned, base)]):
        delta, out = tmp_path / f"{i}.delta", tmp_path / f"out{i}"
        made = ckdiff.delta(start.parent, end.parent, delta, encoding=encoding)
        assert made.changed == 2
        ckdiff.apply(start.parent, [delta], out)
        assert (out / end.name).read_bytes() == end.read_bytes()
    assert ckdiff.diff(base.parent, tuned.parent).rules["exact"]["changed"] == 2


def cost(header: str | bytes) -> int:
    raw = header.encode() if isinstance(header, str) else header
    return header_cost(raw, OWN_TENSOR)


@pytest.mark.parametrize(
    "hidden",
    [
        '{"dtype":1,"shape":1,"data_offsets":1}',
        '["\\"data_offsets\\":","\\"dtype\\":","\\"shape\\":","\\":{"]',
        '{"data_offsets":[0,0]}',
        '[{"dtype":{},"shape":1,"data_offsets":1}]',
    ],
)
def test_fields_that_nobody_knows_hide_no_metadata(hidden: str) -> None:
    """What looks like an entry and is none must not pay for pairs of metadata."""
    count = 400
    pairs = ",".join(f'"{i}":""' for i in range(4 * count))
    entry = '"w":{"x":[%s],"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = f'{{"__metadata__":{{{pairs}}},{entry % ",".join([hidden] * count)}}}'
    assert len(parse_header(header.encode(), 0, "hidden").metadata) == 4 * count
    assert cost(header) >= cost(f'{{"__metadata__":{{{pairs}}},{entry % ""}}}')


@pytest.mark.parametrize("written", WRITTEN)
def test_a_tensor_costs_no_less_however_it_is_written(written: str) -> None:
    assert header_cost(WRITTEN[written], TENSOR) >= 2 * TENSOR


def test_plain_headers_cost_little() -> None:
    """A hundred thousand tensors of two dimensions: what is allowed by default is enough."""
    entries = {
        f"layers.{i}.weight": {"dtype": "U8", "shape": [2, 1], "data_offsets": [2 * i, 2 * i + 2]}
        for i in range(1000)
    }
    for raw in (json.dumps(entries), json.dumps(entries, separators=(",", ":"))):
        assert cost(raw) < 1000 * (OWN_TENSOR + 4 * 40 + 60)
