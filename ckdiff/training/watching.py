"""What a monitor looks at: tensors of a model by name, of sharded ones the part that is here."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckdiff.checkpoints.places.held import Held
from ckdiff.checkpoints.places.heldtorch import held_tensor
from ckdiff.checkpoints.places.wrapped import plain_names
from ckdiff.errors import UsageError, printable
from ckdiff.training.sharding import local

Watch = Literal["trainable", "parameters", "all"]
Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Watched:
    """A tensor of a model, once however many names it has."""

    names: list[str]  #: as files have them, without what wrappers add; the first is its own
    whole: torch.Tensor  #: as the model has it: a DTensor where it is sharded
    here: torch.Tensor  #: the part in this process, sharing its memory
    held: Held  #: the same, as readers take it

    @property
    def name(self) -> str:
        """The first of the names."""
        return self.names[0]

    @property
    def elements(self) -> int:
        """Elements of all parts together."""
        return int(self.whole.numel())

    @property
    def kind(self) -> tuple[tuple[int, ...], torch.dtype]:
        """What has to be equal for two looks at it to be compared: shape and dtype of all of it."""
        return tuple(self.whole.shape), self.whole.dtype

    @property
    def spread(self) -> tuple[Any, list[bool]] | None:
        """The mesh of processes that hold it, and along which of its dimensions it is cut; None
        where all of it is here.
        """
        mesh = getattr(self.whole, "device_mesh", None)
        if mesh is None:
            return None
        return mesh, [not placement.is_replicate() for placement in self.whole.placements]  # type: ignore[attr-defined]


@dataclass(slots=True)
class Sight:
    """What was found of a model at one time."""

    tensors: list[Watched] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  #: of dtypes that no file has


def checked_watch(value: object) -> Watch:
    """``value`` if it says what is watched; raises UsageError."""
    for known in get_args(Watch):
        if value == known:
            found: Watch = known
            return found
    raise UsageError(
        f"watch cannot be {printable(repr(value))[:60]}",
        hint=f"one of {', '.join(get_args(Watch))}",
    )


def look_at(model: nn.Module, watch: Watch, known: Collection[str] = ()) -> Sight:
    """The tensors of a model that are watched, in its order, where they are now.

    Those whose names are ``known`` are so whether they are trained or not. Tied ones count once:
    those that are one tensor, or lie in the same memory. Raises UsageError for models whose tensors
    are not to be had in this way, and CheckpointError for tensors that cannot be read.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    _reshard(model)
    label = printable(type(model).__name__)
    named = list(_named(model, buffers=watch == "all"))
    names, _ = plain_names(model, [name for name, _ in named], label)
    sight = Sight()
    seen: dict[Any, Watched | None] = {}
    for name, (_, whole) in zip(names, named, strict=True):
        if watch == "trainable" and not whole.requires_grad and name not in known:
            continue
        found = seen.get(id(whole))
        if found is None and id(whole) not in seen:
            found = _watched(name, whole, label)
            key = id(whole) if found is None else _memory(found.here)
            if key in seen:
                found = seen[key]
            elif found is None:
                sight.left_out.append(name)
            else:
                sight.tensors.append(found)
            seen[key] = seen[id(whole)] = found
        if found is not None and name not in found.names:
            found.names.append(name)
    return sight


def _watched(name: str, whole: torch.Tensor, label: str) -> Watched | None:
    """What is watched of a tensor; None where it has a dtype that no file has."""
    _refuse(name, whole)
    here = whole if _is_odd(whole) else local(whole).detach()
    held = held_tensor(here, torch, name, label)
    return None if isinstance(held, str) else Watched([name], whole, here, held)


def _is_odd(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory to look at yet, or not in one piece: it is refused."""
    return bool(is_lazy(tensor)) or tensor.layout != torch.strided


def is_spread(model: nn.Module) -> bool:
    """Whether parameters of a model are spread over processes."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def added_up(tensors: Sequence[Watched], counts: Int64) -> Int64:
    """Counts of the parts that are here, a row for each tensor, as counts of whole tensors.

    Processes that hold parts of one tensor add up together, once for each dimension of their mesh
    along which it is cut; where none is, nothing is communicated.
    """
    spread = [tensor.spread for tensor in tensors]
    for mesh in dict.fromkeys(found[0] for found in spread if found is not None):
        from torch import distributed

        of_mesh = [i for i, found in enumerate(spread) if found is not None and found[0] == mesh]
        for dimension in range(mesh.ndim):
            rows = [i for i in of_mesh if (found := spread[i]) is not None and found[1][dimension]]
            if not rows:
                continue
            part = torch.from_numpy(counts[rows]).to(mesh.device_type)
            distributed.all_reduce(part, group=mesh.get_group(dimension))
            counts[rows] = part.cpu().numpy()
    return counts


def _named(model: nn.Module, *, buffers: bool) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    if not buffers:
        return
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            # torch has no public way to ask
            if name not in getattr(module, "_non_persistent_buffers_set", ()):
                yield f"{prefix}.{name}" if prefix else name, buffer


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What two tensors have in common that are the same elements."""
    if not tensor.numel():
        return (id(tensor),)
    kind = tensor.dtype, tuple(tensor.shape), tensor.stride()
    return str(tensor.device), tensor.data_ptr(), *kind


def _refuse(name: str, tensor: torch.Tensor) -> None:
    if hasattr(tensor, "ds_shape"):
        raise UsageError(
            f"{printable(name)} is sharded by DeepSpeed's ZeRO 3, which leaves an empty tensor "
            "here",
            hint="use FSDP2 or ZeRO 1 or 2, or compare saved checkpoints: ckdiff timeline",
        )
    placements = getattr(tensor, "placements", ())
    if any(placement.is_partial() for placement in placements):
        raise UsageError(f"{printable(name)} is a sum over processes, which is not a weight")


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 put its sharded parameters back, where a forward pass has left whole ones."""
    for module in model.modules():
        kinds = {one.__name__ for one in type(module).__mro__}
        if "FullyShardedDataParallel" in kinds:
            raise UsageError(
                "the model is sharded by FSDP 1, which flattens parameters", hint="use fully_shard"
            )
        if "FSDPModule" in kinds:
            module.reshard()  # type: ignore[operator]
