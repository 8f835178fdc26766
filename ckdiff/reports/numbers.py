"""Numbers as people read them: those of ckdiff.figures.numbers, by the names they have here."""

from __future__ import annotations

from ckdiff.figures.numbers import counted as counted
from ckdiff.figures.numbers import extent as extent
from ckdiff.figures.numbers import percent as percent
from ckdiff.figures.numbers import share as share
