"""``gazetteer``: questions over a bundled corpus of invented towns. Search, perhaps search again, then compute."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from agentrl.data import held_out, is_test
from agentrl.env import ToolEnv, make_tool, require_answer
from agentrl.errors import UserError
from agentrl.tool import Tool
from agentrl.types import Episode, Message, Task, ToolCall

from .make_corpus import make_corpus

CORPUS = Path(__file__).with_name("corpus.jsonl")
Kind = Literal["sum", "difference", "bridge"]
KINDS: tuple[Kind, ...] = get_args(Kind)

TRAIN_EDITIONS = range(1, 33)
TRAIN_PER_KIND = 1500
"""Most training questions of a kind; there would be 60,000 sums."""

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
    edition: int
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

    - ``sum``: "How many thousand people live in Humo and Kisa together?"
    - ``difference``: "How many m higher is Humo than Kisa?"
    - ``bridge``: the same two about a town "and its twin town", whose name the first search tells.

    Whether a question is for training or for testing hangs on a hash of its kind and towns, whatever their order. And
    tests are asked about the bundled edition of the gazetteer, training about 32 others, in which the same towns have
    other inhabitants, heights and twins: what a policy learnt by heart is of no use, it has to read what it found.

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
        """The task's edition of the gazetteer to search, and Python."""
        edition = self.task.metadata["edition"] if self.task else 0
        return [make_tool("search", backend=index(edition), topk=1), make_tool("python")]

    def tasks(self, split: str) -> Iterable[Task]:
        """The kinds in turn, in a fixed random order, each question once.

        Training goes on as long as all kinds last. Testing asks every question that is held out: the kinds are equal
        until the bridges run out (after about 100 tasks), then the others go on.
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


@lru_cache(maxsize=64)
def records(edition: int = 0) -> tuple[dict[str, Any], ...]:
    """The corpus of ``edition``; 0 is the bundled one."""
    if edition:
        return tuple(make_corpus(edition))
    return tuple(json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines())


@lru_cache(maxsize=64)
def towns(edition: int = 0) -> dict[str, Town]:
    """The towns of ``edition`` by name."""
    return {r["title"]: Town(r["title"], r["people"], r["high"], r["twin"]) for r in records(edition)}


@lru_cache(maxsize=64)
def index(edition: int) -> Any:
    """The search index of ``edition``, shared by all episodes."""
    search: Any = make_tool("search", corpus=records(edition))
    return search.backend


def questions(kind: Kind, edition: int = 0) -> Iterable[Question]:
    """Every question of ``kind`` about ``edition``."""
    known = towns(edition)
    for first in known.values():
        seconds = [known[first.twin]] if kind == "bridge" else [town for town in known.values() if town != first]
        for second in seconds:
            named = "its twin town" if kind == "bridge" else second.name
            if kind != "difference":
                text = f"How many thousand people live in {first.name} and {named} together?"
                yield Question(kind, edition, text, first, second, first.people, "+", second.people)
            if kind != "sum":
                text = f"How many m higher is {first.name} than {named}?"
                yield Question(kind, edition, text, first, second, first.high, "-", second.high)


@lru_cache(maxsize=16)
def _tasks(kinds: tuple[Kind, ...], test: bool) -> tuple[Task, ...]:
    pools = [_pool(kind, test) for kind in kinds]
    count = (max if test else min)(map(len, pools))
    return tuple(_task(pool[place]) for place in range(count) for pool in pools if place < len(pool))


def _pool(kind: Kind, test: bool) -> list[Question]:
    """Questions of one kind in random order. The split is drawn by the towns, so it is the same in every edition."""
    places = [i for i, q in enumerate(questions(kind)) if held_out(q.key, TEST_FRACTION[kind]) is test]
    asked = list(product((0,) if test else TRAIN_EDITIONS, places))
    count = len(asked) if test else min(len(asked), TRAIN_PER_KIND)
    chosen = random.Random(f"gazetteer {kind} {test}").sample(asked, count)
    editions = {edition: list(questions(kind, edition)) for edition in {edition for edition, _ in chosen}}
    return [editions[edition][place] for edition, place in chosen]


def _task(question: Question) -> Task:
    names = [question.first.name, question.second.name]
    operator = "plus" if question.operator == "+" else "less"
    metadata = {
        "kind": question.kind,
        "edition": question.edition,
        "towns": names,
        "expression": question.expression,
    }
    identifier = "-".join((str(question.edition), question.kind, operator, *names))
    return Task(question.text, str(question.answer), id=identifier, metadata=metadata)


ENV = Gazetteer
