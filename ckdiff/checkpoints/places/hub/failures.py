"""What the hub's client raises, in our words: one line, what to do, and no secret in it."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from ckdiff.checkpoints.places.hub.address import HubAddress
from ckdiff.checkpoints.places.hub.retries import TRANSIENT
from ckdiff.errors import BudgetError, CheckpointError, CkdiffError, printable

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_LATER = "run it again: downloaded files are kept, and with -o finished chunks"
OFFLINE = "unset HF_HUB_OFFLINE, or fetch it first with `hf download`"


@contextmanager
def hub_errors(address: HubAddress, endpoint: str) -> Iterator[None]:
    """Turn whatever the client raises into a CheckpointError about ``address``.

    Our own errors and KeyboardInterrupt pass through.
    """
    try:
        yield
    except CkdiffError:
        raise
    except Exception as error:  # the client's own, httpx2's, xet's: there is no common base
        raise explained(error, address, endpoint) from None


def explained(error: Exception, address: HubAddress, endpoint: str) -> CkdiffError:
    """The error to raise for what the client raised."""
    from huggingface_hub import errors

    where, host = str(address), host_of(endpoint)
    if isinstance(error, errors.GatedRepoError):  # first: it is a RepositoryNotFoundError too
        return CheckpointError(
            f"{where}: the repository is gated, and this account has no access",
            hint=f"ask for access on its page at {host}, then {_LOG_IN}",
        )
    if isinstance(error, errors.DisabledRepoError):
        return CheckpointError(f"{where}: access to the repository is disabled at {host}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{where}: {host} has no such model, or it is private",
            hint=f"check the name; for a private one {_LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{where}: there is no revision {printable(address.revision or 'main')}",
            hint="give a branch, a tag or a commit, with %2F for a slash",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return CheckpointError(
            f"{where}: {host} lists a file that it does not have", hint="run it again later"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(f"{where}: is not cached, and HF_HUB_OFFLINE is set", hint=OFFLINE)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return explained(error.__cause__, address, endpoint)
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error.response.status_code, where, host)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return BudgetError(
            f"{where}: there is no room left in the hub's cache",
            hint="free some space, or set HF_HOME to a place with more",
        )
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return CheckpointError(
            f"{where}: cannot be cached: {printable(str(error.filename))}: {error.strerror}",
            hint="set HF_HOME to a place that can be written to",
        )
    if is_transport(error) and not may_pass(error):
        return CheckpointError(
            f"{where}: {host} cannot be asked: {brief(error)}",
            hint="is HF_ENDPOINT the address of a hub, such as https://host, and HF_TOKEN a token?",
        )
    if isinstance(error, json.JSONDecodeError):
        return CheckpointError(
            f"{where}: {host} does not answer like a hub",
            hint="is HF_ENDPOINT a hub, and does the network ask for a login first?",
        )
    if isinstance(error, UnicodeEncodeError):  # headers are ASCII
        return CheckpointError(f"{where}: HF_TOKEN is not a token", hint=_LOG_IN)
    if is_transport(error):
        return CheckpointError(
            f"{where}: the connection to {host} failed: {brief(error)}", hint=_LATER
        )
    return CheckpointError(f"{where}: cannot be fetched from {host}: {brief(error)}", hint=_LATER)


def _status(status: int, where: str, host: str) -> CheckpointError:
    if status == 401:
        return CheckpointError(f"{where}: {host} does not accept the token", hint=_LOG_IN)
    if status == 403:
        return CheckpointError(
            f"{where}: {host} forbids access", hint=f"has the token the right to read? {_LOG_IN}"
        )
    if status == 429:
        return CheckpointError(f"{where}: {host} says too many requests", hint=_LATER)
    return CheckpointError(f"{where}: {host} answers with the status {status}", hint=_LATER)


def is_transport(error: BaseException) -> bool:
    """Whether a connection broke, was refused or timed out, or broke the protocol."""
    import httpx2

    return isinstance(error, httpx2.TransportError)


def may_pass(error: BaseException) -> bool:
    """Whether another try may not fail."""
    import httpx2

    if status_of(error) in TRANSIENT:
        return True
    ours = httpx2.UnsupportedProtocol, httpx2.LocalProtocolError  # what we ask for is wrong
    return is_transport(error) and not isinstance(error, ours)


def status_of(error: BaseException) -> int | None:
    """The status of an answer that the client raised, or None."""
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def asked(error: BaseException) -> float | None:
    """How many seconds the server asked us to wait."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    text = error.response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() else None


def host_of(endpoint: str) -> str:
    """How messages name a server: without what may be secret in its URL."""
    try:
        parts = urlsplit(endpoint)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the hub"
    return printable((parts.hostname or "the hub") + port)


def brief(error: BaseException) -> str:
    """The first line of a foreign error, without tokens and without the queries of signed URLs."""
    lines = str(error).strip().splitlines()
    return printable(redacted(lines[0] if lines else type(error).__name__))[:300]


def redacted(text: str) -> str:
    """``text`` without anything that could let somebody in."""
    from huggingface_hub import get_token

    token = None
    with suppress(Exception):  # asking a provider for a token may fail in any way
        token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"\bhf_\w+", "***", text)
    text = re.sub(r"(?i)\b(bearer|basic)\s+\S+", r"\1 ***", text)
    text = re.sub(r"://[^/\s@]+@", "://", text)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
