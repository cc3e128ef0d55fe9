"""A policy, its notation and its world, all made up: a test chooses lengths, entropies, calls, delays and failures.

Tokens are numbers: a turn is some words and a last token that says with how many tool calls it ends. What was asked of
the sampler, how many tokens it made, what the tool ran and what is still open is counted here, not by the engine.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from agentrl import Message, Task, ToolCall, ToolEnv
from agentrl.config import RolloutConfig
from agentrl.errors import ToolInfrastructureError
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.seeds import derive_seed
from agentrl.tool import Tool
from agentrl.types import Completion, ForkLevel, Outcome, SamplingParams, StopReason, TokenEvent

PROMPT, RESULT, ANSWER, CALL, VOCABULARY = 1, 2, 10, 10, 1000
TASKS = [Task(str(n), id=f"t{n}") for n in range(8)]


@dataclass(frozen=True)
class Turn:
    """What the policy says: ``len(entropies)`` tokens, the last of which asks for ``calls`` calls (0: it answers)."""

    calls: int = 0
    entropies: Sequence[float] = (1.0, 1.0, 1.0)
    delay: float | Callable[[int], Any] = 0.0


@dataclass(frozen=True)
class Request:
    """``turn``: how many tool results went before; ``ids``: the whole prompt."""

    ids: tuple[int, ...]
    params: SamplingParams
    turn: int
    made: list[int] = field(default_factory=list)


def word(text: str) -> int:
    return 100 + zlib.crc32(text.encode()) % (VOCABULARY - 100)


class Notation:
    """What ``TokenWriter`` needs of a renderer."""

    tokenizer = range(VOCABULARY)
    stop_ids = tuple(range(ANSWER, ANSWER + 10))

    def stop_strings(self, tools):
        return ()

    def prompt(self, messages, tools=()):
        return (PROMPT, *(word(message.content) for message in messages))

    def continuation(self, messages):
        return (RESULT, *(word(message.content) for message in messages))

    def parse(self, ids, tools=(), turn=0):
        calls = ids[-1] - CALL if ids[-1] in self.stop_ids else 0
        made = tuple(ToolCall(f"call_{turn}_{i}", "look", {"x": ids[0] + i}) for i in range(calls))
        return Message("assistant", "" if made else " ".join(map(str, ids)), made)


class Streaming:
    """Says what ``script(request)`` gives. A token is made when it is asked for, and counted then."""

    version, max_length, entropies, deterministic = 0, 10_000, True, True

    def __init__(self, script: Callable[[Request], Turn]) -> None:
        self.script = script
        self.generated = 0
        self.requests: list[Request] = []
        self.streams = 0

    async def stream(self, token_ids, params):
        request = Request(tuple(token_ids), params, list(token_ids).count(RESULT))
        self.requests.append(request)
        turn, rng = self.script(request), Random(params.seed)
        self.streams += 1
        try:
            for i, entropy in enumerate(turn.entropies[: params.max_tokens]):
                waited = turn.delay(i) if callable(turn.delay) else turn.delay and asyncio.sleep(turn.delay)
                if waited:
                    await waited
                last = i + 1 == len(turn.entropies)
                token = CALL + turn.calls if last else rng.randrange(100, VOCABULARY)
                reason = StopReason.STOP if last else StopReason.LENGTH if i + 1 == params.max_tokens else None
                self.generated += 1
                request.made.append(token)
                yield TokenEvent(token, -1.0, entropy, 0, reason)
        finally:
            self.streams -= 1

    async def sample(self, token_ids, params):
        events = [event async for event in self.stream(token_ids, params)]
        ids, logprobs, entropies, versions, reasons = zip(*events, strict=True)
        return Completion(ids, logprobs, entropies, reasons[-1], versions, params.temperature, params.top_p)

    async def update_weights(self, source, version):
        raise NotImplementedError

    async def close(self):
        pass


class Look(Tool):
    """Something that has to be closed, and that remembers what it was asked for.

    Attributes:
        seen: where it looked.
        lineage: it is the so-many-eth fork of the so-many-eth fork ... of an environment that was reset.
    """

    name = "look"

    def __init__(self, world: World) -> None:
        self.world, self.seen = world, ()
        self.lineage: tuple[int, ...] = ()
        self._forks = 0
        self.fork_level = world.level

    async def start(self, seed: int) -> None:
        self.world.open.add(self)
        await self.world.pause("start", self)

    async def run(self, x: int) -> str:
        """Look there.

        Args:
            x: where.
        """
        world = self.world
        world.calls += 1
        world.running += 1
        world.peak = max(world.peak, world.running)
        try:
            await world.pause("run", self)
            self.seen += (x,)
        finally:
            world.running -= 1
        return f"{x} after {len(self.seen) - 1}"

    async def fork(self) -> Look:
        seen = self.seen
        await self.world.pause("fork", self)
        assert self.seen == seen, "it was changed while it was forked"
        twin = Look(self.world)
        twin.seen, twin.lineage = seen, (*self.lineage, self._forks)
        self._forks += 1
        self.world.open.add(twin)
        return twin

    async def close(self) -> None:
        await self.world.pause("close", self)
        self.world.open.discard(self)


class World:
    """Makes environments with one tool.

    Args:
        on: by stage (start, run, fork, close: of the tool; step, refork, reward: of the environment), called with one
            or the other; may give an awaitable, or raise.
        max_turns: of an episode.
        level: fork level of the tool.
    """

    def __init__(self, *, max_turns: int = 4, level: ForkLevel = ForkLevel.COPY, **on: Callable[[Any], Any]) -> None:
        self.on, self.max_turns, self.level = on, max_turns, level
        self.open: set[Look] = set()
        self.calls = self.running = self.peak = 0
        self.stages: Counter[str] = Counter()

    async def pause(self, stage: str, what: Any) -> Any:
        self.stages[stage] += 1
        waited = self.on[stage](what) if stage in self.on else None
        return await waited if asyncio.iscoroutine(waited) else waited

    def env(self) -> ToolEnv:
        world = self

        class Room(ToolEnv):
            max_turns = world.max_turns

            def make_tools(self):
                return [Look(world)]

            async def step(self, action):
                await world.pause("step", self)
                return await super().step(action)

            async def fork(self):
                await world.pause("refork", self)
                return await super().fork()

            async def reward(self, task, episode):
                if "reward" in world.on:
                    return await world.pause("reward", self)
                return (zlib.crc32(repr(episode.messages[-1]).encode()) % 5) / 4

        return Room()


def scheduler(sampler, world, *, max_tokens=10_000, **limits):
    """A scheduler of ``limits`` over both."""
    params = SamplingParams(max_tokens)
    return Scheduler(
        world.env,
        lambda seed: TokenWriter(sampler, Notation(), params, seed),
        RolloutConfig(**{"max_tokens": max_tokens} | limits),
        params,
    )


def by_turn(*turns: Turn) -> Callable[[Request], Turn]:
    """The same turns for every trajectory; the last one again and again."""
    return lambda request: turns[min(request.turn, len(turns) - 1)]


def request_of(sampler: Streaming, name: tuple[int, ...], turn: int, *, seed=0, task="t0", copy=1) -> Request | None:
    """What trajectory ``name`` asked in its ``turn``; None where it has not."""
    wanted = derive_seed(derive_seed(seed, task, copy, *name), turn)
    return next((request for request in sampler.requests if request.params.seed == wanted), None)


def broken(_: Any) -> None:
    raise ToolInfrastructureError("the room is gone")


# -- what holds for every tree ----------------------------------------------------------------------------------------


def check_tree(tree, leaves: int | None = None, *, pairs: bool = False) -> None:
    """The shape that names and nodes have to have. ``pairs``: names are of turns and draws, as in ``expand_tree``."""
    if leaves is not None:
        assert len(tree.leaves) == leaves
    names = [leaf.name for leaf in tree.leaves]
    assert names == sorted(set(names)), "unique, and in order"
    asked = [(decision.name, decision.turn) for decision in tree.decisions]
    assert asked == sorted(set(asked)), "nobody is asked twice at one place"
    assert all(node.parent < i for i, node in enumerate(tree.nodes))
    assert sum(node.parent < 0 for node in tree.nodes) == bool(tree.nodes)
    paths = {leaf.name: tree.path(leaf) for leaf in tree.leaves}
    reached = {id(node) for path in paths.values() for node in path}
    assert reached == {id(node) for node in tree.nodes}, "no node without a leaf"
    for leaf in tree.leaves:
        authors = [node.author for node in paths[leaf.name]]
        assert authors == ["prompt", *["policy", "tool"] * len(authors)][: len(authors)]
        results = [result for node in paths[leaf.name] for result in node.tool_results] + [*leaf.tool_results]
        assert leaf.metrics["tool_calls"] == len(results)
        ran = leaf.metrics["turns"]
        cut = leaf.outcome is Outcome.BUDGET  # a turn that was refused has no node
        assert ran - authors.count("policy") in ((0, 1) if cut else (0,))
    for one in names:
        for other in names:
            if one < other:
                a, b = paths[one], paths[other]
                shared = sum(x is y for x, y in zip(a, b, strict=False))
                fork = divergence(one, other, pairs)
                assert shared == min(1 + 2 * fork, len(a), len(b)), (one, other)
                assert not {id(node) for node in a[shared:]} & {id(node) for node in b[shared:]}


def divergence(one: tuple[int, ...], other: tuple[int, ...], pairs: bool) -> int:
    """The turns that two names say their trajectories share."""
    if one[0] != other[0]:
        return 0
    a, b = ([*zip(n[1::2], n[2::2], strict=True)] if pairs else [(t, 0) for t in n[1:]] for n in (one, other))
    for x, y in zip(a, b, strict=False):
        if x != y:
            return min(x[0], y[0])
    rest = a[len(b) :] or b[len(a) :]
    assert rest
    return rest[0][0]


def policy_tokens(trees) -> int:
    return sum(len(node.token_ids) for tree in trees for node in tree.nodes if node.author == "policy")


def tool_results(trees) -> int:
    """Those of the last turn of an episode are its leaf's."""
    return sum(len(each.tool_results) for tree in trees for each in (*tree.nodes, *tree.leaves))


def content(trees):
    """Everything but wall times."""
    return [
        (
            tree.task.id,
            [(node.parent, node.token_ids, node.entropies) for node in tree.nodes],
            [(leaf.name, leaf.node, leaf.reward, leaf.outcome, leaf.seed, leaf.metrics) for leaf in tree.leaves],
            tree.decisions,
        )
        for tree in trees
    ]


def within(value: float, expected: float, count: int) -> bool:
    """Whether a share of ``count`` draws is within three standard errors of what was expected."""
    return abs(value - expected) <= 3 * math.sqrt(max(expected * (1 - expected), 1e-12) / count)
