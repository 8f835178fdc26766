"""By which etag a file of the hub is known again, at the hub and wherever it is stored."""

from __future__ import annotations

import re
import threading
from typing import Literal

from ckdiff.checkpoints.places.hub.exchange import Answer

_HUB = ""  # where the hub itself is, among the places that have an etag
_HEX = re.compile(r"[0-9a-f]+")


class Etags:
    """The etags of a repository's files. May be used by several threads.

    A file has one etag at the hub, which vouches for wherever it sends us; and one at each place
    where it is stored, by which later answers from there are known without the hub.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], str] = {}  # of a file at a place, as last seen
        self._lock = threading.Lock()

    def note(self, name: str, etag: str) -> None:
        """What the hub says of a file that it was not asked about before."""
        with self._lock:
            self._seen.setdefault((name, _HUB), etag)

    def verdict(
        self, name: str, content: str, answer: Answer, *, direct: bool
    ) -> Literal["same", "stale", "replaced"]:
        """Whether an answer is of the file whose content is known as ``content``, as in HubFile.

        ``direct`` says that the hub was not asked where the file is. It is stale where the hub has
        to be asked again.
        """
        own = plain_etag(answer.response.headers.get("ETag", ""))
        redirected = direct or bool(answer.redirects)
        linked = plain_etag(answer.header("X-Linked-Etag")) or ("" if redirected else own)
        with self._lock:
            if linked and linked != self._seen.setdefault((name, _HUB), linked):
                return "replaced"
            if linked and _contradicts(linked, content):
                return "replaced"
            if not redirected:
                return "same"
            known = self._seen.get((name, answer.place))
            if direct and known != own:
                return "stale"
            if known not in (None, own) and not linked:
                return "replaced"
            self._seen[name, answer.place] = own
            return "same"


def content_of(etag: str) -> str:
    """What an etag of the hub says about a file's content, as in SourceFile; often nothing.

    It is the SHA-256 of a file in LFS or xet storage, and a git blob's id of any other.
    """
    if _HEX.fullmatch(etag) is None:
        return ""
    return {64: "sha256:", 40: "git:"}[len(etag)] + etag if len(etag) in (40, 64) else ""


def plain_etag(text: str) -> str:
    """An etag without its quotes and the mark of a weak one."""
    return text.strip().removeprefix("W/").strip('"')


def _contradicts(etag: str, content: str) -> bool:
    """Whether an etag of the hub is a content hash, and another one than a file has."""
    kind, _, known = content.partition(":")
    stands = content_of(etag)
    return bool(kind) and stands.startswith(f"{kind}:") and stands != f"{kind}:{known}"
