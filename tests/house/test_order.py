"""Which way imports point, and that nothing but the kernels deals in addresses."""

from __future__ import annotations

import ast
import graphlib

from commands import command_names
from source import FILES, PACKAGE, tree

import ckdiff

#: The packages, and the words that stand at the top as modules, by floor: each may import only from
#: floors above it in this list, and from itself. A new package has to be placed here.
FLOORS = [
    {"_version", "errors", "dtypes"},
    {"naming", "rules", "layout", "budget"},
    {"notebook"},
    {"options"},
    {"running"},
    {"kernels"},
    {"checkpoints"},
    {"outputs"},
    {"figures"},
    {"stores"},
    {"conversions", "diffs", "overlaps", "training"},
    {"masks"},
    {"deltas", "grafts"},
    {"runs", "sync"},
    {"reports"},
    {"ckdiff"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


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
        names = (name.replace("-", "_") for name in command_names())
        found |= dict.fromkeys((f"ckdiff.cli.{name}" for name in names), 0)
    return found


def room(module: str) -> str:
    """The package, or the module at the top, that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def test_every_package_has_its_place() -> None:
    assert sorted(FLOOR) == sorted({room(module) for module in FILES})
    words = {"_version", "__main__", "errors", "dtypes", "rules", "naming", "layout", "options"}
    top = {path.stem for path in PACKAGE.glob("*.py")}
    assert top == words | {"__init__", "budget", "notebook"}, (
        "only the words stand at the top as modules"
    )


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
