"""Small files that declare much: the memory and the disk that they get are small as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from mask_files import (
    Entry,
    mapping,
    notes,
    npy,
    npy_header,
    pickled,
    tensor,
    torch_bytes,
    zip_bytes,
)
from support import write_safetensors

MIB = 1 << 20
_SCRIPT = """
import json, sys
import ckdiff
said = {}
for path in sys.argv[1:]:
    try:
        store = ckdiff.import_masks(path, path + ".zarr")
        said[path] = store.tensors[0].changed["exact"]
    except ckdiff.CkdiffError as error:
        said[path] = error.one_line()
print(json.dumps(said))
"""
_LONG = 20_000_000
_BOMB = 1 << 26


def _pickle(content: bytes) -> bytes:
    return zip_bytes([
        Entry(b"a/data.pkl", b"\x80\2" + content + b"."), Entry(b"a/byteorder", b"little")
    ])  # fmt: skip


def _npz(metadata: bytes) -> bytes:
    return zip_bytes(
        [
            Entry(b"__metadata__.npy", npy(np.frombuffer(metadata, np.uint8)), 8),
            Entry(b"a.npy", npy(np.ones(8, bool))),
        ]
    )


def _deflated_flags() -> bytes:
    """Flags of _BOMB elements in a thousandth of the bytes."""
    header = f"{{'descr': '|b1', 'fortran_order': False, 'shape': ({_BOMB},), }}\n"
    return zip_bytes([Entry(b"a.npy", npy_header(header, b"\1" * _BOMB), 8)])


def hostile(folder: Path) -> dict[str, str | int]:
    """Files, and what is to be said about them: a part of the error, or the number of ones."""
    archives: dict[str, tuple[bytes, str | int]] = {
        "lists": (_pickle(b"(" + b"]" * _LONG), "far more memory than its length"),
        "dicts": (_pickle(b"(" + b"}" * _LONG), "far more memory than its length"),
        "marks": (_pickle(b"(" * _LONG), "far more memory than its length"),
        "tuples": (_pickle(b"N" + b"\x85" * _LONG), "far more memory than its length"),
        "words": (
            _pickle(b"(" + b"".join(b"ca\n%d\n" % i for i in range(2000))),
            "it is damaged",
        ),
        "far memo": (_pickle(b"]r\xff\xff\xff\x7f"), "holds no masks with names"),
        "long text": (_pickle(b"X\xff\xff\xff\xff"), "it ends early"),
        "array of bytes": (
            _pickle(b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "holds no masks with names"
        ),
        "storage": (
            torch_bytes(pickled(mapping({"a": tensor("0", 1 << 40, [1 << 40])})), {"0": b"\1"}),
            "are declared and 1 are there",
        ),
        "lists in JSON": (_npz(b"[" + b"[]," * (_LONG // 3) + b"1]"), "is not JSON"),
        "pairs in JSON": (
            _npz(b'{"":""' + b"".join(b',"%d":""' % i for i in range(10**6)) + b"}"), 8
        ),
        "directory": (
            b"PK\3\4" + zip_bytes([])[:-10] + b"\xf0\xff\xff\xff\0\0\0\0\0\0", "not a whole zip"
        ),
        "array header": (
            zip_bytes([Entry(b"a.npy", b"\x93NUMPY\2\0\xff\xff\xff\x7f\0\0")]), "no mask needs"
        ),
        "flags": (_deflated_flags(), _BOMB),
    }  # fmt: skip
    for name, (content, _) in archives.items():
        (folder / name).write_bytes(content)
    wanted = {name: words for name, (_, words) in archives.items()}
    told = notes({"a": ["BF16", [1 << 32]]}, encoding="indices")
    place = (1 << 31).to_bytes(8, "little")
    write_safetensors(folder / "declared", {"a.indices": ("I64", (1,), place)}, told)
    told["tensors"] = "[" * _LONG
    write_safetensors(folder / "nested", {"a": ("BOOL", (8,), bytes(8))}, told)
    return wanted | {"declared": 1, "nested": "makes no sense"}


def test_memory_is_bounded_by_what_is_there(tmp_path: Path) -> None:
    wanted = hostile(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *(str(tmp_path / name) for name in wanted)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    peak = samples = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("RssAnon"):
                peak, samples = max(peak, int(line.split()[1]) << 10), samples + 1
        time.sleep(0.003)
    out, _ = process.communicate()
    assert process.returncode == 0
    said = {Path(path).name: words for path, words in json.loads(out).items()}
    for name, words in wanted.items():
        found = said[name]
        assert words in found if isinstance(words, str) else words == found, (name, found)
    assert samples > 20
    assert peak < 320 * MIB
    used = sum(f.stat().st_blocks * 512 for f in tmp_path.rglob("*.zarr/**/*") if f.is_file())
    assert used < 2 * MIB
