"""How tool calls are written in text. One class a format; ``get_format`` finds them by name.

``hermes``: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Hermes 2 Pro and Qwen write them; the chat
template shows the tools and wraps the results.

``tags``: ``<search>query</search>``, ``<python>code</python>`` with ``<result>...</result>`` put back into the same
assistant turn, as ARPO and Search-R1 write them. Each tool takes one text argument, its first parameter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from agentrl.errors import ToolSchemaError, UnknownName, UserError
from agentrl.types import Message, ToolCall

Schemas = Sequence[dict[str, Any]]

MAX_DEPTH = 64
"""Nesting that a call's arguments may have."""


class ToolFormat(Protocol):
    """What a renderer asks of a format."""

    def opening(self, messages: Sequence[Message], tools: Schemas) -> tuple[Sequence[Message], Schemas]:
        """Opening messages and the tools that the chat template should show."""
        ...

    def continuation(self, messages: Sequence[Message]) -> str | None:
        """Text of tool results where the format writes them itself, else None: the template does."""
        ...

    def stop_strings(self, tools: Schemas) -> tuple[str, ...]:
        """Where sampling must stop, besides the end of the turn."""
        ...

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """Text outside calls, and the calls; one that cannot be read carries its error."""
        ...

    def write(self, message: Message, end: str) -> str:
        """The inverse of ``parse``, for demonstrations; ``end`` is the text of the token that ends a turn."""
        ...


def get_format(name: str) -> ToolFormat:
    """The format called ``name``.

    Raises:
        UnknownName: with the nearest valid name.
    """
    formats: dict[str, type[ToolFormat]] = {"hermes": Hermes, "tags": Tags}
    if name not in formats:
        raise UnknownName("tool format", name, formats)
    return formats[name]()


class Hermes:
    """JSON in ``<tool_call>`` tags; any number of calls in a turn."""

    _block = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)

    def opening(self, messages: Sequence[Message], tools: Schemas) -> tuple[Sequence[Message], Schemas]:
        """The template shows the tools."""
        return messages, tools

    def continuation(self, messages: Sequence[Message]) -> str | None:
        """The template wraps the results."""
        return None

    def stop_strings(self, tools: Schemas) -> tuple[str, ...]:
        """The end of the turn is enough."""
        return ()

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """Read every block, closed or not."""
        calls = [self._read(match.group(0), match.group(1)) for match in self._block.finditer(text)]
        return self._block.sub("", text).strip(), calls

    def write(self, message: Message, end: str) -> str:
        """Content, then one block a call, then the end of the turn."""
        calls = ({"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls)
        blocks = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
        return "\n".join([message.content, *blocks] if message.content else blocks) + end

    @staticmethod
    def _read(block: str, body: str) -> ToolCall:
        wanted = 'Expected <tool_call>{"name": "...", "arguments": {...}}</tool_call>'
        if not block.endswith("</tool_call>"):
            return ToolCall("", "", error=f"The tool call has no closing </tool_call>. {wanted}.")
        try:
            data = read_json(body)
        except ValueError as error:
            return ToolCall("", "", error=f"The tool call is not valid JSON: {error}. {wanted}.")
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            return ToolCall("", "", error=f"The tool call has no name. {wanted}.")
        arguments = data.get("arguments", {})
        if not isinstance(arguments, dict):
            kind = type(arguments).__name__
            return ToolCall("", data["name"], error=f"The arguments are a JSON {kind}, not an object. {wanted}.")
        return ToolCall("", data["name"], arguments)


class Tags:
    """One tag per tool; a turn stops after its first closing tag."""

    def opening(self, messages: Sequence[Message], tools: Schemas) -> tuple[Sequence[Message], Schemas]:
        """The tools are described in a system message, because templates only know JSON calls."""
        if not tools:
            return messages, ()
        lines = ["You can use these tools; write the tag and wait for the <result>."]
        for schema in tools:
            name, parameter = schema["function"]["name"], _first_parameter(schema)
            lines.append(f"<{name}>{parameter}</{name}>: {schema['function']['description']}")
        lines.append("Give the final answer as <answer>...</answer>.")
        text = "\n".join(lines)
        if messages and messages[0].role == "system":
            return [Message("system", f"{messages[0].content}\n\n{text}"), *messages[1:]], ()
        return [Message("system", text), *messages], ()

    def continuation(self, messages: Sequence[Message]) -> str | None:
        """Results go back into the open assistant turn; other messages are the template's."""
        if any(message.role != "tool" for message in messages):
            return None
        return "".join(f" <result>\n{message.content}\n</result>\n" for message in messages)

    def stop_strings(self, tools: Schemas) -> tuple[str, ...]:
        """Every tool's closing tag."""
        return tuple(f"</{name}>" for name in _names(tools))

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """The first tool tag, if there is one; tokens after its closing tag (at most one token) are ignored."""
        opened = {name: at for name in _names(tools) if (at := text.find(f"<{name}>")) >= 0}
        if not opened:
            return text.strip(), []
        name = min(opened, key=opened.__getitem__)
        content = text[: opened[name]].strip()
        body, closed, _ = text[opened[name] + len(name) + 2 :].partition(f"</{name}>")
        if not closed:
            return content, [ToolCall("", name, error=f"<{name}> has no closing </{name}>.")]
        return content, [ToolCall("", name, {_first_parameter(_names(tools)[name]): body.strip()})]

    def write(self, message: Message, end: str) -> str:
        """Content, then the call's tag; the turn stays open for the result and ends only with an answer.

        Raises:
            UserError: several calls in one message, which tags cannot express.
        """
        if not message.tool_calls:
            return message.content + end
        if len(message.tool_calls) > 1:
            raise UserError(
                f"tool_format 'tags' allows one call a turn, got {len(message.tool_calls)} in one demonstration. Use "
                "'hermes', or let the expert make one call after the other."
            )
        (call,) = message.tool_calls
        tag = f"<{call.name}>{next(iter(call.arguments.values()), '')}</{call.name}>"
        return f"{message.content}\n{tag}" if message.content else tag


def read_json(text: str) -> Any:
    """``text`` as JSON that can be written down again.

    Raises:
        ValueError: saying what is wrong; besides malformed text, what Python reads though it is no JSON (NaN, numbers
            beyond a float, half a surrogate pair), and nesting deeper than ``MAX_DEPTH``.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if _depth(value) <= MAX_DEPTH:
            return value
    except RecursionError:
        pass
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _depth(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(inner, list) else 0


def _names(tools: Schemas) -> dict[str, dict[str, Any]]:
    return {schema["function"]["name"]: schema for schema in tools}


def _first_parameter(schema: dict[str, Any]) -> str:
    properties = schema["function"]["parameters"].get("properties", {})
    required = schema["function"]["parameters"].get("required", [])
    if len(required) > 1 or not properties:
        raise ToolSchemaError(
            f"tool {schema['function']['name']!r} cannot be written as a tag: expected one required text parameter, "
            f"got {required or 'none'}. Use tool_format = 'hermes'."
        )
    return str((required or list(properties))[0])
