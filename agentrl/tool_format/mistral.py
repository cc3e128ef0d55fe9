"""Mistral's calls after ``[TOOL_CALLS]``: a JSON list, or since 2025 a name, ``[ARGS]`` and a JSON object."""

from __future__ import annotations

import hashlib
import re

from agentrl.tool_format.base import OfTemplate, Schemas, broken, from_json, next_json, to_json, with_arguments
from agentrl.types import Message, ToolCall

MARK, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class Mistral(OfTemplate):
    """Both forms are read; written is the one with ``[ARGS]`` if the template has that mark."""

    _head = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\s\[\]{}]*)?\s*(?:\[ARGS\])?\s*(?=\{)")

    def __init__(self, template: str = "") -> None:
        self._named = ARGS in template
        self._with_id = CALL_ID in template
        middle = f"{CALL_ID}ID{ARGS}" if self._with_id else ARGS
        self.wanted = (
            f'{MARK}NAME{middle}{{"KEY": VALUE}}'
            if self._named
            else f'{MARK} [{{"name": "...", "arguments": {{...}}}}]'
        )

    def call_id(self, number: str) -> str:
        """Nine letters or digits: the templates refuse any other id."""
        return hashlib.sha256(number.encode()).hexdigest()[:9]

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """What follows every mark."""
        content, calls, at = "", list[ToolCall](), 0
        while (mark := text.find(MARK, at)) >= 0:
            content += text[at:mark]
            found, at = self._read(text, mark + len(MARK))
            calls += found
        return (content + text[at:]).strip(), calls

    def write(self, message: Message, end: str) -> str:
        """Content, then the calls, then the end of the turn."""
        if not message.tool_calls:
            return message.content + end
        if self._named:
            return message.content + "".join(map(self._write_named, message.tool_calls)) + end
        calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls]
        return f"{message.content}{MARK} {to_json(calls)}{end}"

    def _write_named(self, call: ToolCall) -> str:
        identity = CALL_ID + self.call_id(call.id) if self._with_id else ""
        return f"{MARK}{call.name}{identity}{ARGS}{to_json(dict(call.arguments))}"

    def _read(self, text: str, at: int) -> tuple[list[ToolCall], int]:
        """The calls that begin at ``at``, and where what belongs to them ends."""
        head = self._head.match(text, at)
        try:
            data, end = next_json(text, head.end() if head else at)
        except ValueError as error:
            later = text.find(MARK, at)
            end = later if later >= 0 else len(text)
            return [broken(f"The tool call is not valid JSON: {error}", self.wanted)], end
        if head:
            return [with_arguments(head.group(1), data, self.wanted)], end
        several = data if isinstance(data, list) else [data]
        return [from_json(each, self.wanted) for each in several] or [broken("No call", self.wanted)], end
