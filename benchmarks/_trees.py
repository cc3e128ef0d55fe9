"""What ``rollout.py`` measures with a model: trees against groups at equal leaves, with the embedded sampler."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from typing import Any

from _bench import Row
from _hops import LATENCIES, Hops, Latency, warm_start

from agentrl.config import RolloutConfig
from agentrl.renderer import Renderer
from agentrl.rollout.policies import Policy
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.sampler.hf import HFSampler
from agentrl.seeds import derive_seed
from agentrl.types import RolloutTree, SamplingParams

TASKS, LEAVES, MAX_TOKENS = 8, 8, 256
POLICIES: dict[str, dict[str, Any]] = {
    "group": {},
    "random_tree": {},
    "entropy_tree": {},
    "expand_tree": {"trees": 2, "nodes": 3},
}
"""Everybody's options; those not named have their defaults: trees begin with half of the leaves."""

FIRST_WAVE = {"group": LEAVES, "random_tree": LEAVES // 2, "entropy_tree": LEAVES // 2, "expand_tree": 2}
TREES = tuple(name for name in POLICIES if name != "group")


class WatchedSampler(HFSampler):
    """The embedded sampler with clocks around its engine's work.

    Attributes:
        busy: seconds in which the engine admitted requests or computed.
        steps: seconds of each forward pass with its draws.
        first: when each request's first token was drawn, by the request's seed.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.busy = 0.0
        self.steps: list[float] = []
        self.first: dict[int, float] = {}
        super().__init__(*arguments, **options)

    def _admit(self) -> None:
        began = time.perf_counter()
        super()._admit()
        self.busy += time.perf_counter() - began

    def _step(self) -> None:
        began = time.perf_counter()
        super()._step()
        self.steps.append(time.perf_counter() - began)
        self.busy += self.steps[-1]

    def _draw(self, logits: Any, drawing: Any) -> None:
        super()._draw(logits, drawing)
        now = time.perf_counter()
        for _, request in drawing:
            if len(request.events) == 1:
                self.first[request.params.seed] = now


@dataclass(frozen=True, slots=True)
class Grown:
    """What growing ``TASKS`` trees took and gave.

    Attributes:
        seconds: wall time.
        busy: seconds of it in which the sampler worked.
        leaves: scored trajectories delivered.
        tokens: generated.
        calls: of tools.
        late: leaves begun from the prompt after the first wave, because too few branched.
        waits: seconds from each decision to branch to the sibling's first token.
        steps: seconds of the sampler's steps.
    """

    seconds: float
    busy: float
    leaves: int
    tokens: float
    calls: float
    late: float
    waits: tuple[float, ...]
    steps: tuple[float, ...]


class Field:
    """Where all policies grow their trees: one sampler, and tasks that nobody has played before."""

    def __init__(self) -> None:
        model, tokenizer = warm_start(Hops, demonstrations=200, steps=100)
        self.sampler = WatchedSampler(model, tokenizer, max_slots=256, max_length=512)
        self._renderer = Renderer(tokenizer)
        self._tasks = cycle(Hops().tasks("train"))  # 900: who comes round again has long lost its slot

    def grow(self, name: str, latency: Latency, seed: int) -> Grown:
        """Grow trees by policy ``name``."""
        params, rng = SamplingParams(MAX_TOKENS), random.Random(seed)
        limits = RolloutConfig(group=LEAVES, policy=name, policy_options=POLICIES[name], max_tokens=MAX_TOKENS)
        scheduler = Scheduler(
            lambda: Hops(latency, rng),
            lambda seed: TokenWriter(self.sampler, self._renderer, params, seed),
            limits,
            params,
        )
        scheduler.policy, decided = timed(scheduler.policy)
        tasks = [next(self._tasks) for _ in range(TASKS)]
        busy, steps, began = self.sampler.busy, len(self.sampler.steps), time.perf_counter()
        trees = asyncio.run(scheduler.grow(tasks, seed=seed))
        seconds = time.perf_counter() - began
        if any(len(tree.rewards) != LEAVES for tree in trees):
            sys.exit(f"{name}: expected {LEAVES} leaves, got {[len(tree.rewards) for tree in trees]}")
        return Grown(
            seconds,
            self.sampler.busy - busy,
            LEAVES * TASKS,
            sum(tree.spent["tokens"] for tree in trees),
            sum(tree.spent["calls"] for tree in trees),
            sum(tree.spent["roots"] - FIRST_WAVE[name] for tree in trees),
            tuple(wait for tree in trees for wait in waits(tree, decided, self.sampler.first)),
            tuple(self.sampler.steps[steps:]),
        )

    def close(self) -> None:
        """Stop the sampler."""
        asyncio.run(self.sampler.close())


def timed(policy: Policy) -> tuple[Policy, dict[int, float]]:
    """``policy``, and when it decided at each point, by the point's seed."""
    decided: dict[int, float] = {}

    class Timed(type(policy)):  # type: ignore[misc]
        def decide(self, point: Any) -> Any:
            verdict = super().decide(point)
            decided[point.seed] = time.perf_counter()
            return verdict

    return Timed(**policy.model_dump()), decided


def waits(tree: RolloutTree, decided: dict[int, float], first: dict[int, float]) -> Iterable[float]:
    """Seconds from each granted decision to the first token of the sibling."""
    for decision in tree.decisions:
        if decision.granted:
            child = (*decision.name, decision.turn)
            point = derive_seed(tree.seed, tree.task.id, tree.copy, "decide", *child)
            writer = derive_seed(tree.seed, tree.task.id, tree.copy, *child)
            drawn = first.get(derive_seed(writer, decision.turn))  # None where it had no tokens left
            if drawn is not None:
                yield drawn - decided[point]


def tree_rows(rounds: int) -> list[Row]:
    """Everybody takes turns, at every latency, ``rounds`` times, after one turn that does not count."""
    field = Field()
    grown: dict[tuple[str, str], list[Grown]] = {(at, name): [] for at in LATENCIES for name in POLICIES}
    try:
        for name in POLICIES:
            field.grow(name, LATENCIES["0 ms"], 0)
        for turn in range(rounds):
            for at, latency in LATENCIES.items():
                for name in POLICIES:
                    grown[at, name].append(field.grow(name, latency, turn + 1))
    finally:
        field.close()
    rows = [row for at in LATENCIES for row in _speed({name: grown[at, name] for name in POLICIES}, at)]
    by_policy = {name: [each for at in LATENCIES for each in grown[at, name]] for name in POLICIES}
    return rows + _economy(by_policy) + _waiting(by_policy)


def _speed(grown: dict[str, list[Grown]], at: str) -> list[Row]:
    """Leaves per second, and how much of the time the sampler worked."""
    group = grown["group"]
    rows = [Row(f"tool {at}: group", median(each.leaves / each.seconds for each in group), "leaves/s")]
    for name in TREES:
        gain = median(ours.seconds / tree.seconds for ours, tree in zip(group, grown[name], strict=True))
        rows.append(Row(f"tool {at}: {name}, leaves/s", gain, "x group", better="higher"))
    for name in POLICIES:
        busy = median(each.busy / each.seconds for each in grown[name])
        rows.append(Row(f"tool {at}: {name}, sampler busy", busy, "of wall", better="higher"))
    return rows


def _economy(grown: dict[str, list[Grown]]) -> list[Row]:
    """What a leaf costs in tokens and calls, all latencies together."""

    def per(name: str, what: str) -> float:
        return sum(each.leaves for each in grown[name]) / sum(getattr(each, what) for each in grown[name])

    rows = [
        Row("group, leaves per 1,000 generated tokens", 1000 * per("group", "tokens"), "leaves", better="higher"),
        Row("group, tool calls per leaf", 1 / per("group", "calls"), "calls"),
    ]
    for name in TREES:
        for what, words in (("tokens", "generated token"), ("calls", "tool call")):
            gain = per(name, what) / per("group", what)
            rows.append(Row(f"{name}, leaves per {words}", gain, "x group", better="higher"))
    for name in TREES:
        late = sum(each.late for each in grown[name]) / sum(each.leaves for each in grown[name])
        rows.append(Row(f"{name}, leaves begun late from the prompt", late, "of leaves"))
    return rows


def _waiting(grown: dict[str, list[Grown]]) -> list[Row]:
    """From the decision to the sibling's first token, beside the sampler's step."""
    rows = []
    for name in ("random_tree", "entropy_tree"):
        waited = [wait for each in grown[name] for wait in each.waits]
        label = f"{name}, decision to sibling's token"
        rows += [
            Row(f"{label}, p50 of {len(waited)}", 1e3 * median(waited), "ms"),
            Row(f"{label}, p99", 1e3 * quantiles(waited, n=100)[98], "ms"),
            Row(f"{name}, step of the sampler, p50", 1e3 * median(s for each in grown[name] for s in each.steps), "ms"),
        ]
    return rows
