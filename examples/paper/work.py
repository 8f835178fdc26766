"""One job, in a process of its own: the base, a pool, a run, or how far the runs agree."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from paper.build import Build, read_json, write_json
from paper.runs import MATRICES, OFFLINE, Run, chosen, needs

AGREEMENT = "agreement"  #: the job that looks at all runs together


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to be done once; its result is a JSON file of its name."""

    name: str
    needs: tuple[str, ...] = ()
    run: Run | None = None


def jobs_of(matrix: str, only: str = "*") -> list[Job]:
    """All jobs of a matrix, each after those that it needs."""
    runs = chosen(MATRICES[matrix](), only)
    pools = {(run.task, run.seed): None for run in runs if run.algorithm in OFFLINE}
    found = [Job("base"), *(Job(pool_name(*pool), ("base",)) for pool in pools)]
    for run in runs:
        pool = [pool_name(run.task, run.seed)] if run.algorithm in OFFLINE else []
        found.append(Job(run.name, ("base", *pool, *needs(run)), run))
    return [*found, Job(AGREEMENT, tuple(run.name for run in runs))]


def pool_name(task: str, seed: int) -> str:
    return f"pool-{task}-{seed}"


def is_done(build: Build, job: Job) -> bool:
    """Whether its result is there, and is of this very run."""
    path = build.result(job.name)
    if not path.exists():
        return False
    if job.name == AGREEMENT:
        return bool(read_json(path)["runs"] == sorted(job.needs))
    if job.run is None:
        return True
    return bool(read_json(path)["run"] == dataclasses.asdict(job.run))


@contextmanager
def alone(build: Build, name: str) -> Iterator[None]:
    """Only one process at a time does a job; another one waits."""
    path = build.root / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def work(setting: Any, job: Job) -> dict[str, Any]:
    """Do a job; gives its result, which is written last."""
    import torch

    from paper.train import Setting

    assert isinstance(setting, Setting)
    torch.set_num_threads(1)
    torch.set_default_device(setting.device)
    began = time.perf_counter()
    if job.name == "base":
        result = _base(setting)
    elif job.name == AGREEMENT:
        from paper.agreement import agreement

        runs = [
            each for each in MATRICES[setting.matrix]() if setting.build.result(each.name).exists()
        ]
        result = agreement(setting.build, runs)
    elif job.run is None:
        result = _pool(setting, job.name)
    else:
        result = _run(setting, job.run)
    result["seconds"] = round(time.perf_counter() - began, 1)
    result["cpu_seconds_in_all"] = round(time.process_time(), 1)
    write_json(setting.build.result(job.name), result)
    _clean(setting.build, job.name)
    return result


def _clean(build: Build, name: str) -> None:
    """What only an unfinished job needs. Not before the result is there: who is stopped here
    begins with the measuring again.
    """
    for left in ("progress.pt", "steps", "zeros", "start"):
        path = build.folder(name) / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _base(setting: Any) -> dict[str, Any]:
    from paper.base import train_base
    from paper.build import save_weights
    from paper.tasks import TASKS
    from paper.train import scores

    model = train_base(setting.scale, setting.recipe)
    save_weights(setting.build.base, model.state_dict())
    return {
        "recipe": dataclasses.asdict(setting.recipe),
        "parameters": sum(each.numel() for each in model.parameters()),
        "scores": {task: scores(setting, model, task, setting.ends) for task in TASKS},
        # by the prompts of checkpoints: what is gained along a run is counted from here
        "often": {task: scores(setting, model, task, setting.often) for task in TASKS},
    }


def _pool(setting: Any, name: str) -> dict[str, Any]:
    from paper.train import make_pool

    _, task, seed = name.split("-")
    make_pool(setting, task, int(seed))
    return {"pairs": setting.pool}


def _run(setting: Any, run: Run) -> dict[str, Any]:
    from paper.measure import measure_run
    from paper.retrain import mask_of
    from paper.tickets import start_of
    from paper.train import train_run

    build: Build = setting.build
    folder = build.folder(run.name)
    mask: Path | None = None
    folder.mkdir(parents=True, exist_ok=True)
    if run.mask:
        mask = mask_of(build, run)
    result = train_run(setting, run, mask=mask, start=start_of(build, run, mask))
    result["measured"] = measure_run(build, run)
    if mask is not None:
        from paper.retrain import density

        result["mask_density"] = density(mask)
    return result
