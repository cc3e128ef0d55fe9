"""Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174): keep a layer's input, compute the rest once more.

The learner's memory for activations falls from all tensors of all layers to one hidden state a layer, for about a third
more time. transformers keeps the layers' keyword arguments, so the tree that attention reads reaches the second forward
pass too.
"""

from __future__ import annotations

from typing import Any

from agentrl.errors import ConfigError


def recompute_layers(model: Any) -> None:
    """Let every decoder layer of ``model`` recompute its activations in the backward pass, while it is in train mode.

    Args:
        model: a transformers causal language model, with or without adapters, before it is sharded.

    Raises:
        ConfigError: its class cannot.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    if not getattr(plain, "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(plain).__name__} does not support gradient checkpointing: train it without.")
    # transformers renamed the method in 5.x and warns about the old name. The reentrant form of older releases would
    # give adapters no gradient at all, since the frozen embedding's output needs none.
    enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
    enable({"use_reentrant": False})
