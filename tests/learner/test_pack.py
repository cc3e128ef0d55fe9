"""The layout: every unique token once, in preorder, and every policy token hung on the token before it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from forests import Rows, forests, rows_of
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import ConfigError, TrainingError
from agentrl.learner import pack as packing
from agentrl.learner.pack import micro_batches, pack

SHARE_ALL = mock.patch.object(packing, "WORTH", 10**9)


def ancestors(batch, token):
    """The tokens that ``token`` may attend to, itself last."""
    end = batch.subtree_end
    return [k for k in range(token + 1) if token < end[k]]


def beginnings(rows):
    return {tuple(row[: n + 1]) for row in rows.lists() for n in range(len(row))}


@given(forests())
def test_every_unique_token_stands_once(rows):
    with SHARE_ALL:
        batch = pack(*rows)
    paths = [tuple(batch.token_ids[0, ancestors(batch, n)].tolist()) for n in range(batch.token_ids.shape[1])]
    assert sorted(paths) == sorted(beginnings(rows))
    assert batch.position_ids[0].tolist() == [len(path) - 1 for path in paths]


@given(forests())
def test_every_unique_target_stands_once(rows):
    with SHARE_ALL:
        batch = pack(*rows)
    wanted = {
        tuple(row[: n + 1])
        for row, flags in zip(rows.lists(), rows.mask.tolist(), strict=True)
        for n in range(1, len(row))
        if flags[n]
    }
    assert batch.target_ids.shape == batch.parent_index.shape == (len(wanted),)


@given(forests(), st.sampled_from([1, 3, 48, 10**9]), st.booleans())
def test_a_policy_token_hangs_on_the_row_before_it(rows, worth, share):
    with mock.patch.object(packing, "WORTH", worth):
        batch = pack(*rows, share=share)
    assert batch.gather.shape == batch.mask.shape == rows.token_ids.shape
    for i, row in enumerate(rows.lists()):
        for depth in range(rows.token_ids.shape[1]):
            own = 0 < depth < len(row) and bool(rows.mask[i, depth])
            assert bool(batch.mask[i, depth]) == own
            target = int(batch.gather[i, depth])
            if not own:
                assert target == 0
                continue
            parent = int(batch.parent_index[target])
            assert int(batch.target_ids[target]) == row[depth]
            assert batch.token_ids[0, ancestors(batch, parent)].tolist() == row[:depth]
            assert int(batch.position_ids[0, parent]) == depth - 1


@given(forests())
def test_without_sharing_every_row_is_a_tree_of_its_own(rows):
    batch = pack(*rows, share=False)
    assert batch.token_ids[0].tolist() == [token for row in rows.lists() for token in row]
    ends = rows.lengths.cumsum(0)
    assert batch.subtree_end.tolist() == ends.repeat_interleave(rows.lengths).tolist()


def test_the_example_of_the_docstring():
    a, b, c, d, e, f, g = range(7)
    batch = pack(*rows_of([[a, g], [a, b, e, f], [a, b, c, d]]))
    assert batch.token_ids.tolist() == [[a, b, c, d, e, f, g]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 1]]
    assert batch.subtree_end.tolist() == [7, 6, 4, 4, 6, 6, 7]
    assert batch.target_ids.tolist() == [b, c, d, e, f, g]
    assert batch.parent_index.tolist() == [0, 1, 2, 1, 4, 0]
    assert batch.gather.tolist() == [[0, 5, 0, 0], [0, 0, 3, 4], [0, 0, 1, 2]]


def test_one_token_of_two_rows_is_a_target_if_either_wants_it():
    batch = pack(*rows_of([[1, 2, 3], [1, 2, 4]], [[False, True, False], [False, False, True]]))
    assert batch.target_ids.tolist() == [2, 4]
    assert batch.mask.tolist() == [[False, True, False], [False, False, True]]


def comb(rows, length, step):
    """Row ``i`` shares ``i * step`` tokens with all that follow."""

    def row(i):
        return [*range(100_000, 100_000 + i * step), *range(i * length, (i + 1) * length - i * step)]

    return rows_of([row(i) for i in range(rows)])


def test_beginnings_that_save_too_little_are_not_shared():
    """One token more in common with each row: 31 rectangles of up to 8,000 queries would save 466 tokens."""
    batch = pack(*comb(32, 256, 1))
    assert batch.token_ids.shape == (1, 32 * 256)
    with SHARE_ALL:
        assert pack(*comb(32, 256, 1)).token_ids.shape == (1, 32 * 256 - sum(range(31)))


def test_what_saves_enough_is_shared_below_and_above_what_does_not():
    prompt, answers = list(range(100)), [[500 + i, *range(1000 * i, 1000 * i + 300)] for i in range(6)]
    chance = [[*prompt, 7, *answer] if i < 2 else [*prompt, *answer] for i, answer in enumerate(answers)]
    twice = [*chance, [*chance[0][:200], 9, 9]]
    batch = pack(*rows_of(twice))
    # The 7 that two answers of 300 have in common is there twice; the prompt and half of an answer are there once.
    assert batch.token_ids.shape == (1, 100 + 2 + 6 * 301 + 2)


@given(forests(), st.integers(1, 80))
def test_micro_batches_hold_every_row_once_and_no_more_than_they_may(rows, max_tokens):
    parts = micro_batches(rows.token_ids, rows.lengths, max_tokens)
    assert sorted(row for part in parts for row in part.tolist()) == list(range(len(rows.lengths)))
    for part in parts:
        assert part.dtype == torch.int64
        unique = len(beginnings(Rows(*(tensor[part] for tensor in rows))))
        assert unique <= max(max_tokens, int(rows.lengths[part].max()))


def test_rows_with_a_common_beginning_meet():
    prompts = [[g] * 50 for g in range(4)]
    rows = rows_of([[*prompts[i % 4], 10 + i] for i in range(16)])  # groups interleaved
    parts = micro_batches(rows.token_ids, rows.lengths, 54)
    assert [sorted(part.tolist()) for part in parts] == [list(range(g, 16, 4)) for g in range(4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": torch.tensor([2, 0])}, "row 1 has length 0, expected 1 to 3"),
        ({"lengths": torch.tensor([4, 1])}, "row 0 has length 4, expected 1 to 3"),
        ({"lengths": torch.tensor([1])}, "expected token_ids"),
        ({"token_ids": torch.zeros(0, 3, dtype=torch.long), "lengths": torch.zeros(0, dtype=torch.long)}, "expected"),
        ({"mask": torch.ones(2, 2, dtype=torch.bool)}, "give a flag per token"),
    ],
)
def test_rows_that_do_not_fit_are_refused(change, message):
    good = {"token_ids": torch.ones(2, 3, dtype=torch.long), "lengths": torch.tensor([3, 1])}
    good["mask"] = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TrainingError, match=message):
        pack(**good | change)


def test_a_device_without_tree_attention_is_refused():
    with pytest.raises(ConfigError, match="meta"):
        pack(*rows_of([[1, 2]]), device="meta")
