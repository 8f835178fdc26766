"""An optimizer that has state for the masked elements only, and touches no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import xxhash
from torch.optim import Optimizer

from ckdiff.errors import UsageError, printable
from ckdiff.rules import Rule
from ckdiff.training.names import Missing, Weight, fit
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
Parameters: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]]


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
        wanted = [parameter for group in groups for parameter in group["params"]]
        parts = {
            id(weight.parameter): _Part(weight, mask)
            for weight, mask in fit(model, store, rule, missing, wanted)
        }
        self._inner: Optimizer | None = None  # until then groups may be added
        compact = [
            group | {"params": [parts[id(p)].compact for p in group["params"]]} for group in groups
        ]
        inner = optimizer_class(compact, **kwargs)
        super().__init__(groups, inner.defaults)
        # what the inner optimizer itself adds to groups, and only that: no second set of defaults
        for outer, made in zip(self.param_groups, inner.param_groups, strict=True):
            outer |= _options(made)
        self._inner = inner
        self._parts = [parts[id(parameter)] for parameter in wanted]
        self.state = inner.state
        for part in self._parts:
            part.release()

    @property
    def masked(self) -> int:
        """Elements that are trained."""
        return sum(part.count for part in self._parts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; ``closure`` computes the gradients anew, and the loss.

        A parameter without a gradient is left out, as in torch.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        inner = self._configured()
        try:
            for part in self._parts:
                part.gather()
            inner.step()
            for part in self._parts:
                part.scatter()
        finally:
            for part in self._parts:
                part.release()
        return loss

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the unmasked gradients to zero now.

        A step does not look at them; call this before what does, such as ``clip_grad_norm_``.
        """
        for part in self._parts:
            part.mask_gradient()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict, and under ``masks`` which masks it is for."""
        masks = [part.identity() for part in self._parts]
        return {**self._configured().state_dict(), "masks": masks}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave; raises UsageError where it is for other masks."""
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
            if part.identity()["mask"] != other["mask"]:
                raise UsageError(
                    f"the state is for another mask of {printable(part.name)}",
                    hint="use the store that the state was made with",
                )
        inner = self._configured()
        inner.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.state = inner.state
        for outer, loaded in zip(self.param_groups, inner.param_groups, strict=True):
            outer |= _options(loaded)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once the optimizer is made: give all groups as ``params``."""
        if self._inner is not None:
            raise UsageError(
                "a SubnetworkOptimizer takes no further parameters",
                hint="give all groups as params= when it is made",
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        # For copies. Not everything: a scheduler leaves a function here that steps the original.
        return {**super().__getstate__(), "_inner": self._inner, "_parts": self._parts}

    def _configured(self) -> Optimizer:
        """The inner optimizer with the options that the groups have now."""
        assert self._inner is not None
        for outer, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner |= _options(outer)
        return self._inner


def _check_class(optimizer_class: Any) -> None:
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise UsageError(
            f"optimizer_class must be a class of torch.optim, not {optimizer_class!r}",
            hint="the class itself, and its options as keywords",
        )
    if optimizer_class.__name__ not in ELEMENTWISE:
        raise UsageError(
            f"{optimizer_class.__name__} cannot be made compact: it does not treat each element"
            " by itself, as far as is known",
            hint=f"use freeze_unmasked, or one of {', '.join(ELEMENTWISE)}",
        )


def _groups(model: torch.nn.Module, params: Parameters | None) -> list[dict[str, Any]]:
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


class _Part:
    """The masked elements of a parameter, as a parameter of their own."""

    def __init__(self, weight: Weight, mask: torch.Tensor) -> None:
        self.name = weight.name
        self._parameter = weight.parameter
        self._shape = list(mask.shape)
        self.count = int(mask.sum())
        #: positions of the masked elements; None where that is all of them
        self._index: torch.Tensor | None = None
        digest = xxhash.xxh3_128(str(self._shape).encode())
        if self.count < mask.numel():
            flat = mask.reshape(-1)
            self._index = flat.nonzero().view(-1)
            if mask.numel() < 2**31:
                self._index = self._index.to(torch.int32)  # half the memory
            digest.update(self._index.cpu().numpy().astype("<i8").tobytes())
        self._digest = digest.hexdigest()
        # Where all of a parameter is trained it stands for itself: no index, no copy.
        # Elsewhere some optimizers make state of this size and type when they are made.
        self.compact = self._parameter if self._index is None else self._fresh()

    def _fresh(self) -> torch.nn.Parameter:
        return torch.nn.Parameter(self._padded(self._parameter.detach()).zero_())

    def identity(self) -> dict[str, Any]:
        """What a state dict says of the mask; the name is for people, wrappers change it."""
        return {"name": self.name, "elements": self.count, "mask": self._digest}

    def gather(self) -> None:
        """Take the weights and gradients from the parameter."""
        gradient = self._parameter.grad
        if gradient is not None and gradient.is_sparse:
            raise UsageError(
                f"{printable(self.name)} has a sparse gradient", hint="use freeze_unmasked"
            )
        if self._index is None or self.count == 0 or gradient is None:
            return
        self._index = self._index.to(self._parameter.device)
        self.compact.data = self._taken(self._parameter.detach())
        self.compact.grad = self._taken(gradient)

    def scatter(self) -> None:
        """Give the new weights to the parameter."""
        if self._index is not None and self.compact.grad is not None:
            self._put(self._parameter.detach(), self.compact.detach())

    def release(self) -> None:
        """Between steps only the optimizer's state and the index take memory."""
        if self._index is not None:
            self.compact.grad = None
            self.compact.data = self.compact.data.new_empty(0)

    def mask_gradient(self) -> None:
        """Set the gradients of the other elements to zero."""
        gradient = self._parameter.grad
        if gradient is not None and self._index is not None:
            self._index = self._index.to(self._parameter.device)
            kept = self._taken(gradient)
            self._put(gradient.zero_(), kept)

    def _padded(self, like: torch.Tensor) -> torch.Tensor:
        """A compact tensor like ``like``, to be filled: only its padding is set."""
        made = like.new_empty(-(-self.count // _PADDED) * _PADDED)
        made[self.count :] = 0
        return made

    def _taken(self, whole: torch.Tensor) -> torch.Tensor:
        assert self._index is not None
        taken = self._padded(whole)
        torch.index_select(whole.reshape(-1), 0, self._index, out=taken[: self.count])
        return taken

    def _put(self, whole: torch.Tensor, values: torch.Tensor) -> None:
        assert self._index is not None
        flat = whole.reshape(-1)  # a copy where the tensor is not contiguous
        flat.scatter_(0, self._index.long(), values[: self.count])
        if not whole.is_contiguous():
            whole.copy_(flat.view(whole.shape))
