"""Files of keys and signatures that are not what they should be."""

from __future__ import annotations

import base64
import os
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from signatures import armoured, private_key, public_blob, ssh_signature, write_public

from ckdiff.deltas.signing.keys import read_keys
from ckdiff.deltas.signing.sshsig import read_signature, signer
from ckdiff.errors import CkdiffError, DeltaError, UsageError

KEY, MESSAGE = private_key(), b"what is signed"
TEXT = base64.b64encode(public_blob(KEY)).decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no public key"),
        ("# nothing\n\n", "has no public key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n", "holds a private key"),
        ("nonsense", "line 1 is not a public key"),
        ("me ssh-ed25519\n", "line 1 is not a public key"),
        (f"# x\nssh-ed25519 {TEXT[:-4]}\n", "key in line 2 is damaged"),
        (f"ssh-ed25519 {TEXT[:-4]}!!!!\n", "key in line 1 is damaged"),
        (f"ssh-rsa {TEXT}\n", "key in line 1 is damaged"),
        (f"me cert-authority ssh-ed25519 {TEXT}\n", "only namespaces are understood"),
        (f'me valid-before="20200101" ssh-ed25519 {TEXT}\n', "only namespaces are understood"),
        (f'me namespaces="!ckdiff,*" ssh-ed25519 {TEXT}\n', "only namespaces are understood"),
        (f'me namespaces="git" ssh-ed25519 {TEXT}\n', "has no public key that may sign"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "not of Ed25519"),
        ("\udcff", "UTF-8|utf-8"),
    ],
)
def test_files_of_keys_that_make_no_sense(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=said):
        read_keys(str(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "pipe")
    for path in (large, tmp_path / "pipe", tmp_path / "missing", tmp_path):
        with pytest.raises(UsageError):
            read_keys(str(path))
        with pytest.raises(UsageError):
            read_signature(str(path))


def verified(folder: Path, raw: bytes, message: bytes = MESSAGE) -> bool:
    path = folder / "x.sig"
    path.write_bytes(raw)
    keys = read_keys(str(write_public(folder / "x.pub", KEY)))
    return signer(read_signature(str(path)), message, keys) is not None


RIGHT = ssh_signature(KEY, MESSAGE)
FIELDS = base64.b64decode(b"".join(RIGHT.split(b"\n")[1:-2]))


def test_signatures_that_make_no_sense(tmp_path: Path) -> None:
    assert verified(tmp_path, RIGHT)
    assert verified(tmp_path, armoured(FIELDS))
    assert not verified(tmp_path, RIGHT, MESSAGE + b"!")
    assert not verified(tmp_path, bytes(64))
    for raw, said in (
        (b"", "not a signature of OpenSSH or of Ed25519"),
        (RIGHT + RIGHT, "no signature|base64|Only|Non-"),
        (armoured(FIELDS + b"\0"), "goes on after its end"),
        (armoured(FIELDS[:-1]), "was cut"),
        (armoured(b"SSHSIG\0\0\0\2" + FIELDS[10:]), "another version"),
        (armoured(b"SSHSIG\0\0\0\1\xff\xff\xff\xff"), "was cut"),
        (ssh_signature(KEY, MESSAGE, namespace="file"), "was made for 'file'"),
        (armoured(FIELDS.replace(b"sha512", b"sha999")), "a hash that OpenSSH does not use"),
    ):
        with pytest.raises(DeltaError, match=said):
            verified(tmp_path, raw)
    with pytest.raises(DeltaError, match="not one of the keys"):
        verified(tmp_path, ssh_signature(private_key(2), MESSAGE))


@given(at=st.integers(0, len(FIELDS) - 1), bit=st.integers(0, 7))
def test_no_signature_with_another_bit(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    data = bytearray(FIELDS)
    data[at] ^= 1 << bit
    folder = tmp_path_factory.mktemp("bit")
    with suppress(CkdiffError):
        assert not verified(folder, armoured(bytes(data)))


@given(st.binary(max_size=300))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("any")
    for what in (raw, armoured(b"SSHSIG\0\0\0\1" + raw)):
        with suppress(CkdiffError):
            assert not verified(folder, what)
