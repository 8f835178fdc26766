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

    ``base`` and ``tuned`` are anything that ``open_checkpoint`` takes, or open checkpoints.

    - ``out``: write a mask store there, and open it as ``result.store``. If the run is stopped, the
      same call resumes it.
    - ``rules``: when an element counts as changed: ``exact``, ``atol=T``, ``rtol=R`` or ``ulp=K``,
      each also with ``@bf16``, ``@f16`` or ``@f32``. Each rule gives a mask. ``exact`` is always
      counted.
    - ``rename``: texts ``REGEX=REPL``, applied to the tuned side's names in order, with ``re.sub``.
    - ``include``, ``exclude``: globs for the names on both sides, after renaming. By default all
      tensors are compared; ``exclude`` wins.
    - ``key``: the path of the state dict in torch files that hold more.
    - ``base_adapter``, ``tuned_adapter``: a LoRA adapter (PEFT) to merge into that side.
    - ``common_rows``: if tensors differ only in their first dimension, compare the rows that both
      have.
    - ``unfuse``: compare fused tensors part by part, if the other side has the parts.
    - ``dequantize``: compare the float32 values that quantised tensors stand for.
    - ``stats``: also measure how far the elements of each tensor moved.
    - ``verify``: also read tensors that are known to be equal, because both sides have the same
      file (one inode, or one content hash on the hub). ``stats`` reads them too.
    - ``memory``: limit on the anonymous memory of all ``workers`` together, in bytes or as a text
      such as ``"512MiB"``. Default: 256 MiB, plus 32 MiB for each worker past two.
    - ``scheduler``: a Dask scheduler's address or a client. By default an active Dask client is
      used, otherwise threads. ``"threads"`` always uses threads.
    - ``stream``: do not download checkpoints of the hub; fetch only what is compared, with at most
      ``disk`` bytes of temporary files.
    - ``device``: ``"cpu"``, ``"cuda"``, or ``"auto"``, which measures whether a GPU is faster.

    Raises a CkdiffError: CheckpointError, SourceChanged, PairingError, BudgetError, StoreExists,
    StoreLocked, ClusterError and others of :mod:`ckdiff.errors`.
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
