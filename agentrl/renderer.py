"""Messages to token ids and back, without ever re-encoding what was sampled.

``prompt`` renders the opening of a conversation through the tokenizer's chat template. After that only *new* messages
are rendered (``continuation``) and their ids appended to what the sampler produced; sampled ids are decoded only to be
read (``parse``). A template that changes earlier turns when later ones arrive cannot be used that way and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from agentrl.errors import TemplateError
from agentrl.tool_format import ToolFormat, get_format
from agentrl.types import Message, ToolCall

_CACHED_PROMPTS = 1024

_USER = Message("user", "q")
_CALLING = Message("assistant", "<think>\nt\n</think>\n\nc", (ToolCall("call_0", "f", {"x": 1}),))
_RESULT = Message("tool", "r", tool_call_id="call_0")


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
            self._prompts[key] = self._encode(self._render(opening, shown, generation=True))
        return self._prompts[key]

    def continuation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of ``messages`` alone, to append after a finished assistant turn. Shape [T].

        The sampled turn ends with the stop token, so the ids begin with whatever the template puts after it.
        """
        inline = self.format.continuation(messages)
        if inline is not None:
            return self._encode(inline)
        prefix = self._prefix_for(messages[0].role)
        text = self._render([_USER, _CALLING, *messages], (), generation=True)
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
        """Ids of an assistant message as the policy should write it, stop token included (for demonstrations)."""
        return self._encode(self.format.write(message) + self.tokenizer.eos_token)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]], *, generation: bool) -> str:
        chat = [message.to_chat() for message in messages]
        text: str = self.tokenizer.apply_chat_template(
            chat, tools=list(tools) or None, add_generation_prompt=generation, tokenize=False
        )
        return text

    def _prefix_for(self, role: str) -> str:
        """The rendered text before a new message of ``role``, proven to be untouched by that message."""
        if role not in self._prefixes:
            new = _RESULT if role == "tool" else Message("user", "u")
            before = self._render([_USER, _CALLING], (), generation=False)
            after = self._render([_USER, _CALLING, new], (), generation=True)
            eos = self.tokenizer.eos_token
            if eos not in before:
                raise TemplateError(f"the chat template does not end an assistant turn with the eos token {eos!r}.")
            kept = before[: before.rindex(eos) + len(eos)]
            if not after.startswith(kept):
                same = next(i for i, (a, b) in enumerate(zip(kept, after + "\0", strict=False)) if a != b)
                raise TemplateError(
                    f"the chat template rewrites earlier turns when a {role} message is added: "
                    f"{kept[same : same + 40]!r} became {after[same : same + 40]!r}. Sampled tokens would no longer be "
                    "what the learner sees. Use a template that leaves earlier assistant turns (their <think> part "
                    "too) as they are."
                )
            self._prefixes[role] = kept
        return self._prefixes[role]
