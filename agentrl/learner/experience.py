"""Rollout trees laid out flat: one row per scored leaf, which is how the published formulas are written.

Index names: ``L`` leaves, ``T`` tokens of the longest path, ``U`` turns of a path. A token that several leaves share
stands in each of their rows; ``token`` tells that it is the same one, and ``pack`` computes it once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import TrainingError
from agentrl.types import Leaf, Node, Outcome, RolloutTree


@dataclass(frozen=True, slots=True)
class Experience:
    """What a step learns from, on the CPU.

    Attributes:
        token_ids: [L, T] int64, 0 in the padding.
        lengths: [L] int64, tokens of each path.
        mask: [L, T] bool, True on policy tokens. A path's first token has nothing before it and is never one.
        sampled_logprobs: [L, T] float32, the sampler's; 0 where masked.
        entropies: [L, T] float32, the sampler's, in nats; 0 where masked, NaN where the sampler reported none.
        turn: [L, T] int64, the number of the policy turn from 0; -1 where masked.
        token: [L, T] int64, equal numbers are the same token of the same rollout tree; -1 in the padding.
        rewards: [L] float64.
        group: [L] int64, the task.
        subtree: [L] int64, which of the task's trees (Tree-GRPO's M): the number of the root trajectory that the leaf's
            name begins with, since a tree may be expanded at the prompt too; without names, what grew from one first
            node after the prompt.
        truncated: [L] bool, the token budget ended the path.
        observations: [L][U] what stood before each turn: a tool's results, or the prompt.
    """

    token_ids: Tensor
    lengths: Tensor
    mask: Tensor
    sampled_logprobs: Tensor
    entropies: Tensor
    turn: Tensor
    token: Tensor
    rewards: Tensor
    group: Tensor
    subtree: Tensor
    truncated: Tensor
    observations: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, rows: Tensor) -> Experience:
        """The leaves ``rows`` [l], in that order, and no more columns than they need."""
        width = int(self.lengths[rows].max()) if len(rows) else 0
        changed: dict[str, Any] = {"observations": tuple(self.observations[row] for row in rows.tolist())}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = value[rows, :width] if value.dim() == 2 else value[rows]
        return Experience(**changed)

    def describe(self, row: int) -> dict[str, Any]:
        """One leaf as plain data, for ``failures/``."""
        length = int(self.lengths[row])
        return {
            "token_ids": self.token_ids[row, :length].tolist(),
            "policy": self.mask[row, :length].tolist(),
            "old_logprobs": self.sampled_logprobs[row, :length].tolist(),
            "reward": float(self.rewards[row]),
        }


def experience(trees: Sequence[RolloutTree]) -> Experience:
    """The scored leaves of ``trees``, in order.

    Raises:
        TrainingError: a policy token without the log-prob that it was sampled with, entropies for some tokens of a span
            and not for others, or a leaf whose path does not lead to a root.
    """
    rows = [
        _row(tree, leaf, group, start)
        for group, (tree, start) in enumerate(zip(trees, _token_numbers(trees), strict=True))
        for leaf in tree.scored()
    ]
    return Experience(
        token_ids=_table(rows, "token_ids", 0, torch.int64),
        lengths=torch.tensor([len(row["token_ids"]) for row in rows], dtype=torch.int64),
        mask=_table(rows, "mask", False, torch.bool),
        sampled_logprobs=_table(rows, "logprobs", 0.0, torch.float32),
        entropies=_table(rows, "entropies", 0.0, torch.float32),
        turn=_table(rows, "turn", -1, torch.int64),
        token=_table(rows, "token", -1, torch.int64),
        rewards=torch.tensor([row["reward"] for row in rows], dtype=torch.float64),
        group=torch.tensor([row["group"] for row in rows], dtype=torch.int64),
        subtree=torch.tensor([row["subtree"] for row in rows], dtype=torch.int64),
        truncated=torch.tensor([row["truncated"] for row in rows], dtype=torch.bool),
        observations=tuple(tuple(row["observations"]) for row in rows),
    )


def _row(tree: RolloutTree, leaf: Leaf, group: int, start: list[int]) -> dict[str, Any]:
    row: dict[str, Any] = {name: [] for name in ("token_ids", "mask", "logprobs", "entropies", "turn", "token")}
    observations: list[str] = []
    waiting: list[str] = []
    below = leaf.node
    for index in _path(tree, leaf):
        node, size = tree.nodes[index], len(tree.nodes[index].token_ids)
        own = node.author == "policy" and size > 0
        if own and len(node.logprobs) != size:
            raise TrainingError(
                f"task {tree.task.id!r}, node {index}: {size} policy tokens and {len(node.logprobs)} log-probs; "
                "expected one for each, since the loss divides by the policy that sampled: train with a sampler that "
                "reports them."
            )
        if own and len(node.entropies) not in (0, size):
            raise TrainingError(
                f"task {tree.task.id!r}, node {index}: {size} policy tokens and {len(node.entropies)} entropies; "
                "expected one for each, or none at all from a sampler that does not report them."
            )
        if own and (waiting or not observations):  # else the turn goes on, as after a branch in the middle of it
            observations.append("\n".join(waiting))
            waiting = []
        if not own:
            waiting.append(_content(node))
        if node.parent >= 0 and tree.nodes[node.parent].parent < 0:
            below = index
        row["token_ids"] += node.token_ids
        row["mask"] += [own] * size
        row["logprobs"] += node.logprobs if own else [0.0] * size
        row["entropies"] += (node.entropies or [math.nan] * size) if own else [0.0] * size
        row["turn"] += [len(observations) - 1 if own else -1] * size
        row["token"] += range(start[index], start[index] + size)
    if row["mask"] and row["mask"][0]:
        row["mask"][0], row["logprobs"][0], row["entropies"][0], row["turn"][0] = False, 0.0, 0.0, -1
    return row | {
        "reward": leaf.reward,
        "group": group,
        "subtree": leaf.name[0] if leaf.name else below,
        "truncated": leaf.outcome is Outcome.LENGTH,
        "observations": observations,
    }


def _path(tree: RolloutTree, leaf: Leaf) -> list[int]:
    """Indices of the nodes from the root to ``leaf``."""
    chain: list[int] = []
    index = leaf.node
    while not (index == -1 and chain):
        if not 0 <= index < len(tree.nodes) or len(chain) == len(tree.nodes):
            raise TrainingError(
                f"task {tree.task.id!r}: the path of the scored leaf at node {leaf.node} goes to node {index} after "
                f"{len(chain)} of the tree's {len(tree.nodes)} nodes; expected parents that lead to a root, whose own "
                "parent is -1."
            )
        chain.append(index)
        index = tree.nodes[index].parent
    return chain[::-1]


def _content(node: Node) -> str:
    """What a node says; its tokens where it has no messages."""
    return "\n".join(m.content for m in node.messages) if node.messages else " ".join(map(str, node.token_ids))


def _token_numbers(trees: Sequence[RolloutTree]) -> list[list[int]]:
    """The number of each node's first token; all tokens of all trees are counted through."""
    numbers: list[list[int]] = []
    count = 0
    for tree in trees:
        numbers.append([])
        for node in tree.nodes:
            numbers[-1].append(count)
            count += len(node.token_ids)
    return numbers


def _table(rows: Sequence[dict[str, Any]], name: str, padding: Any, dtype: torch.dtype) -> Tensor:
    table = torch.full((len(rows), max((len(row[name]) for row in rows), default=0)), padding, dtype=dtype)
    for line, row in zip(table, rows, strict=True):
        line[: len(row[name])] = torch.tensor(row[name], dtype=dtype)
    return table
