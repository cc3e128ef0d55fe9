"""Many processes, one learner: FSDP2 (Zhao et al. 2023, arXiv:2304.11277) under torchrun.

Every process knows all rollouts of a step, so advantages, filters and denominators need no communication. What is
divided is the model (each process keeps a shard of every parameter, its gradient and its moments) and the work (each
computes its own share of the micro-batches). Gradients are **summed** over processes, not averaged, because a
micro-batch's loss is already divided by the denominator of the whole step.

All processes have to make the same collective calls in the same order. A layer gathers its parameters whenever it runs
and sums its gradients whenever they are computed, so every process has to run the same number of forward and backward
passes: ``share`` fills up with None, for which the learner runs an empty batch.

Without torchrun this is a world of one: no process group is made and nothing here costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from agentrl.errors import ConfigError, TrainingError

T = TypeVar("T")
P = ParamSpec("P")

DEADLINE = 600.0
"""Seconds that a collective waits for the slowest process."""


@dataclass(frozen=True, slots=True)
class _World:
    """The processes of this run.

    Attributes:
        rank: this process's number.
        size: how many there are.
        mesh: all of them in a line.
        control: a gloo group for objects and CPU tensors.
        store: small values by name, for what has to work when collectives do not.
    """

    rank: int
    size: int
    mesh: DeviceMesh
    control: dist.ProcessGroup
    store: Store


_world: _World | None = None

_CALL = "agentrl_call"  # name of the method of a sharded model that ``call`` goes through


def start(device: str = "auto", deadline: float = DEADLINE) -> None:
    """Join the processes that torchrun started; nothing where it did not.

    Args:
        device: as ``policy.device``. On cuda, collectives go through nccl and this process takes the GPU of its local
            rank; on cpu, through gloo.
        deadline: see ``DEADLINE``.

    Raises:
        ConfigError: more processes on this machine than GPUs.
    """
    global _world
    if _world is not None or not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"this is process {local} of its machine, which has {torch.cuda.device_count()} GPUs: expected at most "
                "one process a GPU (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(local)
    wait = timedelta(seconds=deadline)
    store, rank_, size = next(iter(rendezvous("env://", timeout=wait)))
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=PrefixStore("world", store),
        rank=rank_,
        world_size=size,
        timeout=wait,
        device_id=torch.device("cuda", local) if cuda else None,
    )
    control = dist.new_group(backend="gloo", timeout=wait)
    mesh = init_device_mesh("cuda" if cuda else "cpu", (size,))
    _world = _World(rank_, size, mesh, control, PrefixStore("agentrl", store))


def stop() -> None:
    """Leave the process group; safe without one and to call twice."""
    global _world
    if _world is not None:
        _world = None
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; the one that plays episodes and writes files is 0."""
    return _world.rank if _world else 0


def world_size() -> int:
    """How many processes learn."""
    return _world.size if _world else 1


def store() -> Store:
    """Small values by name, seen by all processes at once, whatever they are doing.

    Raises:
        TrainingError: there is one process only.
    """
    return _joined().store


def control() -> dist.ProcessGroup:
    """The gloo group of all processes.

    Raises:
        TrainingError: there is one process only.
    """
    return _joined().control


def barrier() -> None:
    """Wait until every process has come here."""
    if _world is not None:
        dist.barrier(group=_world.control)


def whole(tensor: Tensor) -> Tensor:
    """All shards of ``tensor`` put together; ``tensor`` itself where it is no shard. A collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_as(target: Tensor, source: Tensor) -> Tensor:
    """``source``, which every process holds whole, in shards where ``target`` is; itself where both are alike."""
    if isinstance(target, DTensor) and not isinstance(source, DTensor):
        here = source.to(target.device)
        return distribute_tensor(here, target.device_mesh, target.placements, src_data_rank=None)
    return source


def shard(model: Any) -> Any:
    """Keep a shard of each parameter in each process, in place; in a world of one the model stays as it is.

    Every decoder layer is a unit: its parameters are whole while it runs, forward and backward. The embedding, the last
    norm and the head, tied or not, are one more unit, whole while the model runs under ``call``. Gradients are summed
    in fp32 whatever the parameters are in.

    Args:
        model: a transformers causal language model, with or without adapters, on its device and with the same weights
            in every process.

    Raises:
        ConfigError: its decoder has no ``layers``.
    """
    if _world is None:
        return model
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ConfigError(
            f"{type(model).__name__} cannot be sharded: expected a decoder with a list of `layers`, as in Llama or "
            "Qwen3. Train it in one process."
        )
    precision = MixedPrecisionPolicy(reduce_dtype=_at_least_fp32(model))
    setattr(model, _CALL, MethodType(_apply, model))
    for part in (*layers, model):
        # Freed after each forward: otherwise a pass without a backward would leave weights that no update reaches.
        fully_shard(part, mesh=_world.mesh, mp_policy=precision, reshard_after_forward=True)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    register_fsdp_forward_method(model, _CALL)
    return model


def call(model: Any, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``function(model, ...)`` while the parameters outside of the layers are whole.

    The learner calls the decoder and the head by themselves, which FSDP would not notice.
    """
    if not isinstance(model, FSDPModule):
        return function(model, *args, **kwargs)
    hooked: Callable[..., T] = getattr(model, _CALL)
    return hooked(function, *args, **kwargs)


def share(items: Sequence[T]) -> list[T | None]:
    """This process's part of ``items``, filled up with None to the same number in every process."""
    mine = items[rank() :: world_size()]
    rounds = -(-len(items) // world_size())
    return [*mine, *[None] * (rounds - len(mine))]


def unshare(results: Sequence[T], count: int) -> list[T]:
    """What all processes made of their ``share`` of ``count`` items, in the order of the items.

    Args:
        results: one for each of this process's items that is not None; tensors on the CPU.
        count: items before they were shared.
    """
    everywhere = gather(list(results))
    return [everywhere[i % world_size()][i // world_size()] for i in range(count)]


def sum_tensors(*tensors: Tensor) -> None:
    """Replace each by its sum over all processes."""
    if _world is not None:
        for tensor in tensors:
            dist.all_reduce(tensor, group=_world.control if tensor.device.type == "cpu" else None)


def sum_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of all processes' micro-batches as one: the largest of ``/max``, the least of ``/min``, sums of the rest.

    A process whose micro-batches were all empty may give fewer keys than others.
    """
    total: dict[str, float] = {}
    for part in gather(dict(metrics)):
        for name, value in part.items():
            pick = max if name.endswith("/max") else min if name.endswith("/min") else float.__add__
            total[name] = pick(total[name], value) if name in total else value
    return total


def gather(value: T) -> list[T]:
    """The ``value`` of every process, in order; it is pickled."""
    if _world is None:
        return [value]
    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value, group=_world.control)
    return values


def broadcast(value: T) -> T:
    """Process 0's ``value``; it is pickled."""
    if _world is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_world.control)
    return box[0]


def _joined() -> _World:
    if _world is None:
        raise TrainingError("this process learns alone: expected one of several that torchrun started.")
    return _world


def _apply(model: Any, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    # FSDP hooks the backward pass to what comes out, and a view of it would lose the hook.
    result: T = tree_map_only(Tensor, lambda t: t.clone() if t._is_view() else t, function(model, *args, **kwargs))
    return result


def _at_least_fp32(model: Any) -> torch.dtype | None:
    """What gradients are summed in; None where they are wider than 16 bits already."""
    small = all(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters() if p.requires_grad)
    return torch.float32 if small else None
