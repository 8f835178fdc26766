"""DeepSpeed's ZeRO: the unmasked elements held still in the partitions that its optimizer steps.

ZeRO hands its optimizer flat float32 tensors, of which each process has a part, and copies them
to the model's weights after the step. What stays still there stays still in the model. DeepSpeed
itself is not imported: everything is asked of the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from ckdiff.errors import UsageError
from ckdiff.rules import Rule
from ckdiff.training.freezing import Freeze, Held, innermost
from ckdiff.training.names import Missing, fit
from ckdiff.training.sharding import Read
from ckdiff.training.source import Masks


def freeze_zero(
    engine: Any,
    store: Masks,
    *,
    rule: str | Rule | None = None,
    missing: Missing = "error",
) -> Freeze:
    """From now on each ``engine.step()`` leaves every unmasked element bit-identical.

    ``engine`` is what ``deepspeed.initialize`` gave, with ZeRO 1, 2 or 3 and the optimizer's state
    in memory. Call it in each process. The other arguments, and what is given back, are those of
    ``freeze_unmasked``. DeepSpeed clips gradients before its optimizer sees them: call
    ``.mask_gradients()`` between ``engine.backward`` and ``engine.step`` where the clipped norm
    shall be that of the subnetwork. Raises UsageError, PairingError, StoreError.
    """
    zero: Any = getattr(engine, "optimizer", None)
    flat = _flat_weights(zero)
    parts = {id(part.parameter): part for part in _parts(zero)}
    frozen = [torch.zeros(weights.numel(), dtype=torch.bool) for weights in flat]

    def read_part(read: Read, parameter: torch.Tensor) -> torch.Tensor:
        part = parts[id(parameter)]
        return read(part.start, part.start + part.size)

    held_parts = []
    only = [part.parameter for part in parts.values()]
    for weight, mask in fit(engine.module, store, rule, missing, only, read_part):
        part = parts[id(weight.parameter)]
        where = frozen[part.group][part.offset : part.offset + part.size]
        torch.logical_not(mask.cpu(), out=where)
        held_parts.append((part, where))
    held = [
        Held(weights, mask.to(weights.device)) for weights, mask in zip(flat, frozen, strict=True)
    ]
    return _ZeroFreeze(innermost(zero.optimizer), held, held_parts)


@dataclass(slots=True, eq=False)
class _Part:
    """What this process has of a parameter: a range of it, in a flat tensor."""

    parameter: Any
    group: int  #: which of the flat tensors
    offset: int  #: where in it
    start: int  #: from which element of the parameter
    size: int

    def gradient(self) -> torch.Tensor | None:
        """This part of the gradient between backward and step, as DeepSpeed keeps it."""
        if hasattr(self.parameter, "ds_id"):
            gradient = self.parameter._z3_optimizer.averaged_gradients.get(self.group)
            return None if gradient is None else gradient[self._place()]
        mapping = self.parameter._hp_mapping
        if mapping is None or mapping.gradient_dict.get(self.group) is None:
            return None
        part: torch.Tensor = mapping.get_lp_grad_fragment(self.parameter._index_in_param_group)
        return part

    def _place(self) -> int:
        group = self.parameter._z3_optimizer.fp16_groups[self.group]
        return next(place for place, other in enumerate(group) if other is self.parameter)


class _ZeroFreeze(Freeze):
    """Masks the gradients where DeepSpeed has them before its optimizer does."""

    def __init__(
        self, optimizer: Optimizer, held: list[Held], parts: list[tuple[_Part, torch.Tensor]]
    ) -> None:
        super().__init__(optimizer, held)
        self._parts = parts
        self.elements = sum(part.size for part, _ in parts)  # without padding

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the unmasked gradients to zero now, before ``engine.step`` computes their norm."""
        for part, frozen in self._parts:
            gradient = part.gradient()
            if gradient is not None:
                gradient.view(-1)[: part.size].masked_fill_(frozen.to(gradient.device), 0)
        super().mask_gradients()


def _flat_weights(zero: Any) -> list[torch.Tensor]:
    """The flat tensors that the optimizer steps, each the part of a group in this process."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        flat = getattr(zero, name, None)
        if flat is not None:
            break
    else:
        raise UsageError(
            f"freeze_zero is for an engine with ZeRO 1, 2 or 3, not with {type(zero).__name__}",
            hint="without ZeRO, freeze_unmasked(engine.module, engine.optimizer, ...) may do",
        )
    if getattr(zero, "offload_optimizer", False) or getattr(zero, "cpu_offload", False):
        raise UsageError("freeze_zero does not support offloaded optimizers")
    return list(flat)


def _parts(zero: Any) -> Iterator[_Part]:
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
        for group in zero.fp16_groups:
            for parameter in group:
                place, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                size = parameter.partition_numel()
                rank = torch.distributed.get_rank(parameter.ds_process_group)
                start = min(rank * size, parameter.ds_numel)  # the last parts may be padding
                yield _Part(parameter, place, offset, start, min(size, parameter.ds_numel - start))
    else:
        for place, group in enumerate(zero.bit16_groups):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # nothing of it is here
                    yield _Part(parameter, place, 0, 0, 0)
                else:
                    inside, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield _Part(parameter, place, inside.start, whole.start, whole.numel)
