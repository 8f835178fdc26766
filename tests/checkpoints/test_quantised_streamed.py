"""Quantised tensors by value, of a hub that is read by ranges."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import cast

import conformance
import pytest
from hub_server import only_hub, safetensors
from quantised_schemes import SCHEMES, Scheme, blocks, contents, grouped, made

from ckdiff.checkpoints.files import FileCheckpoint
from ckdiff.checkpoints.opening import open_for_streaming
from ckdiff.checkpoints.places.hub.streamed import StreamedPlace
from ckdiff.checkpoints.views import blockscaleturned
from ckdiff.checkpoints.views.blockscale import ScaledView, dequantised

_WINDOW = 1 << 18


class Stream(FileCheckpoint):
    place: StreamedPlace


@pytest.mark.parametrize(
    ("make", "turned"),
    [
        (blocks((600, 4000), (128, 128)), False),
        (SCHEMES["experts of FBGEMM"], False),
        (grouped((2, 300, 320), "U8", turned=True), True),
    ],
)
def test_windows_asked_for_early(
    make: Callable[[Scheme], None],
    turned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Elements and scales come together, what was asked for early is what is acquired."""
    monkeypatch.setattr(blockscaleturned, "_BAND", 1 << 14)
    scheme = made(make)
    wanted = contents(scheme)
    (value,) = scheme.values
    size = len(wanted[value])
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("me/model", {"model.safetensors": safetensors(scheme.tensors)})
        view, _ = dequantised(open_for_streaming("hf://me/model"))
        with view:
            assert isinstance(view, ScaledView)
            assert view.streams
            view.share(1 << 20, 4)
            place = cast(Stream, view.inner).place
            assert place.spool == (1 << 19 if turned else 1 << 20)
            windows = [[(value, at, min(_WINDOW, size - at))] for at in range(0, size, _WINDOW)]
            with closing(view.reader()) as reader:
                for i, window in enumerate(windows):
                    for coming in windows[i : i + 3]:
                        reader.prefetch(*conformance.columns(view, coming))
                    found = conformance.read(view, reader, window)
                    assert found == [wanted[value][at : at + n] for _, at, n in window]
            if not turned:  # each element once, and small gaps where scales are near
                most = sum(len(data) for _, _, data in scheme.tensors.values())
                assert place.bytes_fetched <= 1.1 * most + (1 << 18)
