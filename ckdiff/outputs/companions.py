"""Configs and tokenizers beside weights: which of them are copied, and where they come from.

A directory may be a stranger's: names are chosen by us, sizes are bounded.
"""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass, replace

from ckdiff.budget import format_size
from ckdiff.checkpoints.protocol import Checkpoint
from ckdiff.errors import CheckpointError, UsageError, printable
from ckdiff.options import checked_path
from ckdiff.outputs.companionfiles import Companion, LocalSource, Source
from ckdiff.outputs.companionnames import (
    MOST_BYTES,
    MOST_FILES,
    MOST_IN_ALL,
    folders_among,
    is_companion,
)

_LOOKED_AT = 1 << 20  # bytes of a config in which code is looked for
_CONFIG, _OF_RANKS = "config.json", "huggingface"
_CONFIGS = (_CONFIG, "model_index.json", "params.json", "adapter_config.json")
_NO_CONFIG = "no config found: from_pretrained needs one; --config-from DIR copies it from there"
_NAMES_CODE = b'"auto_map"'


@dataclass(frozen=True, slots=True)
class Companions:
    """What is copied with the weights, and what is said of it."""

    files: tuple[Companion, ...] = ()
    notes: tuple[str, ...] = ()  #: one line each


@dataclass(frozen=True, slots=True)
class Copying:
    """What a user asked for: where companions come from, and whether they are copied at all."""

    config_from: str | None = None
    config: bool = True

    @classmethod
    def checked(cls, config_from: str | os.PathLike[str] | None, config: bool) -> Copying:
        """Raises UsageError for what is none, or contradicts itself."""
        if config not in (True, False):
            raise UsageError("config must be True or False")
        if config_from is None:
            return cls(None, config)
        if not config:
            raise UsageError(
                "--config-from and --no-config contradict each other",
                hint="leave out one of them",
            )
        return cls(checked_path("config_from", config_from))

    def beside(self, checkpoint: Checkpoint, *, directory: bool) -> Companions:
        """What is copied beside the weights of ``checkpoint``, which are in their place already.

        ``directory`` says whether the output is one: beside a single file nothing is put. Raises
        CheckpointError, and UsageError where nothing can be copied that was asked for.
        """
        if self.config_from is not None:
            return self._asked(directory)
        if not (self.config and directory):
            return Companions()
        source = _source(checkpoint)
        found = Companions() if source is None else _found_there(source)
        if not found.files and "repository" in checkpoint.origin:
            why = f"{checkpoint.label}: no config files are copied: none are there, or in the cache"
            return Companions(notes=(*found.notes, printable(why)))
        # a directory of safetensors without any loads no better before than after
        loads = checkpoint.in_files and checkpoint.directory is not None
        if not loads and not any(file.name in _CONFIGS for file in found.files):
            return replace(found, notes=(*found.notes, _NO_CONFIG))
        return found

    def _asked(self, directory: bool) -> Companions:
        assert self.config_from is not None
        shown = printable(self.config_from)
        if not directory:
            raise UsageError(
                "the output is one file, and config files need a directory",
                hint="leave out --config-from",
            )
        if not os.path.isdir(self.config_from):
            raise CheckpointError(
                f"{shown}: is not a directory", hint="--config-from takes one that has config files"
            )
        found = _found(LocalSource(self.config_from))
        if not found.files:
            more = f": {found.notes[0]}" if found.notes else ""
            raise CheckpointError(
                f"{shown}: holds no config or tokenizer files{more}",
                hint="--config-from takes the directory that has them",
            )
        return found


def _source(checkpoint: Checkpoint) -> Source | None:
    """Where the companions of a checkpoint are; None where it lies nowhere."""
    if "repository" in checkpoint.origin:
        from ckdiff.outputs.hubcompanions import hub_source

        return hub_source(checkpoint.origin)
    if checkpoint.directory is not None:
        return LocalSource(_with_config(checkpoint.directory))
    if checkpoint.open_files:
        return LocalSource(os.path.dirname(checkpoint.open_files[0].path))
    return None


def _with_config(root: str) -> str:
    """Trainers that write the shards of ranks put the config into a folder beside them."""
    inner = os.path.join(root, _OF_RANKS)
    if os.path.lexists(os.path.join(root, _CONFIG)) or os.path.islink(inner):
        return root
    return inner if os.path.isfile(os.path.join(inner, _CONFIG)) else root


def _found_there(source: Source) -> Companions:
    """``_found``, where nobody asked for them: what cannot be listed holds none."""
    try:
        return _found(source)
    except CheckpointError as error:
        return Companions(notes=(f"no config files are copied: {error.message}",))


def _found(source: Source) -> Companions:
    """The companions in a source, as far as they are within the bounds."""
    files: list[Companion] = []
    notes: list[str] = []
    names, taken, code = _names(source), 0, None
    if len(names) > MOST_FILES:
        notes.append(f"{source.label}: more than {MOST_FILES} config files; the rest is not copied")
    for name in names[:MOST_FILES]:
        if name.endswith(".py"):  # these come last
            code = _wants_code(files) if code is None else code
            if not code:
                continue
        try:
            found = source.companion(name)
        except CheckpointError as error:
            notes.append(_left(source, name, error.message))
            continue
        if found.size > MOST_BYTES or taken + found.size > MOST_IN_ALL:
            notes.append(_left(source, name, f"{format_size(found.size)} are too many"))
            continue
        taken += found.size
        files.append(found)
    return Companions(tuple(files), tuple(notes))


def _left(source: Source, name: str, why: str) -> str:
    return printable(f"{source.label}: {name} is not copied: {why}")


def _names(source: Source) -> list[str]:
    """The names of what may be copied: modules of Python last, as configs say whether they are."""
    top = source.names()
    found = [name for name in top if not name.endswith("/") and is_companion(name)]
    for folder in folders_among(top):
        inside = (posixpath.join(folder, name) for name in source.names(folder))
        found += [name for name in inside if is_companion(name)]
    return sorted(found, key=lambda name: (name.endswith(".py"), name))


def _wants_code(files: list[Companion]) -> bool:
    """Whether one of the configs says that the model is made by modules that lie beside it."""
    configs = [file for file in files if file.name.endswith("config.json") and "/" not in file.name]
    return any(_NAMES_CODE in (file.read(_LOOKED_AT) or b"") for file in configs)
