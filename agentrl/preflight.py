"""What a dry run can tell of a run's learner and sampler without the memory of the one and the engine of the other."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from agentrl.config import RunConfig
from agentrl.errors import ConfigError, SamplerError, UnknownName
from agentrl.sampler.board import CELL
from agentrl.sampler.server_wire import TOKEN_VARIABLE
from agentrl.train import load_start, make_learner

_LAYERS = 2
"""That a learner is made of."""
_BOARD = Path("/dev/shm")


def check_learner(config: RunConfig) -> int:
    """Load the policy, try it on a packed text and make a learner of it; returns the bytes of its weights.

    Masters and moments are made for the first layers only. They are alike in all layers, and take six times the memory
    of a policy in bf16, which in the run is shared among processes or given by a sampler that sleeps.

    Raises:
        UserError: the policy cannot be loaded, or the configuration contradicts itself.
    """
    from agentrl.learner.logprob import check_packable

    model, _ = load_start(config, None)
    size: int = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    decoder = model.get_decoder()
    # Adapters may be for single layers by their numbers; and their moments are small.
    if len(getattr(decoder, "layers", ())) > _LAYERS and not config.policy.lora_rank:
        check_packable(model)
        decoder.layers = decoder.layers[:_LAYERS]
    make_learner(config, model, None)
    return size


def check_sampler(config: RunConfig, size: int) -> Iterator[str]:
    """Check what can be checked without an engine or a server; yields lines that say which, and how weights travel.

    Args:
        config: the run's configuration.
        size: bytes of the policy's weights.

    Raises:
        ConfigError: the engine would not start, weights would not get through, or a url is none.
        UnknownName: an option that vLLM's engine does not have.
    """
    sampler = config.sampler
    if sampler.backend == "hf":
        yield "sampler: hf, in this process; weights are copied to it."
        return
    if sampler.backend == "vllm":
        asleep = ", asleep during the update" if sampler.options.get("enable_sleep_mode") else ""
        yield f"sampler: vLLM on this machine{asleep}. It was not started."
        yield _check_options(sampler.options)
    else:
        _check_urls(sampler.urls)
        yield f"sampler: vLLM on {', '.join(sampler.urls)}. No server was asked: none has to be up for a dry run."
        if not os.environ.get(TOKEN_VARIABLE):
            yield f"{TOKEN_VARIABLE} is not set here; the run needs the token that agentrl serve was given or printed."
    yield _check_transport(config, size)
    wanted: list[str] = [sampler.transport] if sampler.transport in ("ipc", "nccl") else []
    wanted += ["enable_sleep_mode"] if sampler.options.get("enable_sleep_mode") else []
    if wanted and not _has_gpu():
        yield f"this machine has no GPU, without which there is no {' and no '.join(wanted)}: not looked at any closer."


def _check_options(options: Mapping[str, Any]) -> str:
    """What was found out about the engine's options."""
    from agentrl.sampler.vllm_engine import OWN

    if taken := sorted(OWN & options.keys()):
        raise ConfigError(f"sampler.options: {taken[0]} is agentrl's own to set; leave it out.")
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here, so the names in sampler.options were not checked."
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings(action="ignore"):
        from vllm.engine.arg_utils import AsyncEngineArgs
    known = [each.name for each in fields(AsyncEngineArgs)]
    for name in options:
        if name not in known:
            raise UnknownName("option of vLLM's engine in sampler.options:", name, known)
    return "vLLM knows the names in sampler.options; values are its own to check when it starts."


def _check_urls(urls: tuple[str, ...]) -> None:
    from agentrl.sampler.vllm_connection import Server

    try:
        servers = [Server(url, "").url for url in urls]
    except SamplerError as error:
        raise ConfigError(str(error)) from error
    if twice := sorted({url for url in servers if servers.count(url) > 1}):
        raise ConfigError(f"sampler.urls names {twice[0]} twice: expected every server once.")


def _check_transport(config: RunConfig, size: int) -> str:
    """How weights travel, and whether there is room for them."""
    sampler, rooms = config.sampler, dict[Path, int]()
    local = sampler.backend == "vllm"
    if local:
        rooms[_BOARD] = sampler.max_slots * sampler.max_length * CELL.itemsize
    if sampler.transport in ("file", "adapter"):
        # A server keeps the last file while the next one is written, for one that is restarted.
        folder = Path(sampler.weights_dir).resolve()
        needed = 0 if sampler.transport == "adapter" else size if local else 2 * size
        rooms[folder] = rooms.get(folder, 0) + needed
    for folder, needed in rooms.items():
        _check_room(folder, needed)
    where = f"in {sampler.weights_dir}" + ("" if local else ", which every server has to see under the same path")
    if sampler.transport == "file":
        return f"weights: {_shown(size)} by a file {where}."
    if sampler.transport == "adapter":
        return f"weights: LoRA adapters of rank {config.policy.lora_rank} alone, by a folder {where}."
    if sampler.transport == "ipc":
        return f"weights: {_shown(size)} by ipc, read by the engine where they lie on the learner's GPU."
    _check_nccl(config)
    return f"weights: {_shown(size)} by nccl, from the learner's GPU to the engine's."


def _check_nccl(config: RunConfig) -> None:
    if config.sampler.backend == "vllm" and config.policy.device in ("auto", "cuda", "cuda:0"):
        raise ConfigError(
            "sampler.transport is nccl, which joins different GPUs, and both the engine and the learner would take the "
            'first one: expected policy.device = "cuda:1", or transport ipc or file on one GPU.'
        )


def _check_room(folder: Path, needed: int) -> None:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: expected one for weights; name another with sampler.weights_dir.")
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = f" ({_BOARD} also holds what is sampled; in a container give it more with --shm-size)"
        raise ConfigError(
            f"{folder} has {_shown(free)} free, expected {_shown(needed)}: choose another folder with "
            f"sampler.weights_dir, or make room{hint if folder == _BOARD else ''}."
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
