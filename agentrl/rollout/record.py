"""What a recorded tree tells one that is grown again: whatever hung on time and not on seeds.

Tokens, tool calls and decisions follow from seeds. Three things do not: which branches found a leaf left in the
budget, how many trajectories began from the prompt, and where a budget cut one off. They are read from the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from agentrl.seeds import derive_seed
from agentrl.types import Decision, Leaf, Node, Outcome, RolloutTree, ToolResult

NO_LEAF = "no leaf was left in the budget"
"""The reason of a decision whose branch never began; with any other one it did, and failed."""

Name = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a budget ended a trajectory.

    Attributes:
        tokens: of the policy, from the root on.
        called: whether the calls of the last turn were still made.
    """

    tokens: int
    called: bool


@dataclass(frozen=True, slots=True)
class Record:
    """What a tree that is grown again takes from its record.

    Attributes:
        roots: trajectories that began from the prompt.
        decisions: by the name of the branch that was decided on.
        cuts: of the trajectories that a budget ended.
        hidden: roots, and branches that leaves began from, that are no leaves: they failed, or were pruned.
    """

    roots: int
    decisions: Mapping[Name, Decision]
    cuts: Mapping[Name, Cut]
    hidden: frozenset[Name]

    @classmethod
    def of(cls, tree: RolloutTree, keeps: bool, *, pruned: bool = False) -> Record:
        """Read from ``tree``.

        Args:
            tree: as recorded.
            keeps: whether its policy comes back to states that were left, see ``lineage``.
            pruned: whether the tree that is grown again prunes by itself, so that nothing has to be hidden.
        """
        names, roots = {leaf.name for leaf in tree.leaves}, int(tree.spent["roots"])
        above = {name for leaf in names for _, name in lineage(leaf, keeps)} | {(number,) for number in range(roots)}
        return cls(
            roots,
            {(*decision.name, decision.turn): decision for decision in tree.decisions},
            {
                leaf.name: _cut(tree, leaf)
                for leaf in tree.leaves
                if leaf.outcome is Outcome.BUDGET and not unfinished(tree, leaf)
            },
            frozenset() if pruned else frozenset(above - names),
        )

    def grants(self, child: Name) -> bool:
        """Whether the branch ``child`` began and is a leaf, or leaves began from it."""
        return child in self.hidden or (child in self.decisions and self.decisions[child].granted)

    def began(self, child: Name) -> bool:
        """Whether the branch ``child`` began, whatever became of it: that is what its path's streak counts."""
        decision = self.decisions.get(child)
        return decision is not None and decision.wanted and decision.reason != NO_LEAF


class Turn(NamedTuple):
    """One policy turn of a record.

    Attributes:
        owner: the trajectory that wrote it.
        number: policy turns before it.
        seed: that it was sampled with.
        prompt: [T] every token before it.
        node: what was written.
        results: of its calls; empty where they are not in the record.
    """

    owner: Name
    number: int
    seed: int
    prompt: tuple[int, ...]
    node: Node
    results: tuple[ToolResult, ...]


def dotted(name: Name) -> str:
    """A trajectory's name as it is written: ``0.2``."""
    return ".".join(map(str, name))


def lineage(name: Name, keeps: bool) -> list[tuple[int, Name]]:
    """(first turn of its own, name) of the trajectories that ``name`` came from, the root first and itself last.

    A name has a turn for every fork; where the policy ``keeps`` states, a turn and the number of the draw.
    """
    step = 2 if keeps else 1
    return [(0, name[:1]), *((name[end - step], name[:end]) for end in range(1 + step, len(name) + 1, step))]


def turns(tree: RolloutTree, keeps: bool) -> Iterator[Turn]:
    """Every policy turn of ``tree``, once, with whose it is."""
    met: set[tuple[Name, int]] = set()
    for leaf in tree.leaves:
        line, path, prompt, number = lineage(leaf.name, keeps), tree.path(leaf), tuple[int, ...](), 0
        for place, node in enumerate(path):
            if node.author == "policy":
                owner = [name for first, name in line if first <= number][-1]
                if (owner, number) not in met:
                    met.add((owner, number))
                    seed = derive_seed(derive_seed(tree.seed, tree.task.id, tree.copy, *owner), number)
                    after = path[place + 1].tool_results if place + 1 < len(path) else leaf.tool_results
                    yield Turn(owner, number, seed, prompt, node, after)
                number += 1
            prompt += node.token_ids


def unfinished(tree: RolloutTree, leaf: Leaf) -> bool:
    """Whether ``leaf`` failed, or the clock stopped it in the middle of a turn: neither comes again in its place."""
    path = tree.path(leaf)
    written = sum(node.author == "policy" for node in path)
    # Who is stopped before it writes has begun a turn that no node holds; who is stopped while it does has not.
    stopped = leaf.metrics.get("turns", 0) == written and (not path or path[-1].author != "policy")
    return leaf.outcome.failed or (leaf.outcome is Outcome.BUDGET and stopped)


def _cut(tree: RolloutTree, leaf: Leaf) -> Cut:
    path = tree.path(leaf)
    written = sum(len(node.token_ids) for node in path if node.author == "policy")
    return Cut(written, not path or path[-1].author != "policy")
