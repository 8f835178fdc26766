"""Reading quantised tensors by value, span by span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ckdiff.checkpoints.asked import Asked
from ckdiff.checkpoints.copying import columns_of
from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.checkpoints.views.blockscaleturned import Turning
from ckdiff.checkpoints.views.quantised import Scaled
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import BLOCK
from ckdiff.kernels.memory import Bytes, bytes_at, enough
from ckdiff.kernels.scaling import Recipe, Scaling, scaled, table

_SPARE = 16  # scales beyond one for each element that a part may need
_FLOAT = 4  # bytes of a value
#: bytes besides the values: of those of a block, and of recipes
SCRATCH = 1 << 20


@dataclass(frozen=True, slots=True)
class _Part:
    """Elements of one tensor that are scaled together."""

    scaling: Scaling
    first: int
    stop: int
    low: int  #: the first of the scales that are asked for
    request: int  #: which of what is acquired are the elements; the scales follow

    def recipe(self, held: Mapping[int, Bytes]) -> Recipe:
        """How they are, with what was asked for in hand."""
        elements, scales = held[self.request], held[self.request + 1]
        return scaled(elements, self.scaling, self.first, self.stop - self.first, scales, self.low)


@dataclass(frozen=True, slots=True)
class _Made:
    """The values [first, stop) of a tensor, of which a span wants all or most."""

    span: int
    how: Scaled
    first: int
    stop: int
    skipped: int  #: bytes before the span
    nbytes: int  #: of the span
    parts: tuple[_Part, ...]  #: none where it is turned

    @property
    def whole(self) -> bool:
        """Whether the span has all of the values, and nothing else."""
        return self.nbytes == _FLOAT * (self.stop - self.first)

    @property
    def room(self) -> int:
        """Bytes of a buffer for them."""
        return -(-_FLOAT * (self.stop - self.first) // 64) * 64


_How = tuple[_Made, list[Recipe]]


@dataclass(slots=True)
class Wanted:
    """What a window asks of the inner reader, and what is made of it then."""

    requests: list[tuple[int, int, int]]  #: tensor, first byte, bytes
    straight: list[tuple[int, int]]  #: (span, request) of those that are read where they are
    made: list[_Made]

    @property
    def columns(self) -> tuple[IntArray, IntArray, IntArray]:
        return columns_of(self.requests)


class ScaledReader:
    """A SpanReader; one for each worker.

    ``inner`` reads what is held until the release; ``aside``, given where there are turned tensors,
    another reader of the same, reads those, of which nothing is held.
    """

    def __init__(
        self,
        within: IntArray,
        scaled: Mapping[int, Scaled],
        inner: SpanReader,
        aside: SpanReader | None,
    ) -> None:
        self._within, self._scaled = within, scaled
        self._inner, self._aside = inner, aside
        self._lazy = False
        self._turning = None if aside is None else Turning(aside)
        self._values = self._room = np.empty(0, np.uint8)
        self._recipes = np.empty((0, 0), np.int64)
        self._coming = Asked[Wanted]()

    def give_recipes(self) -> None:
        """From now on do not make values, but say how, for the driver of the kernels: what is made
        has, in place of an address, the negative one of its recipes. They are good for one walk.
        """
        self._lazy = True

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. Values are in a buffer of this reader."""
        wanted = self._coming.take(tensors, starts, nbytes)
        if wanted is None:
            wanted = self._wanted(tensors, starts, nbytes)
        columns = wanted.columns
        found, sizes = self._inner.acquire(*columns).tolist(), columns[2].tolist()
        addresses = np.zeros(len(tensors), np.int64)
        for span, request in wanted.straight:
            addresses[span] = found[request]
        if wanted.made:
            held = {
                request: bytes_at(found[request], sizes[request])
                for made in wanted.made
                for part in made.parts
                for request in (part.request, part.request + 1)
            }
            soon: list[_How] = []
            late: list[_How] = []
            for made, recipes in zip(wanted.made, self._recipes_of(wanted.made, held), strict=True):
                (late if self._lazy and made.whole else soon).append((made, recipes))
            self._make(soon, addresses)
            self._tell(late, addresses)
        return addresses

    def _recipes_of(self, wanted: list[_Made], held: Mapping[int, Bytes]) -> list[list[Recipe]]:
        """How values are made of the parts that are held, and of what is read aside."""
        window = sum(made.nbytes for made in wanted)
        if self._turning is not None:
            self._turning.begin()
        recipes = []
        for made in wanted:
            if made.parts:
                recipes.append([part.recipe(held) for part in made.parts])
                continue
            assert self._turning is not None
            recipes.append(self._turning.recipes(made.how, made.first, made.stop, window))
        return recipes

    def _make(self, wanted: list[_How], addresses: IntArray) -> None:
        """Make values, and note where they are."""
        self._values = enough(self._values, sum(made.room for made, _ in wanted))
        rest = self._values
        for made, recipes in wanted:
            addresses[made.span] = rest.ctypes.data + made.skipped
            out = rest
            for recipe in recipes:
                recipe.make(out)
                out = out[_FLOAT * recipe.values :]
            rest = rest[made.room :]

    def _tell(self, wanted: list[_How], addresses: IntArray) -> None:
        """Note where recipes are."""
        if wanted:
            self._room = enough(self._room, _FLOAT * BLOCK)
            self._recipes = table(
                [recipe for _, recipes in wanted for recipe in recipes], self._room
            )
            at = self._recipes.ctypes.data
            for made, recipes in wanted:
                addresses[made.span] = -at
                at += len(recipes) * self._recipes.strides[0]

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader: elements and scales, but not of what is turned."""
        wanted = self._wanted(tensors, starts, nbytes)
        self._inner.prefetch(*wanted.columns)
        self._coming.note(wanted, tensors, starts, nbytes)

    def release(self) -> None:
        """See SpanReader."""
        self._inner.release()

    def close(self) -> None:
        """See SpanReader."""
        self._inner.close()
        if self._aside is not None:
            self._aside.close()
        self._coming.clear()
        self._values = self._room = np.empty(0, np.uint8)
        self._turning = None

    def _wanted(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> Wanted:
        return wanted(self._within, self._scaled, (tensors, starts, nbytes))


def wanted(
    within: IntArray, scaled: Mapping[int, Scaled], spans: tuple[IntArray, IntArray, IntArray]
) -> Wanted:
    """What has to be read for spans of tensors, that of turned ones aside."""
    found = Wanted([], [], [])
    rows = (column.tolist() for column in (*spans, within[spans[0]]))
    for span, (tensor, start, size, source) in enumerate(zip(*rows, strict=True)):
        how = scaled.get(tensor)
        if how is None:
            found.straight.append((span, len(found.requests)))
            found.requests.append((source, start, size))
        elif size:
            assert how.scaling is not None
            first, stop = start // _FLOAT, -(-(start + size) // _FLOAT)
            if not how.turned:
                bits = DTYPES[how.scaling.dtype].bits
                first = first * bits // 8 * 8 // bits  # where a byte begins
            parts = () if how.turned else tuple(_asked(found.requests, how, first, stop))
            found.made.append(_Made(span, how, first, stop, start - _FLOAT * first, size, parts))
    return found


def _asked(
    requests: list[tuple[int, int, int]], how: Scaled, first: int, stop: int
) -> Iterator[_Part]:
    """Ask for what the elements [first, stop) are made of."""
    scaling = how.scaling
    assert scaling is not None
    bits, width = DTYPES[scaling.dtype].bits, DTYPES[scaling.scale_dtype].bits // 8
    for begin, end in _parts(scaling, first, stop):
        low, high = scaling.needed(begin, end)
        yield _Part(scaling, begin, end, low, len(requests))
        byte = begin * bits // 8
        requests.append((how.elements, byte, -(-end * bits // 8) - byte))
        requests.append((how.scales, low * width, (high - low) * width))


def _parts(scaling: Scaling, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Elements in parts that need few more scales than they are many, whatever a file says.

    A few elements on both sides of the end of a row may need all the scales of it.
    """
    low, high = scaling.needed(first, stop)
    columns = scaling.columns
    if high - low <= stop - first + _SPARE:
        yield first, stop
        return
    ends = [first, -(-first // columns) * columns, stop // columns * columns, stop]
    for begin, end in pairwise(ends):
        if begin < end:
            yield begin, end
