"""``<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>``, as Qwen3-Coder writes."""

from __future__ import annotations

import re

from agentrl.tool_format.base import Blocks, Schemas, broken
from agentrl.tool_format.values import parameters, read_value, write_value
from agentrl.types import ToolCall


class Qwen3Coder(Blocks):
    """A tag for the function and one a parameter, whose values are typed by the tool's schema."""

    wanted = (
        "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>, one "
        "<parameter> for each argument"
    )
    after_content = "\n\n"
    # The second form is a call that lacks its opening tag: reported, never taken for an answer.
    _block = re.compile(
        r"<tool_call>(.*?)(?:</tool_call>|\Z)|<function=.*?(?:</function>(?:\s*</tool_call>)?|\Z)", re.DOTALL
    )
    _function = re.compile(r"\s*<function=([^<>\n]+)>(.*)</function>\s*", re.DOTALL)
    _parameter = re.compile(r"\s*<parameter=([^<>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)

    def read_body(self, body: str, tools: Schemas) -> ToolCall:
        """One function and its parameters."""
        function = self._function.fullmatch(body)
        if function is None:
            return broken("The tool call is not one closed <function=NAME>", self.wanted)
        name, inner = function.group(1).strip(), function.group(2)
        schemas, arguments, at = parameters(tools, name), {}, 0
        while match := self._parameter.match(inner, at):
            key, at = match.group(1).strip(), match.end()
            if key in arguments:
                return broken(f"The parameter {key!r} is given twice", self.wanted, name)
            arguments[key] = read_value(match.group(2), schemas.get(key, {}))
        if inner[at:].strip():
            return broken(f"Text that is no closed <parameter=KEY>: {inner[at:].strip()[:40]!r}", self.wanted, name)
        return ToolCall("", name, arguments)

    def write_body(self, call: ToolCall) -> str:
        """Every tag and every value on lines of its own."""
        pairs = call.arguments.items()
        inner = "".join(f"<parameter={key}>\n{write_value(value)}\n</parameter>\n" for key, value in pairs)
        return f"\n<function={call.name}>\n{inner}</function>\n"
