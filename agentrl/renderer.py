"""Messages to token ids and back, without ever re-encoding what was sampled.

``prompt`` renders the opening of a conversation through the tokenizer's chat template. After that only *new* messages
are rendered (``continuation``) and their ids appended to what the sampler produced; sampled ids are decoded only to be
read (``parse``). A template that changes earlier turns when later ones arrive cannot be used that way and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError as JinjaError

from agentrl.errors import TemplateError
from agentrl.tool_format import ToolFormat, get_format
from agentrl.types import Message, ToolCall

_CACHED_PROMPTS = 1024

_USER = Message("user", "q")
_CALLING = Message("assistant", "<think>\nt\n</think>\n\nc", (ToolCall("call_0", "f", {"x": 1}),))
_RESULT = Message("tool", "what came back", tool_call_id="call_0")
_MORE = Message("user", "what was asked next")


class Renderer:
    """Renders and parses for one tokenizer and one tool format.

    Args:
        tokenizer: a transformers tokenizer with a chat template and an eos token that ends an assistant turn.
        tool_format: ``"hermes"`` or ``"tags"``.

    Raises:
        TemplateError: no template, no eos token, or a template that rewrites earlier turns.
    """

    def __init__(self, tokenizer: Any, tool_format: str = "hermes") -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError("the tokenizer has no chat template: set tokenizer.chat_template and save it again.")
        if tokenizer.eos_token is None:
            raise TemplateError("the tokenizer has no eos token, which must end every assistant turn.")
        self.tokenizer = tokenizer
        self.format: ToolFormat = get_format(tool_format)
        self.stop_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        self._prefixes: dict[str, str] = {}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._prefix_for("tool")

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of the opening messages, up to where the assistant's turn begins. Shape [T]."""
        key = json.dumps([[message.to_chat() for message in messages], list(tools)], default=str)
        if key not in self._prompts:  # the episodes of a group share their prompt, and templates are slow
            if len(self._prompts) >= _CACHED_PROMPTS:
                self._prompts.clear()
            opening, shown = self.format.opening(messages, tools)
            text = self._render(opening, shown, generation=True)
            if shown and text == self._render(opening, (), generation=True):
                raise TemplateError(
                    "the chat template does not show the tools: the policy would not know them. Use a template that "
                    "renders `tools`, or policy.tool_format = 'tags'."
                )
            self._prompts[key] = self._encode(text)
        return self._prompts[key]

    def continuation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of ``messages`` alone, to append after a finished assistant turn. Shape [T].

        The sampled turn ends with the stop token, so the ids begin with whatever the template puts after it.

        Raises:
            TemplateError: the template rewrites earlier turns when these messages are added.
        """
        inline = self.format.continuation(messages)
        if inline is not None:
            return self._encode(inline)
        prefix = self._prefix_for(messages[0].role)
        text = self._render([_USER, _CALLING, *messages], (), generation=True)
        _require_kept(prefix, text, " and a ".join(dict.fromkeys(message.role for message in messages)))
        return self._encode(text[len(prefix) :])

    def stop_strings(self, tools: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        """Strings, besides the stop ids, at which sampling must stop."""
        return self.format.stop_strings(tools)

    def parse(self, token_ids: Sequence[int], tools: Sequence[dict[str, Any]] = (), turn: int = 0) -> Message:
        """The assistant message in sampled ids; malformed calls are kept as calls that carry their error."""
        ids = list(token_ids)
        if ids and ids[-1] in self.stop_ids:
            ids.pop()
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.parse_text(text, tools, turn)

    def parse_text(self, text: str, tools: Sequence[dict[str, Any]] = (), turn: int = 0) -> Message:
        """The assistant message in ``text``; ``turn`` makes the call ids unique in the conversation."""
        content, calls = self.format.parse(text, tools)
        numbered = tuple(
            ToolCall(f"call_{turn}_{i}", call.name, call.arguments, call.error) for i, call in enumerate(calls)
        )
        return Message("assistant", content, numbered)

    def assistant(self, message: Message) -> tuple[int, ...]:
        """Ids of an assistant message as the policy should write it, up to where sampling stops (demonstrations)."""
        return self._encode(self.format.write(message, self.tokenizer.eos_token))

    def _encode(self, text: str) -> tuple[int, ...]:
        clean = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text to a tokenizer
        return tuple(self.tokenizer(clean, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation: bool) -> str:
        chat = [message.to_chat() for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                chat, tools=list(tools) or None, add_generation_prompt=generation, tokenize=False
            )
        except JinjaError as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateError(f"the chat template refuses a conversation of {roles}: {error}") from error
        return text

    def _prefix_for(self, role: str) -> str:
        """The rendered text before a new message of ``role``, proven to be untouched by that message."""
        if role not in self._prefixes:
            new = _RESULT if role == "tool" else _MORE
            before = self._render([_USER, _CALLING], (), generation=False)
            after = self._render([_USER, _CALLING, new], (), generation=True)
            eos = self.tokenizer.eos_token
            written, ended, behind = before.rpartition(eos)
            if not ended or behind.strip():
                raise TemplateError(f"the chat template does not end an assistant turn with the eos token {eos!r}.")
            kept = written + eos
            _require_kept(kept, after, role)
            if new.content not in after[len(kept) :]:
                raise TemplateError(f"the chat template does not show {role} messages: the policy would not see them.")
            self._prefixes[role] = kept
        return self._prefixes[role]


def _require_kept(kept: str, after: str, role: str) -> None:
    if after.startswith(kept):
        return
    same = next(i for i, (a, b) in enumerate(zip(kept, after + "\0", strict=False)) if a != b)
    raise TemplateError(
        f"the chat template rewrites earlier turns when a {role} message is added: {kept[same : same + 40]!r} became "
        f"{after[same : same + 40]!r}. Sampled tokens would no longer be what the learner sees. Use a template that "
        "leaves earlier assistant turns (their <think> part too) as they are."
    )
