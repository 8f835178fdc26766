"""Published pairs: the table of them, and a pair that is made up on a hub of our own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import example_programs  # noqa: F401  # makes the programs importable
import numpy as np
import pytest
from hub_server import only_hub, safetensors
from paper import published


def test_the_table_is_the_paper_s() -> None:
    known = published.pairs()
    assert len(known) == 14
    for name, pair in known.items():
        assert pair.seen in published.SEEN, name
        assert pair.base.count("/") == pair.tuned.count("/") == 1
        values = [pair.sparsity[t] for t in sorted(pair.sparsity, key=float)]
        assert values == sorted(values), "a larger tolerance hides more"
        assert 50 <= values[0] <= values[-1] < 100
    assert known["tulu-8b-dpo"].sparsity["1e-5"] == 81.38


def test_the_table_of_overlaps_agrees_with_itself() -> None:
    import tomllib

    for row in tomllib.loads(published.TABLE.read_text("utf-8"))["table-4"].values():
        (one, two), (first, second) = row["sparsity"], row["o"]
        assert first * (100 - one) == pytest.approx(second * (100 - two), rel=0.01)
        # chance is the other mask's density; two runs of one size say it to a digit
        assert row["chance"] == pytest.approx([100 - two, 100 - one], abs=0.11)


def test_a_pair_is_streamed_and_held_against_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = np.full(1000, 1.0, np.float32)
    tuned = base.copy()
    tuned[:100] += np.float32(5e-6)
    tuned[100:150] += np.float32(1.0)

    def file(values: Any) -> bytes:
        return safetensors({"w": ("F32", (1000,), values.tobytes())})

    pair = published.Pair("DPO", "me/base", "me/tuned", "guess", {"1e-6": 84.0, "1e-5": 94.5})
    monkeypatch.setattr(published, "pairs", lambda: {"ours": pair})
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("me/base", {"model.safetensors": file(base)})
        hub.put("me/tuned", {"model.safetensors": file(tuned)})
        monkeypatch.setitem(os.environ, "HF_ENDPOINT", hub.endpoint)
        assert published.main(["ours", "--yes", "--disk", "64MiB"]) == 0
        downloaded = hub.downloaded()
    text = capsys.readouterr().out
    assert "the likeliest names, unchecked" in text
    assert "to fetch: 8,000 bytes" in text
    lines = [line.split() for line in text.splitlines()[-4:]]
    assert lines == [
        ["tolerance", "ours,", "%", "paper,", "%"],
        ["exact", "85.00", "–"],
        ["1e-6", "85.00", "84.00"],
        ["1e-5", "95.00", "94.50"],
    ]
    assert "model.safetensors" not in downloaded, "nothing is downloaded whole"


def test_what_is_not_known_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main([]) == 0
    assert "PRIME-RL/Eurus-2-7B-PRIME" in capsys.readouterr().out
    assert published.main(["nonsense"]) == 2


def test_nothing_is_fetched_without_consent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {"refusal": None, "bytes_to_download": 16_000_000_000}
    monkeypatch.setattr(published, "to_fetch", lambda pair, disk: plan)
    monkeypatch.setattr("builtins.input", lambda text: "")
    monkeypatch.setattr(published, "compare", lambda *_: pytest.fail("it was not asked to"))
    assert published.main(["tulu-8b-dpo"]) == 1
    assert "16.0 GB" in capsys.readouterr().out
