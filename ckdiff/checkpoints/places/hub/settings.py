"""Which hub, which cache, and whether it may be asked: the environment as it is now.

``huggingface_hub`` reads these variables once, when it is imported. Here they are read whenever a
checkpoint is opened, so that a program may change them between two calls.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import urlsplit

from ckdiff.errors import UsageError, of_the_whole, printable

_YES = {"1", "on", "yes", "true"}


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the hub and its cache are."""

    endpoint: str  #: such as ``https://host``, without a slash at its end
    cache: str  #: the directory that holds ``models--*``
    offline: bool  #: whether only the cache may be used

    @classmethod
    def of_environment(cls) -> Settings:
        """``HF_ENDPOINT``, ``HF_HUB_CACHE`` or ``HF_HOME``, and ``HF_HUB_OFFLINE``.

        Raises UsageError for what cannot be one.
        """
        asked = os.environ.get("HF_ENDPOINT")
        if asked:
            _check_endpoint(asked)
        try:
            with of_the_whole():
                from huggingface_hub import constants
        except ValueError as error:  # it reads its variables when it is imported
            raise UsageError(
                f"a variable of the hub's client is wrong: {printable(str(error))}",
                hint="HF_HUB_DOWNLOAD_TIMEOUT and similar variables must be numbers",
            ) from None
        endpoint = asked or constants.ENDPOINT
        offline = constants.is_offline_mode() or any(
            os.environ.get(name, "").lower() in _YES
            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
        )
        return cls(endpoint.rstrip("/"), _cache(constants.HF_HUB_CACHE), offline)


def _check_endpoint(endpoint: str) -> None:
    """Raise UsageError for what is no address of a server; it is not repeated, for its secrets."""
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError("HF_ENDPOINT is not the address of a hub", hint="such as https://host")


def _cache(default: str) -> str:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        found = os.environ.get(name)
        if found:
            folder = os.path.expandvars(os.path.expanduser(found))
            return os.path.abspath(os.path.join(folder, "hub") if name == "HF_HOME" else folder)
    return os.path.abspath(default)
