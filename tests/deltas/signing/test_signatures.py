"""Signatures of deltas and weight versions: whose, of what, and what is used then."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_support import run
from signatures import private_key, ssh_signature, write_pem, write_public
from version_models import write_steps
from weight_streams import read_model

import ckdiff
from ckdiff.deltas.checking import check
from ckdiff.deltas.signing import sshsig, verifying
from ckdiff.errors import CkdiffError, DeltaError, UsageError

KEY, OTHER = private_key(1), private_key(2)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints m0 to m3, a delta m1.delta, and a stream of three versions, the second full."""
    folder = tmp_path_factory.mktemp("made")
    steps = write_steps(folder, 3)
    ckdiff.delta(steps[0], steps[1], folder / "m1.delta")
    for number, (base, tuned) in enumerate(itertools.pairwise(steps), 1):
        ckdiff.delta(base, tuned, folder / "s", encoding="xor", full=number == 2)
    write_public(folder / "key.pub", KEY, comment="me@host")
    return folder


@pytest.fixture
def at(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(made, tmp_path / "made"))


def sign(path: Path, key: Any = KEY, **how: Any) -> Path:
    """Sign a delta or a version where its signature belongs."""
    text = verifying.write_manifest(str(path), None)
    out = path / "ckdiff.manifest.sig" if path.is_dir() else Path(f"{path}.manifest.sig")
    out.write_bytes(ssh_signature(key, text, **how))
    return out


def sign_all(stream: Path) -> None:
    for path in stream.iterdir():
        sign(path)


def test_the_manifest_is_what_sha256sum_prints(made: Path, tmp_path: Path) -> None:
    delta = hashlib.sha256((made / "m1.delta").read_bytes()).hexdigest()
    found = run("check", str(made / "m1.delta"), "--manifest", "-")
    assert found.stdout == f"# ckdiff manifest 1: a delta in a file\n{delta}  -\n"
    version = made / "s" / "weight_v000002"
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(version.iterdir())
    ]
    out = tmp_path / "x"
    assert run("check", str(version), "--manifest", str(out)).exit_code == 0
    assert out.read_text() == "# ckdiff manifest 1: weight version 000002\n" + "".join(lines)
    if program := shutil.which("sha256sum"):
        asked = [program, "-c", "--strict", str(out)]
        assert subprocess.run(asked, cwd=version, check=False, capture_output=True).returncode == 0
    # where it lies, and what hidden files there are, is nothing to it
    moved = Path(shutil.copytree(version, tmp_path / "elsewhere" / "weight_v000002"))
    (moved / ".cache").mkdir()
    (moved / ".cache" / "x").write_text("x")
    shutil.copy(out, moved / "ckdiff.manifest")
    assert verifying.write_manifest(str(moved), None) == out.read_bytes()


def test_manifests_are_not_written_over_other_files(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "x"
    out.write_text("mine")
    done = run("check", str(made / "m1.delta"), "--manifest", str(out))
    assert done.exit_code == 2
    assert "is not a manifest" in done.stderr
    assert out.read_text() == "mine"
    out.write_text("# ckdiff manifest 1: of something else\n")
    assert run("check", str(made / "m1.delta"), "--manifest", str(out)).exit_code == 0
    assert "a delta in a file" in out.read_text()
    for path, said in (("s", "each of them has its own signature"), ("m0", "not a delta")):
        done = run("check", str(made / path), "--manifest", "-")
        assert done.exit_code == 2
        assert said in done.stderr
    assert run("check", str(made / "m1.delta"), "--manifest", "-", "--json").exit_code == 2


def keys_as_given(folder: Path) -> dict[str, Path]:
    """The same key in all the ways that it may be given."""
    named = 'me@host,you@host namespaces="git,ck*" '
    both = write_public(folder / "both", OTHER)
    both.write_text("# who may sign\n\n" + both.read_text())
    with both.open("a") as file:
        file.write((write_public(folder / "one", KEY)).read_text())
    return {
        "pub": write_public(folder / "pub", KEY, comment="me@host"),
        "signers": write_public(folder / "signers", KEY, before=named),
        "plain signers": write_public(folder / "plain", KEY, before="* "),
        "several": both,
        "pem": write_pem(folder / "pem", KEY),
    }


def test_a_signed_delta_is_checked_and_applied(at: Path, tmp_path: Path) -> None:
    delta, signature = at / "m1.delta", sign(at / "m1.delta")
    for how, keys in keys_as_given(tmp_path).items():
        done = run("check", str(delta), "--verify-signature", str(keys), "--json")
        assert done.exit_code == 0, (how, done.output)
        assert "SHA256:" in json.loads(done.stdout)["signed_by"]["m1.delta"]
    out = tmp_path / "out"
    done = run("apply", str(at / "m0"), str(delta), "-o", str(out), "--verify-signature",
               str(at / "key.pub"))  # fmt: skip
    assert done.exit_code == 0, done.output
    assert read_model(out) == read_model(at / "m1")
    assert sorted(path.name for path in tmp_path.iterdir() if "verified" in path.name) == []
    # the file may have another name, and its signature may lie elsewhere
    moved = delta.rename(tmp_path / "renamed")
    signature = signature.rename(tmp_path / "signature")
    said = check(moved, verify_signature=at / "key.pub", signature=signature)["signed_by"]
    assert said["renamed"].startswith("me@host (SHA256:")
    for bare in (KEY.sign(text := verifying.write_manifest(str(moved), None)),
                 base64.b64encode(KEY.sign(text)) + b"\n"):  # fmt: skip
        signature.write_bytes(bare)
        assert check(moved, verify_signature=tmp_path / "pem", signature=signature)["ok"]


@pytest.mark.parametrize("hashed", ["sha256", "sha512"])
def test_either_hash_of_openssh(at: Path, hashed: str) -> None:
    sign(at / "m1.delta", hashed=hashed)
    assert check(at / "m1.delta", verify_signature=at / "key.pub")["ok"]


Change = Callable[[Path], object]
CHANGES: dict[str, tuple[str, Change]] = {
    "a byte of the delta": ("m1.delta", lambda path: flip(path, -1)),
    "a byte of a shard": (
        "s/weight_v000001",
        lambda path: flip(path / "model-00000-of-00001.safetensors", -1),
    ),
    "the index": (
        "s/weight_v000003",
        lambda path: longer(path / "model.safetensors.index.json"),
    ),
    "a file more": ("s/weight_v000002", lambda path: (path / "tokenizer.json").write_text("{}")),
    "a file less": ("s/weight_v000002", lambda path: (path / "config.json").unlink()),
    "a file in a folder": ("s/weight_v000002", lambda path: in_folder(path)),
    "a config": ("s/weight_v000002", lambda path: (path / "config.json").write_text("{}")),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def in_folder(path: Path) -> None:
    (path / "more").mkdir()
    (path / "more" / "x").write_text("x")


@pytest.mark.parametrize("what", CHANGES)
def test_every_byte_is_covered(at: Path, tmp_path: Path, what: str) -> None:
    name, change = CHANGES[what]
    path = at / name
    sign(path)
    assert check(path, verify_signature=at / "key.pub")["ok"]
    change(path)
    with pytest.raises(DeltaError, match="is not what was signed"):
        verifying.Signers(at / "key.pub").verify(str(path))
    with pytest.raises(CkdiffError):
        ckdiff.apply(
            at / "m0", path, tmp_path / "out", base_version=2 if "3" in name else None,
            verify_signature=at / "key.pub",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_another_version_number_is_another_thing(at: Path) -> None:
    sign(at / "s" / "weight_v000002")
    later = (at / "s" / "weight_v000002").rename(at / "s" / "weight_v000009")
    with pytest.raises(DeltaError, match="is not what was signed"):
        check(later, verify_signature=at / "key.pub")


def test_who_signed_and_for_what(at: Path) -> None:
    delta = at / "m1.delta"
    with pytest.raises(DeltaError, match="is not signed: there is no") as caught:
        check(delta, verify_signature=at / "key.pub")
    assert "ssh-keygen -Y sign -n ckdiff" in str(caught.value)
    sign(delta, OTHER)
    with pytest.raises(DeltaError, match="not one of the keys that may sign"):
        check(delta, verify_signature=at / "key.pub")
    sign(delta, namespace="git")
    with pytest.raises(DeltaError, match="was made for 'git', and not for 'ckdiff'"):
        check(delta, verify_signature=at / "key.pub")
    with pytest.raises(UsageError, match="needs keys"):
        check(delta, signature=at / "key.pub")
    with pytest.raises(UsageError, match="needs keys"):
        ckdiff.apply(at / "m0", delta, at / "out", signature=at / "key.pub")
    with pytest.raises(UsageError, match="one signature belongs to one delta"):
        ckdiff.apply(
            at / "m0", [delta, delta], at / "out", verify_signature=at / "key.pub",
            signature=at / "key.pub",
        )  # fmt: skip


def test_a_stream_says_which_versions_are_not_signed(at: Path, tmp_path: Path) -> None:
    keys, stream = at / "key.pub", at / "s"
    for number in (1, 3):
        sign(stream / f"weight_v{number:06d}")
    with pytest.raises(DeltaError, match="weight_v000002 is not signed"):
        check(stream, verify_signature=keys)
    sign(stream / "weight_v000001", OTHER)
    with pytest.raises(DeltaError, match="2 of 3 versions are not signed"):
        check(stream, verify_signature=keys)
    # those that are not used need none
    sign(stream / "weight_v000002")
    ckdiff.apply(at / "m0", stream, tmp_path / "out", verify_signature=keys)
    assert read_model(tmp_path / "out") == read_model(at / "m3")
    with pytest.raises(DeltaError, match="not one of the keys that may sign"):
        ckdiff.apply(at / "m0", stream, tmp_path / "first", target=1, verify_signature=keys)
    assert check(stream / "weight_v000003", verify_signature=keys)["signed_by"].keys() == {
        "weight_v000003"
    }


def test_a_local_checkpoint_follows_what_is_signed(at: Path) -> None:
    local, stream, keys = str(at / "m0"), at / "s", str(at / "key.pub")
    sign(stream / "weight_v000001")
    ahead = ["apply", local, str(stream), "--in-place", "--verify-signature", keys]
    done = run(*ahead)
    assert done.exit_code == 2
    assert "weight_v000002 is not signed" in done.stderr
    assert not (at / "m0" / ".weight_sync" / "state.json").exists()
    assert run(*ahead, "--to", "1").exit_code == 0
    assert read_model(at / "m0") == read_model(at / "m1")
    sign_all(stream)
    assert ckdiff.sync.follow(local, stream, verify_signature=keys) == 3
    assert read_model(at / "m0") == read_model(at / "m3")
    assert ckdiff.sync.follow(local, stream, verify_signature=keys) == 3
    assert [path.name for path in at.iterdir() if "verified" in path.name] == []


@pytest.mark.parametrize("what", ["m1.delta", "s"])
def test_what_is_applied_is_what_was_verified(
    at: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    sign(at / "m1.delta")
    sign_all(at / "s")
    verify = verifying.Signers.verify

    def then_changed(self: verifying.Signers, path: str, into: Path | None = None) -> Any:
        found = verify(self, path, into)
        for file in [Path(path)] if Path(path).is_file() else Path(path).glob("*.safetensors"):
            flip(file, -1)  # after it was verified, and before it is used
        return found

    monkeypatch.setattr(verifying.Signers, "verify", then_changed)
    out = tmp_path / "out"
    ckdiff.apply(at / "m0", at / what, out, verify_signature=at / "key.pub")
    assert read_model(out) == read_model(at / ("m1" if what == "m1.delta" else "m3"))


needs_openssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs OpenSSH")


@needs_openssh
@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
@pytest.mark.parametrize("library", [True, False])
def test_keys_and_signatures_of_openssh(
    at: Path, monkeypatch: pytest.MonkeyPatch, kind: str, library: bool
) -> None:
    if not library:
        monkeypatch.setattr(sshsig, "_has_library", lambda: False)
    key, delta, out = str(at / "id"), at / "m1.delta", at / "m1.delta.manifest"
    bits = ["-b", "2048"] if kind == "rsa" else []
    for asked in (
        ["ssh-keygen", "-q", "-t", kind, *bits, "-N", "", "-C", "me", "-f", key],
        ["ssh-keygen", "-q", "-Y", "sign", "-n", "ckdiff", "-f", key, str(out)],
    ):
        check(delta, manifest=out)
        subprocess.run(asked, check=True, capture_output=True)
    assert check(delta, verify_signature=f"{key}.pub")["signed_by"]["m1.delta"].startswith("me (")
    flip(delta, -1)
    with pytest.raises(DeltaError, match="is not what was signed"):
        verifying.Signers(f"{key}.pub").verify(str(delta))
    monkeypatch.setenv("PATH", "/nonexistent")
    if kind != "ed25519" or not library:
        with pytest.raises(UsageError, match="nothing that is installed here"):
            verifying.Signers(f"{key}.pub").verify(str(delta))
