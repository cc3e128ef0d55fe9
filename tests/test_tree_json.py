from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import NonFiniteError, TaskError
from agentrl.tree_json import dump_tree, load_tree, tree_from_json, tree_to_json
from agentrl.types import (
    Decision,
    Leaf,
    Message,
    Node,
    Outcome,
    RolloutTree,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
)

# Lone surrogates included: tokens can decode to half of a character.
TEXT = st.text(st.characters(), max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
CALLS = st.builds(ToolCall, TEXT, TEXT, st.dictionaries(TEXT, JSON, max_size=2), st.none() | TEXT)
MESSAGES = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant", "tool"]),
    TEXT,
    st.lists(CALLS, max_size=2).map(tuple),
    st.none() | TEXT,
)
RESULTS = st.builds(ToolResult, TEXT, TEXT, TEXT, st.none() | TEXT, NUMBER)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    length = draw(st.integers(0, 3))

    def row(element: st.SearchStrategy[Any]) -> tuple[Any, ...]:
        return tuple(draw(st.lists(element, min_size=length, max_size=length)))

    policy = draw(st.booleans())
    return Node(
        parent=draw(st.integers(-1, 5)),
        author="policy" if policy else draw(st.sampled_from(["prompt", "tool"])),
        token_ids=row(st.integers(0, 200_000)),
        logprobs=row(NUMBER) if policy else (),
        entropies=row(NUMBER) if policy else (),
        policy_version=row(st.integers(0, 99)) if policy else (),
        messages=draw(st.lists(MESSAGES, max_size=2).map(tuple)),
        tool_results=draw(st.lists(RESULTS, max_size=2).map(tuple)),
        stop_reason=draw(st.sampled_from(StopReason)) if policy else None,
    )


NAMES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
LEAVES = st.builds(
    Leaf,
    st.integers(0, 5),
    st.none() | NUMBER,
    st.sampled_from(Outcome),
    st.integers(0, 2**63),
    st.none() | TEXT,
    NUMBER,
    st.dictionaries(TEXT, NUMBER, max_size=2),
    NAMES,
    st.lists(RESULTS, max_size=2).map(tuple),
)
DECISIONS = st.builds(
    Decision, NAMES, st.integers(0, 9), st.none() | NUMBER, st.none() | NUMBER, st.booleans(), st.booleans(), TEXT
)
TASKS = st.builds(
    Task,
    st.lists(MESSAGES, max_size=2).map(tuple),
    st.none() | TEXT,
    st.text(min_size=1, max_size=8),
    st.dictionaries(TEXT, JSON, max_size=2),
)
TREES = st.builds(
    RolloutTree,
    TASKS,
    st.lists(nodes(), max_size=3).map(tuple),
    st.lists(LEAVES, max_size=3).map(tuple),
    NUMBER,
    NUMBER,
    st.integers(0, 2**63),
    st.integers(1, 9),
    st.lists(DECISIONS, max_size=2).map(tuple),
    st.dictionaries(TEXT, NUMBER, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_a_tree_comes_back_as_it_was(tree: RolloutTree) -> None:
    line = dump_tree(tree)
    again = load_tree(line)
    assert again == tree
    assert repr(again) == repr(tree), "equal, but 1 became 1.0, or an enum its string"
    assert "\n" not in line
    assert tree_from_json(tree_to_json(tree)) == tree


def test_the_fields_have_the_names_of_the_records() -> None:
    data = json.loads(dump_tree(example()))
    assert set(data) == set(RolloutTree.__dataclass_fields__)
    for row, record in (
        (data["nodes"][0], Node),
        (data["leaves"][0], Leaf),
        (data["task"], Task),
        (data["decisions"][0], Decision),
    ):
        assert set(row) == set(record.__dataclass_fields__)
    assert data["leaves"][0]["reward"] is None
    assert data["nodes"][1]["author"] == "policy"
    assert data["leaves"][0]["name"] == [0, 2, 3]
    assert data["decisions"][1] == {
        "name": [0, 2, 3],
        "turn": 4,
        "signal": None,
        "draw": 0.5,
        "wanted": True,
        "granted": False,
        "reason": "why",
    }
    assert data["spent"] == {"tokens": 2.0, "calls": 0.0, "seconds": 1.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_not_finite_is_refused_with_its_task(value: float) -> None:
    tree = example()
    broken = replace(tree, nodes=(tree.nodes[0], replace(tree.nodes[1], logprobs=(-0.5, value))))
    with pytest.raises(NonFiniteError, match="rollout of task t-1 holds a number that is not finite"):
        dump_tree(broken)


def test_metadata_that_is_not_json_is_refused_with_its_task() -> None:
    tree = replace(example(), task=Task("hello", id="t-2", metadata={"when": object()}))
    with pytest.raises(TaskError, match=r"rollout of task t-2 cannot be saved.*only what JSON holds"):
        dump_tree(tree)


def example() -> RolloutTree:
    prompt = Message("user", "2 + 2?")
    return RolloutTree(
        task=Task((prompt,), "4", "t-1"),
        nodes=(
            Node(-1, "prompt", (5, 6), messages=(prompt,)),
            Node(0, "policy", (7, 8), (-0.5, -0.25), (0.1, 0.2), (3, 3), stop_reason=StopReason.STOP),
        ),
        leaves=(Leaf(1, None, Outcome.TIMEOUT, seed=4, error="Traceback ...", seconds=1.5, name=(0, 2, 3)),),
        top_p=0.9,
        seed=11,
        copy=2,
        decisions=(Decision((0, 2), 3, 0.25, None, True, True), Decision((0, 2, 3), 4, None, 0.5, True, False, "why")),
        spent={"tokens": 2.0, "calls": 0.0, "seconds": 1.5},
    )
