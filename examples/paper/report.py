"""``docs/paper.md`` and its figures, from stored results alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ckdiff.figures.figure import Figure
from paper.claims import ENOUGH, HOLDS, RL, Found, lifts
from paper.claims_masked import CLAIMS
from paper.pictures import figures, scores_of
from paper.results import (
    Result,
    Results,
    Spread,
    density,
    density_at,
    density_f32,
    gain,
    load_results,
    share_of_gain,
    spread,
)
from paper.retrain import AGAIN, FULL, MASKS
from paper.runs import MATRICES

#: by which rules weights of two trainings are held against each other
EQUAL = ("exact", "atol=1e-8", "atol=1e-5", "atol=1e-4")
NULLS = ("model", "tensor", "magnitude", "rowcol")

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
    """What a reader should take home, in numbers of these runs."""
    grpo = results.of(algorithm="grpo", task="sort")
    learnt = [each for each in grpo if gain(each, "masters") >= ENOUGH]
    rates = sorted(
        (each for each in grpo if _is(each, group=("main", "sweep"), optimizer=("adamw",))),
        key=lambda each: float(each["run"]["lr"]),
    )
    holding = sum(each.verdict == HOLDS for each in found)
    lines = [
        f"**{holding} of {len(found)} claims hold as they stand.** A density is a number about",
        "a run and a file, not about RL. Of GRPO's runs here:",
        f"- *dtype*: those that learnt changed {spread(learnt, density_f32)} of their float32",
        f"  weights; stored in bfloat16, {spread(learnt, density)};",
    ]
    if rates and rates[0]["run"]["lr"] < rates[-1]["run"]["lr"]:
        low, high = (
            f"at {each['run']['lr']:g} {density(each):.3f} for a gain of {gain(each):.3f}"
            for each in (rates[0], rates[-1])
        )
        lines += ["- *size of the update*: AdamW changed", f"  {low}, {high};"]
    lines += _by_optimizer(grpo)
    lines += [
        f"- *chance*: seeds agree with a lift of {_lift(results, 'tensor')} inside tensors, and of",
        f"  {_lift(results, 'magnitude')} given magnitudes: small weights flip most easily.",
        "",
        "So a density wants its dtype, learning rate and optimizer beside it, an overlap a null",
        "that knows magnitudes, and a mask that recovers a score a random mask and the untrained",
        "base.",
    ]
    return "\n".join(f"> {line}".rstrip() for line in lines)


def _is(result: Result, **wanted: tuple[str, ...]) -> bool:
    return all(result["run"][key] in values for key, values in wanted.items())


def _by_optimizer(grpo: Sequence[Result]) -> list[str]:
    """Densities at one gain with AdamW and SGD, where both got there."""
    arms = {
        name: [each for each in grpo if _is(each, optimizer=(name,), group=groups)]
        for name, groups in (("adamw", ("main", "sweep")), ("sgd", ("sgd",)))
    }
    if not all(arms.values()):
        return []
    level = 0.9 * min(max(map(gain, runs)) for runs in arms.values())
    found = {name: spread(runs, lambda one: density_at(one, level)) for name, runs in arms.items()}
    return [
        f"- *optimizer*: where they had gained {level:.3f}, AdamW had changed {found['adamw']},",
        f"  SGD {found['sgd']};",
    ]


def _lift(results: Results, null: str) -> Spread:
    asked = results.question("seeds: ").values()
    return Spread(tuple(value for each in asked for value in lifts(each, null).values), "pair")


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
    for full in (*FULL, *AGAIN):
        if full not in results.runs:
            continue
        run = results.runs[full]
        moved = run["measured"]["density_f32"]
        start = run["start"]
        rows.append(_row(full, "(the full run)", run["end"], ("100%", "100%")))
        same = [1 - density(run), *(1 - moved[rule] for rule in EQUAL)]
        untrained = _row(full, "(the untrained base)", start, ("0%", "0%"))
        rows.append((*untrained, *(f"{value:.3f}" for value in same)))
        for each in (each for kind in MASKS for each in results.masked(full, kind)):
            shares = [share_of_gain(each, run, kind) for kind in ("stored", "masters")]
            texts = ["–" if share is None else f"{share:.0%}" for share in shares]
            like = each["measured"]["like_full"]
            equal = [like["stored"]["exact"], *(like["masters"][rule] for rule in EQUAL)]
            row = _row(full, each["run"]["mask"], each["end"], texts)
            rows.append((*row, *(f"{value:.3f}" for value in equal)))
    head = ("full run", "mask", "accuracy / reward, stored", "share of the gain",
            "accuracy / reward, float32", "share, float32",
            "stored weights equal", "float32 equal", "within 1e-8", "within 1e-5",
            "within 1e-4")  # fmt: skip
    return table(head, [(*row, *[""] * (len(head) - len(row))) for row in rows])


def _row(
    full: str, kind: str, scores: dict[str, dict[str, float]], shares: Sequence[str]
) -> tuple[str, ...]:
    said = [
        f"{scores[k]['accuracy']:.3f} / {scores[k]['reward']:.3f}" for k in ("stored", "masters")
    ]
    return full, kind, said[0], shares[0], said[1], shares[1]


def overlaps(results: Results) -> str:
    """Every question: how far masks and updates agree, and the controls."""
    rows = []
    for name, each in results.agreement["questions"].items():
        pairs = each["pairs"]

        def said(key: str, pairs: Sequence[Result] = pairs) -> Spread:
            return Spread(tuple(p[key] for p in pairs if p.get(key) is not None), "pair")

        nulls = [f"{lifts(each, null).mean:.2f}" for null in NULLS if lifts(each, null).values]
        controls = [
            f"{each['controls'][kind]['jaccard'] or 0:.3f}" for kind in ("random", "shuffled")
        ]
        agreed = (said("jaccard"), *(nulls or ["–"] * len(NULLS)), said("cosine"))
        rows.append((name, *agreed, said("same_direction"), *controls))
    head = ("runs", "Jaccard", *(f"lift, {null}" for null in NULLS), "cosine of the updates",
            "moved the same way", "Jaccard, random", "Jaccard, shuffled")  # fmt: skip
    return table(head, rows)


def landing(results: Results) -> str:
    """Whether updates land on small or on principal weights."""
    rows = [
        (full, kind, f"{pair['nulls']['tensor']['lift'] or 0:.2f}")
        for full, kinds in results.agreement["landing"].items()
        for kind, pair in kinds.items()
    ]
    return table(("run", "weights of the base", "lift inside tensors"), rows)


def missing(results: Results) -> str:
    """Which runs of the matrix the page is made without."""
    wanted = [run.name for run in MATRICES[results.setting["matrix"]]()]
    lost = [name for name in wanted if name not in results.runs]
    if not lost:
        return f"All {len(wanted)} runs of the matrix are here.\n"
    return f"Of these, the page was made without {len(lost)} of the matrix: {', '.join(lost)}.\n"


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
        "## How far runs agree, question by question\n\n"
        "The controls are the first run's mask against a random one with the last run's counts,\n"
        "and against the last run's update in another order inside each tensor.\n",
        overlaps(results) + "\n",
        "## Where updates land\n\n" + landing(results) + "\n",
        "## Training with a mask, row by row\n\n" + masked_table(results) + "\n",
        _LIMITS.format(parameters=results.base["parameters"]),
        "## Every run\n\nScores are of the stored bfloat16 model and of the float32 weights.\n",
        missing(results),
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
