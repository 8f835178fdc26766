"""The stored results of a matrix, and how numbers of several seeds are said."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from paper.build import read_json

Result = dict[str, Any]  #: the JSON of a run


@dataclass(frozen=True)
class Spread:
    """A number over seeds: its mean, its least and its most."""

    values: tuple[float, ...]
    of: str = "run"

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values) if self.values else float("nan")

    @property
    def median(self) -> float:
        return median(self.values) if self.values else float("nan")

    def __str__(self) -> str:
        if not self.values:
            return "–"
        if len(self.values) == 1:
            return f"{_said(self.mean)} (one {self.of})"
        low, high = min(self.values), max(self.values)
        return f"{_said(self.mean)} ({_said(low)}–{_said(high)}, {len(self.values)} {self.of}s)"

    @property
    def short(self) -> str:
        """The same for a cell of a table."""
        if not self.values:
            return "–"
        low, high = _said(min(self.values)), _said(max(self.values))
        return _said(self.mean) + (f" ({low}–{high})" if high != low else "")


def _said(value: float) -> str:
    """Three digits after the point; more where that would be nothing."""
    return f"{value:.3f}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"


@dataclass(frozen=True)
class Results:
    """Everything that was run."""

    base: Result
    runs: dict[str, Result]
    agreement: Result
    setting: Result
    trl: Result  #: what TRL's trainers made of some runs; empty where they were not asked

    def of(self, **wanted: Any) -> list[Result]:
        """The full runs (no mask) whose configuration has these values."""
        return [
            each for each in self.runs.values() if not each["run"]["mask"] and _fits(each, wanted)
        ]

    def masked(self, full: str, kind: str, group: str = "retrain") -> list[Result]:
        """The runs that repeat a full run with a kind of mask."""
        wanted = {"of": full, "mask": kind, "group": group}
        return [each for each in self.runs.values() if _fits(each, wanted)]

    def question(self, start: str) -> dict[str, Result]:
        """The overlaps whose question begins like this."""
        found = self.agreement["questions"]
        return {name: each for name, each in found.items() if name.startswith(start)}


def _fits(result: Result, wanted: dict[str, Any]) -> bool:
    return all(result["run"][key] == value for key, value in wanted.items())


def load_results(folder: Path) -> Results:
    """What a folder of results holds. A run that is not there is left out, and the page says so."""
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    missing = {"base", "agreement", "setting"} - found.keys()
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(sorted(missing))}.json")
    runs = {name: each for name, each in found.items() if "measured" in each}
    for each in runs.values():
        often = found["base"].get("often", {}).get(each["run"]["task"])
        if often and each["run"]["start"] == "base":
            each["start"]["often"] = often["stored"]
    return Results(found["base"], runs, found["agreement"], found["setting"], found.get("trl", {}))


def spread(results: Iterable[Result], value: Callable[[Result], float | None]) -> Spread:
    """A number of each of some runs."""
    known = (value(each) for each in results)
    return Spread(tuple(each for each in known if each is not None))


def density(result: Result) -> float:
    """The share of weights that the stored model has changed, exact."""
    return float(result["measured"]["density"]["exact"])


def density_tolerant(result: Result) -> float:
    """The share that it has changed by more than the papers' tolerance, 1e-5."""
    return float(result["measured"]["density"]["atol=1e-5"])


def density_f32(result: Result) -> float:
    return float(result["measured"]["density_f32"]["exact"])


def density_f32_tolerant(result: Result) -> float:
    return float(result["measured"]["density_f32"]["atol=1e-5"])


def reward(result: Result, kind: str = "stored") -> float:
    return float(result["end"][kind]["reward"])


def accuracy(result: Result, kind: str = "stored") -> float:
    return float(result["end"][kind]["accuracy"])


def gain(result: Result, kind: str = "stored") -> float:
    """Reward gained from the start of the run."""
    return reward(result, kind) - float(result["start"][kind]["reward"])


def seen(result: Result) -> str:
    """Which weights the forward pass of a run sees: in mixed precision the stored, rounded ones."""
    return "stored" if result["run"]["precision"] == "mixed" else "masters"


def share_of_gain(masked: Result, full: Result, kind: str = "") -> float | None:
    """How much of the full run's gain a masked run has; None where there was hardly any.

    Of the weights that the forward pass sees, or those of ``kind``: in mixed precision float32
    weights that were never seen to move have moved all the same, so that the two shares differ.
    """
    kind = kind or seen(full)
    whole = gain(full, kind)
    if whole < 0.01:
        return None
    return (reward(masked, kind) - float(full["start"][kind]["reward"])) / whole


def course(result: Result) -> list[dict[str, float]]:
    """Along a run's checkpoints: step, reward gained (stored model), density, coverage.

    Checkpoints are scored by fewer prompts than ends, and so is where they are counted from.
    """
    start = float(result["start"].get("often", result["start"]["stored"])["reward"])
    pairs = zip(result["curve"], result["measured"]["steps"], strict=True)
    return [
        {
            "step": point["step"],
            "gained": point["stored"]["reward"] - start,
            "accuracy": point["stored"]["accuracy"],
            "density": counted["density"],
            "coverage": counted["coverage"] if counted["coverage"] is not None else 0.0,
        }
        for point, counted in pairs
    ]


def density_at(result: Result, gained: float) -> float | None:
    """The density at which a run had gained so much reward, between checkpoints on a line."""
    before = {"gained": 0.0, "density": 0.0}
    for point in course(result):
        if point["gained"] >= gained:
            way = point["gained"] - before["gained"]
            part = (gained - before["gained"]) / way if way > 0 else 1.0
            return before["density"] + part * (point["density"] - before["density"])
        before = point
    return None
