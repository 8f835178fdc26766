"""What commands print that make a store or a checkpoint, and how a store came about."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckdiff.cli.output import write_json, write_lines

if TYPE_CHECKING:
    from ckdiff.stores.maskstore import MaskStore


_COPIED = 4  # names that are shown


def wrote_checkpoint(out: str, files: list[str], copied: list[str]) -> str:
    """Where a checkpoint was written, and what was copied beside its weights."""
    from ckdiff.errors import printable

    line = f"written to {printable(out)}" + (f", {len(files)} files" if len(files) > 1 else "")
    return line + copied_too(copied)


def copied_too(copied: list[str]) -> str:
    """What was copied beside weights, for the end of a line; empty for nothing."""
    if not copied:
        return ""
    shown = ", ".join(copied[:_COPIED])
    more = f" and {len(copied) - _COPIED} more" if len(copied) > _COPIED else ""
    return f"; copied {shown}{more}"


def title(made_by: Any) -> str:
    """How a store came about, in a few words; ``made_by`` is what its manifest says."""
    record = made_by if isinstance(made_by, dict) else {}
    if record.get("operation") == "random":
        within = "the model" if record.get("within") == "model" else "each tensor"
        return f"random within {within}, seed {record.get('seed')}"
    if record.get("operation") in ("low", "principal"):
        which = "smallest" if record["operation"] == "low" else "principal"
        files = [str(f.get("label", "?")) for f in record.get("files", ()) if isinstance(f, dict)]
        return f"the {which} weights of {', '.join(files)}, {record.get('alpha')} of each matrix"
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
