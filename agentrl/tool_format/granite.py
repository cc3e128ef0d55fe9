"""A JSON list of calls after a mark, as Granite 3 writes; Granite 4 writes as Hermes does."""

from __future__ import annotations

import re

from agentrl.tool_format.base import OfTemplate, Schemas, broken, from_json, next_json, to_json
from agentrl.types import Message, ToolCall

TOKEN, TEXT = "<|tool_call|>", "<tool_call>"


class Granite(OfTemplate):
    """The mark is a special token in 3.0 and later instruct models, plain text in 3.1's template: both are read."""

    _mark = re.compile(r"<\|tool_call\|>|<tool_call>")

    def __init__(self, template: str = "") -> None:
        self._written = TEXT if TEXT in template and TOKEN not in template else TOKEN
        self.wanted = f'{self._written}[{{"name": "...", "arguments": {{...}}}}]'

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """The list that follows every mark."""
        content, calls, at = "", list[ToolCall](), 0
        while mark := self._mark.search(text, at):
            content += text[at : mark.start()]
            try:
                data, at = next_json(text, mark.end())
            except ValueError as error:
                calls.append(broken(f"The tool call is not valid JSON: {error}", self.wanted))
                later = self._mark.search(text, mark.end())
                at = later.start() if later else len(text)
                continue
            if isinstance(data, list) and data:
                calls += [from_json(each, self.wanted) for each in data]
            else:
                calls.append(broken(f"The tool calls are a JSON {type(data).__name__}, not a list", self.wanted))
        return (content + text[at:]).strip(), calls

    def write(self, message: Message, end: str) -> str:
        """Content, then the list of calls, then the end of the turn."""
        if not message.tool_calls:
            return message.content + end
        calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls]
        return f"{message.content}{self._written}{to_json(calls)}{end}"
