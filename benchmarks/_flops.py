"""Floating point operations of a learner's forward and backward pass, and what GPUs can do in a second."""

from __future__ import annotations

import re
from typing import Any

PEAKS: tuple[tuple[str, float], ...] = (
    (r"H100 PCIe", 756.5e12),
    (r"H100 NVL", 835.5e12),
    (r"H100 80GB HBM3|H100 SXM", 989.5e12),
    (r"H200 NVL", 835.5e12),
    (r"H200", 989.5e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
    (r"RTX 4090$", 165.2e12),
)
"""Dense bf16 operations a second with fp32 sums, by what torch calls the GPU; the first that fits. From NVIDIA's data
sheets of H100, H200, A100 and L40S (those of Hopper and of L40S print the sparse figure, twice as large) and from the
white paper of the Ada architecture for the 4090."""


def peak(name: str) -> float | None:
    """Dense bf16 operations a second of the GPU ``name``; None where it is not known, or a part of one (MIG)."""
    if "MIG" in name:
        return None
    return next((value for pattern, value in PEAKS if re.search(pattern, name)), None)


def training_flops(model: Any, *, tokens: int, targets: int, pairs: int) -> int:
    """Of a forward and a backward pass, without what is computed twice to save memory.

    A multiplication and an addition for every weight and token, and twice that backward: 6 N a token (Kaplan et al.
    2020, arXiv:2001.08361), over the matrices of the layers; the head is applied to targets only. Attention: two
    products of a query and a key's size, for every pair that sees one another, in every head.

    Args:
        model: a transformers causal language model.
        tokens: unique tokens.
        targets: unique targets.
        pairs: visible pairs of a query and a key, the token itself included.
    """
    import torch

    config = model.config
    inside = [m for m in model.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.in_features * m.out_features for m in inside)
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6 * (weights * tokens + head * targets + attention * pairs)
