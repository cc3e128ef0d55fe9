"""Thoughts in a sampled turn: what stands in ``<think>`` is kept as content and never read as a call."""

from __future__ import annotations

import re

from agentrl.tool_format.base import Schemas, ToolFormat
from agentrl.types import ToolCall

CLOSING = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_OPENING = re.compile("|".join(map(re.escape, CLOSING)))


def open_thought(text: str) -> str:
    """The end of ``text`` from the mark of a thought that it opens and does not close; empty where there is none."""
    opened = [match for match in _OPENING.finditer(text) if CLOSING[match.group()] not in text[match.end() :]]
    return text[opened[0].start() :] if opened else ""


def closes(text: str) -> bool:
    """Whether a thought ends in ``text``."""
    return any(mark in text for mark in CLOSING.values())


def parse_turn(written: ToolFormat, text: str, tools: Schemas) -> tuple[str, list[ToolCall]]:
    """The content of a turn, thoughts included, and the calls outside of them.

    vLLM, too, takes the reasoning out before its tool parser sees the text. A thought that is never closed goes on to
    the end of the turn. A mark inside a call's arguments is text like any other.
    """
    parts: list[str] = []
    calls: list[ToolCall] = []
    while opened := _OPENING.search(text):
        before = text[: opened.start()]
        content, found = written.parse(before, tools)
        if found and (found[-1].error or written.stop_strings(tools)):
            break  # the mark stands in a call that is not over yet, or after the one that ends the turn
        rest = text[opened.end() :].partition(CLOSING[opened.group()])[2]
        parts += [content if found else before, text[opened.start() : len(text) - len(rest)]]
        calls += found
        text = rest
    content, found = written.parse(text, tools)
    gap = text[: len(text) - len(text.lstrip())]
    return "".join([*parts, gap, content]).strip(), [*calls, *found]


def nothing_thought(thought: str) -> str:
    """What closes an opened ``thought`` at once, spaced as it was opened; empty where none is open."""
    if not thought:
        return ""
    closing = next(close for mark, close in CLOSING.items() if thought.startswith(mark))
    return f"\n{closing}\n\n" if thought.endswith("\n") else closing
