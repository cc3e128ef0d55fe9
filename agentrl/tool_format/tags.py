"""``<search>query</search>`` and ``<result>...</result>`` put back into the same turn, as ARPO and Search-R1 do.

Each tool takes one text argument, its first parameter. The form is no model family's, so no chat template knows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentrl.errors import ToolSchemaError, UserError
from agentrl.tool_format.base import OfTemplate, Schemas
from agentrl.types import Message, ToolCall


class Tags(OfTemplate):
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
