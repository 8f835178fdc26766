"""What commands that make a store print, and how a store came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckdiff.cli.output import write_json, write_lines

if TYPE_CHECKING:
    from ckdiff.stores.maskstore import MaskStore


def title(made_by: Any) -> str:
    """How a store came about, in a few words; ``made_by`` is what its manifest says."""
    record = made_by if isinstance(made_by, dict) else {}
    if record.get("operation") == "random":
        within = "the model" if record.get("within") == "model" else "each tensor"
        return f"random within {within}, seed {record.get('seed')}"
    sources = record.get("stores", record.get("files"))
    labels = [str(s.get("label", "?")) for s in sources or () if isinstance(s, dict)]
    shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")
    return f"{record.get('operation', '?')} of {shown}"


def report(store: MaskStore, *, as_json: bool) -> None:
    """Print what a new store holds."""
    from ckdiff.cli import formats
    from ckdiff.errors import printable
    from ckdiff.stores.summaries import rule_counts

    table, rule = store.table, store.masks[0]
    elements, made_by = table.total_elements, store.manifest["made_by"]
    rules = rule_counts({rule: int(table.changed[rule].sum())}, elements)
    if as_json:
        write_json(
            {
                "store": str(store.path),
                "elements": elements,
                "tensors": len(table),
                "rules": rules,
                "made_by": made_by,
            }
        )
        return
    changed = rules[rule]["changed"]
    write_lines(
        [
            f"{printable(title(made_by))}: {formats.extent(elements, len(table))}",
            f"{rule}: {changed:,} changed, {formats.percent(changed, elements)}",
            f"written to {printable(str(store.path))}",
        ]
    )
