"""Puts the parts of a run together as its configuration says: environment, sampler, renderer, scheduler."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from agentrl import registry
from agentrl.config import RunConfig
from agentrl.errors import ConfigError, UserError
from agentrl.renderer import Renderer
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter, Writer
from agentrl.sampler.hf import HFSampler
from agentrl.sandbox.shared import close_shared_sandboxes, use_sandbox
from agentrl.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Actors:
    """What plays episodes: the scheduler, and the sampler behind it."""

    scheduler: Scheduler
    sampler: HFSampler


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


def use_threads(config: RunConfig) -> None:
    """Let torch use ``policy.threads`` CPU threads."""
    if config.policy.threads:
        import torch

        torch.set_num_threads(config.policy.threads)


@asynccontextmanager
async def local_actors(config: RunConfig, model: Any, tokenizer: Any, version: int = 0) -> AsyncIterator[Actors]:
    """The embedded sampler on a copy of ``model``, with everything closed at the end."""
    use_threads(config)
    renderer = Renderer(tokenizer, config.policy.tool_format)
    params = sampling_params(config)
    limit = min(config.sampler.max_length, getattr(model.config, "max_position_embeddings", config.sampler.max_length))
    sampler = HFSampler(
        copy.deepcopy(model), tokenizer, max_slots=config.sampler.max_slots, max_length=limit, version=version
    )

    def writer(seed: int) -> Writer:
        return TokenWriter(sampler, renderer, params, seed)

    try:
        yield Actors(Scheduler(env_factory(config), writer, config.rollout, params), sampler)
    finally:
        await sampler.close()
        await close_shared_sandboxes()
