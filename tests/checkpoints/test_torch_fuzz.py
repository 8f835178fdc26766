"""Hostile torch files: damaged ones, planted calls, and what would take all memory or all time.

``CKDIFF_FUZZ=20000`` runs the whole campaign.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch_files
from mask_files import torch_bytes

from ckdiff.checkpoints.formats import picklebytes
from ckdiff.checkpoints.formats.pickledvalues import walk
from ckdiff.checkpoints.formats.pickles import read_pickle
from ckdiff.checkpoints.formats.torchzip import torch_table
from ckdiff.errors import CheckpointError, CkdiffError

COUNT = int(os.environ.get("CKDIFF_FUZZ", "200"))
MIB = 1 << 20
#: what Python tells of whatever imports, opens, compiles, runs or starts something
_TOLD = ("import", "open", "exec", "compile", "os.", "subprocess.", "pickle.", "socket.", "ctypes")
_watching: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(_TOLD):
        _watching[-1].append(f"{event} {arguments!r}"[:200])


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Fail where anything is imported, opened, compiled or called that Python tells of."""
    if not getattr(nothing_happens, "hooked", False):
        sys.addaudithook(_hook)
        nothing_happens.hooked = True  # type: ignore[attr-defined]
        for protocol in (0, 1, 2, 4, 5):  # what is imported once, such as codecs
            raw = pickle.dumps(["\xff", 1.5, b"x", "a"], protocol)
            read_pickle([raw], len(raw), "f")
        with pytest.raises(CkdiffError):
            torch_files.read(torch_bytes(b"N.", {}))
    _watching.append([])
    try:
        yield
    finally:
        told = _watching.pop()
    assert told == []


def outcome(raw: bytes) -> bool:
    """Whether a file is read; if so, whether all that it is said to have is in it."""
    try:
        table = torch_files.read(raw)
    except CkdiffError as error:
        line = error.one_line()
        assert "\n" not in line
        assert len(line) < 2000
        return False
    assert len(set(table.names)) == len(table.names) > 0
    for place in range(len(table.names)):
        data = torch_files.packed_bytes(raw, table, place)
        assert len(data) == table.nbytes[place]
        assert table.begins[place] + (len(data) if table.strides[place] is None else 0) <= len(raw)
    return True


def damaged(raw: bytes, rng: random.Random) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(out))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice(
                    b"(.0123NIJKMRQbcdehlopqrstu)}]\x80\x81\x82\x85\x8a\x92\x93\x94"
                )
            case 2:
                del out[at : at + rng.choice((1, 3, 40))]
            case 3:
                out[at:at] = out[
                    (other := rng.randrange(len(out))) : other + rng.choice((1, 9, 60))
                ]
            case 4:
                out[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
            case 5:
                del out[at:]
            case _:
                out[at : at + 1] = rng.randbytes(rng.choice((1, 2, 8)))
        if not out:
            break
    return bytes(out)


def opened(raw: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The pickle of a file, and its storages."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}
    storages = {n.removeprefix("data/"): d for n, d in members.items() if n.startswith("data/")}
    return members["data.pkl"], storages


def test_damaged_files_are_refused_or_read() -> None:
    seeds = list(torch_files.seeds())
    parts = [opened(seed) for seed in seeds]
    rng, read, peak = random.Random(1), 0, 0
    for raw in seeds:
        assert outcome(raw)
    tracemalloc.start()
    try:
        with nothing_happens():
            for number in range(COUNT):
                which = rng.randrange(len(seeds))
                if number % 3:  # a pickle in a good archive goes further
                    content, storages = parts[which]
                    raw = torch_bytes(damaged(content, rng), storages)
                else:
                    raw = damaged(seeds[which], rng)
                tracemalloc.reset_peak()
                before, _ = tracemalloc.get_traced_memory()
                read += outcome(raw)
                peak = max(peak, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    assert COUNT // 50 < read < COUNT
    assert peak < 64 * MIB


# -- planted calls ---------------------------------------------------------------------------------

TOUCH = "touch ran"


class Planted:
    """Pickles to a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return self.reduced


def texts(*values: str) -> bytes:
    return b"".join(b"X" + struct.pack("<L", len(v)) + v.encode() for v in values)


def dumped(*reduced: Any) -> bytes:
    return pickle.dumps(Planted(*reduced), 2)


PLANTED: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: dumped(os.system, (TOUCH,)),
    "posix": lambda: b"cposix\nsystem\n" + texts(TOUCH) + b"\x85R.",
    "nt": lambda: b"cnt\nsystem\n" + texts(TOUCH) + b"\x85R.",
    "eval": lambda: dumped(eval, (f"__import__('os').system({TOUCH!r})",)),
    "exec": lambda: dumped(exec, (f"import os; os.system({TOUCH!r})",)),
    "python 2": lambda: b"c__builtin__\neval\n" + texts("open('ran', 'w')") + b"\x85R.",
    "compile": lambda: b"cbuiltins\ncompile\n" + texts("1", "f", "exec") + b"\x87R.",
    "import": lambda: b"cbuiltins\n__import__\n" + texts("antigravity") + b"\x85R.",
    "subprocess": lambda: b"csubprocess\nPopen\n](" + texts("touch", "ran") + b"e\x85R.",
    "hub": lambda: b"ctorch.hub\nload\n" + texts("a/b", "c") + b"\x86R.",
    "load": lambda: b"ctorch.serialization\nload\n" + texts("f.pt") + b"\x85R.",
    "runpy": lambda: b"crunpy\n_run_code\n" + texts("open('ran', 'w')") + b"}\x86R.",
    "numpy.load": lambda: b"cnumpy\nload\n" + texts("f.npy") + b"\x85R.",
    "webbrowser": lambda: b"cwebbrowser\nopen\n" + texts("http://x") + b"\x85R.",
    "open": lambda: b"cio\nopen\n" + texts("ran", "w") + b"\x86R.",
    "getattr": lambda: (
        b"cbuiltins\ngetattr\ncbuiltins\n__import__\n" + texts("os") + b"\x85R"
        + texts("system") + b"\x86R" + texts(TOUCH) + b"\x85R."
    ),
    "dotted": lambda: (
        b"\x80\4" + texts("os", "path.os.system") + b"\x93" + texts(TOUCH) + b"\x85R."
    ),
    "setstate": lambda: b"cos\nsystem\n)\x81}(" + texts("__setstate__") + b"cos\nsystem\nub"
    + texts(TOUCH) + b"b.",
    "class state": lambda: b"ccollections\nOrderedDict\n}(" + texts("__setstate__")
    + b"cos\nsystem\nub.",
    "copyreg": lambda: b"ccopyreg\n__newobj__\ncos\nsystem\n" + texts(TOUCH) + b"\x86R.",
    "add extension": lambda: b"ccopyreg\nadd_extension\n" + texts("os", "system") + b"K\1\x87R.",
    "extension": lambda: b"\x82\1" + texts(TOUCH) + b"\x85R.",
    "extension of 4": lambda: b"\x84\1\0\0\0.",
    "inst": lambda: b"(" + texts(TOUCH) + b"ios\nsystem\n.",
    "obj": lambda: b"(cos\nsystem\n" + texts(TOUCH) + b"o.",
    "new object": lambda: b"cos\nsystem\n" + texts(TOUCH) + b"\x85\x81.",
    "new object with names": lambda: b"csubprocess\nPopen\n)}(" + texts("args", TOUCH) + b"u\x92.",
    "nested": lambda: b"c_pickle\nloads\nC" + bytes([20]) + b"cos\nsystem\nX\1\0\0\0a\x85R."
    + b"\x85R.",
    "from bytes": lambda: b"ctorch.storage\n_load_from_bytes\nC\5aaaaa\x85R.",
    "persistent": lambda: b"P" + TOUCH.encode() + b"\n.",
    "reference": lambda: b"(cos\nsystem\n" + texts(TOUCH) + b"tQ.",
    "buffers": lambda: b"\x80\5\x97.",
    "as a rebuild": lambda: b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\n"
    b"ctorch\nTensor\n" + texts(TOUCH) + b"\x85NtR.",
    "hooks": lambda: b"}" + texts("a") + b"cfunctools\npartial\ncos\nsystem\n" + texts(TOUCH)
    + b"\x86R)Rs.",
}  # fmt: skip


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_calls_do_not_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = PLANTED[kind]()
    around = b"}(" + texts("w") + raw.removeprefix(b"\x80\2").removeprefix(b"\x80\4")[:-1] + b"u."
    with nothing_happens():
        for content in (raw, b"\x80\2" + around):
            with pytest.raises(CheckpointError):
                torch_files.read(torch_bytes(content, {}))
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_what_happens() -> None:
    with pytest.raises(AssertionError, match=r"os\.system"), nothing_happens():
        os.system("true")


def test_weights_beside_a_planted_call_are_read(tmp_path: Path) -> None:
    import torch

    content = {"model": {"w": torch.ones(3)}, "config": Planted(os.system, (TOUCH,))}
    raw = torch_files.saved(content)
    with nothing_happens():
        assert torch_files.read(raw).names == ["w"]


# -- bombs -----------------------------------------------------------------------------------------

LONG = 15_000
LESS = 4  #: times less than usual may be made of any pickle, and is tried with these


def laughs(make: bytes) -> bytes:
    """Thirty values, each with the one before it twice over."""
    out = b"]q\0"
    for i in range(60):
        out += b"0" + make % (b"h" + bytes([i]) + b"h" + bytes([i])) + b"q" + bytes([i + 1])
    return out + b"."


BOMBS: dict[str, Callable[[], bytes]] = {
    "tuples of tuples": lambda: laughs(b"%s\x86"),
    "lists of lists": lambda: laughs(b"(%sl"),
    "dicts of dicts": lambda: laughs(b"(" + texts("a") + b"%s0" + texts("b") + b"h\0d"),
    "texts": lambda: b"X" + struct.pack("<L", 12_500) + b"x" * 12_500 + b"q\0"
    + b"c_codecs\nencode\nq\1" + (b"h\1h\0" + texts("latin1") + b"\x86R0") * 5_000 + b"N.",
    "sizes": lambda: b"(" + b"K\1" * 12_500 + b"tq\0" + b"ctorch\nSize\nq\1"
    + b"h\1h\0\x85R0" * 5_000 + b"N.",
    "pairs": lambda: b"](" + b"NN\x86" * 5_000 + b"eq\0ccollections\nOrderedDict\nq\1"
    + b"h\1h\0\x85R0" * 5_000 + b"N.",
    "arguments": lambda: b"(ctorch\nx\n" + b"N" * 12_500 + b"tq\0ccopyreg\n__newobj__\nq\1"
    + b"h\1h\0R0" * 12_500 + b"N.",
    "shapes": lambda: b"(" + b"K\1" * 12_500 + b"tq\0ctorch._utils\n_rebuild_tensor_v2\nq\1"
    + b"(" + texts("storage") + b"ctorch\nFloatStorage\n" + texts("0", "cpu") + b"K\1tQq\2"
    + b"h\1(h\2K\0h\0h\0\x89}tR0" * 12_500 + b"N.",
    "deep list": lambda: b"]" * LONG + b"a" * (LONG - 1) + b".",
    "deep tuple": lambda: b"N" + b"\x85" * LONG + b".",
    "deep dict": lambda: (b"}" + texts("a")) * LONG + b"N" + b"s" * LONG + b".",
    "deep key": lambda: b"}N" + b"\x85" * LONG + b"Ns.",
    "deep record": lambda: b"cx\ny\n" * LONG + b"N" + b"\x85\x81" * LONG + b".",
    "marks": lambda: b"(" * LONG + b"t" * LONG + b".",
    "lists": lambda: b"(" + b"]" * 10 * LONG + b"l.",
    "dicts": lambda: b"(" + b"}" * 10 * LONG + b"l.",
    "nothings": lambda: b"(" + b"N" * 15 * LONG + b"l.",
    "itself": lambda: b"}q\0" + texts("model") + b"h\0s.",
    "list of itself": lambda: b"]q\0h\0a.",
    "colliding numbers": lambda: b"}(" + b"".join(
        b"\x8a\x0a" + (i * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for i in range(1, 20_000)
    ) + b"u.",
    "long text": lambda: b"X" + struct.pack("<L", 30 << 20) + b"x" * (20 << 20) + b".",
    "long data": lambda: b"\x8e" + struct.pack("<Q", 30 << 20) + b"x" * (20 << 20) + b".",
    "declared text": lambda: b"\x8d" + b"\xff" * 8 + b".",
    "declared data": lambda: b"\x96" + b"\xff" * 7 + b"\x7f.",
    "declared number": lambda: b"\x8b\xff\xff\xff\x7f.",
    "digits": lambda: b"I" + b"9" * LONG + b"\n.",
    "line": lambda: b"I" + b"9" * 3_000_000,
    "words": lambda: b"(" + b"".join(b"ca\n%d\n" % i for i in range(LONG)) + b"l.",
    "memo": lambda: b"N" + b"".join(b"r" + struct.pack("<L", i * 7) for i in range(LONG)) + b".",
    "shared keys": lambda: b"X" + struct.pack("<L", 1 << 20) + b"k" * (1 << 20) + b"q\0(" +
    b"}h\0]Nas" * 5_000 + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("_LEAST_MEMORY", "_MOST_STACKED"):
        monkeypatch.setattr(picklebytes, limit, getattr(picklebytes, limit) // LESS)
    content = BOMBS[bomb]()
    archive = torch_bytes(b"}(" + texts("model") + content[:-1] + b"u.", {})
    tracemalloc.start()
    begun = time.process_time()
    try:
        with pytest.raises(CheckpointError):
            torch_table(_reader(archive), len(archive), "f")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * MIB // LESS
    assert time.process_time() - begun < 60 / LESS**2  # whatever is quadratic takes so much less


def _reader(raw: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, size: raw[offset : offset + size]


@pytest.mark.parametrize("bomb", ["tuples of tuples", "lists of lists", "itself", "deep"])
def test_a_walk_sees_each_object_once(bomb: str) -> None:
    raw = b"N" + b"\x85" * 100_000 + b"." if bomb == "deep" else BOMBS[bomb]()
    content = read_pickle([raw], len(raw), "f")
    assert sum(1 for _ in walk(content)) <= len(raw)
