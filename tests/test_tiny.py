"""The policy from nothing: its tokenizer's promises, its template, and its size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.tiny import SPECIAL, build_model, build_tokenizer, render_texts
from agentrl.types import Message, ToolCall


@given(st.text(max_size=60))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@given(st.integers(0, 10**12))
def test_digits_stand_apart(tokenizer, number):
    ids = tokenizer(f"double {number}", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-len(str(number)) :] == list(str(number))


def test_a_name_is_the_same_token_wherever_it_stands():
    texts = ["In Averlo lives a cat.", "Averlo, Averlo!", '{"query": "Averlo"}'] * 9
    tokenizer = build_tokenizer(texts, vocab=320)
    name = tokenizer("Averlo", add_special_tokens=False)["input_ids"]
    assert len(name) == 1
    for text in texts:
        assert name[0] in tokenizer(text, add_special_tokens=False)["input_ids"]


def test_special_tokens_are_single_and_never_split(tokenizer):
    for word in SPECIAL:
        assert (
            tokenizer(f"a{word}b", add_special_tokens=False)["input_ids"].count(tokenizer.convert_tokens_to_ids(word))
            == 1
        )
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"


def test_the_template_writes_the_hermes_form(tokenizer, tools):
    call = ToolCall("call_0_0", "double", {"x": 3})
    messages = [
        Message("system", "Be brief."),
        Message("user", "double 3"),
        Message("assistant", "", (call, call)),
        Message("tool", "6", tool_call_id="call_0_0"),
        Message("tool", "6", tool_call_id="call_0_1"),
    ]
    (text,) = render_texts([(messages, tools)])
    assert tokenizer.apply_chat_template([m.to_chat() for m in messages], tools=list(tools), tokenize=False) == text
    assert text.startswith("<|im_start|>system\nBe brief.\nTools:\n<tools>\n{")
    block = '<tool_call>\n{"name": "double", "arguments": {"x": 3}}\n</tool_call>'
    assert f"<|im_start|>assistant\n{block}\n{block}<|im_end|>\n" in text
    response = "<tool_response>\n6\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{response}\n{response}<|im_end|>\n")


def test_the_demos_policy_has_the_size_that_is_told(tokenizer):
    model = build_model(tokenizer)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.6e6, rel=0.2)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    same = build_model(tokenizer)
    assert all((a == b).all() for a, b in zip(model.parameters(), same.parameters(), strict=True))
