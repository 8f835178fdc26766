"""Files of ranks: whatever a mesh does to a tensor, the tensor comes back, bytes for bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from given_files import all_bytes, checked, contents_of, of_torch, opened, watched
from hypothesis import given
from hypothesis import strategies as st
from sharded_state import distributed, write_ranks

import ckdiff
from ckdiff.checkpoints.formats import ranks, shards
from ckdiff.checkpoints.formats.pickledvalues import Record, Word
from ckdiff.diffs.plan import plan
from ckdiff.errors import CheckpointError
from ckdiff.options import Observer, Options

torch = pytest.importorskip("torch")

FULL = torch.arange(35, dtype=torch.float32).reshape(7, 5)


def placed(*words: Any) -> list[Any]:
    """Placements: a number is a shard, None a replica, (dim, split) a strided shard."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    kinds = {int: Shard, tuple: lambda pair: _StridedShard(pair[0], split_factor=pair[1])}
    return [Replicate() if word is None else kinds[type(word)](word) for word in words]


MESHES: list[tuple[tuple[int, ...], tuple[Any, ...]]] = [
    ((4,), (0,)),
    ((4,), (1,)),
    ((4,), (None,)),
    ((2, 2), (None, 0)),
    ((2, 2), (0, None)),
    ((2, 2), (0, 1)),
    ((2, 2), (1, 0)),
    ((2, 2), (0, 0)),
    ((2, 2), (1, 1)),
    ((2, 2), ((0, 2), 0)),
    ((2, 2), ((1, 2), 1)),
    ((2, 2, 1), (0, None, 1)),
    ((1, 4), (0, (0, 3))),
]


@pytest.mark.parametrize("case", MESHES, ids=str)
def test_any_mesh(tmp_path: Path, case: tuple[tuple[int, ...], tuple[Any, ...]]) -> None:
    sizes, words = case

    def state(rank: int) -> Any:
        shard = distributed(FULL, sizes, placed(*words))
        few = distributed(FULL[:1, :1].clone(), sizes, placed(*words))  # most have nothing of it
        return {"w": shard, "few": few, "buffer": torch.arange(3), "_extra_state": b"x"}

    write_ranks(tmp_path, 4, state)
    wanted = {"w": FULL, "few": FULL[:1, :1], "buffer": torch.arange(3)}
    with opened(ranks, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == of_torch(wanted)
        assert checkpoint.contents.notes == []


def test_meshes_in_meshes_and_a_model_in_a_mapping(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    def state(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        inner = distribute_tensor(FULL, mesh["tp"], placed(1), src_data_rank=None)
        flat = distribute_tensor(
            FULL, mesh["dp", "tp"]._flatten("all"), placed(0), src_data_rank=None
        )
        return {"model": {"inner": inner, "flat": flat}, "optimizer": {"state": {"m": inner}}}

    write_ranks(tmp_path, 4, state)
    with opened(ranks, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == of_torch({"inner": FULL, "flat": FULL})
        (note,) = checkpoint.contents.notes
        assert "model" in note
    with opened(ranks, tmp_path, "optimizer.state") as checkpoint:
        assert all_bytes(checkpoint) == of_torch({"m": FULL})


@pytest.mark.parametrize("rows", [8, 7, 5, 2, 1])
def test_fsdp_over_tensor_parallel(tmp_path: Path, rows: int) -> None:
    """What ``fully_shard`` makes of parameters that are sharded already."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    whole = torch.arange(rows * 6.0).reshape(rows, 6)

    def state(rank: int) -> Any:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        model = nn.Linear(6, rows, bias=False)
        part = distribute_tensor(whole, mesh["tp"], placed(0), src_data_rank=None)
        model.weight = nn.Parameter(part)
        fully_shard(model, mesh=mesh["dp"])
        found = model.state_dict()
        # torch keeps the mesh of the first rank that this process was
        found["weight"].device_mesh._coordinate_on_dim = (rank // 2, rank % 2)
        return found

    write_ranks(tmp_path, 4, state)
    with opened(ranks, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == of_torch({"weight": whole})


@given(
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    data=st.data(),
)
def test_cuts_are_what_torch_says(
    shape: tuple[int, ...], sizes: tuple[int, ...], data: st.DataObject
) -> None:
    """Against torch's own splitting of a tensor of its indices, placement by placement."""
    words = [
        data.draw(st.one_of(st.none(), st.integers(0, len(shape) - 1),
                            st.tuples(st.integers(0, len(shape) - 1), st.integers(2, 4))))
        for _ in sizes
    ]  # fmt: skip
    here = [data.draw(st.integers(0, n - 1)) for n in sizes]
    local = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    cuts = []
    for i, (word, placement) in enumerate(zip(words, placed(*words), strict=True)):
        if word is None:
            continue
        dim, split = (word, 1) if isinstance(word, int) else word
        cuts.append(shards.Cut(dim, i, sizes[i], here[i], split))
        local = placement._split_tensor(local, sizes[i], with_padding=False)[0][here[i]]
    runs = shards.cut(shape, tuple(cuts))
    assert tuple(sum(n for _, n in along) for along in runs) == tuple(local.shape)
    whole = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    for at, inner, extent in shards.parts_of(runs):
        wanted = whole[tuple(slice(a, a + n) for a, n in zip(at, extent, strict=True))]
        found = local[tuple(slice(a, a + n) for a, n in zip(inner, extent, strict=True))]
        assert torch.equal(wanted, found)


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        ({"_layout": ("axes", (("shape", (2,)), ("shape", (2, 3))))}, (2, 6)),
        ({"_layout": ("shape", (2, (2, 3)))}, (2, 6)),
        ({"_layout": ("shape", 4)}, (4,)),
        ({"_layout": ("shape", (0,))}, None),
        ({"_layout": ("shape", (1 << 40,))}, None),
        ({}, None),
    ],
)
def test_meshes_of_other_versions(mesh: dict[str, Any], wanted: Any) -> None:
    def record(pair: tuple[str, Any]) -> Record:
        name, value = pair
        if name == "axes":
            value = tuple(map(record, value))
        return Record(Word("torch", "x"), state={name: value})

    state = {name: record(pair) for name, pair in mesh.items()}
    assert shards.mesh_shape(Record(Word("torch", "DeviceMesh"), state=state)) == wanted


def test_a_pipeline_where_ranks_have_other_layers(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2, lambda rank: {f"layers.{rank}.w": FULL + rank})
    with opened(ranks, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == of_torch({"layers.0.w": FULL, "layers.1.w": FULL + 1})


@pytest.mark.parametrize("turned", [(0,), (0, 1)])
def test_copies_in_any_order_of_their_elements(tmp_path: Path, turned: tuple[int, ...]) -> None:
    write_ranks(tmp_path, 2, lambda rank: {"w": FULL.t().clone().t() if rank in turned else FULL})
    with opened(ranks, tmp_path) as checkpoint:
        assert all_bytes(checkpoint) == of_torch({"w": FULL})


def test_a_diff_counts_what_changed(tmp_path: Path) -> None:
    tuned = FULL.clone()
    tuned[3:5, 1] += 1
    cut = {"a": (FULL, (2, 2), (0, 1)), "b": (tuned, (4,), (0,))}
    for name, (whole, sizes, words) in cut.items():
        write_ranks(
            tmp_path / name,
            4,
            lambda _, w=whole, s=sizes, p=words: {"w": distributed(w, s, placed(*p))},
        )
    with opened(ranks, tmp_path / "a") as one, opened(ranks, tmp_path / "b") as other:
        assert ckdiff.diff(one, other).rules["exact"]["changed"] == 2


# what does not fit together


def _torn(rank: int) -> Any:
    whole = FULL.clone()
    whole[6, 4] += rank == 1
    return {"w": whole}


def _torn_shard(rank: int) -> Any:
    whole = FULL.clone()
    whole[6, 4] += rank == 3
    return {"w": distributed(whole, (2, 2), placed(None, 0))}


def _turned(rank: int) -> Any:
    whole = FULL.clone()
    whole[0, 1] += rank == 2
    return {"w": whole.t().clone().t() if rank % 2 else whole}


def _partial(rank: int) -> Any:
    from torch.distributed.tensor import DTensor, Partial

    mesh = distributed(FULL, (4,), placed(None)).device_mesh
    return {"w": DTensor.from_local(FULL, mesh, [Partial()])}


def _one_dtype(rank: int) -> Any:
    return {"w": FULL.bfloat16() if rank == 1 else FULL}


def _one_shape(rank: int) -> Any:
    return {"w": FULL[:3].clone() if rank == 1 else FULL}


def _other_key(rank: int) -> Any:
    return {"model" if rank else "module": {"w": FULL}}


def _other_size(rank: int) -> Any:
    found = distributed(FULL, (4,), placed(0))
    if rank == 1:
        found._local_tensor = torch.zeros(1, 5)
    return {"w": found}


def _not_here(rank: int) -> Any:
    found = distributed(FULL, (4,), placed(0))
    found.device_mesh._coordinate_on_dim = (rank // 2,)
    return {"w": found}


def _nowhere(rank: int) -> Any:
    found = distributed(FULL, (4,), placed(0))
    found.device_mesh._coordinate_on_dim = None
    return {"w": found}


def _outside(rank: int) -> Any:
    found = distributed(FULL, (4,), placed(0))
    found.device_mesh._coordinate_on_dim = (rank + 9,)
    return {"w": found}


@pytest.mark.parametrize(
    ("state", "match"),
    [
        (_torn, r"'?w'? is not the same in .*rank_0.pt and .*rank_1.pt"),
        (_torn_shard, r"not the same in .*rank_1.pt and .*rank_3.pt"),
        (_turned, r"not the same in .*rank_0.pt and .*rank_2.pt"),
        (_partial, "Partial"),
        (_one_dtype, "BF16.*F32"),
        (_one_shape, "3, 5.*7, 5"),
        (_other_key, "--key"),
        (_other_size, "not its shard"),
        (_not_here, "not its shard|missing"),
        (_nowhere, "where in its mesh"),
        (_outside, "outside"),
        (lambda rank: {} if rank == 3 else {"w": distributed(FULL, (4,), placed(0))}, "no tensors"),
        (lambda rank: {"v" if rank == 3 else "w": distributed(FULL, (4,), placed(0))}, "missing"),
        (lambda rank: {"step": 3}, "no tensors"),
    ],
)
def test_what_does_not_fit_together(
    tmp_path: Path, state: Callable[[int], Any], match: str
) -> None:
    write_ranks(tmp_path, 4, state)
    with pytest.raises(CheckpointError, match=match) as caught:
        contents_of(ranks, tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_copies_are_held_against_each_other_once_and_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    check = ranks._Copies.check

    def counted(self: Any) -> None:
        found.append("checked")
        check(self)

    monkeypatch.setattr(ranks._Copies, "check", counted)
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_ranks(good, 4, lambda rank: {"w": FULL.clone()})
    write_ranks(bad, 4, _torn)
    for folder in (good, bad):
        ckdiff.info(folder)
        with plan(folder, good, None, Options(dry_run=True), Observer()):
            pass
    assert not found
    ckdiff.diff(good, good)
    assert found == ["checked"] * 2
    other = tmp_path / "other"
    write_ranks(other, 4, lambda rank: {"w": FULL + 1})
    for run in (
        lambda: ckdiff.diff(bad, other),
        lambda: ckdiff.diff(other, bad),
        lambda: ckdiff.convert(bad, tmp_path / "c"),
        lambda: ckdiff.delta(good, bad, tmp_path / "d"),
        lambda: ckdiff.open_checkpoint(bad).reader(),
        lambda: ckdiff.open_checkpoint(bad).fetch(),
    ):
        with pytest.raises(CheckpointError, match="not the same in"):
            run()
    assert not (tmp_path / "c").exists()


def test_a_missing_file_of_a_rank(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2, lambda rank: {"w": FULL})
    (tmp_path / "model_world_size_2_rank_1.pt").write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match="rank_1"):
        contents_of(ranks, tmp_path)


def test_mutations_are_refused_or_read(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2, lambda rank: {"w": distributed(FULL, (2,), placed(0)), "b": FULL})
    noise = random.Random(5)
    path = tmp_path / "model_world_size_2_rank_1.pt"
    raw = path.read_bytes()
    for _ in range(200):
        bad = bytearray(raw)
        for _ in range(noise.randint(1, 3)):
            bad[noise.randrange(len(bad))] = noise.randrange(256)
        path.write_bytes(bad)
        try:
            with watched(tmp_path) as given:
                found = checked(ranks.read_contents(given.files))
        except CheckpointError:
            continue
        assert given.longest <= 1 << 20
        assert len(found.table) <= 2


def test_a_mutated_pickle_is_refused_or_read(tmp_path: Path) -> None:
    """With checksums that fit, so that what is in the pickle counts."""
    import io
    import zipfile

    write_ranks(tmp_path, 2, lambda rank: {"w": distributed(FULL, (2,), placed((0, 2)))})
    noise = random.Random(6)
    path = tmp_path / "model_world_size_2_rank_1.pt"
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old:
        members = {name: old.read(name) for name in old.namelist()}
    for _ in range(200):
        with zipfile.ZipFile(path, "w") as new:
            for name, data in members.items():
                bad = bytearray(data)
                if name.endswith("data.pkl"):
                    for _ in range(noise.randint(1, 3)):
                        bad[noise.randrange(len(bad))] = noise.randrange(256)
                new.writestr(name, bytes(bad))
        try:
            found = contents_of(ranks, tmp_path)
        except CheckpointError:
            continue
        assert len(found.table) == 1
