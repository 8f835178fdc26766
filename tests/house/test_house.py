"""The house rules: which way imports point, what is cheap, what is documented, what may be raised.

Nothing here runs a diff. Most of it reads the source.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import graphlib
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import ckdiff
from ckdiff import errors
from ckdiff.cli import main

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ckdiff"
LONGEST = 450  # lines of a file

#: The packages, and the words that stand at the top as modules, by floor: each may import only from
#: floors above it in this list, and from itself. A new package has to be placed here.
FLOORS = [
    {"_version", "errors", "dtypes"},
    {"naming", "rules", "layout", "budget"},
    {"options"},
    {"running"},
    {"kernels"},
    {"checkpoints"},
    {"outputs"},
    {"stores"},
    {"diffs", "overlaps", "training"},
    {"deltas", "grafts", "masks"},
    {"reports"},
    {"ckdiff"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

#: what ``import ckdiff`` and ``ckdiff --help`` must not import
HEAVY = {"numpy", "numba", "llvmlite", "zarr", "dask", "torch", "rich", "huggingface_hub"}

#: what is raised besides our own errors: (module, class) -> why that is right
RAISED = {
    ("ckdiff", "AttributeError"): "what a module's __getattr__ owes Python",
    ("ckdiff.training", "AttributeError"): "what a module's __getattr__ owes Python",
    ("ckdiff.stores.table", "KeyError"): "a mapping without the key",
    ("ckdiff.stores.table", "IndexError"): "a sequence without the index; it ends iteration",
    ("ckdiff.checkpoints.pairing", "AssertionError"): "cannot be reached",
    ("ckdiff.kernels.guard", "OSError"): "a system without SIGBUS handlers, which Linux is not",
    ("ckdiff.kernels.image", "ValueError"): "caught by compiled: numba's own linker is used",
    ("ckdiff.kernels.image", "OSError"): "caught by compiled: numba's own linker is used",
    ("ckdiff.kernels", "ValueError"): "a mistake of ours: a table that leads out of its arrays",
    ("ckdiff.kernels.counting", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.delta", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.memory", "TypeError"): "a mistake of ours: a kernel takes another dtype",
    ("ckdiff.kernels.memory", "ValueError"): "a mistake of ours: an array that is too small",
    ("ckdiff.kernels.moving", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.zstd", "ValueError"): "a mistake of ours: see kernels.memory",
    ("ckdiff.kernels.compiled", "ImportError"): "caught there: nothing is kept on disk",
    ("ckdiff.kernels.compiled", "ValueError"): "caught there: the kernel is compiled anew",
    ("ckdiff.kernels.owned", "OSError"): "caught by keeping: the kernel is compiled anew",
    (
        "ckdiff.checkpoints.formats.safetensors",
        "ValueError",
    ): "caught there, and becomes a HeaderError",
    (
        "ckdiff.checkpoints.formats.strictjson",
        "ValueError",
    ): "caught by header and shards, with the file",
    ("ckdiff.checkpoints.choosing", "ValueError"): "caught there, and becomes a CheckpointError",
    ("ckdiff.stores.schema", "ValueError"): "caught by sealed and store, with the store's name",
    ("ckdiff.stores.sealed", "ValueError"): "caught there, by reading and by metadata",
    ("ckdiff.stores.tablefile", "ValueError"): "caught by store, and becomes a StoreError",
    ("ckdiff.stores.sealed", "OSError"): "caught by manifest, and becomes a StoreError",
    ("ckdiff.masks.importing.maskfile", "ValueError"): "caught there and by npz: a CheckpointError",
    ("ckdiff.masks.importing.pickled", "ValueError"): "caught by torchfile: a CheckpointError",
    ("ckdiff.outputs.placing", "OSError"): "the system's own error, reported with its path",
    ("ckdiff.outputs.placing", "FileExistsError"): "what the system would say of the same",
    ("ckdiff.deltas.container", "ValueError"): "caught there, and becomes a DeltaError",
    ("ckdiff.deltas.parts", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.facts", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.streamplan", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.tables", "ValueError"): "caught by container, and becomes a DeltaError",
    ("ckdiff.deltas.varints", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.deltas.unpacking", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.deltas.frames", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.deltas.indices", "Damaged"): "caught by applying, which knows the delta's name",
    ("ckdiff.running.threads", "Stopped"): "ends a worker; never leaves the runner",
    ("ckdiff.cli.output", "OSError"): "standard output's own error, reported by exits",
    ("ckdiff.cli.exits", "KeyboardInterrupt"): "what a signal means to Python",
    ("ckdiff.cli.program", "SystemExit"): "the way out of the process",
    ("ckdiff.cli.diff", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.show", "click.UsageError"): "reported by exits with status 2",
    ("ckdiff.cli.options", "click.BadParameter"): "reported by exits with status 2",
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text("utf-8"))


# -- imports ---------------------------------------------------------------------------------------


def imported(module: str) -> dict[str, int]:
    """Modules of ours that a module imports, in functions and for types too, and on which line."""
    found: dict[str, int] = {}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [path if path in FILES else str(node.module) for path in paths]
        else:
            continue
        found |= {name: node.lineno for name in names if name.split(".")[0] == "ckdiff"}
    if module == "ckdiff":  # what it imports when a name is first used
        found |= dict.fromkeys(ckdiff._HOMES.values(), 0)
    if module == "ckdiff.cli.program":
        found |= dict.fromkeys((f"ckdiff.cli.{name}" for name in command_names()), 0)
    return found


def command_names() -> list[str]:
    return main.list_commands(click.Context(main))


def room(module: str) -> str:
    """The package, or the module at the top, that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_every_package_has_its_place() -> None:
    assert sorted(FLOOR) == sorted({room(module) for module in FILES})
    words = {"_version", "__main__", "errors", "dtypes", "rules", "naming", "layout", "options"}
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert top == words | {"__init__", "budget"}, "only the words stand at the top as modules"


def test_imports_point_one_way() -> None:
    upward = [
        f"{module}:{line} imports {other}, which is not on a floor above it"
        for module in FILES
        for other, line in imported(module).items()
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert upward == []


def test_no_imports_go_in_circles() -> None:
    graph = {module: set(imported(module)) for module in FILES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_imports_in_functions_and_of_names_are_seen() -> None:
    assert "ckdiff.kernels.gpu" in imported("ckdiff.diffs.devices")  # only inside functions
    assert "ckdiff.budget" in imported("ckdiff.diffs.plan")  # from ckdiff import budget
    assert "ckdiff.diffs.diff" in imported("ckdiff")  # by name, when first used
    assert "ckdiff.stores.summaries" in imported("ckdiff.cli.show")  # only for types


@pytest.mark.parametrize(
    "code",
    [
        "import ckdiff, ckdiff.cli",
        "from ckdiff.cli import main; main(['--help'])",
        "from ckdiff.cli import main; main(['diff', '--help'])",
        "from ckdiff.cli import main; main(['overlap', '--help'])",
    ],
)
def test_starting_imports_nothing_heavy(code: str) -> None:
    script = (
        "import sys, atexit\n"
        "loaded = lambda: print(*sorted({name.split('.')[0] for name in sys.modules}),"
        " file=sys.stderr)\n"
        f"atexit.register(loaded)\n{code}"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    modules = set(done.stderr.split())
    assert "ckdiff" in modules
    assert modules & HEAVY == set()


def test_only_kernels_deal_in_addresses() -> None:
    """What ``.ctypes`` gives could be taken for any count. Only readers may hand it out, and what
    they hand out becomes an array at once: see ckdiff.kernels.
    """
    makers = "ckdiff.checkpoints."
    dealing = [
        f"{module}:{node.lineno}"
        for module in FILES
        if not module.startswith("ckdiff.kernels")
        for node in ast.walk(tree(module))
        if (isinstance(node, ast.Attribute) and node.attr == "ctypes" and makers not in module)
        or (isinstance(node, ast.Attribute) and node.attr in ("memmove", "string_at"))
        or (isinstance(node, ast.Name) and node.id == "c_function")
    ]
    assert dealing == []


# -- what is public --------------------------------------------------------------------------------


def test_public_names_resolve() -> None:
    assert len(set(ckdiff.__all__)) == len(ckdiff.__all__)
    for name in ckdiff.__all__:
        assert getattr(ckdiff, name) is not None
    assert dir(ckdiff) == sorted(ckdiff.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = ckdiff.nonsense


def public_attributes(kind: type) -> Iterator[tuple[str, object]]:
    """The functions and properties that a class itself defines under public names."""
    for name, value in vars(kind).items():
        if isinstance(value, (classmethod, staticmethod)):
            value = value.__func__
        if isinstance(value, functools.cached_property):
            value = value.func
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            yield name, value


@pytest.mark.parametrize("name", [name for name in ckdiff.__all__ if name != "__version__"])
def test_public_names_have_docstrings(name: str) -> None:
    thing = getattr(ckdiff, name)
    assert inspect.isclass(thing) or inspect.isfunction(thing)
    assert (thing.__doc__ or "").strip()
    assert not (thing.__doc__ or "").startswith(f"{name}("), "a dataclass's own words are no help"
    if inspect.isclass(thing):
        bare = [
            attribute
            for attribute, value in public_attributes(thing)
            if not (value.__doc__ or "").strip()
        ]
        assert bare == []


def test_public_names_are_documented() -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    words = set(re.findall(r"\w+", text))
    missing = [name for name in ckdiff.__all__ if name not in words and name != "__version__"]
    assert missing == []


# -- the command line's documentation --------------------------------------------------------------


def commands() -> dict[str, click.Command]:
    context = click.Context(main)
    found = {name: main.get_command(context, name) for name in main.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


def option_names(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for name in (*parameter.opts, *parameter.secondary_opts)
    }


def sections() -> dict[str, str]:
    """docs/cli.md by command; what belongs to no command is under the empty name."""
    found = {"": ""}
    current = ""
    for line in (ROOT / "docs" / "cli.md").read_text("utf-8").splitlines():
        if line.startswith("#"):
            heading = re.match(r"#+ `?ckdiff ([a-z-]+)", line)
            current = heading[1] if heading else "" if line.startswith(("# ", "## ")) else current
        found[current] = found.get(current, "") + line + "\n"
    return found


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))


@pytest.mark.parametrize("name", command_names())
def test_commands_and_their_options_are_documented(name: str) -> None:
    text = sections()
    assert name in text, f"docs/cli.md has no heading `## ckdiff {name}`"
    assert option_names(commands()[name]) - options_in(text[name] + text[""]) == set()


def test_documented_options_exist() -> None:
    known = {"--help", "-h", "--version"}
    known |= {name for command in commands().values() for name in option_names(command)}
    for name, text in sections().items():
        code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)  # held against click below
        spans = " ".join(re.findall(r"`([^`]*)`", code))
        assert {o for o in options_in(spans) if o.startswith("--")} - known == set(), name


def pages() -> list[Path]:
    listed = ["README.md", "examples/hub.md"]
    return [*(ROOT / name for name in listed), *sorted((ROOT / "docs").rglob("*.md"))]


def command_lines(text: str) -> Iterator[list[str]]:
    """The arguments of every ``ckdiff`` command in a page's shell blocks."""
    for block in re.findall(r"^```(?:console|bash|sh|shell)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.commenters = "#"
            lexer.whitespace_split = True  # tcp://host:8786 is one word
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("|&;<>()"):  # where the shell ends a command
                    if words[:1] == ["ckdiff"]:
                        yield words[1:]
                    words = []
                else:
                    words.append(word)


def parse(arguments: list[str]) -> None:
    """Have click parse a command line without running it; raises click.UsageError."""
    name, *rest = arguments
    command: click.Command = main
    if not name.startswith("-"):
        if name not in commands():
            raise click.UsageError(f"no command {name}")
        command, arguments = commands()[name], rest
    with contextlib.suppress(click.exceptions.Exit):  # --help, --version
        command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_command_lines_are_valid(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in command_lines(page.read_text("utf-8")):
        try:
            parse(arguments)
        except click.UsageError as error:
            pytest.fail(f"ckdiff {shlex.join(arguments)}: {error.format_message()}")


def test_wrong_command_lines_would_be_noticed() -> None:
    text = (
        "```console\n$ ckdiff diff a b --nonsense | less # why\nls; ckdiff show x --by=layer\n```\n"
    )
    first, second = command_lines(text)
    assert first == ["diff", "a", "b", "--nonsense"]
    assert second == ["show", "x", "--by=layer"]
    parse(second)
    for wrong in (first, ["nonsense"], ["diff", "a"], ["show", "x", "--by", "nonsense"]):
        with pytest.raises(click.UsageError):
            parse(wrong)


def test_readme_shows_how_to_begin() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    shown = set(re.findall(r"make ([a-z]+)", text))
    assert {"demo", "test"} <= shown <= targets
    assert any(True for _ in command_lines(text))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


# -- errors ----------------------------------------------------------------------------------------

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


def test_no_public_name_hides_a_builtin() -> None:
    assert [name for name in ckdiff.__all__ if hasattr(builtins, name)] == []


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", FILES)
def test_files_say_what_they_are_and_are_short(module: str) -> None:
    assert ast.get_docstring(tree(module)), "a module's docstring says what it is for"
    lines = len(FILES[module].read_text("utf-8").splitlines())
    assert lines <= LONGEST, f"{lines} lines: what is the second thing in it?"


def test_no_module_shadows_a_public_name() -> None:
    for name in ckdiff.__all__:
        assert f"ckdiff.{name}" not in FILES


def test_the_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert importlib.import_module("ckdiff").__version__ == ckdiff.__version__
