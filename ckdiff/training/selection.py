"""Which elements of a tensor are trained, in as little memory as they can be walked in order from.

A tensor is cut into tiles of 65,536 elements. A tile has the positions of its chosen elements in 16
bits each, or, where that is less, one bit for every element: 8 KiB. Empty tiles take no room.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from ckdiff.kernels.abi import PLACES_MARGIN, TILE_COLUMNS, TILE_ELEMENTS

_AT_ONCE = 256 * TILE_ELEMENTS  # elements of a mask that are looked at together
_TILE_BYTES = TILE_ELEMENTS // 8
_MOST_POSITIONS = _TILE_BYTES // 2  # in a tile; with more, bits are smaller

Bytes = npt.NDArray[np.uint8]


class Selection:
    """The elements of a tensor at which a bool mask is True, in the order they lie in.

    ``mask`` has any shape and device. ``shape`` is its shape, ``count`` how many elements are
    chosen, ``digest`` names the selection: 32 hex digits.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.shape = tuple(mask.shape)
        self.elements = mask.numel()
        self.count = 0
        digest = xxhash.xxh3_128(str(list(self.shape)).encode())
        flat = mask.reshape(-1)
        tiles = [np.zeros((0, TILE_COLUMNS), np.int64)]
        places: list[Bytes] = []
        room = 0
        for start in range(0, self.elements, _AT_ONCE):
            flags = flat[start : start + _AT_ONCE].cpu().numpy()
            digest.update(np.packbits(flags, bitorder="little").data)
            table, chosen = _tiled(flags)
            table += np.array([start, self.count, room, 0])
            tiles.append(table)
            places.append(chosen)
            room += len(chosen)
            self.count += int(np.count_nonzero(flags))
        self.digest = str(digest.hexdigest())
        #: tiles that have elements, as the kernels read them; TILE_COLUMNS int64 each
        self.tiles = np.concatenate(tiles)
        #: positions and bits, uint8, with PLACES_MARGIN at the end
        self.places = np.concatenate([*places, np.zeros(PLACES_MARGIN, np.uint8)])
        if self.whole:
            self.tiles, self.places = self.tiles[:0].copy(), self.places[:0].copy()
        self._index: torch.Tensor | None = None

    @property
    def whole(self) -> bool:
        """Whether all elements are chosen: then there are no tiles."""
        return self.count == self.elements

    @property
    def nbytes(self) -> int:
        """Memory that this takes."""
        index = 0 if self._index is None else self._index.numel() * self._index.element_size()
        return self.tiles.nbytes + self.places.nbytes + index

    def index(self, device: torch.device) -> torch.Tensor:
        """Positions in the flat tensor for torch's own functions: int32, or int64 where needed.

        Made when it is first asked for, and kept.
        """
        if self._index is None:
            kind = np.int32 if self.elements < 2**31 else np.int64
            found = [np.zeros(0, kind), *(self._positions(row, kind) for row in self.tiles)]
            self._index = torch.from_numpy(np.concatenate(found))
        if self._index.device != device:
            self._index = self._index.to(device)
        return self._index

    def _positions(self, tile: npt.NDArray[np.int64], kind: Any) -> npt.NDArray[Any]:
        first, _, at, amount = tile.tolist()
        if amount > 0:
            held: npt.NDArray[Any] = self.places[at : at + 2 * amount].view(np.uint16)
        else:
            held = np.flatnonzero(
                np.unpackbits(self.places[at : at - 8 * amount], bitorder="little")
            )
        found: npt.NDArray[Any] = held.astype(kind) + kind(first)
        return found


def _tiled(flags: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int64], Bytes]:
    """The tiles of some flags, and their places."""
    missing = -len(flags) % TILE_ELEMENTS
    cut = np.pad(flags, (0, missing)) if missing else flags
    cut = cut.reshape(-1, TILE_ELEMENTS)
    counts = np.count_nonzero(cut, axis=1)
    sparse = counts <= _MOST_POSITIONS
    positions = np.nonzero(cut[sparse])[1].astype(np.uint16)
    bits = np.packbits(cut[~sparse], axis=1, bitorder="little")
    table = np.zeros((len(cut), TILE_COLUMNS), np.int64)
    table[:, 0] = np.arange(len(cut)) * TILE_ELEMENTS
    table[:, 1] = np.cumsum(counts) - counts
    few = 2 * counts[sparse]
    table[sparse, 2] = np.cumsum(few) - few
    table[~sparse, 2] = positions.nbytes + np.arange(len(bits)) * _TILE_BYTES
    table[:, 3] = np.where(sparse, counts, -(_TILE_BYTES // 8))
    places = np.concatenate([positions.view(np.uint8), bits.reshape(-1)])
    return table[counts > 0], places
