"""How new weights reach vLLM's engines: as a file, as an adapter, or from GPU to GPU.

``file`` writes safetensors where the engines can read them, in shared memory on one machine. ``ipc`` and ``nccl`` are
vLLM's own weight transfer (its trainer side runs here): handles to the learner's GPU memory for an engine on the same
GPU, a broadcast to engines on other GPUs. ``adapter`` writes LoRA adapters alone. A checkpoint folder can be given with
any of them. Whatever the road, the engine pauses, loads, empties its prefix cache, and goes on (``VLLMSampler``).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from agentrl.errors import SamplerError
from agentrl.sampler.weights import ADAPTER_CONFIG, Shapes, check_weights, file_shapes, weight_files, write_weights

_PREFIX = f"agentrl-{socket.gethostname()}-"
"""Of files; the folder may be one that several machines see."""

Kind = Literal["file", "ipc", "nccl", "adapter"]


class Receiver(Protocol):
    """An engine that takes weights, in this process or behind HTTP."""

    workers: int
    """Its GPUs: tensor parallel size."""

    async def receive(self, method: str, **arguments: Any) -> None:
        """Call one of ``VLLMSampler``'s methods that take weights; arguments are what JSON can hold."""
        ...


def check_folder(weights_dir: str | os.PathLike[str]) -> None:
    """Refuse a folder that weights cannot be written to.

    Raises:
        SamplerError: it says so.
    """
    if not Path(weights_dir).is_dir() or not os.access(weights_dir, os.W_OK):
        raise SamplerError(f"sampler.weights_dir is {weights_dir}: expected a folder that can be written to.")


class Transport:
    """Sends weights to all ``receivers``, and again to one that has lost them.

    Args:
        kind: the road for tensors.
        shapes: of the policy's parameters.
        weights_dir: where files go; every engine has to see them under the same path.
        keep: the last file stays for ``resend``, until the next one or ``close``.
    """

    def __init__(self, kind: Kind, shapes: Shapes, weights_dir: str | os.PathLike[str], *, keep: bool = False) -> None:
        self.kind, self.shapes = kind, shapes
        self._keep = keep
        self._folder = Path(weights_dir)
        self._clean()
        self._written: Path | None = None
        self._last: tuple[str, dict[str, Any]] | None = None
        self._gpu: Any = None

    async def send(self, source: Mapping[str, Tensor] | Path, version: int, receivers: Sequence[Receiver]) -> None:
        """Send ``source``: name -> tensor, a checkpoint folder, or a folder of LoRA adapters.

        Raises:
            SamplerError: weights of another policy, which are refused before anything is sent; no room for the file;
                or a receiver that did not take them.
        """
        if isinstance(source, Path):
            written, call = await asyncio.to_thread(self._from_folder, source, version)
        elif self.kind in ("ipc", "nccl"):
            check_weights(source, self.shapes)
            if self._gpu is None:
                self._gpu = _GPUTransfer(self.kind, receivers)
            await self._gpu.send(source, version)
            self._forget()
            return
        elif self.kind == "file":
            check_weights(source, self.shapes)
            written = self._name(".safetensors")
            await asyncio.to_thread(write_weights, source, written)
            call = "load_files", {"files": [str(written)], "version": version}
        else:
            raise SamplerError("sampler.transport is adapter, which takes a folder of adapters, got tensors.")
        try:
            await _all(receiver.receive(call[0], **call[1]) for receiver in receivers)
            self._forget()
            if self._keep or call[0] == "load_adapter":  # which an engine may read again
                self._written, self._last, written = written, call, None
        finally:
            _remove(written)

    async def resend(self, receiver: Receiver) -> None:
        """Send the last weights again.

        Raises:
            SamplerError: there are none, or they went from GPU to GPU and are not kept.
        """
        if self._last is None:
            raise SamplerError("there are no weights to send again: none were sent yet, or not as files.")
        await receiver.receive(self._last[0], **self._last[1])

    def close(self) -> None:
        """Remove the last file. Safe to call twice."""
        self._forget()

    def _forget(self) -> None:
        _remove(self._written)
        self._written = self._last = None

    def _from_folder(self, source: Path, version: int) -> tuple[Path | None, tuple[str, dict[str, Any]]]:
        """What was written for it, and the call that takes it."""
        if (source / ADAPTER_CONFIG).is_file():
            copy = self._name("")
            shutil.copytree(source, copy)
            return copy, ("load_adapter", {"folder": str(copy), "version": version})
        files = [path.absolute() for path in weight_files(source)]
        check_weights(file_shapes(files), self.shapes)
        return None, ("load_files", {"files": [str(path) for path in files], "version": version})

    def _name(self, ending: str) -> Path:
        return self._folder.absolute() / f"{_PREFIX}{os.getpid()}-{os.urandom(4).hex()}{ending}"

    def _clean(self) -> None:
        """Remove what processes of this machine left there that were killed."""
        for path in self._folder.glob(f"{_PREFIX}*-*"):
            owner = path.name.removeprefix(_PREFIX).partition("-")[0]
            if owner.isdecimal() and not Path("/proc", owner).exists():
                _remove(path)


class _GPUTransfer:
    """vLLM's trainer side, told to talk to our receivers. Runs on a GPU only; ``tests/gpu`` has its test."""

    def __init__(self, kind: str, receivers: Sequence[Receiver]) -> None:
        import torch

        if not torch.cuda.is_available():
            raise SamplerError(f"sampler.transport is {kind}, which moves GPU memory: there is no GPU here. Use file.")
        if kind == "ipc" and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise SamplerError("sampler.transport is ipc, which takes one learner process: use nccl under torchrun.")
        self._kind, self._receivers = kind, receivers
        self._trainer: Any = None
        self._version = 0

    async def send(self, source: Mapping[str, Tensor], version: int) -> None:
        self._version = version
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._send, source)
        except SamplerError:
            raise
        except Exception as error:
            raise SamplerError(
                f"weights did not get through by {self._kind}: {type(error).__name__}: {error}"
            ) from error

    def _send(self, source: Mapping[str, Tensor]) -> None:
        import torch

        device = next(iter(source.values())).device
        torch.cuda.set_device(device)  # of this thread
        weights = _source(source)
        if self._trainer is None:
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

            self._trainer = WeightTransferTrainerFactory.trainer_init(self._init_info(), client=self, source=weights)
        self._trainer.source = weights
        self._trainer.send_weights()

    def _init_info(self) -> Any:
        if self._kind == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=0)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        world = 1 + sum(receiver.workers for receiver in self._receivers)
        return NCCLTrainerInitInfo(rank=0, master_address=_address(), master_port=_free_port(), world_size=world)

    # What vLLM's trainer calls, from its threads.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine's workers follow those of the engines before it."""
        infos, rank = [], 1
        for receiver in self._receivers:
            infos.append(init_info | {"rank_offset": rank} if "rank_offset" in init_info else init_info)
            rank += receiver.workers
        self._call([r.receive("transfer_init", info=info) for r, info in zip(self._receivers, infos, strict=True)])

    def start_weight_update(self) -> None:
        """Pause, and make ready."""
        self._call([receiver.receive("transfer_begin") for receiver in self._receivers])

    def update_weights(self, update_info: Any) -> None:
        """Take a part."""
        from vllm.distributed.weight_transfer.clients import _json_safe_update_payload

        info = _json_safe_update_payload(update_info)
        self._call([receiver.receive("transfer_update", info=info) for receiver in self._receivers])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Use the new weights, and go on."""
        self._call([receiver.receive("transfer_end", version=self._version) for receiver in self._receivers])

    def _call(self, calls: Sequence[Any]) -> None:
        asyncio.run_coroutine_threadsafe(_all(calls), self._loop).result()


def _source(weights: Mapping[str, Tensor]) -> Any:
    """``weights`` as vLLM's trainer wants them."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):  # type: ignore[misc]
        def metadata(self) -> list[Any]:
            return [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in weights.items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(weights.items())

    return Source()


def _remove(path: Path | None) -> None:
    if path is not None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


async def _all(calls: Any) -> None:
    """Await all ``calls`` at once, to the end; then raise the first error, if there was one."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException):
            raise error


def _address() -> str:
    """This machine's, as other machines see it; on one machine loopback would do, and this does too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 1))  # sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
