"""``ckdiff.diff``: the diff as one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ckdiff.checkpoints.opening import Given
from ckdiff.diffs.plan import plan
from ckdiff.diffs.result import DiffResult
from ckdiff.diffs.run import run
from ckdiff.options import Observer, Options
from ckdiff.rules import Rule

if TYPE_CHECKING:
    from ckdiff.running.dask import Scheduler


def diff(
    base: Given,
    tuned: Given,
    out: str | os.PathLike[str] | None = None,
    *,
    rules: Sequence[str | Rule] = ("exact",),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Sequence[str] = (),
    key: str | None = None,
    base_adapter: Given | None = None,
    tuned_adapter: Given | None = None,
    common_rows: bool = False,
    unfuse: bool = True,
    dequantize: bool = False,
    stats: bool = False,
    workers: int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    verify: bool = False,
    stream: bool = False,
    disk: str | int = "1GiB",
    scheduler: Scheduler = None,
    device: str = "cpu",
    device_memory: str | int = "1GiB",
    observer: Observer | None = None,
) -> DiffResult:
    """Compare two checkpoints exactly, element by element, in bounded memory.

    ``base`` and ``tuned`` are what ``open_checkpoint`` takes, or open checkpoints. ``rules`` say
    when an element is changed: ``exact``, ``atol=T``, ``rtol=R`` or ``ulp=K``, each also as
    ``rule@bf16``, ``@f16`` or ``@f32``. Each of them gives a mask, and ``exact`` is always counted.
    Each of ``rename`` is a ``REGEX=REPL``, applied to the tuned side's names in order by
    ``re.sub``. Of the names then, on both sides, those that match a glob of ``include`` are
    compared, by default all, and never those that match one of ``exclude``. ``key`` is the path of
    the state dict in torch files that hold more. With ``common_rows`` tensors that differ in their
    first dimension only are compared in the rows that both have. Fused tensors are compared part
    by part where the other side has the parts, unless ``unfuse`` is false. With ``dequantize``
    quantised tensors are compared by the float32 values that they stand for. ``memory``, a number
    of bytes or a text such as ``"512MiB"``, bounds the anonymous memory of all ``workers``
    together: 256 MiB by default, and 32 MiB more for each worker past two. Tensors at one
    place of a file that both sides share (one inode, or one content hash at the hub) are equal and
    not read, but with ``stats``, whose sums need them, and with ``verify``. With ``out``
    a mask store is written there and opened as ``result.store``; a run that was stopped is
    resumed by the same call. Runs on the cluster of ``scheduler`` (an address or a Dask client),
    else of a Dask client that is active here, else on our own threads, as it does with
    ``scheduler="threads"``. With ``stream`` checkpoints of the hub are not downloaded: what is
    compared is fetched, with at most ``disk`` bytes of temporary files. ``device`` is ``"cuda"`` to
    compare on a GPU, or ``"auto"``. Raises a CkdiffError: CheckpointError, SourceChanged,
    PairingError, BudgetError, StoreExists, StoreLocked, ClusterError and others of
    :mod:`ckdiff.errors`.
    """
    options = Options(
        rules=rules,
        include=include,
        exclude=exclude,
        rename=rename,
        key=key,
        base_adapter=base_adapter,
        tuned_adapter=tuned_adapter,
        common_rows=common_rows,
        unfuse=unfuse,
        dequantize=dequantize,
        stats=stats,
        workers=workers,
        memory=memory,
        overwrite=overwrite,
        verify=verify,
        stream=stream,
        disk=disk,
        scheduler=scheduler,
        device=device,
        device_memory=device_memory,
    )
    with plan(base, tuned, out, options, observer) as planned:
        return run(planned)
