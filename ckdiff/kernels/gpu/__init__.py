"""The kernels once more, on a GPU. torch and Triton are imported by who opens a device.

The interface is that of :class:`ckdiff.kernels.Kernels`, and so are the bits: see
:mod:`ckdiff.kernels.gpu.kernels`.
"""

from __future__ import annotations

import importlib
import re
import warnings
from typing import TYPE_CHECKING

from ckdiff.errors import UsageError, install

if TYPE_CHECKING:
    from ckdiff.kernels.gpu.device import Device

__all__ = ["open_device"]

_HINT = "leave out --device, or use --device auto"
_OLDEST = 3, 6  # of Triton, which compiles this code: 3.5 does not. As in pyproject.toml


def open_device(name: str) -> Device:
    """The GPU that torch would use for ``cuda`` and ``auto``. Raises UsageError without one.

    ``torch-cpu`` is for tests: everything as on a GPU, but on torch's CPU device.
    """
    _need("torch", "torch")
    import torch

    from ckdiff.kernels.gpu.device import Device

    if name == "torch-cpu":
        return Device(torch.device("cpu"), "torch's CPU")
    with warnings.catch_warnings(record=True) as said:  # such as that the driver is too old
        warnings.simplefilter("always")
        found = torch.cuda.is_available()
    if not found:
        reasons = [_first_line(warning.message) for warning in said]
        if torch.version.cuda is None:
            reasons = [f"torch {torch.__version__} was built without it"]
        raise UsageError(": ".join(["no GPU with CUDA was found", *reasons[:1]]), hint=_HINT)
    try:
        # the index, because a new thread has another current device than the caller may have chosen
        index = torch.cuda.current_device()
        device = Device(torch.device("cuda", index), torch.cuda.get_device_name(index))
        # a card for which torch has no code, and one that is lost, say so at the first operation
        (torch.zeros(512, dtype=torch.int16, device=device.device) != 0).sum().item()
    except RuntimeError as error:  # CUDA's own, such as that another process has it for itself
        raise UsageError(f"the GPU cannot be used: {_first_line(error)}", hint=_HINT) from error
    _need_triton()
    return device


def _need_triton() -> None:
    """A GPU's code is written in it. Raises UsageError where it is missing, fails or is too old."""
    _need("Triton", "triton")
    import triton

    found = triton.__version__
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < _OLDEST:
        raise UsageError(
            f"a GPU is used through Triton {_OLDEST[0]}.{_OLDEST[1]} or newer, and this is {found}",
            hint=f"{install('gpu')}, or {_HINT}",
        )
    _need("Triton", "ckdiff.kernels.gpu.fused")


def _need(name: str, module: str) -> None:
    """Import what a GPU is used through. Raises UsageError where it is missing or fails."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it is
        reason, hint = f"cannot be imported: {_first_line(error)}", _HINT
        missing = (isinstance(error, ModuleNotFoundError) and error.name) or ""
        if missing.partition(".")[0] == name.lower():
            reason, hint = "is not installed", f"{install('gpu')}, or {_HINT}"
        raise UsageError(f"a GPU is used through {name}, which {reason}", hint=hint) from error


def _first_line(error: object) -> str:
    return str(error).partition("\n")[0]
