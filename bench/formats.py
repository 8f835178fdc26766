"""The same weights in other formats, beside safetensors: warm diffs in turn, in one run.

    python bench/formats.py [--gib 2] [--density 0.1] [--rounds 5] [--dir DIR] [--quick]

A ratio is the throughput of a pair in that format by that of the pair in safetensors, by `seconds`
of the JSON. Both sides are in the format, or the base has the experts one by one, and the tuned
side all of them in one tensor. Whatever is written is checked: every count is the same.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import ckdiff, make_pair, median, table, take_turns, watch

RANKS = 4
WIDE = 1024  # rows of an expert
ROLES = ("gate_proj", "up_proj")
PLAIN = "safetensors"  # which the others are compared with
Maker = Callable[[dict[str, Any], Path], None]


def torch_zip(tensors: dict[str, Any], folder: Path) -> None:
    """One file of torch."""
    import torch

    torch.save(tensors, folder / "pytorch_model.bin")


def _rows(tensor: Any, rank: int, dim: int) -> tuple[int, Any]:
    """What torch.chunk gives a rank: the first index, and the part."""
    step = -(-tensor.shape[dim] // RANKS)
    low = min(rank * step, tensor.shape[dim])
    return low, tensor.narrow(dim, low, min(step, tensor.shape[dim] - low))


def dcp(tensors: dict[str, Any], folder: Path, dim: int = 0) -> None:
    """torch.distributed.checkpoint, of as many processes as RANKS says."""
    import torch
    from torch.distributed.checkpoint import metadata as words
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    listed: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for rank in range(RANKS):
        path = folder / f"__{rank}_0.distcp"
        with open(path, "wb") as file:
            for name, tensor in tensors.items():
                low, part = _rows(tensor, rank, dim)
                at = torch.Size([low if i == dim else 0 for i in range(tensor.ndim)])
                begin = file.tell()
                torch.save(part.clone(), file)
                index = words.MetadataIndex(name, at, rank)
                stored[index] = _StorageInfo(path.name, begin, file.tell() - begin)
                kind = words.TensorProperties(dtype=tensor.dtype)
                entry = listed.setdefault(name, words.TensorStorageMetadata(kind, tensor.shape, []))
                entry.chunks.append(words.ChunkStorageMetadata(at, part.shape))
    (folder / ".metadata").write_bytes(pickle.dumps(words.Metadata(listed, {}, stored)))


def dcp_columns(tensors: dict[str, Any], folder: Path) -> None:
    """The same, cut along the second dimension, as tensor parallelism does: it is gathered."""
    dcp(tensors, folder, dim=1)


def rank_files(tensors: dict[str, Any], folder: Path) -> None:
    """A file of DTensors for each rank."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(RANKS):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
        mesh = init_device_mesh("cpu", (RANKS,))
        state = {
            name: distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
            for name, tensor in tensors.items()
        }
        torch.save(state, folder / f"model_world_size_{RANKS}_rank_{rank}.pt")
        dist.destroy_process_group()


def pieces(tensors: dict[str, Any], folder: Path) -> None:
    """Safetensors files of pieces, one for each rank."""
    from safetensors.torch import save_file

    for rank in range(RANKS):
        parts, said = {}, {}
        for name, tensor in tensors.items():
            low, part = _rows(tensor, rank, 0)
            parts[name] = part.contiguous()
            said[name] = {"saved_offsets": [low] + [0] * (tensor.ndim - 1)}
        path = folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_file(parts, path, {"DCP_SHARDING_INFO": json.dumps(said)})


def _experts(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each tensor as a stack of experts: (experts, gate and up, rows, columns)."""
    for name, tensor in tensors.items():
        yield name.replace("up_proj.weight", "experts"), tensor.view(-1, 2, WIDE, tensor.shape[1])


def _saved(found: dict[str, Any], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {name: part.contiguous() for name, part in found.items()}, folder / "model.safetensors"
    )


def apart(tensors: dict[str, Any], folder: Path) -> None:
    """The experts one by one."""
    _saved(
        {
            f"{name}.{n}.{role}.weight": both[at]
            for name, experts in _experts(tensors)
            for n, both in enumerate(experts)
            for at, role in enumerate(ROLES)
        },
        folder,
    )


def with_biases(tensors: dict[str, Any], folder: Path) -> None:
    """The same with biases, all zeros, which say that gate and up alternate where they are one."""
    import torch

    found = {
        f"{name}.{n}.{role}.{kind}": both[at] if kind == "weight" else torch.zeros(WIDE)
        for name, experts in _experts(tensors)
        for n, both in enumerate(experts)
        for at, role in enumerate(ROLES)
        for kind in ("weight", "bias")
    }
    _saved(found, folder)


def fused(tensors: dict[str, Any], folder: Path) -> None:
    """Gate and up of all experts in one tensor, as rows: the parts need no copy."""
    _saved({f"{name}.gate_up_proj": x.flatten(1, 2) for name, x in _experts(tensors)}, folder)


def transposed(tensors: dict[str, Any], folder: Path) -> None:
    """The same as columns."""
    stacks = {f"{name}.gate_up_proj": x.flatten(1, 2) for name, x in _experts(tensors)}
    _saved({name: x.transpose(1, 2) for name, x in stacks.items()}, folder)


def interleaved(tensors: dict[str, Any], folder: Path) -> None:
    """The same as columns that alternate."""
    import torch

    found = {}
    for name, experts in _experts(tensors):
        found[f"{name}.gate_up_proj"] = experts.permute(0, 3, 2, 1).flatten(2)
        found[f"{name}.gate_up_proj_bias"] = torch.zeros(len(experts), 2 * WIDE)
    _saved(found, folder)


#: what the same weights can be written as, both sides or each; one more is one more line
MAKERS: dict[str, tuple[Maker, Maker]] = {
    PLAIN: (_saved, _saved),
    "torch zip": (torch_zip, torch_zip),
    "dcp, 4 ranks by rows": (dcp, dcp),
    "dcp, 4 ranks by columns": (dcp_columns, dcp_columns),
    "rank shards": (rank_files, rank_files),
    "safetensors pieces": (pieces, pieces),
    "unfused": (apart, fused),
    "transposed": (apart, transposed),
    "interleaved": (with_biases, interleaved),
}


def write_all(root: Path, names: list[str]) -> None:
    """root/NAME/base and root/NAME/tuned for each format: what is in root/base and root/tuned.

    Tensor by tensor it is rolled, so that no two are the same: those would be looked at for ties.
    """
    from safetensors.torch import load_file

    for at, side in enumerate(("base", "tuned")):
        tensors: dict[str, Any] = {}
        for file in sorted((root / side).glob("*.safetensors")):
            tensors |= load_file(file)
        for i, (name, tensor) in enumerate(tensors.items(), 1):
            tensors[name] = tensor.roll(i * 977)
        for name in names:
            folder = root / name / side
            folder.mkdir(parents=True)
            MAKERS[name][at](tensors, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=2, help="size of each side")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the pairs go (default: a temporary directory)")
    parser.add_argument("--only", nargs="*", choices=MAKERS, help="some of the formats")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    gib, rounds = (0.02, 1) if a.quick else (a.gib, a.rounds)
    names = [PLAIN, *(name for name in a.only or MAKERS if name != PLAIN)]
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        changed = make_pair(root, gib, a.density)
        write_all(root, names)
        memory: dict[str, int] = {}

        def contestant(name: str, where: Path) -> Callable[[], float]:
            def run() -> float:
                done = watch(ckdiff("diff", where / "base", where / "tuned", "--json"))
                said = json.loads(done.stdout)
                if said["rules"]["exact"]["changed"] != changed:
                    raise SystemExit(f"{name}: {said['rules']['exact']['changed']} of {changed:,}")
                memory[name] = max(memory.get(name, 0), done.rss_anon)
                return float(said["seconds"])

            return run

        contestants = {name: contestant(name, root / name) for name in names}
        seconds = take_turns(contestants, rounds)
    best = median(seconds[PLAIN])
    rows = [
        (name, median(taken), 2 * gib / median(taken), best / median(taken), memory[name])
        for name, taken in seconds.items()
    ]
    columns = ["format", "seconds", "GiB/s of both sides", "by safetensors", "RssAnon MiB"]
    table(f"{gib:g} GiB a side, warm, {rounds} rounds, medians", columns, rows)


if __name__ == "__main__":
    main()
