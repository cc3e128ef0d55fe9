"""Tiny policies and scripted parts that several test modules share."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from agentrl import registry
from agentrl.demonstrations import Tokens
from agentrl.renderer import Renderer
from agentrl.tiny import build_model, build_tokenizer, render_texts
from agentrl.types import Completion, Message, SamplingParams, StopReason, TokenEvent, ToolCall

torch.set_num_threads(1)
settings.register_profile("agentrl", deadline=None, print_blob=True)
settings.load_profile("agentrl")

SCRIPTED = Path(__file__).parent / "data" / "scripted_env.py"


@pytest.fixture(scope="session")
def scripted() -> Callable[[str], str]:
    """The registry path of a class in ``data/scripted_env.py``."""
    return lambda name: f"{SCRIPTED}:{name}"


@pytest.fixture(scope="session")
def doubling(scripted) -> type:
    return registry.load("envs", scripted("Doubling"))


@pytest.fixture(scope="session")
def tools(doubling) -> tuple[dict[str, Any], ...]:
    """The schemas that ``Doubling`` shows."""
    return tuple(made.schema for made in doubling().make_tools())


def conversations(tools):
    for number in (*range(40), *range(100, 130)):
        call = ToolCall("call_0_0", "double", {"x": number})
        result = Message("tool", str(2 * number), tool_call_id="call_0_0")
        said = Message("assistant", "", (call,))
        yield (
            [Message("user", f"double {number}"), said, result, Message("assistant", str(2 * number))],
            tools,
        )


@pytest.fixture(scope="session")
def tokenizer(tools):
    """The byte-level BPE of ``agentrl.tiny`` with its chat template, trained on ``Doubling``'s conversations."""
    return build_tokenizer(render_texts(conversations(tools)), vocab=448)


@pytest.fixture(scope="session")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture(scope="session")
def random_model(tokenizer):
    """A Qwen3 of width 64 with two layers and random weights; use ``make_model`` for a copy to change."""
    return build_model(tokenizer, hidden=64, layers=2, context=512, seed=1)


@pytest.fixture
def make_model(random_model) -> Callable[[], Any]:
    return lambda: copy.deepcopy(random_model)


@pytest.fixture(scope="session")
def trained_model(random_model, renderer, tools):
    """The same after a short warm start: it calls the tool about half of the time, and ends its turns."""
    from agentrl.config import SFTConfig
    from agentrl.warmstart import sft

    def tokens(*written: Message) -> Tokens:
        ids = list(renderer.prompt([Message("user", f"double {number}")], tools))
        policy = [False] * len(ids)
        for message in written:
            new = renderer.continuation([message]) if message.role == "tool" else renderer.assistant(message)
            ids += new
            policy += [message.role == "assistant"] * len(new)
        return Tokens(tuple(ids), tuple(policy))

    expert, guesses = [], []
    for (opening, *written), _ in conversations(tools):
        number = opening.content.split()[1]
        expert.append(tokens(*written))
        guesses.append(tokens(written[-1]))
    model = copy.deepcopy(random_model)
    config = SFTConfig(steps=40, batch=16, lr=3e-3, guess_fraction=0.5, optimizer="muon", warmup=5)
    sft(model, expert, guesses, config, seed=0)
    return model.eval()


@pytest.fixture(scope="session")
def policy_folder(trained_model, tokenizer, tmp_path_factory) -> Path:
    """The trained policy as a Hugging Face folder."""
    from agentrl.tiny import save_policy

    folder = tmp_path_factory.mktemp("policy")
    save_policy(trained_model, tokenizer, folder)
    return folder


class ScriptedSampler:
    """Writes what ``script(prompt ids, params)`` says; a text without the end token stops for its length.

    ``entropy(prompt length, place)`` is that of a token; they are streamed one by one.
    """

    version, max_length, entropies, deterministic = 0, 512, True, True

    def __init__(self, tokenizer: Any, script: Callable[[Sequence[int], SamplingParams], Any]) -> None:
        self.tokenizer, self.script = tokenizer, script
        self.requests: list[tuple[tuple[int, ...], SamplingParams]] = []
        self.entropy: Callable[[int, int], float] = lambda length, place: 0.0

    async def sample(self, token_ids: Sequence[int], params: SamplingParams) -> Completion:
        self.requests.append((tuple(token_ids), params))
        text = self.script(token_ids, params)
        text = text if isinstance(text, str) else await text
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])[: params.max_tokens]
        reason = StopReason.STOP if ids and ids[-1] in params.stop_ids else StopReason.LENGTH
        zeros = (0.0,) * len(ids)
        entropies = tuple(self.entropy(len(token_ids), place) for place in range(len(ids)))
        return Completion(ids, zeros, entropies, reason, (self.version,) * len(ids), params.temperature, params.top_p)

    async def stream(self, token_ids: Sequence[int], params: SamplingParams) -> AsyncIterator[TokenEvent]:
        done = await self.sample(token_ids, params)
        tokens = zip(done.token_ids, done.logprobs, done.entropies, strict=True)
        for place, (token, logprob, entropy) in enumerate(tokens, 1):
            await asyncio.sleep(0)
            reason = done.stop_reason if place == len(done.token_ids) else None
            yield TokenEvent(token, logprob, entropy, self.version, reason)

    async def update_weights(self, source: Any, version: int) -> None:
        self.version = version

    async def close(self) -> None:
        pass


@pytest.fixture
def scripted_sampler(tokenizer) -> Callable[..., ScriptedSampler]:
    """``scripted_sampler("one turn", "the next")`` plays texts by turn; a function decides by itself."""

    def make(*turns: Any) -> ScriptedSampler:
        if len(turns) == 1 and callable(turns[0]):
            return ScriptedSampler(tokenizer, turns[0])
        end = tokenizer.convert_tokens_to_ids("<|im_start|>")

        def script(ids: Sequence[int], params: SamplingParams) -> str:
            # system, user, assistant: the first turn is asked for after three openings, later ones after two more.
            return turns[min((list(ids).count(end) - 3) // 2, len(turns) - 1)]

        return ScriptedSampler(tokenizer, script)

    return make
