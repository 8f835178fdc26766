"""One request, whose redirects and errors cost little whatever a server sends with them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckdiff.checkpoints.places.hub.failures import host_of
from ckdiff.errors import CheckpointError

if TYPE_CHECKING:
    from httpx2 import Request, Response

_REDIRECTS = 10  # one after the other
_SHORT = 8 << 10  # bytes of a body that are read for the sake of the connection
_SOON = 2.0  # seconds in which they have to arrive
#: headers that would be wrong without the body
_OF_BODY = frozenset({"content-encoding", "content-length", "transfer-encoding"})


@dataclass(slots=True)
class Answer:
    """What a server said in the end, its body not read yet."""

    response: Response
    redirects: list[Response] = field(default_factory=list)  #: what led to it

    def header(self, name: str) -> str:
        """The header of the first response that has it, or nothing."""
        for response in (*self.redirects, self.response):
            if name in response.headers:
                return str(response.headers[name])
        return ""

    @property
    def place(self) -> str:
        """Host and path of what answered: without a query, which is new in each signed URL."""
        url = self.response.url
        return f"{url.host}:{url.port or ''}{url.path}"


@contextmanager
def asking(url: str, headers: dict[str, str], timeout: float, where: str) -> Iterator[Answer]:
    """GET ``url`` with the hub's own client.

    Raises HfHubHTTPError for a status that is an error, httpx2's errors, and CheckpointError
    (about ``where``) for redirects that lead nowhere. Of the bodies of such answers no more than a
    few KiB are ever read, and nothing is made of them: the status and the headers say it all.
    """
    from huggingface_hub import get_session

    session = get_session()
    request: Request | None = session.build_request("GET", url, headers=headers, timeout=timeout)
    redirects: list[Response] = []
    while request is not None:
        # redirects are followed here: the client would read their bodies, whatever their length
        response = session.send(request, stream=True, follow_redirects=False)
        try:
            if response.status_code >= 400:
                _finish(response)
                _raise(response)
            if not response.has_redirect_location:
                yield Answer(response, redirects)
                return
            _finish(response)
            request = _following(response, where)
            redirects.append(response)
            if len(redirects) > _REDIRECTS:
                raise CheckpointError(
                    f"{where}: {host_of(url)} redirects again and again",
                    hint="is HF_ENDPOINT a hub?",
                )
        finally:
            response.close()


def _following(response: Response, where: str) -> Request:
    """The request that a redirect asks for: without the token where it leads to another host."""
    found = response.next_request
    if found is None or found.url.scheme not in ("http", "https") or not found.url.host:
        raise CheckpointError(
            f"{where}: {host_of(str(response.url))} redirects to something that is not a web "
            "address",
            hint="is HF_ENDPOINT a hub?",
        )
    return found


def _finish(response: Response) -> None:
    """Read a short body, so that the connection can be used again."""
    import httpx2

    length = response.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()) or int(length[:9]) > _SHORT:
        return
    until, have = time.monotonic() + _SOON, 0
    with suppress(httpx2.HTTPError):  # it says nothing that we need
        for piece in response.iter_raw():
            have += len(piece)
            if have > _SHORT or time.monotonic() > until:
                return


def _raise(response: Response) -> None:
    """Raise the client's own error for a status."""
    import httpx2
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    kept = [item for item in response.headers.multi_items() if item[0].lower() not in _OF_BODY]
    hf_raise_for_status(
        httpx2.Response(response.status_code, headers=kept, content=b"", request=response.request)
    )
