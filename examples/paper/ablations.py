"""What the papers say matters little, taken away or added where it can bite.

At a learning rate of 1e-6 nothing is ever clipped and the KL term has nothing to hold: such an
ablation says nothing, whatever it finds. So these are at 1e-5; the clip fraction
and the KL of every run are logged.
"""

from __future__ import annotations

from typing import Any

from paper.runs import Run, of

#: name -> what is other than in the run it is compared with, ``on``
ABLATIONS: dict[str, dict[str, Any]] = {
    "on": {},
    "kl.1": {"beta": 0.1},
    "kl1": {"beta": 1.0},
    "epochs": {"epochs": 4, "minibatches": 2},
    "epochs-noclip": {"epochs": 4, "minibatches": 2, "clip": 0.0},
    "nogradclip": {"gradient_clip": 0.0},
    "off": {"off_policy": 1.0},
    "halfoff": {"off_policy": 0.5},
    "small": {"prompts": 4, "samples": 4},
    "large": {"prompts": 32},
}


def ablation_runs() -> list[Run]:
    """GRPO, two seeds each; and KL once at the main arm's learning rate, to show it is vacuous."""
    usual: dict[str, Any] = {"lr": 1e-5, "steps": 60}
    found = [
        of("grpo", "ablation", name, seed=seed, **usual, **changed)
        for name, changed in ABLATIONS.items()
        for seed in (1, 2)
    ]
    return [*found, of("grpo", "ablation", "kl.1-lr1e-06", beta=0.1)]
