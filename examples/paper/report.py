"""``docs/paper.md`` and its figures, from stored results alone."""

from __future__ import annotations

from pathlib import Path

from ckdiff.figures.figure import Figure
from paper import tables
from paper.claims import Claim, Found
from paper.claims_masked import CLAIMS
from paper.pictures import figures
from paper.results import Results, load_results
from paper.takehome import box

_HEAD = """\
# Which weights RL changes: the claims, on real runs

A small model, two tasks, ten algorithms, and every claim of
[arXiv:2507.17107](https://arxiv.org/abs/2507.17107) (withdrawn) and
[arXiv:2505.11711](https://arxiv.org/abs/2505.11711) that such runs can test, measured with ckdiff
alone. This page is generated: `make paper` runs everything, `make paper-report` writes it from the
stored results. The limits of the verdicts are in `examples/paper/claims*.py`; every run that was
made is in the table at the end.
"""

MAIN = "density-by-gain"  #: the main figure

_HOW = """\
Numbers are means, with the least and the most of the runs in brackets. Scores are of the stored
model. A lift is the number of shared weights over that by chance, when chance knows how many
weights of each tensor change, and, given magnitudes, how small they are too.
"""

_LIMITS = """\
## What such runs cannot say

The model has {parameters:,} weights, the tasks are six digits long, and the base has one dominant
fault that every algorithm mends, so that runs agree more than those of large models may. A run
takes 100 steps where a large one takes thousands. Nothing here speaks of reasoning, of long
answers, of pre-training at scale, or of models of billions of weights:
[the published pairs](../examples/paper/published.toml) are for that. The same runs give the same
masks bit for bit on one type of machine; another processor or another torch may round otherwise.
"""


def picture(figure: Figure) -> str:
    """A figure in the page, light or dark as the reader's screen is."""
    return (
        f"**{figure.title}.** {figure.says}\n\n<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="paper/{figure.name}-dark.svg">\n'
        f'  <img alt="{figure.title}" src="paper/{figure.name}.svg">\n</picture>\n'
    )


def judged(claim: Claim, found: Found, drawn: dict[str, Figure]) -> str:
    """A claim: the verdict, what was published, what is found here."""
    parts = [
        f"### {claim.title}\n",
        f"**{found.verdict.capitalize()}.** Published: {claim.published}.\n",
        found.ours + "\n",
        *([tables.table(found.head, found.rows) + "\n"] if found.rows else []),
        *([picture(drawn[claim.figure])] if claim.figure in drawn else []),
    ]
    return "\n".join(parts)


def page(results: Results, drawn: dict[str, Figure]) -> str:
    """The whole page."""
    found = [claim.judge(results) for claim in CLAIMS]
    both = list(zip(CLAIMS, found, strict=True))
    parts = [
        _HEAD,
        box(results, found) + "\n",
        tables.table(("claim", "verdict"), [(c.title, each.verdict) for c, each in both]) + "\n",
        *([picture(drawn[MAIN])] if MAIN in drawn else []),
        "## Does RL work here?\n\n" + tables.gate(results) + "\n",
        "## How many weights change\n\n"
        "The main arm: AdamW at 1e-6, mixed precision, three seeds with their range.\n",
        tables.by_algorithm(results) + "\n",
        "In layers and modules, of the stored weights:\n",
        tables.by_part(results) + "\n",
        "## Claim by claim\n\n" + _HOW,
        *(judged(claim, each, drawn) for claim, each in both),
        "## The same runs by TRL\n\n" + tables.by_trl(results),
        "## How far runs agree, question by question\n\n"
        "The controls are the first run's mask against a random one with the last run's counts,\n"
        "and against the last run's update in another order inside each tensor.\n",
        tables.overlaps(results) + "\n",
        "## Where updates land\n\n" + tables.landing(results) + "\n",
        "## Training with a mask, row by row\n\n" + tables.masked_table(results) + "\n",
        _LIMITS.format(parameters=results.base["parameters"]),
        "## Every run\n\nOf the stored bfloat16 model, and of the weights as they are trained: "
        "float32,\nbut in the arms that are bf16 throughout.\n",
        tables.missing(results),
        tables.all_runs(results) + "\n",
    ]
    return "\n".join(parts)


def write_report(folder: Path, out: Path) -> Path:
    """Write ``paper.md`` and ``paper/*.svg`` in ``out``; gives the page's path."""
    results = load_results(folder)
    drawn = figures(results)
    pictures = out / "paper"
    pictures.mkdir(parents=True, exist_ok=True)
    for figure in drawn:
        for name, dark in ((figure.name, False), (f"{figure.name}-dark", True)):
            (pictures / f"{name}.svg").write_text(figure.svg(dark=dark), "utf-8")
    path = out / "paper.md"
    path.write_text(page(results, {figure.name: figure for figure in drawn}), "utf-8")
    return path
