"""Messages to token ids and back, without ever re-encoding what was sampled.

``prompt`` renders the opening of a conversation through the tokenizer's chat template. After that only *new* messages
are rendered (``continuation``) and their ids appended to what the sampler produced; sampled ids are decoded only to be
read (``parse``). A template that changes earlier turns when later ones arrive cannot be used that way and is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from agentrl.chat_template import ChatTemplate, generation_stops, source
from agentrl.errors import TemplateError
from agentrl.tool_format import ToolFormat, get_format
from agentrl.tool_format.thinking import closes, nothing_thought, open_thought, parse_turn
from agentrl.types import Message, ToolCall

_CACHED_PROMPTS = 1024

# A conversation to try the template on.
_USER = Message("user", "q")
_CALL = ToolCall("call_0_0", "f", {"x": "1"})
_CALLING = Message("assistant", "<think>\nt\n</think>\n\nc", (_CALL,))
_RESULT = Message("tool", "what came back", tool_call_id="call_0_0")
_THOUGHT = "what was thought"
_ANSWERING = Message("assistant", f"<think>\n{_THOUGHT}\n</think>\n\nc")
_MORE = Message("user", "what was asked next")
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "What it does.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
    },
}


class Renderer:
    """Renders and parses for one tokenizer and one tool format.

    Args:
        tokenizer: a transformers tokenizer with a chat template and an eos token. Where a family has several tokens
            that end a turn, the others are those of the ``generation_config.json`` beside the tokenizer's files, and
            those which the template itself puts at the end of a turn.
        tool_format: a key of ``agentrl.tool_format.FORMATS``.
        template_options: further variables of the chat template, such as ``{"enable_thinking": False}``.

    Raises:
        TemplateError: no template, no eos token, an option that the template does not read, or a template that
            rewrites earlier turns.
        UnknownName: no such tool format.

    Attributes:
        stop_ids: the tokens that end a turn; the eos token is the first.
    """

    def __init__(
        self, tokenizer: Any, tool_format: str = "hermes", template_options: Mapping[str, Any] | None = None
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TemplateError("the tokenizer has no chat template: set tokenizer.chat_template and save it again.")
        if tokenizer.eos_token is None:
            raise TemplateError("the tokenizer has no eos token, which must end every assistant turn.")
        self.tokenizer = tokenizer
        self.format: ToolFormat = get_format(tool_format, source(tokenizer))
        self._template = ChatTemplate(tokenizer, template_options or {}, self.format.call_id, (_USER, _CALLING))
        self._prefixes: dict[str, str] = {}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._stops: list[str] = [tokenizer.eos_token, *generation_stops(tokenizer)]
        self._ends = {"tool": self._end_before("tool")}
        self._prefix_for("tool")
        self._ends["user"] = self._end_before("user")
        stops = dict.fromkeys([*self._stops, *self._ends.values()])
        self.stop_ids: tuple[int, ...] = tuple(tokenizer.convert_tokens_to_ids(list(stops)))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> tuple[int, ...]:
        """Ids of the opening messages, up to where the assistant's turn begins. Shape [T]."""
        key = json.dumps([[message.to_chat() for message in messages], list(tools)], default=str)
        if key not in self._prompts:  # the episodes of a group share their prompt, and templates are slow
            if len(self._prompts) >= _CACHED_PROMPTS:
                self._prompts.clear()
            opening, shown = self.format.opening(messages, tools)
            text = self._template.render(opening, shown, generation=True)
            if shown and text == self._template.render(opening, (), generation=True):
                raise TemplateError(
                    "the chat template does not show the tools: the policy would not know them. Use a template that "
                    "renders `tools`, or policy.tool_format = 'tags'."
                )
            self._prompts[key] = self._encode(text)
        return self._prompts[key]

    def continuation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of ``messages`` alone, to append after a finished assistant turn. Shape [T].

        The sampled turn ends with a stop token, so the ids begin with whatever the template puts after it.

        Raises:
            TemplateError: the template rewrites earlier turns when these messages are added.
        """
        inline = self.format.continuation(messages)
        if inline is not None:
            return self._encode(inline)
        role = messages[0].role
        prefix = self._prefix_for(role)
        text = self._template.render([*self._before(role), *messages], (), generation=True)
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
        """The assistant message in ``text``; ``turn`` makes the call ids unique in the conversation.

        A thought that the prompt opened (``<think>`` is its last word) belongs to the message: its content begins
        with that mark.
        """
        thought = self._thoughts["tool" if turn else "user"]
        content, calls = parse_turn(self.format, thought + text, tools)
        numbered = tuple(
            ToolCall(f"call_{turn}_{i}", call.name, call.arguments, call.error) for i, call in enumerate(calls)
        )
        return Message("assistant", content, numbered)

    def assistant(self, message: Message) -> tuple[int, ...]:
        """Ids of an assistant message as the policy should write it, up to where sampling stops (demonstrations).

        Raises:
            TemplateError: the template opens a thought before some turns only, so that it cannot be told what the
                message has to begin with.
        """
        text = self.format.write(message, self._ends["tool" if message.tool_calls else "user"])
        thought = self._thoughts["user"]
        if thought != self._thoughts["tool"]:
            raise TemplateError(
                "the chat template opens thoughts only before some turns: demonstrations cannot be written with it. "
                "Turn thinking off with policy.template_options."
            )
        if text.startswith(thought):
            return self._encode(text[len(thought) :])
        return self._encode(text if closes(text) else nothing_thought(thought) + text)

    @cached_property
    def _thoughts(self) -> dict[str, str]:
        """The thought that the prompt opens after a message of each role; empty where it opens none."""
        after = {"user": [_USER], "tool": [_USER, _CALLING, _RESULT]}
        return {role: open_thought(self._template.generation_prompt(messages)) for role, messages in after.items()}

    @cached_property
    def _thinks(self) -> bool:
        """Whether the policy may think: the prompt does not end with a thought that is closed already."""
        return not closes(self._template.generation_prompt([_USER]))

    def _encode(self, text: str) -> tuple[int, ...]:
        clean = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text to a tokenizer
        return tuple(self.tokenizer(clean, add_special_tokens=False)["input_ids"])

    def _before(self, role: str) -> list[Message]:
        """A conversation after which a message of ``role`` comes naturally: a call, or an answer."""
        if role == "tool":
            return [_USER, _CALLING]
        if self._thinks:
            return [_USER, _CALLING, _RESULT, _ANSWERING]
        return [_USER, Message("assistant", "c", (_CALL,)), _RESULT, Message("assistant", "c")]

    def _end_before(self, role: str) -> str:
        """The token that ends the assistant's turn before a message of ``role``: a turn with a call, or an answer."""
        history = self._before(role)
        before = self._template.render(history, (), generation=False)
        written = self.format.write(history[-1], "")
        special: list[str] = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        # A call may end with a special token of its own, which ends no turn.
        ends = [mark for mark in (*self._stops, *special) if before.rstrip().endswith(mark)]
        ends = [mark for mark in ends if not written.endswith(mark)]
        if not ends:  # GLM's turns end with the mark of who speaks next, which the policy writes
            after = self._template.render([*history, _new(role)], (), generation=True)
            until = after.rpartition(_new(role).content)[0]
            ends = [mark for mark in self._stops if until.count(mark) > before.count(mark)]
        if not ends:
            raise TemplateError(
                f"the chat template does not end an assistant turn with the eos token {self.tokenizer.eos_token!r} or "
                "another special token. Where the mark of the next speaker ends it (GLM), the model's "
                "generation_config.json has to name that mark as eos_token_id and to stand beside the tokenizer."
            )
        return max(ends, key=len)

    def _prefix_for(self, role: str) -> str:
        """The rendered text before a new message of ``role``, proven to be untouched by that message."""
        if role not in self._prefixes:
            end, history = self._ends["tool" if role == "tool" else "user"], self._before(role)
            with_tools, shown = self.format.opening(history, (_TOOL,))
            self._kept(end, with_tools, shown, role)  # Mistral's moves the tools to the last question
            kept = self._kept(end, history, (), role)
            if role != "tool" and self._thinks and _THOUGHT not in self._kept(end, [_USER, _ANSWERING], (), role):
                raise TemplateError(
                    f"the chat template rewrites earlier turns when a {role} message is added: it leaves out what was "
                    "thought in them. Turn thinking off with policy.template_options, or use a template that keeps it."
                )
            self._prefixes[role] = kept
        return self._prefixes[role]

    def _kept(self, end: str, history: Sequence[Message], tools: Sequence[dict[str, Any]], role: str) -> str:
        before = self._template.render(history, tools, generation=False)
        after = self._template.render([*history, _new(role)], tools, generation=True)
        written, ended, behind = before.rpartition(end)
        kept = written + end if ended and not behind.strip() else before + end
        _require_kept(kept, after, role)
        if _new(role).content not in after[len(kept) :]:
            raise TemplateError(f"the chat template does not show {role} messages: the policy would not see them.")
        return kept


def _new(role: str) -> Message:
    return _RESULT if role == "tool" else _MORE


def _require_kept(kept: str, after: str, role: str) -> None:
    if after.startswith(kept):
        return
    same = next(i for i, (a, b) in enumerate(zip(kept, after + "\0", strict=False)) if a != b)
    raise TemplateError(
        f"the chat template rewrites earlier turns when a {role} message is added: {kept[same : same + 40]!r} became "
        f"{after[same : same + 40]!r}. Sampled tokens would no longer be what the learner sees. Use a template that "
        "leaves earlier assistant turns (their <think> part too) as they are."
    )
