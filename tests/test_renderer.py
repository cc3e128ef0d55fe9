"""Token in, token out: what the sampler wrote is never encoded again, and templates that would need it are refused."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl._stand_in import stand_in_tokenizer
from agentrl.assemble import make_renderer
from agentrl.config import load_config
from agentrl.errors import TemplateError, UnknownName
from agentrl.renderer import Renderer
from agentrl.types import Message, ToolCall

USER = Message("user", "double 21")
CALL = Message("assistant", "", (ToolCall("call_0_0", "double", {"x": 21}),))
TALK = Message("assistant", "<think>\nhm\n</think>\n\nLet me see.", (ToolCall("call_0_0", "double", {"x": 21}),))
TWO = Message("assistant", "", (ToolCall("call_0_0", "double", {"x": 1}), ToolCall("call_0_1", "double", {"x": 2})))
RESULT = Message("tool", "42", tool_call_id="call_0_0")
ANSWER = Message("assistant", "42")


@pytest.fixture(scope="module")
def with_template(tokenizer):
    def make(*replacements):
        changed = copy.deepcopy(tokenizer)
        for old, new in replacements:
            assert old in changed.chat_template
            changed.chat_template = changed.chat_template.replace(old, new)
        return changed

    return make


# -- one conversation, rendered at once and piece by piece ------------------------------------------------------------


@pytest.mark.parametrize(
    "written",
    [
        [ANSWER],
        [CALL, RESULT, ANSWER],
        [TALK, RESULT, CALL, RESULT, ANSWER],
        [TWO, RESULT, RESULT, ANSWER],
        [CALL, RESULT, ANSWER, Message("user", "and 22?"), CALL, RESULT, ANSWER],
    ],
)
@pytest.mark.parametrize("which", ["tiny", "stand-in"])
def test_pieces_are_the_whole(tokenizer, tools, written, which):
    tokenizer = tokenizer if which == "tiny" else stand_in_tokenizer()
    renderer = Renderer(tokenizer)
    opening = [Message("system", "Be brief."), USER]
    ids = list(renderer.prompt(opening, tools))
    for at, message in enumerate(written):
        if message.role == "assistant":
            ids += renderer.assistant(message)
        elif written[at - 1].role == "assistant":
            together = [m for m in written[at : at + 2] if m.role == message.role]
            ids += renderer.continuation(together)
    chat = [message.to_chat() for message in (*opening, *written)]
    whole = tokenizer.apply_chat_template(chat, tools=list(tools), tokenize=False)
    if which == "tiny":  # the stand-in writes its calls a little differently from the policy
        assert tokenizer.decode(ids).strip() == whole.strip()
        if TALK not in written:  # whose first word may merge with the line before it, once there is no border
            assert ids == tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids).count("42") == whole.count("42")


@given(st.lists(st.integers(0, 447), max_size=30))
def test_sampled_ids_are_read_but_never_changed(renderer, tools, sampled):
    """Whatever ids were sampled, the next prompt is theirs and the continuation's, nothing else."""
    message = renderer.parse(sampled, tools)
    assert message.role == "assistant"
    before = renderer.continuation([RESULT])
    assert renderer.continuation([RESULT]) == before
    text = renderer.tokenizer.decode(before)
    assert text == "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_is_rendered_once(tokenizer, tools):
    counted = copy.deepcopy(tokenizer)
    calls = []
    render = counted.apply_chat_template
    counted.apply_chat_template = lambda *a, **k: calls.append(a) or render(*a, **k)
    renderer = Renderer(counted)
    first = renderer.prompt([USER], tools)
    made = len(calls)
    assert renderer.prompt([Message("user", "double 21")], [dict(t) for t in tools]) is first
    assert len(calls) == made
    assert renderer.prompt([USER]) != first


def test_reading_a_turn(renderer, tokenizer, tools):
    text = '<tool_call>\n{"name": "double", "arguments": {"x": 4}}\n</tool_call>'
    ids = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    message = renderer.parse(ids, tools, turn=3)
    assert message == Message("assistant", "", (ToolCall("call_3_0", "double", {"x": 4}),))
    assert renderer.parse(ids[:-1], tools, turn=3) == message, "the stop token may be missing"
    assert renderer.parse([], tools) == Message("assistant", "")


def test_demonstrations_are_read_back_as_they_were_written(renderer, tools):
    for message in (CALL, TWO, ANSWER):
        assert renderer.parse(renderer.assistant(message), tools) == message


@given(st.text(max_size=40))
def test_any_result_can_be_shown(renderer, text):
    """Also half a surrogate pair, which a tool may read from a file, and the template's own marks."""
    assert renderer.continuation([Message("tool", text, tool_call_id="c")])
    assert renderer.continuation([Message("tool", text + "\ud800", tool_call_id="c")])


def test_texts_of_many_lengths_come_back(renderer, tools):
    rng = random.Random(0)
    for _ in range(30):
        text = " ".join(rng.choice(["sum", "7", "é", "Ωμ", "{", "日本"]) for _ in range(rng.randrange(1, 20)))
        assert renderer.parse(renderer.assistant(Message("assistant", text)), tools).content == text


# -- the tags format --------------------------------------------------------------------------------------------------


def test_tags_go_on_in_the_same_turn(tokenizer, tools):
    renderer = Renderer(tokenizer, "tags")
    assert renderer.stop_strings(tools) == ("</double>",)
    prompt = tokenizer.decode(renderer.prompt([USER], tools))
    assert prompt.startswith("<|im_start|>system\n")
    assert "<double>x</double>: Double a number." in prompt
    written = tokenizer.decode(renderer.assistant(CALL))
    assert written == "<double>21</double>", "sampling stops here, so no end of the turn may be learnt"
    assert tokenizer.decode(renderer.continuation([RESULT])) == " <result>\n42\n</result>\n"
    assert tokenizer.decode(renderer.assistant(ANSWER)) == "42" + tokenizer.eos_token
    assert renderer.parse_text("hm <double>21</double>\n", tools) == Message(
        "assistant", "hm", (ToolCall("call_0_0", "double", {"x": "21"}),)
    )


def test_a_system_prompt_keeps_its_place_before_the_tags(tokenizer, tools):
    renderer = Renderer(tokenizer, "tags")
    prompt = tokenizer.decode(renderer.prompt([Message("system", "Be brief."), USER], tools))
    assert prompt.index("Be brief.") < prompt.index("<double>") < prompt.index("double 21")
    assert prompt.count("<|im_start|>system") == 1


# -- templates that cannot be used ------------------------------------------------------------------------------------

ASSISTANT = "<|im_start|>assistant\n{{ message.content }}"
STRIPS_THINK = "<|im_start|>assistant\n{{ message.content if loop.last else message.content.split('</think>')[-1] }}"
CALLS = "{% for call in message.tool_calls %}"
DROPS_CALLS = "{% for call in (message.tool_calls if loop.last else []) %}"


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        ((ASSISTANT, STRIPS_THINK), "rewrites earlier turns when a tool message is added: '<think>.* became"),
        ((CALLS, DROPS_CALLS), "rewrites earlier turns when a tool message is added: .*tool_call"),
        (("</tool_call>{% endfor %}<|im_end|>", "</tool_call>{% endfor %}"), "does not end an assistant turn"),
        (
            (
                "</tool_call>{% endfor %}<|im_end|>",
                "</tool_call>{% endfor %}{{ '' if message.tool_calls else eos_token }}",
            ),
            "does not end an assistant turn",
        ),
        (("{{ message.content }}\n</tool_response>", "</tool_response>"), "does not show tool messages"),
        (
            ("{%- if message.role == 'tool' -%}", "{%- if message.role == 'tool' -%}{{ raise_exception('no tools') }}"),
            "refuses a conversation of user, assistant, tool: no tools",
        ),
    ],
)
def test_templates_that_break_the_law_are_refused_with_the_reason(with_template, replacement, message):
    with pytest.raises(TemplateError, match=message):
        Renderer(with_template(replacement))


def test_a_template_that_only_rewrites_before_questions_works_until_one_comes(with_template, tools):
    """Qwen3's does: thoughts stay while tools answer, and go when the user speaks again."""
    strips = STRIPS_THINK.replace("loop.last", "messages[-1].role != 'user'")
    renderer = Renderer(with_template((ASSISTANT, strips)))
    assert renderer.continuation([RESULT])
    for messages in ([Message("user", "and 22?")], [RESULT, Message("user", "and 22?")]):
        with pytest.raises(TemplateError, match=r"rewrites earlier turns when a .*user message is added"):
            renderer.continuation(messages)


def test_a_template_that_hides_the_tools_is_refused(with_template, tools):
    hiding = with_template(("{%- if tools -%}", "{%- if false -%}"), ("{%- if tools or ", "{%- if "))
    renderer = Renderer(hiding)
    assert renderer.prompt([USER])
    with pytest.raises(TemplateError, match="does not show the tools"):
        renderer.prompt([USER], tools)
    assert Renderer(hiding, "tags").prompt([USER], tools), "tags describe the tools themselves"


def test_what_a_tokenizer_must_have(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        Renderer(bare)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(TemplateError, match="no eos token"):
        Renderer(endless)
    with pytest.raises(UnknownName, match="did you mean 'hermes'"):
        Renderer(tokenizer, "herms")


def test_a_run_has_the_renderer_of_its_configuration(with_template):
    short = with_template(("{%- if tools or ", "{%- if brief is defined -%}Brief. {% endif -%}{%- if tools or "))
    renderer = make_renderer(load_config(None, {"policy.tool_format": "glm47"}), short)
    assert type(renderer.format).__name__ == "Glm"
    assert not short.decode(renderer.prompt([USER])).startswith("Brief.")
    renderer = make_renderer(load_config(None, {"policy.template_options": {"brief": True}}), short)
    assert short.decode(renderer.prompt([USER])).startswith("Brief. <|im_start|>")
    with pytest.raises(TemplateError, match=r"policy\.template_options has 'long', .* expected brief"):
        make_renderer(load_config(None, {"policy.template_options": {"long": True}}), short)
    with pytest.raises(UnknownName, match="did you mean 'hermes'"):
        make_renderer(load_config(None, {"policy.tool_format": "herms"}), short)
