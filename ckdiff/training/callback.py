"""Training only a subnetwork with the Trainers of Hugging Face transformers and TRL."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback

from ckdiff.errors import UsageError
from ckdiff.rules import Rule
from ckdiff.training.freezing import Freeze, freeze_unmasked
from ckdiff.training.names import Missing
from ckdiff.training.source import Masks


class SubnetworkCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Keeps the unmasked weights frozen while a Trainer trains.

    ``Trainer(..., callbacks=[SubnetworkCallback("run1.zarr")])`` is all you need. When training
    begins, it calls ``freeze_unmasked`` on the Trainer's model and optimizer, so the optimizer's
    own step hooks do the work. Unmasked gradients are set to zero as soon as they exist, so
    clipping and the logged norm are those of the subnetwork. When training ends, both stop.
    ``store``, ``rule`` and ``missing`` are those of ``freeze_unmasked``. So are the errors, which
    ``train()`` raises.
    """

    def __init__(
        self, store: Masks, *, rule: str | Rule | None = None, missing: Missing = "error"
    ) -> None:
        self._store = store
        self._rule = rule
        self._missing: Missing = missing
        self._freeze: Freeze | None = None

    @property
    def freeze(self) -> Freeze | None:
        """The freeze, while training goes on."""
        return self._freeze

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Called by the Trainer; raises UsageError, PairingError, StoreError."""
        self._stop()  # training that raised did not end, and a smaller batch size begins again
        self._freeze = freeze_unmasked(
            model, _inner(optimizer), self._store, rule=self._rule, missing=self._missing
        )
        # A Trainer clips gradients before it calls on_pre_optimizer_step, and calls nothing between
        # the last backward pass and that.
        self._freeze.mask_gradients_early()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        self._stop()

    def _stop(self) -> None:
        if self._freeze is not None:
            self._freeze.remove()
        self._freeze = None


def _inner(optimizer: Any) -> Optimizer:
    """The optimizer in Accelerate's wrapper, which runs no step hooks of its own."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, Optimizer):
        return inner
    found = f"{type(optimizer).__name__} around {type(inner).__name__}"
    raise UsageError(
        "the Trainer has no torch optimizer when training begins, but"
        f" {'none' if optimizer is None else found}",
        hint="use DDP or FSDP2, or with DeepSpeed ckdiff.training.deepspeed.freeze_zero",
    )
