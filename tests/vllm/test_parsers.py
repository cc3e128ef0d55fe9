"""Our reading of tool calls beside that of vLLM's parser of the same name: the policy is served with the latter.

Well-formed calls are read alike. Where we differ, we do so on purpose and the texts are listed with both readings: a
call that is broken is a call with an error for us, so that the policy hears of it; vLLM passes it on as text, or takes
what it can make out.
"""

# ruff: noqa: RUF001 -- the bars of DeepSeek's marks are full-width

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
from chat_templates import FAMILIES, make_tokenizer

from agentrl.tool_format import FORMATS, get_format
from agentrl.types import Message, ToolCall

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch deprecates what vLLM imports
    pytest.importorskip("vllm")
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

pytestmark = pytest.mark.vllm

KINDS = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "ratio": {"type": "number"},
    "flag": {"type": "boolean"},
    "items": {"type": "array"},
    "more": {"type": "object"},
    "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    "either": {"type": ["string", "integer"]},
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "", "parameters": {"type": "object", "properties": KINDS}},
    }
    for name in ("look_up", "now")
]
# Every mark that one of the parsers looks for in the vocabulary.
MARKS = (
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[TOOL_CALLS]", "<|tool_call|>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁sep｜>",
    ),
)
VLLM_NAMES = sorted(set(FORMATS) - {"tags"})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """vLLM's reading of a text: content, names and arguments. Its Mistral parser asks whether [ARGS] is a token."""
    family = replace(FAMILIES["hermes"], special=(*FAMILIES["hermes"].special, *MARKS), plain=())
    named = replace(family, special=(*family.special, "[ARGS]"))
    tokenizers = [make_tokenizer(each, tmp_path_factory.mktemp("tokenizer")) for each in (family, named)]

    def read(name, text):
        request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "q"}], tools=TOOLS)
        tokenizer = tokenizers["[ARGS]" in text]
        found = ToolParserManager.get_tool_parser(name)(tokenizer, request.tools).extract_tool_calls(text, request)
        calls = [(call.function.name, json.loads(call.function.arguments)) for call in found.tool_calls]
        return (found.content or "").strip(), calls

    return read


def ours(name, text):
    content, calls = get_format(name).parse(text, TOOLS)
    return content, [(call.name, "error" if call.error else dict(call.arguments)) for call in calls]


ARGUMENTS = [
    {},
    {"text": "one line"},
    {"text": "two\nlines\n\tand a tab"},
    {"text": "quotes \" and ' and \\ and \\n"},
    {"text": "日本語, é, 😀, \u2028"},
    {"text": '{"name": "not a call"} [x] <b> & ;'},
    {"text": "5", "count": 5, "ratio": 0.5, "flag": True},
    {"text": "null", "flag": False, "maybe": None, "count": -3},
    {"maybe": 7, "ratio": 3, "text": "true"},
    {"items": [1, "2", None, [True, {"a": "}"}]], "more": {"k": {"k": ["]", 1.5]}, "": ""}},
    {"text": ""},
    {"text": "  spaces around  "},
    {"either": "five"},
    {"either": 5},
]


@pytest.mark.parametrize("name", VLLM_NAMES)
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_vllm_reads_what_we_write(theirs, name, arguments):
    one, other = ToolCall("", "look_up", arguments), ToolCall("", "now", {"count": 1})
    for template in ("", "[ARGS]") if name == "mistral" else ("", "<tool_call>") if name == "granite" else ("",):
        for calls in ((one,), (other, one, one)):
            text = get_format(name, template).write(Message("assistant", "", calls), "")
            expected = [(call.name, dict(call.arguments)) for call in calls]
            assert ours(name, text) == ("", expected)
            assert theirs(name, text)[1] == expected


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_content_before_calls_is_the_same(theirs, name):
    text = get_format(name).write(Message("assistant", "I look.", (ToolCall("", "now", {"count": 1}),)), "")
    assert ours(name, text) == ("I look.", [("now", {"count": 1})])
    content, calls = theirs(name, text)
    if name in ("llama3_json", "llama4_json"):
        assert (content, calls) == ("", [("now", {"count": 1})]), "it drops what stands around calls"
    elif name == "pythonic":
        assert (content, calls) == (text, []), "it takes a list only where nothing stands before it"
    else:
        assert (content, calls) == ours(name, text)


SECTION = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>".format
V31 = "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>".format
JSON_CALL = '<tool_call>{"name":"now","arguments":{}}</tool_call>'
BY_HAND = [
    ("hermes", 'a <tool_call>{"name": "now", "arguments": {"count": 1}}</tool_call>'),
    ("hermes", '<tool_call>\n\n {"arguments": {}, "name": "now"} </tool_call>\n' + JSON_CALL),
    ("hermes", "no call <b>at all</b>"),
    ("qwen3_coder", "<tool_call><function=now><parameter=count>1</parameter></function></tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=flag>True</parameter>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=text>\n\n a\n\n</parameter>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=count>five</parameter>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=unheard>5</parameter>\n</function>\n</tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=unheard>\n<parameter=count>5</parameter>\n</function>\n</tool_call>"),
    ("glm45", "<tool_call>now<arg_key>count</arg_key><arg_value>1</arg_value></tool_call>"),
    ("glm45", "<tool_call>now</tool_call><tool_call>now\n</tool_call>"),
    ("glm45", "<tool_call>now\n<arg_key>text</arg_key>\n<arg_value>a\n<b>\n</arg_value>\n</tool_call>"),
    ("llama3_json", '{"name": "now", "arguments": {"count": 1}}'),
    ("llama3_json", '<|python_tag|>{"type": "function", "name": "now", "parameters": {"count": 1}}'),
    ("llama3_json", '{"name": "now", "parameters": {}};{"name": "now", "parameters": {}}'),
    ("llama3_json", 'The answer is {"x": 1}.'),
    ("llama3_json", '{"name": "Ada", "born": 1815}'),
    ("mistral", '[TOOL_CALLS] [{"name": "now", "arguments": {"count": 1}, "id": "abcdefghi"}]'),
    ("mistral", '[TOOL_CALLS]{"name": "now", "arguments": {}}'),
    ("mistral", '[TOOL_CALLS]now[ARGS]{"count": 1}[TOOL_CALLS]now[ARGS]{}'),
    ("deepseek_v31", SECTION(V31('{"count": 1}') + V31("{}"))),
    ("granite", 'a <tool_call> [{"name": "now", "arguments": {"count": 1}}]'),
    ("granite", '<|tool_call|>[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]'),
    ("pythonic", "[now(count=1, text='a', items=[1, (2, 3)], flag=true, maybe=null), now()]"),
    ("pythonic", "[now(count=-1, ratio=-0.5)]"),
    ("pythonic", "[1, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), BY_HAND)
def test_texts_by_hand_are_read_alike(theirs, name, text):
    assert ours(name, text) == theirs(name, text)


NOW = [("now", {})]
DIFFERENT = [
    # name, text, our calls, vLLM's calls
    ("hermes", '<tool_call>{"name": "now", "arguments": {}', [("", "error")], []),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}', [("", "error")], NOW),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', NOW, []),  # no arguments are none
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', [("now", "error")], [("now", [1])]),
    ("hermes", "<tool_call>{</tool_call>" + JSON_CALL, [("", "error"), *NOW], []),
    ("qwen3_coder", "<tool_call><function=now></function>", [("", "error")], NOW),
    ("qwen3_coder", "<function=now></function>", [("", "error")], NOW),
    ("qwen3_coder", "<tool_call><function=now>so</function></tool_call>", [("now", "error")], NOW),
    ("glm45", "<tool_call>now", [("", "error")], NOW),
    ("glm45", "<tool_call>now twice</tool_call>", [("now", "error")], []),  # GLM's parser drops tools it does not know
    ("glm45", "<tool_call>unheard</tool_call>", [("unheard", {})], []),  # we tell the policy which tools there are
    ("llama3_json", '{"name": "now", "parameters": {', [("", "error")], []),
    ("llama3_json", "<|python_tag|>print(1)", [("", "error")], []),
    ("mistral", "[TOOL_CALLS] [{", [("", "error")], []),
    ("deepseek_v31", SECTION(V31("{}")).removesuffix("<｜tool▁calls▁end｜>"), [*NOW, ("", "error")], NOW),
    ("pythonic", "[now(1)]", [], []),
    ("pythonic", "[now(count=f())]", [("now", "error")], []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "our_calls", "their_calls"), DIFFERENT)
def test_where_we_differ_on_purpose(theirs, name, text, our_calls, their_calls):
    assert ours(name, text)[1] == our_calls
    assert theirs(name, text)[1] == their_calls


def test_every_name_is_one_of_vllm():
    for name in VLLM_NAMES:
        assert ToolParserManager.get_tool_parser(name)
