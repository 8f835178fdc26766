"""Who may sign: public keys as OpenSSH has them, or one in PEM. No file is believed."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ckdiff.checkpoints.places.openfile import OpenFile
from ckdiff.errors import CheckpointError, UsageError, printable

NAMESPACE = "ckdiff"  #: of our signatures; one made for another purpose is none of ours
ED25519 = "ssh-ed25519"
_LARGEST = 1 << 20  # bytes of a file of keys
_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----\s+([A-Za-z0-9+/=\s]+?)\s*-----END PUBLIC KEY-----")
_ED25519_IN_PEM = bytes.fromhex("302a300506032b6570032100")  # what DER has before the key
_KIND = re.compile(r"(ssh|ecdsa-sha2|sk-ssh|sk-ecdsa-sha2)-[a-z0-9@.\-]+", re.ASCII)
_WORD = re.compile(r'(?:[^\s"]|"[^"]*")+')
_OPTION = re.compile(r'([a-z-]+)(?:="([^"]*)")?(?:,|$)', re.ASCII)
_WANTED = "give an OpenSSH .pub file, an allowed_signers file, or an Ed25519 public key in PEM"


@dataclass(frozen=True, slots=True)
class Key:
    """A public key, and whose it is."""

    kind: str  #: its OpenSSH type
    blob: bytes  #: as OpenSSH has it
    who: str  #: as the file says, or nothing

    @property
    def fingerprint(self) -> str:
        """As ``ssh-keygen -l`` prints it."""
        return fingerprint(self.blob)

    @property
    def raw(self) -> bytes:
        """The 32 bytes of an Ed25519 key."""
        return self.blob[-32:]

    def __str__(self) -> str:
        return f"{self.who} ({self.fingerprint})" if self.who else self.fingerprint


def fingerprint(blob: bytes) -> str:
    """The SHA-256 of a key, as ``ssh-keygen -l`` prints it."""
    digest = hashlib.sha256(blob).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def ssh_string(data: bytes) -> bytes:
    """Bytes behind their length."""
    return len(data).to_bytes(4, "big") + data


def read_small(path: str, most: int, what: str) -> bytes:
    """The bytes of a file that has no more than ``most``. Raises UsageError."""
    try:
        with closing(OpenFile.open(path)) as file:
            if file.size > most:
                raise UsageError(f"{printable(path)} is too large for {what}", hint=_WANTED)
            return file.read(0, most)
    except CheckpointError as error:
        raise UsageError(printable(error.message), hint=_WANTED) from None


def read_keys(path: str) -> list[Key]:
    """The keys that a file lists, at least one. Raises UsageError.

    A line is ``KIND KEY [COMMENT]``, or ``WHO [OPTIONS] KIND KEY [COMMENT]`` as in an
    allowed_signers file; of options only namespaces are understood.
    """
    raw = read_small(path, _LARGEST, "a file of public keys")
    shown = printable(path)
    if b"PRIVATE KEY-----" in raw:
        raise UsageError(f"{shown} holds a private key", hint="give the public one, KEY.pub")
    try:
        text = raw.decode()
        found = list(_in_pem(text)) or list(_in_lines(text))
    except (ValueError, binascii.Error) as error:
        raise UsageError(f"{shown}: {printable(str(error))}", hint=_WANTED) from None
    if not found:
        raise UsageError(f"{shown} has no public key that may sign for ckdiff", hint=_WANTED)
    return found


def _in_pem(text: str) -> Iterator[Key]:
    for match in _PEM.finditer(text):
        der = base64.b64decode("".join(match[1].split()), validate=True)
        if len(der) != 44 or not der.startswith(_ED25519_IN_PEM):
            raise ValueError("is a public key in PEM that is not of Ed25519")
        yield Key(ED25519, ssh_string(ED25519.encode()) + ssh_string(der[-32:]), "")


def _in_lines(text: str) -> Iterator[Key]:
    for number, line in enumerate(text.splitlines(), 1):
        words = _WORD.findall(line)
        if not words or words[0].startswith("#"):
            continue
        if _KIND.fullmatch(words[0]):
            who, options, rest = " ".join(words[2:]), "", words
        else:
            who, rest = words[0].replace('"', ""), words[1:]
            options = "" if rest and _KIND.fullmatch(rest[0]) else "".join(rest[:1])
            rest = rest[1:] if options else rest
        if len(rest) < 2 or not _KIND.fullmatch(rest[0]):
            raise ValueError(f"line {number} is not a public key")
        blob = _blob(rest[0], rest[1], number)
        if _for_us(options, number):
            yield Key(rest[0], blob, who[:200])


def _blob(kind: str, text: str, line: int) -> bytes:
    """A key's bytes; ValueError where they are of another kind, or cut."""
    try:
        blob = base64.b64decode(text, validate=True)
    except binascii.Error:
        blob = b""
    head = ssh_string(kind.encode())
    if not blob.startswith(head):
        raise ValueError(f"the key in line {line} is damaged")
    if kind == ED25519 and (len(blob) != len(head) + 36 or blob[len(head) :][:4] != b"\0\0\0 "):
        raise ValueError(f"the key in line {line} is damaged")
    return blob


def _for_us(options: str, line: int) -> bool:
    """Whether a line's options let its key sign for us; ValueError for those not understood.

    What would be passed over may be a limit: a date, or that it is no key but an authority's.
    """
    at, allowed = 0, True
    while at < len(options):
        match = _OPTION.match(options, at)
        if match is None or match[1] != "namespaces" or match[2] is None or "!" in match[2]:
            raise ValueError(
                f"line {line} has the options {options[:80]}, and only namespaces are understood: "
                "verify with `ssh-keygen -Y verify` instead"
            )
        patterns = match[2].split(",")
        allowed = any(fnmatchcase(NAMESPACE, pattern.strip()) for pattern in patterns)
        at = match.end()
    return allowed
