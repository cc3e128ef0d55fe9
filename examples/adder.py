"""The environment of the README, whole: ``agentrl check examples/adder.py:Adder``."""

from __future__ import annotations

import random
from collections.abc import Iterable

from agentrl import Episode, Message, Task, ToolCall, ToolEnv


class Adder(ToolEnv):
    """Add two numbers with the Python tool."""

    tools = ("python",)
    max_turns = 4

    def tasks(self, split: str) -> Iterable[Task]:
        """The last twenty are held out."""
        for a in range(100) if split == "train" else range(100, 120):
            yield Task(prompt=f"What is {a} + {a * a}?", answer=str(a + a * a))

    async def reward(self, task: Task, episode: Episode) -> float:
        """Exact match."""
        return float(episode.answer == task.answer)

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """Compute what stands in the question, then say it; lets ``agentrl sft`` make a first policy."""
        expression = task.prompt[0].content.removeprefix("What is ").removesuffix("?")
        call = ToolCall("call_0_0", "python", {"code": expression})
        return [Message("assistant", "", (call,)), Message("assistant", str(task.answer))]


ENV = Adder
