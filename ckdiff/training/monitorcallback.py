"""How far the weights have moved, in the log of the Trainers of Hugging Face and TRL."""

from __future__ import annotations

import os
from typing import Any

from transformers import Trainer, TrainerCallback

from ckdiff.checkpoints.opening import Given
from ckdiff.errors import UsageError, printable
from ckdiff.rules import Rule
from ckdiff.training.monitor import Look, UpdateMonitor, checked_every
from ckdiff.training.watching import Watch, checked_watch, is_spread
from ckdiff.training.watchingcopies import Keep, checked_keep


class UpdateCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not followed
    """Logs the density of the update while a Trainer trains.

    ``trainer.add_callback(UpdateCallback(trainer))`` is all you need. The numbers go through the
    Trainer's own ``log``, and so to W&B, TensorBoard and ``state.log_history``, as
    ``update/density``, ``update/density_since_last`` and ``update/density/MODULE``.

    It looks whenever the Trainer logs, or after every ``every`` steps, and after the last step. The
    start is the weights when training begins, or ``base``. A resumed run begins with the weights
    that it resumes from, so give it ``base``. The other arguments and the errors are those of
    ``UpdateMonitor``; ``train()`` raises those about the model, the base and the log.
    """

    def __init__(
        self,
        trainer: Trainer,
        base: Given | None = None,
        *,
        every: int | None = None,
        rule: str | Rule = "exact",
        watch: Watch = "trainable",
        since_last: bool = True,
        keep: Keep = "device",
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise UsageError(
                f"the callback needs the trainer, not {printable(type(trainer).__name__)[:60]}",
                hint="trainer.add_callback(UpdateCallback(trainer))",
            )
        self._trainer, self._base = trainer, base
        self._every = None if every is None else checked_every(every)
        # what is wrong with these is said before training
        self._options: dict[str, Any] = {
            "rule": Rule.parse(rule), "watch": checked_watch(watch), "since_last": since_last,
            "keep": checked_keep(keep), "log": log,
        }  # fmt: skip
        self._monitor: UpdateMonitor | None = None
        self._look: Look | None = None

    @property
    def look(self) -> Look | None:
        """What the last look found; None before the first, and in processes that do not look."""
        return self._look

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Called by the Trainer; raises what ``UpdateMonitor`` raises."""
        self._look = self._monitor = None
        # where all processes have the same weights, one of them looks
        if state.is_world_process_zero or is_spread(model):
            self._monitor = UpdateMonitor(model, self._base, **self._options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer; raises what ``UpdateMonitor.look`` raises."""
        due = control.should_log if self._every is None else state.global_step % self._every == 0
        if due or control.should_training_stop:
            self._look_at(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer, which may log here; raises what ``UpdateMonitor.look`` raises."""
        if self._every is None and control.should_log:
            self._look_at(state.global_step)

    def _look_at(self, step: int) -> None:
        if self._monitor is None or (self._look is not None and self._look.step == step):
            return
        self._look = self._monitor.look(step)
        # not the log of a subclass: that of TRL's trainers hands over what they have gathered
        Trainer.log(self._trainer, self._look.metrics())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer: frees the copies."""
        self._monitor = None
