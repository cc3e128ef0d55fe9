"""A tokenizer's chat template, called one way everywhere: with the run's options, refusals as ``TemplateError``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, meta
from jinja2 import TemplateError as JinjaError

from agentrl.errors import TemplateError
from agentrl.types import Message

# What transformers gives to every template besides the options.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_HELPERS = {"raise_exception", "strftime_now", "bos_token", "eos_token", "pad_token", "unk_token"}


class ChatTemplate:
    """Renders messages as text.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        options: further variables of the template.
        call_id: makes the id of a call as the template wants it, from the one that the records have.
        probe: a conversation that ends with a call, to see how the template takes a call's arguments: as an object, or
            as text, the way OpenAI's interface has them (DeepSeek's).

    Raises:
        TemplateError: an option that the template does not read.
    """

    def __init__(
        self, tokenizer: Any, options: Mapping[str, Any], call_id: Callable[[str], str], probe: Sequence[Message]
    ) -> None:
        _require_read(options, source(tokenizer))
        self._tokenizer, self._options, self._call_id = tokenizer, dict(options), call_id
        self._arguments_as_text = False
        try:
            self._apply(probe, (), False)
        except TypeError:
            self._arguments_as_text = True
        except JinjaError:
            pass  # which `render` will tell

    def render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation: bool) -> str:
        """The conversation as text; with ``generation``, up to where the assistant's turn begins.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        try:
            return self._apply(messages, tools, generation)
        except (JinjaError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateError(f"the chat template refuses a conversation of {roles}: {error}") from error

    def generation_prompt(self, messages: Sequence[Message]) -> str:
        """What is added after ``messages`` where the assistant's turn begins."""
        without, text = (self.render(messages, (), generation=wanted) for wanted in (False, True))
        return text[len(without) :] if text.startswith(without) else text

    def _apply(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], generation: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            [self._chat(message) for message in messages],
            tools=list(tools) or None,
            add_generation_prompt=generation,
            tokenize=False,
            **self._options,
        )
        return text

    def _chat(self, message: Message) -> dict[str, Any]:
        chat = message.to_chat()
        if message.tool_call_id is not None:
            chat["tool_call_id"] = self._call_id(message.tool_call_id)
        for call in chat.get("tool_calls", ()):
            call["id"] = self._call_id(call["id"])
            if self._arguments_as_text:
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return chat


def source(tokenizer: Any) -> str:
    """The chat template, or all of them where the tokenizer has several (one may be for tools)."""
    templates = tokenizer.chat_template
    return "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)


def generation_stops(tokenizer: Any) -> list[str]:
    """The tokens of ``eos_token_id`` in the ``generation_config.json`` of the folder that the tokenizer is from.

    Raises:
        TemplateError: the file is no JSON.
    """
    folder = getattr(tokenizer, "name_or_path", "")
    file = Path(folder, "generation_config.json")
    if not folder or not file.is_file():
        return []
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except ValueError as error:
        raise TemplateError(f"{file} is not JSON, expected eos_token_id in it: {error}") from error
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token is not None]


def _require_read(options: Mapping[str, Any], template: str) -> None:
    """Every option must be one that the template reads: others would be ignored without a word."""
    if not options:
        return
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)  # a tag of transformers' own
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(plain)
    except JinjaError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {error}") from error
    known = meta.find_undeclared_variables(tree) - _GIVEN - _HELPERS
    for name in options:
        if name not in known:
            raise TemplateError(
                f"policy.template_options has {name!r}, which the chat template does not read: expected "
                f"{' or '.join(sorted(known)) or 'none, as this template has no options'}."
            )
