"""A model repository at one commit: what files it has, and exact ranges of their bytes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ckdiff._version import __version__
from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.etags import Etags, content_of, plain_etag
from ckdiff.checkpoints.places.hub.exchange import Answer, asking
from ckdiff.checkpoints.places.hub.failures import asked, host_of, hub_errors, may_pass, status_of
from ckdiff.checkpoints.places.hub.retries import Backoff
from ckdiff.checkpoints.places.hub.settings import Settings
from ckdiff.errors import CheckpointError, SourceChanged, printable

if TYPE_CHECKING:
    from httpx2 import Response

_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: statuses by which a storage server says that a signed URL has run out
_EXPIRED = frozenset({400, 401, 403, 404, 410})
_WORTH = 1 << 20  # bytes that have to arrive before earlier failures are forgotten


def _always() -> None:
    """Whoever asked still wants it."""


@dataclass(frozen=True, slots=True)
class _Unfit:
    """What is wrong with an answer where another try may bring the right one."""

    why: str
    stale: bool = False  #: whether the hub has to be asked again where the file is


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository."""

    name: str  #: its path in the repository
    size: int  #: bytes
    content: str = ""  #: ``sha256:HEX`` or ``git:HEX`` where the hub says so, as in SourceFile


class HubRepository:
    """A model repository, pinned to the commit that its revision led to when it was opened.

    May be used by several threads. It holds no connection of its own that would have to be closed.
    """

    def __init__(
        self, address: HubAddress, settings: Settings, commit: str, listed: dict[str, Any]
    ) -> None:
        self.address, self.settings = address, settings
        self.commit = commit  #: 40 hex digits
        self.wait: Callable[[float], None] | None = None  #: instead of sleeping before a retry
        self.timeout: float | None = None  #: seconds without any byte; None: the client's own
        self._listed = listed
        self._files: dict[str, HubFile] = {}
        self._etags = Etags()
        self._routes: dict[str, str] = {}  #: where the last range of a file was redirected to
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        address: HubAddress,
        settings: Settings | None = None,
        *,
        wait: Callable[[float], None] | None = None,
    ) -> HubRepository:
        """Resolve the revision and list the files. Asks the hub once.

        Raises CheckpointError: no such repository or revision, gated, offline, not reachable.
        """
        from huggingface_hub import HfApi, constants

        settings = settings or Settings.of_environment()
        endpoint = settings.endpoint
        with hub_errors(address, endpoint):
            api = HfApi(endpoint=endpoint, library_name="ckdiff", library_version=__version__)

            def ask() -> Any:
                return api.model_info(
                    address.repo,
                    revision=address.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                )

            info = _patiently(ask, Backoff(wait=wait))
            siblings = [item for item in info.siblings or () if _is_name(item.rfilename)]
            listed = {item.rfilename: item for item in siblings}
        _check_commit(address, info.sha, host_of(endpoint))
        found = cls(address, settings, info.sha, listed)
        found.wait = wait
        return found

    @property
    def names(self) -> list[str]:
        """The paths of all files, whatever they are."""
        return list(self._listed)

    def __contains__(self, name: str) -> bool:
        return name in self._listed

    def file(self, name: str) -> HubFile:
        """A file's size and content hash; asks the hub where its listing did not have the size.

        Raises CheckpointError.
        """
        with self._lock:
            found = self._files.get(name)
        if found is None:
            found = self._describe(name)
            with self._lock:
                self._files[name] = found
        return found

    def read(self, name: str, start: int, size: int, check: Callable[[], None] = _always) -> bytes:
        """``size`` bytes of a file from byte ``start`` on: exactly these, or an error.

        ``check`` is as in ``read_into``. Raises SourceChanged where the hub has another file by
        now, and CheckpointError.
        """
        return filled(size, lambda view: self.read_into(name, start, view, check))

    def read_into(
        self, name: str, start: int, view: memoryview, check: Callable[[], None] = _always
    ) -> None:
        """``read`` of ``len(view)`` bytes into a writable view of bytes.

        A connection that breaks is taken up where it broke. ``check`` is called before each request
        and whenever something arrived; it raises where nobody wants it any more. Raises what
        ``read`` and ``check`` raise; the view holds nothing of use then.
        """
        file = self.file(name)
        if start < 0 or start + len(view) > file.size:
            raise CheckpointError(
                f"{self._where(name)}: has {file.size:,} bytes, but more are needed"
            )
        filling = _Filling(view)
        backoff = Backoff(wait=self.wait)
        route = self._routes.get(name)
        with hub_errors(self.address, self.settings.endpoint):
            while filling.have < len(view):
                check()
                before = filling.have
                failure: Exception
                try:
                    unfit = self._fetch(file, start, filling, route, check)
                    if unfit is None:
                        return
                    text = f"{self._where(name)}: {unfit.why}"
                    failure, stale = CheckpointError(text, hint="run it again"), unfit.stale
                except Exception as error:
                    stale = _expired(error)
                    if not (route is not None and stale) and not may_pass(error):
                        raise
                    failure = error
                if route is not None and stale:
                    self._forget(name, route)
                    route = None  # the hub knows a new one, or why there is none
                    continue
                if filling.have - before >= _WORTH:
                    backoff.progress()
                if not backoff.again(asked(failure)):
                    raise failure
                route = self._routes.get(name)

    # one request

    def _fetch(
        self,
        file: HubFile,
        start: int,
        filling: _Filling,
        route: str | None,
        check: Callable[[], None],
    ) -> _Unfit | None:
        """Ask for what is missing, from the hub or from where it sent us before."""
        first, stop = start + filling.have, start + len(filling.view)
        headers = {"Range": f"bytes={first}-{stop - 1}", "Accept-Encoding": "identity"}
        if route is None:
            headers |= self._authorized()
        url = route or self.url(file.name)
        with asking(url, headers, self._patience(), self._where(file.name)) as answer:
            if not self._is_version(file, answer, direct=route is not None):
                return _Unfit("its storage has other content now", stale=True)
            response = answer.response
            unfit = self._misfit(file, first, stop, response)
            if unfit is not None:
                return _Unfit(unfit)
            for piece in response.iter_raw():
                check()
                if not filling.add(piece):
                    filling.have = first - start  # nothing of such an answer can be trusted
                    return _Unfit("more bytes arrived than requested")
            last = str(response.url)
        if filling.have < len(filling.view):
            return _Unfit("only a part of a range of bytes arrived")
        if host_of(last) != host_of(self.settings.endpoint):  # a storage, which needs no token
            self._routes[file.name] = last
        return None

    def _forget(self, name: str, route: str) -> None:
        """Ask the hub again where a file is, unless another thread did meanwhile."""
        with self._lock:
            if self._routes.get(name) == route:
                del self._routes[name]

    def _misfit(self, file: HubFile, first: int, stop: int, response: Response) -> str | None:
        """Why an answer is not the bytes from ``first`` to ``stop``, or None where it is."""
        if response.headers.get("Content-Encoding", "identity") != "identity":
            return "it arrives compressed"
        if response.status_code != 206:
            if (first, stop) == (0, file.size):
                return None
            raise CheckpointError(
                f"{self._where(file.name)}: {host_of(str(response.url))} does not serve parts of "
                "files",
                hint="fetch whole files instead, with `hf download`",
            )
        span = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        found = tuple(map(int, span.groups())) if span else None
        if found is None or found[:2] != (first, stop - 1):
            return "the server sends other bytes than those requested"
        if found[2] != file.size:
            raise SourceChanged(
                f"{self._where(file.name)}: has {found[2]:,} bytes now, and had {file.size:,}",
                hint="run it again",
            )
        if response.headers.get("Content-Length", str(stop - first)) != str(stop - first):
            return "the server announces another length than requested"
        return None

    def _is_version(self, file: HubFile, answer: Answer, *, direct: bool) -> bool:
        """Whether the answer is of the pinned commit, and of the same file.

        False where the hub has to be asked again where the file is. Raises SourceChanged.
        """
        commit = answer.header("X-Repo-Commit")
        if commit and commit != self.commit:
            raise SourceChanged(
                f"{self._where(file.name)}: comes from another commit, {printable(commit)}",
                hint="run it again",
            )
        found = self._etags.verdict(file.name, file.content, answer, direct=direct)
        if found == "replaced":
            raise SourceChanged(
                f"{self._where(file.name)}: was replaced at the hub while it was being read",
                hint="run it again",
            )
        return found == "same"

    def _describe(self, name: str) -> HubFile:
        """A file from the listing, or from a HEAD request."""
        item = self._listed.get(name)
        if item is None:
            raise CheckpointError(f"{self.address}: has no file {printable(name)}")
        content = ""
        if item.lfs is not None:
            content = content_of(str(item.lfs.sha256))
        elif item.blob_id is not None:
            content = content_of(str(item.blob_id))
        listed = item.size if isinstance(item.size, int) and item.size >= 0 else None
        if listed is not None and content:
            return HubFile(name, listed, content)
        from huggingface_hub import get_hf_file_metadata

        with hub_errors(self.address, self.settings.endpoint):
            found = _patiently(
                lambda: get_hf_file_metadata(
                    self.url(name), endpoint=self.settings.endpoint, timeout=self._patience()
                ),
                Backoff(wait=self.wait),
            )
        size = found.size if listed is None else listed
        if size is None or found.size not in (None, size):
            raise CheckpointError(
                f"{self._where(name)}: {host_of(self.settings.endpoint)} does not report its size",
                hint="is HF_ENDPOINT a hub?",
            )
        etag = plain_etag(found.etag or "")
        if etag:
            self._etags.note(name, etag)
        return HubFile(name, size, content or content_of(etag))

    def url(self, name: str) -> str:
        """Where a file is, at the pinned commit."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(
            self.address.repo, name, revision=self.commit, endpoint=self.settings.endpoint
        )

    def _patience(self) -> float:
        from huggingface_hub import constants

        return self.timeout or constants.HF_HUB_DOWNLOAD_TIMEOUT

    def _authorized(self) -> dict[str, str]:
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers: dict[str, str] = build_hf_headers(
            library_name="ckdiff", library_version=__version__
        )
        return headers

    def _where(self, name: str) -> str:
        return f"hf://{self.address.repo}/{printable(name)}"


class _Filling:
    """A view that is filled from its beginning."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.have = 0  #: bytes that arrived

    def add(self, piece: bytes) -> bool:
        """Take more bytes; False where there is no room for them."""
        stop = self.have + len(piece)
        if stop > len(self.view):
            return False
        self.view[self.have : stop] = piece
        self.have = stop
        return True


def filled(size: int, fill: Callable[[memoryview], None]) -> bytes:
    """``size`` bytes that ``fill`` writes. They are in memory once: a header may have 100 MB."""
    whole = BytesIO(bytes(size))
    with whole.getbuffer() as view:
        fill(view)
    return whole.getvalue()


def _check_commit(address: HubAddress, commit: object, host: str) -> None:
    """Raise CheckpointError unless it is a commit, and the one that was asked for."""
    if not isinstance(commit, str) or _COMMIT.fullmatch(commit) is None:
        raise CheckpointError(
            f"{address}: {host} does not report its commit", hint="is HF_ENDPOINT a hub?"
        )
    wanted = (address.revision or "").lower()
    if _COMMIT.fullmatch(wanted) and wanted != commit:
        raise CheckpointError(
            f"{address}: {host} has another commit there, {commit}", hint="is HF_ENDPOINT a hub?"
        )


def _is_name(value: object) -> bool:
    """Whether it can be the name of a file; some are texts that no URL can hold."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _patiently(ask: Callable[[], Any], backoff: Backoff) -> Any:
    """What ``ask`` gives, asked again after failures that may pass."""
    while True:
        try:
            return ask()
        except Exception as error:
            if not may_pass(error) or not backoff.again(asked(error)):
                raise


def _expired(error: BaseException) -> bool:
    return status_of(error) in _EXPIRED
