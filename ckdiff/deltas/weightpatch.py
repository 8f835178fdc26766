"""Updates of single tensors as records, the shape of vLLM's ``CheckpointWeightPatch``.

What vLLM's loader asks of them decides what is given: positions and values only for floating-point
tensors and only where no value is NaN, since NaN is what it marks unchanged elements by; the whole
tensor otherwise. Several records of one tensor are applied in their order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckdiff.deltas.parts import called
from ckdiff.deltas.streams import Bits, Positions
from ckdiff.dtypes import DTYPES, DType
from ckdiff.errors import PairingError, UsageError, printable

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_NUMPY = {
    "BOOL": "?", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


class WeightPatch(NamedTuple):
    """An update of one tensor, with the fields of vLLM's ``CheckpointWeightPatch``, in order.

    ``CheckpointWeightPatch(*patch)`` converts a record that has torch tensors.
    """

    name: str
    shape: tuple[int, ...]  #: of the whole tensor
    #: safetensors' name, such as ``"BF16"``; a torch.dtype with torch's tensors
    dtype: Any
    #: one dimension: the elements at ``indices``, or all of the tensor. In numpy a dtype that it
    #: does not know is unsigned numbers with its bits: uint16 for BF16, uint8 for those of 8 bits
    values: Any
    #: one dimension, int32 (int64 for tensors of 2**31 elements or more), ascending; or None
    indices: Any = None


def make_patch(
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    values: Bits,
    indices: Positions | None,
    *,
    as_torch: bool,
) -> WeightPatch:
    """A record of elements given as bits (bytes, where elements are less than that)."""
    if not as_torch:
        return WeightPatch(
            name, shape, dtype, values.view(_NUMPY.get(dtype, values.dtype)), indices
        )
    import torch

    kind = torch_dtype(dtype)
    tensor = torch.from_numpy(values.view(np.uint8)).view(kind)
    return WeightPatch(
        name, shape, kind, tensor, None if indices is None else torch.from_numpy(indices)
    )


def torch_dtype(dtype: str) -> Any:
    """Torch's dtype for a safetensors name; raises UsageError where it has none."""
    import torch

    found = getattr(torch, _TORCH.get(dtype, ""), None)
    if found is None:
        raise UsageError(
            f"this torch has no dtype for single elements of {dtype}", hint="leave out as_torch"
        )
    return found


def sparse(dtype: DType) -> bool:
    """Whether records of a tensor may hold single elements."""
    return dtype.kind == "float"


def has_nan(dtype: DType, bits: Bits) -> bool:
    """Whether one of the elements with these bits is no number."""
    sign = 1 << dtype.bits - 1
    if dtype.special == "fnuz":
        return bool((bits == sign).any())
    exponent = ((1 << dtype.exponent) - 1) << dtype.mantissa
    magnitude = bits & bits.dtype.type(sign - 1)
    if dtype.special == "fn":
        return bool((magnitude == sign - 1).any())
    return bool((magnitude > exponent).any())


class Read(NamedTuple):
    """A record that was checked."""

    tensor: int  #: its position among those of the base
    positions: npt.NDArray[np.int64] | None  #: ascending, or None for the whole tensor
    values: npt.NDArray[np.uint8]  #: the bytes of the elements


class PatchReader:
    """Checks records, WeightPatch or anything with its fields, against a checkpoint's tensors."""

    def __init__(self, names: list[str], dtypes: list[str], shapes: list[tuple[int, ...]]) -> None:
        self._where = {name: i for i, name in enumerate(names)}
        self._dtypes, self._shapes = dtypes, shapes

    def read(self, patch: Any) -> Read:
        """Check one. Raises UsageError for what is no record, PairingError for one that does not
        fit.
        """
        try:
            name, shape, dtype = patch.name, tuple(patch.shape), patch.dtype
            values, indices = patch.values, patch.indices
        except (AttributeError, TypeError):
            raise UsageError(
                f"a patch has name, shape, dtype, values, indices; {type(patch).__name__} has not"
            ) from None
        tensor = self._where.get(name, -1) if isinstance(name, str) else -1
        shown = called(str(name))
        if tensor < 0:
            raise _unfit(f"the base has no {shown}")
        stored = self._dtypes[tensor]
        if shape != self._shapes[tensor]:
            raise _unfit(f"{shown} is {list(self._shapes[tensor])} in the base, not {list(shape)}")
        if dtype != stored and str(dtype) != f"torch.{_TORCH.get(stored)}":
            raise _unfit(f"{shown} is {stored} in the base, not {printable(str(dtype))}")
        data = _bytes(shown, "values", values, stored)
        size = DTYPES[stored].nbytes(math.prod(shape))
        if indices is None:
            if len(data) != size:
                raise _unfit(f"{shown} has {len(data):,} bytes, and the patch of all {size:,}")
            return Read(tensor, None, data)
        if DTYPES[stored].bits < 8:
            raise _unfit(f"{shown} is {stored}, whose single elements cannot be patched")
        positions = _positions(shown, indices)
        if len(data) * 8 != len(positions) * DTYPES[stored].bits:
            raise _unfit(f"{len(positions):,} indices and another number of values for {shown}")
        if (positions[1:] <= positions[:-1]).any():
            order = np.argsort(positions, kind="stable")
            positions = positions[order]
            data = data.reshape(len(positions), -1)[order].reshape(-1)
            if (positions[1:] == positions[:-1]).any():
                raise _unfit(f"the same index twice for {shown}")
        if len(positions) and not 0 <= positions[0] <= positions[-1] < math.prod(shape):
            raise _unfit(f"an index for {shown} is out of range")
        return Read(tensor, positions, data)


def _array(shown: str, what: str, value: Any) -> npt.NDArray[Any]:
    """A numpy array of one dimension; torch's tensors of dtypes that numpy lacks become bytes."""
    array = None
    if type(value).__module__.partition(".")[0] != "torch":
        array = np.asarray(value)
    elif value.ndim == 1:
        array = _of_torch(shown, what, value)
    if array is None or array.ndim != 1:
        raise _unfit(f"the {what} of {shown} must have one dimension")
    return array


def _of_torch(shown: str, what: str, value: Any) -> npt.NDArray[Any]:
    import torch

    try:
        value = value.detach().cpu().resolve_conj().resolve_neg()
        if value.stride(0) != 1:  # one element counts as contiguous however far the next would be
            value = value.clone(memory_format=torch.contiguous_format)
        if value.dtype not in (torch.int32, torch.int64):
            value = value.view(torch.uint8)
        array: npt.NDArray[Any] = value.numpy()
    except (RuntimeError, NotImplementedError, TypeError):  # sparse, meta, quantized
        raise _unfit(f"the {what} of {shown} are a tensor without plain data") from None
    return array


def _bytes(shown: str, what: str, value: Any, dtype: str) -> npt.NDArray[np.uint8]:
    """The bytes of values that are of ``dtype``, or its bits; nothing is converted."""
    array = np.ascontiguousarray(_array(shown, what, value))
    given, bits = str(getattr(value, "dtype", array.dtype)), DTYPES[dtype].bits
    plain = f"<u{max(bits // 8, 1)}"
    if given.startswith("torch."):
        fits = given in (f"torch.{_TORCH.get(dtype)}", f"torch.uint{max(bits, 8)}")
    else:  # ml_dtypes' arrays are called what torch's are
        fits = array.dtype in (np.dtype(_NUMPY.get(dtype, plain)), np.dtype(plain))
        fits = fits or given == _TORCH.get(dtype)
    if not fits:
        raise _unfit(f"{shown} is {dtype}, and the patch has {printable(given)}")
    return array.view(np.uint8)


def _positions(shown: str, value: Any) -> npt.NDArray[np.int64]:
    array = _array(shown, "indices", value)
    if array.dtype.kind != "i" or array.dtype.itemsize not in (4, 8):
        raise _unfit(f"the indices of {shown} must be int32 or int64")
    return array.astype(np.int64)


def _unfit(problem: str) -> PairingError:
    return PairingError(f"the patch does not fit: {problem}", hint="give the patches of this base")
