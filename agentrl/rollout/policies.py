"""Branching policies: when a trajectory gets a sibling, and what becomes of the leaves that are left.

Each is a record of its options with a ``grow``, which plants trajectories in a ``Tree`` until its leaves are used up,
and a ``decide``, which says at a tool result whether to branch there. Episodes know nothing of them.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agentrl.errors import ConfigError, UnknownName
from agentrl.rollout.tree import Point, Tree
from agentrl.rollout.uncertainty import entropy_change
from agentrl.seeds import derive_seed


class Verdict(NamedTuple):
    """Whether to branch, and why: see ``types.Decision``."""

    wanted: bool
    signal: float | None = None
    draw: float | None = None


class Policy(BaseModel):
    """The options of a policy; closed to unknown names.

    Attributes:
        forks: whether it needs the environment's state.
        keeps: whether it comes back to states that the trajectory has left.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    forks: ClassVar[bool] = True
    keeps: ClassVar[bool] = False

    @property
    def looks_at(self) -> int:
        """Tokens of a turn that ``decide`` waits for; 0: it decides at the tool result itself."""
        return 0

    @property
    def needs_entropies(self) -> bool:
        """Whether it decides by them."""
        return False

    def check(self, leaves: int, max_tokens: int) -> None:
        """Refuse options that do not go with ``rollout.group`` and ``rollout.max_tokens``.

        Raises:
            ConfigError: naming both.
        """

    def decide(self, point: Point) -> Verdict:
        """Whether to branch at ``point``."""
        return Verdict(False)

    async def grow(self, tree: Tree) -> None:
        """Plant trajectories until ``tree`` has its leaves, or its budget is spent."""
        raise NotImplementedError


class Group(Policy):
    """As many trajectories from the prompt as there are leaves, as in GRPO."""

    forks: ClassVar[bool] = False

    async def grow(self, tree: Tree) -> None:
        """All at once."""
        await plant_all(tree, tree.claim(tree.leaves))


class _Branching(Policy):
    """Begins with some trajectories; the others branch off at tool results, or begin anew where too few do."""

    initial: int | None = Field(None, ge=1, description="trajectories to begin with; none: half of the leaves")
    first_tokens: int = Field(0, ge=0, description="k: tokens of a turn that are waited for; 0: none")

    @property
    def looks_at(self) -> int:
        """See ``Policy.looks_at``."""
        return self.first_tokens

    def check(self, leaves: int, max_tokens: int) -> None:
        """See ``Policy.check``."""
        if self.initial is not None and self.initial > leaves:
            raise ConfigError(
                f"rollout.policy_options.initial: expected at most rollout.group = {leaves} trajectories to begin "
                f"with, got {self.initial}."
            )
        if self.first_tokens > max_tokens:
            raise ConfigError(
                f"rollout.policy_options.first_tokens: expected at most rollout.max_tokens = {max_tokens}, since no "
                f"turn is longer, got {self.first_tokens}."
            )

    async def grow(self, tree: Tree) -> None:
        """Nothing waits for the slowest: who ends without having used its share of branches leaves it to new roots."""
        initial, begun = await self.begin(tree)
        share = (tree.leaves - initial) / initial
        async with asyncio.TaskGroup() as roots:
            for i in range(begun, begun + tree.claim(initial - begun)):
                # Shares are whole numbers that add up to what is left.
                roots.create_task(_root(tree, math.floor(share * (i + 1)) - math.floor(share * i)))
        while count := tree.claim(tree.leaves):
            await plant_all(tree, count)

    async def begin(self, tree: Tree) -> tuple[int, int]:
        """How many trajectories to begin with, and how many of them have begun already."""
        return self.initial or max(tree.leaves // 2, 1), 0


class EntropyTree(_Branching):
    """Branch where the policy is less certain after a tool result than it was at first: ARPO, and with options AEPO.

    With dH = ``entropy_change`` of the first k tokens *after* the tool result (``first_tokens``) against the first k of
    the trajectory, and P = (alpha + beta dH) max(0, 1 - penalty l), l the tool results in a row at which this path
    branched: ``threshold`` branches where P > tau, ``bernoulli`` with probability P. A branch begins *before* the k
    tokens, in a fork of the environment, while the trajectory goes on. One that has branched off is asked again from
    the next tool result on, and compares with its root's first tokens.

    ``arpo_code`` is the released code's rule: the segment that *ends* with the call, with probability
    ``clip(alpha + beta dH, 0, 1)``. Its entropies are exact here, there of the 10 likeliest tokens.

    With ``monitor`` (AEPO), one trajectory goes ahead, and ``clip(int(G sigmoid((H_first - H_tools) / 2)) + 1, 1, G)``
    of the G leaves are begun from the prompt, itself among them; H are mean entropies over ln|V| of the first tokens
    of its first turn and of those after tools.

    Sources: ARPO, arXiv:2507.19849, section 3.1; AEPO, arXiv:2510.14545, section 3.1; the released code at
    RUC-NLPIR/ARPO@a95cd089. Differences: docs/rollouts.md.
    """

    first_tokens: int = Field(20, ge=1, description="k: tokens of a turn that are looked at")
    alpha: float = Field(0.5, description="P where the policy is as certain as at first")
    beta: float = Field(0.2, description="weight of the change of entropy")
    tau: float = Field(0.5, description="P above which threshold branches")
    rule: Literal["threshold", "bernoulli", "arpo_code"] = Field("threshold", description="how P decides")
    normalize: Literal["log", "size"] = Field("log", description="entropies over ln|V|, or over |V| as in ARPO's text")
    penalty: float = Field(0.0, ge=0, le=1, description="off P for each branch in a row on the path; AEPO: 0.05")
    monitor: bool = Field(False, description="AEPO: one trajectory decides how many begin from the prompt")

    @property
    def needs_entropies(self) -> bool:
        """Always."""
        return True

    def check(self, leaves: int, max_tokens: int) -> None:
        """See ``Policy.check``."""
        super().check(leaves, max_tokens)
        if self.monitor and self.initial is not None:
            raise ConfigError("rollout.policy_options: expected monitor or initial, which says the same, got both.")

    def decide(self, point: Point) -> Verdict:
        """See the class."""
        uniform = random.Random(point.seed).random()
        segment = point.before if self.rule == "arpo_code" else point.after
        scale = point.vocabulary if self.normalize == "size" else math.log(point.vocabulary)
        signal = entropy_change(segment, point.first, scale, first_tokens=self.first_tokens)
        p = (self.alpha + self.beta * signal) * max(0.0, 1 - self.penalty * point.streak)
        if self.rule == "threshold":
            return Verdict(p > self.tau, signal)
        return Verdict(uniform < p, signal, uniform)

    async def begin(self, tree: Tree) -> tuple[int, int]:
        """See ``_Branching.begin``; with ``monitor`` after the first of them has ended."""
        if not self.monitor:
            return await super().begin(tree)
        ahead = await tree.plant(branching=False) if tree.claim(1) else None
        if ahead is None:
            return 1, 1
        first, *tools = [_mean(opening) / math.log(ahead.writer.vocabulary) for opening in ahead.openings] or [0.0]
        gap = first - _mean(tools)
        return min(int(tree.leaves / (1 + math.exp(-0.5 * gap))) + 1, tree.leaves), 1


class RandomTree(_Branching):
    """The control of ``entropy_tree``: branches at every tool result with the same probability, whatever it says."""

    probability: float = Field(0.5, ge=0, le=1, description="of a branch at a tool result")

    def decide(self, point: Point) -> Verdict:
        """A coin."""
        uniform = random.Random(point.seed).random()
        return Verdict(uniform < self.probability, None, uniform)


class ExpandTree(Policy):
    """Tree-GRPO: play M trajectories, go back to some of their turns, and play on from there.

    In each of L rounds and in each tree, N of its states are drawn, with replacement: the prompt, and what is after
    each tool result; each is played to the end. K = G / M leaves of each tree are kept, drawn without replacement: the
    1 + N L that a tree has cost less than K M whole trajectories. With ``rank = "entropy"`` the N states are those
    whose next turn began least certainly, not random ones.

    Source: Tree-GRPO, arXiv:2509.21240, section 3.2, and its code at AMAP-ML/Tree-GRPO@90b17099.
    """

    keeps: ClassVar[bool] = True
    trees: int = Field(2, ge=1, description="M: trajectories to begin with")
    nodes: int = Field(3, ge=1, description="N: states to expand, of each tree and round; the paper has 2")
    rounds: int = Field(1, ge=1, description="L")
    rank: Literal["random", "entropy"] = Field("random", description="which states")

    @property
    def needs_entropies(self) -> bool:
        """Where they rank the states."""
        return self.rank == "entropy"

    def check(self, leaves: int, max_tokens: int) -> None:
        """See ``Policy.check``."""
        most = 1 + self.nodes * self.rounds
        if leaves % self.trees or leaves // self.trees > most:
            raise ConfigError(
                f"rollout.policy_options: expected rollout.group = trees x leaves of each, and at most 1 + nodes x "
                f"rounds = {most} leaves of each, got group {leaves} and trees {self.trees}."
            )

    async def grow(self, tree: Tree) -> None:
        """Each of the trees on its own; a leaf that cannot be had for failed forks becomes a new root."""
        async with asyncio.TaskGroup() as trees:
            for _ in range(tree.claim(self.trees)):
                trees.create_task(self._one(tree))

    async def _one(self, tree: Tree) -> None:
        chain = await tree.plant()
        if chain is None:
            return
        number = chain.name[0]
        rng = random.Random(derive_seed(tree.seed, tree.task.id, tree.copy, "expand", number))
        for turn in range(self.rounds):
            states = tree.states(number)
            if not states or tree.budget.exhausted:
                break
            ranked = sorted(states, key=lambda state: -_mean(state.after))  # stable: equals stay in order
            drawn = rng.choices(states, k=self.nodes)
            chosen = drawn if self.rank == "random" else [ranked[i % len(ranked)] for i in range(self.nodes)]
            async with asyncio.TaskGroup() as group:
                for i, state in enumerate(chosen):
                    group.create_task(tree.expand(state, turn * self.nodes + i, group))
        keep = tree.leaves // self.trees
        await plant_all(tree, tree.claim(keep - tree.prune(number, keep, rng)))


POLICIES: Mapping[str, type[Policy]] = {
    "group": Group,
    "entropy_tree": EntropyTree,
    "expand_tree": ExpandTree,
    "random_tree": RandomTree,
}


def make_policy(name: str, options: Mapping[str, Any], leaves: int, max_tokens: int) -> Policy:
    """The policy of ``rollout.policy`` with ``rollout.policy_options``.

    Raises:
        UnknownName: no such policy or option.
        ConfigError: a value that the option does not take, or that does not go with the others.
    """
    if name not in POLICIES:
        raise UnknownName("rollout.policy", name, POLICIES)
    kind = POLICIES[name]
    for option in options:
        if option not in kind.model_fields:
            raise UnknownName(f"option of {name}:", option, kind.model_fields)
    try:
        policy = kind(**options)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise ConfigError(
            f"rollout.policy_options.{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}, got {wrong['input']!r}."
        ) from error
    policy.check(leaves, max_tokens)
    return policy


async def plant_all(tree: Tree, count: int) -> None:
    """So many new trajectories from the prompt, all at once."""
    async with asyncio.TaskGroup() as roots:
        for _ in range(count):
            roots.create_task(tree.plant())


async def _root(tree: Tree, share: int) -> None:
    """One of the first trajectories; the branches of its share that nobody made become new roots."""
    planted = await tree.plant()
    if planted is not None:
        await plant_all(tree, tree.claim(max(0, share - planted.branches)))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
