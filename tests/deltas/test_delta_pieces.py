"""Windows are made, hashed and written a piece at a time, while a piece is in the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from delta_frames import QUICK, Guarded, coders, zones_intact
from hypothesis import given
from hypothesis import strategies as st
from support import Tensor, write_safetensors

import ckdiff
from ckdiff.deltas.form import FORMS
from ckdiff.dtypes import DTYPES
from ckdiff.kernels import delta
from ckdiff.kernels.delta import PIECE
from ckdiff.layout import bits_of
from ckdiff.outputs.rebuilt import Rebuilt

KINDS = ["U8", "BF16", "F32", "U64"]
Pieces = list[tuple[int, bytes]]


def two(dtype: str, size: int, density: float, seed: int) -> tuple[bytes, bytes]:
    """Random bytes, and the same with some lanes changed."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 256, size, np.uint8)
    lanes = base.view(f"<u{FORMS[dtype].bytes}")
    changed = lanes + (rng.random(len(lanes)) < density).astype(lanes.dtype)
    return base.tobytes(), changed.tobytes()


def told_of(dtype: str, frame: bytes, base: bytes) -> tuple[bytes, Pieces]:
    """What a frame makes of a window, and what was said of its pieces meanwhile."""
    decoder = coders(False)[1]
    told: Pieces = []
    sides = Guarded(len(base), 3, base), Guarded(len(base), 5)
    decoder.decode(
        FORMS[dtype], memoryview(frame), sides[0].array, sides[1].array,
        ready=lambda at, piece: told.append((at, piece.tobytes())),
    )  # fmt: skip
    assert all(side.intact() for side in sides)
    assert zones_intact(decoder)
    return sides[1].array.tobytes(), told


def test_a_piece_is_whole_units_and_words() -> None:
    widths = [FORMS[dtype].bytes for dtype in FORMS]
    assert all(PIECE % (64 * width) == 0 for width in widths)
    units = 512 * bits_of(list(DTYPES)) // 8  # of content hashes
    assert (PIECE % units == 0).all()


@pytest.mark.parametrize("dtype", KINDS)
@QUICK
@given(
    pieces=st.integers(0, 2),
    more=st.one_of(st.integers(-2, 2), st.integers(-3000, 3000)),
    density=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    seed=st.integers(0, 9),
)
def test_all_pieces_are_told_of_once_and_in_order(
    dtype: str, pieces: int, more: int, density: float, seed: int
) -> None:
    width = FORMS[dtype].bytes
    size = max(1, pieces * PIECE // width + more) * width
    base, tuned = two(dtype, size, density, seed)
    frame, _ = coders(False)[0].encode(
        FORMS[dtype], np.frombuffer(base, np.uint8), np.frombuffer(tuned, np.uint8)
    )
    if base == tuned:
        assert not frame
        return
    found, told = told_of(dtype, frame, base)
    assert found == tuned
    assert [at for at, _ in told] == list(range(0, size, PIECE))
    assert b"".join(piece for _, piece in told) == tuned


def test_of_streams_that_do_not_fit_the_last_piece_is_not_told_of() -> None:
    size = 2 * PIECE + 130
    elements = -(-size // 128) * 64
    bits, symbols = (np.zeros((1, elements + 128), np.uint8) for _ in range(2))
    held = delta.Streams(bits, symbols, np.zeros(99, np.uint8), np.zeros((3, 512), np.uint8))
    base = np.frombuffer(two("BF16", size, 0, 1)[0], np.uint8)
    for extra, fits in [(0, True), (8, False)]:  # bits that nothing asks for
        told: list[int] = []
        out = np.empty(size, np.uint8)

        def ready(at: int, piece: npt.NDArray[np.uint8], told: list[int] = told) -> None:
            told.append(at)

        assert delta.merge("16f", [(0, elements)], extra, base, out, held, ready=ready) is fits
        assert told == ([0, PIECE, 2 * PIECE] if fits else [0, PIECE])


def model_of(seed: int) -> dict[str, Tensor]:
    """Tensors of several pieces, none of which ends where a piece does."""
    rng = np.random.default_rng(seed)
    model: dict[str, Tensor] = {}
    for dtype, size in [
        ("BF16", 2 * PIECE + 6), ("F32", PIECE + 12), ("F4", PIECE + 1), ("C64", PIECE + 24),
        ("F64", PIECE), ("U8", 3 * PIECE - 1), ("BF16", 40),
    ]:  # fmt: skip
        elements = size * 8 // DTYPES[dtype].bits
        model[f"{dtype}.{size}"] = (
            dtype,
            (elements,),
            rng.integers(0, 256, size, np.uint8).tobytes(),
        )
    return model


def changed(model: dict[str, Tensor], names: list[str], at: list[int]) -> dict[str, Tensor]:
    """The same with a bit changed at some bytes of some tensors."""
    made = dict(model)
    for name in names:
        dtype, shape, data = made[name]
        raw = bytearray(data)
        for place in at:
            raw[place % len(raw)] ^= 1
        made[name] = dtype, shape, bytes(raw)
    return made


EDGES = [0, PIECE - 1, PIECE, -1]


@pytest.mark.parametrize("encoding", ["packed", "indices"])
def test_checkpoints_and_chains_of_several_pieces(tmp_path: Path, encoding: str) -> None:
    first = model_of(1)
    names = list(first)
    second = changed(first, names[:5], EDGES)
    second["whole"] = "BF16", (PIECE,), bytes(range(256)) * (2 * PIECE // 256)
    third = changed(second, names[3:6], [7, *EDGES])
    models = [first, second, third]
    files = [
        write_safetensors(tmp_path / f"{i}.safetensors", m, pad=i) for i, m in enumerate(models)
    ]
    for i in range(2):
        ckdiff.delta(files[i], files[i + 1], tmp_path / f"{i}.delta", encoding=encoding)
    deltas = [tmp_path / f"{i}.delta" for i in range(2)]
    for stop in (1, 2):
        out = tmp_path / f"out{stop}.safetensors"
        ckdiff.apply(files[0], deltas[:stop], out, workers=2)
        assert out.read_bytes() == files[stop].read_bytes()


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("at", EDGES)
def test_another_base_is_noticed_in_any_piece(tmp_path: Path, encoding: str, at: int) -> None:
    base = {"w": ("U8", (2 * PIECE + 5,), bytes(2 * PIECE + 5))}
    there = [
        write_safetensors(tmp_path / f"{i}.safetensors", changed(base, ["w"], places))
        for i, places in enumerate([[], [100, PIECE + 100], [at]])
    ]
    ckdiff.delta(there[0], there[1], tmp_path / "d", encoding=encoding)
    with pytest.raises(ckdiff.DeltaError, match="was not made for"):
        ckdiff.apply(there[2], tmp_path / "d", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["packed", "indices"])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_written_is_never_more_than_a_piece(
    tmp_path: Path, encoding: str, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int]] = []
    write = Rebuilt.write

    def noted(self: Rebuilt, file: int, offset: int, data: memoryview) -> None:
        written.append((offset, len(data)))
        write(self, file, offset, data)

    model = model_of(3)
    base = write_safetensors(tmp_path / "base.safetensors", model)
    names = list(model)[: 3 * (parts - 1)]  # of none, or some
    tuned = write_safetensors(
        tmp_path / "tuned.safetensors", changed(model, ["BF16.40", *names], [1])
    )
    ckdiff.delta(base, tuned, tmp_path / "d", encoding=encoding)
    monkeypatch.setattr(Rebuilt, "write", noted)
    ckdiff.apply(base, tmp_path / "d", tmp_path / "out", workers=1)
    assert max(size for _, size in written) <= PIECE
    written.sort()
    ends = [offset + size for offset, size in written]
    assert [offset for offset, _ in written[1:]] == ends[:-1]
