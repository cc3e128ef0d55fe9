"""``<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>``, as GLM 4.5 and later write."""

from __future__ import annotations

import re

from agentrl.tool_format.base import Blocks, Schemas, broken
from agentrl.tool_format.values import parameters, read_value, write_value
from agentrl.types import ToolCall


class Glm(Blocks):
    """A name, then keys and values in turn, typed by the tool's schema."""

    wanted = "<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>, a pair an argument"
    after_thought = "\n"
    _name = re.compile(r'\s*([^\s<>{}"]+)\s*')
    _pair = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)

    def read_body(self, body: str, tools: Schemas) -> ToolCall:
        """The name and the pairs."""
        named = self._name.match(body)
        if named is None:
            return broken("The tool call has no name", self.wanted)
        name, at = named.group(1), named.end()
        schemas, arguments = parameters(tools, name), {}
        while match := self._pair.match(body, at):
            key, at = match.group(1).strip(), match.end()
            if key in arguments:
                return broken(f"The argument {key!r} is given twice", self.wanted, name)
            arguments[key] = read_value(match.group(2), schemas.get(key, {}))
        if body[at:].strip():
            return broken(f"Text that is no pair of key and value: {body[at:].strip()[:40]!r}", self.wanted, name)
        return ToolCall("", name, arguments)

    def write_body(self, call: ToolCall) -> str:
        """Every key and every value on a line of its own."""
        pairs = call.arguments.items()
        return f"{call.name}\n" + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{write_value(value)}</arg_value>\n" for key, value in pairs
        )
