"""How tool calls are written in text: one class a form, found by the name that vLLM gives to its parser of that form.

A policy that was trained with a format is served with ``vllm serve --tool-call-parser`` of the same name. Only ``tags``
has no counterpart there. ``docs/templates.md`` says which models write which form.
"""

from __future__ import annotations

from agentrl.errors import UnknownName
from agentrl.tool_format.base import MAX_DEPTH, Schemas, ToolFormat, read_json
from agentrl.tool_format.deepseek import DeepSeekV3, DeepSeekV31
from agentrl.tool_format.glm import Glm
from agentrl.tool_format.granite import Granite
from agentrl.tool_format.hermes import Hermes
from agentrl.tool_format.llama import Llama
from agentrl.tool_format.mistral import Mistral
from agentrl.tool_format.pythonic import Pythonic
from agentrl.tool_format.qwen3_coder import Qwen3Coder
from agentrl.tool_format.tags import Tags

__all__ = ["FORMATS", "MAX_DEPTH", "Hermes", "Schemas", "Tags", "ToolFormat", "get_format", "read_json"]

FORMATS: dict[str, type[ToolFormat]] = {
    "hermes": Hermes,
    "qwen3_json": Hermes,
    "granite4": Hermes,
    "qwen3_coder": Qwen3Coder,
    "qwen3_xml": Qwen3Coder,
    "llama3_json": Llama,
    "llama4_json": Llama,
    "mistral": Mistral,
    "glm45": Glm,
    "glm47": Glm,
    "deepseek_v3": DeepSeekV3,
    "deepseek_v31": DeepSeekV31,
    "granite": Granite,
    "pythonic": Pythonic,
    "tags": Tags,
}
"""Every name that ``policy.tool_format`` takes; several names of one class are vLLM's own aliases."""


def get_format(name: str, template: str = "") -> ToolFormat:
    """The format called ``name``.

    Args:
        name: a key of ``FORMATS``.
        template: source of the chat template. Families that changed their form over time (Mistral, Granite) read every
            form and write the one whose marks are in the template.

    Raises:
        UnknownName: with the nearest valid name.
    """
    if name not in FORMATS:
        raise UnknownName("tool format", name, FORMATS)
    return FORMATS[name](template)
