"""Tools that answer from a record: an index of today may not be that of then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from agentrl.env import Env, ToolEnv
from agentrl.errors import NotRecorded
from agentrl.rollout.record import Name, Turn, dotted, lineage
from agentrl.tool import Tool, dispatch
from agentrl.types import ToolCall, ToolResult


@dataclass(frozen=True, slots=True)
class Answers:
    """What the tools said, by trajectory and turn.

    Attributes:
        turns: by owner and number.
        keeps: see ``lineage``.
    """

    turns: Mapping[tuple[Name, int], Turn]
    keeps: bool

    def prepare(self, env: Env, name: Name) -> None:
        """Let ``env`` answer for the trajectory ``name`` from here on, in this task and those that it starts."""
        _ANSWERING.set((self, name))
        if isinstance(env, ToolEnv) and not isinstance(env, _Answering):
            kind: Any = type(env)
            env.__class__ = _answering(kind)

    async def give(
        self, name: Name, number: int, tools: Mapping[str, Tool], calls: tuple[ToolCall, ...]
    ) -> tuple[ToolResult, ...]:
        """The recorded results of ``calls`` in turn ``number`` of ``name``; calls that are wrong are refused anew.

        Raises:
            NotRecorded: the record has other calls there, or none.
        """
        owner = [each for first, each in lineage(name, self.keeps) if first <= number][-1]
        turn = self.turns.get((owner, number))
        asked = ", ".join(f"{call.name}({json.dumps(dict(call.arguments), default=str)})" for call in calls)
        if turn is None or len(turn.results) != len(calls):
            raise NotRecorded(f"the record has no result of {asked} in turn {number} of trajectory {dotted(name)}.")
        recorded = turn.node.messages[0].tool_calls
        if [(call.name, call.arguments) for call in calls] != [(call.name, call.arguments) for call in recorded]:
            raise NotRecorded(f"in turn {number} of trajectory {dotted(name)} the record has other calls than {asked}.")
        checked = {made: _Checked(tool) for made, tool in tools.items()}
        refusals = [await dispatch(checked, call) for call in calls]
        return tuple(r if r.error else result for r, result in zip(refusals, turn.results, strict=True))


_ANSWERING: ContextVar[tuple[Answers, Name]] = ContextVar("agentrl_replay")


class _Answering(ToolEnv):
    """Takes its tools' results from a record."""

    async def run_calls(self, calls: tuple[ToolCall, ...]) -> tuple[ToolResult, ...]:
        answers, name = _ANSWERING.get()
        return await answers.give(name, self._turns - 1, self._tools, calls)


@lru_cache(maxsize=16)
def _answering(kind: type[Any]) -> type[ToolEnv]:
    """``kind``, answering; a class and not an attribute, so that however an environment is forked, its forks do so."""
    return type(kind.__name__, (_Answering, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _Checked(Tool):
    """Checks a call as ``tool`` does, and runs nothing."""

    def __init__(self, tool: Tool) -> None:
        self.name, self._tool = tool.name, tool

    @property
    def schema(self) -> dict[str, Any]:
        return self._tool.schema

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return self._tool.validate(arguments)

    async def run(self, *args: Any, **kwargs: Any) -> str:
        return ""
