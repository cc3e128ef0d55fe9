from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_harness import as_tensor, load, with_verl_eps
from torch import Tensor

from agentrl.errors import ConfigError, NonFiniteError, TrainingError, UnknownName
from agentrl.learner.advantage import group_advantages
from agentrl.learner.credit import (
    anchor_ids,
    entropy_scaled,
    gae,
    gigpo,
    reinforce_pp,
    reinforce_pp_baseline,
    returns_to_go,
    shared_mean,
    token_rewards,
    whiten,
)

torch.set_num_threads(1)
PROPERTY = settings(deadline=None, max_examples=60)  # torch's first call is slow; pytest-timeout guards the whole
NAN = float("nan")
F64 = torch.float64
ONES = torch.ones(2, 3, dtype=torch.bool)
TASK = torch.zeros(2, dtype=torch.int64)


def random_batch(seed: int, leaves: int = 4, tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Two tensors of numbers and a mask with holes; NaN where masked. The first leaf has tokens."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(leaves, tokens, generator=generator) < 0.6
    mask[0, :2] = True
    first, second = torch.randn(2, leaves, tokens, generator=generator, dtype=F64)
    return first.masked_fill(~mask, NAN), second.masked_fill(~mask, NAN), mask


SEEDS = st.integers(0, 10_000)


def test_the_reward_is_on_the_last_policy_token_and_kl_on_each() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    rewards = torch.tensor([1.0, -2.0, 5.0], dtype=F64)
    assert token_rewards(rewards, mask).tolist() == [[0, 0, 1, 0], [0, 0, 0, -2], [0, 0, 0, 0]]
    kl = torch.tensor([[1, NAN, 2, NAN], [1, 2, 3, 4], [NAN] * 4], dtype=F64)
    expected = [[-0.5, 0, 0, 0], [-0.5, -1, -1.5, -4], [0, 0, 0, 0]]
    assert token_rewards(rewards, mask, kl=kl, beta=0.5).tolist() == expected
    with pytest.raises(ConfigError, match=r"beta = 0\.5, got none"):
        token_rewards(rewards, mask, beta=0.5)


@PROPERTY
@given(SEEDS)
def test_whitened_tokens_have_mean_zero_and_unbiased_variance_one(seed: int) -> None:
    values, _, mask = random_batch(seed)
    white = whiten(values * 3 + 1, mask, eps=0.0)
    torch.testing.assert_close(white[mask].mean(), torch.zeros((), dtype=F64))
    torch.testing.assert_close(white[mask].var(), torch.ones((), dtype=F64))
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(white, whiten(values, mask, eps=0.0))  # blind to shift and scale
    centred = values[mask] - values[mask].mean()
    damped = centred / (centred.square().sum() / (len(centred) - 1) + 0.7).sqrt()
    torch.testing.assert_close(whiten(values, mask, eps=0.7)[mask], damped)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_whitening_without_spread_is_exactly_zero(kept: int) -> None:
    mask = torch.arange(4).expand(1, 4) < kept
    assert whiten(torch.full((1, 4), 0.1, dtype=F64), mask, eps=0.0).tolist() == [[0.0] * 4]
    tiny = torch.tensor([[1e-200, 2e-200, 0.0, 0.0]], dtype=F64)  # squares underflow to 0
    assert whiten(tiny, mask, eps=0.0).tolist() == [[0.0] * 4]


def policy_tokens(mask: Tensor, leaf: int) -> list[int]:
    return mask[leaf].nonzero().flatten().tolist()


@PROPERTY
@given(SEEDS, st.sampled_from([0.0, 0.5, 0.97, 1.0]))
def test_returns_are_discounted_sums_over_policy_tokens(seed: int, gamma: float) -> None:
    rewards, _, mask = random_batch(seed)
    crossing = returns_to_go(rewards, mask, gamma=gamma)
    stopping = returns_to_go(rewards, mask, gamma=gamma, cross_holes=False)
    expected = torch.zeros(2, *mask.shape, dtype=F64)
    for leaf in range(len(mask)):
        own = policy_tokens(mask, leaf)
        for i, t in enumerate(own):
            run = [s for j, s in enumerate(own[i:]) if s == t + j]
            for kind, later in enumerate((own[i:], run)):
                expected[kind, leaf, t] = sum(gamma**j * rewards[leaf, s] for j, s in enumerate(later))
    torch.testing.assert_close(crossing, expected[0])
    torch.testing.assert_close(stopping, expected[1])


@PROPERTY
@given(SEEDS, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([0.0, 0.95, 1.0]))
def test_gae_is_the_weighted_sum_of_the_errors_ahead(seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = random_batch(seed)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    expected = torch.zeros(mask.shape, dtype=F64)
    for leaf in range(len(mask)):
        own = policy_tokens(mask, leaf)
        value = [values[leaf, t].item() for t in own] + [0.0]
        errors = [rewards[leaf, t].item() + gamma * value[i + 1] - value[i] for i, t in enumerate(own)]
        for i, t in enumerate(own):
            expected[leaf, t] = sum((gamma * lam) ** j * e for j, e in enumerate(errors[i:]))
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, (expected + values).masked_fill(~mask, 0.0))
    if lam == 1.0:
        torch.testing.assert_close(returns, returns_to_go(rewards, mask, gamma=gamma))


def test_reinforce_pp_is_the_whitened_return() -> None:
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    rewards = token_rewards(torch.tensor([1.0, 0.0], dtype=F64), mask)
    crossed = reinforce_pp(rewards, mask, eps=0.0)  # returns 1, 1, 0, 0: mean 1/2, deviation sqrt(1/3)
    high = 0.5 * 3**0.5
    torch.testing.assert_close(crossed, torch.tensor([[high, 0, high], [-high, -high, 0]], dtype=F64))
    stopped = reinforce_pp(rewards, mask, cross_holes=False, eps=0.0)  # returns 0, 1, 0, 0: what verl has
    torch.testing.assert_close(stopped, torch.tensor([[-0.5, 0, 1.5], [-0.5, -0.5, 0]], dtype=F64))
    assert reinforce_pp(token_rewards(torch.tensor([0.1, 0.1]), mask), mask).tolist() == [[0.0] * 3] * 2


@PROPERTY
@given(SEEDS)
def test_reinforce_pp_baseline_is_centred_in_the_group_and_scaled_by_the_batch(seed: int) -> None:
    _, _, mask = random_batch(seed)
    rewards = torch.tensor([1.0, 0.0, 0.25, 7.0], dtype=F64)
    group = torch.tensor([0, 0, 0, 1])  # leaf 3 is alone: its reward must not matter
    advantages = reinforce_pp_baseline(rewards, group, mask)
    assert torch.equal(advantages, reinforce_pp_baseline(rewards + 99 * (group == 1), group, mask))
    tokens = [(r, t) for r, row in enumerate(mask.tolist()) for t, own in enumerate(row) if own]
    centred = [0.0 if r == 3 else (rewards[r] - rewards[:3].mean()).item() for r, _ in tokens]
    mean = sum(centred) / len(centred)
    variance = sum((x - mean) ** 2 for x in centred) / (len(centred) - 1)
    for (r, t), x in zip(tokens, centred, strict=True):
        assert advantages[r, t].item() == pytest.approx((x - mean) / (variance + 1e-8) ** 0.5, rel=1e-9, abs=1e-9)


def test_reinforce_pp_baseline_without_an_informative_group_is_zero() -> None:
    mask = torch.ones(3, 2, dtype=torch.bool)
    rewards = torch.tensor([0.1, 0.1, 9.0])
    assert reinforce_pp_baseline(rewards, torch.tensor([0, 0, 1]), mask).tolist() == [[0.0, 0.0]] * 3


Steps = list[tuple[int, float, list[tuple[int, float]]]]
"""(task, reward, (anchor, reward) of each turn) of each leaf."""

EPISODES: st.SearchStrategy[Steps] = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(-2, 2).map(float),
        st.lists(st.tuples(st.integers(-1, 2), st.integers(-2, 2).map(float)), max_size=4),
    ),
    min_size=1,
    max_size=6,
)


def gigpo_by_hand(leaves: Steps, gamma: float, weight: float, statistic: str) -> list[list[float]]:
    """Means only, with plain loops."""

    def relative(own: float, others: list[float]) -> float:
        return own - sum(others) / len(others)

    def discounted(steps: list[tuple[int, float]]) -> float:
        return sum(gamma**j * reward for j, (_, reward) in enumerate(steps))

    returns = [[discounted(steps[u:]) for u in range(len(steps))] for *_, steps in leaves]
    result = []
    for i, (task, reward, steps) in enumerate(leaves):
        weights = [1 if statistic == "trajectories" else len(s) for *_, s in leaves]
        siblings = [r for w, (g, r, _) in zip(weights, leaves, strict=True) if g == task for _ in range(w)]
        row = []
        for u, (anchor, _) in enumerate(steps):
            same = [
                returns[k][v]
                for k, (g, _, other) in enumerate(leaves)
                for v, (a, _) in enumerate(other)
                if g == task and a == anchor >= 0
            ]
            row.append(relative(reward, siblings) + weight * (relative(returns[i][u], same) if same else 0.0))
        result.append(row)
    return result


@PROPERTY
@given(EPISODES, st.sampled_from([0.5, 0.95, 1.0]), st.sampled_from(["trajectories", "steps"]))
def test_gigpo_is_what_plain_loops_give(leaves: Steps, gamma: float, statistic: str) -> None:
    width = max(1, *(len(steps) for *_, steps in leaves), 1)
    filler = [(-1, NAN)] * width  # what lies beyond the last turn is not read
    rewards = torch.tensor([reward for _, reward, _ in leaves], dtype=F64)
    group = torch.tensor([task for task, *_ in leaves])
    padded = [(steps + filler)[:width] for *_, steps in leaves]
    anchor = torch.tensor([[a for a, _ in row] for row in padded])
    step_rewards = torch.tensor([[r for _, r in row] for row in padded], dtype=F64)
    # two tokens a turn, each turn followed by a tool result
    turn = torch.full((len(leaves), 3 * width), -1)
    for row, (*_, steps) in enumerate(leaves):
        for u in range(len(steps)):
            turn[row, 3 * u : 3 * u + 2] = u
    found = gigpo(rewards, group, turn, anchor, step_rewards, gamma=gamma, step_weight=0.5, statistic=statistic)  # type: ignore[arg-type]
    assert (found[turn < 0] == 0).all()
    expected = gigpo_by_hand(leaves, gamma, 0.5, statistic)
    for row, per_turn in enumerate(expected):
        for u, advantage in enumerate(per_turn):
            assert found[row, 3 * u : 3 * u + 2].tolist() == pytest.approx([advantage] * 2, abs=1e-9)


def test_gigpo_divides_both_terms_by_their_own_deviation() -> None:
    rewards = torch.tensor([1.0, 0.0], dtype=F64)
    turn = anchor = torch.zeros(2, 1, dtype=torch.int64)
    found = gigpo(rewards, TASK, turn, anchor, 10 * rewards.unsqueeze(-1), normalize_std=True, eps=0.0)
    torch.testing.assert_close(found, torch.tensor([[2**0.5], [-(2**0.5)]], dtype=F64))


def test_gigpo_without_comparison_is_exactly_zero() -> None:
    rewards = torch.tensor([0.1, 0.1, 0.1, 5.0], dtype=F64)
    group = torch.tensor([0, 0, 0, 1])  # equal rewards, equal steps; and an episode alone
    turn = torch.zeros(4, 2, dtype=torch.int64)
    step_rewards = torch.full((4, 1), 0.1, dtype=F64)
    for statistic in ("trajectories", "steps"):
        found = gigpo(rewards, group, turn, torch.zeros(4, 1).long(), step_rewards, statistic=statistic)  # type: ignore[arg-type]
        assert found.tolist() == [[0.0, 0.0]] * 4


def test_gigpo_refuses_what_it_cannot_read() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    turn, anchor, steps = torch.tensor([[0, 1]]), torch.zeros(1, 1).long(), torch.zeros(1, 1)
    with pytest.raises(TrainingError, match="expected numbers below U = 1, got 1"):
        gigpo(torch.zeros(1), one, turn, anchor, steps)
    with pytest.raises(NonFiniteError, match=r"step rewards: .* at leaf 0, turn 0"):
        gigpo(torch.zeros(1), one, turn[:, :1], anchor, steps + NAN)
    with pytest.raises(NonFiniteError, match=r"rewards: .* at leaf 0"):
        gigpo(torch.zeros(1) + NAN, one, turn[:, :1], anchor, steps, statistic="steps")
    with pytest.raises(UnknownName, match="did you mean 'steps'"):
        gigpo(torch.zeros(1), one, turn[:, :1], anchor, steps, statistic="step")  # type: ignore[arg-type]


def test_equal_states_of_a_task_share_an_anchor() -> None:
    states = [["hall", "kitchen", "hall"], ["hall"], ["hall"]]
    assert anchor_ids(states, [0, 0, 1]).tolist() == [[0, 1, 0], [0, -1, -1], [2, -1, -1]]
    assert anchor_ids([], []).tolist() == []


@PROPERTY
@given(
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.text("ab", max_size=6), max_size=3)), max_size=4),
    st.sampled_from([0.3, 0.6, 0.95]),
)
def test_a_state_joins_the_first_founder_it_resembles(leaves: list[tuple[int, list[str]]], ratio: float) -> None:
    ids = anchor_ids([states for _, states in leaves], [task for task, _ in leaves], similarity=ratio)
    founders: list[tuple[int, str]] = []
    for (task, states), row in zip(leaves, ids.tolist(), strict=True):
        for state, found in zip(states, row, strict=False):
            alike = (
                i for i, (g, f) in enumerate(founders) if g == task and SequenceMatcher(None, state, f).ratio() >= ratio
            )
            expected = next(alike, len(founders))
            if expected == len(founders):
                founders.append((task, state))
            assert found == expected
        assert row[len(states) :] == [-1] * (len(row) - len(states))


@pytest.mark.parametrize("similarity", [0.0, 1.0, -0.1])
def test_similarity_out_of_range_is_refused(similarity: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        anchor_ids([["a"]], [0], similarity=similarity)


@PROPERTY
@given(SEEDS)
def test_shared_tokens_get_the_mean_of_their_leaves(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    advantages = torch.randn(4, dtype=F64, generator=generator)
    # leaves 0 and 1 share a random beginning, leaf 2 a part of it, leaf 3 nothing
    token_id = torch.arange(4 * 5).reshape(4, 5)
    cut, early = sorted(torch.randint(0, 6, (2,), generator=generator).tolist(), reverse=True)
    token_id[1, :cut] = token_id[0, :cut]
    token_id[2, :early] = token_id[0, :early]
    token_id[:, 2] = -1
    found = shared_mean(advantages, token_id)
    for leaf in range(4):
        for t in range(5):
            sharers = [k for k in range(4) if t != 2 and token_id[k, t] == token_id[leaf, t]]
            expected = sum(advantages[k].item() for k in sharers) / len(sharers) if sharers else 0.0
            assert found[leaf, t].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(found[3], torch.where(token_id[3] >= 0, advantages[3], 0.0))
    mask = token_id >= 0
    assert found.sum().item() == pytest.approx((advantages.unsqueeze(-1) * mask).sum().item(), abs=1e-9)
    assert torch.equal(found, shared_mean(advantages.unsqueeze(-1).expand(4, 5), token_id))


def test_entropy_scales_the_advantage_by_its_deviation() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    entropies = torch.tensor([[1.0, 2.0, NAN], [3.0, NAN, NAN]], dtype=F64, requires_grad=True)
    scaled = entropy_scaled(torch.tensor([2.0, -1.0], dtype=F64), entropies, mask)  # mean 2, deviation 1
    torch.testing.assert_close(scaled, torch.tensor([[1.6, 2.0, 0], [-1.2, 0, 0]], dtype=F64))
    assert not scaled.requires_grad
    same = entropy_scaled(torch.tensor([2.0, -1.0], dtype=F64), torch.full((2, 3), 0.1, dtype=F64), mask)
    assert same.tolist() == [[2, 2, 0], [-1, 0, 0]]


def test_entropy_scaling_gives_the_loss_of_aepos_code() -> None:
    (case,) = (c for c in load() if c.id == "aepo_clip0_adv1")
    mask, clip = case.mask(), case.params["cliprange"]
    advantages = entropy_scaled(case.tensor("advantages"), case.tensor("entropy"), mask)
    ratio = (case.tensor("log_prob") - case.tensor("old_log_prob")).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    loss = torch.where(advantages < 0, torch.minimum(loss, -advantages * 3.0), loss)
    mean = loss[mask].mean() * with_verl_eps(mask.sum())
    torch.testing.assert_close(mean, as_tensor(case.outputs["loss"]), rtol=1e-10, atol=0.0)


TAKES_TOKENS: dict[str, Callable[[Tensor], object]] = {
    "token_rewards": lambda x: token_rewards(torch.zeros(2), ONES, kl=x, beta=0.1),
    "whiten": lambda x: whiten(x, ONES),
    "returns_to_go": lambda x: returns_to_go(x, ONES),
    "reinforce_pp": lambda x: reinforce_pp(x, ONES),
    "gae, rewards": lambda x: gae(x, torch.zeros(2, 3), ONES),
    "gae, values": lambda x: gae(torch.zeros(2, 3), x, ONES),
    "shared_mean": lambda x: shared_mean(x, torch.arange(6).reshape(2, 3)),
    "entropy_scaled, advantages": lambda x: entropy_scaled(x, torch.zeros(2, 3), ONES),
    "entropy_scaled, entropies": lambda x: entropy_scaled(torch.zeros(2), x, ONES),
}


@pytest.mark.parametrize("name", TAKES_TOKENS)
@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_what_is_no_number_is_refused_by_position(name: str, bad: float) -> None:
    values = torch.zeros(2, 3)
    values[1, 2] = bad
    with pytest.raises(NonFiniteError, match="at leaf 1, token 2"):
        TAKES_TOKENS[name](values)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_an_unscored_leaf_is_refused(bad: float) -> None:
    rewards = torch.tensor([0.0, bad])
    with pytest.raises(NonFiniteError, match=r"rewards: .* at leaf 1"):
        token_rewards(rewards, ONES)
    with pytest.raises(NonFiniteError, match=r"rewards: .* at leaf 1"):
        reinforce_pp_baseline(rewards, TASK, ONES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    rewards, numbers = torch.tensor([0, 1], dtype=dtype), torch.rand(2, 3, dtype=dtype)
    results = [
        token_rewards(rewards, ONES, kl=numbers, beta=0.1),
        reinforce_pp(numbers, ONES),
        reinforce_pp_baseline(rewards, TASK, ONES),
        *gae(numbers, numbers, ONES),
        gigpo(rewards, TASK, torch.zeros(2, 3).long(), torch.zeros(2, 1).long(), rewards.unsqueeze(-1)),
        shared_mean(rewards, torch.arange(6).reshape(2, 3)),
        entropy_scaled(rewards, numbers, ONES),
    ]
    assert {result.dtype for result in results} == {dtype}
    assert {result.shape for result in results} == {ONES.shape}


def test_on_one_step_episodes_gigpo_counts_the_group_twice() -> None:
    # where every turn starts in the task's one state and has the episode's reward, A_step is A_episode
    rewards = torch.tensor([1.0, 0.0, 0.5], dtype=F64)
    group, turn = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64)
    found = gigpo(rewards, group, turn, torch.zeros(3, 1).long(), rewards.unsqueeze(-1))
    once = group_advantages(rewards, group, normalize_std=False)
    torch.testing.assert_close(found, 2 * once.unsqueeze(-1).expand(3, 4))
