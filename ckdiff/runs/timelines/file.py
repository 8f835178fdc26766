"""What a timeline looks like on the disk: its manifest, its arrays, and which files are its own.

    manifest.json              what it is of and what it adds up to; written last
    zarr.json                  a Zarr group
    counts/                    int64, (rows of counts, tensors)
    lengths/, ways/            float64 and int64, (rows, tensors): only where there are statistics
    first_moves/               for each element the first step at which it differed, or 0
    masks/step-00001.zarr/     a mask store for each step, against the first checkpoint

The manifest names every file with its size and digest; of a step's store it names the manifest,
which names the rest.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckdiff.errors import RuleError, StoreCorrupt, StoreIncomplete, printable
from ckdiff.outputs.placing import MANIFEST
from ckdiff.rules import Rule
from ckdiff.stores.objects import INDEX_BYTES, INNER, OBJECT, array_metadata
from ckdiff.stores.schema import MOST_ELEMENTS
from ckdiff.stores.sealed import fits, own_files, seal

FORMAT, FORMAT_VERSION = "ckdiff-timeline", 1
FIRST_MOVES, COUNTS, LENGTHS, WAYS = "first_moves", "counts", "lengths", "ways"
MOST_STEPS = (1 << 16) - 1  #: numbers of steps are at most two bytes
_LARGEST = 1 << 26  # bytes of a manifest that are read
_KEYS = (
    "format", "format_version", "ckdiff_version", "rule", "elements", "tensors", "addresses",
    "checkpoints", "steps", "moved", "first_moves", "statistics", "objects",
)  # fmt: skip
_STEP = ("changed_since_first", "changed_since_previous", "kept")


def step_folder(step: int) -> str:
    """Where in a timeline the store of a step is; steps count from 1."""
    return f"masks/step-{step:05d}.zarr"


def first_object_key(number: int) -> str:
    """Where an object of the first moves is."""
    return f"{FIRST_MOVES}/c/{number}"


def first_width(steps: int) -> int:
    """Bytes of the number of a step."""
    return 1 if steps < 255 else 2


def count_rows(steps: int) -> int:
    """Rows of the counts: those of each step against the first, against the one before, and of what
    is marked in the last as well; then what any marks.
    """
    return 3 * steps + 1


def table_key(name: str) -> str:
    """Where the numbers of one of the tables are: COUNTS, LENGTHS, WAYS."""
    return f"{name}/c/0/0"


def tables(steps: int, *, statistics: bool) -> dict[str, tuple[int, str]]:
    """The tables of a timeline: rows and dtype of each; columns are the tensors."""
    found = {COUNTS: (count_rows(steps), "int64")}
    if statistics:
        found |= {LENGTHS: (2 * steps, "float64"), WAYS: (3 * steps, "int64")}
    return found


def documents(
    steps: int, tensors: int, addresses: int, width: int, *, statistics: bool
) -> dict[str, dict[str, Any]]:
    """Every ``zarr.json`` of a timeline but those of its stores, by its path."""
    attributes = {"ckdiff": {"format": FORMAT, "format_version": FORMAT_VERSION}}
    found = {"zarr.json": {"zarr_format": 3, "node_type": "group", "attributes": attributes}}
    for name, (rows, dtype) in tables(steps, statistics=statistics).items():
        found[f"{name}/zarr.json"] = _table_metadata([rows, tensors], dtype)
    if width:
        found[f"{FIRST_MOVES}/zarr.json"] = _first_metadata(addresses, width)
    return found


def _table_metadata(shape: list[int], dtype: str) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0 if dtype == "int64" else 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
        "dimension_names": ["count" if dtype == "int64" else "length", "tensor"],
    }


def _first_metadata(addresses: int, width: int) -> dict[str, Any]:
    """As of a mask, whose objects have as many bytes."""
    found = array_metadata(addresses)
    (sharding,) = found["codecs"]
    inside = sharding["configuration"]
    inside["chunk_shape"] = [INNER // width]
    if width > 1:
        inside["codecs"][0] = {"name": "bytes", "configuration": {"endian": "little"}}
    found["data_type"] = f"uint{8 * width}"
    found["chunk_grid"]["configuration"]["chunk_shape"] = [OBJECT // width]
    found["attributes"] = {}
    found["dimension_names"] = ["element"]
    return found


def first_keys(addresses: int, width: int) -> list[str]:
    """All objects of the first moves."""
    return [first_object_key(number) for number in range(-(-addresses * width // OBJECT))]


def is_timeline(path: str | os.PathLike[str]) -> bool:
    """Whether a directory says that it is a timeline; it may be a damaged one."""
    try:
        with open(
            os.open(Path(path) / MANIFEST, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb"
        ) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return False
            return file.read(64).startswith(b'{"format":"' + FORMAT.encode() + b'"')
    except (OSError, ValueError):
        return False


def read_timeline(root: Path) -> dict[str, Any]:
    """The manifest of a timeline, its digest and every value of it checked.

    Raises StoreIncomplete where there is none, and StoreCorrupt where it is damaged or makes no
    sense.
    """
    shown = printable(str(root))
    try:
        raw = _bounded(root / MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreIncomplete(
            f"there is no timeline {shown}", hint="ckdiff timeline -o makes one"
        ) from None
    except OSError as error:
        raise StoreCorrupt(f"cannot read {shown}/{MANIFEST}: {error.strerror}") from error
    try:
        if raw is None or not fits(raw):
            raise ValueError("it is too large")
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise StoreIncomplete(f"{shown} is not a timeline", hint="ckdiff timeline -o makes one")
        version = manifest.get("format_version")
        if type(version) is int and version > FORMAT_VERSION:
            raise StoreCorrupt(
                f"{shown} is in a newer format than this ckdiff reads", hint="upgrade ckdiff"
            )
        manifest.pop("digest", None)
        if raw != seal(manifest):
            raise ValueError("its digest is wrong")
        _check(manifest)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise StoreCorrupt(
            f"{shown}/{MANIFEST} is damaged: {printable(str(error))}",
            hint="restore it from a copy, or make the timeline again",
        ) from None
    return manifest


def _bounded(path: Path) -> bytes | None:
    # O_NONBLOCK: something else of that name, such as a named pipe, must not make us wait
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb", 0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
            return None
        raw = bytearray()
        while len(raw) <= status.st_size and (piece := file.read(1 << 20)):
            raw += piece
        return bytes(raw)


def _check(manifest: dict[str, Any]) -> None:
    """Raise ValueError (or KeyError, TypeError) where a value makes no sense."""
    if set(manifest) != set(_KEYS):
        raise ValueError("it has other keys")
    if manifest["format_version"] != FORMAT_VERSION:
        raise ValueError("format_version is no number")
    _natural("elements", manifest["elements"], MOST_ELEMENTS)
    _natural("addresses", manifest["addresses"], 2 * MOST_ELEMENTS)
    _natural("tensors", manifest["tensors"], 1 << 40)
    _natural("moved", manifest["moved"], manifest["elements"])
    try:
        if str(Rule.parse(manifest["rule"])) != manifest["rule"]:
            raise ValueError("the rule is spelled otherwise")
    except RuleError as error:
        raise ValueError(str(error)) from None
    steps = manifest["steps"]
    if not isinstance(steps, list) or not 0 < len(steps) <= MOST_STEPS:
        raise ValueError("it has no steps")
    for step in steps:
        if set(step) != set(_STEP):
            raise ValueError("a step has other keys")
        for key in _STEP:
            _natural(key, step[key], manifest["elements"])
    if len(manifest["checkpoints"]) != len(steps) + 1:
        raise ValueError("it has another number of checkpoints")
    for checkpoint in manifest["checkpoints"]:
        if not isinstance(checkpoint["label"], str) or not isinstance(checkpoint["seen"], str):
            raise ValueError("a checkpoint has no label")
    if manifest["first_moves"] not in (None, f"uint{8 * first_width(len(steps))}"):
        raise ValueError("first_moves is of another dtype")
    if type(manifest["statistics"]) is not bool:
        raise ValueError("statistics is neither true nor false")
    _check_objects(manifest, len(steps))


def _check_objects(manifest: Mapping[str, Any], steps: int) -> None:
    width = first_width(steps) if manifest["first_moves"] else 0
    wanted = {f"{step_folder(step)}/{MANIFEST}" for step in range(1, steps + 1)}
    numbers = tables(steps, statistics=manifest["statistics"])
    wanted |= {"zarr.json", *(f"{name}/zarr.json" for name in numbers), *map(table_key, numbers)}
    objects = manifest["objects"]
    if width:
        many = -(-manifest["addresses"] * width // OBJECT)
        if many > len(objects):  # before so many names are made
            raise ValueError("objects are missing")
        wanted |= {f"{FIRST_MOVES}/zarr.json", *first_keys(manifest["addresses"], width)}
    if not isinstance(objects, dict) or set(objects) != wanted:
        raise ValueError("its objects are others")
    for key, (size, digest) in objects.items():
        most = 2 * OBJECT + INDEX_BYTES if key.startswith(f"{FIRST_MOVES}/c/") else 1 << 40
        _natural(f"the size of {key}", size, most)
        if not isinstance(digest, str) or len(digest) != 32:
            raise ValueError(f"{key} has no digest")
    for name, (rows, _) in numbers.items():
        if objects[table_key(name)][0] != 8 * rows * manifest["tensors"]:
            raise ValueError(f"{name} are of another size")


def _natural(what: str, value: Any, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is out of range")


def foreign(path: Path) -> str | None:
    """What a directory is, or holds, that no timeline is or holds; None for a timeline."""
    try:
        manifest = read_timeline(path)
        names = set(manifest["objects"]) | {MANIFEST}
        for step in range(1, len(manifest["steps"]) + 1):
            folder = step_folder(step)
            names |= {f"{folder}/{name}" for name in own_files(path / folder)}
    except (StoreCorrupt, StoreIncomplete):
        return "is not a timeline"
    folders = {os.path.dirname(name) for name in names}
    known = {str(parent) for folder in folders for parent in (Path(folder), *Path(folder).parents)}
    for folder, inner, files, fd in os.fwalk(path, follow_symlinks=False):
        for name in (*inner, *files):
            relative = os.path.relpath(os.path.join(folder, name), path)
            mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
            ours = relative in known if stat.S_ISDIR(mode) else relative in names
            if not ours or not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                return f"holds {printable(relative)}, which is not part of a timeline"
    return None
