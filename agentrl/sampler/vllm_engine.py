"""vLLM's engine as agentrl needs it: its arguments, its environment, its start."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from agentrl.errors import SamplerError
from agentrl.sampler.board import Board
from agentrl.sampler.transport import Kind

KEY = "agentrl"
"""Of the board in vLLM's ``additional_config``, and of a request's settings in its ``extra_args``."""

OWN = {
    "model",
    "max_model_len",
    "max_num_seqs",
    "async_scheduling",
    "logits_processors",
    "worker_extension_cls",
    "additional_config",
    "weight_transfer_config",
    "speculative_config",
}
"""Arguments that are not options."""

_CPU_CACHE = 4 << 30
"""Most bytes of keys and values on the CPU."""


def engine_arguments(
    folder: str | os.PathLike[str],
    board: Board,
    max_slots: int,
    max_length: int,
    transport: Kind,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What vLLM has to be started with for ``VLLMSampler``, in-process and as a server alike; ``options`` win.

    ``docs/vllm.md`` says what each is for.

    Raises:
        SamplerError: an option that would take the sampling out of our hands, or a model that vLLM's attention on the
            CPU cannot do.
    """
    if taken := sorted(OWN & options.keys()):
        raise SamplerError(f"sampler.options: {taken[0]} is agentrl's own to set; leave it out.")
    arguments: dict[str, Any] = {
        "model": str(folder),
        "max_model_len": max_length,
        "max_num_seqs": max_slots,
        "enable_prefix_caching": True,
        "async_scheduling": False,  # a token has to be in the board before the engine speaks of it
        "logits_processors": ["agentrl.sampler.vllm_worker:Drawing"],
        "worker_extension_cls": "agentrl.sampler.vllm_worker.Extension",
        "additional_config": {KEY: {"board": board.arguments, "owner": os.getpid()}},
        "generation_config": "vllm",  # the folder's own may set a temperature
        "use_tqdm_on_load": False,
        "disable_log_stats": True,  # counted for every token in Python; what we count comes with each request
    }
    if transport in ("ipc", "nccl"):
        arguments["weight_transfer_config"] = {"backend": transport}
    if transport == "adapter":
        arguments |= {"enable_lora": True, "max_loras": 1}
    if not torch.cuda.is_available():
        arguments |= {"dtype": "float32", "enforce_eager": True, "block_size": 32}
        arguments["kv_cache_memory_bytes"] = _cpu_cache(folder, max_slots, max_length)
    return arguments | dict(options)


def _cpu_cache(folder: str | os.PathLike[str], max_slots: int, max_length: int) -> int:
    """Bytes of keys and values, fp32, of all slots at full length, within bounds: vLLM's own default is gigabytes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size % 16 or size < 32:  # found out by vLLM at the first token only, and then it dies
        raise SamplerError(f"vLLM's attention on the CPU has heads of 32 and more, a multiple of 16: got {size}.")
    wanted = 2 * 4 * config.num_hidden_layers * heads * size * max_slots * (max_length + 32)
    return int(max(64 << 20, min(wanted, _CPU_CACHE)))


async def start_engine(arguments: Mapping[str, Any], transport: Kind, sockets: Path) -> tuple[Any, int]:
    """The engine, and the rows of its model's embedding; ``sockets`` is a folder for its start alone."""
    AsyncEngineArgs, AsyncLLM = await asyncio.to_thread(_import_vllm)  # noqa: N806 -- classes
    try:
        settings = AsyncEngineArgs(**arguments)
    except TypeError as error:
        raise SamplerError(f"sampler.options: vLLM does not take them: {error}") from error
    with engine_environment(transport, sockets):
        try:
            engine = await asyncio.to_thread(AsyncLLM.from_engine_args, settings)
        except Exception as error:
            raise SamplerError(
                f"vLLM did not start: {type(error).__name__}: {error} (In a script, start it below if __name__ == "
                '"__main__": the engine\'s process imports the script.)'
            ) from error
    return engine, int(engine.model_config.get_vocab_size())


def _import_vllm() -> tuple[Any, Any]:
    """In a thread, since it takes seconds, and since vLLM keeps exceptions of its imports and with them all callers."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are about choices made here
    try:
        with warnings.catch_warnings(action="ignore"):
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise SamplerError(f"sampler.backend is vllm, which cannot be imported: {error}. See docs/vllm.md.") from error
    logging.getLogger(AsyncLLM.__module__).setLevel(logging.CRITICAL)  # the death of an engine is ours to tell
    return AsyncEngineArgs, AsyncLLM


@contextmanager
def engine_environment(transport: Kind, sockets: Path) -> Iterator[None]:
    """What the engine's process has to find in its environment; ours is put back."""
    wanted = {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # whose logits processors are of another kind
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # this process has threads
        "PYTHONWARNINGS": "ignore",  # vLLM's imports warn of vLLM's code
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # likewise, of NUMA nodes
        "VLLM_RPC_BASE_PATH": str(sockets),  # by default it leaves them in the temporary folder
    }
    if transport == "ipc":
        wanted["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles to GPU memory travel pickled
    if not torch.cuda.is_available():
        wanted["OMP_NUM_THREADS"] = "1"  # its own threads and OpenMP's fight for the cores: 8 tokens/s
        wanted["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engine and worker share a process, as on one GPU
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: os.environ.get(name, value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
