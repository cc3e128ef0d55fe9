"""``unit_tests``: write a function; hidden tests run it in a sandbox, and the reward is the share that pass.

The policy reads what the function has to do and a few examples, can try things with the ``python`` tool, and answers
with the code: plain, in an ``<answer>`` block, or in a fenced block (of several, the last one that defines the
function). The hidden tests are in ``Task.metadata`` and stay on this side: each input is given to the function in a
session of its own, what comes back is compared here (``grader``), and what was expected never enters a sandbox.

Equal means equal in type and value: ``True`` is not 1, a tuple is no list; floats may be off by 1e-6 of their size.
What a function prints is not looked at. A test fails that raises, hangs, runs out of memory or ends its process. A
failure of the sandbox is not a score: it is raised.

Problems are generated (``problems``) or come from a file (``rows``)::

    agentrl check unit_tests
    agentrl sft unit_tests --out policy --env_options '{"level": 1}'
    agentrl eval unit_tests --policy policy --env_options '{"path": "problems.jsonl", "test_fraction": 1}'

A file has a problem a line: ``{"prompt": "...", "function": "double", "tests": [[[2], 4], [[0], 0]]}``, and perhaps
``"examples"`` to show, a ``"solution"`` for the expert, an ``"id"``. Values are plain JSON, and
``{"$tuple": [1, 2]}``, ``{"$set": [1, 2]}``, ``{"$dict": [[1, "a"]]}`` for what JSON does not have.
"""

from __future__ import annotations

import math
import random
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from agentrl.data import is_test, split_by_hash
from agentrl.env import ToolEnv, make_tool
from agentrl.errors import TaskError, UnknownName, UserError
from agentrl.sandbox.base import Sandbox
from agentrl.sandbox.shared import shared_sandbox
from agentrl.tool import Tool
from agentrl.types import Episode, Message, StepResult, Task, ToolCall

from .grader import Submission, Verdict, grade
from .problems import KINDS, TEST_FRACTION, generate, guess
from .rows import cases, first_call, read_problems

_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


class UnitTests(ToolEnv):
    """Write a function that passes hidden tests; the reward is the share of them that pass.

    At the end ``step`` puts ``"tests"`` into info: a ``grader.Verdict`` for each hidden test.

    Args:
        level: the hardest kinds of generated problems to ask for, 1 (one expression) to 4 (recursion and the like).
        kinds: only these of them; default all.
        count: most tasks of the training split; the test split has at most a quarter of it.
        path: a file of problems to ask instead.
        test_fraction: share of the file's problems that is for testing; 0 and 1 give all to one split.
        all_or_nothing: give 1 where every test passes, else 0.
        deadline: seconds that one test may take.
        total: seconds that all tests of a submission may take; those after it fail.
        sandbox: where code runs; default the event loop's shared one.
    """

    tools = ("python",)
    max_turns = 4

    def __init__(
        self,
        *,
        level: int = 4,
        kinds: Sequence[str] | None = None,
        count: int = 1000,
        path: str | None = None,
        test_fraction: float = TEST_FRACTION,
        all_or_nothing: bool = False,
        deadline: float = 1.0,
        total: float = 4.0,
        sandbox: Sandbox | None = None,
    ) -> None:
        if level not in range(1, 5) or count < 4:
            raise UserError(
                f"unit_tests: expected level from 1 to 4 and count of at least 4, got {level!r}, {count!r}."
            )
        for name, seconds in (("deadline", deadline), ("total", total)):
            if not (math.isfinite(seconds) and seconds > 0):
                raise UserError(f"unit_tests: expected {name} to be a positive number of seconds, got {seconds!r}.")
        if unknown := [name for name in kinds or () if name not in KINDS]:
            raise UnknownName("kind of problem", unknown[0], KINDS)
        self.kinds = tuple(name for name, kind in KINDS.items() if kind.level <= level and name in (kinds or KINDS))
        if not self.kinds:
            raise UserError(f"unit_tests: expected kinds of level {level} or below, got {', '.join(kinds or ())}.")
        self.count, self.path, self.test_fraction = count, path, test_fraction
        self.all_or_nothing, self.deadline, self.total = all_or_nothing, deadline, total
        self.verdicts: tuple[Verdict, ...] = ()
        self._sandbox = sandbox

    def make_tools(self) -> Sequence[Tool]:
        """A session to try things in; hidden tests never run there."""
        return [make_tool("python", sandbox=self._sandbox)]

    def tasks(self, split: str) -> Iterable[Task]:
        """Generated problems, the kinds in turn; or those of the file, split by what their prompts say."""
        test = is_test(split)
        if self.path is None:
            return generate(self.kinds, test, self.count // 4 if test else self.count)
        found = split_by_hash(read_problems(self.path), self.test_fraction)[test]
        if not found:
            raise TaskError(
                f"{self.path}: no problem is in the {split} split with test_fraction={self.test_fraction:g}; "
                f"{'raise' if test else 'lower'} it, or add problems."
            )
        return found

    async def step(self, action: Message) -> StepResult:
        """As ever; at the end with a verdict for every hidden test."""
        result = await super().step(action)
        if result.terminated or result.truncated:
            result.info["tests"] = self.verdicts
        return result

    async def reward(self, task: Task, episode: Episode) -> float:
        """The share of the hidden tests that pass; 0 without an answer."""
        self.verdicts = ()
        if not episode.answer:
            return 0.0
        hidden = cases(task)
        for made in self._tools.values():  # not needed any more; while this waits for a session it must hold none
            await made.close()
        submission = Submission(episode.answer, task.metadata["function"])
        sandbox = self._sandbox or shared_sandbox()
        self.verdicts = await grade(sandbox, submission, hidden, deadline=self.deadline, total=self.total)
        share = sum(verdict.passed for verdict in self.verdicts) / len(hidden)
        return float(share == 1) if self.all_or_nothing else share

    def extract_answer(self, content: str) -> str:
        """The code in a final message."""
        assert self.task is not None
        return find_code(super().extract_answer(content), self.task.metadata["function"])

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """Try the solution on the first example, then answer with it."""
        solution = task.metadata.get("solution")
        if solution is None:
            raise NotImplementedError(f"task {task.id} has no solution to demonstrate: add 'solution' to its row.")
        code = f"{solution}\n{first_call(task)}".rstrip()
        call = Message("assistant", "", (ToolCall("call_0_0", "python", {"code": code}),))
        return [call, Message("assistant", solution)]

    def guesser(self, task: Task, rng: random.Random) -> list[Message]:
        """A function of the right form that does something else; of a problem from a file, one that does nothing."""
        kind: Any = task.metadata.get("kind")
        if self.path is None and kind in KINDS:
            return [Message("assistant", guess(kind, rng))]
        return [Message("assistant", f"def {task.metadata['function']}(*arguments):\n    return None")]


def find_code(text: str, function: str) -> str:
    """The last fenced block of ``text`` that defines ``function``, else its last fenced block, else all of it."""
    blocks = _FENCED.findall(text)
    defines = re.compile(rf"^[ \t]*(?:async[ \t]+)?def[ \t]+{re.escape(function)}\b", re.MULTILINE)
    best = [block for block in blocks if defines.search(block)] or blocks or [text]
    return textwrap.dedent(best[-1]).strip("\n")


ENV = UnitTests
