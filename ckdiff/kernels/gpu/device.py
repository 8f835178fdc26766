"""A device of torch's: its memory, streams and events."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

import torch

from ckdiff.errors import CkdiffError

__all__ = ["HINT", "Device", "failed", "out_of_memory"]

HINT = "run with --device cpu"


class Device:
    """A torch device and the stream on which it compares."""

    def __init__(self, device: torch.device, name: str) -> None:
        self.device = device
        self.name = name  #: for people, such as ``NVIDIA H100``
        self.cuda = device.type == "cuda"
        #: whether Triton is used; torch's CPU does without, unless Triton interprets its code
        self.fused = self.cuda or os.environ.get("TRITON_INTERPRET") == "1"
        self.lock = threading.Lock()  #: held while work is handed to ``comparing``
        # before copies where both are ready; and torch hands out its streams in turn, 32 of each
        # priority, so that no worker's copies end up in this one
        self.comparing: Any = self.new_stream(priority=-1)

    def new_stream(self, priority: int = 0) -> Any:
        """A stream that first waits for what its memory may have been used for; None on a CPU."""
        if not self.cuda:
            return None
        stream: Any = torch.cuda.Stream(self.device, priority=priority)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return stream

    def new_event(self) -> Any:
        """An event to wait for without spinning, as other workers want the core; None on a CPU."""
        if not self.cuda:
            return None
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def on(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Work goes to this stream inside the ``with``."""
        return torch.cuda.stream(stream) if self.cuda else contextlib.nullcontext()

    def pinned(self, size: int) -> torch.Tensor:
        """uint8 (size,) of host memory that a GPU can copy by itself."""
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.cuda)

    def memory(self, size: int) -> torch.Tensor:
        """uint8 (size,) on the device."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def drop_cache(self) -> None:
        """Give back memory that torch keeps for later, on the device and pinned."""
        if self.cuda:
            torch.cuda.empty_cache()
            getattr(torch._C, "_host_emptyCache", lambda: None)()


def failed(device: Device, error: RuntimeError) -> CkdiffError:
    """The error to raise for what a device's own says."""
    reason = str(error).partition("\n")[0]
    return CkdiffError(f"{device.name} failed: {reason}", hint=HINT)


def out_of_memory(error: RuntimeError) -> bool:
    """Pinned memory that cannot be had is an ordinary RuntimeError of CUDA's."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error)
