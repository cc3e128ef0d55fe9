"""An endless, reproducible stream of training tasks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from itertools import islice

from agentrl.errors import TaskError
from agentrl.seeds import derive_seed
from agentrl.types import Task


class TaskStream:
    """Epoch after epoch, each in its own order; position and seed say everything, so a resume is exact.

    Args:
        tasks: the training tasks.
        seed: of the orders.
        cursor: tasks already taken.

    Raises:
        TaskError: there are no tasks, or two share an id.
    """

    def __init__(self, tasks: Iterable[Task], seed: int, cursor: int = 0) -> None:
        self._tasks = unique_tasks(tasks, "training")
        self._seed, self.cursor = seed, cursor
        self._epoch, self._order = -1, list(range(len(self._tasks)))

    def take(self, count: int) -> list[Task]:
        """The next ``count`` tasks; within an epoch none comes twice."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Task:
        epoch, place = divmod(self.cursor, len(self._tasks))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, list(range(len(self._tasks)))
            random.Random(derive_seed(self._seed, "epoch", epoch)).shuffle(self._order)
        self.cursor += 1
        return self._tasks[self._order[place]]


def unique_tasks(tasks: Iterable[Task], what: str, limit: int | None = None) -> list[Task]:
    """The first ``limit`` of ``tasks`` (None: all) as a list.

    Raises:
        TaskError: there are none, something else is among them, or two have the same id.
    """
    if not isinstance(tasks, Iterable):
        raise TaskError(f"{what}: expected tasks(split) to give Task records, got {tasks!r}.")
    listed = list(islice(tasks, limit))
    if not listed:
        raise TaskError(f"{what}: the task list is empty; expected at least one task.")
    seen: set[str] = set()
    for task in listed:
        if not isinstance(task, Task):
            raise TaskError(
                f"{what}: expected Task records, got {task!r}; make them with agentrl.Task(prompt, answer)."
            )
        if task.id in seen:
            raise TaskError(
                f"{what}: two tasks have the id {task.id!r}; ids must be unique (leave them out to get hashes)."
            )
        seen.add(task.id)
    return listed
