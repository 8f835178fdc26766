"""Checkpoints of the hub, downloaded through its cache by the real client."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import MAIN, bf16, bump, error, ok, python, run
from hub_server import Handler, Hub, Request, etag_of, only_hub, safetensors, sharded
from support import write_safetensors

import ckdiff
from ckdiff.checkpoints.places.hub import cached
from ckdiff.errors import BudgetError, CheckpointError
from ckdiff.stores.maskstore import open_store

BIG = bf16((64, 64))
BASE = {"a.0.w": BIG, "a.1.w": bf16((32, 64), 1), "b": bf16((8,), 2)}
TUNED = BASE | {"a.1.w": bump(BASE["a.1.w"], 70)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with only_hub(tmp_path, monkeypatch) as hub:
        hub.put("org/base", {"model.safetensors": safetensors(BASE), "config.json": b"{}"})
        hub.put("org/tuned", {"model.safetensors": safetensors(TUNED), "README.md": b"x" * 5000})
        yield hub


def two_shards(tensors: Any, note: bytes = b"") -> dict[str, bytes]:
    return {
        **sharded({
            "model-1.safetensors": {"a.0.w": tensors["a.0.w"]},
            "model-2.safetensors": {"a.1.w": tensors["a.1.w"], "b": tensors["b"]},
        }),
        "consolidated.safetensors": safetensors({"x": BIG}) + note,
        "optimizer.bin": b"x" * 9000,
    }  # fmt: skip


def blobs(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "home").rglob("blobs/*") if p.is_file()]


def test_a_diff_of_two_repositories(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "run.zarr"
    found = ckdiff.diff("hf://org/base", "hf://org/tuned@main", out)
    assert found.rules["exact"]["changed"] == 70
    assert found.bytes_known_equal == 0
    local = tmp_path / "local"
    for repo in ("base", "tuned"):
        (local / repo).mkdir(parents=True)
        data = hub.repositories[f"org/{repo}"]["main"].files["model.safetensors"]
        (local / repo / "model.safetensors").write_bytes(data)
    other = ckdiff.diff(local / "base", local / "tuned", tmp_path / "local.zarr")
    assert found.table == other.table
    assert found.store is not None
    for name in BASE:
        assert (found.store.mask(name) == other.store.mask(name)).all()
    commit = hub.repositories["org/tuned"]["main"].sha
    data = safetensors(TUNED)
    assert open_store(out).manifest["tuned"] == {
        "label": "hf://org/tuned@main",
        "repository": "org/tuned",
        "commit": commit,
        "files": [
            {"name": "model.safetensors", "size": len(data), "content": f"sha256:{etag_of(data)}"}
        ],
    }
    assert {n.rsplit("/")[-1] for n in hub.fetched()} == {"model.safetensors"}
    assert "hf://org/base" in ok("show", str(out)).stdout


def test_what_is_cached_is_not_downloaded_again(hub: Hub) -> None:
    ckdiff.diff("hf://org/base", "hf://org/tuned")
    assert len(hub.downloaded()) == 2
    hub.requests.clear()
    again = ckdiff.diff("hf://org/base", "hf://org/tuned")
    assert again.rules["exact"]["changed"] == 70
    assert hub.fetched() == hub.fetched("HEAD") == []


def test_a_run_stays_with_the_commit_that_was_resolved_first(hub: Hub) -> None:
    first = hub.repositories["org/base"]["main"].sha

    def move(request: Request, handler: Handler) -> None:
        if request.path == "/api/models/org/base" and request.number == 1:
            hub.put("org/base", {"model.safetensors": safetensors({"other": BIG})})

    hub.fault = move
    hub.put("org/base", two_shards(BASE))
    wanted = hub.repositories["org/base"]["main"].sha
    assert wanted != first
    with ckdiff.open_checkpoint("hf://org/base") as opened:
        assert sorted(opened.table.names) == sorted(BASE)
        assert opened.origin["commit"] == wanted
    assert all(wanted in r.path for r in hub.requests if r.file)


def test_the_index_decides_which_files_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.put("org/base", two_shards(BASE))
    hub.put("org/tuned", {f"step-5/{name}": data for name, data in two_shards(TUNED).items()})
    found = ckdiff.diff("hf://org/base", "hf://org/tuned/step-5", tmp_path / "x.zarr")
    assert found.rules["exact"]["changed"] == 70
    names = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert sorted(hub.downloaded()) == sorted([*names, *(f"step-5/{name}" for name in names)])
    assert found.store is not None
    side = found.store.manifest["tuned"]
    assert side["path"] == "step-5"
    assert [file["name"] for file in side["files"]] == names[:2]
    assert all(file["content"].startswith("sha256:") for file in side["files"])


def test_a_file_or_an_index_of_a_repository(hub: Hub) -> None:
    hub.put("org/base", {f"deep/er/{name}": data for name, data in two_shards(BASE).items()})
    with ckdiff.open_checkpoint("hf://org/base/deep/er/model-2.safetensors") as opened:
        assert sorted(opened.table.names) == ["a.1.w", "b"]
        assert opened.label == "hf://org/base/deep/er/model-2.safetensors"
        assert opened.files[0].content.startswith("sha256:")
    with ckdiff.open_checkpoint("hf://org/base/deep/er/model.safetensors.index.json") as opened:
        assert len(opened.table) == 3
        assert [f.content[:7] for f in opened.files] == ["sha256:"] * 2
        assert opened.index() is not None
    assert "consolidated.safetensors" not in "".join(hub.fetched())


def test_revisions(hub: Hub) -> None:
    old = hub.put("org/base", {"model.safetensors": safetensors(TUNED)}, "v1", "feature/x")
    hub.put("org/base", {"model.safetensors": safetensors({"pr": BIG})}, "refs/pr/3")
    for text in ("@v1", "@feature%2Fx", f"@{old}"):
        found = ckdiff.diff(f"hf://org/base{text}", "hf://org/tuned")
        assert not found.differs
    with ckdiff.open_checkpoint("hf://org/base@refs/pr/3") as opened:
        assert opened.table.names == ["pr"]


def test_every_command_that_takes_a_checkpoint(hub: Hub, tmp_path: Path) -> None:
    store, other = str(tmp_path / "s.zarr"), str(tmp_path / "t.zarr")
    base, tuned = "hf://org/base", "hf://org/tuned"
    ok("diff", base, tuned, "-o", store)
    ok("diff", base, tuned, "-o", other, "--exclude", "b")
    ok("delta", base, tuned, "-o", str(tmp_path / "d.ckd"))
    ok("apply", base, str(tmp_path / "d.ckd"), "-o", str(tmp_path / "rebuilt"))
    rebuilt = tmp_path / "rebuilt" / "model.safetensors"
    assert rebuilt.read_bytes() == safetensors(TUNED)
    ok("graft", base, tuned, "--mask", store, "-o", str(tmp_path / "grafted"))
    assert (tmp_path / "grafted" / "model.safetensors").read_bytes() == safetensors(TUNED)
    ok("overlap", store, other, "--null", "magnitude", "--base", base)
    assert len(hub.downloaded()) == 2


def test_exporting_like_a_checkpoint_reads_its_headers_only(hub: Hub, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.mkdir()
    for name, data in two_shards(BASE).items():
        (local / name).write_bytes(data)
    hub.put("org/base", two_shards(BASE))
    ckdiff.diff(local, local, tmp_path / "s.zarr")
    for name, like in (("here", str(local)), ("there", "hf://org/base")):
        out = str(tmp_path / name)
        ok("export", str(tmp_path / "s.zarr"), "--to", "safetensors", "--like", like, "-o", out)
    here, there = (
        {p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("here", "there")
    )
    assert len(here) == 3  # two shards and an index
    assert here == there
    assert blobs(tmp_path) == []


def test_info_reads_headers_only(hub: Hub) -> None:
    hub.put("org/base", two_shards(BASE))
    found = json.loads(ok("info", "hf://org/base", "--json").stdout)
    assert found["kind"] == "checkpoint"
    assert found["files"] == ["model-1.safetensors", "model-2.safetensors"]
    assert found["elements"] == 64 * 64 + 32 * 64 + 8
    assert found["path"] == "hf://org/base"
    assert hub.fetched("HEAD") == []
    # these files are so small that the first piece is all of them
    assert all(r.range is not None for r in hub.requests if r.file)


def test_headers_that_do_not_fit_the_first_piece(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckdiff.checkpoints.places.hub.headers._FIRST", 20)
    hub.put("org/base", two_shards(BASE))
    assert ckdiff.info("hf://org/base")["elements"] == 64 * 64 + 32 * 64 + 8
    sizes = {n: len(d) for n, d in hub.repositories["org/base"]["main"].files.items()}
    asked = [(r.file, r.range) for r in hub.requests if r.file.startswith("model-")]
    for name, span in asked:
        assert span is not None
        assert span[1] <= min(400, sizes[name])  # never the data


def test_a_dry_run_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    base, tuned = "hf://org/base", "hf://org/tuned"
    sizes = len(safetensors(BASE)) + len(safetensors(TUNED))
    found = json.loads(ok("diff", base, tuned, "--dry-run", "--json").stdout)
    assert found["bytes_to_download"] == sizes
    assert found["bytes_to_read"] == 2 * 2 * found["elements"]
    assert blobs(tmp_path) == []
    assert "to fetch" in ok("diff", base, tuned, "--dry-run").stdout
    ckdiff.open_checkpoint(base).close()
    found = json.loads(ok("diff", base, tuned, "--dry-run", "--json").stdout)
    assert found["bytes_to_download"] == len(safetensors(TUNED))


# -- the environment -------------------------------------------------------------------------------


def test_offline_uses_the_cache_and_asks_nobody(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/base", two_shards(BASE))
    hub.put("org/tuned", two_shards(TUNED, note=b"!"), "v2")
    here = ckdiff.diff("hf://org/base", "hf://org/tuned@v2")
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = ckdiff.diff("hf://org/base", "hf://org/tuned@v2", tmp_path / "x.zarr")
    assert offline.table == here.table
    assert offline.bytes_known_equal == here.bytes_known_equal > 0
    assert ckdiff.info("hf://org/base")["tensors"] == 3
    assert hub.requests == []


def test_offline_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = error("diff", "hf://org/base", "hf://org/tuned")
    assert "hf://org/base: is not in the cache, and HF_HUB_OFFLINE is set" in line
    assert hub.requests == []


def test_offline_with_a_part_of_a_checkpoint(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/base", two_shards(BASE))
    ckdiff.open_checkpoint("hf://org/base").close()
    (link,) = (tmp_path / "home").rglob("snapshots/*/model-2.safetensors")
    link.resolve().unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = error("info", "hf://org/base")
    assert "hf://org/base: model-2.safetensors is not in the cache" in line


def test_the_cache_is_where_the_environment_says(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckdiff.open_checkpoint("hf://org/base").close()
    assert len(blobs(tmp_path)) == 1
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    ckdiff.open_checkpoint("hf://org/base").close()
    assert len(list(tmp_path.glob("elsewhere/models--org--base/blobs/*"))) == 1


def test_the_token_is_used_and_never_shown(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.private.add("org/tuned")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongsecret")
    result = run("diff", "hf://org/base", "hf://org/tuned")
    assert result.exit_code == 2
    assert "no such model, or it is private" in result.stderr
    assert "hf auth login" in result.stderr
    said = result.output
    monkeypatch.setenv("HF_TOKEN", hub.token)
    out = tmp_path / "x.zarr"
    said += ok("diff", "hf://org/base", "hf://org/tuned", "-o", str(out)).output
    said += caplog.text
    for file in [p for p in out.rglob("*") if p.is_file()]:
        said += file.read_bytes().decode("latin-1")
    assert hub.token not in said
    assert "wrongsecret" not in said


def test_an_endpoint_with_a_password(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("//", "//user:pa55word@"))
    line = error("info", "hf://org/missing")
    assert "127.0.0.1" in line
    assert "pa55word" not in line


# -- what is wrong ---------------------------------------------------------------------------------


def test_a_missing_repository(hub: Hub) -> None:
    line = error("diff", "hf://org/nothing", "hf://org/tuned")
    assert line.startswith("hf://org/nothing: 127.0.0.1:")
    assert "has no such model, or it is private" in line


def test_a_missing_revision(hub: Hub) -> None:
    line = error("diff", "hf://org/base@v9", "hf://org/tuned")
    assert "hf://org/base@v9: there is no revision v9" in line


def test_a_gated_repository(hub: Hub) -> None:
    hub.gated.add("org/base")
    line = error("diff", "hf://org/base", "hf://org/tuned")
    assert "hf://org/base: the repository is gated" in line
    assert "ask for access" in line


def test_a_token_that_is_refused(hub: Hub) -> None:
    def refuse(request: Request, handler: Handler) -> bool:
        handler.say(401, {}, X_Error_Message="Invalid credentials in Authorization header")
        return True

    hub.fault = refuse
    assert "does not accept the token" in error("info", "hf://org/base")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"pytorch_model.bin": b"x", "config.json": b"{}"},
            "pytorch_model.bin: cannot be read as a torch file",
        ),
        ({"config.json": b"{}", ".gitattributes": b""}, "holds no weights, only .gitattributes"),
        (
            {"unet/m.safetensors": b"x", "vae/m.safetensors": b"x"},
            "its 2 folders do: unet, vae (give one of them; did you mean hf://org/base/",
        ),
        ({}, "is an empty directory"),
        ({".gitattributes": b""}, "holds no weights, only .gitattributes"),
    ],
)
def test_a_repository_without_weights(hub: Hub, files: dict[str, bytes], words: str) -> None:
    hub.put("org/base", files)
    line = error("info", "hf://org/base")
    assert line.startswith("hf://org/base")
    assert words in line


def test_a_folder_that_is_not_there(hub: Hub) -> None:
    hub.put("org/base", {"sub/model.safetensors": safetensors(BASE), "config.json": b"{}"})
    line = error("info", "hf://org/base/other")
    assert "hf://org/base/other: does not exist; there are config.json, sub/" in line
    assert "hf://org/base@main/x: is not there" in error(
        "info", "hf://org/base@main/x/model.safetensors"
    )


def test_an_index_that_names_what_is_not_there(hub: Hub) -> None:
    files = two_shards(BASE)
    del files["model-1.safetensors"]
    hub.put("org/base", files)
    for command in (["info", "hf://org/base"], ["diff", "hf://org/base", "hf://org/tuned"]):
        said = error(*command)
        assert "lists 2 files, and 1 of them is not there: model-1.safetensors; 1 is: " in said


def test_an_index_that_leaves_the_repository(hub: Hub, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(safetensors(BASE))
    index = json.dumps({"weight_map": {"a.0.w": "../../../../../../secret.safetensors"}})
    hub.put("org/base", {"model.safetensors.index.json": index.encode()})
    for command in (["info", "hf://org/base"], ["diff", "hf://org/base", "hf://org/tuned"]):
        assert "names files outside its directory" in error(*command)


def test_a_file_that_is_no_safetensors_file(hub: Hub) -> None:
    hub.put("org/base", {"model.safetensors": b"\x80\x04" + b"x" * 3000})
    for command in (["info", "hf://org/base"], ["diff", "hf://org/base", "hf://org/tuned"]):
        assert "never unpickles" in error(*command)


def test_a_connection_that_breaks_in_the_middle(hub: Hub) -> None:
    def hang_up(request: Request, handler: Handler) -> bool | None:
        if request.file and request.method == "GET" and request.number < 2:
            data = hub.repositories["org/base"]["main"].files[request.file]
            first = request.range[0] if request.range else 0
            said = {"Content_Length": str(len(data) - first)}
            if first:
                said["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            handler.hang_up(206 if first else 200, data[first : first + 3000], **said)
            return True
        return None

    hub.fault = hang_up
    with ckdiff.open_checkpoint("hf://org/base") as opened:
        (file,) = opened.open_files
        assert os.pread(file.fd, 1 << 20, 0) == safetensors(BASE)


def test_a_connection_that_breaks_always(hub: Hub, tmp_path: Path) -> None:
    def hang_up(request: Request, handler: Handler) -> bool | None:
        if request.file and request.method == "GET":
            handler.hang_up(200, b"", Content_Length="99999")
            return True
        return None

    hub.fault = hang_up
    line = error("diff", "hf://org/base", "hf://org/tuned", "-o", str(tmp_path / "x.zarr"))
    assert "hf://org/base: the connection to 127.0.0.1" in line
    assert not (tmp_path / "x.zarr").exists()
    assert blobs(tmp_path) == []


def test_a_hub_that_is_not_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "the connection to 127.0.0.1:9 failed" in error("info", "hf://org/base")


def test_a_hub_that_is_overloaded_for_a_while(hub: Hub) -> None:
    def busy(request: Request, handler: Handler) -> bool | None:
        if request.path == "/api/models/org/base" and request.number < 3:
            handler.say(503, {})
            return True
        return None

    hub.fault = busy
    assert ckdiff.info("hf://org/base")["tensors"] == 3


def test_a_hub_that_is_overloaded(hub: Hub) -> None:
    def busy(request: Request, handler: Handler) -> bool:
        handler.say(503, {})
        return True

    hub.fault = busy
    assert "answers with the status 503" in error("info", "hf://org/base")


def test_what_is_no_hub(hub: Hub) -> None:
    def page(request: Request, handler: Handler) -> bool:
        handler.say(200, b"<html>hello</html>")
        return True

    hub.fault = page
    assert "does not answer like a hub" in error("info", "hf://org/base")

    def no_commit(request: Request, handler: Handler) -> bool:
        handler.say(200, {"id": "org/base", "siblings": []})
        return True

    hub.fault = no_commit
    assert "does not report its commit" in error("info", "hf://org/base")


@pytest.mark.parametrize("length", [100, 5000])
def test_a_file_of_another_length_than_the_hub_says(hub: Hub, length: int) -> None:
    def other(request: Request, handler: Handler) -> bool | None:
        if request.file and request.method == "GET" and request.range is None:
            handler.say(200, b"x" * length, ETag='"x"', X_Repo_Commit="0" * 40)
            return True
        return None

    hub.fault = other
    line = error("diff", "hf://org/base", "hf://org/tuned")
    assert "Consistency check failed" in line


def test_a_cached_file_that_was_cut(hub: Hub, tmp_path: Path) -> None:
    ckdiff.open_checkpoint("hf://org/base").close()
    (blob,) = blobs(tmp_path)
    os.truncate(blob, 100)
    line = error("diff", "hf://org/base", "hf://org/tuned")
    assert "has 100 bytes, and" in line
    assert "remove the file that it links to" in line


def test_a_disk_without_room(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda place: Usage)
    with pytest.raises(BudgetError, match=r"have to be downloaded, but .* free"):
        ckdiff.open_checkpoint("hf://org/base")
    assert hub.fetched() == []


def test_bare_listings(hub: Hub, tmp_path: Path) -> None:
    """A hub that lists only names is asked for each file."""
    hub.bare = True
    found = ckdiff.diff("hf://org/base", "hf://org/tuned", tmp_path / "x.zarr")
    assert found.rules["exact"]["changed"] == 70
    assert found.store is not None
    assert found.store.manifest["base"]["files"][0]["content"].startswith("sha256:")
    assert ckdiff.info("hf://org/base")["tensors"] == 3


def test_files_in_another_storage(hub: Hub) -> None:
    hub.storage = hub.endpoint.replace("127.0.0.1", "localhost")
    assert ckdiff.diff("hf://org/base", "hf://org/tuned").rules["exact"]["changed"] == 70


def test_errors_are_those_of_checkpoints(hub: Hub) -> None:
    with pytest.raises(CheckpointError) as caught:
        ckdiff.open_checkpoint("hf://org/nothing")
    assert caught.value.__cause__ is None


def test_a_long_download_is_told_in_a_log(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put("org/base", two_shards(BASE))
    monkeypatch.setattr(cached, "_WORTH_SAYING", 4096)
    monkeypatch.setattr(cached, "_EVERY", 0.0)
    lines = ok("diff", "hf://org/base", "hf://org/tuned").stderr.splitlines()
    assert [line for line in lines if "note:" not in line][:3] == [
        "ckdiff: downloading hf://org/base: 12.2 KiB, 2 files",
        "ckdiff: downloaded 8.1 KiB of 12.2 KiB",
        "ckdiff: downloading hf://org/tuned: 12.2 KiB",
    ]
    assert "download" not in ok("diff", "hf://org/base", "hf://org/tuned").stderr


# -- before anything is downloaded -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diff", "hf://org/base", "hf://org/nope"], "no such model"),
        (["diff", "hf://org/base", "{tmp}/missing"], "does not exist"),
        (["diff", "hf://org/base", "hf://org/tuned", "-o", "{tmp}/there"], "is not a mask store"),
        (["diff", "hf://org/base", "hf://org/tuned", "-o", "{tmp}/no/x"], "no directory"),
        (["diff", "hf://org/base", "hf://org/tuned", "--rename", "(=x"], "regular expression"),
        (["diff", "hf://org/base", "hf://org/tuned", "--include", "zzz"], "nothing to compare"),
        (["diff", "hf://org/base", "hf://org/tuned", "--memory", "1MiB"], "too little"),
        (["delta", "hf://org/base", "hf://org/tuned", "-o", "{tmp}/there"], "exists"),
        (["apply", "hf://org/base", "{tmp}/none", "-o", "{tmp}/x"], "does not exist"),
        (["apply", "hf://org/other", "{tmp}/d", "-o", "{tmp}/x"], "was not made for"),
        (["apply", "hf://org/base", "{tmp}/d", "-o", "{tmp}/there"], "exists"),
        (["graft", "hf://org/base", "hf://org/tuned", "--mask", "{tmp}/m", "-o", "{tmp}/there"],
         "exists"),
        (["import", "{tmp}/masks.npz", "--base", "hf://org/other", "-o", "{tmp}/x"], "lacks 1"),
        (["delta", "hf://org/base", "hf://org/tuned", "-o", "{tmp}/x", "--memory", "1KiB"],
         "memory"),
        (["delta", "hf://org/base", "hf://org/tuned", "-o", "{tmp}/x", "--mask", "{tmp}/m",
          "--rule", "ulp=3"], "ulp=3"),
        (["delta", "hf://org/base", "hf://org/less", "-o", "{tmp}/x", "--mask", "{tmp}/m"],
         "does not fit"),
        (["delta", "hf://org/base", "hf://org/clash", "-o", "{tmp}/x", "--encoding", "indices"],
         "told apart"),
        (["apply", "hf://org/base", "{tmp}/d", "-o", "{tmp}/x", "--memory", "1KiB"], "memory"),
        (["overlap", "{tmp}/m", "{tmp}/m", "--null", "magnitude", "--base", "hf://org/other"],
         "has no"),
    ],
)  # fmt: skip
def test_what_is_refused_costs_no_download(
    hub: Hub, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    base = write_safetensors(tmp_path / "base.safetensors", BASE)
    tuned = write_safetensors(tmp_path / "tuned.safetensors", TUNED)
    ckdiff.delta(base, tuned, tmp_path / "d")
    ckdiff.diff(base, tuned, tmp_path / "m")
    np.savez(tmp_path / "masks.npz", b=np.ones(8, bool))
    hub.put("org/other", {"model.safetensors": safetensors({"other": BIG})})
    hub.put("org/less", {"model.safetensors": safetensors({"b": BASE["b"]})})
    clash = {"b": BASE["b"], "b.indices": BIG}
    hub.put("org/clash", {"model.safetensors": safetensors(clash)})
    assert words in error(*(text.format(tmp=tmp_path) for text in arguments))
    assert hub.downloaded() == []
    assert blobs(tmp_path) == []


def test_room_for_both_sides_together(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [len(hub.repositories[r]["main"].files["model.safetensors"])
             for r in ("org/base", "org/tuned")]  # fmt: skip
    usage = shutil.disk_usage(tmp_path)._replace(free=sum(sizes) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BudgetError, match="hf://org/base and hf://org/tuned: "):
        ckdiff.diff("hf://org/base", "hf://org/tuned")
    assert hub.downloaded() == []


def test_two_revisions_share_what_is_fetched(hub: Hub) -> None:
    hub.put("org/base", two_shards(BASE), "v1")
    hub.put("org/base", two_shards(TUNED), "v2")
    sides = "hf://org/base@v1", "hf://org/base@v2"
    planned = json.loads(ok("diff", *sides, "--dry-run", "--json").stdout)
    assert hub.downloaded() == []
    ok("diff", *sides)
    files = hub.repositories["org/base"]["v2"].files
    names = [name for name in hub.downloaded() if name.endswith(".safetensors")]
    assert planned["bytes_to_download"] == sum(len(files[name]) for name in names)


def test_a_server_that_is_busy_for_a_moment(hub: Hub) -> None:
    def busy(request: Request, handler: Handler) -> bool | None:
        if request.file and request.method == "GET" and request.number == 1:
            handler.say(503, b"", Retry_After="0")
            return True
        return None

    hub.fault = busy
    assert ckdiff.diff("hf://org/base", "hf://org/tuned").rules["exact"]["changed"] == 70


def test_grafting_over_a_directory(hub: Hub, tmp_path: Path) -> None:
    for repo, tensors in (("org/base", BASE), ("org/tuned", TUNED)):
        hub.put(repo, two_shards(tensors))
    mask, out = str(tmp_path / "m.zarr"), tmp_path / "out"
    for side, tensors in (("base", BASE), ("tuned", TUNED)):
        write_safetensors(tmp_path / f"{side}.safetensors", tensors)
    ckdiff.diff(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", mask)
    out.mkdir()
    sides = ["graft", "hf://org/base", "hf://org/tuned", "--mask", mask, "-o", str(out)]
    ok(*sides)
    for folder in (tmp_path / "home").rglob("hub/models--*"):
        shutil.rmtree(folder)
    assert "use --overwrite" in error(*sides)
    ok(*sides, "--overwrite")
    assert sorted(os.listdir(out)) == sorted(n for n in two_shards(BASE) if n.startswith("model"))
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "home").rglob("hub/models--*"):
        shutil.rmtree(folder)
    hub.requests.clear()
    assert "is not a directory" in error(*sides[:-1], str(tmp_path / "file"))
    assert hub.downloaded() == []


# -- what the cache knows --------------------------------------------------------------------------


def test_a_part_of_a_repository_is_not_taken_for_it_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for repo, tensors in (("org/base", BASE), ("org/tuned", TUNED)):
        files = {"a.safetensors": safetensors({"a.0.w": tensors["a.0.w"]}),
                 "b.safetensors": safetensors({"a.1.w": tensors["a.1.w"]})}  # fmt: skip
        hub.put(repo, files)
        hub.put(f"{repo}-index", two_shards(tensors))
    for tail, one in (("", "a"), ("-index", "model-1")):
        ok("diff", f"hf://org/base{tail}/{one}.safetensors",
           f"hf://org/tuned{tail}/{one}.safetensors")  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = error("diff", "hf://org/base", "hf://org/tuned")
    assert "b.safetensors: is not in the cache" in line
    line = error("diff", "hf://org/base-index", "hf://org/tuned-index")
    assert "model.safetensors.index.json: is not in the cache" in line
    ok("diff", "hf://org/base/a.safetensors", "hf://org/tuned/a.safetensors")


def test_a_cache_that_others_filled(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    hub.put("org/shards", {"a.safetensors": safetensors(BASE), "b.safetensors": b"x"})
    cache = tmp_path / "home" / "hub"
    for repo, name in (("org/base", "model.safetensors"), ("org/shards", "a.safetensors")):
        hf_hub_download(repo, name, cache_dir=cache, endpoint=hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ok("info", "hf://org/base")  # what every tool calls a model that is one file
    ok("info", "hf://org/shards/a.safetensors")
    assert "cannot tell whether all of its files" in error("info", "hf://org/shards")


def test_offline_a_revision_is_what_it_was_last(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = hub.repositories["org/base"]["main"].sha
    ok("info", "hf://org/tuned")
    ckdiff.diff("hf://org/base", "hf://org/tuned")
    second = hub.put("org/base", {"model.safetensors": safetensors(TUNED)}, "next")
    ckdiff.diff(f"hf://org/base@{second}", "hf://org/tuned@main")  # both are cached now
    hub.put("org/base", {"model.safetensors": safetensors(TUNED)})  # main leads there now
    online = ckdiff.diff("hf://org/base", f"hf://org/base@{first}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = ckdiff.diff("hf://org/base", f"hf://org/base@{first}")
    assert online.commits == offline.commits == {"base": second, "tuned": first}
    assert online.rules == offline.rules


def test_a_file_that_somebody_put_into_the_cache(hub: Hub, tmp_path: Path) -> None:
    hub.put("org/other", {"model.safetensors": safetensors(BASE)})
    assert ckdiff.diff("hf://org/base", "hf://org/other").bytes_known_equal > 0
    folder = tmp_path / "home" / "hub" / "models--org--other" / "snapshots"
    (link,) = folder.rglob("model.safetensors")
    link.unlink()
    link.write_bytes(safetensors(TUNED))
    found = ckdiff.diff("hf://org/base", "hf://org/other")
    assert found.bytes_known_equal == 0
    assert found.rules["exact"]["changed"] == 70


# -- what people see -------------------------------------------------------------------------------


def test_the_commits_are_shown(hub: Hub, tmp_path: Path) -> None:
    short = hub.repositories["org/tuned"]["main"].sha[:7]
    store = str(tmp_path / "run.zarr")
    title = f"hf://org/tuned ({short})"
    assert title in ok("diff", "hf://org/base", "hf://org/tuned", "-o", store).stdout
    assert title in ok("show", store).stdout
    assert title in ok("info", "hf://org/tuned").stdout
    found = json.loads(ok("diff", "hf://org/base", "hf://org/tuned", "--json").stdout)
    assert found["commits"]["tuned"].startswith(short)


def test_what_is_not_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert "must be on this machine" in error("diff", "hf://org/base", "hf://org/tuned", "-o",
                                              "hf://org/x.zarr")  # fmt: skip
    assert error("show", "hf://org/base").startswith("hf://org/base is on the hub, but mask stores")
    assert "--stream" in run("diff", "hf://org/base", "hf://org/tuned", "--disk", "1GB").stderr


@pytest.mark.parametrize("endpoint", ["notaurl", "http://[::1", "ftp://host", "http://host:99999"])
def test_what_is_no_endpoint(hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT is not the address of a hub" in error("info", "hf://org/base")


def test_a_variable_that_the_client_cannot_read() -> None:
    done = python(MAIN, "info", "hf://org/base", env={"HF_HUB_DOWNLOAD_TIMEOUT": "abc"})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "a variable of the hub's client is wrong" in line


def test_a_dry_run_says_that_the_cache_has_no_room(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    planned = ok("diff", "hf://org/base", "hf://org/tuned", "--dry-run")
    assert "a run would be refused: hf://org/base and hf://org/tuned: " in planned.stderr
    assert hub.downloaded() == []


def test_looking_changes_nothing_in_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = hub.put("org/base", {"model.safetensors": safetensors(BASE)})
    ok("diff", "hf://org/base", "hf://org/tuned")
    second = hub.put("org/base", {"model.safetensors": safetensors(BASE), "README.md": b"new"})
    (folder,) = (tmp_path / "home").rglob("hub/models--org--base")
    ok("info", "hf://org/base")
    ok("diff", "hf://org/base", "hf://org/tuned", "--dry-run")
    assert (folder / "refs" / "main").read_text() == first
    assert not (folder / "snapshots" / second).exists()
    hub.requests.clear()
    ok("diff", "hf://org/base", "hf://org/tuned")
    assert (folder / "refs" / "main").read_text() == second
    assert hub.downloaded() == []  # it has the bytes, from another commit


def test_what_is_noted_in_the_cache_is_not_trusted(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok("diff", "hf://org/base", "hf://org/tuned")
    (note,) = (tmp_path / "home").rglob("models--org--base/.ckdiff/*")
    (ref,) = (tmp_path / "home").rglob("models--org--base/refs/*")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for text in ("[" * 200_000, '["../x", 3]', '["' + "x" * (1 << 20) + '"]', "{}", ""):
        note.write_text(text)
        ok("info", "hf://org/base")  # by its name, a file that is all of it
    note.unlink()
    os.mkfifo(note)
    ok("info", "hf://org/base")
    note.unlink()
    # another revision whose name is in the way of one that is known already
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.put("org/base", {"model.safetensors": safetensors(BASE)}, "main/x")
    ok("diff", "hf://org/base@main%2Fx", "hf://org/tuned")
    assert os.listdir(ref.parent) == ["main"]
    assert all(len(name) == 40 for name in os.listdir(note.parent))


def test_the_clients_logger_is_as_before(hub: Hub) -> None:
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    sides = [f"org/{i}" for i in range(4)]
    for repo in sides:
        hub.put(repo, {"model.safetensors": safetensors(BASE)})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda repo: ckdiff.open_checkpoint(f"hf://{repo}").close(), sides))
    assert logger.level == before
