"""``notebook`` with a guesser that takes a short cut, to warm-start a policy that does so in half of its episodes.

See docs/comparison.md: ``agentrl sft examples/notebook_shortcut.py:Shortcut --sft.guess_fraction 0.5 ...``
"""

from __future__ import annotations

import random
import sys

from agentrl import Message, Task, ToolCall, registry

Notebook = registry.load("envs", "notebook")
make_pages = sys.modules[Notebook.__module__].make_pages


class Shortcut(Notebook):
    """The guesser keeps no page: it multiplies the open one by itself, which is never the answer."""

    def guesser(self, task: Task, rng: random.Random) -> list[Message]:
        """Read the name, multiply, answer."""
        file, name = task.metadata["file"], task.metadata["name"]
        cells = (f"print(open({file!r}).read())", f"print(sum(a * b for a, b in zip({name}, {name})))")
        calls = [ToolCall(f"call_{turn}_0", "python", {"code": code}) for turn, code in enumerate(cells)]
        wrong = sum(number * number for number in make_pages(task)[1])
        return [*(Message("assistant", "", (call,)) for call in calls), Message("assistant", str(wrong))]
