"""``docs/paper.md`` and its figures, from stored results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ckdiff.figures.figure import Figure
from paper.claims import ENOUGH, HOLDS, RL, Found
from paper.claims_masked import CLAIMS, shares
from paper.pictures import figures, scores_of
from paper.results import Result, Results, Spread, gain, load_results, spread
from paper.retrain import FULL, MASKS

_HEAD = """\
# Which weights RL changes: the claims, on real runs

A small model, two tasks, ten algorithms, and every claim of
[arXiv:2507.17107](https://arxiv.org/abs/2507.17107) (withdrawn) and
[arXiv:2505.11711](https://arxiv.org/abs/2505.11711) that such runs can test, measured with ckdiff
alone. This page is generated: `make paper` runs everything, `make paper-report` writes it from the
stored results. The limits of the verdicts are in `examples/paper/claims.py`; every run that was
made is in the table at the end.
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


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def box(results: Results, found: Sequence[Found]) -> str:
    """What a reader should take home."""
    grpo = [each for each in results.of(algorithm="grpo") if gain(each, "masters") >= ENOUGH]
    densities = Spread(tuple(scores_of(each)["density"] for each in grpo))
    exact = Spread(tuple(scores_of(each)["density_f32"] for each in grpo))
    holding = sum(each.verdict == HOLDS for each in found)
    lines = [
        f"> **{holding} of {len(found)} claims hold as they stand.** A density is a number",
        "> about a run and a file, not about RL:",
        "> - *dtype*: of GRPO runs that learnt, the float32 weights changed to",
        f">   {exact}, the same models stored in bfloat16 to {densities};",
        "> - *size of the update*: more learning, or a larger learning rate, changes more weights;",
        "> - *optimizer*: for the same reward SGD and AdamW change very different shares;",
        "> - *chance*: small weights flip most easily in every run. Masks that agree are to be",
        ">   held against a null that knows magnitudes, a mask that recovers a score against a",
        ">   random one, and weights that agree against the untrained base.",
    ]
    return "\n".join(lines)


def gate(results: Results) -> str:
    """Whether RL works at all in these runs, without which nothing else means anything."""
    rows = []
    for name in ("sft", "rft", *RL):
        runs = results.of(algorithm=name, group="main", task="sort")
        if runs:
            best = max(
                scores_of(each)["reward_f32"] for each in results.of(algorithm=name, task="sort")
            )
            least = min(gain(each) for each in runs)
            rows.append(
                (name, spread(runs, gain), "yes" if least >= ENOUGH else "**no**", f"{best:.3f}")
            )
    head = ("algorithm", "reward gained, main arm", f"at least {ENOUGH}", "best reward of any arm")
    return table(head, rows)


def masked_table(results: Results) -> str:
    """Retraining: a row for each full run, mask by mask, beside the untrained base."""
    rows: list[Sequence[object]] = []
    for full in FULL:
        if full not in results.runs:
            continue
        run = results.runs[full]
        moved = run["measured"]["density_f32"]
        rows.append(_row(full, "(the full run)", run, {}, "100 %"))
        base = {rule: 1 - moved[rule] for rule in ("exact", "atol=1e-8", "atol=1e-5", "atol=1e-4")}
        start = run["start"]["masters"]
        untrained = f"{start['accuracy']:.3f} / {start['reward']:.3f}"
        rows.append((full, "(the untrained base)", untrained, "0 %", *_equal(base)))
        for kind in MASKS:
            for each in results.masked(full, kind):
                share = shares(results, full, (kind,))
                text = f"{share.mean:.0%}" if share.values else "–"
                rows.append(_row(full, kind, each, each["measured"]["like_full"]["masters"], text))
    head = ("full run", "mask", "accuracy / reward (float32)", "share of the gain",
            "equal", "within 1e-8", "within 1e-5", "within 1e-4")  # fmt: skip
    return table(head, rows)


def _row(full: str, kind: str, run: Result, like: dict[str, float], share: str) -> Sequence[object]:
    end = run["end"]["masters"]
    return (full, kind, f"{end['accuracy']:.3f} / {end['reward']:.3f}", share, *_equal(like))


def _equal(like: dict[str, float]) -> list[str]:
    rules = ("exact", "atol=1e-8", "atol=1e-5", "atol=1e-4")
    return [f"{like[rule]:.3f}" if rule in like else "" for rule in rules]


def all_runs(results: Results) -> str:
    """Every run."""
    rows = []
    for name, each in sorted(results.runs.items()):
        found, run = scores_of(each), each["run"]
        setting = f"{run['optimizer']} {run['lr']:g} × {run['steps']}, {run['precision']}"
        scores = [
            f"{found[key]:.3f}" for key in ("accuracy", "reward", "accuracy_f32", "reward_f32")
        ]
        shares = [f"{found[key]:.4f}" for key in ("density", "density_1e-5", "density_f32")]
        rows.append((name, setting, *scores, *shares, f"{each['kl']:.3f}", each["cpu_seconds"]))
    head = ("run", "setting", "accuracy", "reward", "accuracy, f32", "reward, f32",
            "density", "at 1e-5", "float32", "KL", "CPU s")  # fmt: skip
    return table(head, rows)


def picture(figure: Figure) -> str:
    """A figure in the page, light or dark as the reader's screen is."""
    return (
        f"## {figure.title}\n\n{figure.says}\n\n<picture>\n"
        f'  <source media="(prefers-color-scheme: dark)" srcset="paper/{figure.name}-dark.svg">\n'
        f'  <img alt="{figure.title}" src="paper/{figure.name}.svg">\n</picture>\n'
    )


def page(results: Results, drawn: Sequence[Figure]) -> str:
    """The whole page."""
    found = [claim.judge(results) for claim in CLAIMS]
    claims = [
        f"### {claim.title}\n\n**{each.verdict}.** {each.ours}\n\nPublished: {claim.published}.\n"
        for claim, each in zip(CLAIMS, found, strict=True)
    ]
    summary = table(
        ("claim", "verdict"),
        [(claim.title, each.verdict) for claim, each in zip(CLAIMS, found, strict=True)],
    )
    parts = [
        _HEAD,
        box(results, found) + "\n",
        summary + "\n",
        "## Does RL work here?\n\n" + gate(results) + "\n",
        *(picture(each) for each in drawn),
        "## Claim by claim\n",
        *claims,
        "## Training with a mask, row by row\n\n" + masked_table(results) + "\n",
        _LIMITS.format(parameters=results.base["parameters"]),
        "## Every run\n\nScores are of the stored bfloat16 model and of the float32 weights.\n",
        all_runs(results) + "\n",
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
    path.write_text(page(results, drawn), "utf-8")
    return path
