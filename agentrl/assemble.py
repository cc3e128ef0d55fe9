"""Puts the parts of a run together as its configuration says: environment, sampler, renderer, scheduler."""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentrl import registry
from agentrl.config import LORA_RANKS, RunConfig
from agentrl.errors import ConfigError, UserError
from agentrl.renderer import Renderer
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter, Writer
from agentrl.sampler.base import Sampler
from agentrl.sampler.hf import HFSampler
from agentrl.sampler.vllm import VLLMSampler
from agentrl.sandbox.shared import close_shared_sandboxes, use_sandbox
from agentrl.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Actors:
    """What plays episodes: the scheduler, and the sampler behind it."""

    scheduler: Scheduler
    sampler: Sampler

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """The sampler's GPU memory is the learner's meanwhile, where vLLM runs here with ``enable_sleep_mode``."""
        if not isinstance(self.sampler, VLLMSampler):
            yield
            return
        await self.sampler.sleep()
        try:
            yield
        finally:
            from torch import cuda

            cuda.empty_cache()  # what torch keeps of the update is the engine's now; does nothing without a GPU
            await self.sampler.wake()


def env_factory(config: RunConfig) -> Callable[[], Any]:
    """Makes the configured environment, over and over; its tools take the configured sandbox.

    Raises:
        ConfigError: no environment is named.
        UnknownName: no such environment.
        UserError: it does not take ``env_options``.
    """
    if not config.env:
        raise ConfigError(
            f"no environment named; expected one of {', '.join(registry.names('envs'))} or file.py:Class."
        )
    use_sandbox(config.sandbox)
    factory = registry.load("envs", config.env)
    try:
        factory(**config.env_options)
    except TypeError as error:
        raise UserError(f"environment {config.env!r} does not take options {config.env_options}: {error}") from error
    return lambda: factory(**config.env_options)


def sampling_params(config: RunConfig) -> SamplingParams:
    """What every episode is sampled with; ``max_tokens`` is its whole budget."""
    return SamplingParams(config.rollout.max_tokens, config.sampler.temperature, config.sampler.top_p)


def make_renderer(config: RunConfig, tokenizer: Any) -> Renderer:
    """The renderer that ``config.policy`` describes, for ``tokenizer``.

    Raises:
        TemplateError: the tokenizer's chat template cannot be used.
        UnknownName: no such tool format.
    """
    return Renderer(tokenizer, config.policy.tool_format, config.policy.template_options)


def use_threads(config: RunConfig) -> None:
    """Let torch use ``policy.threads`` CPU threads."""
    if config.policy.threads:
        import torch

        torch.set_num_threads(config.policy.threads)


@asynccontextmanager
async def local_actors(
    config: RunConfig, model: Any, tokenizer: Any, folder: str | os.PathLike[str], version: int = 0
) -> AsyncIterator[Actors]:
    """The configured sampler with the weights of ``model``, and a scheduler; everything is closed at the end.

    Args:
        config: the run's configuration.
        model: is left alone.
        tokenizer: its own.
        folder: where ``model`` was loaded from; an engine of vLLM loads it too.
        version: of the weights.

    Raises:
        SamplerError: the engine does not start, or a server does not answer or has another model.
    """
    use_threads(config)
    renderer = make_renderer(config, tokenizer)
    params = sampling_params(config)
    sampler = await _start_sampler(config, model, tokenizer, Path(folder), version)

    def writer(seed: int) -> Writer:
        return TokenWriter(sampler, renderer, params, seed)

    try:
        yield Actors(Scheduler(env_factory(config), writer, config.rollout, params), sampler)
    finally:
        await sampler.close()
        await close_shared_sandboxes()


async def _start_sampler(config: RunConfig, model: Any, tokenizer: Any, folder: Path, version: int) -> Sampler:
    wanted = config.sampler
    length = min(wanted.max_length, getattr(model.config, "max_position_embeddings", wanted.max_length))
    if wanted.backend == "hf":
        return HFSampler(
            copy.deepcopy(model), tokenizer, max_slots=wanted.max_slots, max_length=length, version=version
        )
    if wanted.backend == "vllm":
        options = {"dtype": str(model.dtype).removeprefix("torch."), **wanted.options}
        if wanted.transport == "adapter":
            options.setdefault("max_lora_rank", next(rank for rank in LORA_RANKS if rank >= config.policy.lora_rank))
        return await VLLMSampler.start(
            folder,
            tokenizer,
            max_slots=wanted.max_slots,
            max_length=length,
            version=version,
            transport=wanted.transport,
            weights_dir=wanted.weights_dir,
            options=options,
        )
    from agentrl.sampler.vllm_server import VLLMServerSampler

    sampler = await VLLMServerSampler.start(
        wanted.urls,
        shapes={name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        tokenizer=tokenizer,
        vocabulary=len(model.get_input_embeddings().weight),
        max_length=length,
        version=version,
        transport=wanted.transport,
        weights_dir=wanted.weights_dir,
    )
    try:
        if wanted.transport != "adapter":  # whatever an earlier client left there
            await sampler.update_weights(folder, version)
    except BaseException:
        await sampler.close()
        raise
    return sampler
