"""DeepSeek's calls: one list a turn between marks that are special tokens, each call between two more."""

# ruff: noqa: RUF001 -- the bars of these marks are full-width

from __future__ import annotations

import re

from agentrl.tool_format.base import OfTemplate, Schemas, broken, read_json, to_json, with_arguments
from agentrl.types import Message, ToolCall

FIRST, LAST = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
BEGIN, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeekV31(OfTemplate):
    """Name, separator and JSON arguments (DeepSeek V3.1)."""

    wanted = f'{FIRST}{BEGIN}NAME{SEPARATOR}{{"KEY": VALUE}}{END}{LAST}'
    _list = re.compile(f"{FIRST}(.*?)(?:{LAST}|\\Z)", re.DOTALL)
    _call = re.compile(rf"\s*{BEGIN}(?P<name>[^<]*){SEPARATOR}(?P<arguments>.*?){END}\s*", re.DOTALL)

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """Read every list, closed or not."""
        calls: list[ToolCall] = []
        for written in self._list.finditer(text):
            inner, at = written.group(1), 0
            while match := self._call.match(inner, at):
                at = match.end()
                calls.append(self._read(match["name"].strip(), match["arguments"]))
            if inner[at:].strip() or not at:
                calls.append(broken(f"Text that is no closed call: {inner[at:].strip()[:40]!r}", self.wanted))
            elif not written.group(0).endswith(LAST):
                calls.append(broken(f"The list of tool calls has no closing {LAST}", self.wanted))
        return self._list.sub("", text).strip(), calls

    def write(self, message: Message, end: str) -> str:
        """Content, then the list of calls, then the end of the turn."""
        if not message.tool_calls:
            return message.content + end
        return message.content + FIRST + "".join(map(self.write_call, message.tool_calls)) + LAST + end

    def write_call(self, call: ToolCall) -> str:
        """One call with its marks."""
        return f"{BEGIN}{call.name}{SEPARATOR}{to_json(dict(call.arguments))}{END}"

    def _read(self, name: str, arguments: str) -> ToolCall:
        if not name:
            return broken("The tool call has no name", self.wanted)
        try:
            return with_arguments(name, read_json(arguments), self.wanted)
        except ValueError as error:
            return broken(f"The arguments are not valid JSON: {error}", self.wanted, name)


class DeepSeekV3(DeepSeekV31):
    """The kind of call first, then the name, and the arguments in a fence (DeepSeek V3 and R1)."""

    wanted = f'{FIRST}{BEGIN}function{SEPARATOR}NAME\n```json\n{{"KEY": VALUE}}\n```{END}{LAST}'
    _call = re.compile(
        rf"\s*{BEGIN}function{SEPARATOR}(?P<name>[^\n<]*)\n```json\n(?P<arguments>.*?)\n```\s*{END}\s*", re.DOTALL
    )

    def write_call(self, call: ToolCall) -> str:
        """One call with its marks."""
        return f"{BEGIN}function{SEPARATOR}{call.name}\n```json\n{to_json(dict(call.arguments))}\n```{END}"
