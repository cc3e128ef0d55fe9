"""Arguments that are written as bare text and typed by the tool's JSON schema (Qwen3-Coder, GLM)."""

from __future__ import annotations

from typing import Any

from agentrl.tool_format.base import Schemas, read_json, to_json

_KINDS: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}


def read_value(text: str, schema: dict[str, Any]) -> Any:
    """``text`` as a value of ``schema``.

    A string stays as it is. Everything else is JSON (``True`` and ``False`` too, which older templates write). What
    cannot be read so is left as text, as vLLM does: the tool then says which type it expects.
    """
    kinds = _kinds(schema)
    if kinds <= {"string"}:
        return text
    if "boolean" in kinds and text.strip().lower() in ("true", "false"):
        return text.strip().lower() == "true"
    try:
        value = read_json(text)
    except ValueError:
        return text
    kind = _KINDS[type(value)]
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    return value if (fits and kind != "string") or "string" not in kinds else text


def write_value(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else to_json(value)


def parameters(tools: Schemas, name: str) -> dict[str, dict[str, Any]]:
    """The schemas of the parameters of the tool called ``name``; empty where there is no such tool."""
    for tool in tools:
        if tool["function"]["name"] == name:
            return dict(tool["function"].get("parameters", {}).get("properties", {}))
    return {}


def _kinds(schema: Any) -> set[str]:
    """Every JSON type that ``schema`` allows; none where it does not say."""
    if not isinstance(schema, dict):
        return set()
    kind = schema.get("type", [])
    kinds = {kind} if isinstance(kind, str) else set(kind)
    kinds |= {_KINDS[type(value)] for value in schema.get("enum", ())}
    return kinds.union(*(_kinds(choice) for key in ("anyOf", "oneOf", "allOf") for choice in schema.get(key, ())))
