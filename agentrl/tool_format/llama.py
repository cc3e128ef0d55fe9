"""``{"name": ..., "parameters": {...}}`` and nothing around it, as Llama 3.1 to 3.3 write; 4 with JSON calls too."""

from __future__ import annotations

import re

from agentrl.tool_format.base import OfTemplate, Schemas, broken, from_json, next_json, to_json
from agentrl.types import Message, ToolCall


class Llama(OfTemplate):
    """Bare JSON objects, separated by semicolons where there are several."""

    wanted = '{"name": "...", "parameters": {...}}'
    _keys = ("arguments", "parameters")
    _begin = re.compile(r'<\|python_tag\|>|\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:')
    _between = re.compile(r"[\s;]*(?=\{)")

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """The objects from the first one on that looks like a call; JSON that is an answer stays text."""
        began = self._begin.search(text)
        if began is None:
            return text.strip(), []
        at = began.end() if began.group().startswith("<") else began.start()
        calls: list[ToolCall] = []
        while at >= 0:
            try:
                data, end = next_json(text, at)
            except ValueError as error:
                calls.append(broken(f"The tool call is not valid JSON: {error}", self.wanted))
                return text[: began.start()].strip(), calls
            if not calls and began.group().startswith("{") and not any(key in data for key in self._keys):
                return text.strip(), []  # {"name": "Ada", "born": 1815}
            calls.append(from_json(data, self.wanted, self._keys))
            more = self._between.match(text, end)
            at = more.end() if more else -1
        return f"{text[: began.start()]}{text[end:]}".strip(), calls

    def write(self, message: Message, end: str) -> str:
        """Content, then the calls, then the end of the turn."""
        calls = [to_json({"name": call.name, "parameters": dict(call.arguments)}) for call in message.tool_calls]
        return "\n".join(part for part in (message.content, "; ".join(calls)) if part) + end
