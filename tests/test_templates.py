"""Template families, token by token: what is put together piece by piece is what the template makes of the whole.

Where a family's template writes history differently from what its policy sampled, the difference is stated as an edit
of the whole text (``Case.edit``) and asserted exactly.
"""

# ruff: noqa: RUF001 -- the bars of DeepSeek's marks are full-width

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from chat_templates import FAMILIES, make_tokenizer

from agentrl.errors import TemplateError
from agentrl.renderer import Renderer
from agentrl.types import Message, ToolCall

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "double",
            "description": "Double a number.",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "note": {"type": "string"}, "tags": {"type": "array"}},
                "required": ["x"],
            },
        },
    }
]
QUESTION = Message("user", "double 21 twice")
FOLLOW_UP = Message("user", "and 22?")


def call(number, name, **arguments):
    return ToolCall(f"call_{number}_0", name, arguments)


def result(number, content, which=0):
    return Message("tool", content, tool_call_id=f"call_{number}_{which}")


def same(whole: str) -> str:
    return whole


@dataclass(frozen=True)
class Case:
    """A family with its options, and what is special about it.

    Attributes:
        options: of the template.
        thought: put before every content; ``{}`` is the thought.
        lead: what a policy of the family writes before an answer, and before anything at all (``lead_all``).
        ends: the token after a call, and after an answer.
        several: calls that the second turn makes.
        said: content beside calls.
        edit: the whole conversation, as the template writes it, to what was sampled and read.
        follow_up: None where a user message may come later, else why it is refused.
    """

    family: str
    ends: tuple[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    thought: str = ""
    lead: str = ""
    lead_all: str = ""
    several: int = 2
    said: str = "First."
    edit: Callable[[str], str] = same
    follow_up: str | None = None

    def message(self, content, calls=()):
        return Message("assistant", self.thought + content, tuple(calls))

    @property
    def turns(self):
        """Three turns: one call, several calls, the answer; each with what is read after it."""
        two = [ToolCall(f"call_1_{i}", "double", {"x": 42 + i}) for i in range(self.several)]
        tricky = call(0, "double", x=21, note='say "é"\nor {no}', tags=["a", 1, None, {"b": True}])
        return [
            (self.message(self.said, [tricky]), [result(0, "42")]),
            (self.message("", two), [result(1, str(84 + i), i) for i in range(self.several)]),
            (self.message("It is 84."), []),
        ]


def cut(text: str) -> str:
    return text.rstrip("\n")  # after the last turn's end


def empty_thoughts(text: str) -> str:
    return re.sub(r"(<\|im_start\|>assistant\n)(?!<think>)", r"\1<think>\n\n</think>\n\n", cut(text))


def without_ids(text: str) -> str:
    return re.sub(r', "id": "\w{9}"', "", text)


def next_speaker(text: str) -> str:
    return text + "<|user|>"


END, EOT, EOM, STOP, BAR = "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>", "<｜end▁of▁sentence｜>"
SPEAKERS = ("<|observation|>", "<|user|>")
REWRITES = "rewrites earlier turns when a user message is added"
CASES = {
    "hermes": Case("hermes", (END, END), edit=cut),
    "qwen3": Case("qwen3", (END, END), thought="<think>\nhm\n</think>\n\n", edit=cut, follow_up=REWRITES),
    # The prompt closes a thought at once before every turn; in history the template shows that of the last turn only.
    "qwen3 off": Case("qwen3", (END, END), {"enable_thinking": False}, edit=empty_thoughts, follow_up=REWRITES),
    "qwen3 opened": Case("qwen3_opened", (END, END), thought="<think>\nhm\n</think>\n\n", edit=cut, follow_up=REWRITES),
    "qwen3_coder": Case("qwen3_coder", (END, END), edit=cut),
    "llama3": Case("llama3", (EOT, EOT), several=1, said=""),
    "llama3 eom": Case("llama3", (EOM, EOT), {"builtin_tools": ["search"]}, several=1, said=""),
    # The template writes an id into every call of history; the policy has none to write.
    "mistral": Case("mistral", (STOP, STOP), lead=" ", said="", edit=without_ids, follow_up=REWRITES),
    "mistral named": Case("mistral_named", (STOP, STOP)),
    # The policy writes who speaks next, and so its turn ends.
    "glm45": Case(
        "glm45", SPEAKERS, thought="<think>hm</think>\n", lead_all="\n", edit=next_speaker, follow_up=REWRITES
    ),
    "glm45 off": Case("glm45", SPEAKERS, {"enable_thinking": False}, lead_all="\n", edit=next_speaker),
    "deepseek off": Case("deepseek", (BAR, BAR)),
    # In history the template never says that the thought was opened by the prompt.
    "deepseek": Case(
        "deepseek",
        (BAR, BAR),
        {"thinking": True},
        thought="<think>hm</think>",
        edit=lambda text: text.replace("</think><think>", "<think>"),
        follow_up=REWRITES,
    ),
}


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    made = {}

    def get(family):
        if family not in made:
            made[family] = make_tokenizer(FAMILIES[family], tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def tokenizer(case, tokenizers):
    return tokenizers(case.family)


@pytest.fixture
def renderer(case, tokenizer):
    return Renderer(tokenizer, FAMILIES[case.family].tool_format, case.options)


def sampled_text(case, renderer, message, prompt):
    """What a policy of the family writes after ``prompt``: the template's own form, without what the prompt opened."""
    end = case.ends[0] if message.tool_calls else case.ends[1]
    text = renderer.format.write(message, end)
    for opened in ("<think>\n", "<think>"):
        if case.thought and prompt.endswith(opened):
            return text.removeprefix(opened)
    return case.lead_all + ("" if message.tool_calls else case.lead) + text


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def in_chat(renderer, message):
    """The message as the template takes it: with ids and arguments of its family's kind."""
    return renderer._template._chat(message)


# -- the whole and its pieces -----------------------------------------------------------------------------------------


def test_pieces_are_the_whole(case, tokenizer, renderer):
    ids = list(renderer.prompt([QUESTION], TOOLS))
    for said, heard in case.turns:
        ids += encode(tokenizer, sampled_text(case, renderer, said, tokenizer.decode(ids)))
        ids += renderer.continuation(heard) if heard else ()
    messages = [QUESTION, *(m for said, heard in case.turns for m in (said, *heard))]
    chat = [in_chat(renderer, message) for message in messages]
    whole = tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False, **case.options)
    assert case.edit is same or case.edit(whole) != whole
    assert tokenizer.decode(ids) == case.edit(whole)
    assert ids == encode(tokenizer, case.edit(whole))


def test_what_was_sampled_is_read_back(case, tokenizer, renderer):
    ids = list(renderer.prompt([QUESTION], TOOLS))
    for turn, (said, heard) in enumerate(case.turns):
        sampled = encode(tokenizer, sampled_text(case, renderer, said, tokenizer.decode(ids)))
        read = renderer.parse(sampled, TOOLS, turn)
        assert (read.content, read.tool_calls) == (said.content.strip(), said.tool_calls)
        assert sampled[-1] in renderer.stop_ids
        assert renderer.parse(sampled[:-1], TOOLS, turn) == read, "the stop token may be missing"
        ids += [*sampled, *(renderer.continuation(heard) if heard else ())]


def test_sampled_tokens_are_never_encoded_again(case, tokenizer, renderer, monkeypatch):
    """A policy may write a text in other tokens than the tokenizer would; they stay, and the rest does not change."""
    encoded = []
    real = renderer._encode
    ids = list(renderer.prompt([QUESTION], TOOLS))
    monkeypatch.setattr(renderer, "_encode", lambda text: encoded.append(text) or real(text))
    said, heard = case.turns[0]
    text = sampled_text(case, renderer, said, tokenizer.decode(ids))
    marks = re.escape(case.ends[0]) + "".join(f"|{re.escape(m)}" for m in tokenizer.get_added_vocab())
    odd = [i for part in re.split(f"({marks})", text) for i in in_letters(tokenizer, part)]
    assert odd != encode(tokenizer, text)
    assert tokenizer.decode(odd) == text
    assert renderer.parse(odd, TOOLS).tool_calls == said.tool_calls
    assert not encoded
    after = renderer.continuation(heard)
    (new,) = encoded
    assert "21" not in new, "only what came back"
    assert after == tuple(encode(tokenizer, new))


def in_letters(tokenizer, part):
    if part in tokenizer.get_added_vocab():
        return [tokenizer.get_added_vocab()[part]]
    return [i for letter in part for i in encode(tokenizer, letter)]


def test_the_policy_stops_at_the_ends_of_its_family(case, tokenizer, renderer):
    named = FAMILIES[case.family].stops
    wanted = {tokenizer.eos_token, *case.ends, *named}
    assert set(tokenizer.convert_ids_to_tokens(list(renderer.stop_ids))) == wanted
    assert renderer.stop_ids[0] == tokenizer.eos_token_id


def test_user_messages_are_taken_or_refused(case, tokenizer, renderer):
    if case.follow_up:
        with pytest.raises(TemplateError, match=case.follow_up):
            renderer.continuation([FOLLOW_UP])
        if case.family != "deepseek":  # which leaves out the thoughts of answers, not those before calls
            with pytest.raises(TemplateError, match=r"rewrites earlier turns|turns must alternate"):
                renderer.continuation([result(0, "42"), FOLLOW_UP])
        return
    turns = [(case.message("It is 42."), [FOLLOW_UP]), (case.message("It is 44."), [])]
    ids = list(renderer.prompt([QUESTION], TOOLS))
    for said, heard in turns:
        ids += encode(tokenizer, sampled_text(case, renderer, said, tokenizer.decode(ids)))
        ids += renderer.continuation(heard) if heard else ()
    chat = [in_chat(renderer, message) for message in (QUESTION, turns[0][0], FOLLOW_UP, turns[1][0])]
    whole = case.edit(tokenizer.apply_chat_template(chat, tools=TOOLS, tokenize=False, **case.options))
    if case.family == "mistral_named":  # the template of this test shows the tools once, at the beginning
        assert whole.count("[AVAILABLE_TOOLS]") == 1
    assert ids == encode(tokenizer, whole)


def test_demonstrations_are_what_the_policy_would_write(case, tokenizer, renderer):
    if case.options.get("thinking"):
        with pytest.raises(TemplateError, match="opens thoughts only before some turns"):
            renderer.assistant(case.turns[0][0])
        return
    prompt = tokenizer.decode(renderer.prompt([QUESTION], TOOLS))
    for said, _ in case.turns:
        text = sampled_text(case, renderer, said, prompt)
        assert tokenizer.decode(renderer.assistant(said)).lstrip() == text.lstrip()
        read = renderer.parse(encode(tokenizer, text), TOOLS)
        assert tokenizer.decode(renderer.assistant(read)).lstrip() == text.lstrip(), "and what it reads, it can write"


# -- ends of turns ----------------------------------------------------------------------------------------------------


def test_the_ends_of_a_turn_are_found_in_the_template_where_no_file_names_them(tmp_path):
    """Llama 3 ends a call with <|eom_id|> where it has built-in tools: only then is it a stop."""
    bare = make_tokenizer(FAMILIES["llama3"], tmp_path, generation_config=False)
    names = bare.convert_ids_to_tokens
    assert names(list(Renderer(bare, "llama3_json").stop_ids)) == [EOT]
    assert names(list(Renderer(bare, "llama3_json", {"builtin_tools": []}).stop_ids)) == [EOT, EOM]


def test_a_template_without_ends_needs_the_generation_config(tmp_path):
    with pytest.raises(TemplateError, match=r"does not end an assistant turn .*generation_config\.json has to name"):
        Renderer(make_tokenizer(FAMILIES["glm45"], tmp_path, generation_config=False), "glm45")


def test_one_eos_token_id_in_the_generation_config_will_do(tmp_path):
    tokenizer = make_tokenizer(FAMILIES["hermes"], tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    assert Renderer(tokenizer).stop_ids == (tokenizer.eos_token_id,)
    for text in ("{}", '{"eos_token_id": null}', '{"eos_token_id": [999999]}'):
        (tmp_path / "generation_config.json").write_text(text)
        assert Renderer(tokenizer).stop_ids == (tokenizer.eos_token_id,)
    (tmp_path / "generation_config.json").write_text("eos")
    with pytest.raises(TemplateError, match=r"generation_config\.json is not JSON"):
        Renderer(tokenizer)


# -- thoughts ---------------------------------------------------------------------------------------------------------

CALL = '<tool_call>\n{"name": "double", "arguments": {"x": 4}}\n</tool_call>'
READ = ToolCall("call_0_0", "double", {"x": 4})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<think>\nmaybe {CALL}\n</think>\n\nNo.", f"<think>\nmaybe {CALL}\n</think>\n\nNo.", 0),
        (f"<think>\nmaybe {CALL}", f"<think>\nmaybe {CALL}", 0),
        (f"<think>\nhm\n</think>\n\n{CALL}", "<think>\nhm\n</think>", 1),
        (f"<think>{CALL}</think>\n\nSo: {CALL}", f"<think>{CALL}</think>\n\nSo:", 1),
        (f"Well. <think>{CALL}</think> So: {CALL}", f"Well. <think>{CALL}</think> So:", 1),
        (f"{CALL} <think>{CALL}</think>", f"<think>{CALL}</think>", 1),
        (f"{CALL} [THINK]{CALL}[/THINK]", f"[THINK]{CALL}[/THINK]", 1),
        (f"{CALL} <think>{CALL}", f"<think>{CALL}", 1),
        (CALL, "", 1),
    ],
)
def test_calls_are_not_looked_for_in_thoughts(tokenizers, text, content, calls):
    message = Renderer(tokenizers("qwen3")).parse_text(text, TOOLS)
    assert (message.content, message.tool_calls) == (content, (READ,) * calls)


def test_marks_of_thoughts_inside_arguments_are_text(tokenizers):
    renderer = Renderer(tokenizers("qwen3"))
    arguments = {"x": 1, "note": "<think> is a mark, </think> too; [THINK]"}
    message = Message("assistant", "", (ToolCall("call_0_0", "double", arguments),) * 1)
    assert renderer.parse_text(renderer.format.write(message, ""), TOOLS) == message


def test_many_thoughts_are_read_in_a_loop(tokenizers):
    text = "<think></think>" * 2000
    assert Renderer(tokenizers("qwen3")).parse_text(text).content == text


def test_tags_end_with_their_first_call_whatever_is_thought_later(tokenizers):
    renderer = Renderer(tokenizers("qwen3"), "tags")
    message = renderer.parse_text("<think><double>1</double></think><double>2</double><think>", TOOLS)
    assert message.content == "<think><double>1</double></think>"
    assert [dict(c.arguments) for c in message.tool_calls] == [{"x": "2"}]


def test_a_thought_that_the_prompt_opened_belongs_to_the_message(tokenizers):
    renderer = Renderer(tokenizers("qwen3_opened"))
    for turn in (0, 1):
        assert renderer.parse_text(f"maybe {CALL}", TOOLS, turn).tool_calls == (), "it is not closed"
        message = renderer.parse_text(f"hm\n</think>\n\n{CALL}", TOOLS, turn)
        assert message.content == "<think>\nhm\n</think>"
        assert [c.name for c in message.tool_calls] == ["double"]
    written = renderer.tokenizer.decode(renderer.assistant(Message("assistant", "42")))
    assert written == "\n</think>\n\n42<|im_end|>", "without it the answer would stand in the thought"


def test_deepseek_opens_a_thought_after_a_question_only(tokenizers):
    renderer = Renderer(tokenizers("deepseek"), "deepseek_v31", {"thinking": True})
    text = renderer.format.write(Message("assistant", "", (READ,)), "")
    assert renderer.parse_text(text, TOOLS, 0).tool_calls == ()
    assert len(renderer.parse_text(text, TOOLS, 1).tool_calls) == 1


# -- options ----------------------------------------------------------------------------------------------------------


def test_options_reach_prompt_and_continuation(tokenizers):
    tokenizer = tokenizers("qwen3")
    for options, ending in (({"enable_thinking": False}, "<think>\n\n</think>\n\n"), ({}, "assistant\n")):
        renderer = Renderer(tokenizer, "hermes", options)
        assert tokenizer.decode(renderer.prompt([QUESTION])).endswith(ending)
        assert tokenizer.decode(renderer.continuation([result(0, "42")])).endswith(ending)


@pytest.mark.parametrize(
    ("family", "option", "expected"),
    [
        (
            "qwen3",
            "enable_thinkin",
            "'enable_thinkin', which the chat template does not read: expected enable_thinking",
        ),
        ("qwen3", "thinking", "expected enable_thinking"),
        ("deepseek", "enable_thinking", "expected thinking"),
        ("hermes", "enable_thinking", "expected none, as this template has no options"),
        ("qwen3", "tools", "'tools', which"),
        ("qwen3", "add_generation_prompt", "'add_generation_prompt', which"),
        ("qwen3", "tokenize", "'tokenize', which"),
        ("qwen3", "ns", "'ns', which"),
    ],
)
def test_options_that_the_template_does_not_read_are_refused(tokenizers, family, option, expected):
    with pytest.raises(TemplateError, match=expected):
        Renderer(tokenizers(family), FAMILIES[family].tool_format, {option: True})
