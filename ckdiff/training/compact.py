"""An optimizer that has state for the masked elements only, and touches no other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from ckdiff.errors import UsageError, printable
from ckdiff.rules import Rule
from ckdiff.training.moving import Move, gather, scatter
from ckdiff.training.names import Missing, Weight, fit
from ckdiff.training.selection import Selection
from ckdiff.training.sharding import local
from ckdiff.training.source import Masks

#: optimizers that treat each element by itself, so that leaving elements out changes no other
ELEMENTWISE = (
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Lion", "NAdam", "RAdam", "RMSprop",
    "Rprop", "SGD",
)  # fmt: skip
#: Compact tensors are padded with zeros to a multiple of this. Torch's CPU kernels compute what a
#: vector's width leaves over with other roundings (in bfloat16, or fused), so that without padding
#: the last few elements would differ from what the dense optimizer gives.
_PADDED = 64
#: Masked elements that are stepped together. What is gathered of them is then still in the cache
#: when the optimizer reads it, and so is most of the parameters when it is put back.
_AT_ONCE = 1 << 19
Parameters: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]]
#: parameters -> each with its mask
_Fit: TypeAlias = Callable[[list[torch.Tensor]], list[tuple[Weight, torch.Tensor]]]


class SubnetworkOptimizer(Optimizer):
    """A torch optimizer for the masked elements: the others have no state and never change.

    ``SubnetworkOptimizer(torch.optim.AdamW, model, "run1.zarr", lr=1e-5)`` takes the place of
    ``torch.optim.AdamW(model.parameters(), lr=1e-5)``. A step gathers weights and gradients of the
    masked elements, steps the inner optimizer on them, and writes them back. ``params`` are the
    model's parameters to train, or groups of them with their own options, as in torch. Only
    element-wise optimizers can do this; others are refused. ``store``, ``rule`` and ``missing``
    are those of ``freeze_unmasked``. Raises UsageError, PairingError, StoreError.

    ``param_groups`` hold the model's parameters, so that schedulers, gradient scalers and
    ``zero_grad`` work as with any optimizer; their options are handed on at each step.
    """

    def __init__(
        self,
        optimizer_class: type[Optimizer],
        model: torch.nn.Module,
        store: Masks,
        *,
        rule: str | Rule | None = None,
        missing: Missing = "error",
        params: Parameters | None = None,
        **kwargs: Any,
    ) -> None:
        _check_class(optimizer_class)
        groups = _groups(model, params)
        self._inner: Optimizer | None = None  # until then groups are added without an inner one
        self._fit: _Fit | None = partial(fit, model, store, rule, missing)
        self._parts = self._made(groups)
        inner = optimizer_class(_compact(groups, self._parts), **kwargs)
        super().__init__(groups, inner.defaults)
        self._adopt(inner)
        for part in self._parts:
            part.release()

    def _made(self, groups: list[dict[str, Any]]) -> list[_Part]:
        """The parts of the parameters of some groups, in their order."""
        assert self._fit is not None
        wanted = [parameter for group in groups for parameter in group["params"]]
        parts = {id(weight.parameter): _Part(weight, mask) for weight, mask in self._fit(wanted)}
        return [parts[id(parameter)] for parameter in wanted]

    def _adopt(self, inner: Optimizer) -> None:
        """Take on what the inner optimizer adds to groups, and only that: no other defaults."""
        self._inner = inner
        self.state = inner.state
        for outer, made in zip(self.param_groups, inner.param_groups, strict=True):
            outer |= _options(made)

    @property
    def masked(self) -> int:
        """Elements that are trained."""
        return sum(part.selection.count for part in self._parts)

    @property
    def selection_bytes(self) -> int:
        """Bytes of memory for the positions of the trained elements, besides ``state``."""
        return sum(part.selection.nbytes for part in self._parts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; ``closure`` computes the gradients and the loss again.

        A parameter without a gradient is left out, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self._configured()
        for batches in _batches(self._parts):
            most = max(sum(part.room for part, _ in batch) for batch in batches)
            buffer = batches[0][0][1].new_empty((2, most))  # for all: fresh memory costs time
            for batch in batches:
                _step(inner, batch, buffer)
        return loss

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the unmasked gradients to zero now.

        A step does not use them. Call this before code that does, such as ``clip_grad_norm_``.
        """
        for part in self._parts:
            part.mask_gradient()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict; ``masks`` in it says which masks it is for."""
        masks = [part.identity for part in self._parts]
        return {**self._configured().state_dict(), "masks": masks}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` returned; raises UsageError if it is for other masks."""
        if "masks" not in state_dict:
            raise UsageError(
                "this is not the state of a SubnetworkOptimizer",
                hint="the state of a dense optimizer has elements that are not trained here",
            )
        saved = state_dict["masks"]
        if len(saved) != len(self._parts):
            raise UsageError(
                f"the state is for {len(saved):,} parameters, the optimizer has"
                f" {len(self._parts):,}"
            )
        for part, other in zip(self._parts, saved, strict=True):
            part.check(other)
        inner = self._configured()
        inner.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.state = inner.state
        for outer, loaded in zip(self.param_groups, inner.param_groups, strict=True):
            outer |= _options(loaded)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more of the model's parameters; raises UsageError, PairingError, StoreError.

        A copy of an optimizer does not know the masks, and refuses.
        """
        if self._inner is None:  # while it is made
            super().add_param_group(param_group)
            return
        if self._fit is None:
            raise UsageError(
                "a copied SubnetworkOptimizer takes no further parameters",
                hint="give all groups as params= when it is made",
            )
        inner = self._configured()
        groups = _groups(None, [param_group])
        known = {id(p) for group in self.param_groups for p in group["params"]}
        if any(id(p) in known for p in groups[0]["params"]):
            raise UsageError("params must hold each parameter once, and at least one")
        parts = self._made(groups)
        inner.add_param_group(_compact(groups, parts)[0])
        super().add_param_group(groups[0])
        self._adopt(inner)
        self._parts += parts
        for part in parts:
            part.release()

    def __getstate__(self) -> dict[str, Any]:
        # For copies. Not everything: a scheduler leaves a function here that steps the original.
        # Nor the model and the store, which are the caller's.
        kept = {"_inner": self._inner, "_parts": self._parts, "_fit": None}
        return {**super().__getstate__(), **kept}

    def _configured(self) -> Optimizer:
        """The inner optimizer with the options that the groups have now."""
        assert self._inner is not None
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner |= _options(outer)
        return self._inner


def _compact(groups: list[dict[str, Any]], parts: Iterable[_Part]) -> list[dict[str, Any]]:
    """The groups with compact parameters in the place of the model's."""
    each = iter(parts)
    return [group | {"params": [next(each).compact for _ in group["params"]]} for group in groups]


def _check_class(optimizer_class: Any) -> None:
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise UsageError(
            f"optimizer_class must be a class of torch.optim, not {optimizer_class!r}",
            hint="the class itself, and its options as keywords",
        )
    if optimizer_class.__name__ not in ELEMENTWISE:
        raise UsageError(
            f"{optimizer_class.__name__} cannot be made compact: it is not known to treat each "
            "element by itself",
            hint=f"use freeze_unmasked, or one of {', '.join(ELEMENTWISE)}",
        )


def _groups(model: torch.nn.Module | None, params: Parameters | None) -> list[dict[str, Any]]:
    """Parameter groups, each with a list of parameters."""
    if params is None:
        if not isinstance(model, torch.nn.Module):
            raise UsageError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
        params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    items: list[Any] = [params] if isinstance(params, torch.Tensor) else list(params)
    if not (items and all(isinstance(item, dict) for item in items)):
        items = [{"params": items}]
    groups = []
    for item in items:
        members = item.get("params", [])
        members = [members] if isinstance(members, torch.Tensor) else list(members)
        if not all(isinstance(member, torch.Tensor) for member in members):
            raise UsageError("params must be the model's parameters, or groups of them")
        groups.append({**item, "params": members})
    every = [id(member) for group in groups for member in group["params"]]
    if not every or len(every) != len(set(every)):
        raise UsageError("params must hold each parameter once, and at least one")
    return groups


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _batches(parts: Iterable[_Part]) -> list[list[list[tuple[_Part, torch.Tensor]]]]:
    """Parts that have a gradient, with it: for each dtype and device those that go together."""
    kinds: dict[Any, list[list[tuple[_Part, torch.Tensor]]]] = defaultdict(list)
    room: dict[Any, int] = {}
    for part in parts:
        gradient = part.gradient
        if gradient is None or not part.selection.count:
            continue
        kind = gradient.dtype, gradient.device
        room[kind] = room.get(kind, 0) + part.room
        if not kinds[kind] or room[kind] > _AT_ONCE:
            kinds[kind].append([])
            room[kind] = part.room
        kinds[kind][-1].append((part, gradient))
    return list(kinds.values())


def _step(
    inner: Optimizer, batch: Sequence[tuple[_Part, torch.Tensor]], buffer: torch.Tensor
) -> None:
    """Step the inner optimizer on these: it leaves out the parameters that have no gradient."""
    moves: list[Move] = []
    try:
        at = 0
        for part, gradient in batch:
            moves += part.fill(buffer, at, gradient)
            at += part.room
        gather(moves)
        inner.step()
        scatter(moves)
    finally:
        for part, _ in batch:
            part.release()


class _Part:
    """The masked elements of a parameter, as a parameter of their own."""

    def __init__(self, weight: Weight, mask: torch.Tensor) -> None:
        self.name = weight.name
        self._parameter = weight.parameter
        self.selection = Selection(mask)
        self._shard = _shard(weight.parameter)
        whole = local(weight.parameter).detach()
        #: elements of the compact tensor
        self.room = 0 if self.selection.whole else -(-self.selection.count // _PADDED) * _PADDED
        # Some optimizers make state of this size and type when they are made. Where all of a
        # parameter is trained it stands for itself.
        self.compact = torch.nn.Parameter(
            whole if self.selection.whole else whole.new_zeros(self.room),
            requires_grad=weight.parameter.requires_grad,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a state dict says of the mask; the name is for people, wrappers change it."""
        selection = self.selection
        found = {"name": self.name, "elements": selection.count, "mask": selection.digest}
        return found | {"shard": self._shard} if self._shard else found

    def check(self, saved: dict[str, Any]) -> None:
        """Raise UsageError where ``saved``, an identity, is another's."""
        mine = self.identity
        if mine.get("shard") != saved.get("shard"):
            raise UsageError(
                f"the state is for another part of {printable(self.name)}",
                hint="each process loads the state that it saved, with as many processes",
            )
        if mine["mask"] != saved["mask"]:
            raise UsageError(
                f"the state is for another mask of {printable(self.name)}",
                hint="use the store that the state was made with",
            )

    @property
    def gradient(self) -> torch.Tensor | None:
        """The parameter's gradient, the part of it in this process; None where it has none."""
        gradient = self._parameter.grad
        if gradient is not None and gradient.layout != torch.strided:
            raise UsageError(
                f"{printable(self.name)} has a sparse gradient", hint="use freeze_unmasked"
            )
        return None if gradient is None else local(gradient)

    @property
    def weights(self) -> torch.Tensor:
        """The part of the parameter in this process."""
        return local(self._parameter).detach()

    def fill(self, buffer: torch.Tensor, at: int, gradient: torch.Tensor) -> list[Move]:
        """Give the compact parameter its memory, from ``at`` on; what is to be moved there."""
        if self.selection.whole:
            self.compact.data, self.compact.grad = self.weights, gradient
            return []
        self.compact.data = buffer[0, at : at + self.room]
        self.compact.grad = buffer[1, at : at + self.room]
        return [Move(self.selection, self.weights, gradient, self.compact.data, self.compact.grad)]

    def release(self) -> None:
        """Between steps only the optimizer's state and the selection take memory."""
        self.compact.grad = None
        self.compact.data = self.compact.data.new_empty(0)

    def mask_gradient(self) -> None:
        """Set the gradients of the other elements to zero."""
        gradient = self.gradient
        if gradient is None or self.selection.whole:
            return
        kept = gradient.new_empty((2, self.room))
        move = Move(self.selection, gradient, gradient, kept[0], kept[1])
        gather([move])
        gradient.zero_()
        scatter([move])


def _shard(parameter: Any) -> str:
    """Which part of a sharded parameter this process holds; empty for a whole one."""
    if not hasattr(parameter, "device_mesh"):
        return ""
    mesh = parameter.device_mesh
    return f"{mesh.get_coordinate()} of {list(mesh.shape)}, {list(parameter.placements)}"
