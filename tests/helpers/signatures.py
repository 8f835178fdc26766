"""Signatures as OpenSSH's description has them, made by nothing of ours."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


def private_key(seed: int = 1) -> Ed25519PrivateKey:
    """The same key each time."""
    return Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)


def _strings(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def public_blob(key: Ed25519PrivateKey) -> bytes:
    """A public key as OpenSSH has it in base64."""
    return _strings(b"ssh-ed25519", key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def write_public(
    path: Path, key: Ed25519PrivateKey, *, before: str = "", comment: str = ""
) -> Path:
    """A line of a .pub or allowed_signers file."""
    text = base64.b64encode(public_blob(key)).decode()
    path.write_text(f"{before}ssh-ed25519 {text} {comment}\n")
    return path


def write_pem(path: Path, key: Ed25519PrivateKey) -> Path:
    """A public key in PEM."""
    path.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


def armoured(fields: bytes) -> bytes:
    """What stands in a file of a signature."""
    text = base64.encodebytes(fields).decode()
    return f"-----BEGIN SSH SIGNATURE-----\n{text}-----END SSH SIGNATURE-----\n".encode()


def ssh_signature(
    key: Ed25519PrivateKey, message: bytes, *, namespace: str = "ckdiff", hashed: str = "sha512"
) -> bytes:
    """What ``ssh-keygen -Y sign`` writes."""
    digest = hashlib.new(hashed, message).digest()
    words = namespace.encode(), b"", hashed.encode()
    value = key.sign(b"SSHSIG" + _strings(*words, digest))
    signed = _strings(public_blob(key), *words, _strings(b"ssh-ed25519", value))
    return armoured(b"SSHSIG" + (1).to_bytes(4, "big") + signed)
