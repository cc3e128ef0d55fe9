"""An environment whose only tool is a function: episodes need no sandbox, no network and no time."""

from __future__ import annotations

from agentrl import Message, Task, ToolCall, ToolEnv, require_answer, tool


@tool
def double(x: int) -> str:
    """Double a number.

    Args:
        x: the number.
    """
    return str(2 * x)


class Doubling(ToolEnv):
    """Double a number with the tool."""

    tools = (double,)
    max_turns = 3
    count = 24

    def tasks(self, split):
        first = 0 if split == "train" else 100
        for number in range(first, first + self.count):
            yield Task(f"double {number}", answer=str(2 * number), id=f"{split}-{number}")

    async def reward(self, task, episode):
        return float(episode.answer == require_answer(task))

    def expert(self, task, rng):
        number = int(task.prompt[0].content.split()[1])
        return [Message("assistant", "", (ToolCall("call_0_0", "double", {"x": number}),)), self._answer(task)]

    def guesser(self, task, rng):
        return [Message("assistant", str(rng.randrange(10)))]

    def _answer(self, task):
        return Message("assistant", require_answer(task))


class Shy(Doubling):
    """Pays for calling the tool, whatever the answer: a nearly untrained policy already has rewards that differ."""

    async def reward(self, task, episode):
        return float(len(episode.tool_results) > 0)


class Broken(Doubling):
    """Its reward always fails."""

    async def reward(self, task, episode):
        raise RuntimeError("the judge is out")
