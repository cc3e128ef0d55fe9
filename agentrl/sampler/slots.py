"""Key/value slots and the attention that reads them, plugged into any transformers model.

Every sequence owns one slot; its token t sits at index t (right-aligned padding does not exist), so attention over a
slot of at least ``QUERY_ROWS`` query rows gives the same bits whatever the slot's length, the batch or the chunk the
token came in. Together with rows in multiples of ``ROWS`` this makes the engine batch-invariant on the CPU in fp32
(proved at start-up by ``hf.HFSampler``; measured in docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

ROWS = 16
"""Fewer rows make BLAS choose other kernels, whose sums round differently; a number of elements that is no multiple of
a vector register makes the last of them take another exponential."""

QUERY_ROWS = 4
"""The least rows of the products within attention, made a head at a time (2 are enough on Intel, 4 on AMD)."""

KEYS = 192
"""Keys that BLAS sums in one go on AMD. One and a bit would be summed as two halves, wherever the middle is."""

BLOCK = 512
"""Keys that ``scaled_dot_product_attention`` takes at a time."""

ATTENTION = "agentrl_slots"


@dataclass(frozen=True)
class Chunk:
    """``token_ids`` [L] of one sequence, to be written at ``start`` .. ``start + L`` of ``slot``."""

    slot: int
    start: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class Group:
    """Chunks of similar length, attended in one call.

    Attributes:
        rows: [C, P] row of the packed batch of each chunk's token; padding repeats the chunk's first row, and
            P * G is at least ``QUERY_ROWS``.
        slots: [C] slots, or a slice of neighbouring slots (then no copy is made).
        mask: [C, 1, P * G, S] additive mask over the slot, G queries per key/value head.
        out: [R_c] positions in the flattened [C * P] of the rows of ``back``.
        back: [R_c] packed rows that these outputs belong to.
    """

    rows: Tensor
    slots: Tensor | slice
    mask: Tensor
    out: Tensor
    back: Tensor


@dataclass(frozen=True)
class Plan:
    """One forward pass over R packed rows.

    Attributes:
        token_ids: [1, R].
        position_ids: [1, R].
        slots: [R] slot of each row; padding rows write to the spare slot.
        groups: how the rows attend.
        last: [B] the last row of each chunk.
    """

    token_ids: Tensor
    position_ids: Tensor
    slots: Tensor
    groups: list[Group]
    last: Tensor


class SlotCache:
    """Keys and values of ``slots`` sequences of up to ``length`` tokens, plus one spare slot for padding rows.

    Memory: 2 x layers x (slots + 1) x kv_heads x length x head_dim x bytes of the dtype, touched as it is used.
    """

    def __init__(self, config: Any, slots: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.queries = heads // self.kv_heads
        self.least_width = _power_of_two(-(-QUERY_ROWS // self.queries))
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.spare = slots
        shape = (slots + 1, self.kv_heads, _span(length), self.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot to another."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]

    def plan(self, chunks: Sequence[Chunk]) -> Plan:
        """Lay the chunks out as one packed batch of a multiple of ``ROWS`` rows."""
        device = self.keys[0].device
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts: list[int] = []
        for chunk in chunks:
            n = len(chunk.token_ids)
            starts.append(len(tokens))
            tokens.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + n))
            slots.extend([chunk.slot] * n)
        last = [start + len(chunk.token_ids) - 1 for start, chunk in zip(starts, chunks, strict=True)]
        short = -len(tokens) % ROWS
        tokens += [0] * short
        positions += [0] * short
        slots += [self.spare] * short
        return Plan(
            torch.tensor([tokens], device=device),
            torch.tensor([positions], device=device),
            torch.tensor(slots, device=device),
            self._groups(chunks, starts),
            torch.tensor(last, device=device),
        )

    def _groups(self, chunks: Sequence[Chunk], starts: list[int]) -> list[Group]:
        """Chunks by length, rounded up to a power of two, so that padding at most doubles the attention."""
        buckets: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            buckets.setdefault(max(self.least_width, _power_of_two(len(chunk.token_ids))), []).append(index)
        return [
            self._group(width, [chunks[i] for i in which], [starts[i] for i in which])
            for width, which in buckets.items()
        ]

    def _group(self, width: int, chunks: list[Chunk], starts: list[int]) -> Group:
        device, dtype = self.keys[0].device, self.keys[0].dtype
        order = sorted(range(len(chunks)), key=lambda i: chunks[i].slot)
        chunks, starts = [chunks[i] for i in order], [starts[i] for i in order]
        size = torch.tensor([len(c.token_ids) for c in chunks])[:, None]
        begin = torch.tensor([c.start for c in chunks])[:, None]
        step = torch.arange(width)[None, :]
        valid = step < size
        rows = torch.tensor(starts)[:, None] + torch.where(valid, step, 0)
        limit = begin + torch.where(valid, step, 0)
        span = _span(int(limit.max()) + 1)
        hidden = torch.arange(span)[None, None, :] > limit[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        mask = mask.repeat_interleave(self.queries, dim=1)[:, None]
        slots = [c.slot for c in chunks]
        first, count = slots[0], slots[-1] + 1 - slots[0]
        where: Tensor | slice = torch.tensor(slots, device=device)
        back = rows[valid]
        if width == self.least_width and count < 2 * len(slots):
            # Reading a few unused neighbours in place is cheaper than gathering the used slots.
            where = slice(first, first + count)
            place = torch.tensor(slots) - first
            rows, mask, valid = (_spread(of, place, count) for of in (rows, mask, valid))
        out = valid.flatten().nonzero()[:, 0]
        return Group(rows.to(device), where, mask.to(device), out.to(device), back.to(device))

    def attend(self, layer: int, plan: Plan, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Store ``key`` and ``value`` [1, Hkv, R, D], then attend ``query`` [1, Hq, R, D]. Returns [1, R, Hq, D]."""
        keys, values = self.keys[layer], self.values[layer]
        keys[plan.slots, :, plan.position_ids[0]] = key[0].transpose(0, 1)
        values[plan.slots, :, plan.position_ids[0]] = value[0].transpose(0, 1)
        rows = query.shape[2]
        per_row = query[0].transpose(0, 1).reshape(rows, self.kv_heads, self.queries, self.head_dim)
        result = torch.zeros_like(per_row)
        for group in plan.groups:
            span = group.mask.shape[-1]
            k, v = keys[:, :, :span][group.slots], values[:, :, :span][group.slots]
            count, width = group.rows.shape
            q = per_row[group.rows].transpose(1, 2).reshape(count, self.kv_heads, -1, self.head_dim)
            mask = group.mask
            if count * self.kv_heads == 1:  # a single product would be split among threads, into too few rows
                q, k, v, mask = (of.expand(2, -1, -1, -1) for of in (q, k, v, mask))
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[:count]
            o = o.view(count, self.kv_heads, width, -1, self.head_dim).transpose(1, 2)
            result[group.back] = o.flatten(0, 1)[group.out]
        return result.reshape(1, rows, -1, self.head_dim)


def _power_of_two(number: int) -> int:
    """The least one that is not below ``number``."""
    return 1 << (number - 1).bit_length()


def _span(length: int) -> int:
    """Keys to read for ``length`` of them: in all such spans they are summed in the same order."""
    span = -(-length // 32) * 32
    return span - span % BLOCK + 2 * KEYS if KEYS < span % BLOCK < 2 * KEYS else span


def _spread(of: Tensor, place: Tensor, count: int) -> Tensor:
    """[count, ...] zeros with the rows of ``of`` at ``place``."""
    return of.new_zeros((count, *of.shape[1:])).index_copy_(0, place, of)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every layer; ``slots`` and ``plan`` travel through the model's kwargs."""
    scale = scaling if scaling is not None else float(query.shape[-1]) ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    return kwargs["slots"].attend(layer, kwargs["plan"], query, key, value, scale), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
