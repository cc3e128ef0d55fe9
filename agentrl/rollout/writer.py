"""Who writes the assistant's turns, and who may look on meanwhile.

``TokenWriter`` samples token ids and keeps them exactly as sampled; ``sampler.openai.ChatWriter`` asks a chat server
and has text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, Protocol, Self

from agentrl.renderer import Renderer
from agentrl.sampler.base import Sampler
from agentrl.seeds import derive_seed
from agentrl.types import Completion, Message, Node, SamplingParams, StepResult, StopReason, TokenEvent


class Watch:
    """What somebody learns of a trajectory while it is played, and may say to it; this one is content with everything.

    Attributes:
        first_tokens: of every turn, how many tokens ``turn_began`` waits for; 0: nobody looks at them.
        metered: whether every token has to be paid for by ``take_token`` before it is made.
    """

    first_tokens: int = 0
    metered: bool = False

    async def opened(self) -> None:
        """The environment is reset, and the prompt is written."""

    def turn_began(self, entropies: Sequence[float]) -> None:
        """The first tokens of a turn are there, or all of a shorter one."""

    def spend(self, tokens: int) -> bool:
        """So many more tokens were generated; False: that is enough for this trajectory."""
        return True

    def take_token(self) -> bool:
        """Pay for the next token; False, and nothing is paid, where that is enough for this trajectory."""
        return self.spend(1)

    def may_call(self, calls: int) -> bool:
        """Whether the environment may run so many tool calls."""
        return True

    def not_called(self, calls: int) -> None:
        """The environment refused to run so many of them."""

    def stepping(self, calls: int) -> AbstractAsyncContextManager[None]:
        """The environment changes inside: what wanted its state has it by then, and there is room for its calls."""
        return nullcontext()

    async def observed(self) -> None:
        """The environment's answer is written."""


class Writer(Protocol):
    """Writes the assistant's turns of one trajectory and keeps its nodes, a chain from the prompt.

    Attributes:
        nodes: what was written and read; ``parent`` is the index of the node before.
    """

    nodes: list[Node]

    @property
    def vocabulary(self) -> int:
        """How many tokens the policy knows; 0 where it has only text."""
        ...

    @property
    def entropies(self) -> bool:
        """Whether its nodes hold them."""
        ...

    def begin(self, opening: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Take the opening messages."""
        ...

    async def write(self, watch: Watch) -> tuple[Message, StopReason]:
        """The next assistant message; ``LENGTH`` where a budget cut it or left no room for it."""
        ...

    def read(self, step: StepResult) -> None:
        """Take the environment's new messages."""
        ...

    def fork(self, seed: int) -> Self:
        """A writer at the beginning of this one's present turn, with random numbers of its own.

        Raises:
            UserError: it cannot continue what another one wrote.
        """
        ...


class TokenWriter:
    """Samples turns as token ids; what was sampled is never decoded and encoded again.

    Args:
        sampler: where tokens come from.
        renderer: how messages become ids and ids messages.
        params: temperature and top-p; ``max_tokens`` is the budget of the whole trajectory.
        seed: every turn's random numbers derive from it.
    """

    def __init__(self, sampler: Sampler, renderer: Renderer, params: SamplingParams, seed: int) -> None:
        self.nodes: list[Node] = []
        self._sampler, self._renderer, self._params, self._seed = sampler, renderer, params, seed
        self._ids: list[int] = []
        self._left = params.max_tokens
        self._turn = 0
        self._tools: Sequence[dict[str, Any]] = ()
        self._stops: tuple[str, ...] = ()

    @property
    def vocabulary(self) -> int:
        """Tokens that the tokenizer knows."""
        return len(self._renderer.tokenizer)

    @property
    def entropies(self) -> bool:
        """Whether the sampler reports them."""
        return self._sampler.entropies

    def begin(self, opening: Sequence[Message], tools: Sequence[dict[str, Any]]) -> None:
        """Render the prompt."""
        self._tools = tools
        self._stops = self._renderer.stop_strings(tools)
        self._add(Node(-1, "prompt", self._renderer.prompt(opening, tools), messages=tuple(opening)))

    async def write(self, watch: Watch) -> tuple[Message, StopReason]:
        """Sample one turn; streamed where ``watch`` wants to hear of its tokens before it is over."""
        room = min(self._left, self._sampler.max_length - len(self._ids))
        if room < 1 or not watch.spend(0):
            return Message("assistant", ""), StopReason.LENGTH
        params = SamplingParams(
            room,
            self._params.temperature,
            self._params.top_p,
            self._renderer.stop_ids,
            self._stops,
            derive_seed(self._seed, self._turn),
        )
        if watch.metered or watch.first_tokens:
            done = await self._stream(params, watch)
        else:
            done = await self._sampler.sample(self._ids, params)
            watch.spend(len(done.token_ids))
        message = self._renderer.parse(done.token_ids, self._tools, self._turn)
        self._left -= len(done.token_ids)
        self._turn += 1
        self._add(
            Node(
                len(self.nodes) - 1,
                "policy",
                done.token_ids,
                done.logprobs,
                done.entropies,
                done.policy_version,
                (message,),
                stop_reason=done.stop_reason,
            )
        )
        return message, done.stop_reason

    async def _stream(self, params: SamplingParams, watch: Watch) -> Completion:
        events: list[TokenEvent] = []
        async with aclosing(self._sampler.stream(self._ids, params)) as stream:
            while watch.take_token():  # before it is made: others are in the middle of theirs
                try:
                    events.append(await anext(stream))
                except BaseException:
                    watch.spend(-1)
                    raise
                if len(events) == watch.first_tokens:
                    watch.turn_began([each.entropy for each in events])
                if events[-1].stop_reason is not None:
                    break
        if len(events) < watch.first_tokens:
            watch.turn_began([each.entropy for each in events])
        ids, logprobs, entropies, versions, reasons = zip(*events, strict=True)
        reason = reasons[-1] or StopReason.LENGTH
        return Completion(ids, logprobs, entropies, reason, versions, params.temperature, params.top_p)

    def read(self, step: StepResult) -> None:
        """Render only the new messages."""
        ids = self._renderer.continuation(step.observation)
        results = tuple(step.info.get("tool_results", ()))
        messages = tuple(step.observation)
        self._add(Node(len(self.nodes) - 1, "tool", ids, messages=messages, tool_results=results))

    def fork(self, seed: int) -> Self:
        """A writer at the beginning of the present turn; what is being sampled of that turn is not in it."""
        twin = type(self)(self._sampler, self._renderer, self._params, seed)
        twin.nodes, twin._ids = list(self.nodes), list(self._ids)
        twin._left, twin._turn = self._left, self._turn
        twin._tools, twin._stops = self._tools, self._stops
        return twin

    def _add(self, node: Node) -> None:
        self.nodes.append(node)
        self._ids.extend(node.token_ids)
