"""``gazetteer``: questions over a bundled corpus of invented towns. Search, perhaps search again, then compute."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

from agentrl.data import held_out, is_test
from agentrl.env import ToolEnv, make_tool, require_answer
from agentrl.errors import UserError
from agentrl.tool import Tool
from agentrl.types import Episode, Message, Task, ToolCall

CORPUS = Path(__file__).with_name("corpus.jsonl")
Kind = Literal["sum", "difference", "bridge"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TEST_FRACTION: dict[Kind, float] = {"sum": 0.15, "difference": 0.15, "bridge": 0.38}
"""Share of each kind's questions that is held out; larger for the bridges, of which there are only two a town."""


@dataclass(frozen=True, slots=True)
class Town:
    """One record of the corpus.

    Attributes:
        name: one capitalised word.
        people: inhabitants in thousands, two digits.
        high: metres above the sea, two digits.
        twin: name of the twin town.
    """

    name: str
    people: int
    high: int
    twin: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question about two towns; in a bridge the second one must be found out."""

    kind: Kind
    text: str
    first: Town
    second: Town
    left: int
    operator: Literal["+", "-"]
    right: int

    @property
    def key(self) -> str:
        """What the split is drawn by: the same for a question and the one with its towns swapped."""
        towns = [self.first.name] if self.kind == "bridge" else sorted((self.first.name, self.second.name))
        return " ".join((self.kind, self.operator, *towns))

    @property
    def expression(self) -> str:
        """What to compute."""
        return f"{self.left}{self.operator}{self.right}"

    @property
    def answer(self) -> int:
        """The integer."""
        return self.left + self.right if self.operator == "+" else self.left - self.right


class Gazetteer(ToolEnv):
    """Three kinds of questions; the reward is 1 for the right integer as the whole answer, else 0.

    - ``sum``: "How many thousand people live in Funo and Gita together?"
    - ``difference``: "How many m higher is Funo than Gita?"
    - ``bridge``: the same two about a town "and its twin town", whose name the first search tells.

    Whether a question is for training or for testing hangs on a hash of its kind and towns, whatever their order.

    Args:
        kinds: which kinds to ask.
    """

    max_turns = 6

    def __init__(self, kinds: Sequence[str] = KINDS) -> None:
        unknown = [kind for kind in kinds if kind not in KINDS]
        if unknown or not kinds:
            raise UserError(f"gazetteer: expected kinds among {', '.join(KINDS)}, got {list(kinds)}.")
        self.kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind in kinds)

    def make_tools(self) -> Sequence[Tool]:
        """The bundled corpus to search, and Python."""
        return [make_tool("search", corpus=CORPUS, topk=1), make_tool("python")]

    def tasks(self, split: str) -> Iterable[Task]:
        """The kinds in turn, in a fixed random order.

        There are few bridges. Training asks them again, under an id of their own, so that every prefix holds the kinds
        in equal parts. Testing asks each question once: the kinds are equal until the bridges run out (after about
        100 tasks), then the others go on.
        """
        return _tasks(self.kinds, is_test(split))

    async def reward(self, task: Task, episode: Episode) -> float:
        """Exact match."""
        return float(episode.answer == require_answer(task))

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """Both searches in one turn, or one after the other over a bridge; then compute, then answer."""
        first, second = task.metadata["towns"]
        if task.metadata["kind"] == "bridge":
            turns = [[("search", "query", first)], [("search", "query", second)]]
        else:
            turns = [[("search", "query", first), ("search", "query", second)]]
        turns.append([("python", "code", task.metadata["expression"])])
        messages = [
            Message("assistant", "", tuple(ToolCall(f"call_{t}_{i}", n, {k: v}) for i, (n, k, v) in enumerate(calls)))
            for t, calls in enumerate(turns)
        ]
        return [*messages, Message("assistant", require_answer(task))]

    def guesser(self, task: Task, rng: random.Random) -> list[Message]:
        """A number of about the right size, from nowhere."""
        low, high = (-60, 60) if "-" in task.metadata["expression"] else (20, 200)
        return [Message("assistant", str(rng.randrange(low, high)))]


@lru_cache(maxsize=1)
def towns() -> dict[str, Town]:
    """The corpus by name."""
    rows = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    return {row["title"]: Town(row["title"], row["people"], row["high"], row["twin"]) for row in rows}


def questions(kind: Kind) -> Iterable[Question]:
    """Every question of ``kind``."""
    for first in towns().values():
        seconds = [towns()[first.twin]] if kind == "bridge" else [town for town in towns().values() if town != first]
        for second in seconds:
            named = "its twin town" if kind == "bridge" else second.name
            if kind != "difference":
                text = f"How many thousand people live in {first.name} and {named} together?"
                yield Question(kind, text, first, second, first.people, "+", second.people)
            if kind != "sum":
                text = f"How many m higher is {first.name} than {named}?"
                yield Question(kind, text, first, second, first.high, "-", second.high)


@lru_cache(maxsize=16)
def _tasks(kinds: tuple[Kind, ...], test: bool) -> tuple[Task, ...]:
    pools = []
    for kind in kinds:
        pool = [question for question in questions(kind) if held_out(question.key, TEST_FRACTION[kind]) is test]
        random.Random(f"gazetteer {kind} {test}").shuffle(pool)
        pools.append(pool)
    longest = max(len(pool) for pool in pools)
    tasks = []
    for place in range(longest):
        for pool in pools:
            if place < len(pool) or not test:
                tasks.append(_task(pool[place % len(pool)], place // len(pool)))
    return tuple(tasks)


def _task(question: Question, repeat: int) -> Task:
    towns = [question.first.name, question.second.name]
    name = "-".join((question.kind, "plus" if question.operator == "+" else "less", *towns))
    metadata = {"kind": question.kind, "towns": towns, "expression": question.expression}
    return Task(question.text, str(question.answer), id=f"{name}-{repeat}" if repeat else name, metadata=metadata)


ENV = Gazetteer
