"""``[f(x=1), g(y="a")]``, Python calls in a list, as Llama 3.2, ToolACE and Llama 4 write."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from agentrl.tool_format.base import OfTemplate, Schemas, broken, read_json
from agentrl.types import Message, ToolCall

_JSON_NAMES = {"true": True, "false": False, "null": None}


class Pythonic(OfTemplate):
    """Keyword arguments with literal values; read by Python's parser and never run."""

    wanted = '[NAME(KEY=VALUE), ...] with literal values, as [search(query="maps", limit=3)]'
    _begin = re.compile(r"^[ \t]*\[\s*[^\W\d][\w.]*\(\s*(?:\)|[^\W\d]\w*\s*=)", re.MULTILINE)

    def parse(self, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
        """The list that begins a line and ends the turn."""
        began = self._begin.search(text)
        if began is None:
            return text.strip(), []
        content, written = text[: began.start()].strip(), text[began.start() :].strip()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an unknown escape is what the policy wrote, not what we did
                tree = ast.parse(written, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return content, [broken(f"The tool calls are not valid Python: {error}", self.wanted)]
        if not isinstance(tree, ast.List):
            return content, [broken("The tool calls are not one list", self.wanted)]
        return content, [self._read(call) for call in tree.elts]

    def write(self, message: Message, end: str) -> str:
        """Content, then the list on a line of its own, then the end of the turn."""
        if not message.tool_calls:
            return message.content + end
        calls = ", ".join(map(_written, message.tool_calls))
        return "\n".join(part for part in (message.content, f"[{calls}]") if part) + end

    def _read(self, call: ast.expr) -> ToolCall:
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name | ast.Attribute):
            return broken("An entry of the list is no call of a named tool", self.wanted)
        name = ast.unparse(call.func)
        keys = [str(word.arg) for word in call.keywords if word.arg]
        if call.args or len(keys) < len(call.keywords):
            return broken("The arguments have no names", self.wanted, name)
        if len(keys) > len(set(keys)):
            return broken("An argument is given twice", self.wanted, name)
        try:
            arguments = dict(zip(keys, (_literal(word.value) for word in call.keywords), strict=True))
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            return broken(f"An argument is no plain value: {error}", self.wanted, name)
        return ToolCall("", name, arguments)


def _written(call: ToolCall) -> str:
    return f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})"


def _literal(node: ast.expr) -> Any:
    """The value of a literal; tuples become lists, as JSON has it, and JSON's names for constants are known.

    Raises:
        ValueError: no literal, or nothing that JSON can hold.
        TypeError: likewise.
    """
    return read_json(json.dumps(ast.literal_eval(_Names().visit(node)), ensure_ascii=False))


class _Names(ast.NodeTransformer):
    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node
