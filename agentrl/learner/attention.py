"""Attention over a packed forest: every token sees its ancestors and itself, and no pair is computed twice.

Tokens stand in preorder, so a subtree is a range, and query ``q`` sees key ``k`` exactly where
``k <= q < subtree_end[k]``. On a GPU this is a FlexAttention mask. On a CPU the visible pairs are cut into rectangles:

- a *segment* is a run of tokens without a branch in it. Everything below it sees all of it: one dense rectangle of
  all its descendants' queries on its keys, without a mask and without copying a key.
- within a segment, the later half sees all of the earlier half, again a dense rectangle, and so on down to squares of
  at most ``SQUARE`` tokens, which are causal. (torch's kernel computes such squares in full, so long rows gain too.)
- a family of tiny subtrees is one square with a mask, since many small calls would cost more than the pairs they save.

Each rectangle gives an output and the log of its softmax denominator; these merge exactly, as in cascade inference
and FlashAttention's split keys (Dao et al. 2022, arXiv:2205.14135). The backward pass of a rectangle is the kernel's
own with the *merged* output and denominator, which makes its share of the gradient exact as well. Rectangles of one
shape at equal distances, such as answers of one length, go through the kernel as one batch of views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

from agentrl.errors import ConfigError

ATTENTION = "agentrl_tree"
"""The name under which transformers finds this attention: ``model.set_attn_implementation(ATTENTION)``."""
SQUARE = 128
"""Longest causal square, in tokens. Measured (benchmarks/learner.py): 64 pays for more calls, 256 for masked pairs."""
FAMILY = 48
"""Most tokens of a family of small subtrees in one masked square: at this size a call costs what its pairs cost."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Rectangle(NamedTuple):
    """``number`` equal rectangles of visible pairs; each begins ``stride`` tokens after the one before.

    Attributes:
        query: first query of the first rectangle.
        queries: queries of each.
        key: first key of the first rectangle.
        keys: keys of each.
        number: how many.
        stride: tokens from one to the next; at least ``queries`` and ``keys``.
    """

    query: int
    queries: int
    key: int
    keys: int
    number: int = 1
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Partition:
    """The visible pairs of a forest, each in exactly one rectangle.

    Attributes:
        causal: squares on the diagonal, causal within.
        families: squares on the diagonal with a mask.
        masks: for each of ``families`` an additive mask [number, 1, n, n] in fp32.
        dense: rectangles below the diagonal, seen in full. The squares before them cover every query once.
    """

    causal: tuple[Rectangle, ...]
    families: tuple[Rectangle, ...]
    masks: tuple[Tensor, ...]
    dense: tuple[Rectangle, ...]


Plan = Partition | BlockMask


def plan_attention(subtree_end: NDArray[np.int64], device: torch.device | str) -> Plan:
    """What ``attend`` needs to know of a forest; made once per batch and used in every layer.

    Args:
        subtree_end: [N] one past the last token below each token, in preorder.
        device: where attention will run.

    Raises:
        ConfigError: neither a CPU nor a CUDA device.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return partition(subtree_end)
    if kind == "cuda":
        return block_mask(torch.as_tensor(subtree_end, device=device))
    raise ConfigError(f"tree attention runs on cpu and cuda, got the device {str(device)!r}: choose one of these.")


def partition(subtree_end: NDArray[np.int64]) -> Partition:
    """Cut the visible pairs of a forest into rectangles; ``subtree_end`` is [N]."""
    total = len(subtree_end)
    # A token and the next one are in one segment exactly if their subtrees end together.
    starts = np.flatnonzero(np.diff(subtree_end, prepend=-1)).tolist()
    ends = subtree_end[starts].tolist()
    stops = [*starts[1:], total]
    after = dict(zip([*starts, total], range(len(starts) + 1), strict=True))
    causal: list[Rectangle] = []
    families: list[Rectangle] = []
    dense: list[Rectangle] = []
    open_ends, index = [total], 0
    while index < len(starts):
        start, stop, end = starts[index], stops[index], ends[index]
        while open_ends[-1] <= start:
            open_ends.pop()
        reach, following = start, index
        while reach < open_ends[-1] and ends[following] - start <= FAMILY:
            reach, following = ends[following], after[ends[following]]
        if reach > stop:
            families.append(Rectangle(start, reach - start, start, reach - start))
            index = following
            continue
        for rectangle in _triangle(start, stop):
            (causal if rectangle.query == rectangle.key else dense).append(rectangle)
        if end > stop:
            dense.append(Rectangle(stop, end - stop, start, stop - start))
            open_ends.append(end)
        index += 1
    merged = tuple(_batched(families))
    return Partition(
        tuple(_batched(causal)), merged, tuple(_mask(r, subtree_end) for r in merged), tuple(_batched(dense))
    )


def _triangle(start: int, stop: int) -> Iterator[Rectangle]:
    """A segment's own pairs: causal squares and the rectangles between them."""
    if stop - start <= SQUARE:
        yield Rectangle(start, stop - start, start, stop - start)
        return
    middle = (start + stop) // 2
    yield from _triangle(start, middle)
    yield from _triangle(middle, stop)
    yield Rectangle(middle, stop - middle, start, middle - start)


def _batched(rectangles: Iterable[Rectangle]) -> Iterator[Rectangle]:
    """Rectangles of one shape at equal distances as one."""
    current: Rectangle | None = None
    for new in sorted(rectangles, key=lambda r: (r.queries, r.keys, r.query - r.key, r.query)):
        if current is not None:
            # Equal distance between query and key, so both move by the same stride.
            alike = (new.queries, new.keys, new.query - new.key) == (
                current.queries,
                current.keys,
                current.query - current.key,
            )
            step = new.query - current.query - (current.number - 1) * current.stride
            apart = step >= max(new.queries, new.keys)
            if alike and apart and (current.number == 1 or step == current.stride):
                current = current._replace(number=current.number + 1, stride=step)
                continue
            yield current
        current = new
    if current is not None:
        yield current


def _mask(family: Rectangle, subtree_end: NDArray[np.int64]) -> Tensor:
    """The additive mask [number, 1, n, n] of a batch of families."""
    first = family.query + family.stride * np.arange(family.number)
    places = first[:, None] + np.arange(family.queries)
    query, key = places[:, :, None], places[:, None, :]
    seen = (key <= query) & (query < subtree_end[places][:, None, :])
    return torch.as_tensor(np.where(seen, 0.0, -np.inf)[:, None], dtype=torch.float32)


def attend(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float) -> Tensor:
    """Attention of every token to its ancestors and itself.

    Args:
        query: [1, H, N, D].
        key: [1, K, N, D], where K divides H (grouped heads).
        value: as ``key``.
        plan: from ``plan_attention`` for these N tokens.
        scale: factor on the scores.

    Returns:
        [1, H, N, D], in memory as [1, N, H, D].
    """
    found: Tensor
    if isinstance(plan, Partition):
        found = _PartitionedAttention.apply(query, key, value, plan, scale)  # type: ignore[no-untyped-call]
    else:
        found = _flex()(query, key, value, block_mask=plan, scale=scale, enable_gqa=key.shape[1] != query.shape[1])
    return found


class _PartitionedAttention(torch.autograd.Function):
    """Softmax attention over the rectangles of a ``Partition``."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Partition, scale: float) -> Tensor:
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        _, heads, total, _ = query.shape
        # Half precision is merged in fp32: the rectangles of a deep path would each round the output again.
        wide = query.dtype if query.dtype.itemsize >= 4 else torch.float32
        out = query.new_empty(1, total, heads, value.shape[-1], dtype=wide).transpose(1, 2)
        denominator = query.new_empty(1, total, heads, 1, dtype=wide).transpose(1, 2)
        for rectangle, mask, causal in _diagonal(plan, query.dtype):
            q, k, v = _views(rectangle, query, key, value)
            o, log = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
            _queries(rectangle, out).copy_(o)
            _queries(rectangle, denominator).copy_(log.unsqueeze(-1))
        for rectangle in plan.dense:
            q, k, v = _views(rectangle, query, key, value)
            o, log = _flash(q, k, v, 0.0, False, scale=scale)
            log, known = log.unsqueeze(-1), _queries(rectangle, denominator)
            _queries(rectangle, out).lerp_(o.to(wide), torch.sigmoid(log - known))
            known.copy_(torch.logaddexp(known, log))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, denominator)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, denominator = ctx.saved_tensors
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        saved = (query, key, value)
        # Each token's place in a diagonal square is written first, so nothing has to be zeroed.
        totals = tuple(torch.empty_like(x, dtype=denominator.dtype) for x in saved)

        def shares(rectangle: Rectangle, mask: Tensor | None, causal: bool) -> Iterable[tuple[Tensor, Tensor]]:
            q, k, v = _views(rectangle, query, key, value)
            g, o, log = (_queries(rectangle, x) for x in (gradient, out, denominator))
            found = _flash_backward(g, q, k, v, o, log.squeeze(-1), 0.0, causal, attn_mask=mask, scale=ctx.scale)
            return zip(_views(rectangle, *totals), found, strict=True)

        for rectangle, mask, causal in _diagonal(ctx.plan, query.dtype):
            for total, share in shares(rectangle, mask, causal):
                total.copy_(share)
        for rectangle in ctx.plan.dense:
            for total, share in shares(rectangle, None, False):
                total.add_(share)
        return (*(total.to(x.dtype) for total, x in zip(totals, saved, strict=True)), None, None)


def _diagonal(plan: Partition, dtype: torch.dtype) -> Iterator[tuple[Rectangle, Tensor | None, bool]]:
    for rectangle in plan.causal:
        yield rectangle, None, True
    for rectangle, mask in zip(plan.families, plan.masks, strict=True):
        yield rectangle, mask.to(dtype), False


def _views(rectangle: Rectangle, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its queries, keys and values, [number, heads, t, D], without a copy."""
    k, v = (_window(x, rectangle.key, rectangle.keys, rectangle) for x in (key, value))
    return _queries(rectangle, query), k, v


def _queries(rectangle: Rectangle, x: Tensor) -> Tensor:
    return _window(x, rectangle.query, rectangle.queries, rectangle)


def _window(x: Tensor, start: int, length: int, rectangle: Rectangle) -> Tensor:
    if rectangle.number == 1:
        return x.narrow(2, start, length)
    span = (rectangle.number - 1) * rectangle.stride + length
    return x[0].narrow(1, start, span).unfold(1, length, rectangle.stride).permute(1, 0, 3, 2)


# -- FlexAttention ----------------------------------------------------------------------------------------------------


def block_mask(subtree_end: Tensor) -> BlockMask:
    """The ancestor mask for FlexAttention; ``subtree_end`` is [N] on the device that attends."""

    def ancestor(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < subtree_end[key])

    total = len(subtree_end)
    return create_block_mask(ancestor, None, None, total, total, device=subtree_end.device)


@cache
def _flex() -> Any:
    """Compiled on first use: uncompiled, FlexAttention would hold all N x N scores."""
    return torch.compile(flex_attention, dynamic=True)


# -- transformers -----------------------------------------------------------------------------------------------------


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, with ``tree=TrainBatch`` passed through the model's keywords."""
    odd = [name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if kwargs.get(name) is not None]
    if dropout:
        odd.append("attention_dropout")
    if odd or "tree" not in kwargs:
        why = f"uses {', '.join(odd)}" if odd else "does not pass its keywords on to attention"
        raise ConfigError(f"{type(module).__name__} {why}, which tree attention does not know: use another model.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, kwargs["tree"].plan, scale).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
