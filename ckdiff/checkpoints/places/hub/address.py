"""What ``hf://org/name[@revision][/path]`` says, before anybody is asked about it."""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote

from ckdiff.checkpoints.indexes import file_name_fault
from ckdiff.checkpoints.weightnames import index_name, weight_name
from ckdiff.errors import CheckpointError, printable

FORM = "hf://org/name[@revision][/subfolder]"

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
#: revisions with slashes that need no quoting, because nothing else begins like them
_REFS = r"refs/(?:pr|convert)/[^/]+"
# one slash is what pathlib leaves of two
_ADDRESS = re.compile(
    rf"hf:/{{1,2}}({_PART})/({_PART})(?:@({_REFS}|[^/]*))?(?:/(.*))?", re.DOTALL | re.ASCII
)
_ALONE = re.compile(rf"hf:/{{1,2}}({_PART})(@[^/]*)?/?", re.ASCII)
#: organisations of models that were known by one name before all had one
_OWNERS = {
    "gpt2": "openai-community", "distilgpt2": "distilbert", "distilbert": "distilbert",
    "bert": "google-bert", "roberta": "FacebookAI", "xlm": "FacebookAI", "t5": "google-t5",
    "albert": "albert", "camembert": "almanach", "xlnet": "xlnet", "openai": "openai-community",
    "distilroberta": "distilbert",
}  # fmt: skip
_OTHER_KINDS = {"datasets": "a dataset", "spaces": "a space", "buckets": "a bucket"}


def is_hub_address(path: str) -> bool:
    """Whether a path is meant for the hub, well formed or not."""
    return path[:4].lower() == "hf:/"


@dataclass(frozen=True, slots=True)
class HubAddress:
    """A checkpoint of a model repository on the hub."""

    repo: str  #: ``org/name``
    revision: str | None = None  #: a branch, a tag or a commit; None: the default branch
    path: str = ""  #: a folder of the repository, a safetensors file or an index; empty: its root

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Read an address; raises CheckpointError for what is none.

        A revision ends at the next slash. One that has slashes itself is written with ``%2F``;
        only ``refs/pr/N`` and ``refs/convert/NAME`` may be written as they are.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None:
            if alone := _ALONE.fullmatch(text):
                what = "is one name, but must be an organisation and a name"
                raise _wrong(text, what, _owned(*alone.groups()))
            raise _wrong(text, f"is not {FORM}")
        owner, name, revision, path = match.groups()
        if owner in _OTHER_KINDS:
            raise _wrong(text, f"is {_OTHER_KINDS[owner]}, not a model")
        if ".." in owner + name or "--" in owner + name:
            raise _wrong(text, "is not the name of a repository")
        if revision is not None:
            revision = unquote(revision)
            if not revision.isprintable() or file_name_fault(revision) is not None:
                raise _wrong(text, "has an impossible revision")
        path = (path or "").rstrip("/")
        fault = file_name_fault(path) if path else None
        if fault is not None:
            raise _wrong(text, f"{fault} where it names a folder")
        return cls(f"{owner}/{name}", revision, path)

    def __str__(self) -> str:
        text = f"hf://{self.repo}"
        if self.revision is not None:
            whole = re.fullmatch(_REFS, self.revision) is not None
            text += "@" + quote(self.revision, safe="/" if whole else "")
        return f"{text}/{self.path}" if self.path else text

    def origin(self, commit: str) -> dict[str, str]:
        """As stores record where a side comes from."""
        path = {"path": self.path} if self.path else {}
        return {"repository": self.repo, "commit": commit, **path}

    @property
    def names_file(self) -> bool:
        """Whether the path is that of a file of weights or an index, not of a folder."""
        name = posixpath.basename(self.path)
        return weight_name(name) is not None or index_name(name) is not None


def _owned(name: str, revision: str | None) -> str:
    """What to write for a model that had no organisation once; nothing where it is none of them."""
    owner = _OWNERS.get(name.partition("-")[0])
    if owner is None:
        return ""
    example = f"hf://{owner}/{name}{revision or ''}"
    return f"models are under an organisation now, such as {example}: write {FORM}"


def _wrong(text: str, what: str, hint: str = "") -> CheckpointError:
    local = ", and a path of this machine as ./hf:/" if os.path.lexists(text) else ""
    hint = hint or f"write {FORM}, and a slash in the name of a revision as %2F"
    # a token that somebody put there
    text, hint = (re.sub(r"hf_\w{16,}", "***", said) for said in (text, hint))
    return CheckpointError(
        f"{printable(text)} {what}",
        hint=f"{printable(hint)}{local}",
    )
