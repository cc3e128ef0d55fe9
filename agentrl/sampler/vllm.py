"""The production sampler: vLLM's AsyncLLM, whose engine runs in a process of its own beside this one.

Token ids in, token ids out. Tokens are drawn in the engine by our own function (``vllm_worker``) and read back from
shared memory (``board``), so log-probs, entropies, seeds and versions mean what they mean in the embedded sampler.
Siblings share their prompt through vLLM's prefix cache. A weight update always empties it, since vLLM does not: keys of
the old weights give log-probs that are wrong by nats.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import tempfile
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor

from agentrl.errors import SamplerError
from agentrl.sampler.board import Board, Cells
from agentrl.sampler.request import check_request, ends_with_stop
from agentrl.sampler.transport import Kind, Transport, check_folder
from agentrl.sampler.vllm_engine import KEY, engine_arguments, start_engine
from agentrl.sampler.weights import Shapes, file_shapes, weight_files
from agentrl.types import Completion, SamplingParams, StopReason, TokenEvent

RECEIVES = (
    "load_files",
    "load_adapter",
    "transfer_init",
    "transfer_begin",
    "transfer_update",
    "transfer_end",
    "sleep",
    "wake",
)
"""Methods of ``VLLMSampler`` that take weights; a server passes them on."""


DEAD = (
    "vLLM's engine process has ended: killed, or out of memory? What it said is above. Less memory is needed with a "
    "smaller sampler.max_slots, sampler.max_length or gpu_memory_utilization; a run goes on with --resume."
)
_LOOK_SECONDS = 1.0

T = TypeVar("T")


class VLLMSampler:
    """Samples with vLLM. Made by ``start``, which brings an engine; or around an engine that somebody else closes.

    Args:
        engine: an ``AsyncLLM`` that was started with ``engine_arguments``.
        board: the one that the engine's workers write to.
        shapes: of the policy's parameters.
        vocabulary: rows of the model's embedding.
        tokenizer: needed only for ``stop_strings``.
        max_slots: requests at once, at most the board's; the others wait for their turn.
        max_length: most tokens of a sequence, at most the engine's.
        version: of the weights in the engine.
        transport: how tensors reach it.
        weights_dir: where weights are written for the engine to read.

    Attributes:
        deterministic: False: vLLM's kernels may round by the size of the batch.
        requests: requests in flight.
        prompt_tokens: tokens of all prompts so far.
        reused_tokens: those of them that came from the engine's prefix cache, by its own count.
    """

    entropies = True
    deterministic = False

    def __init__(
        self,
        engine: Any,
        board: Board,
        shapes: Shapes,
        vocabulary: int,
        tokenizer: Any = None,
        *,
        max_slots: int,
        max_length: int,
        version: int = 0,
        transport: Kind = "file",
        weights_dir: str | os.PathLike[str] = "/dev/shm",
    ) -> None:
        self.engine, self.tokenizer, self.shapes = engine, tokenizer, shapes
        self.max_length, self.version = max_length, version
        self.requests = self.prompt_tokens = self.reused_tokens = 0
        self._board, self._vocabulary = board, vocabulary
        self.transport = Transport(transport, shapes, weights_dir)
        self.workers: int = engine.vllm_config.parallel_config.world_size
        self._adapter: Any = None
        self._free = list(range(max_slots))
        self._waiting: deque[asyncio.Future[int]] = deque()
        self._running: dict[str, int] = {}  # request id -> slot
        self._counter = 0
        self._updating = asyncio.Lock()
        self._closed: SamplerError | None = None
        self._owned = False

    @classmethod
    async def start(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        max_slots: int = 256,
        max_length: int = 1024,
        version: int = 0,
        transport: Kind = "file",
        weights_dir: str | os.PathLike[str] = "/dev/shm",
        options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Start an engine. A script has to do so below ``if __name__ == "__main__"``: the engine's process imports it.

        Args:
            folder: a Hugging Face folder.
            tokenizer: needed only for ``stop_strings``.
            max_slots: requests at once.
            max_length: most tokens of a sequence.
            version: of the folder's weights.
            transport: how new weights reach the engine.
            weights_dir: where weights are written for the engine to read; default: shared memory.
            options: further arguments of vLLM's ``AsyncEngineArgs``; they win.

        Raises:
            SamplerError: vLLM is not installed, an option is unknown to it, or the engine did not start.
        """
        shapes = file_shapes(weight_files(Path(folder)))
        check_folder(weights_dir)
        own = Path(tempfile.mkdtemp(prefix="agentrl-vllm-", dir="/dev/shm"))
        try:
            board = Board.create(own / "board", max_slots, max_length)
            arguments = engine_arguments(folder, board, max_slots, max_length, transport, options or {})
            engine, vocabulary = await start_engine(arguments, transport, own)
            await engine.collective_rpc("agentrl_version", args=(version,))
        finally:
            shutil.rmtree(own, ignore_errors=True)  # all have it open; so a kill -9 leaves nothing behind
        sampler = cls(
            engine,
            board,
            shapes,
            vocabulary,
            tokenizer,
            max_slots=max_slots,
            max_length=max_length,
            version=version,
            transport=transport,
            weights_dir=weights_dir,
        )
        sampler._owned = True
        return sampler

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue ``token_ids``. See ``Sampler.sample``."""
        pieces = [piece async for piece in self.generate(token_ids, params)]
        ((ids, logprobs, entropies, versions), reason) = pieces[0]
        assert reason is not None
        return Completion(
            tuple(ids),
            tuple(logprobs),
            tuple(entropies),
            reason,
            tuple(versions),
            params.temperature,
            params.top_p,
        )

    async def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """Continue ``token_ids`` token by token; leaving the loop aborts the request."""
        generating = self.generate(token_ids, params, pieces=True)
        try:
            async for cells, reason in generating:
                last = len(cells.token_ids) - 1
                for place, cell in enumerate(zip(*cells, strict=True)):
                    yield TokenEvent(*cell, reason if place == last else None)
        finally:
            await generating.aclose()

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, start: int = 0, pieces: bool = False
    ) -> AsyncGenerator[tuple[Cells, StopReason | None], None]:
        """Continue ``token_ids``, in one piece or as tokens come; the reason is given with the last piece.

        Args:
            token_ids: [T] prompt.
            params: settings; ``max_tokens`` counts what is generated here.
            start: tokens at the end of the prompt that were generated before, of a request that is taken up again:
                its random numbers go on where they were.
            pieces: yield as soon as there are tokens.

        Raises:
            SamplerError: a request that cannot be served, or the engine failed or is closed.
        """
        check_request(
            token_ids, params, vocabulary=self._vocabulary, max_length=self.max_length, tokenizer=self.tokenizer
        )
        slot = await self._take_slot()
        self._counter += 1
        name = f"agentrl-{self._counter}"
        self._running[name] = slot
        self.requests += 1
        outputs: Any = None
        try:
            outputs = self._submit(name, token_ids, params, slot, start, pieces or bool(params.stop_strings))
            count = sent = 0
            generated = list(token_ids[len(token_ids) - start :])
            async for output in outputs:
                if output.finished:
                    self.prompt_tokens += len(token_ids)
                    self.reused_tokens += output.num_cached_tokens or 0
                part = output.outputs[0]
                ids, reason = list(part.token_ids), _reason(part.finish_reason)
                if part.finish_reason not in (None, "stop", "length"):
                    raise self._closed or SamplerError(f"vLLM ended the request with {part.finish_reason!r}.")
                if self._board.read(slot, count, count + len(ids)).token_ids != ids:
                    raise SamplerError(
                        "vLLM's tokens are not those that were drawn: expected the engine to sample through agentrl's "
                        "logits processor. Is another processor, speculative decoding or async_scheduling switched on?"
                    )
                for token in ids:  # the engine knows no stop strings, and may be a few tokens ahead of this
                    count += 1
                    generated.append(token)
                    if ends_with_stop(self.tokenizer, generated, params.stop_strings):
                        reason = StopReason.STOP
                        break
                if pieces or reason is not None:
                    yield self._board.read(slot, sent, count), reason
                    sent = count
                if reason is not None:
                    return
            raise self._closed or SamplerError("vLLM ended a request without saying why.")
        except SamplerError:
            raise
        except Exception as error:
            why = DEAD if self.engine.errored else f"vLLM failed: {type(error).__name__}: {error}"
            raise self._closed or SamplerError(why) from error
        finally:
            if outputs is not None:
                await outputs.aclose()
            del self._running[name]
            self.requests -= 1
            self._give_slot(slot)

    async def update_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Use ``source`` from now on: name -> tensor, a checkpoint folder, or a folder of LoRA adapters.

        Requests in flight stop for it and go on with the new weights, computed again from their first token, so that
        no token rests on keys of old weights.

        Raises:
            SamplerError: weights of another policy, which are refused before anything is loaded; or the engine failed
                while it loaded them, after which nothing can be sampled any more.
        """
        async with self._updating:
            self._check_open()
            await self.transport.send(source, version, [self])

    async def receive(self, method: str, **arguments: Any) -> None:
        """One of ``RECEIVES``: for whoever sends weights to several engines, see ``transport``."""
        if method not in RECEIVES:
            raise SamplerError(f"{method!r} takes no weights: expected one of {', '.join(RECEIVES)}.")
        await getattr(self, method)(**arguments)

    async def load_files(self, files: Sequence[str], version: int) -> None:
        """Load all weights from safetensors ``files``."""
        async with self._loading(version):
            counts = await self._ask(self.engine.collective_rpc, "agentrl_load", args=(list(files), version))
            if set(counts) != {len(self.shapes)}:
                raise SamplerError(f"the engine's workers loaded {counts} tensors, expected {len(self.shapes)} each.")

    async def load_adapter(self, folder: str, version: int) -> None:
        """Put the LoRA adapters in ``folder`` in the place of the last ones; the engine runs with ``enable_lora``."""
        from vllm.lora.request import LoRARequest

        if self._adapter is None and self._running:
            raise SamplerError("requests in flight began without adapters: give the first ones before anything else.")
        async with self._loading(version):
            request = LoRARequest("policy", 1, folder, load_inplace=True)
            if not await self._ask(self.engine.add_lora, request):
                raise SamplerError(f"the engine did not take the adapters in {folder}.")
            await self._ask(self.engine.collective_rpc, "agentrl_version", args=(version,))
            self._adapter = LoRARequest("policy", 1, folder)

    async def transfer_init(self, info: dict[str, Any]) -> None:
        """Meet vLLM's trainer; ``weight_transfer_config`` names the backend."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._ask(self.engine.init_weight_transfer_engine, WeightTransferInitRequest(init_info=info))

    async def transfer_begin(self) -> None:
        """Pause until ``transfer_end``."""
        async with self._all_or_nothing():
            await self._ask(self.engine.pause_generation, mode="keep", clear_cache=False)
            await self._ask(self.engine.start_weight_update)

    async def transfer_update(self, info: Any) -> None:
        """Take a part of the weights."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._all_or_nothing():
            await self._ask(self.engine.update_weights, WeightTransferUpdateRequest(update_info=info))

    async def transfer_end(self, version: int) -> None:
        """All parts are there."""
        async with self._loading(version):
            await self._ask(self.engine.finish_weight_update)
            await self._ask(self.engine.collective_rpc, "agentrl_version", args=(version,))

    async def sleep(self) -> None:
        """Give the GPU's memory to the learner until ``wake``: weights move to the host, keys and values are dropped.

        Only with the option ``enable_sleep_mode``; else, and on the CPU, nothing is held that could be given.
        """
        if self.engine.vllm_config.model_config.enable_sleep_mode:
            await self._ask(self.engine.sleep, level=1, mode="keep")

    async def wake(self) -> None:
        """Take the memory back."""
        if self.engine.vllm_config.model_config.enable_sleep_mode:
            await self._ask(self.engine.wake_up)

    async def close(self) -> None:
        """Abort what is in flight and stop the engine, if it is ours. Safe to call twice."""
        if self._closed is None:
            self._closed = SamplerError("the sampler is closed: close() was called")
        self.transport.close()
        with suppress(Exception):  # of an engine that is dead already
            await self.engine.abort(list(self._running))
        self._fail_waiting()
        if self._owned:
            self._owned = False
            if (handler := self.engine.output_handler) is not None:
                handler.cancel()  # or it reports that its engine is gone
                await asyncio.wait([handler])
            await asyncio.to_thread(self.engine.shutdown)
            self.engine = None
            gc.collect()  # it is full of cycles, and complains when it is found at the end of the process

    # -- within ------------------------------------------------------------------------------------------------------

    def _submit(
        self, name: str, token_ids: Sequence[int], params: SamplingParams, slot: int, start: int, pieces: bool
    ) -> Any:
        from vllm import SamplingParams as EngineParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        seed = params.seed & 0xFFFFFFFFFFFFFFFF
        settings = EngineParams(
            temperature=0.0,  # the token is drawn before vLLM looks at it
            max_tokens=min(params.max_tokens, self.max_length - len(token_ids)),
            stop_token_ids=list(params.stop_ids),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if pieces else RequestOutputKind.FINAL_ONLY,
            extra_args={KEY: [slot, seed, params.temperature, params.top_p, start]},
        )
        prompt = tokens_input(list(token_ids))
        return self.engine.generate(prompt, settings, name, lora_request=self._adapter)

    @asynccontextmanager
    async def _loading(self, version: int) -> AsyncIterator[None]:
        """New weights come in here, while nothing is sampled."""
        async with self._all_or_nothing():
            await self._ask(self.engine.pause_generation, mode="keep", clear_cache=False)
            yield
            if not await self._ask(self.engine.reset_prefix_cache, reset_running_requests=True):
                raise SamplerError("the engine did not empty its prefix cache: its keys are of the old weights.")
            await self._ask(self.engine.resume_generation)
        self.version = version

    @asynccontextmanager
    async def _all_or_nothing(self) -> AsyncIterator[None]:
        """Where loading fails half of the weights may be in, so nothing is sampled any more."""
        try:
            yield
        except BaseException as error:
            self._closed = SamplerError(f"vLLM did not take the weights: {type(error).__name__}: {error}")
            self._fail_waiting()
            with suppress(Exception):
                await self.engine.abort(list(self._running))
            if not isinstance(error, Exception):
                raise
            raise self._closed from error

    async def _ask(self, call: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Await a call of the engine, but no longer than the engine lives: its death leaves calls without an answer."""
        asked = asyncio.ensure_future(call(*args, **kwargs))
        try:
            while not (await asyncio.wait([asked], timeout=_LOOK_SECONDS))[0]:
                if self.engine.errored:
                    raise SamplerError(DEAD)
            return asked.result()
        finally:
            asked.cancel()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise SamplerError(str(self._closed)) from self._closed

    async def _take_slot(self) -> int:
        """A free row of the board, first come first served."""
        self._check_open()
        if self._free:
            return self._free.pop()
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_slot(turn.result())
            raise

    def _give_slot(self, slot: int) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        self._free.append(slot)

    def _fail_waiting(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(SamplerError(str(self._closed)))


def _reason(finish_reason: str | None) -> StopReason | None:
    return None if finish_reason is None else StopReason.STOP if finish_reason == "stop" else StopReason.LENGTH
