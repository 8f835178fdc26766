"""What a manifest must say: every value is checked once, when a store is opened, for all readers.

The digests of a store find accidents. Whoever changes a store on purpose can make new ones, so that
they say nothing about what its values are: types, ranges, and that the values agree with each other
is what is checked here. Every function raises ValueError with a phrase for the caller's own error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from ckdiff.dtypes import DTYPES
from ckdiff.errors import RuleError, printable
from ckdiff.layout import ALIGNMENT
from ckdiff.rules import Rule
from ckdiff.stores.objects import GROUP, INDEX_BYTES, OBJECT, array_path, object_key

FORMAT = "ckdiff-mask-store"
FORMAT_VERSION = 2  #: the newest that is read; what needs no more is written as version 1
TABLE = "tensors.json"
LARGEST_TABLE = 1 << 29  #: bytes of a tensor table; a million tensors have some 150 MB
LARGEST_METADATA = 1 << 16  #: bytes of a ``zarr.json``
MOST_ELEMENTS = 1 << 60  #: of all tensors together; no sum of them leaves an int64

_LARGEST_OBJECT = 2 * OBJECT + INDEX_BYTES  # a sound one is never much larger than its content
_MOST_RULES = 1 << 10  # far more than one pass can count
MOST_DIMENSIONS = 64  #: of a tensor
_LONGEST_LABEL = 1 << 12  # of what a path or an address can be
_NATURAL = 1 << 63

_DIGEST = re.compile(r"[0-9a-f]{32}")
_CONTENT = re.compile(r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}|git:[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+!-]{0,63}")
_COMMIT = re.compile(r"[0-9A-Za-z._-]{1,128}")
_SHARE = re.compile(r"[0-9][0-9.e-]{0,31}")
_WORD = re.compile(r"[a-z][a-z0-9=-]{0,63}")

Check = Callable[[str, Any], object]

_COMMON = (
    "format", "format_version", "ckdiff_version", "rules", "masks", "elements", "tensors",
    "changed", "layout", "objects",
)  # fmt: skip
_OF_A_DIFF = ("base", "tuned", "unpaired", "selection")
_TIED = "tied"  # of a diff, from version 2 on
_ORIGIN = ("repository", "commit", "path")  # of a side
_ADAPTER = ("adapter", "adapter_config")  # of one that an adapter was merged into
#: which sides a tensor that was not compared has
_SIDES = {
    "added": ("tuned",),
    "removed": ("base",),
    "reshaped": ("base", "tuned"),
    "retyped": ("base", "tuned"),
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Check all values of a manifest whose ``format`` and ``format_version`` are known to be ours.

    Raises ValueError.
    """
    derived = "made_by" in manifest
    newer = manifest["format_version"] > 1
    diff = (*_OF_A_DIFF, *((_TIED,) if newer else ()))
    object_of("it", manifest, (*_COMMON, *(("made_by",) if derived else diff)))
    _matching(_VERSION)("ckdiff_version", manifest["ckdiff_version"])
    rules, masks = manifest["rules"], manifest["masks"]
    for what, texts in (("rules", rules), ("masks", masks)):
        _check_rules(what, texts)
    if not rules or not set(masks) <= set(rules):
        raise ValueError("there are masks of rules that were not counted")
    natural("elements", manifest["elements"], MOST_ELEMENTS)
    natural("tensors", manifest["tensors"])
    object_of("changed", manifest["changed"], rules)
    for rule, count in manifest["changed"].items():
        natural(f"changed of {rule}", count, manifest["elements"])
    layout = object_of("layout", manifest["layout"], ("addresses", "alignment", "chunk"))
    addresses = natural("addresses", layout["addresses"], 2 * MOST_ELEMENTS)
    for key, value in (("alignment", ALIGNMENT), ("chunk", 8 * OBJECT)):
        if natural(key, layout[key]) != value:
            raise ValueError(f"{key} is not {value}")
    if addresses % ALIGNMENT or addresses < manifest["elements"]:
        raise ValueError("addresses is not a multiple of the alignment, or less than elements")
    _check_objects(manifest["objects"], masks, -(-addresses // (8 * OBJECT)))
    if derived:
        _check_made_by(manifest["made_by"])
    else:
        _check_diff(manifest)


def needs_newer(manifest: dict[str, Any]) -> bool:
    """Whether what a manifest says of a diff cannot be said in version 1."""
    missing = any(tensor["reason"] == "missing" for tensor in manifest.get("unpaired", ()))
    merged = any(_ADAPTER[0] in manifest.get(side, ()) for side in ("base", "tuned"))
    dequantized = "dequantize" in manifest.get("selection", ())
    return missing or merged or dequantized or bool(manifest.get(_TIED))


def _check_rules(what: str, texts: Any) -> None:
    """A list of rules, each in its one spelling, none twice."""
    list_of(text)(what, texts)
    if len(texts) > _MOST_RULES or len(set(texts)) < len(texts):
        raise ValueError(f"{what} has one rule twice, or far too many")
    for spelled in texts:
        try:
            canonical = str(Rule.parse(spelled))
        except RuleError:
            canonical = ""
        if canonical != spelled:
            raise ValueError(
                f"{what} has {shown(spelled)}, which is not a rule in its short spelling"
            )


def object_names(masks: Sequence[str], chunks: int) -> set[str]:
    """The files of a store besides its manifest."""
    found = {"zarr.json", f"{GROUP}/zarr.json", TABLE}
    for rule in masks:
        found.add(f"{array_path(rule)}/zarr.json")
        found |= {object_key(rule, chunk) for chunk in range(chunks)}
    return found


def _check_objects(objects: Any, masks: Sequence[str], chunks: int) -> None:
    """Just the files that the layout implies, with sizes that such files can have."""
    if type(objects) is not dict:
        raise ValueError("objects is not an object")
    # counted first: what is only declared must not be made room for
    if len(objects) != 3 + len(masks) * (1 + chunks):
        raise ValueError(f"objects has {len(objects):,} files, which is not what the layout needs")
    if strange := objects.keys() - object_names(masks, chunks):
        raise ValueError(
            f"objects names {shown(min(strange))}, which is not a file of such a store"
        )
    for key, entry in objects.items():
        if type(entry) is not list or len(entry) != 2:
            raise ValueError(f"the entry of {key} is not a pair of size and digest")
        if key == TABLE:
            least, most = 1, LARGEST_TABLE
        elif key.endswith("zarr.json"):
            least, most = 1, LARGEST_METADATA
        else:
            least, most = INDEX_BYTES, _LARGEST_OBJECT
        if not least <= natural(f"the size of {key}", entry[0]) <= most:
            raise ValueError(f"the size of {key} cannot be {entry[0]}")
        _matching(_DIGEST)(f"the digest of {key}", entry[1])


# where a store comes from


def _check_diff(manifest: dict[str, Any]) -> None:
    """What a diff says about its two sides."""
    newer = manifest["format_version"] > 1
    for side in ("base", "tuned"):
        _check_identity(side, manifest[side], newer=newer)
    list_of(_unpaired_or_missing if newer else _unpaired)("unpaired", manifest["unpaired"])
    if newer:
        _check_tied(manifest[_TIED], manifest["unpaired"])
    options = ("common_rows", "dequantize") if newer else ()
    globs = ("include", "exclude", "rename")
    chosen = object_of("selection", manifest["selection"], globs, options)
    for key, value in chosen.items():
        if key in globs:
            list_of(text)(f"{key} of selection", value)
        elif value is not True:
            raise ValueError(f"{key} of selection is not true")


def _check_identity(side: str, identity: Any, *, newer: bool) -> None:
    """A side of a diff: its files, and where they come from."""
    merged = newer and type(identity) is dict and any(key in identity for key in _ADAPTER)
    known = (*_ORIGIN, *(f"adapter_{key}" for key in _ORIGIN)) if merged else _ORIGIN
    wanted = ("label", "files", *(_ADAPTER if merged else ()))
    object_of(side, identity, wanted, known)
    for key in identity.keys() - {"files"}:
        check: Check = _matching(_COMMIT) if key.endswith("commit") else _label
        if key == "adapter_config":
            check = _matching(_DIGEST)
        check(f"{key.replace('_', ' ')} of {side}", identity[key])
    list_of(_file)(f"files of {side}", identity["files"])


def _file(what: str, file: Any) -> None:
    """A file of a checkpoint, in ``files``."""
    object_of(what, file, ("name", "size"), ("content",))
    text(f"the name in {what}", file["name"])
    natural(f"the size in {what}", file["size"])
    if "content" in file:
        _matching(_CONTENT)(f"the content in {what}", file["content"])


def _unpaired(what: str, tensor: Any) -> None:
    """A tensor that was not compared, in ``unpaired``."""
    reason = tensor.get("reason") if type(tensor) is dict else None
    sides = _SIDES.get(reason) if type(reason) is str else None
    if sides is None:
        raise ValueError(f"{what} has an entry without a reason")
    _check_sides(what, tensor, sides)


def _unpaired_or_missing(what: str, tensor: Any) -> None:
    """The same, or a tensor that an index names and no file of that side has.

    The other side may have it, and no more than that is known of it. ``side`` may say whose index
    it is.
    """
    if type(tensor) is not dict or tensor.get("reason") != "missing":
        _unpaired(what, tensor)
        return
    there = [side for side in ("base", "tuned") if f"{side}_dtype" in tensor]
    if len(there) > 1:
        raise ValueError(f"{what} has an entry that is missing nowhere")
    _check_sides(what, tensor, there, optional=("side",))
    if "side" in tensor:
        _one_of("base", "tuned", "both")(f"a side in {what}", tensor["side"])
        if there and tensor["side"] in (*there, "both"):
            raise ValueError(f"{what} has an entry that is there and missing")


def _check_sides(
    what: str, tensor: dict[str, Any], sides: Sequence[str], optional: Sequence[str] = ()
) -> None:
    """An entry of ``unpaired`` with a dtype and a shape of each of these sides."""
    keys = [f"{side}_{kind}" for side in sides for kind in ("dtype", "shape")]
    object_of(what, tensor, ("name", "reason", *keys), optional)
    text(f"a name in {what}", tensor["name"])
    for side in sides:
        if text(f"a dtype in {what}", tensor[f"{side}_dtype"]) not in DTYPES:
            raise ValueError(f"{what} has an unknown dtype")
        _shape(f"a shape in {what}", tensor[f"{side}_shape"])


def _check_tied(tied: Any, unpaired: list[dict[str, Any]]) -> None:
    """Tensors of one side alone that have the bits of another tensor of that side."""
    list_of(_tied_tensor)("tied", tied)
    alone = {(tensor["name"], tensor["reason"]) for tensor in unpaired}
    names = set()
    for tensor in tied:
        names.add(tensor["name"])
        if (tensor["name"], "added" if tensor["side"] == "tuned" else "removed") not in alone:
            raise ValueError(f"tied has {shown(tensor['name'])}, which its side has not alone")
    if len(names) < len(tied):
        raise ValueError("tied has one tensor twice")


def _tied_tensor(what: str, tensor: Any) -> None:
    object_of(what, tensor, ("name", "same_as", "side"))
    for key in ("name", "same_as"):
        text(f"a {key} in {what}", tensor[key])
    _one_of("base", "tuned")(f"a side in {what}", tensor["side"])
    if tensor["name"] == tensor["same_as"]:
        raise ValueError(f"{what} has a tensor that is tied to itself")


def _check_made_by(made: Any) -> None:
    """How a derived store came about. An operation that is not known has some of the known keys."""
    checks: dict[str, Check] = {
        "operation": _matching(_WORD),
        "rule": lambda what, value: _check_rules(what, [value]),
        "stores": list_of(_source),
        "left_out": list_of(_left_out),
        "files": list_of(_source),
        "format": _matching(_WORD),
        "polarity": _one_of("1 = changed", "1 = frozen"),
        "seed": lambda what, value: natural(what, value, 2**64 - 1),
        "within": _one_of("tensor", "model"),
        "like": _matching(_DIGEST),
        "alpha": _matching(_SHARE),
        "rank": natural,
    }
    object_of("made_by", made, ("operation",), checks)
    for key, value in made.items():
        checks[key](f"{key} of made_by", value)
    operation = made["operation"]
    wanted: tuple[str, ...]
    if operation == "random":
        wanted = ("operation", "rule", "seed", "within", "like")
    elif operation in ("low", "principal"):
        wanted = (
            "operation",
            "rule",
            "alpha",
            "like",
            "files",
            *(["rank"] if "rank" in made else []),
        )
    elif operation == "import":
        wanted = ("operation", "rule", "format", "polarity", "files")
    elif "stores" in made or "left_out" in made:
        wanted = ("operation", "rule", "stores", "left_out")
    else:
        return
    object_of("made_by", made, wanted)


def _source(what: str, source: Any) -> None:
    """An input of a derived store."""
    object_of(what, source, ("label", "digest"))
    _label(f"a label in {what}", source["label"])
    _matching(_DIGEST)(f"a digest in {what}", source["digest"])


def _left_out(what: str, tensor: Any) -> None:
    """A tensor that not all inputs have with one shape."""
    missing = type(tensor) is dict and "stores" in tensor
    object_of(what, tensor, ("name", "reason", "stores" if missing else "shapes"))
    text(f"a name in {what}", tensor["name"])
    if tensor["reason"] != ("missing" if missing else "reshaped"):
        raise ValueError(f"{what} has an entry with another reason than it says")
    check = list_of(natural) if missing else list_of(_shape)
    check(what, tensor["stores" if missing else "shapes"])


# values


def shown(value: str) -> str:
    """A text of a store as messages quote it: short, and safe for a terminal."""
    return repr(printable(value if len(value) <= 80 else value[:80] + "..."))


def object_of(
    what: str, value: Any, keys: Sequence[str], optional: Sequence[str] | dict[str, Any] = ()
) -> dict[str, Any]:
    """An object with these keys and no others."""
    if type(value) is not dict:
        raise ValueError(f"{what} is not an object")
    if lacking := [key for key in keys if key not in value]:
        raise ValueError(f"{what} lacks {lacking[0]}")
    if strange := value.keys() - {*keys, *optional}:
        raise ValueError(f"{what} has the unknown key {shown(min(strange))}")
    return value


def list_of(check: Check) -> Check:
    """A check of a list by a check of its items."""

    def checked(what: str, value: Any) -> None:
        if type(value) is not list:
            raise ValueError(f"{what} is not a list")
        for item in value:
            check(what, item)

    return checked


def text(what: str, value: Any) -> str:
    """Any text; that it can be written as UTF-8 is known where it comes from a file."""
    if type(value) is not str:
        raise ValueError(f"{what} is not text")
    return value


def natural(what: str, value: Any, most: int = _NATURAL - 1) -> int:
    """A whole number from 0 to ``most``; True and 1.0 are none."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{what} is not a whole number from 0 to {most}")
    return value


def _label(what: str, value: Any) -> None:
    if len(text(what, value)) > _LONGEST_LABEL:
        raise ValueError(f"{what} is far too long")


def _shape(what: str, value: Any) -> None:
    list_of(natural)(what, value)
    if len(value) > MOST_DIMENSIONS:
        raise ValueError(f"{what} has far too many dimensions")


def _matching(pattern: re.Pattern[str]) -> Check:
    def checked(what: str, value: Any) -> None:
        if not pattern.fullmatch(text(what, value)):
            raise ValueError(f"{what} cannot be {shown(value)}")

    return checked


def _one_of(*choices: str) -> Check:
    def checked(what: str, value: Any) -> None:
        if text(what, value) not in choices:
            raise ValueError(f"{what} cannot be {shown(value)}")

    return checked
