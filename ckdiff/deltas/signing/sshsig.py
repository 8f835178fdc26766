"""A detached signature: as ``ssh-keygen -Y sign`` writes it, or the 64 bytes of Ed25519 alone.

Signatures of Ed25519 are verified by the cryptography library, others, and where it is not
installed, by ``ssh-keygen``. That a key is one of those that may sign is looked at here, before.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from ckdiff.deltas.signing.keys import (
    ED25519,
    NAMESPACE,
    Key,
    fingerprint,
    read_small,
    ssh_string,
)
from ckdiff.errors import DeltaError, UsageError, install, printable

_LARGEST = 1 << 16  # bytes of a signature's file
_MAGIC = b"SSHSIG"
_HASHES = {b"sha512": hashlib.sha512, b"sha256": hashlib.sha256}
_ARMOUR = re.compile(
    rb"\s*-----BEGIN SSH SIGNATURE-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END SSH SIGNATURE-----\s*"
)
_SECONDS = 60
_AGAIN = "sign its manifest again: ssh-keygen -Y sign -n ckdiff -f KEY MANIFEST"


@dataclass(frozen=True, slots=True)
class Signature:
    """What a file of a signature holds."""

    file: bytes  #: as it is
    key: bytes | None  #: that it says it was made with; None where it says none
    value: bytes  #: of OpenSSH the kind and the value
    hashed: bytes  #: how OpenSSH hashed what was signed; nothing where it is signed as it is


def read_signature(path: str) -> Signature:
    """The signature in a file. Raises UsageError for one that cannot be read, and DeltaError."""
    raw = read_small(path, _LARGEST, "a signature")
    try:
        return _parsed(raw)
    except (ValueError, binascii.Error) as error:
        raise DeltaError(f"{printable(path)} {error}", hint=_AGAIN) from None


def _parsed(raw: bytes) -> Signature:
    armour = _ARMOUR.fullmatch(raw)
    if armour is None:
        text = b"".join(raw.split())
        value = raw if len(raw) == 64 else base64.b64decode(text, validate=True)
        if len(value) != 64:
            raise ValueError("is not a signature of OpenSSH or of Ed25519")
        return Signature(raw, None, value, b"")
    fields = _Fields(base64.b64decode(b"".join(armour[1].split()), validate=True))
    if fields.take(6) != _MAGIC or fields.take(4) != b"\0\0\0\1":
        raise ValueError("is a signature of another version of OpenSSH's format")
    key, namespace, _, hashed, value = (fields.string() for _ in range(5))
    fields.finish()
    if namespace != NAMESPACE.encode():
        shown = printable(namespace[:40].decode(errors="replace"))
        raise ValueError(f"was made for {shown!r}, and not for {NAMESPACE!r}")
    if hashed not in _HASHES:
        raise ValueError("uses a hash that OpenSSH does not use")
    return Signature(raw, key, value, hashed)


class _Fields:
    """Bytes that are taken one after the other; ValueError where there are too few."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        found = self._data[self._at : self._at + size]
        if len(found) < size:
            raise ValueError("is a signature that was cut")
        self._at += size
        return found

    def string(self) -> bytes:
        return self.take(int.from_bytes(self.take(4), "big"))

    def finish(self) -> None:
        if self._at != len(self._data):
            raise ValueError("is a signature that goes on after its end")


def signer(signature: Signature, message: bytes, keys: Sequence[Key]) -> Key | None:
    """Whose signature of ``message`` it is; None where it is of something else.

    Raises DeltaError where another key signed, and UsageError where it cannot be verified here.
    """
    if signature.key is None:
        pure = [key for key in keys if key.kind == ED25519]
        return next((k for k in pure if _is_ed25519(k.raw, signature.value, message)), None)
    found = next((key for key in keys if key.blob == signature.key), None)
    if found is None:
        raise DeltaError(
            f"it is signed with the key {fingerprint(signature.key)}, which is not one of the "
            "keys that may sign",
            hint="if you trust it, add it to the file of keys",
        )
    if found.kind == ED25519 and _has_library():
        kind = ssh_string(ED25519.encode()) + b"\0\0\0@"
        if len(signature.value) != len(kind) + 64 or not signature.value.startswith(kind):
            return None
        digest = _HASHES[signature.hashed](message).digest()
        parts = NAMESPACE.encode(), b"", signature.hashed, digest
        signed = _MAGIC + b"".join(map(ssh_string, parts))
        return found if _is_ed25519(found.raw, signature.value[-64:], signed) else None
    return found if _by_ssh_keygen(signature, message) else None


def _needed() -> str:
    return f"{install('sign')}, or install OpenSSH"


def _has_library() -> bool:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        return False
    return True


def _is_ed25519(key: bytes, value: bytes, message: bytes) -> bool:
    try:
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    except ImportError:
        raise UsageError(
            "a bare signature of Ed25519 needs the package cryptography",
            hint=f"{install('sign')}, or sign with ssh-keygen -Y sign",
        ) from None
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(value, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _by_ssh_keygen(signature: Signature, message: bytes) -> bool:
    """Ask OpenSSH, which knows all kinds of keys, whether a signature is one of ``message``."""
    program = shutil.which("ssh-keygen")
    if program is None:
        raise UsageError("nothing that is installed here can verify this signature", hint=_needed())
    with tempfile.NamedTemporaryFile(prefix="ckdiff-", suffix=".sig") as file:
        file.write(signature.file)
        file.flush()
        asked = [program, "-Y", "check-novalidate", "-n", NAMESPACE, "-s", file.name]
        try:
            done = subprocess.run(
                asked, input=message, capture_output=True, timeout=_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UsageError(f"ssh-keygen does not work: {error}", hint=_needed()) from None
    return done.returncode == 0
