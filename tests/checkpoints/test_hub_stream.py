"""Checkpoints of the hub that are read by ranges, and never downloaded whole."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hub_server import Handler, Hub, Request, only_hub
from support import Tensor, safetensors_header

import ckdiff
from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.opening import open_for_streaming
from ckdiff.checkpoints.places.hub.streamed import StreamedPlace

MIB = 1 << 20


def raw(tensors: dict[str, Tensor], pad: int = 3) -> bytes:
    header = safetensors_header(tensors, pad=pad)
    data = b"".join(data for _, _, data in tensors.values())
    return len(header).to_bytes(8, "little") + header + data


def noise(seed: int, size: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


FIRST: dict[str, Tensor] = {
    "b": ("U8", (100_001,), noise(1, 100_001)),
    "skipped": ("U8", (3 * MIB,), noise(2, 3 * MIB)),
    "a": ("BF16", (50_000,), noise(3, 100_000)),
    "c": ("F32", (25,), noise(4, 100)),
}
SECOND: dict[str, Tensor] = {"d": ("U8", (70_000,), noise(5, 70_000))}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    template = "/{repo_id}/resolve/{revision}/{filename}"
    with only_hub(tmp_path, monkeypatch) as hub:
        name = "HUGGINGFACE_CO_URL_TEMPLATE"
        monkeypatch.setattr(huggingface_hub.constants, name, hub.endpoint + template)
        hub.put("me/model", {"x-1.safetensors": raw(FIRST), "x-2.safetensors": raw(SECOND)})
        yield hub


class Stream(FileCheckpoint):
    place: StreamedPlace


@pytest.fixture
def stream(hub: Hub) -> Iterator[Stream]:
    with closing(open_for_streaming("hf://me/model")) as found:
        hub.requests.clear()
        yield cast(Stream, found)


def spans(stream: Stream, *wanted: tuple[str, int, int]) -> list[Any]:
    index = {name: i for i, name in enumerate(stream.table.names)}
    columns = [(index[name], start, size) for name, start, size in wanted]
    return list(np.array(columns, np.int64).T)


def seen(addresses: Any, columns: list[Any]) -> list[bytes]:
    sizes = columns[2].tolist()
    return [ctypes.string_at(a, n) for a, n in zip(addresses.tolist(), sizes, strict=True)]


def expected(*wanted: tuple[str, int, int]) -> list[bytes]:
    every = FIRST | SECOND
    return [every[name][2][start : start + size] for name, start, size in wanted]


def ranged(hub: Hub) -> int:
    """Bytes that were asked for."""
    return sum(r.range[1] - r.range[0] for r in hub.requests if r.range is not None)


def test_exactly_the_spans_that_are_wanted(stream: Stream, hub: Hub) -> None:
    wanted = [("a", 10, 5000), ("b", 0, 100_001), ("c", 0, 100), ("d", 60_000, 10_000)]
    columns = spans(stream, *wanted)
    with closing(stream.reader()) as reader:
        assert seen(reader.acquire(*columns), columns) == expected(*wanted)
        reader.release()
    # c follows a so closely that both come in one request; what is between counts
    assert stream.place.bytes_fetched == ranged(hub) <= sum(columns[2]) + (1 << 17)
    assert ranged(hub) < MIB


@pytest.mark.parametrize("spool", [100_064, 199_999, 300_000, 410_000, 1 << 20])
def test_windows_that_were_asked_for_before(stream: Stream, hub: Hub, spool: int) -> None:
    stream.place.spool = spool
    windows = [[("skipped", at, 100_000)] for at in range(0, 3_000_000, 100_000)]
    columns = [spans(stream, *window) for window in windows]
    with closing(stream.reader()) as reader:
        for ahead in columns[:3]:  # as a chunk task does, often more than there is room for
            reader.prefetch(*ahead)
        for i, window in enumerate(windows):
            for ahead in columns[i + 3 : i + 4]:
                reader.prefetch(*ahead)
            assert seen(reader.acquire(*columns[i]), columns[i]) == expected(*window)
            reader.release()
    assert ranged(hub) == stream.place.bytes_fetched == 3_000_000  # nothing twice


def test_windows_out_of_turn(stream: Stream) -> None:
    stream.place.spool = 250_000
    first, second = [("skipped", 0, 100_000)], [("skipped", 900_000, 200_000)]
    one, two = spans(stream, *first), spans(stream, *second)
    with closing(stream.reader()) as reader:
        reader.prefetch(*one)  # in the way of what is wanted now
        assert seen(reader.acquire(*two), two) == expected(*second)
        reader.release()
        assert seen(reader.acquire(*one), one) == expected(*first)


def test_a_spool_that_is_too_small(stream: Stream) -> None:
    stream.place.spool = 50_000
    with closing(stream.reader()) as reader, pytest.raises(ckdiff.BudgetError, match="too little"):
        reader.acquire(*spans(stream, ("b", 0, 100_001)))


def test_windows_of_many_sizes(stream: Stream, hub: Hub) -> None:
    stream.place.spool = 120_000
    rng = np.random.default_rng(6)
    edges = np.unique(np.r_[0, rng.integers(0, 3 * MIB, 60), 3 * MIB])
    sizes = np.minimum(np.diff(edges), 119_000)
    windows = [[("skipped", int(at), int(n))] for at, n in zip(edges, sizes, strict=False)]
    columns = [spans(stream, *window) for window in windows]
    nothing = [np.zeros(0, np.int64)] * 3
    with closing(stream.reader()) as reader:
        for ahead in columns[:3]:
            reader.prefetch(*ahead)
        for i, window in enumerate(windows):
            reader.prefetch(*nothing)
            for ahead in columns[i + 3 : i + 4]:
                reader.prefetch(*ahead)
            assert len(reader.acquire(*nothing)) == 0
            assert seen(reader.acquire(*columns[i]), columns[i]) == expected(*window)
            reader.release()
    assert ranged(hub) == sizes.sum()


def test_what_is_between_is_not_fetched_where_there_is_no_room(stream: Stream, hub: Hub) -> None:
    wanted = [("b", 0, 100_000), ("a", 0, 1000), ("c", 0, 100), ("a", 40_000, 60_000)]
    columns = spans(stream, *wanted)
    total = int(columns[2].sum())
    stream.place.spool = total
    with closing(stream.reader()) as reader:
        assert seen(reader.acquire(*columns), columns) == expected(*wanted)
    assert ranged(hub) == total


def test_many_readers(stream: Stream) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            with closing(stream.reader()) as reader:
                for _ in range(10):
                    at = int(rng.integers(0, 2 * MIB))
                    wanted = [("skipped", at, 30_000), ("d", 5, 77)]
                    columns = spans(stream, *wanted)
                    assert seen(reader.acquire(*columns), columns) == expected(*wanted)
                    reader.release()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize("times", [2, 1000])
def test_connections_that_break(stream: Stream, hub: Hub, times: int) -> None:
    broken = [0]

    def fault(request: Request, handler: Handler) -> bool | None:
        if request.range is None or broken[0] >= times:
            return None
        broken[0] += 1
        handler.hang_up(500, b"")
        return True

    hub.fault = fault
    stream.place.repository.wait = lambda seconds: None
    columns = spans(stream, ("b", 0, 100_001))
    with closing(stream.reader()) as reader:
        if times == 2:
            assert seen(reader.acquire(*columns), columns) == expected(("b", 0, 100_001))
        else:
            with pytest.raises(ckdiff.CheckpointError):
                reader.acquire(*columns)


def test_a_file_that_is_replaced(stream: Stream, hub: Hub) -> None:
    columns = spans(stream, ("b", 0, 100))
    with closing(stream.reader()) as reader:
        reader.acquire(*columns)
        reader.release()
        commit = hub.repositories["me/model"]["main"]
        data = bytearray(commit.files["x-1.safetensors"])
        data[-1] ^= 1
        commit.files["x-1.safetensors"] = bytes(data)
        with pytest.raises(ckdiff.SourceChanged):
            reader.acquire(*spans(stream, ("b", 100, 100)))


def test_closing_does_not_wait_for_a_slow_server(hub: Hub) -> None:
    stream = cast(Stream, open_for_streaming("hf://me/model"))
    answer = threading.Event()

    def fault(request: Request, handler: Handler) -> bool | None:
        answer.wait(20)
        return None

    hub.fault = fault
    reader = stream.reader()
    reader.prefetch(*spans(stream, ("b", 0, 100_001)))
    began = time.monotonic()
    reader.close()
    stream.close()
    assert time.monotonic() - began < 10  # and not for 20
    answer.set()


# the whole diff


def pair(hub: Hub) -> tuple[str, str]:
    tuned = dict(FIRST)
    tuned["a"] = "BF16", (50_000,), noise(33, 100_000)
    hub.put("me/tuned", {"one.safetensors": raw(tuned | SECOND, pad=1)})
    return "hf://me/model", "hf://me/tuned"


def test_a_diff_without_a_download(hub: Hub, tmp_path: Path) -> None:
    base, tuned = pair(hub)
    plain = ckdiff.diff(base, tuned, tmp_path / "plain.zarr", exclude=["skipped"])
    hub.requests.clear()
    streamed = ckdiff.diff(
        base, tuned, tmp_path / "streamed.zarr", exclude=["skipped"], stream=True, disk="256MiB"
    )
    assert streamed.rules == plain.rules
    first, second = plain.store, streamed.store
    assert first is not None
    assert second is not None
    assert second.manifest_digest() == first.manifest_digest()
    assert ranged(hub) < 2 * MIB  # and not the 3 MiB of a side that are left out
    assert all(request.range is not None for request in hub.requests if request.file)


def test_a_run_that_was_stopped_fetches_no_chunk_twice(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = pair(hub)
    from ckdiff.stores.workdir import WorkDir

    def stopped(self: Any, manifest: bytes) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkDir, "commit", stopped)
        with pytest.raises(ckdiff.Interrupted):
            ckdiff.diff(base, tuned, tmp_path / "out.zarr", stream=True)
    hub.requests.clear()
    result = ckdiff.diff(base, tuned, tmp_path / "out.zarr", stream=True)
    assert result.store is not None
    assert result.bytes_resumed == result.bytes_read
    assert ranged(hub) < 1 << 18  # headers


def test_what_cannot_be_streamed(hub: Hub, tmp_path: Path) -> None:
    base, tuned = pair(hub)
    (tmp_path / "local.safetensors").write_bytes(raw(FIRST))
    local = str(tmp_path / "local.safetensors")
    with pytest.raises(ckdiff.UsageError, match="neither checkpoint is on the hub"):
        ckdiff.diff(local, local, stream=True)
    with pytest.raises(ckdiff.BudgetError, match="of disk is too little"):
        ckdiff.diff(base, tuned, stream=True, disk="100KiB")
    mixed = ckdiff.diff(local, base, stream=True)
    assert mixed.rules["exact"]["changed"] == 0
    assert mixed.unpaired["added"] == ["d"]


def test_what_is_all_in_the_cache_is_read_there(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.put("me/other", {"x-1.safetensors": raw(FIRST), "x-2.safetensors": raw(SECOND, 4)})
    whole = ckdiff.diff("hf://me/model", "hf://me/other", tmp_path / "one.zarr", verify=True)
    hub.requests.clear()
    again = ckdiff.diff("hf://me/model", "hf://me/other", stream=True, verify=True)
    assert again.table == whole.table
    assert hub.fetched() == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ckdiff.diff("hf://me/model", "hf://me/other", stream=True).rules == whole.rules
