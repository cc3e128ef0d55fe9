"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes 2 Pro, Qwen 2.5 and Qwen 3 write."""

from __future__ import annotations

from agentrl.tool_format.base import Blocks, Schemas, broken, from_json, read_json, to_json
from agentrl.types import ToolCall


class Hermes(Blocks):
    """JSON in ``<tool_call>`` tags; any number of calls in a turn."""

    wanted = '<tool_call>{"name": "...", "arguments": {...}}</tool_call>'

    def read_body(self, body: str, tools: Schemas) -> ToolCall:
        """An object with name and arguments."""
        try:
            data = read_json(body)
        except ValueError as error:
            return broken(f"The tool call is not valid JSON: {error}", self.wanted)
        return from_json(data, self.wanted)

    def write_body(self, call: ToolCall) -> str:
        """On a line of its own."""
        return f"\n{to_json({'name': call.name, 'arguments': dict(call.arguments)})}\n"
