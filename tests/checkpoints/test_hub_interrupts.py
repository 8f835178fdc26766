"""Servers that are slow, that hang or that say nothing: nobody waits for them who need not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hub_server import Handler, Hub, Request, only_hub, safetensors, sharded
from support import Tensor

import ckdiff
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.opening import open_for_planning, open_for_streaming
from ckdiff.checkpoints.places.hub.fetching import Fetchers
from ckdiff.running.threads import run_threads

MIB = 1 << 20
SIZE = 3 * MIB
LONG = 30.0  # seconds: what a test that passes never waits


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only_hub(tmp_path, monkeypatch) as hub:
        rng = np.random.default_rng(0)
        for repo in ("o/a", "o/b"):
            data = rng.integers(0, 256, SIZE, np.uint8).tobytes()
            hub.put(repo, {"model.safetensors": safetensors({"w": ("U8", (SIZE,), data)})})
        yield hub


def is_data(request: Request) -> bool:
    return request.range is not None and request.range[1] - request.range[0] > 1 << 16


# -- threads ---------------------------------------------------------------------------------------


def test_the_first_failure_is_told_at_once() -> None:
    fetchers = Fetchers(2, "it")
    never, late = threading.Event(), list[int]()

    def fail(check: Callable[[], None]) -> None:
        raise ckdiff.CheckpointError("broken")

    def hang(check: Callable[[], None]) -> None:
        if not never.wait(LONG / 3):
            late.append(1)

    batch = fetchers.start([hang, fail])
    with pytest.raises(ckdiff.CheckpointError, match="broken"):
        fetchers.wait(batch)
    assert not late
    never.set()
    fetchers.close()


def void(value: object) -> None:
    """For a job's value, of which there is none."""


def test_closing_tells_those_who_wait() -> None:
    fetchers = Fetchers(1, "it")
    never = threading.Event()
    batches = [fetchers.start([lambda check: void(never.wait(LONG))]) for _ in range(2)]
    told: list[BaseException] = []

    def wait(what: Callable[[], None]) -> None:
        try:
            what()
        except ckdiff.CheckpointError as error:
            told.append(error)

    every = [lambda batch=batch: fetchers.wait(batch) for batch in batches]
    every.append(lambda: fetchers.pause(LONG))
    threads = [threading.Thread(target=wait, args=(what,)) for what in every]
    for thread in threads:
        thread.start()
    fetchers.close()
    for thread in threads:
        thread.join()
    assert len(told) == 3
    never.set()


def test_jobs_that_nobody_wants_do_not_run() -> None:
    fetchers = Fetchers(1, "it")
    go, ran = threading.Event(), list[int]()
    first = fetchers.start([lambda check: void(go.wait(LONG))])
    second = fetchers.start([lambda check: ran.append(2)])
    third = fetchers.start([lambda check: ran.append(3)])
    fetchers.abandon(second)
    fetchers.drop(second)  # which does not run, so there is nothing to wait for
    go.set()
    fetchers.wait(first)
    fetchers.wait(third)
    assert ran == [3]
    fetchers.close()


def test_many_jobs_on_few_threads() -> None:
    fetchers = Fetchers(3, "it")
    before, names = threading.active_count(), set[str]()
    seen = list[int]()

    def job(i: int) -> Callable[[Callable[[], None]], None]:
        def run(check: Callable[[], None]) -> None:
            check()
            names.add(str(threading.get_ident()))
            seen.append(i)

        return run

    for batch in [fetchers.start([job(i), job(-i)]) for i in range(200)]:
        fetchers.wait(batch)
    assert sorted(seen) == sorted([*range(200), *(-i for i in range(200))])
    assert len(names) <= 3
    assert threading.active_count() <= before + 3
    fetchers.close()


def test_workers_that_hang_are_told_before_they_are_waited_for() -> None:
    hanging, told = threading.Event(), threading.Event()

    def task(chunk: int, stop: threading.Event) -> int:
        if chunk:
            assert hanging.wait(LONG)
            raise ckdiff.CheckpointError("broken")
        hanging.set()
        assert told.wait(LONG)  # and does not look at stop
        return chunk

    with pytest.raises(ckdiff.CheckpointError, match="broken"):
        run_threads(range(2), task, workers=2, done=lambda *_: None, stopping=told.set)


def test_nobody_is_told_where_nothing_fails() -> None:
    told: list[int] = []
    run_threads(
        range(3), lambda chunk, stop: chunk, workers=2, done=lambda *_: None,
        stopping=lambda: told.append(1),
    )  # fmt: skip
    assert not told


# -- readers ---------------------------------------------------------------------------------------


def test_a_reader_that_waits_is_told_that_it_is_over(hub: Hub) -> None:
    asked, answer, late = threading.Event(), threading.Event(), list[int]()

    def fault(request: Request, handler: Handler) -> bool | None:
        if is_data(request):
            asked.set()
            if not answer.wait(LONG / 3):
                late.append(1)
        return None

    told: list[ckdiff.CkdiffError] = []
    with closing(open_for_streaming("hf://o/a")) as stream, closing(stream.reader()) as reader:
        hub.fault = fault

        def read() -> None:
            try:
                reader.acquire(*(np.array([n], np.int64) for n in (0, 0, SIZE)))
            except ckdiff.CheckpointError as error:
                told.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        assert asked.wait(LONG)
        stream.hang_up()
        thread.join()
        assert not late
    assert "was closed" in str(told[0])
    answer.set()


def test_a_file_that_fails_does_not_wait_for_another_that_hangs(hub: Hub, tmp_path: Path) -> None:
    for repo in ("o/a", "o/b"):
        data = hub.repositories[repo]["main"].files["model.safetensors"][-SIZE:]
        files: dict[str, dict[str, Tensor]] = {}
        for name in ("one", "two"):
            files[f"{name}.safetensors"] = {name: ("U8", (SIZE,), data)}
        hub.put(repo, sharded(files))
    asked, answer, late = threading.Event(), threading.Event(), list[int]()

    def fault(request: Request, handler: Handler) -> bool | None:
        if is_data(request) and request.file.startswith("one"):
            asked.set()
            if not answer.wait(LONG / 3):
                late.append(1)
        elif is_data(request):
            asked.wait(LONG)
            handler.say(404, {})
            return True
        return None

    hub.fault = fault
    with pytest.raises(ckdiff.CheckpointError, match=r"404|does not have"):
        ckdiff.diff("hf://o/a", "hf://o/b", stream=True)
    assert not late
    answer.set()


# -- Ctrl-C ----------------------------------------------------------------------------------------


def trickling(request: Request, handler: Handler, over: threading.Event) -> None:
    assert request.range is not None
    first, stop = request.range
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {first}-{stop - 1}/{stop}")
    handler.end_headers()
    while not over.wait(0.2):
        handler.wfile.write(b"x")


def hanging(request: Request, handler: Handler, over: threading.Event) -> None:
    over.wait(LONG)


def busy(request: Request, handler: Handler, over: threading.Event) -> None:
    handler.say(429, {}, Retry_After="60")


@pytest.mark.parametrize(
    ("what", "how"),
    [("data", trickling), ("data", hanging), ("data", busy), ("header", hanging),
     ("header", busy), ("listing", busy)],
)  # fmt: skip
def test_ctrl_c(
    hub: Hub,
    tmp_path: Path,
    what: str,
    how: Callable[[Request, Handler, threading.Event], None],
) -> None:
    asked, over = threading.Event(), threading.Event()

    def fault(request: Request, handler: Handler) -> bool | None:
        kind = "listing" if not request.file else "data" if is_data(request) else "header"
        if kind != what:
            return None
        asked.set()
        try:
            how(request, handler, over)
        except OSError:
            handler.close_connection = True
        return True

    hub.fault = fault
    place = tmp_path / "tmp"
    place.mkdir()
    environment = os.environ | {"TMPDIR": str(place)}
    ran = subprocess.Popen(
        [sys.executable, "-m", "ckdiff", "diff", "hf://o/a", "hf://o/b", "--stream"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert asked.wait(LONG)
        time.sleep(0.3)  # so that it waits for what has been asked for
        assert ran.poll() is None
        ran.send_signal(signal.SIGINT)
        out, said = ran.communicate(timeout=LONG / 3)
    finally:
        over.set()
        ran.kill()
        ran.wait()
    assert (ran.returncode, out) == (130, "")
    assert said == "ckdiff: error: interrupted\n"
    assert list(place.iterdir()) == []


# -- headers ---------------------------------------------------------------------------------------


def padded(name: str, length: int) -> bytes:
    header = f'{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}'.encode()
    return length.to_bytes(8, "little") + header.ljust(length) + b"x"


def test_long_headers_are_in_memory_one_at_a_time(hub: Hub) -> None:
    length = 8 * MIB
    hub.put("o/long", {f"{i}.safetensors": padded(f"w.{i}", length) for i in range(6)})
    tracemalloc.start()
    try:
        found = open_for_planning("hf://o/long")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.table.names == [f"w.{i}" for i in range(6)]
    assert peak < 3.5 * length  # one, its copy in the server, and what the server is sending
    assert isinstance(found, FileCheckpoint)
    assert found.contents.head_sizes == [8 + length] * 6


@pytest.mark.parametrize("length", [100, 65_528, 65_529, 200_000, MIB - 8, MIB])
def test_headers_of_every_length(hub: Hub, length: int) -> None:
    files = {f"{i:02}.safetensors": padded(f"w.{i:02}", length) for i in range(40)}
    weight_map = {f"w.{i:02}": f"{i:02}.safetensors" for i in range(40)}
    index = json.dumps({"weight_map": weight_map}).encode()
    hub.put("o/long", {**files, "model.safetensors.index.json": index})
    found = open_for_planning("hf://o/long")
    assert found.table.names == [f"w.{i:02}" for i in range(40)]
    ranges = [r.range for r in hub.requests if r.range is not None]
    least = 40 * max(length + 9, 1 << 16) + len(index)
    assert sum(stop - first for first, stop in ranges) <= least
