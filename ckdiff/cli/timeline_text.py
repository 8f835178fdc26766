"""What ``timeline`` prints for people, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckdiff.budget import format_size
from ckdiff.cli import csvs, formats
from ckdiff.cli.tables import Column, table
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import printable

if TYPE_CHECKING:
    from ckdiff.runs.timelines.result import Timeline

_MOST_POINTS = 40  #: steps of a sparkline
_TRACE = 100  #: times less than the highest is next to nothing
_NAMED = 5  #: tensors that were left out
_MOST_ROWS = 400  #: of the table of groups
_STEP = ("changed_since_first", "changed_since_previous", "kept")
_WAYS = (
    "step_length", "distance", "path_length", "path_ratio", "onward", "back", "sign_agreement",
    "nonfinite",
)  # fmt: skip


def lines(result: Timeline, by: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The steps, the groups with their densities over time, and where it ended."""
    terminal = Terminal()
    called = printable(str(result.path))
    title = f"{called}: {formats.counted(len(result), 'step')}, {result.rule}"
    extent = formats.extent(result.elements, result.manifest["tensors"])
    out = [f"{terminal.paint(title, 'bold')}, {extent}", "", *_steps(result, terminal)]
    if by != "model":
        out += ["", *_groups(by, rows, terminal)]
    return [*out, "", *_ends(result)]


def _steps(result: Timeline, terminal: Terminal) -> list[str]:
    columns = [
        Column("step"),
        Column("checkpoint", align="left", flexible=True),
        Column("since first"),
        Column("since previous"),
        Column("of the final\nchange", optional=True),
        Column("that lasts", optional=True),
    ]
    if result.statistics:
        columns += [Column("onward", optional=True), Column("path of\ndistance", optional=True)]
    dash = terminal.glyphs.dash
    called = _called(result)
    cells = [["0", called[0], *[dash] * (len(columns) - 2)]]
    for number, step in enumerate(result.steps, 1):
        first, previous, kept = (step[key] for key in _STEP)
        cells.append(
            [
                str(number),
                called[number],
                formats.percent(first, result.elements),
                formats.percent(previous, result.elements),
                formats.percent(kept, result.final) if result.final else dash,
                formats.percent(kept, first) if first else dash,
                *(_way(step, dash) if result.statistics else ()),
            ]
        )
    return table(columns, cells, terminal)


def _called(result: Timeline) -> list[str]:
    """The checkpoints as they were asked for; of the hub by the revision, not by its commit."""
    known = zip(result.checkpoints, result.manifest["checkpoints"], strict=True)
    return [printable(side["label"] if "commit" in side else asked) for asked, side in known]


def _way(step: Mapping[str, Any], dash: str) -> tuple[str, str]:
    """Of a step which share of what moved on went onward, and the path by the distance."""
    moved, ratio = step["onward"] + step["back"], step["path_ratio"]
    onward = formats.percent(step["onward"], moved) if moved else dash
    return onward, dash if ratio is None else f"{ratio:.2f}"


def _groups(by: str, rows: Sequence[Mapping[str, Any]], terminal: Terminal) -> list[str]:
    columns = [
        Column(by, align="left", flexible=True),
        Column("elements", optional=True),
        Column("density by step", align="left"),
        Column("final"),
        Column("returned"),
        Column("never moved", optional=True),
    ]
    densities = [[step["density"] for step in row["steps"]] for row in rows]
    highest = max((d for some in densities for d in some), default=0.0)
    cells = [
        [
            printable(row["group"]),
            f"{row['elements']:,}",
            sparkline(some, highest, terminal),
            *(formats.percent(row[key], row["elements"]) for key in ("final", "returned", "never")),
        ]
        for row, some in zip(rows[:_MOST_ROWS], densities, strict=False)
    ]
    out = table(columns, cells, terminal)
    if len(rows) > _MOST_ROWS:
        out.append(f"and {len(rows) - _MOST_ROWS:,} more: --csv and --json have all")
    if highest:
        said = f"the highest bar is {formats.brief_share(highest)}"
        if any(0 < d < highest / _TRACE for some in densities for d in some):
            said += f"; {terminal.glyphs.trace} is less than a hundredth of it"
        out.append(said)
    return out


def sparkline(shares: Sequence[float], highest: float, terminal: Terminal) -> str:
    """A character for each step, or for each few where there are many: the last of them.

    Nothing has a character of its own, next to nothing another, and anything shows.
    """
    glyphs = terminal.glyphs
    levels = glyphs.levels
    each = max(1, math.ceil(len(shares) / _MOST_POINTS))
    points = [shares[min(at + each, len(shares)) - 1] for at in range(0, len(shares), each)]

    def mark(share: float) -> str:
        if share <= 0:
            return glyphs.zero
        if share < highest / _TRACE:
            return glyphs.trace
        return levels[min(len(levels) - 1, int(share / highest * len(levels)))]

    return "".join(map(mark, points))


def _ends(result: Timeline) -> list[str]:
    parts = ("never", "never moved"), ("returned", "moved and returned"), ("final", "changed")
    said = [f"{formats.percent(getattr(result, key), result.elements)} {what}"
            for key, what in parts]  # fmt: skip
    out = [f"in the end {', '.join(said)}"]
    found = result.to_dict()
    if found["left_out"]:
        named, more = found["left_out"][:_NAMED], len(found["left_out"]) - _NAMED
        lacking = ", ".join(map(formats.name, named)) + (f" and {more:,} more" if more > 0 else "")
        out.append(f"left out, because some checkpoint lacks them or has another shape: {lacking}")
    if result.statistics:
        out += _went(found)
    if "bytes_read" in found:
        fresh = found["bytes_read"] - found["bytes_resumed"]
        took = formats.duration(found["seconds"])
        speed = formats.rate(fresh, found["seconds"])
        out.append(f"read {format_size(fresh)} in {took}, {speed}")
    kept = " and first moves" if found["first_moves"] else ""
    return [*out, f"masks of each step{kept} in {printable(str(result.path))}"]


def _went(found: Mapping[str, Any]) -> list[str]:
    """What statistics say of the whole run."""
    out = []
    if found["path_ratio"] is not None:
        out.append(f"the way was {found['path_ratio']:.3g} times as long as the distance it led to")
    moved = found["onward"] + found["back"]
    if moved:
        share = formats.percent(found["onward"], moved)
        out.append(
            f"of the weights that had moved and moved again, {share} moved on, the rest moved back"
        )
    return out


def csv_lines(result: Timeline, by: str, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A header, and a line for each group and step."""
    more = _WAYS if result.statistics else ()
    shares = ("density", "density_since_previous", "coverage", "lasting")
    yield csvs.line([by, "step", "checkpoint", "elements", *_STEP, *shares, *more])
    for row in rows:
        for number, step in enumerate(row["steps"], 1):
            checkpoint = result.checkpoints[number]
            counts = [step[key] for key in _STEP]
            yield csvs.line(
                [row["group"], number, checkpoint, row["elements"], *counts,
                 *(step[key] for key in (*shares, *more))]
            )  # fmt: skip


def estimate_lines(estimate: Mapping[str, Any]) -> list[str]:
    """What ``--dry-run`` prints."""
    known = estimate["steps_known"]
    told = f", {known} of them known" if known else ""
    lines = [
        f"{formats.counted(estimate['steps'], 'step')}{told}: "
        f"{formats.extent(estimate['elements'], estimate['tensors'])}, {estimate['rule']}",
        f"reads {format_size(estimate['bytes_to_read'])}",
        f"writes at most {format_size(estimate['disk_at_most'])}; mostly far less",
        f"needs {format_size(estimate['memory_needed'])} of {format_size(estimate['memory'])} of "
        f"memory, with {formats.counted(estimate['workers'], 'worker')} and windows of "
        f"{estimate['window']:,} elements",
    ]
    if estimate["bytes_to_download"]:
        lines.insert(1, f"downloads {format_size(estimate['bytes_to_download'])}")
    return lines
