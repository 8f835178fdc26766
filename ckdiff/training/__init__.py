"""Training only the weights that a mask names, and watching which ones training moves.

::

    from ckdiff.training import SubnetworkOptimizer, freeze_unmasked

    freeze = freeze_unmasked(model, optimizer, "run1.zarr")            # any torch optimizer
    optimizer = SubnetworkOptimizer(torch.optim.AdamW, model, "run1.zarr", lr=1e-5)  # small state

    from ckdiff.training import SubnetworkCallback, to_shira

    Trainer(..., callbacks=[SubnetworkCallback("run1.zarr")])          # Hugging Face, TRL
    model = to_shira(model, "run1.zarr")                               # a PEFT adapter

    from ckdiff.training import UpdateCallback, UpdateMonitor

    monitor = UpdateMonitor(model, every=100, log="updates.jsonl")     # monitor.step() in a loop
    trainer.add_callback(UpdateCallback(trainer))                      # in the trainer's own log

``ckdiff.training.optax`` is the same for JAX, and needs no torch. Everything is imported when it is
first used: torch, transformers and PEFT only by those who use them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckdiff.training.callback import SubnetworkCallback
    from ckdiff.training.compact import SubnetworkOptimizer
    from ckdiff.training.freezing import Freeze, freeze_unmasked
    from ckdiff.training.monitor import Look, UpdateMonitor
    from ckdiff.training.monitorcallback import UpdateCallback
    from ckdiff.training.names import parameter_masks
    from ckdiff.training.shira import load_shira, to_shira

_HOMES = {
    "Freeze": "ckdiff.training.freezing",
    "Look": "ckdiff.training.monitor",
    "SubnetworkCallback": "ckdiff.training.callback",
    "SubnetworkOptimizer": "ckdiff.training.compact",
    "UpdateCallback": "ckdiff.training.monitorcallback",
    "UpdateMonitor": "ckdiff.training.monitor",
    "freeze_unmasked": "ckdiff.training.freezing",
    "load_shira": "ckdiff.training.shira",
    "parameter_masks": "ckdiff.training.names",
    "to_shira": "ckdiff.training.shira",
}
#: what is imported from elsewhere -> the extra that brings it; None where no extra does
_EXTRAS = {"torch": "torch", "transformers": "train", "peft": None}

__all__ = [
    "Freeze",
    "Look",
    "SubnetworkCallback",
    "SubnetworkOptimizer",
    "UpdateCallback",
    "UpdateMonitor",
    "freeze_unmasked",
    "load_shira",
    "parameter_masks",
    "to_shira",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckdiff.training' has no attribute {name!r}")
    import importlib

    from ckdiff.errors import UsageError, install

    try:
        value = getattr(importlib.import_module(home), name)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        # ckdiff.training.names says it as well as anything that needs torch too
        what = "ckdiff.training" if package == "torch" else f"ckdiff.training.{name}"
        extra = _EXTRAS[package]
        hint = f"pip install {package}" if extra is None else install(extra)
        raise UsageError(f"{what} needs {package}", hint=hint) from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
