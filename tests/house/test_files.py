"""Files say what they are and stay short, and so do functions: else there is a second thing in it.

A docstring is not counted: what is public explains its arguments. A function inside another counts
for both.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from source import FILES, tree

LONGEST_FILE = 399  # lines
LONGEST_FUNCTION = 39  # lines without the docstring
MOST_POSITIONAL = (
    6  # arguments, besides self and cls; what is only taken by its name is not counted
)

_PARSER = "one walk over the text of a header, of which each step needs the one before"
_MACHINE = "straight-line machine code: its blocks share their values"

LONG_FILES: dict[str, str] = {}

#: (module, function) -> why it may be longer
LONG_FUNCTIONS = {
    ("ckdiff.checkpoints.formats.columns", "validate"): _PARSER,
    ("ckdiff.checkpoints.pairing", "pair"): "one pass over both tables",
    ("ckdiff.checkpoints.places.hub.failures", "explained"): "one case for each error of a client",
    ("ckdiff.cli.show_text", "row_table"): "one column after the other",
    ("ckdiff.diffs.diff", "diff"): "an argument for each option, and nothing else",
    ("ckdiff.masks.importing.importing", "import_masks"): "one step after the other",
    ("ckdiff.kernels.codegen.agree", "agree_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.agree", "agree"): _MACHINE,
    ("ckdiff.kernels.codegen.changes", "put_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.changes", "put"): _MACHINE,
    ("ckdiff.kernels.codegen.delta", "split_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.delta", "split"): _MACHINE,
    ("ckdiff.kernels.codegen.delta", "merge_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.delta", "merge"): _MACHINE,
    ("ckdiff.kernels.codegen.drive", "drive_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.drive", "drive"): _MACHINE,
    ("ckdiff.kernels.codegen.entropy", "encode_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.entropy", "encode"): _MACHINE,
    ("ckdiff.kernels.codegen.gaps", "gaps_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.gaps", "gaps"): _MACHINE,
    ("ckdiff.kernels.codegen.gaps", "ungaps_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.gaps", "ungaps"): _MACHINE,
    ("ckdiff.kernels.codegen.paths", "paths_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.runs", "runs_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.runs", "runs"): _MACHINE,
    ("ckdiff.kernels.codegen.scaling", "scale_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.scaling", "scale"): _MACHINE,
    ("ckdiff.kernels.codegen.statistics", "add_block"): _MACHINE,
    ("ckdiff.kernels.codegen.statistics", "generate"): _MACHINE,
    ("ckdiff.kernels.codegen.sweep", "sweep_words"): _MACHINE,
    ("ckdiff.kernels.codegen.timeline", "march_kernel"): _MACHINE,
    ("ckdiff.kernels.codegen.timeline", "march"): _MACHINE,
    ("ckdiff.kernels.gpu.fusedcode", "_changed"): _MACHINE,
    ("ckdiff.kernels.gpu.fusedcode", "compare"): _MACHINE,
}

_NATIVE = "the signature of a native function, which knows no names"

#: (module, function) -> why it may take more
MANY_ARGUMENTS = {
    ("ckdiff.kernels.codegen.changes", "changes"): _NATIVE,
    ("ckdiff.kernels.codegen.changes", "put"): _NATIVE,
    ("ckdiff.kernels.codegen.combine", "_combine"): _NATIVE,
    ("ckdiff.kernels.codegen.decode", "_call_decompress"): _NATIVE,
    ("ckdiff.kernels.codegen.delta", "merge"): _NATIVE,
    ("ckdiff.kernels.codegen.drive", "call_compare"): _NATIVE,
    ("ckdiff.kernels.codegen.drive", "drive"): _NATIVE,
    ("ckdiff.kernels.codegen.gaps", "gaps"): _NATIVE,
    ("ckdiff.kernels.codegen.gaps", "ungaps"): _NATIVE,
    ("ckdiff.kernels.codegen.lowrank", "_elements"): _NATIVE,
    ("ckdiff.kernels.codegen.lowrank", "lowrank"): _NATIVE,
    ("ckdiff.kernels.codegen.panels", "_call_drive"): _NATIVE,
    ("ckdiff.kernels.codegen.panels", "panels"): _NATIVE,
    ("ckdiff.kernels.codegen.profile", "_scan_rows"): _NATIVE,
    ("ckdiff.kernels.codegen.profile", "_strip"): _NATIVE,
    ("ckdiff.kernels.codegen.runs", "runs"): _NATIVE,
    ("ckdiff.kernels.codegen.sample", "draw"): _NATIVE,
    ("ckdiff.kernels.codegen.sample", "near"): _NATIVE,
    ("ckdiff.kernels.codegen.timeline", "_moves_words"): _NATIVE,
    ("ckdiff.kernels.codegen.timeline", "march"): _NATIVE,
    ("ckdiff.kernels.codegen.timeline", "moves"): _NATIVE,
    ("ckdiff.kernels.gpu.compactcode", "compact"): _NATIVE,
    ("ckdiff.kernels.gpu.fusedcode", "compare"): _NATIVE,
    ("ckdiff.kernels.gpu.fusedcode", "_round"): _NATIVE,
    ("ckdiff.kernels.gpu.hashcode", "digests"): _NATIVE,
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(module: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(module) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines of a function, from ``def`` on, without its docstring."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def positional(function: Function) -> int:
    """How many arguments a function takes by their position."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("module", FILES)
def test_files_say_what_they_are_and_are_short(module: str) -> None:
    assert ast.get_docstring(tree(module)), "a module's docstring says what it is for"
    lines = len(FILES[module].read_text("utf-8").splitlines())
    if module in LONG_FILES:
        assert lines > LONGEST_FILE, "what is short needs no excuse"
    else:
        assert lines <= LONGEST_FILE, f"{lines} lines: what is the second thing in it?"


def test_functions_are_short() -> None:
    long = {
        (module, function.name): length(function)
        for module in FILES
        for function in functions(tree(module))
        if length(function) > LONGEST_FUNCTION
    }
    assert {key: lines for key, lines in long.items() if key not in LONG_FUNCTIONS} == {}
    assert LONG_FUNCTIONS.keys() - long.keys() == set(), "what is short needs no excuse"


def test_few_arguments_are_told_apart_by_their_place() -> None:
    many = {
        (module, function.name): positional(function)
        for module in FILES
        for function in functions(tree(module))
        if positional(function) > MOST_POSITIONAL
    }
    assert {key: count for key, count in many.items() if key not in MANY_ARGUMENTS} == {}
    assert MANY_ARGUMENTS.keys() - many.keys() == set(), "what takes few needs no excuse"


def test_lines_and_arguments_are_counted() -> None:
    code = (
        'async def f(a, /, b, *, c):\n    """Two\n    lines."""\n    return [\n        a,\n    ]\n'
        "class C:\n    def g(self, d, e): pass\n"
    )
    asynchronous, method = functions(ast.parse(code))
    assert (length(asynchronous), positional(asynchronous)) == (4, 2)
    assert (length(method), positional(method)) == (1, 2)
