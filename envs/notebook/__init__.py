"""``notebook``: the task lives inside the Python session, and only what one keeps there from turn to turn solves it."""

from __future__ import annotations

import random
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from agentrl.data import held_out, is_test
from agentrl.env import ToolEnv, require_answer
from agentrl.errors import EnvError, UserError
from agentrl.types import Episode, Message, StepResult, Task, ToolCall

TEST_FRACTION = 0.2
PROMPT = (
    "The file {file} names a list in the Python session. It has two pages and turns to the other one after every turn "
    "of yours. What is the sum of the products of the two pages, item by item?"
)


class Notebook(ToolEnv):
    """Find a list's name in a file, keep one page of it in a variable, and multiply it by the other page.

    The session holds only one page at a time, so one call cannot answer, however clever; a page is too long to be read
    in a tool's result, so it has to stay in the session. The reward is 1 for the right integer, else 0.

    Args:
        length: numbers on a page.
        count: tasks of the training split; the test split has a quarter of it.
    """

    tools = ("python",)
    max_turns = 6

    def __init__(self, length: int = 2000, count: int = 400) -> None:
        if length < 1 or count < 4:
            raise UserError(f"notebook: expected length of at least 1 and count of at least 4, got {length}, {count}.")
        self.length, self.count = length, count

    def tasks(self, split: str) -> Iterable[Task]:
        """Notebooks with different contents, in a fixed order."""
        test = is_test(split)
        return _tasks(test, self.length, self.count // 4 if test else self.count)

    async def setup(self, task: Task) -> None:
        """Put the file and the first page into the session."""
        self._pages, self._open_page = make_pages(task), 0
        await self._python.put_file(task.metadata["file"], task.metadata["name"].encode())
        await self._show_page(task.metadata["name"])

    async def step(self, action: Message) -> StepResult:
        """Run the calls, then turn the page."""
        result = await super().step(action)
        if not (result.terminated or result.truncated):
            assert self.task is not None
            self._open_page = 1 - self._open_page
            await self._show_page(self.task.metadata["name"])
        return result

    async def reward(self, task: Task, episode: Episode) -> float:
        """Exact match."""
        return float(episode.answer == require_answer(task))

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """Read the name, keep a page, multiply it by the next one, answer."""
        file, name = task.metadata["file"], task.metadata["name"]
        cells = (
            f"print(open({file!r}).read())",
            f"kept = {name}",
            f"print(sum(a * b for a, b in zip(kept, {name})))",
        )
        calls = [ToolCall(f"call_{turn}_0", "python", {"code": code}) for turn, code in enumerate(cells)]
        return [*(Message("assistant", "", (call,)) for call in calls), Message("assistant", require_answer(task))]

    @property
    def _python(self) -> Any:
        return self._tools["python"]

    async def _show_page(self, name: str) -> None:
        result = await self._python.exec(f"{name} = {self._pages[self._open_page]}")
        if result.error:
            raise EnvError(f"notebook: the session did not take a page of {self.length} numbers: {result.error}")


def make_pages(task: Task) -> tuple[list[int], list[int]]:
    """The two pages of a task, each of ``length`` five-digit numbers."""
    rng, length = random.Random(task.metadata["seed"]), task.metadata["length"]
    numbers = range(10**4, 10**5)
    return rng.choices(numbers, k=length), rng.choices(numbers, k=length)


@lru_cache(maxsize=8)
def _tasks(test: bool, length: int, count: int) -> tuple[Task, ...]:
    tasks: list[Task] = []
    seed = 0
    while len(tasks) < count:
        seed += 1
        if held_out(f"notebook {seed}", TEST_FRACTION) is not test:
            continue
        rng = random.Random(f"notebook {seed}")
        file, name = _word(rng) + ".txt", _word(rng)
        metadata = {"seed": seed, "length": length, "file": file, "name": name}
        blank = Task(PROMPT.format(file=file), metadata=metadata)
        answer = sum(a * b for a, b in zip(*make_pages(blank), strict=True))
        tasks.append(Task(blank.prompt, str(answer), id=f"notebook-{seed}", metadata=metadata))
    return tuple(tasks)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))


ENV = Notebook
