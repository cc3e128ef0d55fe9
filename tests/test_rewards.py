"""Published rewards: what they pay for, and that no text makes them fail or wait."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl import Message, Task
from agentrl.rewards import (
    boxed,
    deep_research_reward,
    exact_match,
    exact_match_format_reward,
    f1_score,
    normalize_answer,
    transcript,
)
from agentrl.types import Episode, Outcome, ToolCall

THINK = "<think>why</think>"
SEARCH = "<search>q</search><result>r</result>"
PYTHON = "<python>1</python> <result>1</result>"
LOOKUP = "<search>q</search>\n<information>the Seine in Paris</information>\n"


def answer(text):
    return f"<answer>So it is \\boxed{{{text}}}.</answer>"


# -- comparing --------------------------------------------------------------------------------------------------------


def test_normalisation():
    assert normalize_answer("  The U.S.A.,  an\tANSWER! ") == "usa answer"
    assert normalize_answer("theory of a-an") == "theory of aan"


@pytest.mark.parametrize(
    ("prediction", "targets", "score"),
    [
        ("Paris", "paris.", 1.0),
        ("the city of Paris", "Paris", 2 * (1 / 3) / (1 / 3 + 1)),
        ("a b b", ["b b c"], 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("Paris", ["Rome", "Paris France", "Lyon"], 2 / 3),
        ("no", "no one", 0.0),
        ("no one", "no", 0.0),
        ("No.", "no", 1.0),
        ("", "Paris", 0.0),
        ("Paris", [], 0.0),
    ],
)
def test_f1(prediction, targets, score):
    assert f1_score(prediction, targets) == pytest.approx(score, rel=1e-15)


def test_exact_match():
    assert exact_match("The Eiffel Tower!", ["Louvre", "eiffel tower"])
    assert not exact_match("Eiffel", "Eiffel tower")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{x_{2}^{3}} end}", "x_{2}^{3}"),
        (r"\boxed{}", ""),
        (r"\boxed 42$ of \boxed{7}", "42"),
        (r"\boxed{1", None),
        (r"\boxed{1} or \boxed", None),
        (r"\boxed[1]{2}", None),
        ("42", None),
    ],
)
def test_boxed(text, content):
    assert boxed(text) == content


# -- ARPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        (THINK + answer("Paris"), 1.0, "F1 1.000"),
        (THINK + SEARCH + answer("Paris"), 1.0, "F1 1.000"),
        (THINK + SEARCH + PYTHON + answer("Paris"), 1.1, "F1 1.000, and both tools used"),
        (THINK + SEARCH + PYTHON + answer("Rome"), 0.0, "no word of the answer is right"),
        (THINK + "</search></python>" + answer("Paris"), 1.0, "F1 1.000"),
        (THINK + "<think>" + answer("Paris"), -1.0, "not every <think>"),
        (SEARCH + answer("Paris"), -1.0, "no <think>"),
        (THINK + answer("Paris") * 2, -1.0, "not exactly one <answer>"),
        (THINK + f"</answer>{answer('x')[:-9]}", -1.0, "</answer> stands before"),
        (THINK + "<answer>Paris</answer>", -1.0, r"no \boxed{...}"),
        (THINK + r"<answer>\boxed{Paris} \boxed{</answer>", -1.0, "is not closed"),
        (THINK + "<search>q</search>" + answer("Paris"), -1.0, "a <search> call without"),
        (THINK + SEARCH + "<search>q" + SEARCH + answer("Paris"), 1.0, "F1"),
        (
            THINK + "<python>1<result>1</result></python><result></result>" + answer("Paris"),
            -1.0,
            "inside of a <python>",
        ),
    ],
)
def test_deep_research(text, score, reason):
    found = deep_research_reward(text, "Paris")
    assert found.score == pytest.approx(score)
    assert reason in found.reason


def test_deep_research_tells_what_it_read():
    found = deep_research_reward(THINK + SEARCH + PYTHON + answer("Paris France"), ["Rome", "Paris"], bonus=0.5)
    assert (found.answer, found.f1, found.score) == ("Paris France", 2 / 3, 2 / 3 + 0.5)


# -- Search-R1, Tree-GRPO ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "reason"),
    [
        (f"{THINK}\n{LOOKUP}{THINK}\n<answer> Paris </answer>\n", 1.0, "right answer"),
        (f"{THINK}<answer>Paris</answer>", 1.0, "right answer"),
        (f"{LOOKUP}{THINK}<answer>Paris</answer>", 0.8, "right answer, but <search> is out of place"),
        (f"{THINK}so <answer>Paris</answer>", 0.8, "text outside of the blocks, before <answer>"),
        (f"{THINK}<answer>Paris</answer> I hope", 0.8, "text after the answer"),
        (f"{THINK}<answer>Rome</answer>", 0.2, "wrong answer"),
        (f"{THINK}{LOOKUP}{THINK}<answer>Rome</answer>", 0.2, "though a target was found"),
        (f"{THINK}{LOOKUP}<answer>Rome</answer>", 0.1, "wrong answer, and <answer> is out of place"),
        (f"{THINK}{LOOKUP}{THINK}", 0.0, "no answer, and it does not end with an answer"),
        (f"{THINK}<answer>Paris", 0.0, "no answer"),
        ("", 0.0, "no answer"),
        (f"{THINK}<answer>Rome</answer><answer>Paris</answer>", 0.8, "out of place"),
        ("<think><search></think><answer>Paris</answer>", 0.8, "<search> is out of place"),
    ],
)
def test_exact_match_with_format(text, score, reason):
    found = exact_match_format_reward(text, ["Paris"])
    assert found.score == pytest.approx(score)
    assert reason in found.reason


def test_the_terms_of_exact_match_with_format():
    terms = {"structure_format_score": 0.3, "final_format_score": 0.05, "retrieval_score": 0.25, "score": 2.0}
    texts = {
        f"{THINK}{LOOKUP}{THINK}<answer>Rome</answer>": 0.55,
        f"{THINK}<answer>Rome</answer>": 0.3,
        "<answer>Rome</answer>": 0.05,
        "<answer>Paris</answer>": 1.7,
        f"{THINK}<answer>Paris</answer>": 2.0,
    }
    for text, score in texts.items():
        assert exact_match_format_reward(text, "Paris", **terms).score == pytest.approx(score)


# -- from an episode --------------------------------------------------------------------------------------------------

TASK = Task("Which city?", answer="Paris")


def episode(*written, system=True):
    opening = [Message("system", "Use tools."), *TASK.prompt] if system else TASK.prompt
    return Episode((*opening, *written), None, Outcome.ANSWERED)


def called(call_id, name, text, error=None):
    return ToolCall(call_id, name, {"text": text} if error is None else {}, error)


@pytest.mark.parametrize("system", [True, False])
def test_a_transcript_puts_each_result_behind_its_call(system):
    played = episode(
        Message("assistant", THINK, (called("call_0_0", "search", "q"), called("call_0_1", "python", "1"))),
        Message("tool", "found", tool_call_id="call_0_0"),
        Message("tool", "1", tool_call_id="call_0_1"),
        Message("assistant", answer("Paris")),
        system=system,
    )
    text = transcript(TASK, played)
    assert text == "\n".join(
        [
            THINK,
            "<search>q</search>",
            "<result>found</result>",
            "<python>1</python>",
            "<result>1</result>",
            answer("Paris"),
        ]
    )
    assert deep_research_reward(text, TASK.answer).score == pytest.approx(1.1)


def test_a_transcript_with_another_result_tag():
    played = episode(
        Message("assistant", THINK, (called("call_0_0", "search", "q"),)),
        Message("tool", "found", tool_call_id="call_0_0"),
        Message("assistant", f"{THINK}<answer>Paris</answer>"),
    )
    text = transcript(TASK, played, result_tag="information")
    assert exact_match_format_reward(text, "Paris").reason == "right answer"


def test_a_call_that_could_not_be_read_is_a_fault_of_form():
    played = episode(
        Message("assistant", THINK, (called("call_0_0", "search", "", error="<search> has no closing </search>."),)),
        Message("tool", "error", tool_call_id="call_0_0"),
        Message("assistant", answer("Paris")),
    )
    assert deep_research_reward(transcript(TASK, played), "Paris").reason == (
        "a <search> call without its end or its <result>"
    )


def test_a_call_that_the_episode_ended_on_has_no_result():
    played = episode(Message("assistant", THINK, (called("call_0_0", "search", "q"),)))
    assert transcript(TASK, played).endswith("<search>q</search>")


# -- hostile text -----------------------------------------------------------------------------------------------------

TAGS = [f"<{slash}{tag}>" for tag in ("think", "search", "python", "result", "information", "answer") for slash in "/ "]
PIECES = st.sampled_from([tag.replace(" ", "") for tag in TAGS] + ["\\boxed{", "\\boxed ", "}", "{", "$", "Paris", " "])


@given(st.lists(PIECES | st.text(max_size=3)).map("".join), st.text(max_size=5))
def test_no_text_raises(text, target):
    research = deep_research_reward(text, target)
    assert research.score == -1 or 0 <= research.score <= 1.1
    assert 0 <= exact_match_format_reward(text, target).score <= 1
    assert 0 <= f1_score(text, target) <= 1


@pytest.mark.parametrize(
    "piece",
    ["<answer>", "<information>", "<search>", "<search></search><result>", "\\boxed{", "{", "<think></think>", "<"],
)
def test_time_is_linear(piece):
    """A megabyte in a tenth of a second; a regular expression that looks for each block's end takes minutes."""
    text = piece * (1_000_000 // len(piece))
    began = time.process_time()
    deep_research_reward(THINK + text + answer("x"), "Paris")
    deep_research_reward(f"{THINK}<answer>\\boxed{{}} {text}</answer>", "Paris")
    exact_match_format_reward(text, "Paris")
    exact_match_format_reward(f"{THINK}<answer>{text}</answer>", "Paris")
    assert time.process_time() - began < 5
