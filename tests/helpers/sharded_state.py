"""Sharded training state as torch writes it, made by one process, and by two that talk.

What one process can make: files of ranks of any mesh (a process group that talks to nobody, of one
rank after the other), and a directory of ``torch.distributed.checkpoint`` out of any pieces.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Box = tuple[tuple[int, ...], tuple[int, ...]]  #: index of the first element, sizes


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """This process as one of ``world``."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()


def distributed(tensor: Any, sizes: tuple[int, ...], placements: Sequence[Any]) -> Any:
    """A DTensor of the rank that this process is."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", sizes)
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


def write_ranks(folder: Path, world: int, state: Callable[[int], Any]) -> None:
    """What ``state`` gives as each rank, in a file for each."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(world):
        with as_rank(rank, world):
            torch.save(state(rank), folder / f"model_world_size_{world}_rank_{rank}.pt")


def saved(tensor: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def rows(shape: tuple[int, ...], parts: int, dim: int = 0) -> list[Box]:
    """A shape cut as ``torch.chunk`` cuts it; parts without elements are there."""
    step = -(-shape[dim] // parts)
    found = []
    for i in range(parts):
        low = min(i * step, shape[dim])
        high = min(low + step, shape[dim])
        at, extent = [0] * len(shape), list(shape)
        at[dim], extent[dim] = low, high - low
        found.append((tuple(at), tuple(extent)))
    return found


def write_dcp(
    folder: Path,
    tensors: Mapping[str, Any],
    boxes: Mapping[str, Sequence[Box]],
    *,
    files: int = 2,
    paths: Mapping[str, tuple[Any, ...]] | None = None,
    change: Callable[[Any], None] = lambda metadata: None,
) -> None:
    """A directory of ``torch.distributed.checkpoint``: its pieces go to the files in turn.

    ``change`` may do to the metadata what it likes before they are pickled.
    """
    from torch.distributed.checkpoint import metadata as words
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    folder.mkdir(parents=True, exist_ok=True)
    data = [bytearray() for _ in range(files)]
    listed, stored = {}, {}
    turn = 0
    for name, tensor in tensors.items():
        chunks = []
        for number, (at, extent) in enumerate(
            boxes.get(name, [((0,) * tensor.ndim, tensor.shape)])
        ):
            part = tensor[tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))]
            chunks.append(words.ChunkStorageMetadata(_size(at), _size(extent)))
            into = data[turn % files]
            raw = saved(part.clone())
            info = _StorageInfo(f"__{turn % files}_0.distcp", len(into), len(raw))
            stored[words.MetadataIndex(name, _size(at), number)] = info
            into += raw
            turn += 1
        kind = words.TensorProperties(dtype=tensor.dtype)
        listed[name] = words.TensorStorageMetadata(kind, tensor.shape, chunks)
    metadata = words.Metadata(listed, dict(paths or {}), stored)
    change(metadata)
    for i, raw_file in enumerate(data):
        (folder / f"__{i}_0.distcp").write_bytes(raw_file)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _size(numbers: Sequence[int]) -> Any:
    import torch

    return torch.Size(numbers)


def two_processes(folder: Path) -> None:
    """Train with FSDP2 on two processes and save it in every way; see sharded_worker."""
    import subprocess
    import sys

    worker = Path(__file__).with_name("sharded_worker.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(worker), str(folder)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
