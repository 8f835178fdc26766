"""The same weights in other formats, beside safetensors: warm diffs in turn, in one run.

    python bench/formats.py [--gib 2] [--density 0.1] [--rounds 5] [--dir DIR] [--quick]

A rate is bytes of both sides, as they are stored, by `seconds` of the JSON; a ratio is the rate of
a pair in that format by that of the pair that it is said to be beside. Both sides are in the
format, or the base has the experts one by one, and the tuned side all of them in one tensor, or the
tuned side has another dtype. Quantised weights have the low bits of the others' elements. All files
are written in the same large blocks, so that they lie in the same kind of pages of the system's
cache. Whatever is written is checked: every count is what it has to be.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import ckdiff, make_pair, median, table, take_turns, watch

RANKS = 4
WIDE = 1024  # rows of an expert
_BLOCK = 1 << 27
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


def as_float32(tensors: dict[str, Any], folder: Path) -> None:
    """The same numbers, twice as wide."""
    _saved({name: tensor.float() for name, tensor in tensors.items()}, folder)


def _low_bits(tensor: Any, bits: int) -> Any:
    import torch

    return (tensor.view(torch.int16) & ((1 << bits) - 1)).to(torch.uint8)


def blocks_of_fp8(tensors: dict[str, Any], folder: Path) -> None:
    """8-bit floats, a scale for each 128 x 128 of them."""
    import torch

    found = {}
    for name, tensor in tensors.items():
        down, across = (-(-size // 128) for size in tensor.shape)
        found[name] = _low_bits(tensor, 8).view(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = torch.linspace(0.5, 2, down * across).view(down, across)
    _saved(found, folder)


def _groups(tensor: Any) -> tuple[Any, Any]:
    """FP4 in groups of 32, two to a byte, and the powers of two of each group."""
    import torch

    pairs = _low_bits(tensor, 4).unflatten(-1, (-1, 16, 2))
    powers = torch.arange(pairs[..., 0, 0].numel()).remainder(20).add(110).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4, powers.reshape(pairs.shape[:-2])


def groups_of_fp4(tensors: dict[str, Any], folder: Path) -> None:
    """MX: rows of groups."""
    found = {}
    for name, tensor in tensors.items():
        found[f"{name}_blocks"], found[f"{name}_scales"] = _groups(tensor)
    _saved(found, folder)


def turned_groups(tensors: dict[str, Any], folder: Path) -> None:
    """MX as gpt-oss has it: the values are those of experts, turned."""
    groups_of_fp4(
        {f"{name}.gate_up_proj": experts.flatten(1, 2) for name, experts in _experts(tensors)},
        folder,
    )


@dataclass(frozen=True)
class Format:
    """What weights can be written as, both sides or each, and how they are compared then."""

    base: Maker
    tuned: Maker
    beside: str = PLAIN  #: whose rate it is measured by
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Held:
    """A pair of safetensors directories that is loaded, and compared in memory."""

    beside: str = PLAIN


FLOATS, TINY = "float32", "tiny tensors"
BY_VALUE = ("--dequantize",)
#: one more is one more line
FORMATS: dict[str, Format | Held] = {
    PLAIN: Format(_saved, _saved),
    "torch zip": Format(torch_zip, torch_zip),
    "dcp, 4 ranks by rows": Format(dcp, dcp),
    "dcp, 4 ranks by columns": Format(dcp_columns, dcp_columns),
    "rank shards": Format(rank_files, rank_files),
    "safetensors pieces": Format(pieces, pieces),
    "unfused": Format(apart, fused),
    "transposed": Format(apart, transposed),
    "interleaved": Format(with_biases, interleaved),
    "in memory": Held(),
    FLOATS: Format(as_float32, as_float32),
    "bfloat16 against float32": Format(_saved, as_float32),
    "fp8 in blocks, by value": Format(blocks_of_fp8, blocks_of_fp8, options=BY_VALUE),
    "MX, by value": Format(groups_of_fp4, groups_of_fp4, options=BY_VALUE),
    "MX turned, by value": Format(turned_groups, turned_groups, options=BY_VALUE),
    TINY: Format(_saved, _saved, beside=TINY),
    f"{TINY} in memory": Held(TINY),
}

#: a diff in memory: loads a pair and prints what the command would
IN_MEMORY = f"""
import json, sys
sys.path.append({str(Path(__file__).parent)!r})
from formats import in_memory
print(json.dumps(in_memory(sys.argv[1:])))
"""


def in_memory(folders: Sequence[str | Path]) -> dict[str, Any]:
    """A diff of what two directories hold, after loading it."""
    from safetensors.torch import load_file

    import ckdiff as api

    sides: list[dict[str, Any]] = []
    for folder in folders:
        sides.append({})
        for file in sorted(Path(folder).glob("*.safetensors")):
            sides[-1] |= load_file(file)
    return api.diff(*sides).to_dict()


def write_all(root: Path, names: list[str]) -> None:
    """root/NAME/base and root/NAME/tuned for each format: what is in root/base and root/tuned.

    Tensor by tensor it is rolled, so that no two are the same: those would be looked at for ties.
    """
    from safetensors.torch import load_file

    for side in ("base", "tuned"):
        tensors: dict[str, Any] = {}
        for file in sorted((root / side).glob("*.safetensors")):
            tensors |= load_file(file)
        for i, (name, tensor) in enumerate(tensors.items(), 1):
            tensors[name] = tensor.roll(i * 977)
        for name in names:
            how = FORMATS[name]
            if isinstance(how, Format) and name != TINY:
                folder = root / name / side
                folder.mkdir(parents=True)
                (how.base if side == "base" else how.tuned)(tensors, folder)


def written_alike(root: Path) -> None:
    """Write every file anew in large blocks.

    What a library writes in small pieces lies in small pages of the system's cache, and is slower
    to map than the same bytes in large ones: that would be a comparison of writers.
    """
    for file in sorted(path for path in root.rglob("*") if path.is_file()):
        anew = file.with_name(f"{file.name}.anew")
        with open(file, "rb", buffering=0) as source, open(anew, "wb", buffering=0) as out:
            while block := source.read(_BLOCK):
                left = memoryview(block)
                while left:
                    left = left[out.write(left) :]
        anew.replace(file)


def narrowed(root: Path) -> None:
    """The tensor of a small pair, of as many rows as two experts have."""
    from safetensors.torch import load_file, save_file

    for side in ("base", "tuned"):
        (file,) = (root / side).glob("*.safetensors")
        save_file({name: x.reshape(4 * WIDE, -1) for name, x in load_file(file).items()}, file)


def write_tiny(root: Path, count: int) -> int:
    """Tensors of 64 numbers each; gives how many elements are changed."""
    import torch

    tensors = {f"layers.{i}.weight": torch.full((64,), float(i)) for i in range(count)}
    for side in ("base", "tuned"):
        folder = root / TINY / side
        folder.mkdir(parents=True)
        _saved(tensors, folder)
        for tensor in [*tensors.values()][::7]:
            tensor[1:3] = -1
    return 2 * len(range(0, count, 7))


def here(how: Format | Held, sides: list[Path]) -> dict[str, Any]:
    """What a contestant's own process would say."""
    import ckdiff as api

    if isinstance(how, Held):
        return in_memory(sides)
    return api.diff(*sides, dequantize=how.options == BY_VALUE).to_dict()


def contestant(
    root: Path, name: str, changed: int, memory: dict[str, int], *, quick: bool
) -> tuple[Callable[[], float], int]:
    """What compares a pair once and gives its seconds, and the bytes of both sides.

    ``quick``: in this process, but for the first format of all.
    """
    how = FORMATS[name]
    where = root / (name if isinstance(how, Format) else how.beside)
    sides = [where / "base", where / "tuned"]
    command = [sys.executable, "-c", IN_MEMORY, *map(str, sides)]
    if isinstance(how, Format):
        command = ckdiff("diff", *sides, "--json", *how.options)

    def run() -> float:
        if quick and name != PLAIN:
            said = here(how, sides)
        else:
            done = watch(command)
            memory[name] = max(memory.get(name, 0), done.rss_anon)
            said = json.loads(done.stdout)
        found = said["rules"]["exact"]["changed"]
        if found != changed:
            raise SystemExit(f"{name}: {found:,} of {changed:,}")
        return float(said["seconds"])

    return run, sum(file.stat().st_size for side in sides for file in side.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--gib", type=float, default=2, help="size of each side")
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", help="where the pairs go (default: a temporary directory)")
    parser.add_argument("--only", nargs="*", choices=FORMATS, help="some of the formats")
    parser.add_argument("--quick", action="store_true", help="small and once: a smoke test")
    a = parser.parse_args()
    gib, rounds, tiny = (1 / 512, 1, 600) if a.quick else (a.gib, a.rounds, 60_000)
    wanted = {*(a.only or FORMATS)}
    wanted |= {FORMATS[name].beside for name in wanted}
    names = [name for name in FORMATS if name in wanted or name == PLAIN]
    with tempfile.TemporaryDirectory(dir=a.dir) as folder:
        root = Path(folder)
        changed = make_pair(root, gib, a.density)
        if a.quick:
            narrowed(root)
        write_all(root, names)
        few = write_tiny(root, tiny) if TINY in names else 0
        written_alike(root)
        memory: dict[str, int] = {}
        runs, sizes = {}, {}
        for name in names:
            count = few if name.startswith(TINY) else changed
            runs[name], sizes[name] = contestant(root, name, count, memory, quick=a.quick)
        seconds = take_turns(runs, rounds)
    taken = {name: median(times) for name, times in seconds.items()}
    rates = {name: sizes[name] / 2**30 / taken[name] for name in names}
    rows = [
        (
            name, taken[name], rates[name], rates[name] / rates[FORMATS[name].beside],
            FORMATS[name].beside, memory.get(name, ""),
        )
        for name in names
    ]  # fmt: skip
    columns = ["format", "seconds", "GiB/s of both sides", "ratio", "beside", "RssAnon MiB"]
    table(f"{gib:g} GiB a side, warm, {rounds} rounds, medians", columns, rows)


if __name__ == "__main__":
    main()
