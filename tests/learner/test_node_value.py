"""Child mean minus parent mean, on trees small enough to do by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import NonFiniteError
from agentrl.learner.node_value import node_advantages

# A prompt (0), two roots (1 and 2); root 1 calls a tool (3) and branches there into 4 and 5.
TOKEN = torch.tensor([[0, 1, 3, 4], [0, 1, 3, 5], [0, 2, 6, -1]])
GROUP = torch.zeros(3, dtype=torch.int64)


def test_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
    mean = 1.25 / 3
    found = node_advantages(rewards, TOKEN, GROUP)
    first, second = 0.5 - mean, 0.25 - mean
    expected = [[0, first, first, 0.5], [0, first, first, -0.5], [0, second, second, 0]]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-15)


def test_where_only_the_prompt_branches_it_is_the_reward_less_the_mean():
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    token = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 5, -1]])
    found = node_advantages(rewards, token, GROUP)
    assert torch.allclose(found[:, 1], rewards - rewards.mean())
    assert found[2, 2] == 0
    assert not found[:, 0].any()


def test_normalized_and_without_spread():
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    plain = node_advantages(rewards, TOKEN, GROUP)
    assert torch.allclose(node_advantages(rewards, TOKEN, GROUP, normalize_std=True, eps=0.0), plain / rewards.std())
    assert not node_advantages(torch.full_like(rewards, 0.3), TOKEN, GROUP, normalize_std=True).any()


def test_a_reward_that_is_not_finite():
    with pytest.raises(NonFiniteError):
        node_advantages(torch.tensor([0.0, float("nan"), 1.0]), TOKEN, GROUP)


@st.composite
def forests(draw):
    """Paths of random trees; every path gets one token of its own at the end."""
    rows, groups, number = [], [], 0
    for task in range(draw(st.integers(1, 3))):
        paths = [[number]]
        number += 1
        for _ in range(draw(st.integers(0, 6))):
            stem = draw(st.sampled_from(paths))
            cut = draw(st.integers(1, len(stem)))
            fresh = list(range(number, number + draw(st.integers(1, 3))))
            number += len(fresh)
            paths.append(stem[:cut] + fresh)
        for path in paths:
            rows.append([*path, number])
            groups.append(task)
            number += 1
    width = max(map(len, rows))
    table = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    rewards = draw(st.lists(st.floats(-2, 2), min_size=len(rows), max_size=len(rows)))
    return torch.tensor(rewards, dtype=torch.float64), table, torch.tensor(groups)


@given(forests())
def test_along_a_path_the_spans_add_up_to_the_reward_less_the_mean(forest):
    rewards, token, group = forest
    found = node_advantages(rewards, token, group)
    for row in range(len(rewards)):
        path = [t for t in token[row].tolist() if t >= 0]
        below = [frozenset((token == t).any(1).nonzero()[:, 0].tolist()) for t in path]
        total, seen = 0.0, None
        for position, leaves in enumerate(below):
            if leaves != seen:
                total += float(found[row, position])
            seen = leaves
        mean = rewards[group == group[row]].mean()
        assert total == pytest.approx(float(rewards[row] - mean), abs=1e-12)
    for t in token[token >= 0].unique():
        values = found[token == t]
        assert torch.allclose(values, values[:1].expand_as(values), atol=1e-12), "shared tokens learn the same"
