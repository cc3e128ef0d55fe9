"""``arithmetic``: small sums, to be computed with the Python tool."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import lru_cache

from agentrl.data import held_out, is_test
from agentrl.env import ToolEnv, require_answer
from agentrl.errors import UserError
from agentrl.types import Episode, Message, Task, ToolCall

TEST_FRACTION = 0.15
FORMS: dict[str, Callable[[int, int, int], int]] = {
    "{a} * {b} + {c}": lambda a, b, c: a * b + c,
    "{a} * {b} - {c}": lambda a, b, c: a * b - c,
    "{a} + {b} - {c}": lambda a, b, c: a + b - c,
}


class Arithmetic(ToolEnv):
    """Questions such as "What is 37 * 4 + 12?"; the reward is 1 for the right integer as the whole answer, else 0.

    Whether a problem is for training or for testing hangs on a hash of its text, so the splits are disjoint whatever
    the options.

    Args:
        digits: digits of the first and the last number, 1 to 6; the one in the middle has one.
        count: tasks of the training split; the test split has a quarter of it.
    """

    tools = ("python",)
    max_turns = 4

    def __init__(self, digits: int = 2, count: int = 1000) -> None:
        if not 1 <= digits <= 6:
            raise UserError(f"arithmetic: expected digits from 1 to 6, got {digits!r}.")
        most = 1000 * 100 ** (digits - 1)
        if not 4 <= count <= most:
            raise UserError(f"arithmetic: expected count from 4 to {most} for digits={digits}, got {count!r}.")
        self.digits, self.count = digits, count

    def tasks(self, split: str) -> Iterable[Task]:
        """Distinct problems in a fixed random order."""
        test = is_test(split)
        return _tasks(test, self.digits, self.count // 4 if test else self.count)

    async def reward(self, task: Task, episode: Episode) -> float:
        """Exact match."""
        return float(episode.answer == require_answer(task))

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """Compute, then answer."""
        code = str(task.metadata["expression"])
        call = Message("assistant", "", (ToolCall("call_0_0", "python", {"code": code}),))
        return [call, Message("assistant", require_answer(task))]

    def guesser(self, task: Task, rng: random.Random) -> list[Message]:
        """A number of about the right size, from nowhere."""
        top = 10 ** (self.digits + 1)
        return [Message("assistant", str(rng.randrange(-top // 10, top)))]


@lru_cache(maxsize=8)
def _tasks(test: bool, digits: int, count: int) -> tuple[Task, ...]:
    rng = random.Random(f"arithmetic {digits}")
    low, high = (1 if digits == 1 else 10 ** (digits - 1)), 10**digits
    found: dict[str, Task] = {}
    while len(found) < count:
        a, b, c = rng.randrange(low, high), rng.randrange(2, 10), rng.randrange(low, high)
        form, compute = rng.choice(list(FORMS.items()))
        # 3 * 4 and 4 * 3 are one problem: both must fall in the same split.
        first, second = sorted((a, b))
        if held_out(form.format(a=first, b=second, c=c), TEST_FRACTION) is test:
            expression = form.format(a=a, b=b, c=c)
            prompt = f"What is {expression}?"
            found[expression] = Task(prompt, str(compute(a, b, c)), metadata={"expression": expression})
    return tuple(found.values())


ENV = Arithmetic
