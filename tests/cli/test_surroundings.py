"""What lies in the current directory, and what others set for numba, sets nothing of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Pair, write_pair

REPOSITORY = Path(__file__).resolve().parents[2]
NOTE = "ckdiff: compiling kernels (first run only)\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


def run(
    arguments: list[str], here: Path, cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    kept |= {"PYTHONPATH": str(REPOSITORY), "NUMBA_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=here,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def files_in(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*.bin")}


def written(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text)

    return write


def endless(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


#: .numba_config.yaml -> how it is made
CONFIGS = {
    "not YAML": written("a: [\n"),
    "a list": written("[1, 2]\n"),
    "other code": written("opt: '0'\nboundscheck: 1\ncpu_name: generic\ndisable_jit: 1\n"),
    "FIFO": os.mkfifo,
    "directory": os.mkdir,
    "a terabyte": endless,
}

#: one kernel, compiled (in no time) and run, as any program of a user does it
COUNT = """
import json, os, sys
import numpy as np
from ckdiff.kernels.entropy import survey
found = survey(np.frombuffer(b"abcdefg\\0", np.uint8))
import numba
print(json.dumps([found, numba.config.DEBUG, int(numba.config.OPT)]))
"""


#: bits and zeros that there are, and numba as it is where nothing is set
FOUND = [[sum(byte.bit_count() for byte in b"abcdefg"), 1], 0, 3]


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache as it is after COUNT where nothing is set."""
    here, cache = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("cache")
    assert count(here, cache) == FOUND
    return {path.name: path.read_bytes() for path in cache.rglob("*.bin")}


def count(
    here: Path, cache: Path, before: str = "", *more: str, after: str = "", **environment: str
) -> object:
    """What COUNT prints with other statements around it."""
    done = run(["-c", before + COUNT + after, *more], here, cache, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


ELSEWHERE = """
import os, sys
from ckdiff.kernels import compiled
# some ask what the machine has while they are compiled
for kernel in ["pair", "panels", "bounds", "decode", "lowrank"]:
    compiled.c_function(kernel)  # after what is looked for again before each compilation
    os.chdir(sys.argv.pop())
"""


def test_numba_s_file_in_the_current_directory(tmp_path: Path, usual: dict[str, bytes]) -> None:
    folders = [tmp_path / form for form in CONFIGS]
    for folder, make in zip(folders, CONFIGS.values(), strict=True):
        folder.mkdir()
        make(folder / ".numba_config.yaml")
    first, *others = folders
    cache = tmp_path / "cache"
    assert count(first, cache, ELSEWHERE, *map(str, others)) == FOUND
    kept = {path.name: path.read_bytes() for path in cache.rglob("*.bin")}
    assert {name: kept[name] for name in usual} == usual
    assert len(kept) == len(usual) + 5


def test_variables_for_numba_are_not_for_us(tmp_path: Path, usual: dict[str, bytes]) -> None:
    cache = tmp_path / "cache"
    variables = {
        "NUMBA_OPT": "many", "NUMBA_DEBUG": "no", "NUMBA_CUDA_USE_NVIDIA_BINDING": "1",
        "NUMBA_BOUNDSCHECK": "1", "NUMBA_CPU_NAME": "generic",
    }  # fmt: skip
    assert count(tmp_path, cache, **variables) == FOUND
    assert {path.name: path.read_bytes() for path in cache.rglob("*.bin")} == usual


USERS = """
import numba
function = numba.njit(lambda x: x + 1)
"""
AFTERWARDS = """
settings = lambda: [numba.config.NUMBA_NUM_THREADS, numba.config.PARFOR_MAX_TUPLE_SIZE]
assert settings() == [1, 5], settings()
assert numba.njit(lambda x: x + 1)(1) == 2
settings = lambda: (numba.config.LOOP_VECTORIZE, numba.config.FUNCTION_CACHE_SIZE)
assert settings() == (0, 7), settings()
from ckdiff.kernels.casting import widen
again = np.zeros(1, "<f4")
widen(np.array([0x38], np.uint8), "F8_E4M3", "F32", again.view(np.uint8))
assert again == 1, again
assert settings() == (0, 7), settings()
"""


def test_a_user_s_numba_stays_the_user_s(tmp_path: Path, usual: dict[str, bytes]) -> None:
    """Imported before us or after: with all that it finds, and none of it in what we keep."""
    (tmp_path / ".numba_config.yaml").write_text("loop_vectorize: 0\nfunction_cache_size: 7\n")
    variables = {"NUMBA_NUM_THREADS": "1", "NUMBA_PARFOR_MAX_TUPLE_SIZE": "5"}
    for before, keeps in ((USERS, False), ("", True)):
        cache = tmp_path / f"cache{keeps}"
        count(tmp_path, cache, before, after=AFTERWARDS, **variables)
        assert files_in(cache) >= usual.keys() if keeps else files_in(cache) == set()


def test_what_another_s_numba_compiles_is_kept_if_it_is_the_same(
    tmp_path: Path, usual: dict[str, bytes]
) -> None:
    cache = tmp_path / "cache"
    count(tmp_path, cache, "import numba\n", NUMBA_DISABLE_JIT="1")
    assert files_in(cache) == usual.keys()


def test_json_is_alone_on_stdout_whatever_lies_here(pair: Pair, tmp_path: Path) -> None:
    """Settings that print, and modules that ``python -m`` would find before ours."""
    (tmp_path / ".numba_config.yaml").write_text("debug: 1\ndump_llvm: 1\n")
    for name in ("click", "numpy", "numba", "zarr", "xxhash", "yaml", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    prints = {"NUMBA_DEBUG": "1", "NUMBA_DUMP_ASSEMBLY": "1", "NUMBA_TRACE": "1"}
    command = ["-m", "ckdiff", "diff", *pair, "--json"]
    done = run(command, tmp_path, tmp_path / "cache", **prints)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rules"]["exact"]["changed"] == 4156
    assert done.stderr == NOTE


def test_python_m_runs_in_a_source_tree_and_where_the_directory_is_gone(tmp_path: Path) -> None:
    version = ["-m", "ckdiff", "--version"]
    assert run(version, REPOSITORY, tmp_path, PYTHONPATH="").returncode == 0
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        "import os, sys; os.rmdir(os.getcwd()); "
        f"os.execv(sys.executable, [sys.executable, *{version!r}])"
    )
    assert run(["-c", code], gone, tmp_path).returncode == 0
