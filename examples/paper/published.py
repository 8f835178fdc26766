"""Published models against the paper's own table: ``python examples/paper/published.py NAME``.

The pair is streamed from the hub: nothing is downloaded whole, and never more than ``--disk`` lies
on the disk. What will be fetched is said first; ``--yes`` begins without asking.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("published.toml")
SEEN = {
    "paper": "",
    "public": "The names are from other public texts than the paper; they were not fetched.",
    "guess": "The paper does not name both repositories whole: the likeliest names, unchecked.",
}


@dataclass(frozen=True)
class Pair:
    """A published pair, and the sparsity the paper gives it, in percent, by tolerance."""

    algorithm: str
    base: str
    tuned: str
    seen: str
    sparsity: dict[str, float] = field(default_factory=dict)
    dequantize: bool = False

    @property
    def sides(self) -> tuple[str, str]:
        return f"hf://{self.base}", f"hf://{self.tuned}"


def pairs(path: Path = TABLE) -> dict[str, Pair]:
    """All pairs, by the name they are asked for."""
    found = tomllib.loads(path.read_text("utf-8"))
    return {name: Pair(**each) for name, each in found.items() if name != "table-4"}


def to_fetch(pair: Pair, disk: str) -> dict[str, Any]:
    """What comparing would fetch and need: what ``ckdiff diff --dry-run --json`` prints."""
    command = [sys.executable, "-m", "ckdiff", "diff", *pair.sides, "--dry-run", "--json"]
    command += ["--stream", "--disk", disk, "--common-rows"]
    command += ["--dequantize"] if pair.dequantize else []
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip() or "the pair cannot be looked at")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compare(pair: Pair, disk: str, out: Path | None) -> dict[str, float]:
    """Our sparsity in percent, exact and by the paper's tolerances."""
    import ckdiff

    rules = ["exact", *(f"atol={tolerance}" for tolerance in pair.sparsity)]
    base, tuned = pair.sides
    result = ckdiff.diff(
        base, tuned, out, rules=rules, stream=True, disk=disk, common_rows=True,
        dequantize=pair.dequantize,
    )  # fmt: skip
    found = [100 * (1 - counted["density"]) for counted in result.rules.values()]
    return dict(zip(("exact", *pair.sparsity), found, strict=True))


def said(pair: Pair, ours: dict[str, float]) -> str:
    """Our numbers beside theirs."""
    lines = [f"{'tolerance':>10} {'ours, %':>9} {'paper, %':>9}"]
    for name, value in ours.items():
        theirs = f"{pair.sparsity[name]:9.2f}" if name in pair.sparsity else f"{'–':>9}"
        lines.append(f"{name:>10} {value:9.2f} {theirs}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compare one pair; without a name, list them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", nargs="?", help="which pair; without it all are listed")
    parser.add_argument("--disk", default="4GiB", help="at most so much on the disk")
    parser.add_argument("-o", "--out", type=Path, help="also keep the masks in this store")
    parser.add_argument("--yes", action="store_true", help="begin without asking")
    options = parser.parse_args(arguments)
    known = pairs()
    if options.name not in known:
        for name, pair in known.items():
            print(f"{name:24} {pair.algorithm:6} {pair.base} -> {pair.tuned}  [{pair.seen}]")
        return 0 if options.name is None else 2
    pair = known[options.name]
    print(f"{pair.algorithm}: {pair.base} -> {pair.tuned}\n{SEEN[pair.seen]}".rstrip())
    plan = to_fetch(pair, options.disk)
    if plan["refusal"]:
        print(f"error: {plan['refusal']}", file=sys.stderr)
        return 2
    size = plan["bytes_to_download"]
    print(f"to fetch: {size:,} bytes ({size / 1e9:.1f} GB), at most {options.disk} at a time")
    if not options.yes and input("begin? [y/N] ").strip().lower() != "y":
        return 1
    print(said(pair, compare(pair, options.disk, options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
