"""Generating and compiling kernels: all that needs numba, imported only when one has to be made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckdiff.kernels.numbaview import numba_alone

with numba_alone():
    import llvmlite.binding
    from numba.core.ccallback import CFunc
    from numba.core.registry import cpu_target
    from numba.core.runtime import _nrt_python
    from numba.core.sigutils import normalize_signature

    from ckdiff.kernels.codegen.advise import advise_kernel
    from ckdiff.kernels.codegen.agree import agree_kernel
    from ckdiff.kernels.codegen.blend import blend_kernel
    from ckdiff.kernels.codegen.bounds import bounds_kernel
    from ckdiff.kernels.codegen.casting import narrow_kernel, widen_kernel
    from ckdiff.kernels.codegen.cells import cells_kernel
    from ckdiff.kernels.codegen.changes import changes_kernel, put_kernel
    from ckdiff.kernels.codegen.combine import combine_kernel
    from ckdiff.kernels.codegen.compare import compare_kernel
    from ckdiff.kernels.codegen.copying import copy_kernel
    from ckdiff.kernels.codegen.decode import decode_kernel
    from ckdiff.kernels.codegen.delta import merge_kernel, split_kernel, tally_kernel
    from ckdiff.kernels.codegen.drive import drive_kernel
    from ckdiff.kernels.codegen.entropy import encode_kernel, survey_kernel
    from ckdiff.kernels.codegen.gaps import gaps_kernel, ungaps_kernel
    from ckdiff.kernels.codegen.guard import guard_kernel
    from ckdiff.kernels.codegen.halves import halves_kernel
    from ckdiff.kernels.codegen.hashing import hash_kernel
    from ckdiff.kernels.codegen.lowrank import lowrank_kernel
    from ckdiff.kernels.codegen.margins import margins_kernel
    from ckdiff.kernels.codegen.moving import gather_kernel, scatter_kernel
    from ckdiff.kernels.codegen.pairs import pair_kernel, unpair_kernel
    from ckdiff.kernels.codegen.panels import panels_kernel
    from ckdiff.kernels.codegen.paths import paths_kernel
    from ckdiff.kernels.codegen.profile import profile_kernel
    from ckdiff.kernels.codegen.runs import runs_kernel
    from ckdiff.kernels.codegen.sample import draw_kernel, near_kernel
    from ckdiff.kernels.codegen.scaling import scale_kernel
    from ckdiff.kernels.codegen.spread import spread_kernel
    from ckdiff.kernels.codegen.statistics import statistics_kernel
    from ckdiff.kernels.codegen.strided import strided_kernel
    from ckdiff.kernels.codegen.sweep import sweep_kernel
    from ckdiff.kernels.codegen.timeline import march_kernel, moves_kernel
    from ckdiff.kernels.codegen.units import units_kernel

    _ = cpu_target.target_context  # made now: it keeps the settings that it is made with

__all__ = ["Compiled", "compile_kernel", "restore"]

_KERNELS: dict[str, Callable[..., Callable[..., Any]]] = {
    "advise": advise_kernel,
    "agree": agree_kernel,
    "blend": blend_kernel,
    "bounds": bounds_kernel,
    "cells": cells_kernel,
    "changes": changes_kernel,
    "combine": combine_kernel,
    "compare": compare_kernel,
    "copy": copy_kernel,
    "decode": decode_kernel,
    "draw": draw_kernel,
    "drive": drive_kernel,
    "encode": encode_kernel,
    "gaps": gaps_kernel,
    "gather": gather_kernel,
    "guard": guard_kernel,
    "halves": halves_kernel,
    "hash": hash_kernel,
    "lowrank": lowrank_kernel,
    "march": march_kernel,
    "margins": margins_kernel,
    "merge": merge_kernel,
    "moves": moves_kernel,
    "narrow": narrow_kernel,
    "near": near_kernel,
    "pair": pair_kernel,
    "panels": panels_kernel,
    "paths": paths_kernel,
    "profile": profile_kernel,
    "put": put_kernel,
    "runs": runs_kernel,
    "scale": scale_kernel,
    "scatter": scatter_kernel,
    "split": split_kernel,
    "spread": spread_kernel,
    "statistics": statistics_kernel,
    "strided": strided_kernel,
    "survey": survey_kernel,
    "sweep": sweep_kernel,
    "tally": tally_kernel,
    "ungaps": ungaps_kernel,
    "units": units_kernel,
    "unpair": unpair_kernel,
    "widen": widen_kernel,
}


class Compiled:
    """A kernel that numba compiled. Keeps its machine code alive."""

    def __init__(self, library: Any, symbol: str, usual: bool = True) -> None:
        self._library = library
        self.symbol = symbol  #: of the C function
        self.usual = usual  #: whether any other process would have made the same

    @property
    def address(self) -> int:
        """Where numba's linker put the C function."""
        return int(self._library.get_pointer_to_function(self.symbol))

    @property
    def object_code(self) -> bytes:
        """The object file that LLVM emitted."""
        return bytes(self._library._get_compiled_object())

    def dump(self) -> list[bytes]:
        """What :func:`restore` takes."""
        name, _, (code, shared) = self._library.serialize_using_object_code()
        return [name.encode(), code, shared, self.symbol.encode()]


def compile_kernel(name: str, kind: str, signature: str) -> Compiled:
    """Compile kernel ``name`` (of a ``kind``, where it has kinds) to a C function."""
    make = _KERNELS[name]
    arguments, result = normalize_signature(signature)
    with numba_alone() as usual:
        function: Any = CFunc(
            make(kind) if kind else make(), (arguments, result), {}, {"nopython": True}
        )
        function.compile()
        return Compiled(function._library, function.native_name, usual)


def restore(dump: list[bytes]) -> Compiled:
    """The kernel that ``Compiled.dump`` described, without compiling it."""
    name, code, shared, symbol = dump
    # LLVM ends the process when it meets a symbol it does not know; compiling would have told it
    # where numba's runtime is.
    for helper, address in _nrt_python.c_helpers.items():
        llvmlite.binding.add_symbol(helper if helper.startswith("_") else f"NRT_{helper}", address)
    with numba_alone():
        codegen = cpu_target.target_context.codegen()
        library = codegen.unserialize_library((name.decode(), "object", (code, shared)))
        return Compiled(library, symbol.decode())
