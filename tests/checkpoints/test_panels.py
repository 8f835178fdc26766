"""Turned tensors that are copied while they are compared: panel by panel they are all there."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gathering import Counting, contents_of
from test_turned import STYLES, read, stack, windows_of

from ckdiff.checkpoints import panels
from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.turned import clusters_of
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.memory import bytes_at

Array = npt.NDArray[Any]
Span = tuple[int, int, int]


def reader_of(source: Array, arrays: list[Array], pieces: Any) -> tuple[PieceReader, Counting]:
    contents = contents_of(arrays, pieces)
    held = Counting([source])
    clusters = clusters_of(contents.table, contents.pieces)
    reader = PieceReader(held, contents, clusters, mapped=True)
    reader.give_panels()
    return reader, held


def assembled(reader: PieceReader, spans: list[Span]) -> tuple[list[bytes], int]:
    """What a window's spans have once all is copied, and how many panels there were."""
    columns = np.ascontiguousarray(np.array(spans, np.int64).T)
    reader.prefetch(*columns)
    addresses = reader.acquire(*columns).tolist()
    made = [bytearray(size) for _, _, size in spans]
    known = [np.zeros(size, np.bool_) for _, _, size in spans]
    rows = reader.rows
    for panel in reader.late:
        panel.copying.make()
        assert rows is not None
        span, begin, stop = panel.part
        mine = rows.spans == span
        begins, places = rows.begins[mine], rows.addresses[mine]
        ends = np.append(begins[1:], spans[span][2])
        inside = (begins >= begin) & (ends <= stop)
        assert begins[inside][0] == begin
        assert ends[inside][-1] == stop
        for low, high, at in zip(
            *(column[inside].tolist() for column in (begins, ends, places)), strict=True
        ):
            made[span][low:high] = bytes_at(at, high - low).tobytes()
            assert not known[span][low:high].any()
            known[span][low:high] = True
    for i, (address, (_, _, size)) in enumerate(zip(addresses, spans, strict=True)):
        if address:
            assert not known[i].any()
            made[i][:] = bytes_at(address, size).tobytes()
        else:
            assert known[i].all()
    reader.release()
    return [bytes(each) for each in made], len(reader.late)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_all_bytes_of_all_windows_are_there(data: st.DataObject) -> None:
    """Of every style of stack, in windows that end anywhere between units."""
    dtype = data.draw(st.sampled_from(["u1", "u2", "u4", "u8"]))
    columns = data.draw(st.sampled_from([64, 130, 256, 512, 1000, 2048]))
    shape = data.draw(st.integers(1, 300)), columns
    whole, arrays, pieces = stack(
        shape, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), data.draw(STYLES), dtype
    )
    # what is read need not begin where a line of the cache does
    lead = data.draw(st.integers(0, 31))
    source = np.zeros(whole.size + lead, whole.dtype)[lead:]
    source[:] = whole.reshape(-1)
    unit = UNIT * whole.itemsize
    window = data.draw(st.integers(1, 600)) * unit
    with mock.patch.object(
        panels, "PANEL", data.draw(st.sampled_from([1 << 14, 1 << 17, 1 << 21]))
    ):
        reader, _ = reader_of(source, arrays, pieces)
        for spans in windows_of(arrays, window):
            for (tensor, start, size), found in zip(
                spans, assembled(reader, spans)[0], strict=True
            ):
                assert found == arrays[tensor].tobytes()[start : start + size]
        reader.close()


def test_panels_end_with_whole_units() -> None:
    """Rows of 1,000 elements: 64 of them are 125 units."""
    whole, arrays, pieces = stack((640, 1000), 1, 2, "columns")
    reader, _ = reader_of(whole, arrays, pieces)
    spans = [(i, 0, arrays[i].nbytes) for i in range(2)]
    with mock.patch.object(panels, "PANEL", 64 * 1000 * 2):
        found, count = assembled(reader, spans)
    assert found == [array.tobytes() for array in arrays]
    assert count >= 10
    for panel in reader.late:
        assert panel.part[1] % (UNIT * 2) == 0


def test_what_alternates_is_gathered() -> None:
    whole, arrays, pieces = stack((256, 2048), 1, 2, "woven")
    reader, _ = reader_of(whole, arrays, pieces)
    size = arrays[0].nbytes
    assert assembled(reader, [(0, 0, size), (1, 0, size)])[0] == [a.tobytes() for a in arrays]
    assert not reader.late


def test_what_takes_memory_when_it_is_asked_is_gathered() -> None:
    whole, arrays, pieces = stack((256, 2048), 1, 2, "columns")
    contents = contents_of(arrays, pieces)
    reader = PieceReader(Counting([whole]), contents, clusters_of(contents.table, contents.pieces))
    reader.give_panels()
    read(reader, arrays, [(0, 0, arrays[0].nbytes)])
    assert not reader.late
    assert reader.rows is None
