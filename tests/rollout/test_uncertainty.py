"""The branching signal: the paper's, and the released code's with what is odd about it."""

from __future__ import annotations

import math

import pytest

from agentrl.errors import ConfigError
from agentrl.rollout.uncertainty import entropy_change, released_entropy

UNIFORM = [math.log(1 / 4)] * 4


def test_the_papers_change_is_a_sum_over_the_first_tokens_divided_by_the_vocabulary():
    assert entropy_change([2.0, 3.0, 9.0], [1.0, 0.5, 0.0], 100, first_tokens=2) == pytest.approx(3.5 / 100)
    assert entropy_change([0.5], [1.0], 10) == pytest.approx(-0.05)


def test_a_short_segment_is_not_taken_for_a_certain_one():
    initial = [1.0] * 20
    assert entropy_change([1.5] * 3, initial, 10) == pytest.approx(0.15)
    assert entropy_change([], initial, 10) == 0
    assert entropy_change([1.0] * 40, initial, 10) == 0


def test_a_long_segment_is_looked_at_for_twenty_tokens():
    assert entropy_change([2.0] * 40, [1.0] * 40, 1000) == pytest.approx(20 / 1000)
    assert released_entropy([UNIFORM] * 40, 4) == pytest.approx(20)


def test_the_released_form_is_a_sum_so_that_length_counts():
    assert released_entropy([UNIFORM], 16) == pytest.approx(0.5)
    assert released_entropy([UNIFORM] * 6, 16) == pytest.approx(3.0)
    assert released_entropy([], 16) == 0


def test_what_was_not_returned_is_missing_and_not_renormalised():
    assert released_entropy([UNIFORM[:2]], 4) == pytest.approx(0.5)


def test_an_impossible_token_adds_nothing():
    assert released_entropy([[0.0, -math.inf]], 4) == 0
    assert released_entropy([[*UNIFORM, -math.inf]], 4) == pytest.approx(1.0)


SIGNALS = [
    lambda vocab_size, **k: entropy_change([1.0], [1.0], vocab_size - 1, **k),
    lambda **k: released_entropy([UNIFORM], **k),
]


@pytest.mark.parametrize("signal", SIGNALS)
def test_what_cannot_be_asked(signal):
    with pytest.raises(ConfigError, match=r"at least 2 tokens, got 0|at least 2, got 1"):
        signal(vocab_size=1)
    with pytest.raises(ConfigError, match="at least 1 token to look at, got 0"):
        signal(vocab_size=10, first_tokens=0)
