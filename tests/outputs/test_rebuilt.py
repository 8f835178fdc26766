"""Writing a checkpoint whole or not at all, and what is read of one to write it again."""

from __future__ import annotations

import errno
import itertools
import json
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import python
from disks import tiny_disk
from support import write_index, write_safetensors

from ckdiff.checkpoints import open_checkpoint
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.errors import BudgetError, CkdiffError, OutputError, SourceChanged
from ckdiff.outputs import placing
from ckdiff.outputs.cleaning import clean
from ckdiff.outputs.ownership import MARKER, acquire
from ckdiff.outputs.rebuilt import FilePlan, Rebuilt

Tree = dict[str, bytes]

INDEX = "model.safetensors.index.json"
SAYS = b'{"weight_map": {"t": "0.safetensors"}}'


def head(size: int) -> bytes:
    """The header of a file with one tensor of that many bytes; all are equally long."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    return (80).to_bytes(8, "little") + json.dumps({"t": entry}).encode().ljust(80)


HEAD = head(0)


def plans(*sizes: int) -> list[FilePlan]:
    """Files of that many bytes of data."""
    return [FilePlan(f"{i}.safetensors", head(n), len(HEAD) + n) for i, n in enumerate(sizes)]


def data(file: int, size: int) -> bytes:
    return np.random.default_rng(file).bytes(size)


def write_all(rebuilt: Rebuilt) -> None:
    for i, plan in enumerate(rebuilt.files):
        rebuilt.write(i, len(plan.head), data(i, plan.size - len(plan.head)))


def write(
    out: Path,
    files: Sequence[FilePlan],
    *,
    index: bytes | None = SAYS,
    directory: bool = True,
    **more: Any,
) -> None:
    named = None if index is None else (INDEX, index)
    more.setdefault("overwrite", False)
    with Rebuilt(out, files, index=named, directory=directory, **more) as rebuilt:
        write_all(rebuilt)
        rebuilt.commit()


def tree(folder: Path) -> Tree:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def whole(files: Sequence[FilePlan], index: bytes = SAYS) -> Tree:
    content = {p.name: p.head + data(i, p.size - len(p.head)) for i, p in enumerate(files)}
    return content | {INDEX: index}


# what is read


def shards(folder: Path) -> Path:
    weight_map = {}
    for i in range(3):
        tensors = {f"{i}.{j}": ("U8", (4,), b"abcd") for j in range(i + 1)}
        write_safetensors(folder / f"{i}.safetensors", tensors, {"format": "pt"}, pad=i)
        weight_map |= dict.fromkeys(tensors, f"{i}.safetensors")
    write_index(folder, weight_map)
    return folder


def opened(path: Path) -> FileCheckpoint:
    found = open_checkpoint(path)
    assert isinstance(found, FileCheckpoint)
    return found


def test_headers_and_index_are_given_as_they_are(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model")
    for path in (folder, folder / INDEX):
        with opened(path) as checkpoint:
            for i, file in enumerate(checkpoint.files):
                raw = (folder / file.name).read_bytes()
                head = checkpoint.head(i)
                assert head == raw[: 8 + int.from_bytes(raw[:8], "little")]
                assert json.loads(head[8:])["__metadata__"] == {"format": "pt"}
            assert checkpoint.index_name == INDEX
            assert checkpoint.index() == (folder / INDEX).read_bytes()
    with opened(folder / "1.safetensors") as checkpoint:
        assert checkpoint.index() is None
    (folder / INDEX).unlink()
    with opened(folder) as checkpoint:
        assert checkpoint.index() is None


@pytest.mark.parametrize("change", ["rewritten", "removed", "touched"])
def test_an_index_that_changed_is_noticed(tmp_path: Path, change: str) -> None:
    index = shards(tmp_path / "model") / INDEX
    with opened(tmp_path / "model") as checkpoint:
        before = index.read_bytes()
        if change == "removed":
            index.unlink()
        elif change == "touched":
            os.utime(index, (1, 1))
            assert checkpoint.index() == before
            return
        else:
            index.write_bytes(before.replace(b"1.5", b"2.5").replace(b"15", b"25"))
            assert index.read_bytes() != before
        with pytest.raises(SourceChanged, match=r"index\.json"):
            checkpoint.index()


def test_a_header_that_changed_is_noticed(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model")
    with opened(folder) as checkpoint:
        os.truncate(folder / "2.safetensors", 20)
        with pytest.raises(SourceChanged, match="truncated"):
            checkpoint.head(2)
        assert checkpoint.head(0)


# what is written


def test_any_order_from_any_thread(tmp_path: Path) -> None:
    files = [
        *plans(300_001, 0, 5_000_000),
        FilePlan("a/b.safetensors", head(4096), 4096 + len(HEAD)),
    ]
    pieces = [
        (i, at, data(i, plan.size - len(HEAD))[at : at + 65_537])
        for i, plan in enumerate(files)
        for at in range(0, plan.size - len(HEAD), 65_537)
    ]
    np.random.default_rng(0).shuffle(pieces)  # type: ignore[arg-type]
    out = tmp_path / "out"
    with Rebuilt(out, files, index=(INDEX, b"{}"), directory=True, overwrite=False) as rebuilt:

        def work(mine: list[tuple[int, int, bytes]]) -> None:
            for file, at, piece in mine:
                whole_words = np.frombuffer(piece, np.uint16 if len(piece) % 2 == 0 else np.uint8)
                given = [piece, memoryview(bytearray(piece)), whole_words][at % 3]
                rebuilt.write(file, len(HEAD) + at, given)  # type: ignore[arg-type]

        threads = [threading.Thread(target=work, args=(pieces[i::4],)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not out.exists()
        rebuilt.commit()
        assert rebuilt.stopped_hint == "the output is complete"
    assert tree(out) == whole(files, b"{}")
    assert os.listdir(tmp_path) == ["out"]


def test_a_single_file(tmp_path: Path) -> None:
    files = plans(1000)
    write(tmp_path / "model.safetensors", files, directory=False, index=None)
    assert tree(tmp_path) == {"model.safetensors": head(1000) + data(0, 1000)}


def test_what_was_not_written_whole_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def begun() -> Rebuilt:
        return Rebuilt(out, plans(10, 10), index=None, directory=True, overwrite=False)

    with begun() as rebuilt:
        rebuilt.write(0, len(HEAD), bytes(10))
        rebuilt.write(1, len(HEAD), bytes(9))
        assert rebuilt.stopped_hint == "nothing was written"
        with pytest.raises(OutputError, match=r"1\.safetensors .* 1 bytes too few"):
            rebuilt.commit()
    with begun() as rebuilt:
        write_all(rebuilt)
        rebuilt.write(1, len(HEAD), bytes(3))
        with pytest.raises(OutputError, match="3 bytes too many"):
            rebuilt.commit()
    with begun() as rebuilt:
        for at, size in ((0, 4), (len(HEAD) - 1, 2), (len(HEAD) + 9, 2), (1 << 40, 1)):
            with pytest.raises(OutputError, match="has no place"):
                rebuilt.write(0, at, bytes(size))
        write_all(rebuilt)  # and is not committed

    def stopped() -> None:
        with begun() as rebuilt:
            write_all(rebuilt)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["../x"], "leaves its directory"),
        (["a/../../x"], "leaves its directory"),
        (["/tmp/x"], "absolute"),
        (["a\0b"], "NUL"),
        ([""], "empty"),
        (["a//b"], "empty"),
        (["\ud800.safetensors"], "not valid text"),
        (["x.safetensors", "x.safetensors"], "same name"),
        (["a.safetensors", "a.safetensors/b.safetensors"], "lies in another file"),
        (["a.safetensors/b/c.safetensors", "a.safetensors"], "lies in another file"),
        ([INDEX], "is not called .safetensors"),
        (["setup.py"], "is not called .safetensors"),
        (["pytorch_model.bin"], "is not called .safetensors"),
        ([".git/hooks/x.safetensors"], "hidden"),
        ([".x.safetensors"], "hidden"),
    ],
)
def test_names_that_must_not_be_written(tmp_path: Path, names: list[str], why: str) -> None:
    files = [FilePlan(name, HEAD, 100) for name in names]
    with pytest.raises(OutputError, match=why) as caught:
        write(tmp_path / "out", files)
    assert caught.value.one_line().isprintable()
    assert os.listdir(tmp_path) == []


def test_plans_that_make_no_sense(tmp_path: Path) -> None:
    for raw, size in ((b"", 10), (HEAD, len(HEAD) - 1)):
        with pytest.raises(OutputError, match="cannot begin with a header"):
            write(tmp_path / "out", [FilePlan("x", raw, size)])
    with pytest.raises(OutputError, match="one file"):
        write(tmp_path / "out", plans(1, 1), directory=False, index=None)


# what is in the way


def test_only_checkpoints_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    old, new = plans(100, 200), plans(50)
    write(out, old)
    with pytest.raises(OutputError, match=r"exists \(use --overwrite"):
        write(out, new)
    assert tree(out) == whole(old)
    write(out, new, overwrite=True)
    assert tree(out) == whole(new)
    for name in ("config.json", "deep/tokenizer.json"):
        mine = out / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(OutputError, match="not part of a checkpoint"):
            write(out, old, overwrite=True)
        assert mine.read_text() == "mine"
        mine.unlink()
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is not a checkpoint"):
            write(file, old[:1], directory=False, index=None, overwrite=overwrite)
        with pytest.raises(OutputError, match="not a directory"):
            write(file, old, overwrite=overwrite)
    with pytest.raises(OutputError, match="not a file"):
        write(out, old[:1], directory=False, index=None, overwrite=True)
    link = tmp_path / "link"
    link.symlink_to("out")
    with pytest.raises(OutputError, match="not a directory"):
        write(link, old, overwrite=True)
    assert (tree(out), file.read_text()) == (whole(new), "mine")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", old)
    assert not list(tmp_path.glob("*.ckdiff-partial"))


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    folder = shards(tmp_path / "model")
    with opened(folder) as base:
        for out in (folder, folder / "x", tmp_path):
            with pytest.raises(OutputError, match="source"):
                write(out, plans(1), overwrite=True, apart=[base])
    delta = tmp_path / "a.safetensors"
    delta.write_bytes(b"delta")
    with pytest.raises(OutputError, match="would replace the input"):
        write(delta, plans(1), directory=False, index=None, overwrite=True, inputs=[delta])
    with pytest.raises(OutputError, match="no directory"):
        write(tmp_path / "no" / "out", plans(1))
    assert delta.read_bytes() == b"delta"


def test_two_writers(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Rebuilt(out, plans(5), index=None, directory=True, overwrite=False) as rebuilt:
        with pytest.raises(OutputError, match="another process is writing"):
            write(out, plans(5))
        write_all(rebuilt)
        rebuilt.commit()
    assert list(tree(out)) == ["0.safetensors"]


# 24, 25, 26: no room, and writes that fail


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with tiny_disk(tmp_path / "disk", 1 << 20) as disk:
        with pytest.raises(BudgetError, match="are needed"):
            write(disk / "out", plans(2 << 20))
        rebuilt = Rebuilt(disk / "out", plans(600_000), index=None, directory=True, overwrite=False)
        with rebuilt:
            (disk / "other").write_bytes(bytes(500_000))
            with pytest.raises(OutputError, match="No space left") as caught:
                write_all(rebuilt)
        assert caught.value.hint == "free some space and run it again"
        assert os.listdir(disk) == ["other"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from ckdiff.errors import OutputError
from ckdiff.outputs.rebuilt import FilePlan, Rebuilt
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
files = [FilePlan("x.safetensors", bytes(10), 6000)]
try:
    with Rebuilt(Path(sys.argv[1]), files, index=None, directory=True, overwrite=False) as rebuilt:
        rebuilt.write(0, 10, bytes(5990))
        rebuilt.commit()
except OutputError as error:
    print(error.one_line())
"""


def test_file_size_limit(tmp_path: Path) -> None:
    done = python(LIMITED, str(tmp_path / "out"))
    assert "ulimit -f" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


CALLS = ("open", "ftruncate", "pwrite", "fsync", "mkdir", "rename", "replace")


def fail_at(at: int, patch: pytest.MonkeyPatch) -> list[str]:
    """The ``at``-th of all calls fails; gives the names of those that were made."""
    made: list[str] = []

    def shim(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def shimmed(*arguments: Any, **named: Any) -> Any:
            made.append(name)
            if len(made) == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return call(*arguments, **named)

        return shimmed

    for name in CALLS:
        patch.setattr(os, name, shim(name, getattr(os, name)))
    return made


def failure(action: Callable[[], None]) -> CkdiffError | None:
    try:
        action()
    except CkdiffError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("overwrite", "directory", "exchange"),
    [case for case in itertools.product([True, False], repeat=3) if case != (True, True, False)],
)
def test_every_call_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overwrite: bool,
    directory: bool,
    exchange: bool,
) -> None:
    options: dict[str, Any] = {"directory": directory, "overwrite": overwrite}
    options["index"] = SAYS if directory else None
    new, old = plans(100, 3000)[: 1 + directory], plans(7)
    if not exchange:
        monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    result = whole(new) if directory else whole(new)["0.safetensors"]
    failed = 0
    for at in range(1, 100):
        place = tmp_path / str(at)
        place.mkdir()
        out = place / "out.safetensors"
        if overwrite:
            write(out, old, **options)
        before = tree(place)
        with monkeypatch.context() as patch:
            made = fail_at(at, patch)
            error = failure(lambda: write(out, new, **options))  # noqa: B023 - called at once
        if len(made) < at:
            break
        if error is None:  # a directory that is there already, or cleaning up behind the output
            assert (tree(out) if directory else out.read_bytes()) == result
            clean(place)
            assert os.listdir(place) == ["out.safetensors"]
            continue
        assert type(error) is OutputError
        assert str(place) in str(error)
        failed += 1
        left = {path: raw for path, raw in tree(place).items() if not path.endswith("LOCK")}
        assert left == before, at
        write(out, new, **options)
        assert [path.name for path in place.iterdir()] == ["out.safetensors"]
    assert error is None
    assert failed > 6
    assert (tree(out) if directory else out.read_bytes()) == result


# 38: killed

KILLED = """
import os, signal, sys
from pathlib import Path
from ckdiff.outputs import placing
from ckdiff.outputs.rebuilt import FilePlan, Rebuilt
at, out, exchange, directory = int(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:])
count = 0
def shim(call):
    def shimmed(*arguments, **named):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)
    return shimmed
def write():
    for name in ("open", "ftruncate", "pwrite", "fsync", "mkdir", "rename", "replace", "unlink",
                 "rmdir"):
        setattr(os, name, shim(getattr(os, name)))
    placing._exchange = shim(placing._exchange if exchange else lambda one, other: False)
    head = HEAD
    files = [FilePlan(f"{i}.safetensors", head, len(head) + 100) for i in range(1 + directory)]
    with Rebuilt(out, files, index=None, directory=bool(directory), overwrite=True) as rebuilt:
        for i in range(len(files)):
            rebuilt.write(i, len(head), bytes([7]) * 100)
        rebuilt.commit()
while True:
    for again in ("", "-again"):
        pid = os.fork()
        if not pid:
            out = out / f"{at}{again}" / "out.safetensors"
            write()
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    at += 1
print(at)
"""


#: directories that cannot be exchanged are not replaced: see test_no_exchange_no_replacement
@pytest.mark.parametrize(("directory", "exchange"), [(True, True), (False, True), (False, False)])
def test_killed_at_every_call(tmp_path: Path, directory: bool, exchange: bool) -> None:
    old: Tree | bytes
    new: Tree | bytes
    new = head(100) + bytes([7]) * 100
    options: dict[str, Any] = {"directory": directory, "index": SAYS if directory else None}
    for at in range(1, 80):
        for name in (f"{at}", f"{at}-again"):
            (tmp_path / name).mkdir()
            write(tmp_path / name / "out.safetensors", plans(9), **options)
    one = tmp_path / "1" / "out.safetensors"
    old = tree(one) if directory else one.read_bytes()
    if directory:
        new = {f"{i}.safetensors": new for i in range(2)}
    killed = KILLED.replace("HEAD", repr(head(100)))
    done = python(killed, "1", str(tmp_path), str(int(exchange)), str(int(directory)))
    assert done.returncode == 0, done.stderr
    last, replaced = int(done.stdout), 0
    assert last > 15
    for at in range(1, last):
        place = tmp_path / str(at)
        out, again = place / "out.safetensors", tmp_path / f"{at}-again" / "out.safetensors"
        for path in (out, again):  # at no moment is there neither the old one nor the new
            found = tree(path) if directory else path.read_bytes()
            assert found in (old, new)
        replaced += found == new
        # whatever comes next, a clean-up or another run, the output is whole
        clean(place)
        assert os.listdir(place) == ["out.safetensors"]
        assert (tree(out) if directory else out.read_bytes()) == found
        with pytest.raises(OutputError, match=r"exists \(use --overwrite"):
            write(again, plans(1), **options)
        assert (tree(again) if directory else again.read_bytes()) == found
        if found == new:
            continue
        write(again, plans(1), overwrite=True, **options)
        assert os.listdir(again.parent) == ["out.safetensors"]
    assert replaced > 1


def test_no_exchange_no_replacement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Directories that cannot be exchanged would have to be gone for a moment."""
    monkeypatch.setattr(placing, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    write(out, plans(9))
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="in one step") as caught:
        write(out, plans(1), overwrite=True)
    assert caught.value.hint == "remove it first, or choose another name"
    assert tree(tmp_path) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_former_output_that_is_being_removed_does_not_come_back(tmp_path: Path) -> None:
    """The output may be moved away between a kill in the middle of the removal and the next run."""
    out = tmp_path / "out"
    work = acquire(tmp_path / "out.ckdiff-partial")
    (work.inside / "former").mkdir()
    (work.inside / "former" / "half.safetensors").write_bytes(b"")
    work.close()  # as a kill would
    clean(tmp_path)
    assert os.listdir(tmp_path) == []
    write(out, plans(1))


def test_a_work_directory_that_goes_while_one_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner removes it between the attempt to make it and the look at what is in the way."""
    partial = tmp_path / "out.ckdiff-partial"
    other = acquire(partial)
    listdir = os.listdir

    def late(path: Any) -> list[str]:
        if not gone:
            gone.append(1)
            other.remove()
        return listdir(path)

    gone: list[int] = []
    with monkeypatch.context() as patch:
        os.unlink(partial / MARKER)  # it is just being made, or removed
        os.unlink(partial / "README.txt")
        patch.setattr(os, "listdir", late)
        write(tmp_path / "out", plans(1))
    assert gone
    other.close()
    partial.write_text("mine")
    with pytest.raises(OutputError, match="not a directory"):
        write(tmp_path / "out", plans(1), overwrite=True)
    assert partial.read_text() == "mine"
