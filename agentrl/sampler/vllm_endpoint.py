"""What ``agentrl serve`` adds to vLLM's own server: tokens in and out, and weights, under ``/agentrl/``.

``vllm serve --middleware agentrl.sampler.vllm_endpoint.Endpoint`` puts it before vLLM's routes, which stay as they are.
It is one ``VLLMSampler`` around the server's engine, so that sampling means the same as in-process.

==========================  =======================================================================================
``GET /agentrl/info``       what is served, under which version, and counters
``POST /agentrl/sample``    a request for tokens -> lines, each a ``Piece``
``POST /agentrl/receive``   a call that takes weights -> one line
``POST /agentrl/abort``     end requests by their ids
==========================  =======================================================================================

Answers that take time are JSON lines, an empty one every ``BEAT_SECONDS``; after the first one an error is an object in
the last line, before it a status with the same object: 400 a request that can never be served, 401 the token, 409 the
weights here are others than the client expects, 413 a body that is too long, 500 the engine failed, 503 too many wait.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import aclosing
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from agentrl import __version__
from agentrl.errors import SamplerError
from agentrl.sampler.board import Board
from agentrl.sampler.request import check_request
from agentrl.sampler.server_wire import (
    BEAT_SECONDS,
    TOKEN_VARIABLE,
    WIRE,
    Piece,
    decode_params,
    encode_piece,
    print_shapes,
    print_tokenizer,
)
from agentrl.sampler.vllm import VLLMSampler
from agentrl.sampler.vllm_engine import KEY
from agentrl.sampler.weights import ADAPTER_CONFIG, check_weights, file_shapes, weight_files

PREFIX = "/agentrl/"
WAITING = 4
"""Requests that may wait for a slot, for each slot."""
MAX_BODY = 64 << 20

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
App = Callable[[Event, Receive, Send], Awaitable[None]]


class Refused(Exception):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: for the user.
        kind: for the client.
    """

    def __init__(self, status: int, message: str, kind: str = "refused") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Endpoint:
    """The middleware.

    Args:
        app: what answers all other paths.

    Raises:
        SamplerError: there is no token in ``AGENTRL_SERVER_TOKEN``.
    """

    def __init__(self, app: App) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise SamplerError(f"{TOKEN_VARIABLE} is not set: expected agentrl serve, which sets it.")
        self._secret = f"Bearer {token}".encode()
        self._app = app
        self._sampler: VLLMSampler | None = None
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._clients: dict[str, str] = {}  # of the jobs
        self._loads: set[asyncio.Task[None]] = set()
        self._loading = asyncio.Lock()
        self._instance = self._revision = uuid.uuid4().hex
        self._facts: dict[str, Any] = {}

    async def __call__(self, scope: Event, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        lines = _Lines(send)
        try:
            if not hmac.compare_digest(dict(scope["headers"]).get(b"authorization", b""), self._secret):
                raise Refused(401, "wrong token")
            if self._sampler is None:
                self._sampler = self._start(scope["app"].state.engine_client)
            call = scope["method"], scope["path"].removeprefix(PREFIX)
            if call == ("GET", "info"):
                await lines.say(await self._info(self._sampler))
                await lines.end()
                return
            if call[0] != "POST" or call[1] not in ("sample", "receive", "abort"):
                raise Refused(404, "no such path")
            body = await _read_body(receive)
            if body is not None:
                await getattr(self, f"_{call[1]}")(self._sampler, body, receive, lines)
        except Refused as error:
            await lines.fail(error)
        except SamplerError as error:
            await lines.fail(Refused(500, str(error), "failed"))

    def _start(self, engine: Any) -> VLLMSampler:
        config = engine.vllm_config
        board = Board(**config.additional_config[KEY]["board"])
        tokenizer = engine.tokenizer
        shapes = file_shapes(weight_files(Path(config.model_config.model)))
        vocabulary = int(config.model_config.get_vocab_size())
        max_length = min(board.length, int(config.model_config.max_model_len))
        self._facts = {
            "wire": WIRE,
            "instance": self._instance,
            "model": config.model_config.model,
            "policy": print_shapes(shapes),
            "tokenizer": None if tokenizer is None else print_tokenizer(tokenizer),
            "vocabulary": vocabulary,
            "max_length": max_length,
            "max_slots": board.slots,
            "workers": config.parallel_config.world_size,
            "agentrl": __version__,
            "vllm": installed("vllm"),
        }
        return VLLMSampler(engine, board, shapes, vocabulary, tokenizer, max_slots=board.slots, max_length=max_length)

    async def _info(self, sampler: VLLMSampler) -> dict[str, Any]:
        try:
            await sampler.engine.check_health()
        except Exception as error:
            raise Refused(500, f"vLLM's engine is not well: {type(error).__name__}: {error}", "failed") from error
        return self._facts | {
            "version": sampler.version,
            "revision": self._revision,
            "requests": sampler.requests,
            "waiting": len(self._jobs) - sampler.requests,
            "prompt_tokens": sampler.prompt_tokens,
            "reused_tokens": sampler.reused_tokens,
        }

    async def _sample(self, sampler: VLLMSampler, body: dict[str, Any], receive: Receive, lines: _Lines) -> None:
        try:
            client = str(body["client"])
            name, ids, start = str(body["id"]), list(body["token_ids"]), int(body["start"])
            params, revisions, pieces = decode_params(body["params"]), body["revisions"], bool(body["pieces"])
            vocabulary, length = self._facts["vocabulary"], self._facts["max_length"]
            check_request(ids, params, vocabulary=vocabulary, max_length=length, tokenizer=sampler.tokenizer)
        except SamplerError as error:
            raise Refused(400, str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(400, f"not a request for tokens: {type(error).__name__}: {error}") from error
        if self._revision not in revisions:
            raise Refused(409, f"the weights here are version {sampler.version}, others than expected", "stale")
        while name in self._jobs:  # its client lost the connection, and asks again
            await self._end(name)
        if len(self._jobs) >= self._facts["max_slots"] * (1 + WAITING):
            raise Refused(503, f"{len(self._jobs)} requests are running or waiting here", "busy")

        async def answer() -> None:
            place = 0
            async with aclosing(sampler.generate(ids, params, start=start, pieces=pieces)) as generating:
                async for cells, reason in generating:
                    await lines.send(encode_piece(Piece(place, cells, reason)))
                    place += len(cells.token_ids)

        job = self._jobs[name] = asyncio.create_task(answer(), name=f"request {name}")
        self._clients[name] = client
        try:
            await _attend(job, receive, lines)
        finally:
            job.cancel()
            await asyncio.wait([job])
            if self._jobs.get(name) is job:
                del self._jobs[name], self._clients[name]

    async def _receive(self, sampler: VLLMSampler, body: dict[str, Any], receive: Receive, lines: _Lines) -> None:
        try:
            method, arguments, revision = str(body["method"]), dict(body["arguments"]), str(body["revision"])
            client, expected = str(body["client"]), list(body["expected"])
        except (KeyError, TypeError, ValueError) as error:
            raise Refused(400, f"not a call that takes weights: {type(error).__name__}: {error}") from error

        async def load() -> None:
            async with self._loading:
                if self._revision not in expected:
                    raise Refused(409, "somebody else gave weights to this server", "stale")
                for name in [name for name, owner in self._clients.items() if owner != client]:
                    await self._end(name)  # it would go on with weights that its client knows nothing of
                await asyncio.to_thread(_check_readable, sampler, method, arguments)
                try:
                    await sampler.receive(method, **arguments)
                except TypeError as error:
                    raise Refused(400, f"{method} does not take these arguments: {error}") from error
                if "version" in arguments:
                    self._revision = revision
            await lines.say({"version": sampler.version})

        # Half-loaded weights are the end of an engine, so a load goes on when its client has left.
        job = asyncio.create_task(load(), name=f"loading by {method}")
        self._loads.add(job)
        job.add_done_callback(self._loads.discard)
        await _attend(job, receive, lines)

    async def _abort(self, sampler: VLLMSampler, body: dict[str, Any], receive: Receive, lines: _Lines) -> None:
        names = [name for name in map(str, body.get("ids", ())) if name in self._jobs]
        for name in names:
            await self._end(name)
        await lines.say({"aborted": names})
        await lines.end()

    async def _end(self, name: str) -> None:
        job = self._jobs.pop(name, None)
        self._clients.pop(name, None)
        if job is not None:
            job.cancel()
            await asyncio.wait([job])


class _Lines:
    """An answer that starts with its first line; an error before that has a status of its own."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = False
        self.last = asyncio.get_running_loop().time()

    async def send(self, line: bytes) -> None:
        self.last = asyncio.get_running_loop().time()
        if not self._started:
            self._started = True
            headers = [(b"content-type", b"application/jsonl"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": line, "more_body": True})

    async def say(self, data: dict[str, Any]) -> None:
        await self.send(json.dumps(data).encode() + b"\n")

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: Refused) -> None:
        data = {"error": error.kind, "message": str(error)}
        if self._started:
            await self.say(data)
            await self.end()
            return
        content = json.dumps(data).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        if error.kind == "busy":
            headers.append((b"retry-after", b"1"))
        await self._send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": content})


async def _attend(job: asyncio.Task[None], receive: Receive, lines: _Lines) -> None:
    """Until ``job`` has ended, with a sign of life now and then; or until the client has left.

    Raises:
        Exception: what the job raised.
    """
    loop = asyncio.get_running_loop()
    gone = asyncio.ensure_future(receive())  # the next event of a request whose body came is that the client left
    try:
        while not job.done() and not gone.done():
            pause = lines.last + BEAT_SECONDS - loop.time()
            if pause > 0:
                await asyncio.wait([job, gone], timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            else:
                await lines.send(b"\n")
        if job.cancelled():
            raise Refused(410, "the request was ended here", "aborted")
        if job.done():
            job.result()
            await lines.end()
    finally:
        gone.cancel()


def _check_readable(sampler: VLLMSampler, method: str, arguments: dict[str, Any]) -> None:
    """Refuse files that are not here or do not fit, before they cost an engine that has loaded half of them.

    Raises:
        Refused: it says so.
    """
    try:
        if method == "load_files":
            check_weights(file_shapes([Path(file) for file in arguments["files"]]), sampler.shapes)
        elif method == "load_adapter" and not (Path(arguments["folder"]) / ADAPTER_CONFIG).is_file():
            raise SamplerError(f"{arguments['folder']} holds no {ADAPTER_CONFIG}")
    except SamplerError as error:
        raise Refused(
            400, f"{error} Expected files that this server can read: sampler.weights_dir is a folder that all see."
        ) from error
    except (KeyError, TypeError) as error:
        raise Refused(400, f"{method} does not take these arguments: {error}") from error


async def _read_body(receive: Receive) -> dict[str, Any] | None:
    """The object in a request's body; None when the client has gone."""
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise Refused(413, f"more than {MAX_BODY} bytes")
        more = event.get("more_body", False)
    try:
        data = json.loads(b"".join(parts))
    except ValueError as error:
        raise Refused(400, f"not JSON: {error}") from error
    if not isinstance(data, dict):
        raise Refused(400, "expected a JSON object")
    return data
