"""TEMPORARY: the former pack.py and logprob.py, until step.py and warmstart.py have switched.

Trajectories are merged into a trie, so a group's prompt, a branch's shared beginning and even the system prompt that
all tasks of a step share are computed once. Attention alone works on root-to-leaf rows: queries, keys and values of
the unique tokens are gathered to ``[L, T]``, attended causally, and each token's output is taken from the first row it
lies on. That is exact, because a token sees nothing but its own path. The price is that a shared prefix is attended
once per row (docs/performance.md says what that costs).

Log-probs are computed once per unique target too, then gathered to ``[L, T]``, where losses are the flat published
formulas. A branch's first token is supervised like any other: its target points at its parent token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from agentrl.types import Leaf, Outcome, RolloutTree

ATTENTION = "agentrl_rows"


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One root-to-leaf path, flat.

    Attributes:
        token_ids: [T].
        policy: [T] whether the policy wrote the token.
        old_logprobs: [T] the sampler's log-probs; 0 where the policy did not write.
        advantage: the same for all tokens of the trajectory.
        truncated: whether the token budget cut it off.
    """

    token_ids: tuple[int, ...]
    policy: tuple[bool, ...]
    old_logprobs: tuple[float, ...]
    advantage: float = 0.0
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """A forest of N unique tokens with M unique targets on L paths of at most T tokens.

    Attributes:
        token_ids: [1, N].
        position_ids: [1, N] depth of each token on its path.
        blocks: rows of unique-token indices [l, t], of similar length each; together they cover all L paths.
        first: [N] where each unique token first stands among the concatenated, flattened blocks.
        parent_index: [M] unique token whose hidden state predicts the target.
        target_ids: [M].
        gather: [L, T] index into the M targets; 0 where masked.
        mask: [L, T] True on policy tokens.
        old_logprobs: [L, T].
        advantages: [L].
        truncated: [L].
    """

    token_ids: Tensor
    position_ids: Tensor
    blocks: tuple[Tensor, ...]
    first: Tensor
    parent_index: Tensor
    target_ids: Tensor
    gather: Tensor
    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    truncated: Tensor


def flatten(tree: RolloutTree, leaf: Leaf, advantage: float = 0.0) -> Trajectory:
    """The path to ``leaf`` as one trajectory."""
    ids: list[int] = []
    policy: list[bool] = []
    logprobs: list[float] = []
    for node in tree.path(leaf):
        own = node.author == "policy"
        ids.extend(node.token_ids)
        policy.extend([own] * len(node.token_ids))
        logprobs.extend(node.logprobs if own else [0.0] * len(node.token_ids))
    truncated = leaf.outcome is Outcome.LENGTH
    return Trajectory(tuple(ids), tuple(policy), tuple(logprobs), advantage, truncated)


def micro_batches(trajectories: Sequence[Trajectory], max_tokens: int) -> Iterable[list[Trajectory]]:
    """Split in order, so that neighbours (a group) stay together where they fit.

    A batch holds at most ``max_tokens`` unique tokens, counted as if only neighbours shared; one trajectory always
    fits.
    """
    batch: list[Trajectory] = []
    size = 0
    for trajectory in trajectories:
        shared = _shared(batch[-1].token_ids, trajectory.token_ids) if batch else 0
        fresh = len(trajectory.token_ids) - shared
        if batch and size + fresh > max_tokens:
            yield batch
            batch, size, fresh = [], 0, len(trajectory.token_ids)
        batch.append(trajectory)
        size += fresh
    if batch:
        yield batch


def pack(trajectories: Sequence[Trajectory], device: torch.device | str = "cpu") -> TrainBatch:
    """Merge trajectories into a trie and lay out its tensors.

    Args:
        trajectories: at least one, none empty; the first token of each is never a target.
        device: where the tensors go.
    """
    tokens: list[int] = []
    positions: list[int] = []
    child: dict[tuple[int, int], int] = {}
    target_of: dict[int, int] = {}
    parents: list[int] = []
    targets: list[int] = []
    paths: list[list[int]] = []
    longest = max(len(t.token_ids) for t in trajectories)
    gather = torch.zeros(len(trajectories), longest, dtype=torch.long)
    mask = torch.zeros(len(trajectories), longest, dtype=torch.bool)
    old = torch.zeros(len(trajectories), longest)
    for row, trajectory in enumerate(trajectories):
        node, path, where = -1, [], []
        for depth, (token, own) in enumerate(zip(trajectory.token_ids, trajectory.policy, strict=True)):
            parent, node = node, child.setdefault((node, token), len(tokens))
            if node == len(tokens):
                tokens.append(token)
                positions.append(depth)
            path.append(node)
            if own and depth and node not in target_of:
                target_of[node] = len(targets)
                parents.append(parent)
                targets.append(token)
            where.append(target_of[node] if own and depth else 0)
        paths.append(path)
        gather[row, : len(path)] = torch.tensor(where)
        mask[row, : len(path)] = torch.tensor(trajectory.policy)
        old[row, : len(path)] = torch.tensor(trajectory.old_logprobs)
    mask[:, 0] = False
    blocks, first = _blocks(paths, len(tokens))
    return TrainBatch(
        torch.tensor([tokens], device=device),
        torch.tensor([positions], device=device),
        tuple(block.to(device) for block in blocks),
        first.to(device),
        torch.tensor(parents, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        gather.to(device),
        mask.to(device),
        old.to(device),
        torch.tensor([t.advantage for t in trajectories], device=device),
        torch.tensor([t.truncated for t in trajectories], device=device),
    )


def _blocks(paths: list[list[int]], tokens: int) -> tuple[list[Tensor], Tensor]:
    """Paths in blocks whose padding is at most a quarter; padding repeats a path's last token and is never read."""
    order = sorted(range(len(paths)), key=lambda row: -len(paths[row]))
    blocks: list[Tensor] = []
    while order:
        width = len(paths[order[0]])
        count = sum(len(paths[row]) * 4 >= width * 3 for row in order)
        rows, order = order[:count], order[count:]
        blocks.append(torch.tensor([paths[row] + [paths[row][-1]] * (width - len(paths[row])) for row in rows]))
    places = torch.cat([block.flatten() for block in blocks])
    # The first occurrence is a real one, since padding only repeats; with "amin" no order of writing matters.
    first = torch.full((tokens,), len(places)).scatter_reduce(0, places, torch.arange(len(places)), "amin")
    return blocks, first


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention along every path; called by transformers in each layer with ``tree=TrainBatch`` in kwargs."""
    tree: TrainBatch = kwargs["tree"]
    heads, size = query.shape[1], query.shape[3]
    grouped = key.shape[1] != heads
    flat_q, flat_k, flat_v = (x[0].transpose(0, 1).flatten(1) for x in (query, key, value))
    outputs = []
    for block in tree.blocks:
        q, k, v = (_rows(x, block, size) for x in (flat_q, flat_k, flat_v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        outputs.append(o.transpose(1, 2).reshape(-1, heads * size))
    out = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).index_select(0, tree.first)
    return out.view(1, -1, heads, size), None


def _rows(flat: Tensor, block: Tensor, head_dim: int) -> Tensor:
    """[N, H * D] to [l, H, t, D]."""
    gathered = flat.index_select(0, block.flatten())
    return gathered.view(*block.shape, -1, head_dim).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)


def target_logprobs(model: Any, batch: TrainBatch, temperature: float = 1.0) -> Tensor:
    """Log-prob of each policy token under the tempered model, ``[L, T]``; 0 where masked.

    Args:
        model: a transformers causal language model switched to ``pack.ATTENTION``.
        batch: N unique tokens with M targets on L paths.
        temperature: that of the sampler, above 0; 0 (greedy) is scored untempered, as the sampler does.
    """
    hidden = model.get_decoder()(
        input_ids=batch.token_ids, position_ids=batch.position_ids, use_cache=False, tree=batch
    ).last_hidden_state[0]
    logits = model.get_output_embeddings()(hidden.index_select(0, batch.parent_index)).float()
    if temperature not in (0.0, 1.0):
        logits = logits / temperature
    picked = logits.gather(1, batch.target_ids[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)
    if not len(picked):
        return torch.zeros_like(batch.old_logprobs)
    spread: Tensor = picked[batch.gather].masked_fill(~batch.mask, 0.0)
    return spread
