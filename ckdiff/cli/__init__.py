"""The ``ckdiff`` command: parse, one call of the API, print.

Data goes to stdout; progress, warnings, hints and errors go to stderr. Nothing heavy is imported
before a command runs.
"""

from ckdiff.cli import starting

starting.guard()

from ckdiff.cli.program import main  # noqa: E402  (a signal during this import is answered)

__all__ = ["main"]
