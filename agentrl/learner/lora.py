"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: train two thin matrices beside each large frozen one.

A layer computes ``W x + (alpha / rank) B A x``; only ``A`` [rank, in] and ``B`` [out, rank] are trained, in fp32. ``B``
starts at 0, so the policy with fresh adapters *is* the starting policy, and with its adapters switched off
(``model.disable_adapter()``) it is the reference that a KL is measured to, without a second copy of the weights.

A sampler knows nothing of adapters. What it is given is ``W + (alpha / rank) B A`` under the plain model's names
(``merged_weights``), computed beside the weights in training, which stay as they are. In bf16 the sum is rounded once
more than in the learner's forward pass; the measured gap between sampler and learner shows by how much.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import ConfigError, RunFolderError, UnknownName, UserError
from agentrl.learner import distributed
from agentrl.learner.distributed import laid_out_as, whole

ADAPTER = "adapter"
"""The adapters' folder inside of a checkpoint."""

ALL_LINEAR = "all-linear"
"""peft's name for every linear layer except the head."""

_NAME = "default"  # peft's name for the only adapter of a model


def add_lora(model: Any, rank: int, alpha: float, targets: str | Sequence[str] = ALL_LINEAR, *, seed: int = 0) -> Any:
    """Put fresh adapters beside linear layers of ``model``, in place, and freeze everything else.

    Call it before the model is sharded and before its optimizer is made.

    Args:
        model: a transformers causal language model, in the dtype that its frozen weights shall keep.
        rank: r, the inner size of the two matrices.
        alpha: the adapters' output is scaled by ``alpha / rank``.
        targets: last parts of the names of the layers, as ``("q_proj", "v_proj")``; default: all linear layers except
            the head.
        seed: of ``A``'s random numbers, so that all processes start with the same; the global generators stay as
            they are.

    Returns:
        The model inside of peft's ``PeftModel``, which passes on whatever it does not know itself.

    Raises:
        UserError: peft is not installed.
        UnknownName: no layer of that name.
        ConfigError: a target that is not a linear layer of the decoder, so that it cannot be merged.
    """
    peft = _peft()
    names = [targets] if isinstance(targets, str) else list(targets)
    if names != [ALL_LINEAR]:
        _check_targets(model, names)
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,  # the sampler has none, and the ratio in the loss compares the two
        target_modules=ALL_LINEAR if names == [ALL_LINEAR] else names,
        task_type="CAUSAL_LM",
    )
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft 0.21
        torch.manual_seed(seed)
        return peft.get_peft_model(model, settings)


def has_lora(model: Any) -> bool:
    """Whether ``add_lora`` made it."""
    return hasattr(model, "peft_config")


def plain_model(model: Any) -> Any:
    """The transformers model in which the adapters sit; ``model`` itself where there are none."""
    return model.get_base_model() if has_lora(model) else model


def merged_weights(model: Any, device: torch.device | str | None = None) -> dict[str, Tensor]:
    """What the policy is to a program that knows no adapters and no shards, as for ``Sampler.update_weights``.

    In a world of many processes all have to call it. Parameters without an adapter are no copies but the live ones
    where nothing has to be gathered or moved, so use the result before the next update and let it go. The adapted ones
    are as large as the model's linear layers together.

    Args:
        model: with or without adapters, sharded or not.
        device: where the result goes, a layer at a time; default: it stays.

    Returns:
        Weights by the names of the plain model's ``named_parameters``, without gradient; empty except in process 0.
    """
    merged = {}
    for name, weight in _merged(plain_model(model)):
        if distributed.rank() == 0:
            merged[name] = weight if device is None else weight.to(device)
    return merged


def adapter_weights(model: Any) -> dict[str, Tensor]:
    """The adapters' weights by peft's names, whole, on the CPU; all processes have to call it."""
    own: dict[str, Tensor] = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: whole(weight).detach().cpu() for name, weight in own.items()}


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapters as peft does, so that ``PeftModel.from_pretrained(model, folder)`` takes them.

    All processes have to call it; the first one writes.
    """
    from safetensors.torch import save_file

    weights = adapter_weights(model)
    if distributed.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        model.peft_config[_NAME].save_pretrained(folder)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model: Any, folder: Path) -> None:
    """Put saved adapters in the place of those of ``model``, bit for bit.

    Raises:
        RunFolderError: no adapters there, or of another rank, scale or set of layers.
    """
    from safetensors.torch import load_file

    try:
        saved = json.loads((folder / "adapter_config.json").read_text())
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise RunFolderError(f"expected LoRA adapters in {folder}, but they cannot be read: {error}") from error
    own = _peft().get_peft_model_state_dict(model, save_embedding_layers=False)
    settings = model.peft_config[_NAME]
    for key in ("r", "lora_alpha"):
        if saved[key] != getattr(settings, key):
            raise RunFolderError(f"{folder}: its adapters have {key} {saved[key]}, expected {getattr(settings, key)}.")
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in own.items()}:
        raise RunFolderError(f"{folder}: its adapters belong to other layers or to a model of another size.")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(laid_out_as(weight, weights[name]))


def _merged(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Each parameter of the plain model by its name there, with its adapter added; one at a time."""
    layers = {f"{name}.base_layer.weight": m for name, m in model.named_modules() if hasattr(m, "lora_A")}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(parameter.detach())
        if name in layers:
            weight = _with_adapter(weight, layers[name])
        yield name.replace(".base_layer.", "."), weight


def _with_adapter(weight: Tensor, layer: Any) -> Tensor:
    """``W + scale * B A``, added in the adapters' precision and rounded once."""
    a, b = (whole(part[_NAME].weight.detach()) for part in (layer.lora_A, layer.lora_B))
    update = (b @ a) * layer.scaling[_NAME]
    if layer.fan_in_fan_out:
        update = update.T
    merged: Tensor = (weight + update).to(weight.dtype)
    return merged


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    modules = {name: module for name, module in model.get_decoder().named_modules() if name}
    linear = {name.rpartition(".")[2] for name, module in modules.items() if isinstance(module, torch.nn.Linear)}
    for target in targets:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not found:
            raise UnknownName("LoRA target", target, linear)
        if not all(isinstance(module, torch.nn.Linear) for module in found):
            raise ConfigError(
                f"LoRA target {target!r} is a {type(found[0]).__name__}: expected a linear layer of the decoder, as "
                f"one of {', '.join(sorted(linear))}."
            )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError('LoRA needs peft, which is not installed: pip install "agentrl[lora]"') from error
    return peft
