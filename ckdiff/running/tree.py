"""Adding results up in a tree whose shape depends only on their number, whoever adds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from ckdiff.running.threads import TreeTask, run_threads

T = TypeVar("T")


class Tree(Generic[T]):
    """Merges neighbours as soon as both are there; the last of an odd number waits for a level."""

    def __init__(self, leaves: int, merge: Callable[[T, T], T]) -> None:
        self._leaves = leaves
        self._merge = merge
        self._waiting: dict[tuple[int, int], T] = {}  # by the size of the level, and place in it
        self._root: list[T] = []

    def put(self, leaf: int, value: T) -> None:
        """Take in one leaf's value; they may come in any order."""
        size, place = self._leaves, leaf
        while size > 1:
            if place ^ 1 < size:
                other = size, place ^ 1
                if other not in self._waiting:
                    self._waiting[size, place] = value
                    return
                pair = value, self._waiting.pop(other)
                value = self._merge(*(reversed(pair) if place % 2 else pair))
            size, place = -(-size // 2), place // 2
        self._root.append(value)

    def root(self) -> T:
        """The sum, once all leaves are there."""
        (value,) = self._root
        return value


def run_tree(
    chunks: int,
    task: TreeTask[T],
    *,
    workers: int,
    tick: Callable[[int], None] = lambda done: None,
) -> T:
    """The sum of the task's results for chunks 0, 1, ... (at least one), on threads.

    ``tick`` is called with the number of chunks done. Raises what a task or a merge raises.
    """
    tree: Tree[T] = Tree(chunks, task.merge)
    count = 0

    def done(chunk: int, result: T) -> None:
        nonlocal count
        count += 1
        tree.put(chunk, result)

    run_threads(range(chunks), task, workers=workers, done=done, tick=lambda: tick(count))
    return tree.root()
