"""Growing an ``expand_tree`` again where its record does not hold all that was played."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from agentrl.rollout.policies import Policy
from agentrl.rollout.record import Name, lineage
from agentrl.rollout.tree import Tree


class Follow(Policy):
    """Expand the states that recorded leaves began from, and no others, instead of drawing them.

    What was pruned or dropped is not in a record, and what was drawn depends on it.
    """

    keeps: ClassVar[bool] = True
    names: tuple[Name, ...]

    async def grow(self, tree: Tree) -> None:
        """Every root on its own."""
        async with asyncio.TaskGroup() as roots:
            for _ in range(tree.claim(tree.unclaimed)):
                roots.create_task(self._one(tree))

    async def _one(self, tree: Tree) -> None:
        chain = await tree.plant()
        assert chain is not None, "nothing limits what is grown again"
        if chain is None:
            return
        wanted = {name for leaf in self.names if leaf[:1] == chain.name for _, name in lineage(leaf, keeps=True)}
        for depth in sorted({len(name) for name in wanted - {chain.name}}):
            states = {(state.name, state.turn): state for state in tree.states(chain.name[0])}
            async with asyncio.TaskGroup() as group:
                for *above, turn, draw in sorted(name for name in wanted if len(name) == depth):
                    if state := states.get((tuple(above), turn)):
                        group.create_task(tree.expand(state, draw, group))
