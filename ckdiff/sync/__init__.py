"""Publishing the weights of a process as versions that engines read, and following them.

::

    from ckdiff.sync import Publisher, follow

    with Publisher("stream/", base="base/") as publisher:
        for batch in batches:
            step(model, batch)
            publisher.publish(model)                 # Published: version, density, bytes, seconds

    follow("local/", "stream/")                      # on the reader's side, in place

Everything is imported when it is first used; torch only by whoever gives us its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckdiff.sync.following import follow
    from ckdiff.sync.outcome import Published
    from ckdiff.sync.publisher import Publisher

_HOMES = {
    "Published": "ckdiff.sync.outcome",
    "Publisher": "ckdiff.sync.publisher",
    "follow": "ckdiff.sync.following",
}

__all__ = ["Published", "Publisher", "follow"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ckdiff.sync' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
