"""Schemes of quantisation: what lies in a file, and its values by numpy and ml_dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import naive_values as twin
import numpy as np
import numpy.typing as npt
from support import Tensor

Floats = npt.NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass
class Scheme:
    """What lies in a file, and the values that it stands for."""

    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Floats] = field(default_factory=dict)

    def add(self, name: str, dtype: str, shape: Shape) -> npt.NDArray[np.uint8]:
        """A tensor of any bits at all."""
        rng = np.random.default_rng([self.seed, len(self.tensors)])
        width = {"F32": 4, "BF16": 2, "F16": 2}.get(dtype, 1)
        count = int(np.prod(shape)) * width // (2 if dtype == "F4" else 1)
        data = rng.integers(0, 256, count, np.uint8)
        self.tensors[name] = dtype, shape, data.tobytes()
        return data

    def scales(self, name: str, dtype: str, shape: Shape) -> Floats:
        """Scales near one, or any power of two, as numbers."""
        rng = np.random.default_rng([self.seed, len(self.tensors)])
        if dtype in ("U8", "F8_E8M0"):
            data = rng.integers(0, 256, int(np.prod(shape)), np.uint8)
            exponents = np.where(data == 255, 0, data.astype(np.int32) - 127)
            found = np.ldexp(np.float32(1), exponents).astype(np.float32)
            found[data == 255] = np.nan
            self.tensors[name] = dtype, shape, data.tobytes()
            return found.reshape(shape)
        numbers = (rng.standard_normal(shape) * 0.01).astype(twin.LIBRARY[dtype])
        self.tensors[name] = dtype, shape, np.asarray(numbers).tobytes()
        return np.asarray(numbers, np.float32).reshape(shape)

    def eight(self, name: str, dtype: str, shape: Shape) -> Floats:
        data = self.add(name, dtype, shape)
        found: Floats = data.view(twin.LIBRARY[dtype]).astype(np.float32)
        return found.reshape(shape)

    def four(self, name: str, dtype: str, shape: Shape, stored: Shape) -> Floats:
        """``shape`` values, the low half of a byte first."""
        data = self.add(name, dtype, stored)
        return twin.F4[np.stack([data & 15, data >> 4], -1).reshape(-1)].reshape(shape)

    def product(self, name: str, elements: Floats, scales: Floats) -> None:
        """``scales`` are repeated so far that they have the shape of the elements."""
        with np.errstate(all="ignore"):
            self.values[name] = np.asarray(elements * scales, np.float32)


def spread(scales: Floats, block: tuple[int, int], shape: Shape) -> Floats:
    """Scales of blocks, one for each element of a stack of matrices."""
    wide = scales.repeat(block[0], -2).repeat(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def blocks(
    shape: Shape, block: tuple[int, int], *, of: str = "F32", name: str = "", dtype: str = "F8_E4M3"
) -> Callable[[Scheme], None]:
    def make(scheme: Scheme) -> None:
        grid = *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
        held = scheme.eight("x.weight", dtype, shape)
        scales = scheme.scales(name or "x.weight_scale_inv", of, grid)
        scheme.product("x.weight", held, spread(scales, block, shape))

    return make


def spreading(
    shape: Shape, of: Shape, as_of: Shape, *, dtype: str = "F8_E4M3", scale: str = "F32",
    names: tuple[str, str] = ("x.weight", "x.weight_scale"),
) -> Callable[[Scheme], None]:  # fmt: skip
    """Scales of the shape ``of`` that numpy broadcasts as ``as_of``."""

    def make(scheme: Scheme) -> None:
        held = scheme.eight(names[0], dtype, shape)
        scheme.product(names[0], held, scheme.scales(names[1], scale, of).reshape(as_of))

    return make


def packed(shape: Shape, held: str, of: str, names: tuple[str, str, str]) -> Callable[..., None]:
    """FP4 in groups of 32 of a row: of what is stored, of its scales, and of the values."""

    def make(scheme: Scheme) -> None:
        stored = shape if held == "F4" else (*shape[:-1], shape[-1] // 2)
        elements = scheme.four(names[0], held, shape, stored)
        scales = scheme.scales(names[1], of, (*shape[:-1], shape[-1] // 32))
        scheme.product(names[2], elements, scales.repeat(32, -1))

    return make


def grouped(
    shape: Shape, of: str, *, turned: bool = False, dot: str = "_"
) -> Callable[[Scheme], None]:
    """(..., groups, 16) bytes, as gpt-oss has them."""

    def make(scheme: Scheme) -> None:
        stored = *shape[:-1], shape[-1] // 32, 16
        elements = scheme.four(f"mlp.up_proj{dot}blocks", "U8", shape, stored)
        scales = scheme.scales(f"mlp.up_proj{dot}scales", of, stored[:-1]).repeat(32, -1)
        scheme.product("mlp.up_proj", elements, scales)
        if turned:
            found = scheme.values["mlp.up_proj"].swapaxes(1, 2)
            scheme.values["mlp.up_proj"] = np.ascontiguousarray(found)

    return make


_WEIGHT = "x.weight", "x.weight_scale", "x.weight"
_PACKED = "x.weight_packed", "x.weight_scale", "x.weight"

SCHEMES: dict[str, Callable[[Scheme], None]] = {
    "128 x 128": blocks((300, 200), (128, 128)),
    "128 x 128, smaller than one": blocks((64, 100), (128, 128)),
    "128 x 128, BF16": blocks((130, 520), (128, 128), of="BF16"),
    "128 x 128, E8M0": blocks((256, 256), (128, 128), of="F8_E8M0", name="x.scale"),
    "128 x 128, powers in plain bytes": blocks((256, 256), (128, 128), of="U8"),
    "128 x 128, a stack": blocks((3, 300, 200), (128, 128)),
    "128 x 128, E5M2": blocks((300, 200), (128, 128), dtype="F8_E5M2", name="x.qscale_weight"),
    "64 x 64": blocks((128, 192), (64, 64), name="x.weight_scale"),
    "MX of 8 bits": blocks((40, 96), (1, 32), of="F8_E8M0", name="x.weight_scale"),
    "MX of 8 bits, in plain bytes": blocks((40, 96), (1, 32), of="U8"),
    "MX of 8 bits, a stack": blocks((3, 40, 96), (1, 32), of="U8", dtype="F8_E5M2"),
    "groups of integers": blocks((40, 256), (1, 128), dtype="I8", name="x.weight_scale"),
    "a tensor": spreading((30, 20), (), ()),
    "a tensor, [1]": spreading((30, 20), (1,), (1,), scale="BF16"),
    "a tensor, [1, 1]": spreading((30, 20), (1, 1), (1, 1), dtype="F8_E5M2"),
    "a tensor, a scaled file": spreading((30, 20), (), (), names=("x.weight", "x.scale_weight")),
    "a tensor of one dimension": spreading((30,), (), ()),
    "a tensor without dimensions": spreading((), (), ()),
    "a row": spreading((30, 20), (30, 1), (30, 1)),
    "a row, [R]": spreading((30, 20), (30,), (30, 1), scale="F16"),
    "a row of a square, [R]": spreading((30, 30), (30,), (30, 1)),
    "a row, integers": spreading((30, 20), (30, 1), (30, 1), dtype="I8", scale="BF16"),
    "a row, FNUZ": spreading((30, 20), (30, 1), (30, 1), dtype="F8_E4M3FNUZ"),
    "a row of a stack": spreading((3, 30, 20), (3, 30, 1), (3, 30, 1)),
    "a row of a stack, [E, R]": spreading((3, 30, 20), (3, 30), (3, 30, 1)),
    "a matrix of a stack": spreading((3, 30, 20), (3,), (3, 1, 1)),
    "a matrix of a stack, [E, 1, 1]": spreading((3, 30, 20), (3, 1, 1), (3, 1, 1)),
    "a column": spreading((30, 20), (1, 20), (1, 20)),
    "a column of a stack": spreading(
        (3, 30, 20), (3, 1, 20), (3, 1, 20), names=("mlp.gate_up_proj", "mlp.gate_up_proj_scale")
    ),
    "experts of FBGEMM": spreading(
        (3, 30, 20), (3, 20, 1), (3, 1, 20), names=("mlp.down_proj", "mlp.down_proj_scale")
    ),
    "kernels of a convolution": spreading((8, 4, 3, 3), (8, 1, 1, 1), (8, 1, 1, 1)),
    "FP4, U8": packed((30, 96), "U8", "U8", _WEIGHT),
    "FP4, U8 and E8M0": packed((30, 96), "U8", "F8_E8M0", _PACKED),
    "FP4, I8": packed((30, 96), "I8", "F8_E8M0", ("x.weight", "x.scale", "x.weight")),
    "FP4, I8, a stack": packed((3, 30, 32), "I8", "U8", _WEIGHT),
    "FP4, F4": packed((30, 96), "F4", "F8_E8M0", _WEIGHT),
    "groups": grouped((30, 96), "U8"),
    "groups, untold": grouped((3, 40, 96), "U8", dot="."),
    "groups, turned": grouped((3, 40, 96), "U8", turned=True),
    "groups, turned, E8M0": grouped((2, 5, 320), "F8_E8M0", turned=True),
    "groups, a row turned": grouped((2, 1, 64), "U8", turned=True),
}  # fmt: skip

#: what stays as it is beside them, odd places before what is scaled
BESIDE: dict[str, Tensor] = {
    "a.odd": ("U8", (7,), b"seven!!"),
    "z.input_scale": ("F32", (), b"abcd"),
    "z.norm.weight": ("BF16", (3,), b"sixsix"),
}


def made(make: Callable[[Scheme], None], seed: int = 0) -> Scheme:
    scheme = Scheme(seed)
    scheme.tensors["a.odd"] = BESIDE["a.odd"]
    make(scheme)
    scheme.tensors |= BESIDE
    return scheme


def as_bytes(values: Floats) -> bytes:
    """One NaN for all."""
    found = values.reshape(-1).view(np.uint32).copy()
    found[np.isnan(values.reshape(-1))] = 0x7FC00000
    return found.tobytes()


def contents(scheme: Scheme) -> dict[str, bytes]:
    beside = {name: data for name, (_, _, data) in BESIDE.items()}
    return beside | {name: as_bytes(values) for name, values in scheme.values.items()}
