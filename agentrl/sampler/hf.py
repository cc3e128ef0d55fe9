"""The embedded sampler: continuous batching over a transformers model, in one engine thread.

Requests arrive from coroutines and join the running batch at the next step. A prompt's known beginning is taken from
the slot that holds it (an episode's next turn continues in its own slot; siblings copy the shared prompt once), so a
group's prompt is computed once. Random numbers depend on (seed, position) only, and on the CPU in fp32 the log-probs
are bit for bit the same whatever else is in the batch; that is checked at start-up and told in ``deterministic``.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agentrl.errors import SamplerError
from agentrl.sampler.draw import Manner, draw, streams, uniforms
from agentrl.sampler.prefix import PrefixIndex
from agentrl.sampler.proof import cannot_sample, check_lengths, plain_logits, prove
from agentrl.sampler.request import check_request, ends_with_stop
from agentrl.sampler.slots import ATTENTION, ROWS, Chunk, SlotCache
from agentrl.sampler.weights import check_weights, read_weights
from agentrl.types import Completion, SamplingParams, StopReason, TokenEvent

MAX_ROWS = 8192
"""Packed tokens of one forward pass; longer prompts are computed over several."""


@dataclass(eq=False)
class _Request:
    """One sequence in flight. Owned by the engine thread once submitted."""

    tokens: list[int]
    params: SamplingParams
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[Completion]
    emit: Callable[[TokenEvent], None] | None = None
    prompt_length: int = 0
    slot: int = -1
    computed: int = 0
    events: list[TokenEvent] = field(default_factory=list)


class HFSampler:
    """Samples from a transformers causal language model on the CPU or a GPU.

    Args:
        model: put into eval mode and switched to the engine's attention; the sampler owns it from now on.
        tokenizer: needed only for ``stop_strings``.
        max_slots: sequences held at once, finished ones kept for prefix reuse included.
        max_length: most tokens of a sequence.
        version: version of the weights in ``model``.

    Raises:
        UserError: the model does not give the same log-probs through the engine's attention (named), or the
            length is above what its positions or its attention window allow.
    """

    entropies = True

    def __init__(
        self, model: Any, tokenizer: Any = None, *, max_slots: int = 512, max_length: int = 1024, version: int = 0
    ) -> None:
        check_lengths(model, max_length)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_length, self.version = max_length, version
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]
        parameter = next(model.parameters())
        try:
            model.set_attn_implementation("sdpa")
            reference = plain_logits(model, max_length)
            model.set_attn_implementation(ATTENTION)
            self._cache = SlotCache(model.config, max_slots, max_length, parameter.dtype, parameter.device)
            self.deterministic = prove(model, reference, self._forward, slots=max_slots, max_length=max_length)
        except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # a foreign model may fail anywhere
            raise cannot_sample(model, error) from error
        self._index = PrefixIndex()
        self._free = list(range(max_slots))
        heapify(self._free)
        self._idle: OrderedDict[int, int] = OrderedDict()  # slot -> computed tokens, least recently used first
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._by_slot: dict[int, _Request] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed: BaseException | None = None  # set by the engine thread; why it stops
        self._ended = False  # set under the lock; nobody reads the inbox any more
        self.prompt_tokens = self.reused_tokens = self.generated_tokens = 0
        self._thread = threading.Thread(target=self._loop, name="agentrl-sampler", daemon=True)
        self._thread.start()

    # -- the coroutine side --------------------------------------------------------------------------------------

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue ``token_ids``. See ``Sampler.sample``."""
        request = self._request(token_ids, params)
        self._submit(lambda: self._waiting.append(request))
        try:
            return await request.done
        except asyncio.CancelledError:
            self._post(lambda: self._drop(request))
            raise

    async def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """Continue ``token_ids`` token by token; leaving the loop cancels the request."""
        request = self._request(token_ids, params)
        queue: asyncio.Queue[TokenEvent | None] = asyncio.Queue()
        request.emit = queue.put_nowait
        request.done.add_done_callback(lambda _: queue.put_nowait(None))
        self._submit(lambda: self._waiting.append(request))
        try:
            while (event := await queue.get()) is not None:
                yield event
            request.done.result()
        finally:
            if not request.done.done():
                self._post(lambda: self._drop(request))

    async def update_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Copy ``source`` over the model's parameters between two steps; cached keys and values are discarded.

        Requests in flight are computed again from their first token, so that no token rests on mixed weights.

        Raises:
            SamplerError: a parameter is missing, unknown or of another shape.
        """
        weights = await asyncio.to_thread(read_weights, source) if isinstance(source, Path) else source
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def apply() -> None:
            try:
                self._load(weights, version)
            except SamplerError as error:
                _tell(loop, _reject, done, error)
            except BaseException as error:  # half of the weights may be in: nothing can be sampled any more
                self._closed = error
                _tell(loop, _reject, done, self._failure())
            else:
                _tell(loop, _resolve, done, None)

        self._submit(apply)
        await done

    async def close(self) -> None:
        """Stop the engine thread and give its keys and values back. Safe to call twice."""
        self._post(self._stop)
        await asyncio.to_thread(self._thread.join)
        # Finished trees are reference cycles that hold their sampler until Python collects them, maybe a run later.
        self._cache.keys.clear()
        self._cache.values.clear()

    def _request(self, token_ids: Sequence[int], params: SamplingParams) -> _Request:
        check_request(
            token_ids, params, vocabulary=self._vocabulary, max_length=self.max_length, tokenizer=self.tokenizer
        )
        loop = asyncio.get_running_loop()
        return _Request(list(token_ids), params, loop, loop.create_future(), prompt_length=len(token_ids))

    def _submit(self, action: Callable[[], None]) -> None:
        with self._wake:
            if self._ended:
                raise self._failure()
            self._inbox.append(action)
            self._wake.notify()

    def _failure(self) -> SamplerError:
        why = self._closed if isinstance(self._closed, SamplerError) else repr(self._closed)
        failure = SamplerError(f"the sampler is closed: {why}")
        failure.__cause__ = self._closed
        return failure

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(action)
            self._wake.notify()

    # -- the engine thread ---------------------------------------------------------------------------------------

    def _loop(self) -> None:
        try:
            while self._closed is None:
                with self._wake:
                    while not (self._inbox or self._running or self._waiting):
                        self._wake.wait()
                    actions = list(self._inbox)
                    self._inbox.clear()
                for action in actions:
                    action()
                if self._closed is None:
                    self._admit()
                    if self._running:
                        self._step()
        except BaseException as error:
            self._closed = error
        with self._wake:
            self._ended = True
            late = list(self._inbox)
        for action in late:
            action()
        for request in (*self._running, *self._waiting):
            _tell(request.loop, _reject, request.done, self._failure())

    def _stop(self) -> None:
        self._closed = SamplerError("close() was called")

    def _admit(self) -> None:
        """Give slots to waiting requests, first come first served."""
        held: deque[_Request] = deque()
        while self._waiting:
            request = self._waiting.popleft()
            if not self._place(request):
                held.append(request)
                if not (self._free or self._idle):
                    break
        self._waiting.extendleft(reversed(held))

    def _place(self, request: _Request) -> bool:
        """Find a slot; False where there is none, or where a running request is about to compute a shared prompt."""
        prompt = request.tokens[:-1]
        found = self._index.find(prompt)
        longest = [(slot, shared) for slot, shared in found if shared == found[0][1]]
        source, shared = -1, 0
        for slot, count in longest:
            if self._idle.get(slot) == count:  # its whole content begins our prompt: continue in it
                del self._idle[slot]
                return self._start(request, slot, count)
        for slot, count in longest:
            owner = self._by_slot.get(slot)
            if owner is None or owner.computed >= count:
                source, shared = slot, count
                break
        if longest and source < 0:
            return False
        if not (self._free or self._idle):
            return False
        if source in self._idle:
            self._idle.move_to_end(source)
        target = self._take_slot(keep=source)
        if target != source and shared:
            self._cache.copy(source, target, shared)
        return self._start(request, target, shared)

    def _take_slot(self, keep: int) -> int:
        if self._free:
            return heappop(self._free)
        slot = next((s for s in self._idle if s != keep), keep)
        del self._idle[slot]
        if slot != keep:
            self._index.drop(slot)
        return slot

    def _start(self, request: _Request, slot: int, computed: int) -> bool:
        request.slot, request.computed = slot, computed
        self._index.drop(slot)
        self._index.put(slot, request.tokens[: request.prompt_length])
        self._running.append(request)
        self._by_slot[slot] = request
        self.prompt_tokens += request.prompt_length
        self.reused_tokens += computed
        return True

    def _release(self, request: _Request) -> None:
        """Keep the slot's content for whoever continues it."""
        self._by_slot.pop(request.slot, None)
        if request.computed:
            self._index.put(request.slot, request.tokens[: request.computed])
            self._idle[request.slot] = request.computed
        else:
            self._index.drop(request.slot)
            heappush(self._free, request.slot)

    def _drop(self, request: _Request) -> None:
        """A cancelled request gives its slot back."""
        if request in self._running:
            self._running.remove(request)
            # Its prompt may be only half computed, and the index already promises all of it.
            self._index.drop(request.slot)
            self._release(request)
        elif request in self._waiting:
            self._waiting.remove(request)

    def _step(self) -> None:
        """One forward pass: every running request computes its new tokens; those at their end draw the next one."""
        chunks: list[Chunk] = []
        drawing: list[tuple[int, _Request]] = []
        room = MAX_ROWS
        for request in self._running:
            fresh = request.tokens[request.computed : request.computed + room]
            if not fresh:
                break
            room -= len(fresh)
            chunks.append(Chunk(request.slot, request.computed, fresh))
            request.computed += len(fresh)
            if request.computed == len(request.tokens):
                drawing.append((len(chunks) - 1, request))
        logits = self._forward(chunks)
        if drawing:
            self._draw(logits, drawing)

    @torch.inference_mode()
    def _forward(self, chunks: list[Chunk]) -> Tensor:
        """[C, padded to a multiple of ROWS; V] logits of the last row of each chunk, in fp32."""
        plan = self._cache.plan(chunks)
        hidden = self.model.get_decoder()(
            input_ids=plan.token_ids, position_ids=plan.position_ids, use_cache=False, slots=self._cache, plan=plan
        ).last_hidden_state[0]
        short = -len(chunks) % ROWS
        rows = torch.cat([plan.last, plan.last[:1].expand(short)]) if short else plan.last
        logits: Tensor = self.model.get_output_embeddings()(hidden[rows])
        return logits.float()

    @torch.inference_mode()
    def _draw(self, logits: Tensor, drawing: list[tuple[int, _Request]]) -> None:
        rows = [row for row, _ in drawing]
        rows += [rows[0]] * (-len(rows) % ROWS)
        requests = [drawing[min(i, len(drawing) - 1)][1] for i in range(len(rows))]
        params = [request.params for request in requests]
        drawn = draw(
            logits if rows == list(range(len(logits))) else logits[rows],
            Manner.of([p.temperature for p in params], [p.top_p for p in params], logits.device),
            uniforms(streams([p.seed for p in params]), [len(request.events) for request in requests]),
        )
        ids, logprobs, entropies = (column.tolist() for column in drawn)
        deliveries: list[tuple[_Request, TokenEvent]] = []
        for i, (_, request) in enumerate(drawing):
            request.tokens.append(ids[i])
            reason = self._stop_reason(request)
            event = TokenEvent(ids[i], logprobs[i], entropies[i], self.version, reason)
            request.events.append(event)
            if request.emit is not None or reason is not None:
                deliveries.append((request, event))
        self.generated_tokens += len(drawing)
        self._deliver(deliveries)

    def _stop_reason(self, request: _Request) -> StopReason | None:
        params = request.params
        generated = len(request.tokens) - request.prompt_length
        if request.tokens[-1] in params.stop_ids:
            return StopReason.STOP
        if ends_with_stop(self.tokenizer, request.tokens[request.prompt_length :], params.stop_strings):
            return StopReason.STOP
        if generated >= params.max_tokens or len(request.tokens) >= self.max_length:
            return StopReason.LENGTH
        return None

    def _deliver(self, deliveries: list[tuple[_Request, TokenEvent]]) -> None:
        """Hand events and finished completions to their event loops, one call a loop and step."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Request, TokenEvent]]] = {}
        for request, event in deliveries:
            by_loop.setdefault(request.loop, []).append((request, event))
            if event.stop_reason is not None:
                self._running.remove(request)
                self._release(request)
        for loop, items in by_loop.items():
            _tell(loop, _publish, items)

    def _load(self, source: Mapping[str, Tensor], version: int) -> None:
        if self._closed is not None:
            raise self._failure()
        own = dict(self.model.named_parameters())
        check_weights(source, {name: tuple(parameter.shape) for name, parameter in own.items()})
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(source[name])
        self.version = version
        self._index.clear()
        for slot in self._idle:
            heappush(self._free, slot)
        self._idle.clear()
        for request in self._running:
            request.computed = 0


def _publish(items: list[tuple[_Request, TokenEvent]]) -> None:
    for request, event in items:
        if request.emit is not None:
            request.emit(event)
        if event.stop_reason is not None and not request.done.done():
            request.done.set_result(_completion(request, event.stop_reason))


def _completion(request: _Request, reason: StopReason) -> Completion:
    ids, logprobs, entropies, versions, _ = zip(*request.events, strict=True)
    return Completion(ids, logprobs, entropies, reason, versions, request.params.temperature, request.params.top_p)


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _reject(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: Any) -> None:
    """Call ``callback`` in ``loop``; where that has ended, nobody waits for it any more."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)
