"""The claims about what was taken away, and about lottery tickets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

from paper.claims import CAVEAT, FAILS, HOLDS, UNTESTED, Found
from paper.results import (
    Result,
    Results,
    course,
    density,
    density_at,
    gain,
    share_of_gain,
    spread,
)
from paper.tickets import TICKETS

CLOSE = 0.9  #: share of the gain, or of weights, from which the full run is recovered
LITTLE = 0.05  #: of density; what changes it by less hardly matters

MAIN = "main"  #: the main arm's runs
#: ablation -> what it is, the run that it is held against, and what must have been at work there
ABLATED = {
    "kl.1": ("a KL term, β .1", "on", "kl"),
    "kl1": ("a KL term, β 1", "on", "kl"),
    "kl.1-lr1e-06": ("a KL term, β .1, at 1e-6", MAIN, "kl"),
    "epochs-noclip": ("four epochs, ratios not clipped", "epochs", "clip_fraction"),
    "nogradclip": ("gradients not clipped", "on", "gradient_clipped"),
    "off": ("samples of the base", "on", ""),
    "halfoff": ("half the samples of the base", "on", ""),
    "small": ("4 prompts × 4 samples", "on", ""),
    "large": ("32 prompts × 8 samples", "on", ""),
}
#: what was at work -> how it is called, and below which value taking it away says nothing
AT_WORK = {
    "kl": ("KL from the base", 0.1),  # at β .1 a penalty of a hundredth of the reward
    "clip_fraction": ("share of tokens clipped", 0.001),
    "gradient_clipped": ("share of gradients clipped", 0.01),
}


def little_effect(*names: str) -> Callable[[Results], Found]:
    """Whether these ablations leave density where it was; what could not bite is no evidence."""

    def judge(results: Results) -> Found:
        rows, same = [], []
        for name in names:
            what, other, work = ABLATED[name]
            runs, usual = (_ablated(results, each) for each in (name, other))
            if not runs or not usual:
                continue
            bites, said = _at_work(usual, work)
            level = min(course(each)[-1]["gained"] for each in runs)
            on_the_way = spread(usual, lambda each, level=level: density_at(each, level))
            densities, gains = (
                [spread(each, value).short for each in (runs, usual)] for value in (density, gain)
            )
            rows.append((what, *densities, on_the_way.short, *gains, said))
            if bites:
                apart = spread(runs, density).mean - spread(usual, density).mean
                same.append(abs(apart) < LITTLE)
        head = ("with", "density", "without", "without, at that gain", "reward gained", "without",
                "what it acts on, without it")  # fmt: skip
        if not same:
            return Found(UNTESTED, "Every such ablation is vacuous or missing.", head, rows)
        text = (
            f"GRPO at 1e-5. A change of less than {LITTLE} in density counts as hardly any. A "
            "larger one may only mean that the run learnt less. The fourth column shows this: the "
            "density of the runs without it, at the checkpoint where they had gained as much."
        )
        return Found(HOLDS if all(same) else CAVEAT if any(same) else FAILS, text, head, rows)

    return judge


def _at_work(usual: list[Result], work: str) -> tuple[bool, str]:
    """Whether what an ablation takes away or holds back was there, and how much of it."""
    if not work:
        return True, ""
    called, least = AT_WORK[work]
    there = spread(usual, itemgetter(work))
    bites = there.mean >= least
    return bites, f"{called} {there.short}" + ("" if bites else ": **vacuous**")


def _ablated(results: Results, label: str) -> list[Result]:
    if label == MAIN:
        return results.of(group=MAIN, algorithm="grpo", task="sort")
    return [
        each
        for each in results.of(group="ablation")
        if each["run"]["name"].split("-", 3)[-1] == label
    ]


def ticket(*kinds: str, control: str = "") -> Callable[[Results], Found]:
    """Whether such a ticket reaches what the full run does at the same learning rate, and the
    control, which is no ticket, does not. A larger rate alone brings more, so that a rate at which
    nobody trained all weights says nothing.
    """

    def judge(results: Results) -> Found:
        rows: list[Sequence[object]] = []
        best: dict[str, float] = {}
        runs = [each for each in results.runs.values() if each["run"]["group"] == "ticket"]
        for run in sorted(runs, key=lambda each: float(each["run"]["lr"])):
            kind = run["run"]["mask"]
            if kind not in (*kinds, control):
                continue
            full = _at_rate(results, run)
            share = share_of_gain(run, full) if full else None
            if share is not None:
                best[kind] = max(share, best.get(kind, share))
            began, ended = (run[when]["masters"]["reward"] for when in ("start", "end"))
            said = "no full run" if full is None else "–" if share is None else f"{share:.0%}"
            rate = f"{run['run']['lr']:g}"
            rows.append((TICKETS[kind], rate, f"{began:.3f}", f"{ended:.3f}", said))
        reached = max((best[kind] for kind in kinds if kind in best), default=None)
        if reached is None:
            return Found(UNTESTED, "No such ticket was run, or its full run hardly gained.")
        rows.sort(key=lambda row: str(row[0]))
        text = "Each is compared with GRPO on all weights at the same learning rate."
        head = ("what is trained", "learning rate", "reward it began with", "reward it ended with",
                "share of the full run's gain")  # fmt: skip
        drawn = best.get(control, 0.0) >= reached - 0.1
        verdict = FAILS if reached < CLOSE else CAVEAT if drawn else HOLDS
        return Found(verdict, text, head, rows)

    return judge


def _at_rate(results: Results, run: Result) -> Result | None:
    """The run of all weights with a ticket's learning rate, if there is one."""
    full, rate = results.runs[run["run"]["of"]], run["run"]["lr"]
    if full["run"]["lr"] == rate:
        return full
    return results.runs.get(f"{full['run']['name']}-lr{rate:g}")
