"""The kernels once more, as torch operations on a GPU. torch is imported by who opens a device.

The interface is that of :class:`ckdiff.kernels.Kernels`, and so are the bits: see
:mod:`ckdiff.gpu.kernels`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ckdiff.errors import UsageError

if TYPE_CHECKING:
    from ckdiff.gpu.staging import Device

__all__ = ["open_device"]

_HINT = "leave out --device, or use --device auto"


def open_device(name: str) -> Device:
    """The GPU that torch would use for ``cuda`` and ``auto``. Raises UsageError without one.

    ``torch-cpu`` is for tests: everything as on a GPU, but on torch's CPU device.
    """
    try:
        import torch
    except ImportError:
        raise UsageError(
            "a GPU is used through torch, which is not installed",
            hint=f"pip install 'ckdiff[torch]', or {_HINT}",
        ) from None
    from ckdiff.gpu.staging import Device

    if name == "torch-cpu":
        return Device(torch.device("cpu"), "torch's CPU")
    with warnings.catch_warnings(record=True) as said:  # such as that the driver is too old
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        reasons = [str(warning.message).partition("\n")[0] for warning in said]
        if torch.version.cuda is None:
            reasons = [f"torch {torch.__version__} was built without it"]
        raise UsageError(": ".join(["no GPU with CUDA was found", *reasons[:1]]), hint=_HINT)
    try:
        # the index, because a new thread has another current device than the caller may have chosen
        index = torch.cuda.current_device()
        return Device(torch.device("cuda", index), torch.cuda.get_device_name(index))
    except RuntimeError as error:  # CUDA's own, such as that another process has it for itself
        reason = str(error).partition("\n")[0]
        raise UsageError(f"the GPU cannot be used: {reason}", hint=_HINT) from error
