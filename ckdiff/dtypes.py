"""The dtypes a safetensors file can hold: width, kind, and how a float's bits are laid out.

The kernels need nothing but this table: a new 8-bit float is a new row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "int", "uint", "raw"]
Special = Literal["ieee", "fn", "fnuz"]


@dataclass(frozen=True, slots=True)
class DType:
    """One element type of the format."""

    name: str  #: the safetensors name, such as ``BF16``
    bits: int  #: bits of one element; 4 and 6 are packed little-endian
    kind: Kind  #: ``raw`` types (bool, complex, sub-byte, scales) only know ``exact``
    exponent: int = 0  #: exponent bits of a float
    mantissa: int = 0  #: mantissa bits of a float
    bias: int = 0  #: exponent bias of a float
    #: what the bit patterns at the top mean: ``ieee`` infinities and NaNs, ``fn`` only the
    #: all-ones pattern is NaN, ``fnuz`` only the negative zero's pattern is NaN
    special: Special = "ieee"

    @property
    def numeric(self) -> bool:
        """Whether the numeric rules (atol, rtol, ulp) have a meaning here."""
        return self.kind != "raw"

    def holds(self, other: DType) -> bool:
        """Whether every number of another float is one of this float, an IEEE one, too."""
        if self.kind != "float" or other.kind != "float" or self.special != "ieee":
            return False
        return (
            self.mantissa >= other.mantissa
            and self._highest >= other._highest
            and self._lowest <= other._lowest
        )

    @property
    def _highest(self) -> int:
        """The exponent of a float's largest numbers."""
        return (1 << self.exponent) - (2 if self.special == "ieee" else 1) - self.bias

    @property
    def _lowest(self) -> int:
        """The exponent of a float's smallest subnormal number."""
        return 1 - self.bias - self.mantissa

    def nbytes(self, elements: int) -> int | None:
        """Bytes of ``elements`` packed elements, or None where they do not fill whole bytes."""
        whole, rest = divmod(elements * self.bits, 8)
        return None if rest else whole


_ALL = (
    DType("BOOL", 8, "raw"),
    DType("F4", 4, "raw"),
    DType("F6_E2M3", 6, "raw"),
    DType("F6_E3M2", 6, "raw"),
    DType("U8", 8, "uint"),
    DType("I8", 8, "int"),
    DType("F8_E5M2", 8, "float", 5, 2, 15, "ieee"),
    DType("F8_E4M3", 8, "float", 4, 3, 7, "fn"),
    DType("F8_E8M0", 8, "raw"),
    DType("F8_E4M3FNUZ", 8, "float", 4, 3, 8, "fnuz"),
    DType("F8_E5M2FNUZ", 8, "float", 5, 2, 16, "fnuz"),
    DType("I16", 16, "int"),
    DType("U16", 16, "uint"),
    DType("F16", 16, "float", 5, 10, 15, "ieee"),
    DType("BF16", 16, "float", 8, 7, 127, "ieee"),
    DType("I32", 32, "int"),
    DType("U32", 32, "uint"),
    DType("F32", 32, "float", 8, 23, 127, "ieee"),
    DType("C64", 64, "raw"),
    DType("F64", 64, "float", 11, 52, 1023, "ieee"),
    DType("I64", 64, "int"),
    DType("U64", 64, "uint"),
)

#: every dtype of the format by its safetensors name
DTYPES: dict[str, DType] = {d.name: d for d in _ALL}

#: what floats of two dtypes are widened to, the first that holds both
_COMMON = ("F16", "BF16", "F32", "F64")


def common(one: str, other: str) -> str | None:
    """The smallest of F16, BF16, F32 and F64 that holds two float dtypes without loss, by name.

    F16 comes before BF16 where both would do. None where values are not compared: integers, scales
    and elements of less than a byte have no such type, and what is no dtype has none.
    """
    pair = [DTYPES[name] for name in (one, other) if name in DTYPES]
    if len(pair) < 2:
        return None
    return next((name for name in _COMMON if all(map(DTYPES[name].holds, pair))), None)
