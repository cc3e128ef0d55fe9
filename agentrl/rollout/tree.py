"""One task's rollout tree while it grows: trajectories with live environments, and what branches off them.

A ``Tree`` is what a branching policy works with: it plants trajectories at the prompt, lets the policy decide at tool
results, forks environment and writer for a sibling while the trajectory goes on, counts what is spent, and puts the
finished trajectories together. Every trajectory is a coroutine inside the one that it began from, so that what is
cancelled takes everything below with it. Seeds follow from names: a trajectory's tokens depend on where it branched
off, not on when.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

from agentrl.env import Env
from agentrl.errors import EnvError, ForkRefused, IsolationUnavailable, SamplerError, UserError
from agentrl.rollout.budget import Budget
from agentrl.rollout.episode import Played, Progress, close, play
from agentrl.rollout.gate import Gate
from agentrl.rollout.record import NO_LEAF, Name, Record
from agentrl.rollout.uncertainty import FIRST_TOKENS
from agentrl.rollout.writer import Watch, Writer
from agentrl.seeds import derive_seed
from agentrl.types import Decision, Leaf, Node, Outcome, RolloutTree, SamplingParams, Task

if TYPE_CHECKING:
    from agentrl.rollout.policies import Policy


@dataclass(frozen=True, slots=True)
class Ground:
    """What all trees of a scheduler share.

    Attributes:
        make_env: a new environment per root.
        make_writer: a new writer per root, from its seed.
        params: what is sampled with.
        live: limits the trajectories that are played at once.
        calls: limits the tool calls that run at once.
        deadline: seconds per trajectory.
        retries: new attempts at a root whose environment failed.
        playing: the progress of everything that is played now, by task and name; for the stall report.
        progress: called with each leaf as it ends.
        prepare: called with every environment before it is played in or forked, and whose it is; for replay.
    """

    make_env: Callable[[], Env]
    make_writer: Callable[[int], Writer]
    params: SamplingParams
    live: Gate
    calls: Gate
    deadline: float
    retries: int
    playing: dict[tuple[str, int, Name], Progress]
    progress: Callable[[Leaf], None] | None = None
    prepare: Callable[[Env, Name], None] | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A tool result at which a trajectory may branch.

    Attributes:
        seed: of the decision's random number.
        first: entropies of the first tokens of the trajectory's first turn.
        before: those of the turn that ended with the call.
        after: those after the tool result; empty where the policy does not look.
        vocabulary: |V|.
        streak: tool results in a row, up to the one before, at which this path branched.
    """

    seed: int
    first: Sequence[float]
    before: Sequence[float]
    after: Sequence[float]
    vocabulary: int
    streak: int


@dataclass(frozen=True, slots=True)
class State:
    """A state that a trajectory has left, kept for ``expand_tree``; its environment is only ever forked."""

    name: Name
    turn: int
    env: Env
    writer: Writer
    progress: Progress
    watch: Trajectory

    @property
    def after(self) -> Sequence[float]:
        """Entropies of the first tokens of the turn that the trajectory itself wrote here."""
        following = self.watch.writer.nodes[len(self.writer.nodes) :]
        return following[0].entropies[:FIRST_TOKENS] if following else ()


@dataclass(eq=False)
class Trajectory(Watch):
    """One trajectory, as its tree looks on.

    Attributes:
        tree: what it belongs to.
        name: see ``Leaf.name``.
        group: where its branches run.
        env: its environment.
        writer: its writer.
        progress: how far it is.
        openings: entropies of the first tokens of each turn; a branch begins with its parent's.
        branching: whether the policy is asked at its tool results.
        branches: siblings that began from it or from those.
        streak: tool results in a row, up to the one before the last, at which this path branched.
        forked: whether it branched at the last one.
        parent: what it began from.
    """

    tree: Tree
    name: Name
    group: asyncio.TaskGroup
    env: Env
    writer: Writer
    progress: Progress
    openings: list[list[float]] = field(default_factory=list)
    branching: bool = True
    branches: int = 0
    streak: int = 0
    parent: Trajectory | None = None
    forked: bool = False
    _asked: bool = True
    _forking: asyncio.Event | None = None

    def __post_init__(self) -> None:
        self.first_tokens = self.tree.policy.looks_at
        self._cut = self.tree.record.cuts.get(self.name) if self.tree.record else None
        self.metered = self.tree.budget.metered or self._cut is not None
        self._written = sum(len(node.token_ids) for node in self.writer.nodes if node.author == "policy")

    # -- Watch ----------------------------------------------------------------------------------------------------

    async def opened(self) -> None:
        """See ``Watch``."""
        if self.tree.policy.keeps:
            await self.tree.keep(self)

    def turn_began(self, entropies: Sequence[float]) -> None:
        """See ``Watch``."""
        self.openings.append(list(entropies))
        if self.first_tokens and not self._asked:
            self._ask(self.openings[-2], entropies)

    def spend(self, tokens: int) -> bool:
        """See ``Watch``."""
        self.tree.budget.spend_tokens(tokens)
        self._written += tokens
        return not self._at_cut if self._cut else not self.tree.budget.exhausted

    def take_token(self) -> bool:
        """See ``Watch``."""
        return self.spend(0) and self.spend(1) is not None

    def may_call(self, calls: int) -> bool:
        """See ``Watch``; with no token left, nobody would read the results."""
        if self._cut and self._at_cut and not self._cut.called:
            return False
        return not calls or (not self.tree.budget.exhausted and self.tree.budget.take_calls(calls))

    def not_called(self, calls: int) -> None:
        """See ``Watch``."""
        self.tree.budget.return_calls(calls)

    def stepping(self, calls: int) -> AbstractAsyncContextManager[None]:
        """See ``Watch``."""
        room = self.tree.ground.calls.hold(calls) if calls else nullcontext()
        return room if self._forking is None or self._forking.is_set() else _after(self._forking, room, self.progress)

    async def observed(self) -> None:
        """See ``Watch``."""
        self._asked = False
        self.streak = self.streak + 1 if self.forked else 0
        self.forked = False
        if self.tree.policy.keeps:
            await self.tree.keep(self)
        if not self.first_tokens:
            self._ask((), ())

    # -- branching ------------------------------------------------------------------------------------------------

    def _ask(self, before: Sequence[float], after: Sequence[float]) -> None:
        """Let the policy decide at the last tool result, once."""
        self._asked = True
        tree, turn = self.tree, self.progress.turns
        if not (self.branching and tree.policy.forks) or tree.policy.keeps:
            return
        child = (*self.name, turn)
        seed = tree.derive("decide", *child)
        first = self.openings[0] if self.openings else ()
        point = Point(seed, first, before, after, self.writer.vocabulary, self.streak)
        wanted, signal, draw = tree.policy.decide(point)
        decision = Decision(self.name, turn, signal, draw, wanted, granted=False)
        if wanted and tree.grant(child):
            self.forked = True
            self._forking = asyncio.Event()
            writer = self.writer.fork(tree.derive(*child))  # now: where a turn is short, its end is written next
            self.group.create_task(tree.branch(self, child, decision, self._forking, writer, self.progress.fork()))
        else:
            self.forked = wanted and tree.record is not None and tree.record.began(child)
            tree.decide(replace(decision, reason=NO_LEAF) if wanted else decision)

    @property
    def has_branched(self) -> bool:
        """Whether a branch began from it, whatever became of that."""
        return self._forking is not None

    @property
    def _at_cut(self) -> bool:
        """Whether this is where the recorded trajectory's budget was spent."""
        return self._cut is not None and self._written >= self._cut.tokens


class Tree:
    """What a policy grows.

    Args:
        ground: what it shares with other trees.
        task: what is played.
        policy: who decides.
        leaves: trajectories to deliver.
        budget: what may be spent.
        seed: what all its seeds derive from, with the task's id and ``copy``.
        copy: see ``RolloutTree``.
        record: of the tree that this one grows again; None: it is a new one.

    Attributes:
        unclaimed: leaves that nobody has begun.
    """

    def __init__(
        self,
        ground: Ground,
        task: Task,
        policy: Policy,
        *,
        leaves: int,
        budget: Budget,
        seed: int,
        copy: int = 1,
        record: Record | None = None,
    ) -> None:
        self.ground, self.task, self.policy, self.leaves, self.budget = ground, task, policy, leaves, budget
        self.seed, self.copy, self.record = seed, copy, record
        self.unclaimed = record.roots if record else leaves
        self._roots = self._started = 0
        self._played: list[Played] = []
        self._decisions: list[Decision] = []
        self._states: list[State] = []
        self._counts: Counter[str] = Counter()

    # -- for the scheduler ----------------------------------------------------------------------------------------

    async def grow(self) -> RolloutTree:
        """Play everything; the finished tree."""
        began = time.perf_counter()
        try:
            await self.policy.grow(self)
        finally:
            await close(*(state.env for state in self._states))
        self._counts["roots"] = self._roots
        spent = {"tokens": self.budget.tokens, "calls": self.budget.calls, **self._counts}
        return assemble(
            RolloutTree(
                self.task,
                (),
                (),
                self.ground.params.temperature,
                self.ground.params.top_p,
                self.seed,
                self.copy,
                tuple(sorted(self._decisions, key=lambda each: (each.name, each.turn))),
                {name: float(count) for name, count in spent.items()} | {"seconds": time.perf_counter() - began},
            ),
            sorted(self._played, key=lambda played: played.leaf.name),
        )

    # -- for policies ---------------------------------------------------------------------------------------------

    def derive(self, *parts: int | str) -> int:
        """A seed of this tree."""
        return derive_seed(self.seed, self.task.id, self.copy, *parts)

    def claim(self, count: int) -> int:
        """Take up to ``count`` of the leaves that nobody has begun; how many. None once the budget is spent."""
        taken = 0 if self.budget.exhausted else min(count, self.unclaimed)
        self.unclaimed -= taken
        return taken

    async def plant(self, *, branching: bool = True) -> Trajectory | None:
        """Play a new trajectory from the prompt, until it and everything that branches off it has ended.

        None where the budget was spent before there was room for it.
        """
        async with asyncio.TaskGroup() as group, self.ground.live.hold(rank=self._rank()):
            if self.budget.exhausted:
                return None
            number = self._number()
            for attempt in range(self.ground.retries + 1):
                seed = self.derive(number)
                env, writer = self.ground.make_env(), self.ground.make_writer(seed)
                trajectory = Trajectory(self, (number,), group, env, writer, Progress(), branching=branching)
                played = await self._play(trajectory, seed)
                if not played.leaf.outcome.failed or attempt == self.ground.retries:
                    break
                self._counts["retried"] += 1
                if trajectory.has_branched:  # its branches keep the name that theirs begin with
                    number = self._number()
                else:
                    await self._forget(number)
            self._deliver(played)
        return trajectory

    def _number(self) -> int:
        self._roots += 1
        return self._roots - 1

    async def _forget(self, number: int) -> None:
        """Nothing of root ``number`` has been, so that it can be played again."""
        self._decisions = [decision for decision in self._decisions if decision.name != (number,)]
        states = self.states(number)
        self._states = [state for state in self._states if state not in states]
        await close(*(state.env for state in states))

    async def expand(self, state: State, draw: int, group: asyncio.TaskGroup) -> None:
        """Play on from a kept state; ``draw`` numbers the draws of its tree."""
        name = (*state.name, state.turn, draw)
        env = await self._fork(state.env, state.name)
        if isinstance(env, str):
            self._counts["forks_failed"] += 1
            return
        seed = self.derive(*name)
        twin = Trajectory(
            self,
            name,
            group,
            env,
            state.writer.fork(seed),
            state.progress.fork(),
            openings=list(state.watch.openings[: state.turn]),
            parent=state.watch,
        )
        played = await self._play_fork(twin, seed)
        if played.leaf.outcome.failed and self.record is None:
            self._counts["dropped"] += 1
            return
        self._counts["branches"] += 1
        self._deliver(played)

    def states(self, number: int) -> list[State]:
        """The kept states of the trees that began with root ``number``, in order."""
        found = [state for state in self._states if state.name[0] == number]
        return sorted(found, key=lambda state: (state.name, state.turn))

    def prune(self, number: int, keep: int, rng: Random) -> int:
        """Deliver ``keep`` of the trajectories that began with root ``number``, drawn without replacement.

        Returns:
            How many there were to keep: fewer where forks failed.
        """
        own = sorted((p for p in self._played if p.leaf.name[0] == number), key=lambda p: p.leaf.name)
        usable = [played for played in own if not played.leaf.outcome.failed]
        kept = rng.sample(usable, keep) if len(usable) > keep else usable or own[:keep]
        self._counts["pruned"] += len(own) - len(kept)
        self._played = [played for played in self._played if played not in own or played in kept]
        return len(kept)

    # -- for trajectories -----------------------------------------------------------------------------------------

    def grant(self, child: Name) -> bool:
        """Whether a branch may begin, which takes a leaf."""
        if self.record is not None:
            return self.record.grants(child)
        return self.claim(1) == 1

    def decide(self, decision: Decision) -> None:
        """Note a decision."""
        self._decisions.append(decision)

    async def branch(
        self,
        parent: Trajectory,
        name: Name,
        decision: Decision,
        forked: asyncio.Event,
        writer: Writer,
        progress: Progress,
    ) -> None:
        """Fork the environment of ``parent``, tell it by ``forked`` to go on, and play the sibling to its end.

        ``writer`` and ``progress`` were forked when the decision was made: the parent goes on writing meanwhile.
        """
        openings = list(parent.openings[: progress.turns])
        try:
            env = await self._fork(parent.env, parent.name)
        finally:
            forked.set()
        if isinstance(env, str):
            self._counts["forks_failed"] += 1
            self._give_back()
            self.decide(replace(decision, reason=env))
            return
        ancestor: Trajectory | None = parent
        while ancestor is not None:
            ancestor.branches, ancestor = ancestor.branches + 1, ancestor.parent
        twin = Trajectory(
            self, name, parent.group, env, writer, progress, openings, streak=parent.streak, parent=parent, forked=True
        )
        played = await self._play_fork(twin, self.derive(*name))
        if played.leaf.outcome.failed and self.record is None:
            self._counts["dropped"] += 1
            self._give_back()
            self.decide(replace(decision, reason=f"the branch ended with {played.leaf.outcome}"))
            return
        self._counts["branches"] += 1
        self.decide(replace(decision, granted=self.record is None or name not in self.record.hidden))
        self._deliver(played)

    async def keep(self, trajectory: Trajectory) -> None:
        """Keep the state that ``trajectory`` is in."""
        env = await self._fork(trajectory.env, trajectory.name)
        if isinstance(env, str):
            self._counts["forks_failed"] += 1
            return
        progress, writer = trajectory.progress.fork(), trajectory.writer.fork(0)
        self._states.append(State(trajectory.name, progress.turns, env, writer, progress, trajectory))

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _fork(self, env: Env, name: Name) -> Env | str:
        """A fork of ``env``, that of ``name``, or why there is none: its failure is not the trajectory's."""
        if self.ground.prepare is not None:
            self.ground.prepare(env, name)
        try:
            async with asyncio.timeout(min(self.ground.deadline, self.budget.seconds_left)):
                twin = await env.fork()
        except (SamplerError, UserError, IsolationUnavailable):
            raise
        except (ForkRefused, EnvError) as refusal:
            return f"{type(refusal).__name__}: {refusal}"
        except Exception as failure:  # whatever the environment raises, only the sibling is lost
            return f"fork() raised {type(failure).__name__}: {failure}"
        if level := getattr(twin, "forked", None):
            self._counts[f"forks_{level}"] += 1
        return twin

    async def _play_fork(self, trajectory: Trajectory, seed: int) -> Played:
        try:
            async with self.ground.live.hold(rank=self._rank()):
                return await self._play(trajectory, seed)
        finally:
            await close(trajectory.env)  # where it was cancelled before it began

    def _give_back(self) -> None:
        """A branch's leaf is to be played anew from the prompt; where a tree is grown again, that is in its record."""
        if self.record is None:
            self.unclaimed += 1

    async def _play(self, trajectory: Trajectory, seed: int) -> Played:
        key = (self.task.id, self.copy, trajectory.name)
        left = self.budget.seconds_left
        self.ground.playing[key] = trajectory.progress
        if self.ground.prepare is not None:
            self.ground.prepare(trajectory.env, trajectory.name)
        try:
            played = await play(
                trajectory.env,
                self.task,
                trajectory.writer,
                seed=seed,
                deadline=min(self.ground.deadline, left),
                watch=trajectory,
                progress=trajectory.progress,
            )
        finally:
            del self.ground.playing[key]
        if played.leaf.outcome is Outcome.TIMEOUT and left < self.ground.deadline:
            played = replace(played, leaf=replace(played.leaf, outcome=Outcome.BUDGET, error=None))
        return replace(played, leaf=replace(played.leaf, name=trajectory.name))

    def _deliver(self, played: Played) -> None:
        if self.record is not None and played.leaf.name in self.record.hidden:
            return
        self._played.append(played)
        if self.ground.progress is not None:
            self.ground.progress(played.leaf)

    def _rank(self) -> int:
        """How many trajectories of this tree went before: who has had least goes first."""
        self._started += 1
        return self._started


@asynccontextmanager
async def _after(
    forked: asyncio.Event, room: AbstractAsyncContextManager[None], progress: Progress
) -> AsyncIterator[None]:
    """``room``, but not before the state has been forked."""
    with progress.waiting_for("a fork of its state"):
        await forked.wait()
    async with room:
        yield


def assemble(tree: RolloutTree, group: Sequence[Played]) -> RolloutTree:
    """``tree`` with the nodes and leaves of ``group``. A node that several trajectories hold is one node.

    Equal prompts are one root; an environment whose prompt depends on the seed gets several.
    """
    nodes: list[Node] = []
    places: dict[tuple[int, ...] | int, int] = {}
    leaves: list[Leaf] = []
    for played in group:
        parent = -1
        for node in played.nodes:
            key = node.token_ids if parent < 0 else id(node)
            if key not in places:
                places[key] = len(nodes)
                nodes.append(replace(node, parent=parent))
            parent = places[key]
        leaves.append(replace(played.leaf, node=parent))
    return replace(tree, nodes=tuple(nodes), leaves=tuple(leaves))
