"""The learner on a GPU: forward and backward over a forest, packed and flat, and attention alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _bench import Row
from _flops import peak, training_flops
from torch import Tensor

from agentrl.learner.attention import ATTENTION, attend
from agentrl.learner.logprob import target_logprobs
from agentrl.learner.pack import TrainBatch, pack

PROMPTS, GROUP, PROMPT, ANSWER = 4, 8, 512, 192


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds on the GPU, after a round that warms up."""
    taken = []
    for turn in range(rounds + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if turn:
            taken.append(time.perf_counter() - began)
    return median(taken)


def forest(
    *, prompts: int, group: int, prompt: int, answer: int, vocabulary: int, device: str
) -> tuple[TrainBatch, Tensor, int]:
    """Groups of answers of random tokens, packed; the same as flat rows [L, T]; and the pairs that see one another."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(vocabulary, (prompts, prompt), generator=generator).repeat_interleave(group, 0)
    own = torch.randint(vocabulary, (prompts * group, answer), generator=generator)
    own[:, 0] = torch.arange(group).repeat(prompts)  # so that no two of a group begin alike
    shared[:, 0] = torch.arange(prompts).repeat_interleave(group)
    rows = torch.cat([shared, own], 1)
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask[:, prompt:] = True
    batch = pack(rows, torch.full((len(rows),), rows.shape[1]), mask, device)
    return batch, rows.to(device), int((batch.position_ids + 1).sum())


def learner_rows(model: Any, rounds: int) -> list[Row]:
    """Forward and backward over one forest: packed, flat; and attention alone."""
    vocabulary = model.config.vocab_size
    shape = {"prompts": PROMPTS, "group": GROUP, "prompt": PROMPT, "answer": ANSWER}
    batch, flat, pairs = forest(**shape, vocabulary=vocabulary, device="cuda")
    tokens, targets = batch.token_ids.shape[1], len(batch.target_ids)
    model.train()

    def packed() -> None:
        model.zero_grad(set_to_none=True)
        target_logprobs(model, batch)[0].sum().backward()  # type: ignore[no-untyped-call]

    def unpacked() -> None:
        model.zero_grad(set_to_none=True)
        for part in flat.split(GROUP):
            hidden = model.get_decoder()(part, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
            logits = model.get_output_embeddings()(hidden).float().log_softmax(-1)
            logits.gather(-1, part[:, PROMPT:, None]).sum().backward()

    model.set_attn_implementation(ATTENTION)
    ours = timed(packed, rounds)
    model.set_attn_implementation("sdpa")
    theirs = timed(unpacked, rounds)
    label = f"forward + backward, {tokens:,} unique of {flat.numel():,} tokens"
    rows = [
        Row(f"{label}", 1000 * ours, "ms"),
        Row(f"{label}: unique tokens", tokens / ours, "tok/s"),
        Row(f"{label}: flat rows, SDPA", 1000 * theirs, "ms"),
        Row(f"{label}: packed", ours / theirs, "x flat"),
    ]
    most = peak(torch.cuda.get_device_name(0))
    if most is not None:
        done = training_flops(model, tokens=tokens, targets=targets, pairs=pairs)
        rows.append(Row(f"{label}: MFU, of {most / 1e12:g} TFLOP/s", 100 * done / ours / most, "%"))
    return rows + attention_rows(model.config, batch, rounds)


def attention_rows(config: Any, batch: TrainBatch, rounds: int) -> list[Row]:
    """FlexAttention over the forest against torch's own attention with the mask written out: one layer of the model."""
    total, size = batch.token_ids.shape[1], config.head_dim
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    made = [torch.randn(1, h, total, size, device="cuda", dtype=torch.bfloat16).requires_grad_() for h in heads]
    places = torch.arange(total, device="cuda")
    seen = (places[None, :] <= places[:, None]) & (places[:, None] < batch.subtree_end[None, :])
    many = heads[0] // heads[1]

    def flex() -> None:
        torch.autograd.grad(attend(*made, batch.plan, size**-0.5).sum(), made)

    def sdpa() -> None:
        key, value = (x.repeat_interleave(many, dim=1) for x in made[1:])
        torch.autograd.grad(F.scaled_dot_product_attention(made[0], key, value, attn_mask=seen).sum(), made)

    ours, theirs = timed(flex, rounds), timed(sdpa, rounds)
    label = f"attention of a layer over {total:,} tokens, forward + backward"
    return [
        Row(f"{label}: FlexAttention", 1000 * ours, "ms"),
        Row(f"{label}: SDPA with a mask", 1000 * theirs, "ms"),
        Row(f"{label}: FlexAttention", ours / theirs, "x SDPA"),
    ]
