"""Tool calls as text: whatever a policy writes becomes a call, an error that the policy can read, or plain text."""

# ruff: noqa: RUF001 -- the bars of DeepSeek's marks are full-width

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import ToolSchemaError, UnknownName, UserError
from agentrl.tool_format import FORMATS, MAX_DEPTH, get_format
from agentrl.types import Message, ToolCall

HERMES, TAGS = get_format("hermes"), get_format("tags")


def schema(name, parameter="query", **more):
    properties = {parameter: {"type": "string", "description": "what"}, **more}
    parameters = {"type": "object", "properties": properties, "required": [parameter]}
    return {"type": "function", "function": {"name": name, "description": f"{name} it.", "parameters": parameters}}


SEARCH, PYTHON = schema("search"), schema("python", "code")
TOOLS = (SEARCH, PYTHON)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
# Texts that are nearly calls: the marks of both formats, JSON, and noise between them.
MARKS = ["<tool_call>", "</tool_call>", "<search>", "</search>", "<python>", "</python>", "{", "}", ":", ",", "x"]
HARD = ['{"name": "f"', '"arguments": ', "[" * 200, "]" * 200, "1e999", "NaN", "9" * 5000, '"\\ud800"', "\x00", "\n"]
PIECES = st.lists(st.sampled_from(MARKS + HARD) | st.text(max_size=8), max_size=14).map("".join)


def block(body):
    return f"<tool_call>{body}</tool_call>"


# -- hermes -----------------------------------------------------------------------------------------------------------


def test_hermes_reads_every_call_of_a_turn():
    first, second = json.dumps({"name": "f", "arguments": {"x": 1}}), json.dumps({"name": "g"})
    text = f"First {block(first)} then\n{block('  ' + second)}"
    content, calls = HERMES.parse(text, ())
    assert content == "First  then"
    assert calls == [ToolCall("", "f", {"x": 1}), ToolCall("", "g", {})]
    assert HERMES.parse("just text", ()) == ("just text", [])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"name": "f", "arguments": {"x": 1}', "not valid JSON"),
        ("", "not valid JSON: Expecting value"),
        ("not json", "not valid JSON"),
        ('{"arguments": {}}', "has no name"),
        ('{"name": 3, "arguments": {}}', "has no name"),
        ('["f", {}]', "has no name"),
        ("null", "has no name"),
        ('{"name": "f", "arguments": [1]}', "arguments are a JSON list, not an object"),
        ('{"name": "f", "arguments": "x"}', "arguments are a JSON str, not an object"),
        ('{"name": "f", "arguments": null}', "arguments are a JSON NoneType, not an object"),
        ('{"name": "f", "arguments": {"x": NaN}}', "not valid JSON"),
        ('{"name": "f", "arguments": {"x": -Infinity}}', "not valid JSON"),
        ('{"name": "f", "arguments": {"x": 1e999}}', "not valid JSON"),
        ('{"name": "f", "arguments": {"x": ' + "1" * 5000 + "}}", "not valid JSON"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "not valid JSON"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 70 + "]" * 70 + "}}", f"more than {MAX_DEPTH} levels deep"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 100_000, "not valid JSON"),
        ('{"name": "f", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}", f"more than {MAX_DEPTH} levels deep"),
    ],
)
def test_hermes_says_what_is_wrong_and_what_was_expected(body, reason):
    _, (call,) = HERMES.parse(block(body), ())
    assert reason in call.error
    assert 'Expected <tool_call>{"name": "...", "arguments": {...}}</tool_call>' in call.error


def test_hermes_reports_a_block_that_is_not_closed():
    content, (call,) = HERMES.parse('hm <tool_call>{"name": "f", "arguments": {}}', ())
    assert content == "hm"
    assert "no closing </tool_call>" in call.error


def test_hermes_keeps_good_calls_beside_bad_ones():
    _, calls = HERMES.parse(block("{") + block('{"name": "f"}') + "<tool_call>", ())
    assert [(call.name, call.error is None) for call in calls] == [("", False), ("f", True), ("", False)]


@given(PIECES)
def test_hermes_never_raises_and_its_calls_can_be_saved(text):
    content, calls = HERMES.parse(text, TOOLS)
    assert "<tool_call>" not in content or not calls
    for call in calls:
        assert (call.error is not None) or call.name is not None
        json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False).encode()


def test_what_was_parsed_can_be_saved_from_a_deeper_stack():
    """A value that barely fits the parser's recursion limit must not break the writer's."""
    deepest = "[" * (MAX_DEPTH - 2) + "]" * (MAX_DEPTH - 2)
    _, (call,) = HERMES.parse(block(f'{{"name": "f", "arguments": {{"x": {deepest}}}}}'), ())
    assert call.error is None

    def dump(depth):
        return dump(depth - 1) if depth else json.dumps(dict(call.arguments))

    assert dump(sys.getrecursionlimit() // 2)


NAMES = st.text(st.characters(categories=("Ll", "Nd")), min_size=1, max_size=8)
CALLS = st.lists(st.builds(lambda n, a: ToolCall("", n, a), NAMES, st.dictionaries(st.text(), JSON, max_size=3)))


@given(st.text(), CALLS)
def test_hermes_writes_what_it_reads(content, calls):
    message = Message("assistant", content.strip(), tuple(calls))
    text = HERMES.write(message, "<end>")
    if "<tool_call>" in content or any("</tool_call>" in json.dumps(dict(c.arguments)) for c in calls):
        return  # the format has no way to quote its own marks
    assert text.endswith("<end>")
    assert HERMES.parse(text.removesuffix("<end>"), ()) == (content.strip(), calls)


# -- tags -------------------------------------------------------------------------------------------------------------


def test_tags_read_the_first_call():
    content, calls = TAGS.parse("I look it up. <search> old maps </search>\n", TOOLS)
    assert (content, calls) == ("I look it up.", [ToolCall("", "search", {"query": "old maps"})])
    assert TAGS.parse("nothing <b>bold</b>", TOOLS) == ("nothing <b>bold</b>", [])
    assert TAGS.parse("<search>a</search>", ()) == ("<search>a</search>", [])


@pytest.mark.parametrize("tools", [(SEARCH, PYTHON), (PYTHON, SEARCH)])
def test_tags_take_the_call_that_opens_first_in_whatever_order_the_tools_are(tools):
    _, calls = TAGS.parse("<search> what does <python> mean </search>", tools)
    assert calls == [ToolCall("", "search", {"query": "what does <python> mean"})]
    _, calls = TAGS.parse("<python>print('<search>')</python>", tools)
    assert calls == [ToolCall("", "python", {"code": "print('<search>')"})]


def test_tags_report_what_is_not_closed():
    content, (call,) = TAGS.parse("hm <python>print(1)", TOOLS)
    assert (content, call.name) == ("hm", "python")
    assert "no closing </python>" in call.error


def test_tags_stop_at_every_closing_tag():
    assert TAGS.stop_strings(TOOLS) == ("</search>", "</python>")
    assert HERMES.stop_strings(TOOLS) == ()


def test_tags_put_results_back_into_the_turn():
    results = [Message("tool", "a", tool_call_id="1"), Message("tool", "b", tool_call_id="2")]
    assert TAGS.continuation(results) == " <result>\na\n</result>\n <result>\nb\n</result>\n"
    assert TAGS.continuation([Message("user", "go on")]) is None
    assert HERMES.continuation(results) is None


@given(PIECES)
def test_tags_never_raise(text):
    content, calls = TAGS.parse(text, TOOLS)
    assert isinstance(content, str)
    assert len(calls) <= 1


@given(st.text(), st.text())
def test_tags_write_what_they_read(content, query):
    if "</search>" in query or any(f"<{name}>" in content for name in ("search", "python")):
        return
    message = Message("assistant", content.strip(), (ToolCall("", "search", {"query": query.strip()}),))
    text = TAGS.write(message, "<end>")
    assert text.endswith("</search>")
    assert TAGS.parse(text, TOOLS) == (content.strip(), list(message.tool_calls))


def test_tags_cannot_write_two_calls():
    with pytest.raises(UserError, match="one call a turn, got 2"):
        TAGS.write(Message("assistant", "", (ToolCall("", "search"), ToolCall("", "python"))), "<end>")


def test_tags_need_one_text_parameter():
    two = schema("move", "x", y={"type": "string"})
    two["function"]["parameters"]["required"] = ["x", "y"]
    none = schema("now")
    none["function"]["parameters"] = {"type": "object", "properties": {}}
    for tool in (two, none):
        with pytest.raises(ToolSchemaError, match=r"cannot be written as a tag.*tool_format = 'hermes'"):
            TAGS.opening([Message("user", "q")], [tool])
    opening, shown = TAGS.opening([Message("user", "q")], [schema("find", "what", limit={"type": "integer"})])
    assert "<find>what</find>" in opening[0].content
    assert shown == ()


# -- every format of a model family -----------------------------------------------------------------------------------

KINDS = {"text": "string", "count": "integer", "ratio": "number", "flag": "boolean", "items": "array", "more": "object"}
TYPED = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in KINDS.items()} | {"maybe": MAYBE},
            },
        },
    }
    for name in ("look_up", "g")
    for MAYBE in [{"anyOf": [{"type": "integer"}, {"type": "null"}]}]
]
VALUES = {
    "text": st.text(),
    "count": st.integers(),
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "flag": st.booleans(),
    "items": st.lists(JSON, max_size=3),
    "more": st.dictionaries(st.text(), JSON, max_size=3),
    "maybe": st.none() | st.integers(),
}
TYPED_CALLS = st.lists(
    st.builds(
        lambda name, arguments: ToolCall("", name, arguments),
        st.sampled_from(["look_up", "g"]),
        st.fixed_dictionaries({}, optional=VALUES),
    ),
    max_size=3,
)
OF_FAMILIES = [get_format(name) for name in ("hermes", "qwen3_coder", "llama3_json", "glm45", "pythonic")]
OF_FAMILIES += [get_format(name) for name in ("deepseek_v3", "deepseek_v31")]
OF_FAMILIES += [get_format("mistral", template) for template in ("", "[ARGS]", "[CALL_ID][ARGS]")]
OF_FAMILIES += [get_format("granite", template) for template in ("", "<tool_call>", "<|tool_call|>")]
ALL_MARKS = (
    *("<tool_call>", "</tool_call>", "<function=", "</function>", "<parameter=", "</parameter>", "<|tool_call|>"),
    *(
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
    ),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
    ),
    *(
        "```json\n",
        "\n```",
        "function",
        "f",
        "x=1",
        "[f(",
        ")",
        "]",
        "[",
        '{"name": "f"',
        '"parameters": {}',
        "}",
        "; ",
    ),
    *('"arguments": ', "{", '{"x": "\\ud800"}', "[" * 200, "1e999", "9" * 5000, "f(" * 200, "\x00", "\n", "\\d"),
)


@pytest.mark.parametrize("form", OF_FAMILIES, ids=lambda form: type(form).__name__)
@settings(max_examples=30)
@given(st.text(), TYPED_CALLS)
def test_every_format_reads_what_it_writes(form, content, calls):
    content = content.strip()
    values = json.dumps([dict(call.arguments) for call in calls], ensure_ascii=False)
    if form.parse(content, TYPED) != (content, []) or any(mark in values for mark in ALL_MARKS if "<" in mark):
        return  # no format has a way to quote its own marks
    text = form.write(Message("assistant", content, tuple(calls)), "<end>")
    assert text.endswith("<end>")
    read, again = form.parse(text.removesuffix("<end>"), TYPED)
    assert (read, again) == (content, calls)
    assert [json.dumps(dict(c.arguments)) for c in again] == [json.dumps(dict(c.arguments)) for c in calls], "types too"


@pytest.mark.parametrize("form", OF_FAMILIES, ids=lambda form: type(form).__name__)
@settings(max_examples=30)
@given(st.lists(st.sampled_from(ALL_MARKS) | st.text(max_size=8), max_size=14).map("".join))
def test_no_format_ever_raises_and_its_calls_can_be_saved(form, text):
    content, calls = form.parse(text, TYPED)
    assert content == content.strip()
    for call in calls:
        assert call.error is None or (call.error.endswith(".") and "Expected " in call.error)
        json.dumps(dict(call.arguments), allow_nan=False, ensure_ascii=False).encode()


def only(name, text, template=""):
    content, (call,) = get_format(name, template).parse(text, TYPED)
    return content, call


DEEP = "[" * 70 + "]" * 70
SECTION = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>".format
V31 = "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>".format


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("qwen3_coder", "<tool_call><function=g></function>", "no closing </tool_call>"),
        ("qwen3_coder", "<tool_call><function=g></tool_call>", "not one closed <function=NAME>"),
        ("qwen3_coder", '<tool_call>{"name": "g", "arguments": {}}</tool_call>', "not one closed <function=NAME>"),
        ("qwen3_coder", block("<function=g><parameter=x>1</function>"), "no closed <parameter=KEY>: '<parameter=x>1'"),
        ("qwen3_coder", block("<function=g>so: <parameter=x>1</parameter></function>"), "no closed <parameter=KEY>"),
        ("qwen3_coder", block("<function=g></function><function=g></function>"), "no closed <parameter=KEY>"),
        ("qwen3_coder", block("<function=g>" + "<parameter=x>1</parameter>" * 2 + "</function>"), "'x' is given twice"),
        ("qwen3_coder", "<function=g>\n</function>\n</tool_call>", "no opening <tool_call>"),
        ("glm45", "<tool_call>g", "no closing </tool_call>"),
        ("glm45", block(""), "has no name"),
        ("glm45", block('{"name": "g"}'), "has no name"),
        ("glm45", block("g<arg_key>x</arg_key>"), "no pair of key and value: '<arg_key>x</arg_key>'"),
        ("glm45", block("g twice"), "no pair of key and value: 'twice'"),
        ("glm45", block("g" + "<arg_key>x</arg_key><arg_value>1</arg_value>" * 2), "'x' is given twice"),
        ("llama3_json", '{"name": "g", "parameters": {"x": 1}', "not valid JSON"),
        ("llama3_json", '{"name": 3, "parameters": {}}', "has no name"),
        ("llama3_json", '{"name": "g", "parameters": [1]}', "are a JSON list, not an object"),
        ("llama3_json", "<|python_tag|>print(1)", "not valid JSON"),
        ("llama3_json", "<|python_tag|>[1]", "has no name"),
        ("llama3_json", f'{{"name": "g", "parameters": {{"x": {DEEP}}}}}', "levels deep"),
        ("mistral", "[TOOL_CALLS]", "not valid JSON"),
        ("mistral", "[TOOL_CALLS][]", "No call"),
        ("mistral", '[TOOL_CALLS] [{"arguments": {}}]', "has no name"),
        ("mistral", "[TOOL_CALLS]g[ARGS]{", "not valid JSON"),
        ("mistral", "[TOOL_CALLS]g[ARGS][1]", "not valid JSON"),
        ("mistral", '[TOOL_CALLS] [{"name": "g", "arguments": "x"}]', "are a JSON str, not an object"),
        ("deepseek_v31", SECTION(""), "no closed call"),
        ("deepseek_v31", SECTION("<｜tool▁call▁begin｜>g"), "no closed call: '<｜tool▁call▁begin｜>g'"),
        ("deepseek_v31", SECTION(V31("[1]")), "are a JSON list, not an object"),
        ("deepseek_v31", SECTION(V31("{")), "not valid JSON"),
        ("deepseek_v31", SECTION(V31("{}").replace(">g<", "><")), "has no name"),
        ("deepseek_v3", SECTION(V31("{}")), "no closed call"),
        ("granite", '<|tool_call|>{"name": "g"}', "are a JSON dict, not a list"),
        ("granite", "<tool_call>[]", "are a JSON list, not a list"),
        ("granite", "<|tool_call|>[1]", "has no name"),
        ("granite", '<|tool_call|>[{"name": "g"', "not valid JSON"),
        ("pythonic", "[g(x=1)", "not valid Python"),
        ("pythonic", "[g(x=1)] done", "not valid Python"),
        ("pythonic", "[g(x=1)] + [g()]", "not one list"),
        ("pythonic", "[g(x=open('f'))]", "no plain value"),
        ("pythonic", "[g(x=1 if 2 else 3)]", "no plain value"),
        ("pythonic", "[g(x=b'a')]", "no plain value"),
        ("pythonic", "[g(x=1e999)]", "no plain value"),
        ("pythonic", "[g(x=1, **{'y': 2})]", "no names"),
        ("pythonic", "[g(x=1, x=2)]", "is given twice"),
    ],
)
def test_every_format_says_what_is_wrong_and_what_was_expected(name, text, reason):
    content, call = only(name, f"hm\n{text}")
    assert content == "hm"
    assert reason in call.error
    assert "Expected " in call.error


@pytest.mark.parametrize("name", ["deepseek_v31", "deepseek_v3"])
def test_good_calls_are_kept_beside_what_is_broken(name):
    form = get_format(name)
    good = form.write(Message("assistant", "", (ToolCall("", "g", {"x": 1}),) * 2), "")
    _, calls = form.parse(good.removesuffix("<｜tool▁calls▁end｜>"), TYPED)
    assert [call.error is None for call in calls] == [True, True, False]
    assert "no closing <｜tool▁calls▁end｜>" in calls[-1].error


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", 'The answer is {"x": 1}.'),
        ("llama3_json", '{"name": "Ada", "born": 1815}'),
        ("mistral", '[{"name": "g", "arguments": {}}]'),
        ("pythonic", "[1, 2]"),
        ("pythonic", "[see](here)"),
        ("pythonic", "It is [f(x)] = 3."),
        ("qwen3_coder", "a <parameter=x> alone"),
    ],
)
def test_answers_that_look_a_little_like_calls_stay_answers(name, text):
    assert get_format(name).parse(text, TYPED) == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "arguments"),
    [
        ("qwen3_coder", "<function=g><parameter=count>5</parameter></function>", {"count": 5}),
        ("qwen3_coder", "<function=g><parameter=text>5</parameter></function>", {"text": "5"}),
        ("qwen3_coder", "<function=g><parameter=flag>True</parameter></function>", {"flag": True}),
        ("qwen3_coder", "<function=g><parameter=count>five</parameter></function>", {"count": "five"}),
        ("qwen3_coder", "<function=g><parameter=maybe>null</parameter></function>", {"maybe": None}),
        ("qwen3_coder", "<function=g><parameter=other>5</parameter></function>", {"other": "5"}),
        ("qwen3_coder", "<function=other><parameter=count>5</parameter></function>", {"count": "5"}),
        ("qwen3_coder", "<function=g>\n<parameter=text>\n\na\n\n</parameter>\n</function>", {"text": "\na\n"}),
        ("glm45", "g<arg_key>ratio</arg_key><arg_value>5</arg_value>", {"ratio": 5}),
        ("glm45", "g\n<arg_key>text</arg_key>\n<arg_value> a\n</arg_value>\n", {"text": " a\n"}),
        ("glm45", "g<arg_key>items</arg_key><arg_value>[1, 2</arg_value>", {"items": "[1, 2"}),
    ],
)
def test_bare_text_is_typed_by_the_schema(name, text, arguments):
    assert only(name, block(text)) == ("", ToolCall("", "other" if "=other><p" in text else "g", arguments))


@pytest.mark.parametrize(
    ("kinds", "text", "value"),
    [
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, "five", "five"),
        ({"type": ["number", "string"]}, "5", 5),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '{"a": 1}', '{"a": 1}'),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"type": "integer"}, "5.5", 5.5),
        ({}, "5", "5"),
    ],
)
def test_schemas_of_several_types(kinds, text, value):
    tool = {"function": {"name": "g", "parameters": {"properties": {"x": kinds}}}}
    text = f"<tool_call>g<arg_key>x</arg_key><arg_value>{text}</arg_value></tool_call>"
    assert get_format("glm45").parse(text, [tool]) == ("", [ToolCall("", "g", {"x": value})])


def test_mistral_reads_all_its_forms():
    call = ToolCall("", "g", {"x": "[TOOL_CALLS]"})
    for text in (
        '[TOOL_CALLS] [{"name": "g", "arguments": {"x": "[TOOL_CALLS]"}, "id": "abcdefghi"}]',
        '[TOOL_CALLS]{"name": "g", "arguments": {"x": "[TOOL_CALLS]"}}',
        '[TOOL_CALLS]g[ARGS]{"x": "[TOOL_CALLS]"}',
        '[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{"x": "[TOOL_CALLS]"}',
        '[TOOL_CALLS]g{"x": "[TOOL_CALLS]"}',
    ):
        assert get_format("mistral").parse(text, TYPED) == ("", [call])
        assert get_format("mistral").parse(f"a {text} b", TYPED)[1] == [call]
    broken = get_format("mistral").parse("[TOOL_CALLS]g[ARGS]{[TOOL_CALLS]g[ARGS]{}", TYPED)[1]
    assert [call.error is None for call in broken] == [False, True]


def test_mistral_writes_the_form_of_its_template():
    message = Message("assistant", "", (ToolCall("call_0_0", "g", {}),))
    written = [get_format("mistral", template).write(message, "") for template in ("", "[ARGS]", "[CALL_ID] [ARGS]")]
    identity = get_format("mistral").call_id("call_0_0")
    assert len(identity) == 9
    assert identity.isalnum()
    assert written == [
        '[TOOL_CALLS] [{"name": "g", "arguments": {}}]',
        "[TOOL_CALLS]g[ARGS]{}",
        f"[TOOL_CALLS]g[CALL_ID]{identity}[ARGS]{{}}",
    ]
    assert get_format("mistral").call_id("call_1_10") != get_format("mistral").call_id("call_11_0")


def test_granite_writes_the_mark_of_its_template():
    message = Message("assistant", "", (ToolCall("", "g", {}),))
    written = [get_format("granite", template).write(message, "") for template in ("", "<tool_call>", "<|tool_call|>")]
    assert [text.partition("[")[0] for text in written] == ["<|tool_call|>", "<tool_call>", "<|tool_call|>"]


def test_llama_takes_what_its_models_write():
    form = get_format("llama3_json")
    calls = [ToolCall("", "g", {"x": 1}), ToolCall("", "g", {})]
    one, other = '{"name": "g", "parameters": {"x": 1}}', '{"type": "function", "name": "g", "arguments": {}}'
    for text in (f"{one}; {other}", f"<|python_tag|>{one};{other}", f"{one}\n{other}"):
        assert form.parse(text, TYPED) == ("", calls)
    assert form.parse(f"Sure: {one} done", TYPED) == ("Sure:  done", calls[:1])


def test_pythonic_values_are_those_of_json():
    _, call = only("pythonic", "[a.b(x=true, y=null, z=(1, -2), w={'k': False}, v='\\d')]")
    assert (call.name, call.arguments) == ("a.b", {"x": True, "y": None, "z": [1, -2], "w": {"k": False}, "v": "\\d"})


def test_unknown_formats_are_refused_with_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'qwen3_coder'"):
        get_format("qwen_coder")
    assert {type(get_format(name)) for name in ("qwen3_coder", "qwen3_xml")} == {FORMATS["qwen3_xml"]}
