"""What ``diff`` prints for people."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckdiff.budget import format_size
from ckdiff.cli import formats
from ckdiff.cli.show_text import row_table
from ckdiff.cli.tables import Column, table
from ckdiff.cli.terminal import Terminal
from ckdiff.cli.unpaired_text import unlike_lines, unpaired_lines
from ckdiff.diffs.result import DiffResult
from ckdiff.errors import printable
from ckdiff.options import Estimate
from ckdiff.stores.summaries import By, Row, relative_delta, summarise
from ckdiff.stores.table import MaskTable

_SHORT = 16  #: rows of the short table
_FALLEN_BACK = 5
_MOVED = 10  #: tensors of the statistics table
_HISTOGRAM_BAR = 24


def lines(
    result: DiffResult,
    base: str,
    tuned: str,
    out: str | None,
    rows: tuple[By, Sequence[Row]] | None = None,
) -> list[str]:
    """The summary of a finished diff, with a table of ``rows``, or one that is short."""
    terminal = Terminal()
    sides = {"base": base, "tuned": tuned}.items()
    first, second = (formats.at_commit(text, result.commits.get(side)) for side, text in sides)
    title = f"{first} {terminal.glyphs.arrow} {second}"
    total = formats.counted(len(result.table), "tensor")
    texts = [
        terminal.paint(title, "bold"),
        formats.extent(result.elements, len(result.table))
        + (f"; {result.excluded:,} tensors excluded" if result.excluded else ""),
        _identical(result, total),
        "",
        *_model(result, terminal),
    ]
    if not result.differs:
        said = (
            "No element differs in value."
            if result.retyped
            else "No element and no tensor differs."
        )
        texts += ["", terminal.paint(said, "green")]
    for part in (
        _table(result, rows, terminal),
        _statistics(result.table, terminal),
        list(_fallen_back(result.exact_only)),
        _merge(result.merge),
        unlike_lines(result.retyped, result.resized, result.tied, terminal),
        unpaired_lines(result.unpaired_details, terminal),
    ):
        if part:
            texts += ["", *part]
    return [*texts, "", *_ends(result, out)]


def _ends(result: DiffResult, out: str | None) -> list[str]:
    """What it took, and where it went."""
    texts = [_reading(result)]
    if result.device_why is not None:
        place = "the CPU" if result.device == "cpu" else "the GPU"
        texts.append(f"compared on {place}: {printable(result.device_why)}")
    if result.store is not None and out is not None:
        texts.append(f"masks of {', '.join(result.store.masks)} in {printable(out)}")
    return texts


def _identical(result: DiffResult, total: str) -> str:
    """How many tensors are the same: of two dtypes, in their values."""
    count = result.tensors_identical
    what = "equal in value" if result.retyped else "bit-identical"
    return f"{count:,} of {total} {_are(count)} {what}"


def _merge(counts: Mapping[str, Any] | None) -> list[str]:
    """What became of an adapter's changes."""
    if counts is None:
        return []
    visible = counts["visible"]
    if not counts["elements"]:
        return ["none of the tensors that the adapter changes was compared"]
    if not visible:
        return ["the adapter changes nothing that the dtype of the weights can show"]
    share = formats.percent(counts["arrived"], visible)
    texts = [
        f"the adapter changes {visible:,} elements, and {counts['arrived']:,} of these changes "
        f"({share}) are in the other side"
    ]
    if counts["lost"]:
        texts.append(f"{counts['lost']:,} are not: the base's value is still there")
    if counts["other"]:
        texts.append(
            f"{counts['other']:,} elements have another value than both: trained on since, or "
            "rounded otherwise, as safe_merge=True and merges in another dtype do"
        )
    if counts["asked"] > visible:
        texts.append(
            f"{counts['asked'] - visible:,} more changes are too small for the weights' dtype"
        )
    if counts["extra"]:
        texts.append(
            f"{counts['extra']:,} elements that the adapter leaves as they are differ as well"
        )
    return texts


def _reading(result: DiffResult) -> str:
    """How much was read, and how fast."""
    fresh = result.bytes_read - result.bytes_resumed
    speed = formats.rate(fresh, result.seconds)
    took = formats.duration(result.seconds)
    read = f"read {format_size(fresh)} in {took}, {speed}" if fresh else f"read nothing, in {took}"
    if result.bytes_resumed:
        read += f"; {format_size(result.bytes_resumed)} were read by the run that was stopped"
    if result.bytes_known_equal:
        read += f"; {format_size(result.bytes_known_equal)} known to be equal were not read"
    return read


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def next_step(out: str | None) -> str:
    """A hint: what to do with the result."""
    if out is None:
        return "hint: nothing was stored; -o STORE keeps one bit for each element"
    return f"hint: next, try: ckdiff show {shlex.quote(out)}"


def estimate_lines(estimate: Estimate, out: str | None) -> list[str]:
    """The plan of ``--dry-run``."""
    unpaired = ", ".join(f"{len(names):,} {kind}" for kind, names in estimate.unpaired.items())
    needed, allowed = format_size(estimate.memory_needed), format_size(estimate.memory)
    fetch = estimate.bytes_to_download
    rows = [
        (
            "to compare",
            formats.extent(estimate.elements, estimate.tensors),
        ),
        ("unpaired", unpaired),
        ("rules", ", ".join(estimate.rules)),
        *([("to fetch", format_size(fetch))] if fetch else []),
        ("to read", _to_read(estimate)),
        ("to write", f"at most {format_size(estimate.disk_at_most)}" if out else "nothing"),
        ("memory", f"about {needed} of {allowed} allowed"),
        ("workers", f"{estimate.workers}, for {formats.counted(estimate.chunks, 'chunk')} of work"),
    ]
    return [f"{what:<12}{text}" for what, text in rows]


def _to_read(estimate: Estimate) -> str:
    text = format_size(estimate.bytes_to_read)
    if not estimate.bytes_known_equal:
        return text
    return f"{text}; {format_size(estimate.bytes_known_equal)} are known to be equal"


def _model(result: DiffResult, terminal: Terminal) -> list[str]:
    stored = _stored_as(result.table)
    heads = [
        Column("rule", "left", "cyan"),
        Column("changed"),
        Column("density", style="bold"),
        Column("sparsity"),
        Column("stored as", "left"),
    ]
    rows = [
        [
            rule,
            f"{counts['changed']:,}",
            formats.percent(counts["changed"], result.elements),
            formats.percent(result.elements - counts["changed"], result.elements),
            stored,
        ]
        for rule, counts in result.rules.items()
    ]
    return table(heads, rows, terminal)


def _stored_as(source: MaskTable) -> str:
    """The dtypes, which a density means little without: ``BF16``, ``BF16 98.10 %, F32 1.90 %``."""
    rows = sorted(summarise(source, "dtype"), key=lambda row: -row["elements"])
    if len(rows) == 1:
        return str(rows[0]["group"])
    total = source.total_elements
    return ", ".join(f"{row['group']} {formats.percent(row['elements'], total)}" for row in rows)


def _table(
    result: DiffResult, asked: tuple[By, Sequence[Row]] | None, terminal: Terminal
) -> list[str]:
    """The rows that are asked for; else those of a short table, where anything changed."""
    if asked is not None:
        return row_table(result.table, *asked, terminal, statistics=False)
    return _short_table(result.table, terminal) if result.rules["exact"]["changed"] else []


def _short_table(source: MaskTable, terminal: Terminal) -> list[str]:
    """By layer if that is short, else by module, else the densest modules."""
    by: By = "layer"
    rows = summarise(source, by)
    if len(rows) > _SHORT:
        by = "module"
        rows = summarise(source, by)
    more = len(rows) - _SHORT
    if more > 0:
        rows = summarise(source, by, top=_SHORT)
    out = row_table(source, by, rows, terminal, statistics=False)
    if more > 0:
        out.append(f"(the {_SHORT} {by}s of the highest density; {more:,} more)")
    return out


def _fallen_back(exact_only: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for rule, names in exact_only.items():
        shown = ", ".join(map(formats.name, names[:_FALLEN_BACK]))
        more = f" and {len(names) - _FALLEN_BACK:,} more" if len(names) > _FALLEN_BACK else ""
        count = formats.counted(len(names), "tensor")
        yield f"{rule} means exact on {count} without numeric values: {shown}{more}"


def _statistics(source: MaskTable, terminal: Terminal) -> list[str]:
    """How far elements moved: the model, the tensors that moved most, ULP distances."""
    if source.statistics is None:
        return []
    glyphs = terminal.glyphs
    rows = summarise(source, "tensor", sort="relative_delta", top=_MOVED)
    heads = [
        Column("moved most", "left", "cyan", flexible=True),
        Column(glyphs.norm),
        Column(glyphs.max_delta),
        Column("cosine"),
        Column("sign flips"),
    ]
    model = summarise(source, "model")[0]
    out = table(
        heads,
        [_moved(row["name"], row) for row in rows if row.get("statistics")],
        terminal,
        footer=_moved("model", model),
    )
    statistics = model.get("statistics") or {}
    if statistics.get("nonfinite"):
        out.append(f"left out: {statistics['nonfinite']:,} elements with an infinity or NaN")
    histogram = statistics.get("ulp_histogram") or []
    return [*out, "", *_histogram(histogram, terminal)] if any(histogram) else out


def _moved(name: str, row: Row) -> list[str]:
    measured = row.get("statistics") or {}
    return [
        printable(name),
        formats.number(relative_delta(row)),
        formats.number(measured.get("max_abs_delta")),
        formats.cosine(measured.get("cosine")),
        f"{measured.get('sign_flips', 0):,}",
    ]


def _histogram(counts: Sequence[int], terminal: Terminal) -> list[str]:
    """Changed elements by how many representable values they moved."""
    total, most = sum(counts), max(counts)
    rows = []
    for bucket, count in enumerate(counts):
        low, high = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
        if count or bucket:
            text = f"{low:,}" if low == high else f"{low:,}{terminal.glyphs.dash}{high:,}"
            share = formats.percent(count, total)
            rows.append([text, f"{count:,}", share, terminal.bar(count / most, _HISTOGRAM_BAR)])
    heads = [
        Column("ULPs moved"),
        Column("elements"),
        Column("share", style="bold"),
        Column("", "left", "green", optional=True),
    ]
    return table(heads, rows, terminal)
