"""The claims about what was taken away, and about lottery tickets."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter

from paper.claims import CAVEAT, FAILS, HOLDS, UNTESTED, Found
from paper.results import Result, Results, density, gain, share_of_gain, spread

CLOSE = 0.9  #: share of the gain, or of weights, from which the full run is recovered
LITTLE = 0.05  #: of density; what changes it by less hardly matters

#: ablation -> the run that it is held against, and what must have been at work there
AGAINST = {
    "kl.1": ("on", "kl"),
    "kl1": ("on", "kl"),
    "epochs-noclip": ("epochs", "clip_fraction"),
    "nogradclip": ("on", "gradient_clipped"),
    "off": ("on", ""),
    "halfoff": ("on", ""),
    "small": ("on", ""),
    "large": ("on", ""),
}
#: what was at work -> how it is called, and below which value taking it away says nothing
AT_WORK = {
    "kl": ("KL from the base", 0.01),
    "clip_fraction": ("clipped tokens", 0.001),
    "gradient_clipped": ("clipped gradients", 0.01),
}


def little_effect(*names: str) -> Callable[[Results], Found]:
    """Whether these ablations leave density where it was; what could not bite is no evidence."""

    def judge(results: Results) -> Found:
        lines, same = [], []
        for name in names:
            other, work = AGAINST[name]
            runs, usual = (_ablated(results, each) for each in (name, other))
            if not runs or not usual:
                continue
            line = (
                f"`{name}` against `{other}`: density {spread(runs, density)} against "
                f"{spread(usual, density)}, reward gained {spread(runs, gain)} against "
                f"{spread(usual, gain)}"
            )
            bites = True
            if work:
                called, least = AT_WORK[work]
                there = spread(usual, itemgetter(work))
                bites = there.mean >= least
                line += f"; {called} there {there}" + ("" if bites else ": vacuous")
            lines.append(line)
            if bites:
                apart = spread(runs, density).mean - spread(usual, density).mean
                same.append(abs(apart) < LITTLE)
        if not same:
            return Found(UNTESTED, "every such ablation is vacuous or missing", tuple(lines))
        text = f"It hardly matters where the density is less than {LITTLE} apart."
        verdict = HOLDS if all(same) else CAVEAT if any(same) else FAILS
        return Found(verdict, text, tuple(lines))

    return judge


def _ablated(results: Results, label: str) -> list[Result]:
    return [
        each
        for each in results.of(group="ablation")
        if each["run"]["name"].split("-", 3)[-1] == label
    ]


def ticket(*kinds: str, control: str = "") -> Callable[[Results], Found]:
    """Whether such a ticket reaches what the full run does, at its best learning rate, and the
    control, which is no ticket, does not.
    """

    def judge(results: Results) -> Found:
        lines, best = [], {}
        for kind in (*kinds, control):
            found = _tickets(results, kind)
            if found:
                best[kind] = max(found.values())
                lines.append(f"`{kind}`: " + ", ".join(f"{v:.0%} {k}" for k, v in found.items()))
        reached = max((best[kind] for kind in kinds if kind in best), default=None)
        if reached is None:
            return Found(UNTESTED, "no full run gained enough")
        text = (
            "Share of the full run's gain, by learning rate. The full run is at 1e-6; a larger "
            "rate alone would bring it more."
        )
        if reached < CLOSE:
            return Found(FAILS, text, tuple(lines))
        drawn = best.get(control, 0.0) >= reached - 0.1
        return Found(CAVEAT if drawn else HOLDS, text, tuple(lines))

    return judge


def _tickets(results: Results, kind: str) -> dict[str, float]:
    """Shares of the gain, by learning rate and by the reward that the ticket began with."""
    found = {}
    for run in results.runs.values():
        if run["run"]["group"] == "ticket" and run["run"]["mask"] == kind:
            share = share_of_gain(run, results.runs[run["run"]["of"]])
            if share is not None:
                began = run["start"]["masters"]["reward"]
                found[f"at {run['run']['lr']:g} (began at {began:.3f})"] = share
    return found
