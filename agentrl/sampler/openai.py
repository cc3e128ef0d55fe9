"""Text-only policy behind an OpenAI-compatible server, for evaluation.

It has no token ids and no log-probs, so it cannot be trained on; its trees hold messages only.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from agentrl.assemble import env_factory, sampling_params
from agentrl.config import RunConfig
from agentrl.errors import SamplerError, UserError
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import Watch
from agentrl.seeds import derive_seed
from agentrl.tool_format import read_json
from agentrl.types import Message, Node, SamplingParams, StepResult, StopReason, ToolCall

ATTEMPTS = 4
"""Tries of one request; connection errors, 429 and 5xx are tried again after 0.5, 1 and 2 s."""


class ChatWriter:
    """Writes turns by asking ``POST {base_url}/chat/completions``."""

    vocabulary = 0
    entropies = False

    def __init__(self, client: httpx.AsyncClient, model: str, params: SamplingParams, seed: int) -> None:
        self.nodes: list[Node] = []
        self._client, self._model, self._params, self._seed = client, model, params, seed
        self._messages: list[Message] = []
        self._left = params.max_tokens
        self._turn = 0

    def begin(self, opening: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Take the opening messages."""
        self._tools = list(tools)
        self._messages.extend(opening)
        self.nodes.append(Node(-1, "prompt", (), messages=tuple(opening)))

    async def write(self, watch: Watch) -> tuple[Message, StopReason]:
        """Ask for one assistant message; the server's count of its tokens is what ``watch`` hears of."""
        if self._left < 1 or not watch.spend(0):
            return Message("assistant", ""), StopReason.LENGTH
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [message.to_chat() | _calls_as_text(message) for message in self._messages],
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "max_tokens": self._left,
            "seed": derive_seed(self._seed, self._turn) % 2**31,
        }
        if self._tools:
            body["tools"] = self._tools
        reply = await _post(self._client, body)
        try:
            choice = reply["choices"][0]
            message = _read_message(choice["message"], self._turn)
            cut = choice.get("finish_reason") == "length"
            used = int((reply.get("usage") or {}).get("completion_tokens", 0))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise SamplerError(
                f"the server's reply is not a chat completion ({type(error).__name__}: {error}); expected "
                f"choices[0].message, got {json.dumps(reply)[:200]}"
            ) from error
        self._left -= used
        watch.spend(used)
        self._turn += 1
        reason = StopReason.LENGTH if cut else StopReason.STOP
        self.nodes.append(Node(len(self.nodes) - 1, "policy", (), messages=(message,), stop_reason=reason))
        self._messages.append(message)
        return message, reason

    def fork(self, seed: int) -> ChatWriter:
        """Refused: there are no token ids to continue, and no entropies to decide by.

        Raises:
            UserError: always.
        """
        raise UserError("a chat server gives no token ids: tree rollouts need the hf or a vllm sampler.")

    def read(self, step: StepResult) -> None:
        """Take the environment's new messages."""
        messages = tuple(step.observation)
        self._messages.extend(messages)
        results = tuple(step.info.get("tool_results", ()))
        self.nodes.append(Node(len(self.nodes) - 1, "tool", (), messages=messages, tool_results=results))


@asynccontextmanager
async def chat_actors(base_url: str, config: RunConfig) -> AsyncIterator[Scheduler]:
    """A scheduler whose episodes are written by the server at ``base_url`` (up to and with ``/v1``).

    The model is ``policy.path``, or the first one that the server lists; the key is in ``OPENAI_API_KEY``.

    Raises:
        SamplerError: the server cannot be reached or refuses.
    """
    from agentrl.sandbox.shared import close_shared_sandboxes

    params = sampling_params(config)
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(
        base_url=base_url.rstrip("/") + "/", headers=headers, timeout=config.rollout.deadline, limits=limits
    ) as client:
        model = config.policy.path or await _first_model(client)
        try:
            yield Scheduler(
                env_factory(config), lambda seed: ChatWriter(client, model, params, seed), config.rollout, params
            )
        finally:
            await close_shared_sandboxes()


async def _first_model(client: httpx.AsyncClient) -> str:
    reply = await _request(client, "GET", "models", None)
    try:
        return str(reply["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise SamplerError(f"{client.base_url}models lists no model; name one with --policy.path.") from error


async def _post(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    return await _request(client, "POST", "chat/completions", body)


async def _request(client: httpx.AsyncClient, method: str, path: str, body: Any) -> dict[str, Any]:
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            await asyncio.sleep(0.25 * 2**attempt)
        try:
            response = await client.request(method, path, json=body)
        except httpx.TransportError as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if response.status_code == 200:
            try:
                reply: dict[str, Any] = response.json()
            except ValueError as error:
                raise SamplerError(
                    f"{client.base_url}{path} did not answer with JSON: {response.text[:200]}"
                ) from error
            return reply
        problem = f"HTTP {response.status_code}: {response.text[:200]}"
        if response.status_code != 429 and response.status_code < 500:
            break
    raise SamplerError(
        f"{client.base_url}{path} failed: {problem}. Expected an OpenAI-compatible server there, as in --policy "
        "http://127.0.0.1:8000/v1; is it running, and is OPENAI_API_KEY the one that it wants?"
    )


def _calls_as_text(message: Message) -> dict[str, Any]:
    """The API takes arguments as a JSON string, where chat templates take an object."""
    if not message.tool_calls:
        return {}
    calls = message.to_chat()["tool_calls"]
    for call in calls:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return {"tool_calls": calls}


def _read_message(data: dict[str, Any], turn: int) -> Message:
    calls = []
    for index, call in enumerate(data.get("tool_calls") or ()):
        name, text = call["function"]["name"], call["function"].get("arguments") or "{}"
        identifier = call.get("id") or f"call_{turn}_{index}"
        try:
            arguments = read_json(text) if isinstance(text, str) else text
        except ValueError as error:
            calls.append(ToolCall(identifier, name, error=f"The arguments of {name!r} are not valid JSON: {error}."))
            continue
        if isinstance(arguments, dict):
            calls.append(ToolCall(identifier, name, arguments))
        else:
            calls.append(ToolCall(identifier, name, error=f"The arguments of {name!r} are not a JSON object."))
    return Message("assistant", data.get("content") or "", tuple(calls))
