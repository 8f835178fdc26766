"""Publishing from a process: an independent reader gets what the model was at each call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from source import ROOT
from weight_streams import read_model, read_stream

import ckdiff
from ckdiff.sync import Published, Publisher


def model(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(300, 70).to(dtype),
        "b.weight": torch.randn(1000).to(dtype),
        "c.ids": torch.arange(50),
        "d.empty": torch.zeros(0, 4).to(dtype),
    }


def step(state: dict[str, torch.Tensor], seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = state["a.weight"].view(-1)
    places = torch.randint(len(weight), (40,), generator=rng)
    weight[places] += torch.randn(40, generator=rng).to(weight.dtype)
    state["c.ids"][seed % 50] += 1


def saved(state: dict[str, torch.Tensor], folder: Path) -> Path:
    folder.mkdir()
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    return folder


def raw(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: one.contiguous().view(torch.uint8).numpy().tobytes() if one.numel() else b""
            for name, one in state.items()}  # fmt: skip


def at(base: Path, stream: Path, version: int) -> dict[str, bytes]:
    return {n: data for n, (_, _, data) in read_stream(read_model(base), stream, version).items()}


@pytest.mark.parametrize("background", [False, True])
def test_packed_versions_are_the_model_too(tmp_path: Path, background: bool) -> None:
    """As ckdiff makes them of files, and it goes on from them."""
    state, stream, base = model(), tmp_path / "s", saved(model(), tmp_path / "base")
    folders = [base]
    for seed in range(3):
        with Publisher(stream, base, encoding="packed", background=background) as publisher:
            for half in (0, 1):
                step(state, 2 * seed + half)
                found = publisher.publish(state)
                folders.append(saved(state, tmp_path / f"{found.version}"))
                assert (found.version, found.full, found.tensors) == (len(folders) - 1, False, 2)
                assert 0 < found.density < 0.01
                assert found.bytes == sum(f.stat().st_size for f in newest(stream).iterdir())
    with Publisher(stream, base, encoding="packed") as publisher:
        assert publisher.publish(state, full=True).version == 7
        assert publisher.publish(state).changed_bytes == 0
    for version in (1, 4, 6, 8):
        ckdiff.apply(base, stream, tmp_path / f"now {version}", target=version)
        assert read_model(tmp_path / f"now {version}") == read_model(folders[min(version, 6)])
    made = ckdiff.delta(folders[5], folders[6], tmp_path / "d", as_version=True, version=6)
    mine, theirs = (
        safetensors.torch.load_file(folder / "model-00000-of-00001.safetensors")
        for folder in (stream / "weight_v000006", made.path)
    )
    assert mine.keys() == theirs.keys()
    assert {name for name in mine if not torch.equal(mine[name], theirs[name])} == {
        "ckdiff.manifest"
    }


def newest(stream: Path) -> Path:
    return max(stream.iterdir())


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("snapshot", ["memory", "disk"])
@pytest.mark.parametrize("encoding", ["xor", "overwrite"])
def test_every_version_is_the_model_at_the_call(
    tmp_path: Path, encoding: str, snapshot: str, background: bool
) -> None:
    state, stream, wanted = model(), tmp_path / "s", []
    base = saved(state, tmp_path / "base")
    with Publisher(
        stream, base, encoding=encoding, snapshot=snapshot, background=background
    ) as publisher:
        for seed in range(4):
            step(state, seed)
            found = publisher.publish(state)
            wanted.append(raw(state))
            assert (found.version, found.full, found.tensors) == (seed + 1, False, 2)
            assert 0 < found.density < 0.01
        same = publisher.publish(state)
        assert (same.tensors, same.changed_bytes, same.density) == (0, 0, 0)
    for version, one in enumerate(wanted, 1):
        assert at(base, stream, version) == one
    assert at(base, stream, 5) == wanted[-1]
    assert sorted(p.name for p in stream.iterdir()) == [f"weight_v{i:06d}" for i in range(1, 6)]


def test_what_is_counted(tmp_path: Path) -> None:
    state = model()
    with Publisher(tmp_path / "s", state) as publisher:
        state["a.weight"][3, 4] += 1
        before = raw(state)
        state["b.weight"][7] *= -1
        found = publisher.publish(state)
    one, other = (np.frombuffer(raw(s)["b.weight"], np.uint8) for s in (state, state))
    assert (one == other).all()
    assert before["b.weight"] != raw(state)["b.weight"]
    assert found.tensors == 2
    elements = sum(tensor.numel() for tensor in state.values())
    assert found.density == 2 / elements
    folder = tmp_path / "s" / "weight_v000001"
    assert found.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert found.to_dict()["version"] == 1


def test_float32_masters_are_rounded_to_what_the_base_has(tmp_path: Path) -> None:
    masters = model(torch.float32)
    base = saved({n: t.bfloat16() if t.is_floating_point() else t for n, t in masters.items()},
                 tmp_path / "base")  # fmt: skip
    with Publisher(tmp_path / "s", base) as publisher:
        assert publisher.publish(masters).tensors == 0
        step(masters, 1)
        masters["b.weight"] += 1e-7  # most of it is lost
        publisher.publish(masters)
    wanted = {n: t.bfloat16() if t.is_floating_point() else t for n, t in masters.items()}
    assert at(base, tmp_path / "s", 2) == raw(wanted)


def test_without_a_base_the_first_version_is_full_and_anchors_follow(tmp_path: Path) -> None:
    masters, stream = model(torch.float32), tmp_path / "s"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    seen = []
    with Publisher(
        stream, dtype="bf16", anchor_every=3, config_from=tmp_path / "config", background=True
    ) as publisher:
        for seed in range(7):
            step(masters, seed)
            seen.append(publisher.publish(masters).full)
    assert seen == [True, False, False, True, False, False, True]
    wanted = {n: t.bfloat16() if t.is_floating_point() else t for n, t in masters.items()}
    assert at(tmp_path, stream, 7) == at(tmp_path, stream, 7) == raw(wanted)
    assert (stream / "weight_v000004" / "config.json").exists()
    assert not (stream / "weight_v000005" / "config.json").exists()


def test_anchors_carry_the_files_of_the_base(tmp_path: Path) -> None:
    state = model()
    base = saved(state, tmp_path / "base")
    with Publisher(tmp_path / "s", base, anchor_every=1) as publisher:
        step(state, 1)
        found = publisher.publish(state)
    folder = tmp_path / "s" / "weight_v000001"
    assert found.full
    assert found.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (folder / "config.json").read_text() == '{"model_type": "tiny"}'
    assert at(base, tmp_path / "s", 1) == raw(state)


def test_modules_and_tied_weights(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(20, 8)
            self.head = torch.nn.Linear(8, 20, bias=False)
            self.head.weight = self.embed.weight

    torch.manual_seed(0)
    module = Tied()
    base = saved({"embed.weight": module.embed.weight.detach().clone()}, tmp_path / "base")
    with Publisher(tmp_path / "s", base) as publisher:
        with torch.no_grad():
            module.embed.weight[3] += 1
        assert publisher.publish(module).tensors == 1
        module.head.weight = torch.nn.Parameter(module.head.weight.detach().clone())
        with pytest.raises(ckdiff.DeltaError, match=r"head\.weight is added.*full=True"):
            publisher.publish(module)
        assert publisher.publish(module, full=True).full
    wanted = {n: t.detach() for n, t in module.state_dict().items()}
    assert at(base, tmp_path / "s", 2) == raw(wanted)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("anchor", [None, 2])
def test_after_a_failure_it_goes_on_from_what_is_complete(
    tmp_path: Path, background: bool, anchor: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, stream = model(), tmp_path / "s"
    base = saved(state, tmp_path / "base")

    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with Publisher(stream, base, background=background, anchor_every=anchor) as publisher:
        step(state, 0)
        publisher.publish(state)
        publisher.wait()
        first = raw(state)
        step(state, 1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full_disk)
            if background:
                publisher.publish(state)
                with pytest.raises(ckdiff.OutputError, match="No space left"):
                    publisher.wait()
            else:
                with pytest.raises(ckdiff.OutputError, match="No space left"):
                    publisher.publish(state)
        assert publisher.version == 1
        assert [path.name for path in stream.iterdir()] == ["weight_v000001"]
        step(state, 2)
        found = publisher.publish(state)
        assert (found.version, found.full) == (2, anchor is not None)
    assert at(base, stream, 1) == first
    assert at(base, stream, 2) == raw(state)


def test_a_failure_with_a_base_in_memory_makes_the_next_version_a_full_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masters, notes = model(torch.float32), list[str]()
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in masters.items()}
    observer = ckdiff.Observer(note=notes.append)
    with Publisher(tmp_path / "s", state, observer=observer) as publisher:
        step(masters, 0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(OSError(5, "broken")))
            with pytest.raises(ckdiff.OutputError, match="broken"):
                publisher.publish(masters)
        assert publisher.publish(masters).full
        step(masters, 1)
        assert not publisher.publish(masters).full
    state = {n: t.bfloat16() if t.is_floating_point() else t for n, t in masters.items()}
    assert at(tmp_path / "none", tmp_path / "s", 2) == raw(state)
    assert [note.split(":")[0] for note in notes][:2] == [
        "the next version is a full one",
        "a full version without config and tokenizer files, which readers that begin with it need",
    ]


def test_a_killed_publisher_leaves_nothing_half_done(tmp_path: Path) -> None:
    state = model()
    base = saved(state, tmp_path / "base")
    script = (
        "import os, sys, safetensors.torch\n"
        "from ckdiff.sync import Publisher\n"
        "base, stream = sys.argv[1:]\n"
        "state = safetensors.torch.load_file(base + '/model.safetensors')\n"
        "publisher = Publisher(stream, base)\n"
        "for kill in (False, True):\n"
        "    state['b.weight'] += 1\n"
        "    if kill:\n"
        "        os.fsync = lambda fd: os.kill(os.getpid(), 9)\n"
        "    publisher.publish(state)\n"
    )
    stream = tmp_path / "s"
    done = subprocess.run(
        [sys.executable, "-c", script, base, stream],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -9
    assert not (stream / "weight_v000002").exists()
    assert len(list(stream.iterdir())) == 2, "what was killed is there"
    with Publisher(stream, base) as publisher:
        assert publisher.version == 1
        state["b.weight"] -= 1
        assert publisher.publish(state).version == 2
    assert at(base, stream, 2) == raw(state)
    assert len(list(stream.iterdir())) == 2


@pytest.mark.parametrize("given", ["first", "newest", "neither", "none"])
def test_a_stream_goes_on(tmp_path: Path, given: str) -> None:
    state, stream = model(), tmp_path / "s"
    base = saved(state, tmp_path / "base")
    with Publisher(stream, base) as publisher:
        for seed in range(3):
            step(state, seed)
            publisher.publish(state)
    starts: dict[str, Any] = {"first": base, "newest": state, "none": None}
    starts["neither"] = {**state, "a.weight": state["a.weight"] * 2}
    start = starts[given]
    if given in ("neither", "none"):
        with pytest.raises(ckdiff.CkdiffError, match="begin"):
            Publisher(stream, start)
        return
    with Publisher(stream, start) as publisher:
        assert publisher.version == 3
        step(state, 9)
        assert publisher.publish(state).version == 4
    assert at(base, stream, 4) == raw(state)


def test_a_stream_goes_on_from_its_full_version(tmp_path: Path) -> None:
    state, stream = model(), tmp_path / "s"
    with Publisher(stream) as publisher:
        for seed in range(3):
            step(state, seed)
            publisher.publish(state)
    with Publisher(stream) as publisher:
        step(state, 9)
        found = publisher.publish(state)
        assert isinstance(found, Published)
        assert (found.version, found.full, found.tensors) == (4, False, 2)
    assert at(tmp_path, stream, 4) == raw(state)


def test_two_publishers_do_not_mix(tmp_path: Path) -> None:
    state = model()
    with Publisher(tmp_path / "s", state) as one, Publisher(tmp_path / "s", state) as other:
        step(state, 0)
        one.publish(state)
        with pytest.raises(ckdiff.DeltaError, match="something else publishes"):
            other.publish(state)


def test_what_makes_no_sense(tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"encoding": "indices"}, {"checksum": "md5"}, {"anchor_every": 0}, {"snapshot": "gpu"},
        {"dtype": "int8"}, {"background": "yes"}, {"memory": "lots"},
    ]  # fmt: skip
    for options in wrong:
        with pytest.raises(ckdiff.UsageError):
            Publisher(tmp_path / "s", model(), **options)
    publisher = Publisher(tmp_path / "s", model())
    publisher.close()
    publisher.close()
    with pytest.raises(ckdiff.UsageError, match="closed"):
        publisher.publish(model())
    with pytest.raises(ckdiff.BudgetError):
        Publisher(tmp_path / "s", model(), memory="1MiB")
