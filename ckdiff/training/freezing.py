"""Any torch optimizer, with the unmasked elements held still by its step hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ckdiff.errors import UsageError
from ckdiff.rules import Rule
from ckdiff.training.names import Missing, fit
from ckdiff.training.sharding import local
from ckdiff.training.source import Masks

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def freeze_unmasked(
    model: torch.nn.Module,
    optimizer: Optimizer,
    store: Masks,
    *,
    rule: str | Rule | None = None,
    missing: Missing = "error",
) -> Freeze:
    """From now on each step of ``optimizer`` leaves every unmasked element bit-identical.

    Before a step, unmasked gradients are set to zero, and unmasked weights are copied. After the
    step they are put back, whatever the optimizer did to them. ``store`` is a MaskStore, a path, or
    a dict of parameter name -> bool tensor, True where the element is trained. ``missing`` says
    what to do with a parameter without a mask: ``"error"``, ``"train"`` or ``"freeze"``.
    ``.remove()`` on the result ends it. Raises UsageError, PairingError, StoreError.

    With FSDP2, call it in each process, after ``fully_shard``, with the optimizer that was made
    after that. Each process freezes its own part.
    """
    optimizer = innermost(optimizer)
    stepped = _stepped(optimizer)
    found = fit(model, store, rule, missing, stepped)
    return Freeze(optimizer, [Held(weight.parameter, ~mask) for weight, mask in found])


def innermost(optimizer: Any) -> Optimizer:
    """The optimizer whose step hooks run: wrappers such as Accelerate's do not run their own."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise UsageError(
            f"the optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
        )
    return optimizer


def _stepped(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


@dataclass(slots=True, eq=False)
class Held:
    """A parameter and which of its elements are frozen; where it is sharded, of those here."""

    parameter: torch.Tensor
    frozen: torch.Tensor  #: bool, with the shape of the parameter's local part and on its device
    count: int = 0  #: frozen elements
    whole: bool = False  #: the whole parameter is kept during a step, not the frozen part only

    def __post_init__(self) -> None:
        self.count = int(self.frozen.sum())
        # Packing makes index tensors of several times the parameter's size for a moment, and
        # where most is frozen it saves less than half of a copy.
        self.whole = 2 * self.count > self.frozen.numel()

    def follow(self) -> None:
        """Move the mask to where the parameter is now."""
        self.frozen = self.frozen.to(local(self.parameter).device)

    def bits(self) -> torch.Tensor:
        """The weights as integers: copying these cannot touch a NaN's payload or a zero's sign."""
        weights = local(self.parameter).detach()
        integers = _INTEGERS.get(weights.element_size())
        return weights if integers is None else weights.view(integers)

    def keep(self) -> torch.Tensor:
        """The bits of the frozen weights."""
        return self.bits().clone() if self.whole else self.bits().masked_select(self.frozen)

    def put_back(self, kept: torch.Tensor) -> None:
        bits = self.bits()
        kept = kept.to(bits.device)
        if self.whole:
            torch.where(self.frozen, kept, bits, out=bits)
        else:
            bits.masked_scatter_(self.frozen, kept)

    @torch.no_grad()
    def mask_gradient(self) -> None:
        self.follow()
        gradient = self.parameter.grad
        if gradient is None:
            return
        if gradient.is_sparse:  # an embedding with sparse=True
            gradient = gradient.coalesce()
            at = tuple(gradient.indices())
            gradient.values().masked_fill_(self.frozen[at], 0)
            self.parameter.grad = gradient
        else:  # a multiplication would make NaN of infinity times zero
            local(gradient).masked_fill_(self.frozen, 0)


class Freeze:
    """Keeps the unmasked elements of a model frozen; made by ``freeze_unmasked``.

    It needs one bool for each element, and during a step a copy of the frozen weights.
    """

    def __init__(self, optimizer: Optimizer, held: list[Held]) -> None:
        self._optimizer = optimizer
        self._held = [item for item in held if item.count]
        self._known = {id(item.parameter) for item in held}
        self.elements = sum(item.frozen.numel() for item in held)  #: in the optimizer's parameters
        self.frozen = sum(item.count for item in held)  #: of which are held still
        self._kept: dict[Held, torch.Tensor] = {}
        # A subclass's step that calls its parent's runs the hooks twice, one pair inside the other.
        self._depth = 0
        # After the hooks that are there already, which may change gradients or weights.
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Stop freezing: later steps change every element again."""
        for hook in self._hooks:
            hook.remove()
        self._kept = {}

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the unmasked gradients to zero now.

        Each step does that anyway. Call this before code that uses gradients earlier, such as
        ``clip_grad_norm_``.
        """
        for item in self._held:
            item.mask_gradient()

    def mask_gradients_early(self) -> None:
        """From now on set unmasked gradients to zero as soon as each backward pass has made them.

        For loops that use gradients where you cannot call ``mask_gradients``, such as trainers that
        clip. Ends with ``remove``.
        """

        def hook(item: Held) -> Callable[[torch.Tensor], None]:
            return lambda _: item.mask_gradient()

        self._hooks += [
            item.parameter.register_post_accumulate_grad_hook(hook(item))  # type: ignore[no-untyped-call]
            for item in self._held
        ]

    def __repr__(self) -> str:
        return f"<Freeze: {self.frozen:,} of {self.elements:,} elements held still>"

    @torch.no_grad()
    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        stepped = set(map(id, _stepped(optimizer)))  # DeepSpeed steps one group at a time
        if not stepped <= self._known:
            raise UsageError(
                "the optimizer got new parameters after freeze_unmasked",
                hint="call .remove() and freeze_unmasked again",
            )
        self.mask_gradients()
        self._put_back()  # inside a step, or after one that raised: these are still the right bits
        for item in self._held:
            if id(item.parameter) in stepped and item not in self._kept:
                self._kept[item] = item.keep()
        self._depth += 1
        # args begin with the optimizer itself; a closure computes gradients during the step
        args = tuple(self._masking(argument) for argument in args)
        return args, {name: self._masking(argument) for name, argument in kwargs.items()}

    def _masking(self, closure: Any) -> Any:
        if not callable(closure):
            return closure

        def masked() -> Any:
            loss = closure()
            self.mask_gradients()
            return loss

        return masked

    @torch.no_grad()
    def _after(self, *_: Any) -> None:
        self._put_back()
        self._depth -= 1
        if self._depth == 0:
            self._kept = {}

    def _put_back(self) -> None:
        for item, kept in self._kept.items():
            item.put_back(kept)
