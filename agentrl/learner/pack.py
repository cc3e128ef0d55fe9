"""Rows of tokens to a batch in which every unique token stands once.

The rows (root-to-leaf paths) are sorted. A row then shares its longest known beginning with the row before it, and
adds to the forest exactly its tokens from there on::

    row 0   a b c d        token      a b c d | e f | g
    row 1   a b e f        position   0 1 2 3   2 3   1
    row 2   a g            subtree    7 6 4 4   6 6   7   (one past the last token below it)

So a group's prompt, a branch's shared beginning and even the system prompt that all tasks of a step share go through
the model once. The tokens stand in preorder: those that a row adds are a range, those below a token are a range, and a
query sees a key exactly where ``key <= query < subtree_end[key]`` (``attention``). Everything else in a transformer
works on single tokens and needs no change but their positions.

Log-probs are computed once per unique target too, then gathered to ``[L, T]``, where losses are the flat published
formulas. A branch's first token is supervised like any other: its target points at its parent token.

Index names: ``L`` rows, ``T`` tokens of the longest, ``N`` unique tokens, ``M`` unique targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agentrl.errors import TrainingError
from agentrl.learner.attention import Plan, plan_attention

WORTH = 48
"""A beginning is shared where it saves at least one token for each ``WORTH`` tokens that then have to attend to it in a
rectangle of their own. Measured (benchmarks/learner.py) where both cost the same; few tokens fall under it, such as
the first words that some answers have in common by chance."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A forest of N unique tokens with M unique targets on L rows of at most T tokens.

    Attributes:
        token_ids: [1, N] int64, in preorder.
        position_ids: [1, N] int64, the place of each token on its rows, from 0.
        subtree_end: [N] int64, one past the last token below each token.
        parent_index: [M] int64, the token whose hidden state predicts the target.
        target_ids: [M] int64.
        gather: [L, T] int64, the target of each policy token; 0 where masked.
        mask: [L, T] bool, True on policy tokens; never at position 0, which nothing predicts.
        plan: how attention goes about this forest.
    """

    token_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    parent_index: Tensor
    target_ids: Tensor
    gather: Tensor
    mask: Tensor
    plan: Plan


def pack(
    token_ids: Tensor, lengths: Tensor, mask: Tensor, device: torch.device | str = "cpu", *, share: bool = True
) -> TrainBatch:
    """Merge rows into a forest and lay out its tensors.

    Args:
        token_ids: [L, T] int64; what stands past a row's length does not matter.
        lengths: [L] int64, tokens of each row, at least 1.
        mask: [L, T] bool, True on the policy's tokens.
        device: where the tensors go and attention will run; default: the CPU.
        share: whether rows share what they have in common; default: yes. Without, every row is a tree of its own.

    Raises:
        TrainingError: shapes that do not fit, no rows, or a length outside of [1, T].
        ConfigError: neither a CPU nor a CUDA device.
    """
    ids, sizes = _rows(token_ids, lengths)
    if mask.shape != token_ids.shape:
        raise TrainingError(
            f"pack: mask has shape {tuple(mask.shape)}, expected that of token_ids, {ids.shape}: give a flag per token."
        )
    order, shared = _sorted(ids, sizes) if share else (np.arange(len(ids)), np.zeros(len(ids), np.int64))
    ids, sizes = ids[order], sizes[order]
    shared = _worthwhile(shared, sizes)
    depth = np.arange(ids.shape[1])
    policy = mask.cpu().numpy()[order] & (depth > 0) & (depth < sizes[:, None])
    forest = _forest(shared, sizes, ids.shape[1])
    is_target = np.zeros(len(forest.row), np.bool_)
    is_target[forest.place[policy]] = True
    targets = np.flatnonzero(is_target)
    number = np.cumsum(is_target) - 1
    found = ids[forest.row, forest.depth]
    gather, flags = np.zeros_like(ids), np.zeros_like(policy)
    # Back to the order in which the rows came.
    gather[order], flags[order] = np.where(policy, number[np.where(policy, forest.place, 0)], 0), policy

    def tensor(array: Ints | Bools) -> Tensor:
        return torch.as_tensor(array, device=device)

    return TrainBatch(
        token_ids=tensor(found[None]),
        position_ids=tensor(forest.depth[None]),
        subtree_end=tensor(forest.end),
        parent_index=tensor(forest.place[forest.row[targets], forest.depth[targets] - 1]),
        target_ids=tensor(found[targets]),
        gather=tensor(gather),
        mask=tensor(flags),
        plan=plan_attention(forest.end, device),
    )


def micro_batches(token_ids: Tensor, lengths: Tensor, max_tokens: int) -> list[Tensor]:
    """Deal rows to batches for ``pack``, sorted first, so that rows with a common beginning meet in one.

    Args:
        token_ids: [L, T] int64; what stands past a row's length does not matter.
        lengths: [L] int64, tokens of each row, at least 1.
        max_tokens: most unique tokens of a batch; a longer row is alone or with rows that add nothing to it.

    Returns:
        Row indices, int64, of each batch; every row is in exactly one.

    Raises:
        TrainingError: shapes that do not fit, no rows, or a length outside of [1, T].
    """
    ids, sizes = _rows(token_ids, lengths)
    order, shared = _sorted(ids, sizes)
    parts: list[list[int]] = []
    size = 0
    for row, known, length in zip(order.tolist(), shared.tolist(), sizes[order].tolist(), strict=True):
        if parts and (length == known or size + length - known <= max_tokens):
            parts[-1].append(row)
            size += length - known
        else:
            parts.append([row])
            size = length
    return [torch.tensor(part) for part in parts]


def _rows(token_ids: Tensor, lengths: Tensor) -> tuple[Ints, Ints]:
    """The rows and their lengths in numpy, checked."""
    ids, sizes = token_ids.cpu().numpy(), lengths.cpu().numpy()
    if ids.ndim != 2 or sizes.shape != ids.shape[:1] or not ids.size:
        raise TrainingError(
            f"pack: expected token_ids [L, T] and lengths [L], both with an entry, got {ids.shape} and {sizes.shape}."
        )
    wrong = np.flatnonzero((sizes < 1) | (sizes > ids.shape[1]))
    if len(wrong):
        raise TrainingError(
            f"pack: row {wrong[0]} has length {sizes[wrong[0]]}, expected 1 to {ids.shape[1]}: leave empty rows out."
        )
    return ids, sizes


def _sorted(ids: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """The order of the rows, [L], and how many tokens each shares with the one before it, [L]."""
    # Big-endian numbers compare as bytes do; 0 past the end puts a row right before those that go on from it.
    keys = np.where(np.arange(ids.shape[1]) < sizes[:, None], ids + 1, 0).astype(">u4")
    order = np.array(sorted(range(len(ids)), key=lambda row: keys[row].tobytes()))
    keys, sizes = keys[order], sizes[order]
    same = keys[1:] == keys[:-1]
    shared = np.zeros(len(ids), np.int64)
    shared[1:] = np.where(same.all(axis=1), sizes[1:], same.argmin(axis=1))
    return order, shared


def _worthwhile(shared: Ints, sizes: Ints) -> Ints:
    """``shared`` without the beginnings that cost more to share than they save (``WORTH``); arrays are [L]."""
    shared = shared.copy()
    # Branching points above the current row, by depth: tokens below them, and the rows that part from others there.
    points: list[tuple[int, int, list[int]]] = [(0, 0, [])]
    following = [*shared[1:].tolist(), 0]
    for row, (known, length) in enumerate(zip(following, sizes.tolist(), strict=True)):
        depth, below, parting = points[-1]
        if known > depth:
            points.append((known, length - known, [row + 1]))
            continue
        points[-1] = (depth, below + length - depth, parting)
        while points[-1][0] > known:
            depth, below, parting = points.pop()
            above = max(known, points[-1][0])
            copies = 1
            if (depth - above) * len(parting) * WORTH < below:
                shared[parting] = above
                copies += len(parting)
            below += (depth - above) * copies
            parted = parting if copies > 1 else []
            if points[-1][0] == above:
                outer, already, others = points.pop()
                points.append((outer, already + below, others + parted))
            else:
                points.append((above, below, parted))
        points[-1][2].append(row + 1)
    return shared


@dataclass(frozen=True, slots=True)
class _Forest:
    """Where the tokens are.

    Attributes:
        row: [N] the sorted row that adds the token.
        depth: [N] its place on that row.
        end: [N] one past the last token below it.
        place: [L, T] the token of each place of the sorted rows; past a row's length it means nothing.
    """

    row: Ints
    depth: Ints
    end: Ints
    place: Ints


def _forest(shared: Ints, sizes: Ints, longest: int) -> _Forest:
    """Number the unique tokens of sorted rows in preorder; arrays are [L]."""
    count, depth = len(sizes), np.arange(longest)
    start = np.concatenate([[0], np.cumsum(sizes - shared)])
    fresh = depth >= shared[:, None]
    index = np.arange(count)[:, None]
    owner = np.maximum.accumulate(np.where(fresh, index, 0), axis=0)
    place = start[owner] + depth - shared[owner]
    row, at = np.nonzero(fresh & (depth < sizes[:, None]))
    # A token's subtree ends with the last row that goes on from it: before the next that is fresh at its depth.
    following = np.full((count + 1, longest), count)
    following[:count] = np.where(fresh, index, count)
    following = np.minimum.accumulate(following[::-1], axis=0)[::-1]
    return _Forest(row, at, start[following[row + 1, at]], place)
