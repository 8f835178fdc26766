"""What may be raised: our own errors, and little else. The tree of errors is as it is drawn."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator

from source import FILES, tree

import ckdiff
from ckdiff import errors

#: what is raised besides our own errors: (module, class) -> why that is right
RAISED = {
    ("ckdiff", "AttributeError"): "what a module's __getattr__ owes Python",
    ("ckdiff.sync", "AttributeError"): "what a module's __getattr__ owes Python",
    ("ckdiff.training", "AttributeError"): "what a module's __getattr__ owes Python",
    ("ckdiff.stores.table", "KeyError"): "a mapping without the key",
    ("ckdiff.stores.table", "IndexError"): "a sequence without the index; it ends iteration",
    ("ckdiff.checkpoints.pairing", "AssertionError"): "cannot be reached",
    ("ckdiff.kernels.guard", "OSError"): "a system without SIGBUS handlers, which Linux is not",
    ("ckdiff.kernels.image", "ValueError"): "caught by compiled: numba's own linker is used",
    ("ckdiff.kernels.image", "OSError"): "caught by compiled: numba's own linker is used",
    ("ckdiff.figures.frames", "NotImplementedError"): "a result says which its records are",
    ("ckdiff.runs.timelines.shown", "NotImplementedError"): "what is mixed in asks for a member",
    ("ckdiff.stores.shown", "NotImplementedError"): "what is mixed in asks for a member",
    ("ckdiff.kernels.gpu.tables", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels", "ValueError"): "a mistake of ours: a table that leads out of its arrays",
    ("ckdiff.kernels.advising", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.casting", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.changes", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.copying", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.counting", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.delta", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.lowrank", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.memory", "TypeError"): "a mistake of ours: a kernel takes another dtype",
    ("ckdiff.kernels.memory", "ValueError"): "a mistake of ours: an array that is too small",
    ("ckdiff.kernels.moving", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.panels", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.paths", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.scaling", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.runs", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.spread", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.strided", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.timeline", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.runs.timelines.chunk", "ValueError"): "caught there: the chunk is compared again",
    ("ckdiff.runs.timelines.file", "ValueError"): "caught there, and becomes a StoreCorrupt",
    ("ckdiff.kernels.zstd", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.zstdframes", "ValueError"): "caught by deltas.versions.decoding: Damaged",
    ("ckdiff.kernels.zstdframes", "MemoryError"): "what Python would say of the same",
    ("ckdiff.kernels.compiled", "ImportError"): "caught there: nothing is kept on disk",
    ("ckdiff.kernels.compiled", "ValueError"): "caught there: the kernel is compiled anew",
    ("ckdiff.kernels.owned", "OSError"): "caught by keeping: the kernel is compiled anew",
    (
        "ckdiff.checkpoints.formats.headertext",
        "ValueError",
    ): "caught there, and becomes a HeaderError",
    (
        "ckdiff.checkpoints.formats.strictjson",
        "ValueError",
    ): "caught by header and shards, with the file",
    (
        "ckdiff.checkpoints.formats.dcppieces",
        "ValueError",
    ): "caught there, and becomes a CheckpointError",
    (
        "ckdiff.checkpoints.formats.shards",
        "ValueError",
    ): "caught by ranks, and becomes a CheckpointError",
    ("ckdiff.checkpoints.indexes", "ValueError"): "caught there, and becomes a CheckpointError",
    ("ckdiff.checkpoints.places.localfolder", "ValueError"): "caught by weights and nested",
    ("ckdiff.checkpoints.places.hub.listedfolder", "ValueError"): "caught by weights and nested",
    ("ckdiff.stores.schema", "ValueError"): "caught by sealed and store, with the store's name",
    ("ckdiff.stores.sealed", "ValueError"): "caught there, by reading and by metadata",
    ("ckdiff.stores.tablefile", "ValueError"): "caught by store, and becomes a StoreError",
    ("ckdiff.stores.sealed", "OSError"): "caught by manifest, and becomes a StoreError",
    ("ckdiff.masks.importing.maskfile", "ValueError"): "caught there and by npz: a CheckpointError",
    (
        "ckdiff.checkpoints.formats.picklebytes",
        "ValueError",
    ): "caught by pickles, and becomes a CheckpointError",
    (
        "ckdiff.checkpoints.formats.statelisting",
        "ValueError",
    ): "caught by torchzip, and becomes a CheckpointError",
    ("ckdiff.outputs.placing", "OSError"): "the system's own error, reported with its path",
    ("ckdiff.outputs.placing", "FileExistsError"): "what the system would say of the same",
    ("ckdiff.deltas.container", "ValueError"): "caught there, and becomes a DeltaError",
    ("ckdiff.deltas.parts", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.ranges", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.facts", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.contents", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.frames", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.streamplan", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.tables", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.signing.keys", "ValueError"): "caught there, and becomes a UsageError",
    ("ckdiff.deltas.signing.sshsig", "ValueError"): "caught there, and becomes a DeltaError",
    ("ckdiff.deltas.versions.packed", "Damaged"): "caught by version and folding: DeltaError",
    ("ckdiff.deltas.versions.decoding", "Damaged"): "caught by folding and reading: DeltaError",
    ("ckdiff.deltas.versions.places", "Damaged"): "caught there, and becomes a DeltaError",
    ("ckdiff.deltas.versions.encoding", "ValueError"): "a library that is not the one it was",
    ("ckdiff.deltas.versions.form", "ValueError"): "caught there, and becomes a DeltaError",
    ("ckdiff.deltas.versions.spool", "OSError"): "as the system says it, reported with its path",
    ("ckdiff.deltas.varints", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.deltas.unpacking", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.deltas.frames", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.deltas.indices", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.running.threads", "Stopped"): "ends a worker; never leaves the runner",
    ("ckdiff.cli.output", "OSError"): "standard output's own error, reported by exits",
    ("ckdiff.cli.exits", "KeyboardInterrupt"): "what a signal means to Python",
    ("ckdiff.cli.program", "SystemExit"): "the way out of the process",
    ("ckdiff.cli.apply", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.check", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.diff", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.options", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.program", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.voice", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.options", "click.BadParameter"): "reported by exits with status 2",
}

OURS = {name for name, value in vars(errors).items() if inspect.isclass(value)}


def raised(module: str) -> Iterator[tuple[str, int]]:
    """The classes that a module raises by name, and the lines."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            thing = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(thing)
            if name.split(".")[-1][:1].isupper():  # not a variable or a function that makes one
                yield name, node.lineno


def test_only_our_own_errors_are_raised() -> None:
    # Stopped is raised by chunks on behalf of the runner that defines it
    home = {"Stopped": "ckdiff.running.threads"}
    found = {
        (home.get(name, module), name): f"{module}:{line} raises {name}"
        for module in FILES
        for name, line in raised(module)
        if name not in OURS
    }
    assert [text for key, text in found.items() if key not in RAISED] == []
    assert RAISED.keys() - found.keys() == set(), "what is no longer raised needs no excuse"


def test_every_error_class_is_in_the_tree() -> None:
    stray = [
        f"{module}.{node.name}"
        for module in FILES
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ClassDef) and module != "ckdiff.errors"
        for base in map(ast.unparse, node.bases)
        if base.endswith(("Error", "Exception", "Warning")) or base in OURS
    ]
    assert stray == ["ckdiff.deltas.varints.Damaged", "ckdiff.running.threads.Stopped"]
    assert set(ckdiff.__all__) >= OURS


def drawn_tree() -> Iterator[tuple[str, str | None, list[int]]]:
    """The tree in the docstring of errors.py: class, the class above it, exit codes."""
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.fullmatch(r" {4}([│├└─ ]*)(\w+) +(\d+(?:/\d+)*) {2,}\S.*", line)
        if match:
            depth = len(match[1]) // 4
            yield (
                match[2],
                above[depth - 1] if depth else None,
                [int(c) for c in match[3].split("/")],
            )
            above[depth:] = [match[2]]


def test_the_drawn_error_tree_is_the_real_one() -> None:
    drawn = {name: (parent, codes) for name, parent, codes in drawn_tree()}
    assert drawn.keys() == OURS
    assert drawn["StoreCorrupt"] == ("StoreError", [2])
    for name, (parent, codes) in drawn.items():
        kind = getattr(errors, name)
        assert kind.__bases__ == ((getattr(errors, parent) if parent else Exception),)
        assert kind("words").exit_code == codes[0]
        for code in codes[1:]:  # chosen where it is raised
            assert kind("words", exit_code=code).exit_code == code
