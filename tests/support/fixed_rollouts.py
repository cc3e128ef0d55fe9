"""Rollouts that nobody has to sample: random tokens with random log-probs and rewards of 0 and 1."""

from __future__ import annotations

import torch

from agentrl.types import Leaf, Node, Outcome, RolloutTree, Task


def fixed_rollouts(seed: int, *, vocabulary: int = 97, cut: int | None = None) -> list[RolloutTree]:
    """Five groups of three answers, 12 to 16 tokens long, to prompts of 10 tokens.

    Args:
        seed: of everything.
        vocabulary: tokens are below it.
        cut: the group whose answers were all cut off, so that a learner with an overlong filter learns nothing from it.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    trees = []
    for group in range(5):
        nodes, leaves = [Node(-1, "prompt", tokens(10))], []
        for number in range(3):
            length = 12 + 2 * number
            logprobs = tuple((-4.5 - torch.rand(length, generator=generator)).tolist())
            nodes.append(Node(0, "policy", tokens(length), logprobs, (1.0,) * length, (0,) * length))
            outcome = Outcome.LENGTH if group == cut else Outcome.ANSWERED
            leaves.append(Leaf(number + 1, float((group + number) % 2), outcome))
        trees.append(RolloutTree(Task(f"task {group}"), tuple(nodes), tuple(leaves), 1.0))
    return trees
