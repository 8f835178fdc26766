"""Modules, state dicts and mappings of arrays are checkpoints: read where they are, bit for bit."""

from __future__ import annotations

import ctypes
import itertools
import re
from collections import OrderedDict
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckdiff
from ckdiff.checkpoints.places import heldtorch
from ckdiff.checkpoints.places.memory import MemoryCheckpoint, open_memory
from ckdiff.diffs import run
from ckdiff.dtypes import DTYPES
from ckdiff.errors import CheckpointError, SourceChanged, UsageError


def opened(given: Any, key: str | None = None) -> MemoryCheckpoint:
    found = open_memory(given, key)
    assert found is not None
    return found


def bytes_of(checkpoint: MemoryCheckpoint, name: str, start: int = 0, size: int = -1) -> bytes:
    at = checkpoint.table.names.index(name)
    size = int(checkpoint.table.nbytes[at]) - start if size < 0 else size
    with closing(checkpoint.reader()) as reader:
        columns = np.array([[at], [start], [size]], np.int64)
        return ctypes.string_at(int(reader.acquire(*columns)[0]), size) if size else b""


def kinds(checkpoint: MemoryCheckpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
    table = checkpoint.table
    return {n: (d, s) for n, d, s in zip(table.names, table.dtypes, table.shapes, strict=True)}


# bits


def in_torch() -> dict[str, Any]:
    names = [
        "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float16",
        "bfloat16", "float32", "float64", "complex64", "float8_e4m3fn", "float8_e5m2",
        "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz",
    ]  # fmt: skip
    noise = torch.from_numpy(np.random.default_rng(1).integers(0, 256, 240, np.uint8))
    found = {name: noise.view(getattr(torch, name)).reshape(2, -1) for name in names[1:]}
    return {"bool": noise.reshape(2, -1) > 99, **found}


@pytest.mark.parametrize("arranged", ["packed", "transposed", "on a device"])
def test_all_dtypes_of_torch(arranged: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = in_torch()
    stored = dict(state)
    if hasattr(torch, "float4_e2m1fn_x2"):
        state["f4"] = state["uint8"].contiguous().view(torch.float4_e2m1fn_x2)
    raw = safetensors.torch.save(
        {name: one.clone() for name, one in state.items()}
    )  # says what the names and the bytes are
    wanted = {name: one["data"] for name, one in safetensors.deserialize(raw)}
    dtypes = {
        name: (one["dtype"], tuple(one["shape"])) for name, one in safetensors.deserialize(raw)
    }
    if arranged == "transposed":
        state |= {name: one.t().contiguous().t() for name, one in stored.items()}
    elif arranged == "on a device":
        monkeypatch.setattr(heldtorch, "is_here", lambda tensor: False)
    with opened(state) as checkpoint:
        assert kinds(checkpoint) == dtypes
        assert {name: bytes_of(checkpoint, name) for name in state} == wanted
        assert checkpoint.notes == ()
        assert set(checkpoint.table.dtypes) >= set(DTYPES) - {"F6_E2M3", "F6_E3M2", "F4"}


def test_all_dtypes_of_numpy() -> None:
    names = {
        "bool": "BOOL", "uint8": "U8", "int16": "I16", ">i4": "I32", "<u8": "U64", ">f2": "F16",
        ">f8": "F64", "float32": "F32", ">c8": "C64", ml_dtypes.bfloat16: "BF16",
        ml_dtypes.float8_e4m3fn: "F8_E4M3", ml_dtypes.float8_e8m0fnu: "F8_E8M0",
    }  # fmt: skip
    noise = np.random.default_rng(2).integers(0, 2, 96, np.uint8)
    for kind, name in names.items():
        little = noise.view(np.dtype(kind).newbyteorder("<")).reshape(4, -1)
        array = little.byteswap().view(kind) if np.dtype(kind).byteorder == ">" else little
        for order in "CF":
            with opened({"w": np.asarray(array, order=order)}) as checkpoint:
                assert kinds(checkpoint) == {"w": (name, little.shape)}
                assert bytes_of(checkpoint, "w") == little.tobytes()
                assert bytes_of(checkpoint, "w", 3, 7) == little.tobytes()[3:10]


def test_bits_are_moved_and_not_values() -> None:
    signalling = np.array([0x7FA00001, 0xFF800001, 0x80000000, 1], ">u4")
    for kind in (">f4", ">c8"):
        with opened({"w": signalling.view(kind)[::1]}) as checkpoint:
            assert bytes_of(checkpoint, "w") == signalling.astype("<u4").tobytes()


@st.composite
def views(draw: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A flat array, and some view of it: sliced, reversed, transposed, expanded, of either byte
    order.
    """
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    kind = np.dtype(draw(st.sampled_from(["u1", "<u2", ">u2", "<f4", ">f4", "<f8", ">c8"])))
    steps = [draw(st.sampled_from([1, 2, -1, -2, 0])) for _ in shape]
    stored = tuple(1 if step == 0 else n * abs(step) for n, step in zip(shape, steps, strict=True))
    noise = np.random.default_rng(draw(st.integers(0, 99)))
    count = int(np.prod(stored, dtype=int)) * kind.itemsize
    flat = noise.integers(0, 256, count, np.uint8).view(kind)
    cuts = [slice(None, None, step or 1) for step in steps]
    array = flat.reshape(stored)[(*cuts, ...)]  # not a scalar, ever
    view = np.broadcast_to(array, shape)
    return flat, np.transpose(view, draw(st.permutations(range(len(shape)))))


@given(both=views(), data=st.data())
def test_any_span_of_any_view(both: Any, data: Any) -> None:
    flat, view = both
    kind = view.dtype
    word = kind if kind.kind == "c" else np.dtype(f"{kind.byteorder}u{kind.itemsize}")
    swapped = view.view(word).astype(word.newbyteorder("<"))
    wanted = np.ascontiguousarray(swapped).tobytes()
    start = data.draw(st.integers(0, len(wanted)))
    size = data.draw(st.integers(0, len(wanted) - start))
    with opened({"w": view}) as checkpoint:
        assert bytes_of(checkpoint, "w", start, size) == wanted[start : start + size]
    if not kind.isnative or any(step < 0 for step in view.strides):
        return  # torch has none of these
    strides = [step // kind.itemsize for step in view.strides]
    begin = (view.ctypes.data - flat.ctypes.data) // kind.itemsize
    tensor = torch.as_strided(torch.from_numpy(flat), view.shape, strides, begin)
    with opened({"w": tensor}) as checkpoint:
        assert bytes_of(checkpoint, "w", start, size) == wanted[start : start + size]


def test_nothing_is_copied_of_what_lies_packed() -> None:
    array, tensor = np.arange(60.0).reshape(3, 20), torch.arange(60).reshape(3, 20)
    given = {"a": array, "rows": array[1:], "t": tensor, "part": tensor[1], "p": torch.nn.Parameter(
        torch.ones(4)
    )}  # fmt: skip
    places = [array.ctypes.data, array[1:].ctypes.data, tensor.data_ptr(), tensor[1].data_ptr()]
    with opened(given) as checkpoint, closing(checkpoint.reader()) as reader:
        starts = np.array([0, 8, 16, 1, 2])
        found = reader.acquire(np.arange(5), starts, np.full(5, 8))
        assert found.tolist() == (np.array([*places, given["p"].data_ptr()]) + starts).tolist()
        assert checkpoint.reader_memory(1 << 20) == 0
    with opened({"a": array.T}) as checkpoint:
        assert 1 << 20 <= checkpoint.reader_memory(1 << 20) <= (1 << 20) + (1 << 18)


def test_tied_and_expanded_tensors_are_what_they_show() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"embed": weight, "head": weight, "bias": torch.tensor([7.0]).expand(5)}
    with opened(state) as checkpoint:
        assert bytes_of(checkpoint, "head") == bytes_of(checkpoint, "embed")
        assert bytes_of(checkpoint, "bias") == np.full(5, 7, np.float32).tobytes()


# which tensors


class Odd(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.BatchNorm1d(3)

    def get_extra_state(self) -> Any:
        return torch.ones(3)  # a tensor like the others


class Odder(Odd):
    def get_extra_state(self) -> Any:
        return {"scale": torch.ones(3)}


def test_a_module_is_its_state_dict() -> None:
    model = Odd()
    with opened(model) as checkpoint:
        assert checkpoint.label == "Odd"
        assert set(checkpoint.table.names) == set(model.state_dict())
        assert not checkpoint.files
        assert not checkpoint.in_files
    with opened({"model": model, "optimizer": {"state": {0: torch.ones(3)}}}) as checkpoint:
        assert set(checkpoint.table.names) == set(model.state_dict())
        assert "weights under model are compared" in checkpoint.notes[0]
    with opened(Odder()) as checkpoint:
        assert set(checkpoint.table.names) == set(model.state_dict()) - {"_extra_state"}


class Compiled(torch.nn.Module):
    """Holds a model as torch.compile does, whose import takes seconds."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def _wrapped(model: torch.nn.Sequential) -> dict[str, torch.nn.Module]:
    parallel = torch.nn.DataParallel
    return {
        "module.": parallel(model),
        "_orig_mod.": Compiled(model),
        "module., _orig_mod.": parallel(Compiled(model)),
        "an inner _orig_mod.": torch.nn.Sequential(Compiled(model[0]), *model[1:]),
        "several": Compiled(parallel(parallel(model))),
    }


def test_a_module_is_compared_without_its_wrappers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    names = list(model.state_dict())
    for kind, module in _wrapped(model).items():
        with opened(module) as checkpoint:
            assert checkpoint.table.names == names, kind
            (note,) = checkpoint.notes
            assert "_orig_mod." in note or "without module., as" in note
        with opened({"model": module, "epoch": 3}) as checkpoint:
            assert checkpoint.table.names == names, kind
        # a state dict is what it says it is
        with opened(module.state_dict()) as checkpoint:
            assert checkpoint.table.names == list(module.state_dict())
    assert ckdiff.diff(model, Compiled(model)).tensors_identical == len(names)


@pytest.mark.slow  # the import of what compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_compiled() -> None:
    model = torch.nn.Linear(3, 4)
    result = ckdiff.diff(model, torch.compile(model))  # type: ignore[arg-type]
    assert result.tensors_identical == 2


def test_a_part_of_a_model_that_is_called_module_keeps_its_name() -> None:
    model = torch.nn.Module()
    model.module = torch.nn.Linear(2, 3)
    with opened(model) as checkpoint:
        assert checkpoint.table.names == ["module.weight", "module.bias"]
        assert checkpoint.notes == ()
    with opened(torch.nn.DataParallel(model)) as checkpoint:
        assert checkpoint.table.names == ["module.weight", "module.bias"]
    model = torch.nn.Module()
    model._orig_mod = torch.nn.Linear(2, 3)
    model.register_buffer("weight", torch.ones(2))
    with opened(model) as checkpoint:  # two names never become one
        assert checkpoint.table.names == ["weight", "_orig_mod.weight", "_orig_mod.bias"]


def test_the_weights_are_found_as_in_torch_files() -> None:
    weights, averaged = {"w": torch.ones(3), "step": 3, "none": None}, {"w": np.zeros(3)}
    whole = OrderedDict(
        state_dict=weights, ema=averaged, epoch=3, optimizer={"exp_avg": np.ones(2)}
    )
    with opened(whole) as checkpoint:
        assert kinds(checkpoint) == {"w": ("F32", (3,))}
    with opened(whole, "ema") as checkpoint:
        assert kinds(checkpoint) == {"w": ("F64", (3,))}
    with opened({"encoder": weights, "decoder": {"deep": averaged}}, "encoder") as checkpoint:
        assert checkpoint.table.names == ["w"]
    with opened({"a": averaged, "b": averaged}) as checkpoint:
        assert checkpoint.table.names == ["a.w", "b.w"]  # a tree of JAX
    with pytest.raises(CheckpointError, match="choose with --key a or --key b"):
        opened({"a": {"l.w": np.zeros(3)}, "b": {"l.w": np.zeros(3)}})
    round_and_round: dict[str, Any] = {"w": np.zeros(3)}
    round_and_round["model"] = [round_and_round]
    with opened(round_and_round) as checkpoint:
        assert checkpoint.table.names == ["w"]
    with pytest.raises(CheckpointError, match="--key nonsense is not in it"):
        opened(whole, "nonsense")
    with pytest.raises(CheckpointError, match="2 groups of tensors"):
        opened({"actor": {"w": np.ones(1), "n": 3}, "critic": {"w": np.ones(1), "n": 3}})
    optimizer = torch.optim.Adam(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(CheckpointError, match="the state of an optimizer, and no weights"):
        opened(optimizer)
    with pytest.raises(CheckpointError, match="holds no tensors by name"):
        opened({})


@pytest.mark.parametrize("given", [3, [torch.ones(2)], torch.ones(2), torch.nn.Linear, object()])
def test_what_is_no_checkpoint(given: Any) -> None:
    assert open_memory(given) is None
    with pytest.raises(UsageError, match="a checkpoint must be a path, a state dict, a module"):
        ckdiff.open_checkpoint(given)


def test_dtypes_that_safetensors_lacks_are_left_out_and_said() -> None:
    state = {
        "w": np.ones(3),
        "wide": np.ones(3, np.longdouble),
        "z": torch.ones(2, dtype=torch.cdouble),
    }
    with opened(state) as checkpoint:
        assert checkpoint.table.names == ["w"]
        assert "2 tensors cannot be compared and are left out" in checkpoint.notes[0]
    with pytest.raises(CheckpointError, match="of dtype complex128"):
        opened({"z": state["z"]})


class Sharded(torch.Tensor):
    """Like a DTensor, of which only a part is here."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError("nobody may compute with it")


def freed() -> torch.Tensor:
    tensor = torch.ones(9)
    tensor.untyped_storage().resize_(0)
    return tensor


class Scattered:
    shape, dtype = (3,), np.dtype("f4")

    def __init__(self, device: int) -> None:
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device, 0

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("it takes a copy")
        return np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(3, device="meta"), r"meta device .*load the weights first"),
        (lambda: torch.eye(3).to_sparse(), r"sparse_coo .*to_dense\(\)"),
        (lambda: torch.Tensor._make_subclass(Sharded, torch.ones(3)), "is a Sharded, which keeps"),
        (lambda: torch.nn.UninitializedParameter(), "not initialised yet .*run the module once"),
        (lambda: torch.ones(3, dtype=torch.cfloat).conj(), "resolve_conj"),
        (lambda: freed(), "no memory now: .*full state dict"),
        (lambda: np.array(["a", None], object), "is an array of object, not of numbers"),
        (lambda: np.zeros(3, [("a", "f4")]), "'a', .*not of numbers"),
        (lambda: np.zeros(3, "M8[s]"), "not of numbers"),
        (lambda: np.ma.masked_array(np.ones(3), [1, 0, 0]), r"masked array .*filled"),
        (lambda: Scattered(2), r"not in the memory of this machine .*np.asarray"),
        (lambda: Scattered(1), r"cannot see without a copy .*np.asarray"),
    ],
)
def test_what_has_no_elements_here_is_an_error(make: Any, said: str) -> None:
    value = make()
    in_mapping = {"first": np.ones(3), "the.name": value}
    for one in (in_mapping, SimpleNamespace(state_dict=lambda: {"the.name": value})):
        with pytest.raises(CheckpointError) as caught:
            opened(one)
        assert re.search(f"the.name .*{said}", str(caught.value))


def test_a_tensor_of_which_all_is_here() -> None:
    local = torch.arange(6.0).reshape(2, 3)

    class DTensor(Sharded):
        placements = (SimpleNamespace(is_partial=lambda: False),)
        _local_tensor = local

    tensor = torch.Tensor._make_subclass(DTensor, torch.ones(2, 3))
    with opened({"w": tensor}) as checkpoint:
        assert bytes_of(checkpoint, "w") == local.numpy().tobytes()
    DTensor.placements = (SimpleNamespace(is_partial=lambda: True),)
    with pytest.raises(CheckpointError, match=r"only a part .*full_tensor\(\)"):
        opened({"w": tensor})
    DTensor._local_tensor = local[:1]
    with pytest.raises(CheckpointError, match=r"only a part .*full_state_dict=True"):
        opened({"w": tensor})


# while it is read


def test_what_is_written_to_or_freed_meanwhile_is_noticed() -> None:
    model = torch.nn.Linear(3, 3)
    with opened(model) as checkpoint, closing(checkpoint.reader()) as reader:
        window = np.array([0]), np.array([0]), np.array([8])
        reader.acquire(*window)
        checkpoint.verify()
        with torch.no_grad():
            model.weight.add_(1)
        with pytest.raises(SourceChanged, match="weight was changed"):
            reader.release()
        with pytest.raises(SourceChanged):
            checkpoint.verify()
        model.weight.untyped_storage().resize_(0)
        with pytest.raises(SourceChanged):  # and nothing is read
            reader.acquire(*window)
    with torch.inference_mode(), opened({"w": torch.ones(3)}) as checkpoint:
        checkpoint.verify()


def test_a_diff_of_what_a_step_changed(tmp_path: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(30, 20)).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[1].weight[3:5, ::2] *= -1
    found = ckdiff.diff(before, model, tmp_path / "run.zarr")
    assert found.rules["exact"]["changed"] == 30
    assert found.store is not None
    mask = found.store.mask("1.weight")
    assert np.array_equal(mask, (before["1.weight"] != model[1].weight).numpy())
    said = found.to_dict()
    assert (said["base"], said["tuned"]) == ("a state dict", "Sequential")
    arrays = {name: tensor.float().numpy() for name, tensor in before.items()}
    assert ckdiff.diff(arrays, before).rules["exact"]["changed"] == 0  # by value


def test_no_run_goes_on_from_what_was_in_memory_before(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = {"w": np.zeros(1000)}, {"w": np.zeros(1000)}
    with opened(base) as one, opened(tuned) as other:
        with monkeypatch.context() as patch:
            patch.setattr(run, "verify_sources", _stopped)
            with pytest.raises(ZeroDivisionError):
                ckdiff.diff(one, other, tmp_path / "run.zarr")
        tuned["w"][:] = 1  # numpy tells nobody
        found = ckdiff.diff(one, other, tmp_path / "run.zarr")
    assert found.rules["exact"]["changed"] == 1000


def _stopped(*arguments: Any, **options: Any) -> Any:
    raise ZeroDivisionError


@pytest.mark.parametrize("shape", [(1030, 40), (3, 700, 33), (2, 40, 600)])
def test_what_is_taken_in_blocks(shape: tuple[int, ...]) -> None:
    """Larger than a block, along and across, in every order of dimensions."""
    count = int(np.prod(shape))
    for order in itertools.permutations(range(len(shape))):
        stored = np.arange(count, dtype=np.uint32).reshape([shape[i] for i in order])
        array = stored.transpose(np.argsort(order))
        assert array.shape == shape
        with opened({"n": array, "t": torch.from_numpy(array), "r": array[::-1]}) as checkpoint:
            for name in "nt":
                assert bytes_of(checkpoint, name, 401, 99_901) == array.tobytes()[401:100_302]
            assert bytes_of(checkpoint, "r") == array[::-1].tobytes()


def test_the_same_memory_on_both_sides_is_said() -> None:
    """A state dict that is not copied changes with the model: nothing would ever differ."""
    from ckdiff.options import Observer

    notes: list[str] = []
    weights = {"w": np.ones((4, 4), np.float32), "b": np.zeros(3, np.float32)}
    found = ckdiff.diff(weights, dict(weights), observer=Observer(note=notes.append))
    assert found.rules["exact"]["changed"] == 0
    assert any("2 tensors are the same memory" in note and "clone()" in note for note in notes)
    notes.clear()
    copied = {name: array.copy() for name, array in weights.items()}
    ckdiff.diff(weights, copied, observer=Observer(note=notes.append))
    assert notes == []
