"""Tool calls as text: whatever a policy writes becomes a call, an error that the policy can read, or plain text."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import ToolSchemaError, UserError
from agentrl.tool_format import MAX_DEPTH, get_format
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
