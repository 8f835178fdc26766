"""``ckdiff apply``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines

if TYPE_CHECKING:
    from ckdiff.deltas.versions.inplace import AppliedInPlace


@click.command("apply")
@click.argument("base")
@click.argument("deltas", nargs=-1, metavar="DELTA...")
@options.output(
    "PATH",
    "Write the checkpoint there: a directory, or a file if TUNED was one.",
    required=False,
)
@click.option(
    "--in-place",
    is_flag=True,
    help="Change the files of BASE instead of writing new ones.",
)
@click.option(
    "--undo",
    is_flag=True,
    help="With --in-place and without DELTA: take back an unfinished change.",
)
@click.option(
    "--find-base",
    is_flag=True,
    help="BASE is a directory to search, such as the hub's cache, for the checkpoint that the "
    "delta was made from.",
)
@options.to
@options.base_version
@options.key
@options.config
@options.signed
@options.files
def command(
    base: str,
    deltas: tuple[str, ...],
    out: str | None,
    in_place: bool,
    undo: bool,
    as_json: bool,
    **asked: Any,
) -> None:
    """Rebuild a checkpoint from BASE and one or more deltas. BASE may be hf://org/name. A DELTA may
    also be a stream of weight versions, or one of its versions.

    If the tuned checkpoint was safetensors, its files come out again, byte for byte. From torch
    files and other formats, the same tensors come out as one model.safetensors. BASE and the result
    are verified; if either is wrong, nothing is left behind. A PATH that ends with a slash is
    always a directory. BASE's config and tokenizer files are copied into it.

    With --in-place, the files in the directory BASE are changed instead, up to the newest weight
    version or to --to N. Everything is checked before the first byte is written. If the run is
    stopped, the same command finishes it, and --undo takes it back. Until then, every command
    refuses BASE.
    """
    if in_place == (out is not None):
        raise click.UsageError("give -o PATH for a new checkpoint, or --in-place to change BASE")
    if undo and not in_place:
        raise click.UsageError("--undo goes with --in-place")
    if out is None:
        _in_place(base, deltas, undo=undo, as_json=as_json, **asked)
        return
    from ckdiff.budget import format_size
    from ckdiff.checkpoints.pieces import told
    from ckdiff.cli import formats
    from ckdiff.cli.made import copied_too
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.apply import apply
    from ckdiff.deltas.versions.applying import AppliedVersions
    from ckdiff.errors import printable

    with Reporter("rebuilt") as reporter, compilation_noted(reporter):
        result = apply(base, deltas, out, observer=reporter.observer(told), **asked)
    if as_json:
        write_json(result.to_dict())
        return
    took = f"in {formats.duration(result.seconds)}, {formats.rate(result.size, result.seconds)}"
    what = f"{formats.counted(result.tensors, 'tensor')}, {format_size(result.size)}"
    how = "not all of the tuned checkpoint, as a delta was lossy" if result.lossy else "verified"
    if isinstance(result, AppliedVersions):
        how = f"version {result.version}, {how}"
    line = f"{result.out}: {what}, {how}, {took}{copied_too(result.copied)}"
    write_lines([printable(line)])


def _in_place(
    base: str, deltas: tuple[str, ...], *, undo: bool, as_json: bool, **asked: Any
) -> None:
    """Change BASE, and say what became of it."""
    from ckdiff.checkpoints.pieces import told
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.apply import apply_in_place
    from ckdiff.errors import printable

    wanted = {name: asked.pop(name) for name in ("target", "base_version", "workers", "memory")}
    unused = {
        "key": None,
        "overwrite": False,
        "config_from": None,
        "config": True,
        "find_base": False,
    }
    for name, nothing in unused.items():
        if asked.pop(name) != nothing:
            option = "--no-config" if name == "config" else f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{option} is for a new checkpoint, and --in-place makes none")
    with Reporter("applied") as reporter, compilation_noted(reporter):
        result = apply_in_place(
            base, deltas, undo=undo, observer=reporter.observer(told), **asked, **wanted
        )
    if as_json:
        write_json(result.to_dict())
        return
    became = _undone(result) if undo else _became(result)
    write_lines([printable(f"{base}: {became}")])


def _undone(result: AppliedInPlace) -> str:
    """What a change that was to be taken back came to, for people."""
    at = "" if result.version is None else f" at version {result.version}"
    if result.recovered is None:
        return f"is whole{at}: there was nothing to undo"
    return f"an unfinished change was undone: the checkpoint is whole{at}, as it was before"


def _became(result: AppliedInPlace) -> str:
    """What a change in place came to, for people."""
    from ckdiff.cli import formats

    at = "is" if result.version is None else f"is at version {result.version}"
    if not result.deltas and result.seed is None and result.recovered is None:
        return f"{at} already" if result.version is not None else "is what they lead to already"
    changed = formats.counted(result.tensors, "tensor")
    took = f"{changed} changed, in {formats.duration(result.seconds)}"
    if result.deltas and not result.versions:
        return f"went through {formats.counted(result.deltas, 'delta')}, verified; {took}"
    if result.version is None:
        return f"an unfinished change was finished, in {formats.duration(result.seconds)}"
    steps = formats.counted(len(result.versions), "version")
    seeded = "" if result.seed is None else f"version {result.seed} in full, then "
    return f"{at} now, by {seeded}{steps}; {took}"
