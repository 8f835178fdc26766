"""Stages for whoever needs some, and what happens when memory runs out."""

from __future__ import annotations

import threading
from collections import Counter, deque

import torch

from ckdiff.errors import CkdiffError
from ckdiff.kernels.gpu.device import Device
from ckdiff.kernels.gpu.sizes import SMALLEST, Sizes
from ckdiff.kernels.gpu.staging import Stages

__all__ = ["HINT", "Pool", "failed", "out_of_memory"]

HINT = "run with --device cpu"


class Pool:
    """Lends stages to workers. Each time memory runs out, a generation of smaller ones begins.

    What a worker gave back is lent again, so memory is held for as many workers as there are at a
    time, and for none that has nothing to send.
    """

    def __init__(self, device: Device, sizes: Sizes, elements: int) -> None:
        """``elements`` of a piece, at first."""
        self.messages: deque[str] = deque()  #: warnings, to be taken out by whoever reports them
        self.gave_up = False  #: whether there are none any more
        self._device, self._sizes, self._elements = device, sizes, elements
        self._generation = 0
        self._idle: list[Stages] = []
        self._lent: Counter[int] = Counter()  # by generation
        self._changed = threading.Condition()

    def take(self) -> Stages | None:
        """Stages, to be given back; None where memory does not suffice. Raises what torch raises.

        Waits where others still hold larger ones and there is no memory besides.
        """
        while True:
            with self._changed:
                if self.gave_up:
                    return None
                generation, elements = self._generation, self._elements
                self._lent[generation] += 1
                if self._idle:
                    return self._idle.pop()
            try:
                return Stages(self._device, self._sizes, elements, generation)
            except RuntimeError as error:
                if not out_of_memory(error):
                    self._count_back(generation)
                    raise
            except BaseException:
                self._count_back(generation)
                raise
            self._make_room(generation)  # now that the error is gone, with what its frames held

    def give_back(self, stages: Stages) -> None:
        """Nothing may be on its way in them."""
        with self._changed:
            if stages.generation == self._generation and not self.gave_up:
                self._idle.append(stages)
            else:
                stages.release()  # before others are told that there is room
            self._count_back(stages.generation)

    def ran_out(self, stages: Stages) -> None:
        """Give back stages with which memory ran out. Nothing may be on its way in them."""
        generation = stages.generation
        stages.release()
        self._make_room(generation)

    def _make_room(self, generation: int) -> None:
        """Memory ran out in a generation: wait for larger pieces to end, or make them smaller."""
        with self._changed:
            self._count_back(generation)
            if generation == self._generation and not self.gave_up:
                if self._others_hold(generation):
                    self._changed.wait_for(lambda: not self._others_hold(generation))
                else:
                    self._shrink()
        self._device.drop_cache()

    def _others_hold(self, generation: int) -> bool:
        """Whether stages of an earlier generation are in use, which are larger."""
        return any(count and of < generation for of, count in self._lent.items())

    def _shrink(self) -> None:
        self._idle.clear()
        self._generation += 1
        if self._elements > SMALLEST:
            self._elements = max(self._elements // 2 // SMALLEST * SMALLEST, SMALLEST)
            then = "going on with smaller pieces"
        else:
            self.gave_up = True
            then = "comparing on the CPU from here on"
        self.messages.append(f"warning: {self._device.name} is out of memory: {then}")

    def _count_back(self, generation: int) -> None:
        with self._changed:
            self._lent[generation] -= 1
            self._changed.notify_all()


def failed(device: Device, error: RuntimeError) -> CkdiffError:
    """The error to raise for what a device's own says."""
    reason = str(error).partition("\n")[0]
    return CkdiffError(f"{device.name} failed: {reason}", hint=HINT)


def out_of_memory(error: RuntimeError) -> bool:
    """Pinned memory that cannot be had is an ordinary RuntimeError of CUDA's."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)
