"""vLLM as a server: the client of one or more ``agentrl serve``, behind the protocol of every sampler.

What happens when something fails (``docs/vllm.md`` has it as a table):

- An answer that breaks off is taken up where it broke off, on the same server or another one: tokens are a function of
  (seed, position, weights), so the request is asked for again as prompt + tokens so far, and no token is given twice.
- A server that fails rests, ``REST_SECONDS`` and then twice as long with each failure up to ``LONGEST_REST_SECONDS``,
  while others take its requests. Before it is used again it is asked what it is. If it was restarted, it gets the
  last weights again.
- A request fails after ``ATTEMPTS`` answers in a row that broke off without a token; every request fails when no server
  has answered for ``patience`` seconds.
- Every token says which weights drew it. Weights that nobody expected are an error, never a sample.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from agentrl.errors import SamplerError
from agentrl.sampler.request import check_request
from agentrl.sampler.server_wire import TOKEN_VARIABLE, WIRE, Piece, encode_params, print_shapes, print_tokenizer
from agentrl.sampler.transport import Kind, Transport
from agentrl.sampler.vllm_connection import SILENT_SECONDS, Failed, Server, Unreachable
from agentrl.sampler.vllm_turns import Turns
from agentrl.sampler.weights import Shapes
from agentrl.types import Completion, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from torch import Tensor

ATTEMPTS = 5
"""Answers of a request that may break off, one after the other, without a token."""
PATIENCE_SECONDS = 300.0
"""How long no server may answer: a restart takes half a minute on the CPU, minutes with a large model."""
_AGAIN = ("load_files", "load_adapter")  # calls that may be made twice


class VLLMServerSampler:
    """Samples on servers. Made by ``start``.

    Args:
        servers: that have been asked what they are.
        transport: how tensors reach them.
        tokenizer: needed only for ``stop_strings``.
        vocabulary: rows of the model's embedding.
        max_length: most tokens of a sequence.
        version: of the weights that the servers should have.
        patience: see ``PATIENCE_SECONDS``.

    Attributes:
        deterministic: False: vLLM's kernels may round by the size of the batch.
        prompt_tokens: tokens of all prompts that the servers have seen since they started, as of the last ``count``.
        reused_tokens: those of them that came from their prefix caches.
    """

    entropies = True
    deterministic = False

    def __init__(
        self,
        servers: Sequence[Server],
        transport: Transport,
        tokenizer: Any,
        vocabulary: int,
        *,
        max_length: int,
        version: int,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.servers, self.transport, self.tokenizer = list(servers), transport, tokenizer
        self.max_length, self.version = max_length, version
        self.prompt_tokens = self.reused_tokens = 0
        self._vocabulary = vocabulary
        self._turns = Turns(self.servers, patience)
        self._target: int | None = None  # of an update in flight
        self._history = [version]
        self._given = False
        self._updating = asyncio.Lock()
        self._closed: SamplerError | None = None
        self._name = uuid.uuid4().hex
        self._numbers = itertools.count()

    @classmethod
    async def start(
        cls,
        urls: Sequence[str],
        *,
        shapes: Shapes,
        tokenizer: Any,
        vocabulary: int,
        max_length: int,
        version: int = 0,
        max_slots: int | None = None,
        transport: Kind = "file",
        weights_dir: str | os.PathLike[str] = "/dev/shm",
        token: str | None = None,
        patience: float = PATIENCE_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ) -> Self:
        """Meet the servers.

        Args:
            urls: as ``agentrl serve`` printed them.
            shapes: of the policy's parameters.
            tokenizer: the policy's; None where there are no ``stop_strings``, and then it is not compared.
            vocabulary: rows of the model's embedding.
            max_length: most tokens of a sequence.
            version: of the weights that they should have; others are an error at the first request, unless
                ``update_weights`` has come before it.
            max_slots: requests at once on each server; default: what the server has.
            transport: how tensors reach the servers.
            weights_dir: where weights are written, a folder that the servers see under the same path.
            token: the servers'; default: in the variable ``AGENTRL_SERVER_TOKEN``.
            patience: seconds without any answer after which requests fail.
            silent_seconds: silence of one server after which it is taken for gone.

        Raises:
            SamplerError: a server does not answer or has another model, tokenizer, length or wire version than
                expected; it says url, expected and found.
        """
        token = token or os.environ.get(TOKEN_VARIABLE, "")
        if not urls or not token:
            lacks = "sampler.urls is empty: give" if not urls else f"{TOKEN_VARIABLE} is not set: it has to be"
            raise SamplerError(f"{lacks} what agentrl serve printed.")
        servers = [Server(url, token, silent_seconds=silent_seconds) for url in urls]
        road = Transport(transport, shapes, weights_dir, keep=True)
        sampler = cls(servers, road, tokenizer, vocabulary, max_length=max_length, version=version, patience=patience)
        try:
            known: dict[str, Server] = {}
            for server, info in zip(servers, await sampler._infos(), strict=True):
                if (twin := known.setdefault(str(info.get("instance")), server)) is not server:
                    raise SamplerError(f"sampler.urls names one server twice: {twin.url} and {server.url}.")
                sampler._adopt(server, info)
                server.slots = min(info["max_slots"], max_slots or info["max_slots"])
                server.ready = True
        except BaseException:
            await sampler.close()
            raise
        return sampler

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Continue ``token_ids``. See ``Sampler.sample``."""
        events = [event async for event in self._events(token_ids, params, pieces=False)]
        ids, logprobs, entropies, versions, reasons = zip(*events, strict=True)
        return Completion(ids, logprobs, entropies, reasons[-1], versions, params.temperature, params.top_p)

    async def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncGenerator[TokenEvent, None]:
        """Continue ``token_ids`` token by token; leaving the loop ends the request on the server."""
        async with aclosing(self._events(token_ids, params, pieces=True)) as events:
            async for event in events:
                yield event

    async def update_weights(self, source: Mapping[str, Tensor] | Path, version: int) -> None:
        """Use ``source`` from now on: name -> tensor, a checkpoint folder, or a folder of LoRA adapters.

        Raises:
            SamplerError: weights of another policy, which are refused before anything is sent; or a server did not
                take them, and those that did get the last ones again before they are asked for tokens.
        """
        async with self._updating:
            self._check_open()
            self._target = version
            self._history.append(version)
            try:
                await self.transport.send(source, version, [_Receiver(self, server) for server in self.servers])
            except BaseException:
                self._history.append(self.version)
                for server in self.servers:
                    server.ready = False
                raise
            finally:
                self._target = None
            self.version, self._given = version, True
            self._turns.forget()

    async def count(self) -> None:
        """Bring ``prompt_tokens`` and ``reused_tokens`` up to date.

        Raises:
            SamplerError: a server does not answer.
        """
        infos = await self._infos()
        self.prompt_tokens = sum(info["prompt_tokens"] for info in infos)
        self.reused_tokens = sum(info["reused_tokens"] for info in infos)

    async def close(self) -> None:
        """End what is in flight. The servers stay. Safe to call twice."""
        if self._closed is None:
            self._closed = SamplerError("the sampler is closed: close() was called")
        self.transport.close()
        self._turns.close(self._closed)
        for server in self.servers:
            await server.close()

    # -- within ------------------------------------------------------------------------------------------------------

    async def _events(
        self, token_ids: Sequence[int], params: SamplingParams, *, pieces: bool
    ) -> AsyncGenerator[TokenEvent, None]:
        async with aclosing(self._generate(token_ids, params, pieces)) as generating:
            async for piece in generating:
                last = len(piece.cells.token_ids) - 1
                for place, cell in enumerate(zip(*piece.cells, strict=True)):
                    yield TokenEvent(*cell, piece.reason if place == last else None)

    async def _generate(
        self, token_ids: Sequence[int], params: SamplingParams, pieces: bool
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer, from as many servers as it takes."""
        check_request(
            token_ids, params, vocabulary=self._vocabulary, max_length=self.max_length, tokenizer=self.tokenizer
        )
        self._check_open()
        prompt = list(token_ids)
        settings = encode_params(params)
        limit = min(params.max_tokens, self.max_length - len(prompt))
        since = len(self._history) - (1 if self._target is None else 2)
        done: list[int] = []
        tries, again, name = 0, False, f"{self._name}-{next(self._numbers)}"
        while True:
            server = await self._turns.take(prompt, again=again)
            again, asked = True, False
            try:
                await self._make_ready(server)
                asked = True
                body = {
                    "id": name,
                    "token_ids": prompt + done,
                    "params": settings | {"max_tokens": limit - len(done)},
                    "start": len(done),
                    "pieces": pieces,
                    "revisions": list(server.revisions),
                }
                async with aclosing(server.sample(body)) as answer:
                    async for piece in answer:
                        self._check_versions(server, piece, since)
                        self._turns.answered(server)
                        done += piece.cells.token_ids
                        tries = 0
                        yield piece
                        if piece.reason is not None:
                            break
                    else:
                        raise Unreachable("the answer ended before the tokens did")
                    async for more in answer:
                        raise Unreachable(f"tokens after the last one: {more}")
                return
            except Unreachable as problem:
                self._check_open()
                self._turns.failed(server, problem)
                tries += asked and problem.seconds is None
                if tries >= ATTEMPTS:
                    raise SamplerError(
                        f"{server.url} broke off {tries} answers in a row without a token, the last time: {problem}. "
                        f"Tried: asking again, on any of {len(self.servers)} servers, from token {len(done)} on."
                    ) from problem
            finally:
                self._turns.give(server, prompt, done)

    def _check_versions(self, server: Server, piece: Piece, since: int) -> None:
        expected = self._history[since:]
        wrong = sorted(set(piece.cells.versions) - set(expected))
        if wrong:
            raise SamplerError(
                f"{server.url} sampled with version {wrong[0]} of the weights, expected {expected[-1]}. Is there "
                "another client that gives it weights?"
            )

    async def _make_ready(self, server: Server) -> None:
        """Ask ``server`` what it is, if that is not known; give it the last weights, if it has lost them.

        Raises:
            Unreachable: it does not answer.
            SamplerError: it cannot be used.
        """
        if self._is_ready(server):
            return
        async with server.lock:
            if self._is_ready(server):
                return
            restarted = await self._examine(server)
            if self._given and (restarted or not self._is_current(server)):
                try:
                    await self.transport.resend(server)
                except (Failed, SamplerError) as error:
                    lost = "was restarted" if restarted else "has other weights than the rest"
                    raise SamplerError(
                        f"{server.url} {lost} and did not get the last weights again: {error}"
                    ) from error
            if not self._is_current(server):
                raise SamplerError(
                    f"{server.url} has version {server.version} of the weights, expected {self.version}. Call "
                    "update_weights first, or start the server from that checkpoint."
                )
            server.ready = True

    async def _examine(self, server: Server) -> bool:
        """Look whether ``server`` is what it was; True where it was restarted."""
        info = await server.info()
        restarted = info.get("instance") != server.instance
        if not restarted and info.get("revision") not in server.revisions:
            raise SamplerError(
                f"somebody else gave weights to {server.url}: expected those of version {server.version}, found "
                f"others, of version {info.get('version')}. A server belongs to one run at a time."
            )
        self._adopt(server, info)
        return restarted

    def _is_current(self, server: Server) -> bool:
        return server.version in (self.version, self._target)

    def _is_ready(self, server: Server) -> bool:
        return server.ready and self._is_current(server)

    def _adopt(self, server: Server, info: dict[str, Any]) -> None:
        """Believe ``info``, if it is about the right model.

        Raises:
            SamplerError: it is not.
        """
        expected = {"wire": WIRE, "policy": print_shapes(self.transport.shapes), "vocabulary": self._vocabulary}
        if self.tokenizer is not None:
            expected["tokenizer"] = print_tokenizer(self.tokenizer)
        for key, value in expected.items():
            if info.get(key) != value:
                raise SamplerError(
                    f"{server.url} serves something else ({info.get('model')}, agentrl {info.get('agentrl')}): "
                    f"expected {key} {value}, found {info.get(key)}."
                )
        if info["max_length"] < self.max_length:
            raise SamplerError(
                f"{server.url} takes {info['max_length']} tokens a sequence, expected {self.max_length} "
                "(sampler.max_length): start it with --max-length."
            )
        server.instance, server.revisions = info["instance"], {info["revision"]}
        server.version, server.workers = info["version"], info["workers"]

    async def _infos(self) -> list[dict[str, Any]]:
        """Of all servers.

        Raises:
            SamplerError: one of them does not answer.
        """
        infos = await asyncio.gather(*(server.info() for server in self.servers), return_exceptions=True)
        for server, info in zip(self.servers, infos, strict=True):
            if isinstance(info, Unreachable):
                raise SamplerError(f"{server.url} does not answer: {info}. Is agentrl serve running there?") from info
            if isinstance(info, BaseException):
                raise info
        return [info for info in infos if isinstance(info, dict)]

    def _check_open(self) -> None:
        if self._closed is not None:
            raise SamplerError(str(self._closed)) from self._closed


class _Receiver:
    """A server that takes weights, asked again when it did not answer and no harm is in it."""

    def __init__(self, sampler: VLLMServerSampler, server: Server) -> None:
        self._sampler, self._server = sampler, server
        self.workers = server.workers

    async def receive(self, method: str, **arguments: Any) -> None:
        """See ``transport.Receiver``."""
        server, sampler = self._server, self._sampler
        end = asyncio.get_running_loop().time() + sampler._turns.patience
        while True:
            try:
                async with server.lock:
                    if not server.ready:
                        await sampler._examine(server)
                    await server.receive(method, **arguments)
                    return
            except Unreachable as problem:
                sampler._check_open()
                server.rest(problem)
                now = asyncio.get_running_loop().time()
                if isinstance(problem, Failed) or method not in _AGAIN or now > end:
                    raise SamplerError(f"{server.url} did not take new weights ({method}): {problem}") from problem
            await asyncio.sleep(max(server.rests_until - asyncio.get_running_loop().time(), 0.0))
