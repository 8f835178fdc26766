"""What a path is that is no checkpoint, and what to do about it: one line each."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ckdiff.checkpoints import deepspeed
from ckdiff.checkpoints.contents import is_weights
from ckdiff.checkpoints.folders import Folder, called, inside, some, where
from ckdiff.checkpoints.weightnames import TORCH, is_deepspeed, is_training_state, weight_name
from ckdiff.errors import CheckpointError
from ckdiff.naming import natural_key

_GIVE = "give a safetensors or torch file, or a directory of them"
_SAVE = "save the model as safetensors, with the tool that made it"
_DIRECTORY = "give its directory"
#: what to do about files of other kinds, by suffix
_OTHERS: dict[str, tuple[str, str]] = {
    ".gguf": ("GGUF", "compare the safetensors files that it was made from"),
    ".h5": ("HDF5", _SAVE),
    ".hdf5": ("HDF5", _SAVE),
    ".keras": ("Keras", _SAVE),
    ".msgpack": ("Flax msgpack", _SAVE),
    ".onnx": ("ONNX", "compare the model that it was exported from"),
    ".npz": ("numpy", "in Python give ckdiff.diff the arrays by their names"),
    ".npy": ("numpy", "in Python give ckdiff.diff the arrays by their names"),
    ".tar": ("tar archive", "unpack it, and give what was in it"),
    ".tar.gz": ("tar archive", "unpack it, and give what was in it"),
    ".tgz": ("tar archive", "unpack it, and give what was in it"),
    ".zip": ("zip archive", "unpack it, and give what was in it"),
    ".nemo": ("NeMo archive", "unpack it with tar, and give what was in it"),
    ".tflite": ("TensorFlow Lite", "compare the model that it was exported from"),
    ".pb": ("TensorFlow", _SAVE),
    ".json": ("JSON", "give the file of weights, its index or its directory"),
    ".html": ("web page", "the download failed: fetch the file again"),
}
_SCHEMES = {
    "s3": "aws s3 sync",
    "gs": "gcloud storage rsync -r",
    "az": "azcopy copy",
    "abfs": "azcopy copy",
    "abfss": "azcopy copy",
    "wasb": "azcopy copy",
    "oss": "ossutil cp -r",
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/{1,2}(.*)", re.DOTALL)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: what the address of a page of the hub looks like, or that of a file there, whatever its host
_PAGE = re.compile(
    r"https?://[^/?#]+/([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?#]+)(?:/([^?#]*))?)?/?(?:[?#].*)?",
    re.ASCII,
)
LISTED = 10_000  # names of a directory that are looked at for one that is alike
DELTA, MASKS = "ckdiff-delta", "ckdiff-masks"
_STORE = "is a mask store", "`ckdiff show` prints it; graft and delta take it as --mask"
_TIMELINE = (
    "is a timeline",
    "`ckdiff info` says of which checkpoints; the stores masks/step-*.zarr in it have its masks",
)


def no_such_path(path: str) -> CheckpointError:
    """The error for a local path that does not exist, or that is an address of something else."""
    scheme = _SCHEME.fullmatch(path)
    if scheme is not None and scheme[1].lower() != "file":
        return _elsewhere(path, scheme[1].lower())
    shown = called(path) or repr(path)
    alike = alike_path(path)
    if alike is not None:
        hint = f"did you mean {called(alike)}?"
    elif _REPOSITORY.fullmatch(path):
        hint = f"{_GIVE}; for a model of the hub write hf://{path}"
    else:
        hint = _GIVE
    return CheckpointError(f"{shown}: does not exist", hint=hint)


def _elsewhere(path: str, scheme: str) -> CheckpointError:
    if (page := _PAGE.fullmatch(path)) and not weight_name(page[1]):
        repository, revision, inner = page.groups()
        at = f"@{revision}" if revision else ""
        address = f"hf://{repository}{at}{f'/{inner}' if inner else ''}"
        return CheckpointError(
            f"{called(path)}: is a web address", hint=f"for a model of the hub write {address}"
        )
    if scheme in _SCHEMES:
        what, how = "is in object storage", f"copy it here first, with `{_SCHEMES[scheme]}`"
    elif scheme in ("http", "https", "ftp"):
        what, how = "is a web address", "download it first; for a model of the hub write hf://"
    else:
        what, how = f"is an address that ckdiff cannot read ({called(scheme)})", "copy it here"
    return CheckpointError(f"{called(path)}: {what}", hint=f"{how}, and give the local path")


def alike_path(path: str) -> str | None:
    """An existing path that is like one that does not exist; None where nothing is."""
    import difflib

    parent, rest = path.rstrip("/"), ""
    while parent and not os.path.isdir(parent):
        parent, _, name = parent.rpartition("/")
        parent = parent or ("/" if path.startswith("/") else "")
        rest = f"{name}/{rest}"
        if parent == "/":
            break
    name, _, rest = rest.partition("/")
    try:
        with os.scandir(parent or ".") as entries:
            names = [entry.name for entry, _ in zip(entries, range(LISTED), strict=False)]
    except OSError:
        return None
    names = [one for one in names if one != name]
    lower = {one.lower(): one for one in names}
    close = [lower[name.lower()]] if name.lower() in lower else []
    for found in close or difflib.get_close_matches(name, sorted(names), 3, 0.7):
        whole = os.path.join(parent, found, rest).rstrip("/")
        if os.path.lexists(whole):
            return whole
    return None


def refused_metadata(label: str, metadata: Mapping[str, str]) -> CheckpointError | None:
    """The error for a safetensors file that is ours and no checkpoint, by its metadata; or None."""
    if metadata.get("format") == DELTA:
        return CheckpointError(
            f"{label}: is a delta, not a checkpoint",
            hint="rebuild the checkpoint with `ckdiff apply BASE DELTA -o OUT`",
        )
    if metadata.get("format") == MASKS:
        return CheckpointError(
            f"{label}: holds exported masks, not weights",
            hint="`ckdiff import` makes a store of it",
        )
    return None


def is_weight_version(label: str) -> CheckpointError:
    """The error for a directory that holds what changed since another version."""
    return CheckpointError(
        f"{label}: is a version of a stream of weights that has only what changed",
        hint="rebuild the checkpoint with `ckdiff apply BASE STREAM -o OUT`",
    )


def not_weights(folder: Folder, name: str) -> CheckpointError | None:
    """The error for a file that is of another kind, by its name; None where it may be weights.

    What a file is called does not count where its first bytes say that it is weights. Raises
    CheckpointError where it cannot be read.
    """
    base, label = name.rpartition("/")[2], where(folder, name)
    if base.endswith(".distcp"):
        return CheckpointError(
            f"{label}: is one part of a torch.distributed.checkpoint", hint=_DIRECTORY
        )
    if is_deepspeed(base):
        beside = folder.names(name.rpartition("/")[0])
        if base == deepspeed.MODEL and deepspeed.has_model(beside):
            return None
        return deepspeed.refused(label, [], beside, part=True)
    if is_training_state(base) and base.endswith((*TORCH, ".pkl")):
        return CheckpointError(
            f"{label}: holds training state, such as an optimizer's, not a model",
            hint="give the model's file, or the directory",
        )
    known = _of_suffix(base)
    if known is None or is_weights(folder, name):
        return None
    a = "an" if known[0][0] in "HO" else "a"  # an HDF5 file, an ONNX file
    return CheckpointError(f"{label}: is {a} {known[0]} file, not a checkpoint", hint=known[1])


def _of_suffix(name: str) -> tuple[str, str] | None:
    lower = name.lower()
    if lower.endswith(TORCH):
        return None
    return next((said for suffix, said in _OTHERS.items() if lower.endswith(suffix)), None)


#: what browsers, wget, aria2 and the hub's own client call a file until they have all of it
_PARTIAL = (
    ".incomplete",
    ".part",
    ".partial",
    ".crdownload",
    ".download",
    ".aria2",
)


def made_here(names: Iterable[str]) -> tuple[str, str] | None:
    """What a directory with these names is, and what to do, where it is a store or a timeline.

    Names of folders may end with a slash.
    """
    found = {name.rstrip("/") for name in names}
    if not {"manifest.json", "zarr.json"} <= found:
        return None
    return _TIMELINE if "counts" in found and "tensors.json" not in found else _STORE


def nothing_here(folder: Folder, sub: str, names: Sequence[str]) -> CheckpointError:
    """The error for a directory of ``names`` in which no rule finds a checkpoint."""
    label = where(folder, sub)
    files = [name for name in names if not name.startswith(".") and not name.endswith("/")]
    if not names:
        return CheckpointError(f"{label}: is an empty directory", hint=_GIVE)
    folders = [name[:-1] for name in names if name.endswith("/")]
    steps = [name for name in folders if re.fullmatch(r"global_step\d+", name)]
    if any(map(is_deepspeed, files)) or steps or deepspeed.CONVERTER in files:
        last = max(steps, key=natural_key, default="")
        there = folder.names(inside(sub, last)) if last else names
        return deepspeed.refused(label, steps or files, there)
    if any(name.endswith(".distcp") for name in files):
        return CheckpointError(
            f"{label}: holds .distcp files but no .metadata: it was not saved completely",
            hint="give a checkpoint that was saved completely",
        )
    state = [name for name in files if is_training_state(name)]
    others = [name for name in files if not is_training_state(name)]
    kinds = Counter(known for name in others if (known := _of_suffix(name)) and known[0] != "JSON")
    if kinds:
        listed = ", ".join(f"{count} {kind}" for (kind, _), count in kinds.items())
        ((_, hint), _) = kinds.most_common(1)[0]
        return CheckpointError(f"{label}: holds no weights but {listed}", hint=hint)
    if state:
        return CheckpointError(
            f"{label}: holds training state but no model: {some(state)}",
            hint="give the directory that the model was saved in",
        )
    if partial := [name for name in names if name.endswith(_PARTIAL)]:
        return CheckpointError(
            f"{label}: holds no weights, but what a download left that was not finished, "
            f"{some(partial)}",
            hint="download it again: most tools go on where they stopped",
        )
    return CheckpointError(f"{label}: holds no weights, only {some(names, 5)}", hint=_GIVE)
