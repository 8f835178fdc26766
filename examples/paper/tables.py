"""The tables of the page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter

from paper.claims import ENOUGH, RL, lifts
from paper.measure import NULLS, TRAINED
from paper.results import (
    Result,
    Results,
    Spread,
    accuracy,
    density,
    density_f32,
    density_f32_tolerant,
    density_tolerant,
    gain,
    reward,
    share_of_gain,
    spread,
)
from paper.retrain import AGAIN, FULL, MASKS
from paper.runs import ALGORITHMS, MATRICES

#: by which rules weights of two trainings are held against each other
EQUAL = TRAINED[:4]
#: what differs between the runs of a question, in the order in which it is shown
KINDS = ("seeds", "tasks", "algorithms", "seeds and algorithms", "ablations")
HIGH = 0.7  #: a reward that only runs reach which have mended most


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def gate(results: Results) -> str:
    """Whether RL works at all in these runs, without which nothing else means anything."""
    rows, bests = [], []
    for name, runs in _main(results).items():
        best = max(reward(each, "masters") for each in results.of(algorithm=name, task="sort"))
        bests.append(best)
        enough = "yes" if min(map(gain, runs)) >= ENOUGH else "**no**"
        rows.append((name, spread(runs, gain), enough, f"{best:.3f}"))
    head = ("algorithm", "reward gained, main arm", f"at least {ENOUGH}", "best reward of any arm")
    return (
        f"{table(head, rows)}\n\n{sum(best >= HIGH for best in bests)} algorithms have an arm that "
        f"reaches a reward of {HIGH}."
    )


def by_algorithm(results: Results) -> str:
    """How many weights each algorithm changed, by what is counted."""
    counted = (density, density_tolerant, density_f32, density_f32_tolerant, itemgetter("kl"))
    rows = [
        (name, *(spread(runs, value).short for value in counted))
        for name, runs in _main(results).items()
    ]
    head = ("algorithm", "stored in bfloat16", "by more than 1e-5", "float32", "by more than 1e-5",
            "KL from the base")  # fmt: skip
    return table(head, rows)


def by_part(results: Results) -> str:
    """Density of layers and modules, an algorithm in each column."""
    main = _main(results)
    parts: dict[tuple[str, str], None] = {}
    for runs in main.values():
        for by in ("layers", "modules"):
            for name in runs[0]["measured"][by]:
                if by == "modules" or ".layers." in name:  # the rest is a module of its own
                    parts[by, name] = None
    rows = [
        (
            name.removeprefix("model.").removesuffix(".weight"),
            *(
                spread(runs, lambda each, by=by, name=name: each["measured"][by][name]).short
                for runs in main.values()
            ),
        )
        for by, name in parts
    ]
    return table(("part", *main), rows)


def _main(results: Results) -> dict[str, list[Result]]:
    """The main arm on the first task, by algorithm."""
    found = {
        name: results.of(algorithm=name, group="main", task="sort") for name in ("sft", "rft", *RL)
    }
    return {name: runs for name, runs in found.items() if runs}


def by_trl(results: Results) -> str:
    """What TRL's trainers make of some runs, beside ours."""
    if not results.trl:
        return "Not run: `python examples/paper check-trl` does it.\n"
    rows, apart, seeds = [], [], []
    for name in sorted(results.trl["runs"], key=ALGORITHMS.index):
        theirs, ours, agreed = (results.trl["runs"][name][k] for k in ("trl", "ours", "agreement"))
        every = spread(results.of(algorithm=name, group="main", task="sort"), density)
        scored = [reward(side) for side in (theirs, ours)]
        apart.append(abs(theirs["density"] - ours["density"]))
        seeds.append(max(every.values, default=0.0) - min(every.values, default=0.0))
        numbers = (theirs["density"], ours["density"], *scored, agreed["jaccard"], agreed["cosine"])
        rows.append((name, *(f"{number:.4f}" for number in numbers), every))
    head = ("algorithm", "density, TRL", "ours", "reward, TRL", "ours", "Jaccard of the masks",
            "cosine of the updates", "density, our seeds")  # fmt: skip
    return (
        f"SFT, DPO, KTO and GRPO of seed 1 again, by the trainers of TRL {results.trl['trl']}:\n"
        "the same base, optimizer and precision. SFT, DPO and KTO were given the rows of each\n"
        "step; GRPO drew its own prompts and samples, as another seed does. Densities differ from\n"
        f"ours by at most {max(apart):.4f}, those of our own seeds by up to {max(seeds):.4f}.\n\n"
        f"{table(head, rows)}\n"
    )


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


def in_order(asked: tuple[str, Result]) -> tuple[int, str]:
    """Questions by what differs between their runs."""
    return KINDS.index(asked[0].partition(":")[0]), asked[0]


def overlaps(results: Results) -> str:
    """Every question: how far masks and updates agree, and the controls."""
    rows = []
    for name, each in sorted(results.agreement["questions"].items(), key=in_order):
        agreed = [
            Spread(tuple(pair[key] for pair in each["pairs"] if pair.get(key) is not None)).short
            for key in ("jaccard", "cosine", "same_direction")
        ]
        nulls = [lifts(each, null).short for null in NULLS]
        controls = [
            f"{each['controls'][kind]['jaccard'] or 0:.3f}" for kind in ("random", "shuffled")
        ]
        rows.append((name, *agreed, *nulls, *controls))
    head = ("runs", "Jaccard", "cosine of the updates", "moved the same way",
            *(f"lift, {null}" for null in NULLS), "Jaccard, random", "Jaccard, shuffled",
            )  # fmt: skip
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
    said = f"The page was made without {len(lost)} of the {len(wanted)} runs of the matrix."
    return f"<details><summary>{said}</summary>{', '.join(lost)}</details>\n"


def all_runs(results: Results) -> str:
    """Every run."""
    rows = []
    for name, each in sorted(results.runs.items()):
        run = each["run"]
        setting = f"{run['optimizer']} {run['lr']:g} × {run['steps']}, {run['precision']}"
        scores = [f"{of(each, k):.3f}" for k in ("stored", "masters") for of in (accuracy, reward)]
        shares = [f"{of(each):.4f}" for of in (density, density_tolerant, density_f32)]
        rows.append((name, setting, *scores, *shares, f"{each['kl']:.3f}", each["cpu_seconds"]))
    head = ("run", "setting", "accuracy", "reward", "accuracy, trained", "reward, trained",
            "density", "at 1e-5", "density, trained", "KL", "CPU s")  # fmt: skip
    return table(head, rows)
