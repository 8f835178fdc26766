"""Directories of checkpoints built by hand, as a local folder and as a hub's listing."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from support import safetensors_header

from ckdiff.checkpoints.folders import Folder
from ckdiff.checkpoints.places.hub.listedfolder import ListedFolder
from ckdiff.checkpoints.places.localfolder import LocalFolder

Files = Mapping[str, bytes]


def tensors(*names: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with a byte for each name."""
    header = safetensors_header(dict.fromkeys(names, ("U8", (1,), b"x")), metadata)
    return len(header).to_bytes(8, "little") + header + b"x" * len(names)


def index(weight_map: Mapping[str, str], **metadata: Any) -> bytes:
    """An index."""
    return json.dumps({"metadata": metadata, "weight_map": weight_map}).encode()


def torch_file(first: str = "archive/data.pkl") -> bytes:
    """The beginning of what torch.save writes: nobody here reads on."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(first, b"\x80\x02}.")
    return data.getvalue()


S, T = tensors("w"), torch_file()
ANY = b"{}"


def some_files(*names: str) -> dict[str, bytes]:
    """Files with the content that their names promise."""
    return {name: _content(name) for name in names}


def _content(name: str) -> bytes:
    if name.endswith(".safetensors"):
        return tensors(name)
    torch = (".bin", ".pt", ".pth", ".ckpt", ".tar", ".pkl")
    return T if name.endswith(torch) else ANY


def local(root: Path, files: Files) -> Folder:
    """The files in a directory of this machine."""
    root.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return LocalFolder(os.fspath(root))


def listed(root: Path, files: Files) -> Folder:
    """The same as a listing, of the same name."""

    def read(name: str, offset: int, nbytes: int) -> bytes:
        return files[name][offset : offset + nbytes]

    return ListedFolder(os.fspath(root), [(name, len(files[name])) for name in files], read)


PLACES: list[Callable[[Path, Files], Folder]] = [local, listed]
