"""Tensors and modules of torch in the memory of this process, or on its devices.

torch is never imported here: whoever gives us a tensor has done so.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from ckdiff.checkpoints.places.held import KNOWN_DTYPES, Held
from ckdiff.errors import CheckpointError, printable
from ckdiff.kernels.memory import bytes_at

_SHARDED = (
    "give all of it: tensor.full_tensor(), or get_model_state_dict(model, "
    "options=StateDictOptions(full_state_dict=True))"
)


def torch_of(value: Any) -> Any:
    """torch, if it is loaded and ``value`` is a tensor of it; else None."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "Tensor", None)
    return torch if isinstance(kind, type) and isinstance(value, kind) else None


def is_module(value: Any) -> bool:
    """Whether a value is a module of torch."""
    kind = getattr(sys.modules.get("torch.nn"), "Module", None)
    return isinstance(kind, type) and isinstance(value, kind)


def is_here(tensor: Any) -> bool:
    """Whether a tensor's elements are in the memory of this machine's processor."""
    return str(tensor.device.type) == "cpu"


class HeldTensor(Held):
    """A tensor, on whatever device: see the classes of those that are here, and are not."""

    __slots__ = ("_at", "_version", "tensor")

    def __init__(self, tensor: Any, dtype: str, *, here: bool) -> None:
        self.tensor, self._at, self._version = tensor, int(tensor.data_ptr()), _version(tensor)
        address = self._at if here and tensor.is_contiguous() else 0
        super().__init__(dtype, tuple(tensor.shape), tensor.element_size(), address)

    def moved(self) -> bool:
        """See Held."""
        return int(self.tensor.data_ptr()) != self._at

    def written(self) -> bool:
        """See Held: torch counts what is done to a tensor in place, but not through ``.data``."""
        return _version(self.tensor) != self._version


class HeldHere(HeldTensor):
    """A tensor in the memory of the processor."""

    __slots__ = ()

    def copy(self, first: int, into: npt.NDArray[np.uint8]) -> None:
        """See Held."""
        # not by numpy(): the storage could not be resized any more, as what shards a model does
        memory = bytes_at(self._at, _reach(self.tensor))
        steps = tuple(step * self.width for step in self.tensor.stride())
        words: npt.NDArray[Any] = np.ndarray(self.words, f"u{self.width}", memory, strides=steps)
        self.copy_words(words, first, into)


class HeldOnDevice(HeldTensor):
    """A tensor on a device, of which windows are copied to the memory of this machine."""

    __slots__ = ("torch",)

    def __init__(self, tensor: Any, dtype: str, torch: Any) -> None:
        super().__init__(tensor, dtype, here=False)
        self.torch = torch

    def on_gpu(self) -> bool:
        """Whether it is on a device that diffs can be made on."""
        return str(self.tensor.device.type) == "cuda"

    def there(self, device: str) -> int:
        """Where it is in the memory of this device, packed and aligned as code there likes it; 0
        where it is not.
        """
        packed = self.tensor.is_contiguous() and not self._at % 16
        return self._at if packed and str(self.tensor.device) == device else 0

    def copy(self, first: int, into: npt.NDArray[np.uint8]) -> None:
        """See Held. Of a strided tensor, a window is packed on the device first."""
        torch = self.torch
        # as whole numbers: what is copied are bits then, whatever they stand for
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.width]
        words, out = self.tensor.detach().view(kind), torch.from_numpy(into).view(kind)
        if words.is_contiguous():
            out.copy_(words.reshape(-1)[first : first + len(out)])
            return
        for part, start, stop in self.parts(first, len(out)):
            out[start:stop].copy_(words[part].reshape(-1))


def _version(tensor: Any) -> int:
    """How often a tensor was written to in place; 0 of those that do not count."""
    try:
        return int(tensor._version)
    except RuntimeError:  # of inference mode
        return 0


def held_tensor(tensor: Any, torch: Any, name: str, where: str) -> Held | str:
    """A tensor of torch, or in words why it is left out: that safetensors has no such dtype. Raises
    CheckpointError where its elements are not all there, with the remedy.
    """
    tensor = _whole(tensor)
    wrong = _refusal(tensor, torch)
    if wrong is not None:
        raise CheckpointError(f"{where}: {printable(name)} {wrong[0]}", hint=wrong[1])
    text = str(tensor.dtype).removeprefix("torch.")
    dtype = KNOWN_DTYPES.get(text)
    if dtype is None or (dtype == "F4" and not tensor.dim()):
        return f"of dtype {printable(text)[:40]}"
    if is_here(tensor):
        return HeldHere(tensor, dtype, here=True)
    return HeldOnDevice(tensor, dtype, torch)


def synchronize(torch: Any, tensors: list[Any]) -> None:
    """Wait for what devices still do to tensors, on whichever of their queues."""
    for device in {str(tensor.device) for tensor in tensors if not is_here(tensor)}:
        wait = getattr(getattr(torch, device.partition(":")[0], None), "synchronize", None)
        if wait is not None:
            wait(device)


def _whole(tensor: Any) -> Any:
    """The tensor that a DTensor stands for, if all of it is in this process."""
    local = getattr(tensor, "_local_tensor", None)
    placements = getattr(tensor, "placements", None)
    if local is None or not isinstance(placements, (tuple, list)):
        return tensor
    partial = any(getattr(placement, "is_partial", bool)() for placement in placements)
    return local if tuple(local.shape) == tuple(tensor.shape) and not partial else tensor


def _refusal(tensor: Any, torch: Any) -> tuple[str, str] | None:
    """Why a tensor cannot be read and what to do about it; None where it can be."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        wrong = _class_refusal(type(tensor), torch)
        if wrong is not None:
            return wrong
    if tensor.device.type == "meta":
        return (
            "has no elements: it is on the meta device",
            "load the weights first, or give the directory that they are in",
        )
    if tensor.is_nested:
        return "is a nested tensor", "give its parts: tensor.unbind()"
    if tensor.layout != torch.strided:
        return f"has the layout {printable(str(tensor.layout))[:40]}", "give tensor.to_dense()"
    if tensor.is_quantized:
        return "is quantized", "give tensor.int_repr() or tensor.dequantize()"
    if tensor.is_conj() or tensor.is_neg():
        return "is a view that is not computed yet", "give tensor.resolve_conj().resolve_neg()"
    if (
        tensor.storage_offset() * tensor.element_size() + _reach(tensor)
        > tensor.untyped_storage().nbytes()
    ):
        return (
            "has no memory now: whatever shards the model has freed it",
            "gather the weights first, with FSDP's summon_full_params or a full state dict",
        )
    return None


def _class_refusal(cls: type, torch: Any) -> tuple[str, str] | None:
    """Why tensors of a class cannot be read: they have no elements of their own, or not all."""
    kind, classes = printable(cls.__name__)[:60], {one.__name__ for one in cls.__mro__}
    if classes & {"DTensor", "ShardedTensor"}:
        return f"is a {kind}, of which this process has only a part", _SHARDED
    if classes & {"UninitializedParameter", "UninitializedBuffer"}:
        return "is not initialised yet", "run the module once, or load its weights"
    plain = cls.__torch_dispatch__ is torch.Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    if plain and not hasattr(cls, "__tensor_flatten__"):
        return None
    return (
        f"is a {kind}, which keeps its elements in other tensors",
        "give plain tensors, such as what its dequantize() gives",
    )


def _reach(tensor: Any) -> int:
    """Bytes from the first to the last element of a tensor."""
    if tensor.is_contiguous() or not tensor.numel():
        return int(tensor.nbytes)
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((n - 1) * step for n, step in pairs)
    return int((last + 1) * tensor.element_size())
