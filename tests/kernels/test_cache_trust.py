"""Machine code on disk that somebody else may have put there: never used, never touched."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import grp
import hashlib
import os
import pwd
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckdiff.kernels import codegen, compiled, image, keeping, owned

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
ROOT = os.geteuid() == 0

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="images are for x86-64"
)
as_root = pytest.mark.skipif(not ROOT, reason="only root can give files away")


@dataclass
class Cache:
    """A cache of its own, with one kernel to ask for and what is said and compiled meanwhile."""

    folder: Path
    said: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def file(self) -> Path:
        name = compiled._file("survey", "")
        assert name is not None
        return self.folder / name

    def counted(self) -> list[int]:
        """Ones and zero bytes of known words, by the kernel that a new process would take."""
        compiled._compiled.clear()
        keeping._refused.clear()
        self.said.clear()
        self.made.clear()
        words = (ctypes.c_uint64 * 128)(*([0xFF] * 128))
        out = (ctypes.c_int64 * 2)()
        kernel = compiled.c_function("survey").ctypes
        kernel(ctypes.addressof(words), 128, ctypes.addressof(out))
        return list(out)


once = functools.cache(codegen.compile_kernel)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    found = Cache(tmp_path / "cache" / "ckdiff")
    found.folder.mkdir(0o700, parents=True)
    (tmp_path / "cache").chmod(0o755)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(found.folder.parent))
    monkeypatch.setattr(compiled, "_compiled", {})
    monkeypatch.setattr(keeping, "_refused", [])
    monkeypatch.setattr(keeping, "on_refusal", [found.said.append])
    monkeypatch.setattr(compiled, "on_compile", [found.made.append])
    # what is compiled is always the same: only that it is, and what becomes of it, is of interest
    monkeypatch.setattr(codegen, "compile_kernel", once)
    yield found
    os.chmod(found.folder.parent, 0o755)


def in_form(name: str, payload: bytes) -> bytes:
    """A cache file whose checksum is right."""
    head = keeping._MAGIC
    return head + hashlib.sha256(name.encode() + payload).digest() + payload


#: code that returns at once, and so counts nothing
IDLE = b"i" + struct.pack("<4Q", 0, 4096, 4096, 0) + b"\xc3".ljust(4096, b"\0")
NONE = [0, 0]


def plant(cache: Cache) -> bytes:
    """Put wrong code where the right one is looked for, as an attacker who may write there can."""
    content = in_form(cache.file.name, IDLE)
    cache.file.write_bytes(content)
    cache.file.chmod(0o644)
    return content


@pytest.fixture(scope="module")
def right() -> list[int]:
    words = [0xFF] * 128
    return [sum(word.bit_count() for word in words), 7 * len(words)]


def test_what_only_we_can_have_written_is_believed(cache: Cache) -> None:
    """Or the tests below would show nothing. As 0.1.0 left it: mode 644 in a folder of mode 700."""
    plant(cache)
    assert cache.counted() == NONE
    assert cache.said == cache.made == []


def linked(path: Path) -> None:
    other = path.with_name("other")
    path.rename(other)
    path.symlink_to(other)


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def listening(path: Path) -> None:
    there = os.getcwd()
    os.chdir(path.parent)  # the name of a socket must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(there)


def device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("devices cannot be made here")


def sparse(path: Path) -> None:
    os.truncate(path, 10 << 30)


FILES = {
    "link": (linked, "it is a link"),
    "dangling link": (dangling, "it is a link"),
    "FIFO": (replaced(os.mkfifo), "it is not a regular file"),
    "socket": (replaced(listening), "it is not a regular file"),
    "directory": (replaced(os.mkdir), "it is not a regular file"),
    "device": (replaced(device), "it is not a regular file"),
    "10 GB": (sparse, "it is larger than any kernel"),
    "group's": (lambda path: path.chmod(0o664), "others may write to it"),
    "everyone's": (lambda path: path.chmod(0o646), "others may write to it"),
    "another's": (lambda path: os.chown(path, NOBODY, NOBODY), "it belongs to another user"),
}


def needs_root(form: str) -> None:
    if form in ("another's", "another's parent", "device") and not ROOT:
        pytest.skip("only root can make this")


def state_of(path: Path) -> tuple[object, ...]:
    found = os.lstat(path)
    return found.st_mode, found.st_uid, found.st_ino, found.st_size, found.st_mtime_ns


@pytest.mark.parametrize("kind", ["image", "library"])
@pytest.mark.parametrize("form", FILES)
def test_files_that_others_could_have_put_there(
    form: str, kind: str, cache: Cache, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_root(form)
    if kind == "library":  # what is kept where no image can be made
        monkeypatch.setattr(image, "build", refuse)
        assert cache.counted() == right
        assert cache.counted() == right
        assert cache.made == [], "the control: it is loaded"
    else:
        plant(cache)
    change, reason = FILES[form]
    change(cache.file)
    before = {path: state_of(path) for path in cache.folder.iterdir()}
    assert cache.counted() == right
    assert cache.made == ["survey"]
    (line,) = cache.said
    assert line == (f"kernels are compiled anew and not kept: {cache.file}: {reason} (remove it)")
    assert {path: state_of(path) for path in cache.folder.iterdir()} == before


def refuse(*arguments: object) -> bytes:
    raise ValueError("not here")


def moved_behind_a_link(folder: Path) -> None:
    other = folder.with_name("other")
    folder.rename(other)
    folder.symlink_to(other)


def weak_parent(folder: Path) -> None:
    folder.parent.chmod(0o777)


FOLDERS = {
    "link": (moved_behind_a_link, "it is a link"),
    "everyone's": (lambda folder: folder.chmod(0o707), "others may write to it"),
    "group's": (lambda folder: folder.chmod(0o770), "others may write to it"),
    "sticky": (lambda folder: folder.chmod(0o1777), "others may write to it"),
    "another's": (lambda folder: os.chown(folder, NOBODY, -1), "it belongs to another user"),
    "everyone's parent": (weak_parent, "others may write to it"),
    "another's parent": (
        lambda folder: os.chown(folder.parent, NOBODY, -1),
        "it belongs to another user",
    ),
}


@pytest.mark.parametrize("form", FOLDERS)
def test_folders_that_others_could_fill(form: str, cache: Cache, right: list[int]) -> None:
    needs_root(form)
    plant(cache)
    change, reason = FOLDERS[form]
    change(cache.folder)
    inside = sorted(os.listdir(cache.folder))
    assert cache.counted() == right
    assert cache.made == ["survey"]
    (line,) = cache.said
    place = cache.folder.parent if form.endswith("parent") else cache.folder
    assert line == (
        f"kernels are compiled anew and not kept: {place}: {reason} "
        "(NUMBA_CACHE_DIR may name a directory that only you can write)"
    )
    assert sorted(os.listdir(cache.folder)) == inside
    cache.file.unlink()
    assert cache.counted() == right
    assert len(cache.said) == 1
    assert not cache.file.exists(), "nothing is written there either"


def test_a_folder_is_made_for_us_alone_and_nowhere_else(
    cache: Cache, right: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "a" / "b"))
    before = os.umask(0)
    try:
        assert cache.counted() == right
        open_to_all = tmp_path / "open"
        open_to_all.mkdir()
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(open_to_all / "b"))
        assert cache.counted() == right
    finally:
        os.umask(before)
    (file,) = (tmp_path / "a" / "b" / "ckdiff").iterdir()
    modes = [stat.S_IMODE(os.stat(path).st_mode) for path in (file, *list(file.parents)[:3])]
    assert modes == [0o600, 0o700, 0o700, 0o700]
    assert list(open_to_all.iterdir()) == []
    (line,) = cache.said
    assert line.startswith(f"kernels are compiled anew and not kept: {open_to_all}: others may")


def test_a_folder_in_a_sticky_one_and_behind_links_of_ours(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under /tmp, and in a home that lies elsewhere."""
    plant(cache)
    cache.folder.parent.chmod(0o1777)
    (tmp_path / "up").symlink_to("cache")
    (tmp_path / "home").symlink_to(tmp_path / "up" / ".." / "up")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "home" / "."))
    assert cache.counted() == NONE
    assert cache.said == []


@as_root
def test_a_link_that_somebody_else_can_turn(
    cache: Cache, tmp_path: Path, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leads to a folder of ours today: which one is another user's choice."""
    plant(cache)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "home").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(shared / "home"))
    assert cache.counted() == NONE
    os.chown(shared / "home", NOBODY, NOBODY, follow_symlinks=False)
    assert cache.counted() == right
    (line,) = cache.said
    assert f"{shared}/home: it belongs to another user" in line


def test_the_note_comes_before_the_work(
    cache: Cache, tmp_path: Path, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is no folder yet: what is compiled is then known not to be kept."""
    cache.folder.parent.chmod(0o777)
    cache.folder.rmdir()
    order: list[str] = []
    monkeypatch.setattr(keeping, "on_refusal", [lambda line: order.append("refused")])
    monkeypatch.setattr(compiled, "on_compile", [lambda name: order.append("compiled")])
    assert cache.counted() == right
    assert order == ["refused", "compiled"]


def test_links_in_a_circle_are_no_place(
    cache: Cache, tmp_path: Path, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "x"))
    assert cache.counted() == right


@pytest.mark.parametrize(
    ("group", "members", "believed"),
    [("me", [], True), ("me", ["me"], True), ("me", ["me", "other"], False), ("staff", [], False)],
)
def test_a_home_that_its_users_own_group_may_write(
    group: str, members: list[str], believed: bool, cache: Cache, right: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plant(cache)
    cache.folder.parent.chmod(0o775)
    number = os.stat(cache.folder.parent).st_gid
    user = SimpleNamespace(pw_name="me", pw_gid=number)
    of_group = SimpleNamespace(gr_name=group, gr_gid=number, gr_mem=members)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: user)
    monkeypatch.setattr(grp, "getgrgid", lambda gid: of_group)
    assert cache.counted() == (NONE if believed else right)
    assert len(cache.said) == (0 if believed else 1)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"NUMBA_CACHE_DIR": "/n", "XDG_CACHE_HOME": "/x"}, "/n/ckdiff"),
        ({"NUMBA_CACHE_DIR": "", "XDG_CACHE_HOME": "/x"}, "/x/ckdiff/kernels"),
        ({"XDG_CACHE_HOME": "x", "HOME": "/h"}, "/h/.cache/ckdiff/kernels"),
        ({"HOME": "/"}, "/.cache/ckdiff/kernels"),
        ({"HOME": ""}, "/from/the/system/.cache/ckdiff/kernels"),
        ({}, "/from/the/system/.cache/ckdiff/kernels"),
    ],
)
def test_where_the_cache_lies(
    variables: dict[str, str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir="/from/the/system"))
    assert keeping.cache_directory() == place


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "HOME"])
def test_the_current_directory_is_no_place(
    variable: str, cache: Cache, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive that is unpacked there could bring the folder, and it would be ours."""
    below = {"NUMBA_CACHE_DIR": "ckdiff", "HOME": ".cache/ckdiff/kernels"}[variable]
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(variable, ".")
    monkeypatch.chdir(cache.folder.parent)
    here = cache.folder.parent / below
    here.mkdir(0o700, parents=True, exist_ok=True)
    (here / cache.file.name).write_bytes(in_form(cache.file.name, IDLE))
    assert cache.counted() == right
    (line,) = cache.said
    assert "it is relative" in line


def test_one_note_whatever_else_is_wrong(cache: Cache, right: list[int]) -> None:
    plant(cache)
    cache.file.chmod(0o666)
    assert cache.counted() == right
    compiled._compiled.clear()
    compiled.c_function("survey")
    compiled.c_function("margins")
    assert len(cache.said) == 1


def test_without_a_listener_it_is_logged(
    cache: Cache, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "on_refusal", [])
    plant(cache)
    cache.file.chmod(0o666)
    cache.counted()
    (record,) = caplog.records
    assert record.name == "ckdiff"
    assert record.levelname == "WARNING"


def test_a_write_that_fails_leaves_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert cache.counted() != NONE
    assert list(cache.folder.iterdir()) == []


def test_a_name_that_was_prepared_is_not_written_through(cache: Cache, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    folder, refused = owned.open_folder(str(cache.folder))
    assert refused == ""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "urandom", lambda size: bytes(size))
            (cache.folder / f".x.{bytes(8).hex()}").symlink_to(victim)
            with pytest.raises(FileExistsError):
                owned.write(folder, "x", b"content")
            assert [path.is_symlink() for path in cache.folder.iterdir()] == [True]
    finally:
        os.close(folder)
    assert victim.read_bytes() == b"mine"


def test_no_descriptor_is_left_open(cache: Cache) -> None:
    plant(cache)
    cache.counted()
    before = sorted(os.listdir("/proc/self/fd"))
    for form in ("ours", "refused", "missing"):
        if form == "refused":
            cache.file.chmod(0o666)
        elif form == "missing":
            cache.file.unlink()
        cache.counted()
    with contextlib.suppress(FileNotFoundError):
        cache.file.unlink()
    assert sorted(os.listdir("/proc/self/fd")) == before


AS_NOBODY = """
import ctypes, os, sys
from ckdiff.kernels import compiled, keeping
compiled._compile("survey", "")  # all imports are made while they can be read
said, made = [], []
keeping.on_refusal.append(said.append)
compiled.on_compile.append(made.append)
keeping._refused.clear()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
os.environ["NUMBA_CACHE_DIR"] = sys.argv[1]
compiled.c_function("survey")
print(len(said), made, said[0])
"""


@as_root
def test_root_s_files_are_another_user_s_too(cache: Cache) -> None:
    plant(cache)
    cache.folder.chmod(0o755)
    public = Path("/tmp") / f"ckdiff-trust-{os.getpid()}"
    (cache.folder.parent).rename(public)
    try:
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(public)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "NUMBA_CACHE_DIR": ""},
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        public.rename(cache.folder.parent)
    assert done.stdout.startswith("1 ['survey'] kernels are compiled anew and not kept: ")
    assert done.stdout.endswith(
        f"{public}/ckdiff: it belongs to another user (NUMBA_CACHE_DIR may name a directory that "
        "only you can write)\n"
    )
