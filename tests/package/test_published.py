"""What is published: two clones give the same bytes, and it works where nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from source import ROOT

import ckdiff
from ckdiff.kernels import shipped

VERSION = ckdiff.__version__
WHEEL, CORE = (f"{name}-{VERSION}-py3-none-any.whl" for name in ("ckdiff", "ckdiff_core"))
SDIST = f"ckdiff-{VERSION}.tar.gz"
MODELS = ROOT / "examples/tiny_rl/checkpoints"
BASE, TUNED = MODELS / "base", MODELS / "rl_seed1"
#: kernels that `apply`, `check`, `info` and in-place sync take for BF16
KERNELS = "advise", "changes", "guard", "hash", "merge 16f", "put", "survey", "ungaps", "unpair"
LEVEL = next(
    (level for level in shipped.LEVELS if shipped.processor() >= level.features.keys()), None
)
#: what an inference host does without
LEFT_OUT = "numba", "llvmlite", "zarr", "numcodecs", "dask", "huggingface_hub"

pytestmark = [
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="clones of the repository are built"),
    pytest.mark.skipif(LEVEL is None, reason="no machine code comes along for this processor"),
]


def run(*command: str | Path, **how: object) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return str(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of what two clones built, in places, on days and with rights of their own."""
    assert LEVEL is not None
    folders = [tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other") / "deeper"]
    making = []
    for folder, umask in zip(folders, (0o022, 0o077), strict=True):
        run("git", "clone", "-q", ROOT, folder / "clone", umask=umask)
        if umask == 0o077:
            for path in (folder / "clone").rglob("*.py"):
                os.utime(path, (1e9, 1e9))
        command = [sys.executable, folder / "clone/package/build.py", "-o", folder / "dist"]
        command += [f"--level={LEVEL.name}", *(f"--kernel={title}" for title in KERNELS)]
        making.append(subprocess.Popen(command, umask=umask, stdout=subprocess.DEVNULL))
    assert [process.wait() for process in making] == [0, 0]
    return [folder / "dist" for folder in folders]


@pytest.fixture(scope="module")
def core(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has ckdiff-core and what it needs."""
    return environment(tmp_path_factory.mktemp("host"), built[0] / CORE)


@pytest.fixture(scope="module")
def whole(built: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has ckdiff and what it needs."""
    return environment(tmp_path_factory.mktemp("whole"), built[0] / WHEEL)


def environment(folder: Path, wheel: Path) -> Path:
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin/python"]
    run(*pip, "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    return folder / "bin"


def surroundings(folder: Path) -> dict[str, str]:
    """An environment in which nothing leads to this one, and kernels are kept nowhere."""
    return {"PATH": os.defpath, "HOME": str(folder), "NUMBA_CACHE_DIR": str(folder / "kernels")}


def test_two_clones_give_the_same_bytes(built: list[Path]) -> None:
    one, other = ({path.name: path.read_bytes() for path in made.iterdir()} for made in built)
    assert sorted(one) == sorted((WHEEL, CORE, SDIST))
    assert [name for name in one if one[name] != other[name]] == []


def test_what_is_in_them(built: list[Path]) -> None:
    tracked = set(run("git", "-C", built[0].parent / "clone", "ls-files", "-z").split("\0")) - {""}
    with tarfile.open(built[0] / SDIST) as sdist:
        found = {name.partition("/")[2] for name in sdist.getnames()}
    assert tracked - found == set(), "`make test` needs all of it"
    assert found - tracked == {"PKG-INFO"} | {f"ckdiff/kernels/images/{LEVEL.name}"} & found  # type: ignore[union-attr]
    package = {name for name in tracked if name.startswith("ckdiff/")}
    assert {"ckdiff/py.typed", "ckdiff/reports/page/assets/page.css"} <= package
    for wheel in (WHEEL, CORE):
        with zipfile.ZipFile(built[0] / wheel) as packed:
            inside = {name for name in packed.namelist() if ".dist-info/" not in name}
            assert inside == package | {f"ckdiff/kernels/images/{LEVEL.name}"}  # type: ignore[union-attr]


def test_the_small_one_is_the_same_package_and_asks_for_less(built: list[Path]) -> None:
    with zipfile.ZipFile(built[0] / WHEEL) as whole, zipfile.ZipFile(built[0] / CORE) as small:
        for name in small.namelist():
            if ".dist-info/" not in name:
                assert small.read(name) == whole.read(name), name
        text = small.read(f"ckdiff_core-{VERSION}.dist-info/METADATA").decode()
        asked = Parser().parsestr(whole.read(f"ckdiff-{VERSION}.dist-info/METADATA").decode())
    metadata = Parser().parsestr(text)
    needs = metadata.get_all("Requires-Dist") or []
    names = sorted(need.split(">")[0] for need in needs if ";" not in need)
    assert names == ["click", "google-crc32c", "numpy", "rich", "xxhash", "zstandard"]
    assert metadata["Name"] == "ckdiff-core"
    missing = {need for need in asked.get_all("Requires-Dist") or [] if ";" not in need}
    full = {need.partition(";")[0] for need in needs if "extra == 'full'" in need}
    assert full == missing - set(needs)


def test_a_host_that_only_receives_weights(core: Path, whole: Path, tmp_path: Path) -> None:
    """What the whole install made is applied, checked and followed by the small one."""
    made = tmp_path / "made"
    made.mkdir()
    run(whole / "ckdiff", "delta", BASE, TUNED, "-o", made / "tuned.delta")
    run(whole / "ckdiff", "delta", BASE, TUNED, "-o", made / "stream", "--encoding", "xor")
    run(whole / "ckdiff", "diff", BASE, TUNED, "-o", made / "run.zarr")
    alone = surroundings(tmp_path)
    program = core / "ckdiff"
    run(program, "apply", BASE, made / "tuned.delta", "-o", tmp_path / "anew", env=alone)
    run("cp", "-r", BASE, tmp_path / "local")
    run(program, "apply", tmp_path / "local", made / "stream", "--in-place", env=alone)
    for rebuilt in ("anew", "local"):
        wanted = (TUNED / "model.safetensors").read_bytes()
        assert (tmp_path / rebuilt / "model.safetensors").read_bytes() == wanted
    for path in ("tuned.delta", "stream", "run.zarr"):
        assert " ok, " in run(program, "check", made / path, env=alone)
        assert run(program, "info", made / path, env=alone)
    run("cp", "-r", BASE, tmp_path / "followed")
    code = "import sys; from ckdiff.sync import follow; follow(sys.argv[1], sys.argv[2])"
    run(core / "python", "-P", "-c", code, tmp_path / "followed", made / "stream", env=alone)
    assert not (tmp_path / "kernels").exists(), "nothing was compiled"


def test_how_small_it_is(core: Path, whole: Path) -> None:
    find = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert run(core / "python", "-P", "-c", find, *LEFT_OUT).strip() == "[]"
    assert run(whole / "python", "-P", "-c", find, *LEFT_OUT).strip() == str([*LEFT_OUT])
    sizes = [
        sum(path.stat().st_size for path in programs.parent.rglob("*") if path.is_file())
        for programs in (core, whole)
    ]
    assert sizes[0] < 125e6
    assert sizes[0] < sizes[1] / 3


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (f"diff {BASE} {TUNED}", "'compare W16:exact' came with ckdiff"),
        ("info hf://org/model", "models on the hub take the package"),
    ],
)
def test_what_is_not_there_is_named(core: Path, tmp_path: Path, command: str, said: str) -> None:
    done = subprocess.run(
        [core / "ckdiff", *command.split()],
        capture_output=True,
        text=True,
        env=surroundings(tmp_path),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert said in line
    assert "pip install 'ckdiff-core[full]'" in line


def test_the_whole_works_in_a_bare_environment(whole: Path, tmp_path: Path) -> None:
    for program in ([whole / "ckdiff"], [whole / "python", "-P", "-m", "ckdiff"]):
        assert run(*program, "--version", env=surroundings(tmp_path)) == f"ckdiff {VERSION}\n"
    said = run(whole / "ckdiff", "diff", BASE, TUNED, env=surroundings(tmp_path))
    assert "160,573" in said
