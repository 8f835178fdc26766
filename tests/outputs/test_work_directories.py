"""Nothing beside an output is ours until it says so: every command, and every form of what may lie
where its work directory would be, or under the output's own name.

Whatever it is, the command ends with one line, and not a byte, a name, a mode or a time changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_support import run as run_cli

import ckdiff
from ckdiff.errors import CkdiffError, StoreExists
from ckdiff.outputs import ownership
from ckdiff.outputs.cleaning import clean
from ckdiff.outputs.ownership import LOCK, MARKER, SUFFIX, acquire
from ckdiff.stores.workdir import WorkDir

DATA = Path(__file__).parents[1] / "data" / "format-1"
STORE, BASE, TUNED = DATA / "run.zarr", DATA / "base", DATA / "tuned"
NOBODY = 65534

Command = Callable[..., Any]


def export(to: str, **more: Any) -> Command:
    return lambda out, **options: ckdiff.export_masks(
        STORE, out, to=to, rule="exact", **more, **options
    )


#: what writes, by its name: each takes the output and perhaps ``overwrite``
COMMANDS: dict[str, Command] = {
    "diff": lambda out, **options: ckdiff.diff(BASE, TUNED, out, **options),
    "combine": lambda out, **options: ckdiff.combine(
        "union", [STORE, DATA / "random.zarr"], out, rule="exact", **options
    ),
    "random": lambda out, **options: ckdiff.random_mask(
        STORE, out, seed=1, rule="exact", **options
    ),
    "import": lambda out, **options: ckdiff.import_masks(
        DATA / "masks.packed.safetensors", out, **options
    ),
    "delta": lambda out, **options: ckdiff.delta(BASE, TUNED, out, **options),
    "patches": lambda out, **options: ckdiff.delta_from_patches(BASE, [], out, **options),
    "apply": lambda out, **options: ckdiff.apply(BASE, DATA / "packed.ckdelta", out, **options),
    "graft": lambda out, **options: ckdiff.graft(BASE, TUNED, STORE, out, rule="exact", **options),
    "export": export("safetensors"),
    "export indices": export("indices"),
    "export npz": export("npz"),
    "export torch": export("torch"),
    "export like": export("safetensors", like=TUNED),
}
#: commands whose outputs replace each other
KINDS = [
    {"diff", "combine", "random", "import"},
    {"delta", "patches"},
    {"apply", "graft"},
    {"export", "export indices", "export npz", "export torch"},
    {"export like"},
]


def snapshot(root: Path) -> dict[str, Any]:
    """Everything below ``root``: kinds, modes, owners, times, contents, where links lead."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        found[str(path.relative_to(root))] = (
            status.st_mode, status.st_uid, status.st_ino, status.st_mtime_ns, content
        )  # fmt: skip
    return found


# What may lie there. Each form makes it at ``path``; ``victim`` is a directory of the user's.

Form = Callable[[Path, Path], object]


def begun(path: Path) -> None:
    """A work directory that is ours, as a kill would leave it."""
    out = path.with_name(path.name.removesuffix(SUFFIX))
    with WorkDir(out, {"plan": 1}, overwrite=False) as work:
        work.record(0, b"what chunk 0 added up to")


def notes(path: Path, mode: int = 0o755) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    path.chmod(mode)


def of_0_1_0(path: Path) -> None:
    (path / "store" / "masks" / "exact" / "c").mkdir(parents=True)
    (path / "journal").mkdir()
    (path / "LOCK").touch()
    (path / "plan.json").write_text("{}")


def copied(path: Path) -> None:
    begun(path.with_name(f"other{SUFFIX}"))
    shutil.copytree(path.with_name(f"other{SUFFIX}"), path)
    marker = json.loads((path / MARKER).read_text())
    marker["output"] = path.name.removesuffix(SUFFIX)
    (path / MARKER).write_text(json.dumps(marker))


def unpacked(path: Path) -> None:
    """As an archive might: with a marker for the inode that it happens to get."""
    begun(path)
    status = (path / LOCK).stat()
    (path / LOCK).unlink()
    time.sleep(0.02)  # longer than the kernel's clock ticks
    (path / LOCK).touch()
    os.utime(path / LOCK, ns=(status.st_atime_ns, status.st_mtime_ns))


def renamed(path: Path) -> None:
    begun(path.with_name(f"other{SUFFIX}"))
    path.with_name(f"other{SUFFIX}").rename(path)


def given_away(path: Path) -> None:
    begun(path)
    os.chown(path, NOBODY, NOBODY)


def writable(path: Path, mode: int) -> None:
    begun(path)
    path.chmod(mode)


def planted(name: str, how: str) -> Form:
    """One of ours, in which ``name`` is something else."""

    def make(path: Path, victim: Path) -> None:
        begun(path)
        at = path / name
        if at.is_dir() and not at.is_symlink():
            shutil.rmtree(at)
        at.unlink(missing_ok=True)
        at.parent.mkdir(exist_ok=True, parents=True)
        if how == "link to a directory":
            at.symlink_to(victim)
        elif how == "link to a file":
            at.symlink_to(victim / "thesis.tex")
        elif how == "pipe":
            os.mkfifo(at)
        else:
            at.write_text("mine")

    return make


FORMS: dict[str, Form] = {
    "link to a directory": lambda path, victim: path.symlink_to(victim),
    "link to nothing": lambda path, victim: path.symlink_to("nowhere"),
    "link to one of ours": lambda path, victim: (
        begun(path.with_name(f"other{SUFFIX}")),
        path.symlink_to(f"other{SUFFIX}"),
    ),
    "file": lambda path, victim: path.write_text("mine"),
    "pipe": lambda path, victim: os.mkfifo(path),
    "notes": lambda path, victim: notes(path),
    "private notes": lambda path, victim: notes(path, 0o700),
    "sticky notes": lambda path, victim: notes(path, 0o1700),
    "nothing in it": lambda path, victim: path.mkdir(),
    "a lock in it": lambda path, victim: (path.mkdir(), (path / LOCK).touch()),
    "left by 0.1.0": lambda path, victim: of_0_1_0(path),
    "copied": lambda path, victim: copied(path),
    "renamed": lambda path, victim: renamed(path),
    "another user's": lambda path, victim: given_away(path),
    "group may write": lambda path, victim: writable(path, 0o770),
    "others may write": lambda path, victim: writable(path, 0o1777),
    "damaged marker": planted(MARKER, "file"),
    "marker is a link": planted(MARKER, "link to a file"),
    "marker is a pipe": planted(MARKER, "pipe"),
    "marker of another": lambda path, victim: (
        begun(path),
        os.chown(path / MARKER, NOBODY, NOBODY),
    ),
    "notes among ours": planted("notes.txt", "file"),
    "notes in the store": planted("store/notes.txt", "file"),
    "notes in the journal": planted("journal/notes.txt", "file"),
    **{
        f"{name} is a {how}": planted(name, how)
        for name in (
            LOCK, "plan.json", ".plan.json.tmp", "README.txt", "journal", "store", "replaced",
            "former", "new", "store/manifest.json", "store/masks", "journal/0",
        )
        for how in ("link to a directory", "link to a file")
    },
    f"{LOCK} is a pipe": planted(LOCK, "pipe"),
    f"something in {LOCK}": planted(LOCK, "file"),
    "sticky, and something in the lock": lambda path, victim: (
        path.mkdir(),
        (path / LOCK).write_text("years of work"),
        path.chmod(0o1700),
    ),
    "sticky, and others may look": lambda path, victim: (
        path.mkdir(),
        (path / LOCK).touch(),
        path.chmod(0o1755),
    ),
    "unpacked at the same inode": lambda path, victim: unpacked(path),
    "thesis in what was replaced": lambda path, victim: (
        begun(path),
        (path / "former").mkdir(),
        (path / "former" / "thesis.tex").write_text("years of work"),
    ),
    "link in what was replaced": lambda path, victim: (
        begun(path),
        (path / "replaced").mkdir(),
        (path / "replaced" / "zarr.json").symlink_to(victim / "thesis.tex"),
    ),
    "plan is a pipe": planted("plan.json", "pipe"),
    "object is a pipe": planted("store/masks/exact/c/0", "pipe"),
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("years of work")
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_ours_is_never_touched(place: Path, form: str) -> None:
    out = place / "out"
    FORMS[form](place / f"out{SUFFIX}", place.parent / "victim")
    before = snapshot(place.parent)
    for name, command in COMMANDS.items():
        for options in ({}, {"overwrite": True}):
            with pytest.raises(CkdiffError) as caught:
                command(out, **options)
            line = caught.value.one_line()
            assert str(out) + SUFFIX in line, (name, line)
            assert "not a work directory of ckdiff's" in line
            assert snapshot(place.parent) == before, name
    cleaned = clean(place)
    assert [path.name for path, _ in cleaned.foreign] == [f"out{SUFFIX}"]
    assert f"out{SUFFIX}" not in [path.name for path in cleaned.removed]


def test_the_command_line_says_it_in_one_line(place: Path) -> None:
    out = place / "out.zarr"
    notes(place / f"out.zarr{SUFFIX}")
    done = run_cli("diff", str(BASE), str(TUNED), "-o", str(out), "--json")
    assert (done.exit_code, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert "has no marker of ckdiff's" in lines[0]
    assert "move it away" in lines[0]
    dry = run_cli("diff", str(BASE), str(TUNED), "-o", str(out), "--json", "--dry-run")
    assert "not a work directory" in json.loads(dry.stdout)["refusal"]
    cleaned = run_cli("clean", str(place))
    assert cleaned.exit_code == 0
    assert cleaned.stdout.startswith(f"left alone: {out}{SUFFIX} is not a work directory")


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_ours_is_taken_over(place: Path, name: str) -> None:
    """The rest of a run that was killed does not stand in the way of the same command."""
    out = place / "out"
    folder = acquire(place / f"out{SUFFIX}")
    (folder.inside / "new").write_bytes(b"half of it")
    folder.close()
    COMMANDS[name](out)
    assert os.listdir(place) == [out.name]


@pytest.mark.parametrize("step", [*range(3), "marker"])
def test_a_directory_that_was_just_being_made_is_taken_over(place: Path, step: int | str) -> None:
    path = place / f"out.zarr{SUFFIX}"
    path.mkdir(0o700)
    path.chmod(0o1700)
    if step != 0:
        (path / LOCK).touch()
    if step == 2:
        (path / f".{MARKER}.tmp").write_text("{")
    if step == "marker":
        path.rmdir() if not any(path.iterdir()) else shutil.rmtree(path)
        acquire(path).close()
    COMMANDS["diff"](place / "out.zarr")
    assert os.listdir(place) == ["out.zarr"]


def test_only_we_may_look_into_a_work_directory(place: Path) -> None:
    before = os.umask(0)
    try:
        with WorkDir(place / "out.zarr", {}, overwrite=False) as work:
            assert stat.S_IMODE(work.path.stat().st_mode) == 0o1700
    finally:
        os.umask(before)


def test_a_name_that_leads_elsewhere_by_now_does_not_matter(place: Path) -> None:
    """Everything is reached through the directory that was opened."""
    out, victim = place / "out.zarr", place.parent / "victim"
    with WorkDir(out, {}, overwrite=False) as work:
        work.path.rename(place / "moved")
        work.path.symlink_to(victim)
        before = snapshot(victim)
        work.record(0, b"payload")
        assert work.recorded(0) == b"payload"
        (work.store / "zarr.json").write_text("{}")
        work.discard()
        assert snapshot(victim) == before
    assert os.listdir(victim) == ["thesis.tex"]
    assert work.path.is_symlink()


def test_a_file_system_that_gives_everything_to_one_user(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a new directory seems to be another user's; that we have just made it is enough."""
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    COMMANDS["diff"](place / "out.zarr")
    assert os.listdir(place) == ["out.zarr"]


def test_names_in_messages_are_those_that_people_know(place: Path) -> None:
    with WorkDir(place / "out.zarr", {}, overwrite=False) as work:
        assert ownership.named(str(work.store)) == f"{work.path}/store"
        assert ownership.named(f"{place}/x") == f"{place}/x"


# under the output's own name


def store_with(change: Callable[[Path], object]) -> Form:
    def make(path: Path, victim: Path) -> None:
        shutil.copytree(STORE, path)
        change(path)

    return make


def claims_to_be_a_store(path: Path, victim: Path) -> None:
    path.mkdir()
    (path / "manifest.json").write_text('{"about": "my notes on the ckdiff-mask-store format"}')
    (path / "notes.txt").write_text("mine")


def unsealed(path: Path, victim: Path) -> None:
    """Says everything that a store says, but for the digest; and holds a file of the user's."""
    shutil.copytree(STORE, path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["objects"]["notes.txt"] = [4, "0" * 32]
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "notes.txt").write_text("mine")


def checkpoint_with(change: Callable[[Path], object]) -> Form:
    def make(path: Path, victim: Path) -> None:
        shutil.copytree(TUNED, path)
        change(path)

    return make


#: what must never be replaced, whichever command is asked to; and what messages name
FOREIGN: dict[str, tuple[Form, str]] = {
    "notes": (lambda path, victim: path.write_text("mine"), ""),
    "link to a store": (lambda path, victim: path.symlink_to(STORE), ""),
    "link to weights": (lambda path, victim: path.symlink_to(TUNED), ""),
    "pipe": (lambda path, victim: os.mkfifo(path), ""),
    "json": (lambda path, victim: path.write_text("{}"), ""),
    "zip": (lambda path, victim: shutil.copy(make_zip(victim), path), ""),
    "named safetensors": (lambda path, victim: path.write_bytes(b"\x08" + bytes(15)), ""),
    "folder of notes": (lambda path, victim: notes(path), ""),
    "claims to be a store": (claims_to_be_a_store, ""),
    "unsealed": (unsealed, "notes.txt"),
    "store and notes": (store_with(lambda p: (p / "notes.txt").write_text("mine")), "notes.txt"),
    "store and deep notes": (
        store_with(lambda p: (p / "masks" / "exact" / "c" / "1").write_text("mine")),
        "masks/exact/c/1",
    ),
    "store and a folder": (store_with(lambda p: (p / "figures").mkdir()), "figures"),
    "store and a link": (store_with(lambda p: (p / "l").symlink_to("zarr.json")), "l"),
    "damaged store and notes": (
        store_with(
            lambda p: [(p / name).write_bytes(b"") for name in ("manifest.json", "todo.md")]
        ),
        "todo.md",
    ),
    "checkpoint and a config": (
        checkpoint_with(lambda p: (p / "config.json").write_text("{}")), "config.json"
    ),
    "checkpoint and an impostor": (
        checkpoint_with(lambda p: (p / "x.safetensors").write_text("mine")), "x.safetensors"
    ),
    "checkpoint and no index": (
        checkpoint_with(lambda p: (p / "a.safetensors.index.json").write_text("{}")),
        "a.safetensors.index.json",
    ),
    "checkpoint and a link": (
        checkpoint_with(lambda p: (p / "y.safetensors").symlink_to(BASE / "model.safetensors")),
        "y.safetensors",
    ),
    "checkpoint and masks": (
        checkpoint_with(
            lambda p: shutil.copy(DATA / "masks.safetensors", p / "masks.safetensors")
        ),
        "masks.safetensors",
    ),
}  # fmt: skip


def make_zip(folder: Path) -> Path:
    import zipfile

    path = folder.parent / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("photo.jpg", "mine")
    return path


@pytest.mark.parametrize("form", FOREIGN)
def test_overwrite_never_replaces_what_is_not_ours(place: Path, form: str) -> None:
    out = place / "out"
    make, named = FOREIGN[form]
    make(out, place.parent / "victim")
    before = snapshot(place)
    kind = form.partition(" ")[0]
    for name, command in COMMANDS.items():
        for options in ({}, {"overwrite": True}):
            with pytest.raises(CkdiffError) as caught:
                command(out, **options)
            line = caught.value.one_line()
            assert str(out) in line
            same = {"store": "diff", "unsealed": "diff", "damaged": "diff", "checkpoint": "apply"}
            if named and name == same[kind]:
                assert named in line, (name, line)
            assert snapshot(place) == before, name


@pytest.mark.parametrize("first", COMMANDS)
def test_overwrite_replaces_what_the_same_kind_of_command_made(place: Path, first: str) -> None:
    out = place / "out"
    COMMANDS[first](out)
    (kind,) = (kind for kind in KINDS if first in kind)
    for name, command in COMMANDS.items():
        before = snapshot(place)
        if name in kind:
            with pytest.raises(CkdiffError, match="exists"):
                command(out)
            command(out, overwrite=True)
            assert os.listdir(place) == [out.name]
        else:
            with pytest.raises(CkdiffError):
                command(out, overwrite=True)
            assert snapshot(place) == before, name


def test_what_was_put_into_a_store_at_the_last_moment_is_not_deleted(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last look, and before the names are exchanged."""
    from ckdiff.outputs import placing

    out = place / "out.zarr"
    shutil.copytree(STORE, out)
    exchange = placing._exchange

    def late(one: Path, other: Path) -> bool:
        if other == out and one.name == "replaced" and not done:
            done.append(1)
            (out / "notes.txt").write_text("mine")
        return exchange(one, other)

    done: list[int] = []
    monkeypatch.setattr(placing, "_exchange", late)
    with pytest.raises(StoreExists, match=r"notes\.txt"):
        COMMANDS["diff"](out, overwrite=True)
    assert done
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "manifest.json").read_bytes() == (STORE / "manifest.json").read_bytes()


def test_what_appears_under_the_name_at_the_last_moment_is_not_lost(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckdiff.outputs import placing

    move = placing._move

    def late(new: Path, out: Path) -> None:
        out.write_text("mine")
        move(new, out)

    monkeypatch.setattr(placing, "_move", late)
    for name in COMMANDS:
        out = place / "out"
        with pytest.raises(CkdiffError):
            COMMANDS[name](out)
        assert out.read_text() == "mine"
        out.unlink()
        clean(place)
        assert os.listdir(place) == []


# moments, and other names


def test_a_new_directory_that_was_exchanged_for_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever owns the directory that it is in, between making it and opening it."""
    other = place / "other"
    make = ownership._make

    def exchanged(path: Path) -> bool:
        made = make(path)
        if made and not (place / "ours").exists():
            path.rename(place / "ours")
            other.rename(path)
        return made

    for content in (["README.txt", "chapter1.tex"], ["README.txt", "store", "new"]):
        other.mkdir(mode=0o700)
        for name in content:
            (other / name).write_text("years of work")
        before = snapshot(other)
        with monkeypatch.context() as patch:
            patch.setattr(ownership, "_make", exchanged)
            for _ in range(2):
                with pytest.raises(CkdiffError, match="not a work directory") as caught:
                    COMMANDS["diff"](place / "out")
        assert str(place / "out") in str(caught.value)
        path = place / f"out{SUFFIX}"
        assert snapshot(path) == before
        shutil.rmtree(path)
        shutil.rmtree(place / "ours")


def test_temporaries_are_removed_from_the_store_and_from_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is renamed away and a link put in its place as soon as it has its name."""
    from ckdiff.outputs import placing

    victim, out, move = place.parent / "victim", place / "out", placing._move
    (victim / ".thesis.tmp").write_text("mine")

    def late(new: Path, out: Path) -> None:
        move(new, out)
        out.rename(place / "moved")
        out.symlink_to(victim)

    monkeypatch.setattr(placing, "_move", late)
    before = snapshot(victim)
    with contextlib.suppress(CkdiffError):
        COMMANDS["diff"](out)
    assert snapshot(victim) == before


@pytest.mark.parametrize("name", ["diff", "apply", "delta", "export"])
def test_what_came_between_is_not_lost_by_undoing(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last look finds something foreign; meanwhile something else has taken the name."""
    from ckdiff.outputs import place as places
    from ckdiff.stores import workdir

    out = place / "out"
    COMMANDS[name](out)

    def finds(path: Path) -> str | None:
        if path.name not in ("former", "replaced"):
            return None
        out.rename(place / "elsewhere")
        out.mkdir() if path.is_dir() else None
        (out / "chapter1" if path.is_dir() else out).write_text("years of work")
        return "holds something"

    monkeypatch.setattr(workdir, "foreign", finds)
    entered = places.Place.__enter__

    def enter(self: Any) -> Any:
        self._in_the_way = finds
        return entered(self)

    monkeypatch.setattr(places.Place, "__enter__", enter)
    with pytest.raises(CkdiffError, match="holds something"):
        COMMANDS[name](out, overwrite=True)
    kept = [path for path in place.parent.rglob("*") if path.is_file()]
    assert any(path.read_bytes() == b"years of work" for path in kept)


def test_a_file_that_is_replaced_is_looked_at_once_more(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckdiff.outputs import placing

    out, exchange = place / "out", placing._exchange
    COMMANDS["delta"](out)

    def late(one: Path, other: Path) -> bool:
        if not done:
            done.append(1)
            (place / "notes").write_text("mine")
            (place / "notes").replace(out)
        return exchange(one, other)

    done: list[int] = []
    monkeypatch.setattr(placing, "_exchange", late)
    with pytest.raises(CkdiffError, match="not a delta"):
        COMMANDS["delta"](out, overwrite=True)
    assert out.read_text() == "mine"


@contextlib.contextmanager
def bound(source: Path, target: Path) -> Iterator[Path]:
    """Another name for a directory; skips where that cannot be had."""
    target.mkdir()
    done = subprocess.run(["mount", "--bind", source, target], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)


def test_inputs_are_known_by_any_name(place: Path) -> None:
    inputs = place / "inputs"
    inputs.mkdir()
    base = shutil.copytree(BASE, inputs / "base")
    one = shutil.copytree(STORE, inputs / "one.zarr")
    with bound(inputs, place / "again") as again:
        before = snapshot(inputs)
        for action in (
            lambda: ckdiff.combine(
                "union", [one, DATA / "random.zarr"], again / "one.zarr", rule="exact",
                overwrite=True,
            ),
            lambda: ckdiff.apply(base, DATA / "packed.ckdelta", again / "base", overwrite=True),
            lambda: ckdiff.diff(base, TUNED, again / "base" / "in.zarr"),
            lambda: ckdiff.graft(base, TUNED, one, again / "base", rule="exact", overwrite=True),
        ):  # fmt: skip
            with pytest.raises(CkdiffError, match="the output"):
                action()
        assert snapshot(inputs) == before


def test_what_is_mounted_in_an_output_is_not_the_output_s(place: Path) -> None:
    out = place / "out"
    shutil.copytree(TUNED, out)
    (place / "other").mkdir()
    shutil.copy(BASE / "model.safetensors", place / "other" / "x.safetensors")
    with bound(place / "other", out / "sub"):
        for name in ("apply", "graft"):
            with pytest.raises(CkdiffError, match="mounted"):
                COMMANDS[name](out, overwrite=True)
        assert (place / "other" / "x.safetensors").exists()
    with bound(place / "other", place / "mounted"):
        with pytest.raises(CkdiffError):
            COMMANDS["apply"](place / "mounted", overwrite=True)
        assert os.listdir(place / "mounted") == ["x.safetensors"]


def test_an_input_in_the_rest_of_a_run_is_not_deleted(place: Path) -> None:
    begun(place / f"out{SUFFIX}")
    inside = shutil.copytree(BASE, place / f"out{SUFFIX}" / "former")
    for action in (
        lambda: ckdiff.apply(inside, DATA / "packed.ckdelta", place / "out"),
        lambda: ckdiff.diff(inside, TUNED, place / "out"),
    ):
        with pytest.raises(CkdiffError, match="source"):
            action()
    assert (inside / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["diff", "apply", "delta"])
def test_a_private_output_stays_private(place: Path, name: str) -> None:
    out = place / "out"
    COMMANDS[name](out)
    mode = 0o700 if out.is_dir() else 0o600
    out.chmod(mode)
    COMMANDS[name](out, overwrite=True)
    assert stat.S_IMODE(out.stat().st_mode) == mode


def test_the_current_directory_is_not_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for name in ("apply", "graft"):
        with pytest.raises(CkdiffError, match="current directory"):
            COMMANDS[name](".")
    assert os.path.samefile(".", place)


def test_two_dots_after_a_link_are_where_the_system_says(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "far" / "deep").mkdir(parents=True)
    (place / "link").symlink_to("far/deep")
    monkeypatch.chdir(place)
    COMMANDS["delta"]("link/../x")
    assert (place / "far" / "x").is_file()
    assert not (place / "x").exists()


def test_clean_goes_on_after_what_it_cannot_remove(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        begun(place / f"{name}{SUFFIX}")
    remove = ownership.WorkFolder.remove

    def fails(self: ownership.WorkFolder) -> None:
        if self.path.name.startswith("b"):
            raise OSError(1, "Operation not permitted")
        remove(self)

    monkeypatch.setattr(ownership.WorkFolder, "remove", fails)
    cleaned = clean(place)
    assert [path.name[0] for path in cleaned.removed] == ["a", "c"]
    assert ["Operation not permitted" in why for _, why in cleaned.foreign] == [True]
