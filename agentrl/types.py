"""The records that flow through agentrl, and nothing else.

All are frozen: a stage takes records and returns new ones. Index names used in shapes:
``T`` tokens of one span, ``N`` unique tokens of a batch, ``M`` targets (policy tokens), ``L`` leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple

Role = Literal["system", "user", "assistant", "tool"]
Author = Literal["prompt", "policy", "tool"]


class StopReason(StrEnum):
    """Why a sampler stopped."""

    STOP = "stop"
    """A stop id or a stop string was produced; it is the last of the completion's tokens."""
    LENGTH = "length"
    """The token limit of the request or the context limit of the model was reached."""


class Outcome(StrEnum):
    """How a trajectory ended. Infrastructure failures are kept apart from the policy's own."""

    ANSWERED = "answered"
    """The policy gave a final answer."""
    TURN_LIMIT = "turn_limit"
    """The policy used all its turns without an answer."""
    TOOL_LIMIT = "tool_limit"
    """The policy asked for more tool calls than the environment allows."""
    LENGTH = "length"
    """The token budget ended in the middle of a turn."""
    PARSE_ERROR = "parse_error"
    """The last turn was a malformed tool call and no turn was left to mend it."""
    ENV_FAILURE = "env_failure"
    """The environment, a tool's infrastructure or the reward function failed. Not the policy's fault."""
    TIMEOUT = "timeout"
    """The episode's deadline passed. Not scored."""
    BUDGET = "budget"
    """The budget of the task or of the step was spent. Not scored, and no failure either."""

    @property
    def scored(self) -> bool:
        """Whether a reward of this outcome says something about the policy."""
        return self is not Outcome.BUDGET and not self.failed

    @property
    def failed(self) -> bool:
        """Whether the infrastructure is to blame."""
        return self in (Outcome.ENV_FAILURE, Outcome.TIMEOUT)


class ForkLevel(StrEnum):
    """What ``fork()`` of an environment or a tool costs and guarantees."""

    COPY = "copy"
    """Pure Python state, copied."""
    SNAPSHOT = "snapshot"
    """A live sandbox, forked exactly."""
    REPLAY = "replay"
    """The recorded calls are run again."""
    REFUSED = "refused"
    """Cannot be forked; ``fork()`` raises ``ForkRefused``."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the policy asked for.

    ``error`` is set where the text was meant as a call but could not be read: it says what was expected and
    what came, and becomes the tool message that the policy sees.
    """

    id: str
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave back.

    ``error`` is a short machine-readable kind (``"malformed"``, ``"unknown_tool"``, ``"arguments"``,
    ``"exception"``, ``"timeout"``) or None; ``content`` is what the policy reads in either case.
    """

    call_id: str
    name: str
    content: str
    error: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message, in OpenAI's shape."""

    role: Role
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def to_chat(self) -> dict[str, Any]:
        """The dictionary that chat templates and OpenAI-compatible servers take."""
        chat: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            chat["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
                for c in self.tool_calls
            ]
        if self.tool_call_id is not None:
            chat["tool_call_id"] = self.tool_call_id
        return chat


@dataclass(frozen=True, slots=True)
class Task:
    """One problem.

    Args:
        prompt: the opening messages; a plain string becomes one user message.
        answer: the reference answer, where the reward needs one.
        id: stable name; default: a hash of prompt, answer and metadata, so equal tasks have equal ids.
        metadata: anything JSON can hold that the environment's reward or set-up needs.
    """

    prompt: tuple[Message, ...]
    answer: str | None = None
    id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        prompt: str | Sequence[Message],
        answer: str | None = None,
        id: str = "",  # noqa: A002 -- the record's field name
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        meta = dict(metadata or {})
        content = json.dumps([[m.to_chat() for m in messages], answer, meta], sort_keys=True, default=str)
        stable = id or hashlib.sha256(content.encode()).hexdigest()[:16]
        for name, value in (("prompt", messages), ("answer", answer), ("id", stable), ("metadata", meta)):
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling settings.

    Args:
        max_tokens: most tokens to generate, at least 1.
        temperature: softmax temperature, above 0; 0 means greedy (log-probs are then of the untempered softmax).
        top_p: nucleus mass in (0, 1].
        stop_ids: a token among these ends the completion and is kept as its last token.
        stop_strings: text that ends the completion; needs a sampler that was given a tokenizer.
        seed: the stream of random numbers; the same seed, prompt and weights give the same tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """What a sampler returns for one request.

    Attributes:
        token_ids: [T] sampled ids, the stop id included.
        logprobs: [T] natural-log probability of each id under the distribution that sampled it
            (after temperature and top-p).
        entropies: [T] entropy in nats of the full tempered distribution, before top-p.
        stop_reason: why it ended.
        policy_version: [T] the weights' version that produced each token.
        temperature: the temperature it was sampled with.
        top_p: the nucleus mass it was sampled with.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropies: tuple[float, ...]
    stop_reason: StopReason
    policy_version: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0


class TokenEvent(NamedTuple):
    """One token of a streamed completion; ``stop_reason`` is set on the last one."""

    token_id: int
    logprob: float
    entropy: float
    policy_version: int
    stop_reason: StopReason | None


class StepResult(NamedTuple):
    """gymnasium's five, awaited."""

    observation: Any
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Episode:
    """What a reward function sees of a finished trajectory.

    Attributes:
        messages: the whole conversation, prompt included.
        answer: the text of the final answer, or None when there was none.
        outcome: how it ended.
        tool_results: every tool result, in order.
    """

    messages: tuple[Message, ...]
    answer: str | None
    outcome: Outcome
    tool_results: tuple[ToolResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    """A span of tokens with one author. It stores only the tokens it adds to its parent.

    Attributes:
        parent: index of the parent in ``RolloutTree.nodes``; -1 for the root.
        author: who wrote it; only ``policy`` tokens are trained on.
        token_ids: [T].
        logprobs: [T] of the sampling distribution; empty unless the author is the policy.
        entropies: [T]; empty unless the author is the policy.
        policy_version: [T]; empty unless the author is the policy.
        messages: the messages that these tokens are.
        tool_results: the results behind a tool node, with their seconds.
        stop_reason: why the sampler stopped; None unless the author is the policy.
    """

    parent: int
    author: Author
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    policy_version: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    tool_results: tuple[ToolResult, ...] = ()
    stop_reason: StopReason | None = None


@dataclass(frozen=True, slots=True)
class Leaf:
    """The end of one trajectory.

    Attributes:
        node: index of its last node; -1 where it failed before the prompt.
        reward: a finite float, or None where the outcome is not scored.
        outcome: how it ended.
        seed: the seed that its samples were drawn from since its last fork.
        error: traceback of an environment failure, else None.
        seconds: wall time of the trajectory.
        metrics: counts by name (turns, tool calls, failed calls).
        name: the number of its root, then the turn of each fork on its way (and, in ``expand_tree``, of the draw).
        tool_results: of the calls in its last turn, which no node holds because no turn came after them.
    """

    node: int
    reward: float | None
    outcome: Outcome
    seed: int = 0
    error: str | None = None
    seconds: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    name: tuple[int, ...] = ()
    tool_results: tuple[ToolResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a trajectory branched at a tool result.

    Attributes:
        name: the trajectory that was asked.
        turn: the policy turns before this point.
        signal: how much less certain the policy was than in its first turn; None where the policy does not look.
        draw: the random number that the signal was held against; None where the rule has none.
        wanted: what the rule said.
        granted: whether a sibling began here.
        reason: why not, where it was wanted: the budget, or what refused the fork.
    """

    name: tuple[int, ...]
    turn: int
    signal: float | None
    draw: float | None
    wanted: bool
    granted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RolloutTree:
    """All trajectories of one task: a GRPO group is a tree whose root is the prompt. A path to a leaf is one.

    Attributes:
        task: what was played.
        nodes: parents before their children.
        leaves: in the order of their names.
        temperature: of all samples.
        top_p: of all samples.
        seed: what all seeds of the tree derive from, with the task's id, ``copy`` and the names of the leaves.
        copy: the how-many-eth tree of this task in its step, from 1.
        decisions: every branching decision, in the order of name and turn.
        spent: what it cost, by name: generated ``tokens``, tool ``calls``, ``seconds``, ``roots``, ``branches``, and
            what was dropped. A token that several leaves share was generated once and is counted once.
    """

    task: Task
    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    copy: int = 1
    decisions: tuple[Decision, ...] = ()
    spent: Mapping[str, float] = field(default_factory=dict)

    def path(self, leaf: Leaf) -> list[Node]:
        """The nodes from the root to ``leaf``."""
        chain: list[Node] = []
        index = leaf.node
        while index >= 0:
            chain.append(self.nodes[index])
            index = self.nodes[index].parent
        return chain[::-1]

    def scored(self) -> Iterator[Leaf]:
        """The leaves whose reward counts."""
        return (leaf for leaf in self.leaves if leaf.reward is not None)

    @property
    def rewards(self) -> list[float]:
        """The rewards of the scored leaves, in leaf order."""
        return [leaf.reward for leaf in self.leaves if leaf.reward is not None]
