"""The drawing library as the script of a page, kept between processes.

To bundle it takes longer than all else that a small report needs. It is kept where machine code is,
under the same terms: what somebody else could have written is made anew.
"""

from __future__ import annotations

from ckdiff.figures import drawing
from ckdiff.kernels import keeping


def library() -> str:
    """JavaScript that defines ``vegaEmbed``. Raises UsageError without what draws."""
    name = f"{drawing.identity()}.js"
    kept, may_be_kept = keeping.load(name)
    if kept is not None:
        return kept.decode()
    made = drawing.script()
    if may_be_kept:
        keeping.save(name, made.encode())
    return made
