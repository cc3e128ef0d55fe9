"""Drawing a token: against a plain computation in float64, and as a pure function of seed and position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agentrl.sampler.draw import Manner, draw, streams, uniforms

LOGITS = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=st.floats(-30, 30, width=16))


def one(logits, temperature=1.0, top_p=1.0, uniform=0.5):
    logits = torch.as_tensor(logits, dtype=torch.float32)
    rows = len(logits)
    manner = Manner.of([temperature] * rows, [top_p] * rows)
    return draw(logits, manner, torch.full((rows,), uniform, dtype=torch.float64))


def nucleus(probs, top_p):
    kept, mass = set(), 0.0
    for index in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if mass >= top_p:
            break
        kept.add(index)
        mass += probs[index]
    return kept


@given(LOGITS, st.floats(0.1, 5), st.floats(0.05, 1), st.floats(0, 1, exclude_max=True))
def test_against_a_plain_computation(logits, temperature, top_p, uniform):
    drawn = one(logits, temperature, top_p, uniform)
    for row, token, logprob, entropy in zip(logits, *drawn, strict=True):
        scaled = row.astype(np.float64) / temperature
        probs = np.exp(scaled - scaled.max())
        probs /= probs.sum()
        kept = nucleus(probs, top_p)
        # Where two probabilities are equal to rounding, or the mass is, either nucleus is right.
        nearly = nucleus(probs, top_p - 1e-5) ^ nucleus(probs, top_p + 1e-5)
        least = min(probs[i] for i in kept)
        nearly |= {i for i, probability in enumerate(probs) if i not in kept and probability > least - 1e-6}
        assert int(token) in kept | nearly
        mass = sum(probs[i] for i in kept)
        if not nearly and len({round(float(p), 9) for p in probs}) == len(probs):
            assert float(logprob) == pytest.approx(math.log(probs[int(token)] / mass), abs=1e-4)
        expected = -sum(p * math.log(p) for p in probs if p > 0)
        assert float(entropy) == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20).filter(lambda p: sum(p) > 0.1), st.floats(0.2, 1))
def test_the_inverse_of_the_distribution(weights, top_p):
    """A grid of uniforms hits every token as often as its probability says."""
    probs = torch.tensor(weights) / sum(weights)
    grid = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    logits = probs.log().expand(2000, -1)
    drawn = draw(logits, Manner.of([1.0] * 2000, [top_p] * 2000), grid)
    share = torch.bincount(drawn.token_ids, minlength=len(weights)) / 2000
    # What a token is drawn with is what its log-prob says it was drawn with.
    for token in drawn.token_ids.unique():
        said = float(drawn.logprobs[drawn.token_ids == token][0].exp())
        assert said == pytest.approx(float(share[token]), abs=1.5e-3)
    if top_p == 1:
        assert torch.allclose(share, probs, atol=1.5e-3)


@given(LOGITS, st.integers(0, 3), st.floats(0.2, 1), st.floats(0, 1, exclude_max=True))
def test_rows_do_not_know_each_other(logits, row, top_p, uniform):
    row %= len(logits)
    temperatures = [0.0, 0.7, 1.0, 2.0][: len(logits)]
    mixed = [1.0, top_p, 0.9, 1.0][: len(logits)]
    each = torch.full((len(logits),), uniform, dtype=torch.float64)
    together = draw(torch.as_tensor(logits), Manner.of(temperatures, mixed), each)
    alone = one(logits[row : row + 1], temperatures[row], mixed[row], uniform)
    for both, single in zip(together, alone, strict=True):
        assert torch.equal(both[row : row + 1], single)


def test_the_ends_of_the_unit_interval_stay_on_possible_tokens():
    logits = [[-math.inf, 2.0, -math.inf, 1.0, -math.inf]]
    assert one(logits, uniform=0.0).token_ids.tolist() == [1]
    last = one(logits, uniform=1 - 2**-53)
    assert last.token_ids.tolist() == [3]
    assert math.isfinite(last.logprobs.item())
    assert one(logits, top_p=0.5, uniform=1 - 2**-53).token_ids.tolist() == [1]


def test_impossible_tokens_do_not_spoil_the_entropy():
    drawn = one([[-math.inf, 0.0, 0.0]])
    assert drawn.entropies.item() == pytest.approx(math.log(2))


def test_greedy_scores_the_untempered_softmax():
    drawn = one([[0.0, 1.0, 3.0]], temperature=0.0, top_p=0.1, uniform=0.0)
    expected = torch.tensor([0.0, 1.0, 3.0]).log_softmax(-1)
    assert drawn.token_ids.item() == 2
    assert drawn.logprobs.item() == pytest.approx(expected[2].item())
    assert drawn.entropies.item() == pytest.approx(float(-(expected.exp() * expected).sum()))


def test_a_nucleus_below_the_likeliest_token_keeps_just_that():
    drawn = one([[0.0, 5.0, 1.0]], top_p=1e-6, uniform=0.999)
    assert (drawn.token_ids.item(), drawn.logprobs.item()) == (1, 0.0)


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32))
def test_uniforms_are_a_pure_function(seed, position):
    first = uniforms(streams([seed]), [position])
    assert torch.equal(first, uniforms(streams([7, seed, 8]), [0, position, 1])[1:2])
    assert 0 <= first.item() < 1


def test_uniforms_are_uniform_and_unrelated():
    seeds, positions = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    grid = uniforms(streams(seeds.ravel().tolist()), positions.ravel().tolist()).numpy().reshape(200, 200)
    counts = np.histogram(grid, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 2000) ** 2 / 2000).sum()
    assert chi_square < 50, "19 degrees of freedom; 50 is beyond 1 in 10,000"
    centred = grid - 0.5
    for shifted in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1], centred * centred.T):
        assert abs(shifted.mean()) < 4 * (1 / 12) / math.sqrt(shifted.size / 2)
    assert len(np.unique(grid)) == grid.size
