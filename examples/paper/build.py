"""The build folder: where everything is, and files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from paper.runs import Run


@dataclass(frozen=True)
class Build:
    """Paths in the build folder of one matrix."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    def folder(self, name: str) -> Path:
        """What belongs to a run, or to ``base`` or a pool."""
        return self.root / "runs" / name

    def pool(self, task: str, seed: int) -> Path:
        return self.root / "pools" / f"{task}-{seed}.safetensors"

    def result(self, name: str) -> Path:
        """The JSON of a finished job: written last, so where it is the job is done."""
        return self.root / "results" / f"{name}.json"

    def checkpoint(self, name: str, step: int) -> Path:
        return self.folder(name) / "steps" / f"step-{step:05d}"

    def tuned(self, name: str) -> Path:
        """The stored model at the end of a run: bfloat16."""
        return self.folder(name) / "tuned"

    def masters(self, name: str) -> Path:
        """The training weights at the end of a run, in float32."""
        return self.folder(name) / "masters"

    def store(self, name: str) -> Path:
        """What the run changed in the stored model: a mask store."""
        return self.folder(name) / "changed.zarr"

    def timeline(self, name: str) -> Path:
        return self.folder(name) / "timeline"

    def mask(self, run: Run) -> Path:
        """The mask that a run trains with, where it is not another run's store."""
        return self.folder(run.name) / "mask.zarr"


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all; numbers that are not finite are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(value), indent=1, sort_keys=True, allow_nan=False)
    beside = path.with_suffix(f".{os.getpid()}.part")
    beside.write_text(text + "\n", "utf-8")
    beside.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def save_weights(path: Path, weights: Mapping[str, Tensor], *, rounded: bool = True) -> None:
    """A checkpoint's directory; ``rounded`` to bfloat16, as models are stored."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    kept = {
        name: (tensor.bfloat16() if rounded else tensor.float()).detach().contiguous()
        for name, tensor in weights.items()
    }
    beside = path / "model.part"
    save_file(kept, beside, metadata={"format": "pt"})
    beside.replace(path / "model.safetensors")


def load_weights(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")
