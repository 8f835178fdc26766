"""``python -m ckdiff``."""

import os
import sys


def _leave_here() -> None:
    """Import nothing from the current directory, where ``-m`` looks first: anyone may fill it.

    A source tree that the package itself was found in is another matter.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if not sys.flags.safe_path and sys.path and sys.path[0] != home:
        try:
            here = os.getcwd()
        except OSError:  # it was removed
            here = ""
        if sys.path[0] in ("", here):
            del sys.path[0]


if __name__ == "__main__":
    _leave_here()
    from ckdiff.cli import main

    main()
