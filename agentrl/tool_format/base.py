"""What a format is, and what most of them share: a template that shows tools and results, JSON, blocks of calls."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from agentrl.types import Message, ToolCall

Schemas = Sequence[dict[str, Any]]

MAX_DEPTH = 64
"""Nesting that a call's arguments may have."""

_DECODER = json.JSONDecoder()
_BLANK = re.compile(r"[ \t\n\r]*")


class ToolFormat(Protocol):
    """What a renderer asks of a format."""

    def __init__(self, template: str = "") -> None: ...

    def opening(self, messages: Sequence[Message], tools: Schemas) -> tuple[Sequence[Message], Schemas]:
        """Opening messages and the tools that the chat template should show."""
        ...

    def continuation(self, messages: Sequence[Message]) -> str | None:
        """Text of tool results where the format writes them itself, else None: the template does."""
        ...

    def stop_strings(self, tools: Schemas) -> tuple[str, ...]:
        """Where sampling must stop, besides the end of the turn."""
        ...

    def call_id(self, number: str) -> str:
        """The id of a call as the template wants it, from the one that the records have."""
        ...

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """Text outside calls, and the calls; one that cannot be read carries its error."""
        ...

    def write(self, message: Message, end: str) -> str:
        """The inverse of ``parse``, for demonstrations; ``end`` is the text of the token that ends a turn."""
        ...


class OfTemplate:
    """A format whose chat template shows the tools, wraps the results and ends the turn after the calls."""

    def __init__(self, template: str = "") -> None:
        """Most formats have one form, whatever the template."""

    def opening(self, messages: Sequence[Message], tools: Schemas) -> tuple[Sequence[Message], Schemas]:
        """The template shows the tools."""
        return messages, tools

    def continuation(self, messages: Sequence[Message]) -> str | None:
        """The template wraps the results."""
        return None

    def stop_strings(self, tools: Schemas) -> tuple[str, ...]:
        """The end of the turn is enough."""
        return ()

    def call_id(self, number: str) -> str:
        """Any id will do."""
        return number


class Blocks(OfTemplate):
    """Calls in ``<tool_call>`` tags, any number in a turn; what stands between the tags is the subclass's."""

    wanted: str
    """The form, as an error shows it to the policy."""

    after_content = "\n"
    """What the family's template puts between content and the first call."""

    after_thought = "\n\n"
    """The same, where the content is a thought and nothing more."""

    _block = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """Read every block, closed or not."""
        calls = [self._read_block(match.group(0), match.group(1), tools) for match in self._block.finditer(text)]
        return self._block.sub("", text).strip(), calls

    def write(self, message: Message, end: str) -> str:
        """Content, then one block a call, then the end of the turn."""
        blocks = "\n".join(f"<tool_call>{self.write_body(call)}</tool_call>" for call in message.tool_calls)
        return message.content + (self._between(message.content) if blocks else "") + blocks + end

    def read_body(self, body: str, tools: Schemas) -> ToolCall:
        """The call between two tags."""
        raise NotImplementedError

    def write_body(self, call: ToolCall) -> str:
        """What stands between two tags."""
        raise NotImplementedError

    def _between(self, content: str) -> str:
        if not content or content.endswith("\n"):
            return ""
        return self.after_thought if content.endswith("</think>") else self.after_content

    def _read_block(self, block: str, body: str | None, tools: Schemas) -> ToolCall:
        if body is None:
            return broken("The tool call has no opening <tool_call>", self.wanted)
        if not block.endswith("</tool_call>"):
            return broken("The tool call has no closing </tool_call>", self.wanted)
        return self.read_body(body, tools)


def broken(reason: str, wanted: str, name: str = "") -> ToolCall:
    """A call that could not be read: why, and the form that was expected."""
    return ToolCall("", name, error=f"{reason}. Expected {wanted}.")


def from_json(data: Any, wanted: str, keys: Sequence[str] = ("arguments",)) -> ToolCall:
    """The call in an object with a name and, under one of ``keys``, arguments; none are no arguments."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        return broken("The tool call has no name", wanted)
    return with_arguments(data["name"], next((data[key] for key in keys if key in data), {}), wanted)


def with_arguments(name: str, arguments: Any, wanted: str) -> ToolCall:
    """The call of ``name``, if its arguments are an object."""
    if not isinstance(arguments, dict):
        return broken(f"The arguments are a JSON {type(arguments).__name__}, not an object", wanted, name)
    return ToolCall("", name, arguments)


def to_json(value: Any) -> str:
    """JSON as the families' templates write it: characters beyond ASCII as they are."""
    return json.dumps(value, ensure_ascii=False)


def read_json(text: str) -> Any:
    """``text`` as JSON that can be written down again.

    Raises:
        ValueError: saying what is wrong; besides malformed text, what Python reads though it is no JSON (NaN, numbers
            beyond a float, half a surrogate pair), and nesting deeper than ``MAX_DEPTH``.
    """
    value, end = next_json(text)
    if _BLANK.fullmatch(text, end) is None:
        raise ValueError(f"expected nothing after it, got {text[end : end + 40]!r}")
    return value


def next_json(text: str, at: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``at``, spaces aside, and where it ends.

    Raises:
        ValueError: as ``read_json`` does.
    """
    begin = _BLANK.match(text, at)
    try:
        value, end = _DECODER.raw_decode(text, begin.end() if begin else at)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if _depth(value) <= MAX_DEPTH:
            return value, end
    except RecursionError:
        pass
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def _depth(value: Any) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0) if isinstance(inner, list) else 0
