"""Advantages that differ between the tokens of a leaf: returns, GAE, steps, shared tokens.

Index names: ``L`` leaves (one trajectory each), ``T`` tokens of the longest, ``U`` turns of the longest. ``mask[L, T]``
is bool and True on policy tokens. What is masked, tool results as much as padding, may hold anything, NaN included: it
is never read, and every result is 0 there.

Three rules hold throughout:

- **Tool spans are crossed.** The token after a tool result follows the token before it, and the span between is no
  step: it costs no discount. verl's REINFORCE++ stops at each masked token instead, so that a call to a tool is never
  credited with what comes after it; that is an option.
- **Statistics are those of what is passed**, so pass the whole optimizer step and never a micro-batch.
- **No spread, no signal**: whitening equal values gives exactly 0, as does a group or step group of one.

Everything is pure, on detached tensors, and keeps the dtype of its first argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Literal, get_args

import torch
from torch import Tensor

from agentrl.errors import ConfigError, TrainingError, UnknownName
from agentrl.learner.advantage import group_advantages, require_finite, within

EpisodeStatistic = Literal["trajectories", "steps"]


def token_rewards(rewards: Tensor, mask: Tensor, *, kl: Tensor | None = None, beta: float = 0.0) -> Tensor:
    """The reward on a leaf's last policy token, less ``beta * kl`` on every policy token.

    KL in the reward, as in PPO for language models (Ziegler et al. 2019, arXiv:1909.08593) and REINFORCE++ (Hu 2025,
    arXiv:2501.03262); the other place for it is the loss. Here the estimate is a number and not a gradient, so k1 is
    the usual choice: its expectation is the KL itself.

    Args:
        rewards: [L] finite.
        mask: [L, T] bool.
        kl: [L, T] in nats, for instance ``kl_penalty(old_logprobs, ref_logprobs, "k1")``.
        beta: the weight of ``kl``; 0 for none.

    Returns:
        [L, T]; a leaf without a policy token has only zeros.

    Raises:
        NonFiniteError: a reward, or ``kl`` on a policy token, is NaN or infinite.
        ConfigError: ``beta`` without ``kl``.
    """
    require_finite("rewards", rewards)
    if kl is None and beta:
        raise ConfigError(f"KL in the reward: expected kl per token with beta = {beta}, got none; set beta to 0.")
    last = mask & (mask.flip(-1).cumsum(-1).flip(-1) == 1)
    placed = torch.where(last, rewards.unsqueeze(-1), 0.0)
    return placed if kl is None else placed - beta * _known("kl", kl, mask)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Policy tokens to mean 0 and variance 1, ``(x - mean) / sqrt(var + eps)`` over the whole of ``values``.

    The variance is unbiased (n - 1), as in verl. Its means divide by ``n + 1e-8`` and ours by ``n``.

    Args:
        values: [L, T] (or any shape).
        mask: same shape, bool.
        eps: added to the variance; verl has 1e-8.

    Returns:
        Same shape. Exactly 0 everywhere if all policy tokens have the same value, or there is only one.

    Raises:
        NonFiniteError: a policy token's value is NaN or infinite.
    """
    kept = _known("values", values, mask)[mask]
    if len(kept) < 2 or kept.min() == kept.max():
        return torch.zeros_like(values)
    variance, mean = torch.var_mean(kept, correction=1)
    if variance + eps == 0:  # different values whose squared differences underflow
        return torch.zeros_like(values)
    return torch.zeros_like(values).masked_scatter(mask, (kept - mean) * (variance + eps).rsqrt())


def returns_to_go(token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, cross_holes: bool = True) -> Tensor:
    """The discounted reward from each token on, ``G_t = r_t + gamma * G_next``.

    ``next`` is the next policy token, with any tool result between them skipped: gamma counts policy tokens. Without
    ``cross_holes`` the sum ends where a policy token is followed by anything else, which is what verl's REINFORCE++
    does; then only the last run of policy tokens sees an outcome reward.

    Args:
        token_rewards: [L, T], on policy tokens; see the function of that name.
        mask: [L, T] bool.
        gamma: in [0, 1]; 1 in REINFORCE++ for language models.
        cross_holes: whether returns cross tool results.

    Returns:
        [L, T], 0 where masked.

    Raises:
        NonFiniteError: a policy token's reward is NaN or infinite.
    """
    rewards = _known("token rewards", token_rewards, mask)
    returns = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        own = mask[:, t]
        running = torch.where(own, rewards[:, t] + gamma * running, running if cross_holes else 0.0)
        returns[:, t] = torch.where(own, running, 0.0)
    return returns


def reinforce_pp(
    token_rewards: Tensor, mask: Tensor, *, gamma: float = 1.0, cross_holes: bool = True, eps: float = 1e-8
) -> Tensor:
    """``returns_to_go``, whitened over all policy tokens of the batch.

    REINFORCE++ (Hu 2025, arXiv:2501.03262): the baseline is the batch's mean, so one answer per task will do. KL goes
    into the rewards, with ``token_rewards``.

    Args:
        token_rewards: [L, T], on policy tokens.
        mask: [L, T] bool.
        gamma: see ``returns_to_go``.
        cross_holes: see ``returns_to_go``; False is verl's.
        eps: see ``whiten``.

    Returns:
        [L, T], 0 where masked, summing to 0; 0 everywhere if all returns are equal.

    Raises:
        NonFiniteError: a policy token's reward is NaN or infinite.
    """
    return whiten(returns_to_go(token_rewards, mask, gamma=gamma, cross_holes=cross_holes), mask, eps=eps)


def reinforce_pp_baseline(rewards: Tensor, group: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``r - mean`` within the group, on every policy token of the leaf, whitened over those of the batch.

    REINFORCE++-baseline (arXiv:2501.03262): GRPO with the batch's standard deviation for the group's. A leaf of a group
    that says nothing enters the whitening as 0 and so leaves it slightly off 0, where long leaves were better or worse
    than their siblings; drop such groups beforehand to have none of that. verl enters the raw reward for a group of
    one, which moves the mean and deviation of the whole batch.

    Args:
        rewards: [L] finite.
        group: [L] int64.
        mask: [L, T] bool.
        eps: see ``whiten``.

    Returns:
        [L, T], 0 where masked, summing to 0; 0 everywhere if no group has two different rewards.

    Raises:
        NonFiniteError: a reward is NaN or infinite.
    """
    centered = group_advantages(rewards, group, normalize_std=False)
    return whiten(centered.unsqueeze(-1).expand(mask.shape), mask, eps=eps)


def gae(
    token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: ``A_t = delta_t + gamma * lam * A_next``, over policy tokens.

    Schulman et al. 2015 (arXiv:1506.02438, equation 16), ``delta_t = r_t + gamma * V_next - V_t``. ``next`` is the next
    policy token; past the last one value and advantage are 0. So value and trace are carried across tool results
    unchanged, as in verl (the fork of it that ARPO uses does not, and takes the value *of* the tool's tokens).

    Nothing is whitened: apply ``whiten`` to the advantages, as PPO does, and fit the value to the returns as they are.

    Args:
        token_rewards: [L, T], on policy tokens.
        values: [L, T], the value of the state in which each token was sampled.
        mask: [L, T] bool.
        gamma: discount per policy token, in [0, 1].
        lam: in [0, 1]; 1 gives ``returns_to_go - values``, 0 the one-step error.

    Returns:
        Advantages and returns ``A + V``, both [L, T], 0 where masked.

    Raises:
        NonFiniteError: a policy token's reward or value is NaN or infinite.
    """
    rewards, known = _known("token rewards", token_rewards, mask), _known("values", values, mask)
    advantages = torch.zeros_like(rewards)
    next_value = trace = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        own = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - known[:, t]
        trace = torch.where(own, delta + gamma * lam * trace, trace)
        next_value = torch.where(own, known[:, t], next_value)
        advantages[:, t] = torch.where(own, trace, 0.0)
    return advantages, advantages + known


def gigpo(
    rewards: Tensor,
    group: Tensor,
    turn: Tensor,
    anchor: Tensor,
    step_rewards: Tensor,
    *,
    gamma: float = 0.95,
    step_weight: float = 1.0,
    normalize_std: bool = False,
    statistic: EpisodeStatistic = "trajectories",
    eps: float = 1e-6,
) -> Tensor:
    """GRPO's advantage of the whole episode, plus that of each turn among the turns taken from the same state.

    GiGPO (Feng et al. 2025, arXiv:2505.10978): ``A = A_episode + step_weight * A_step``. A turn's return is ``R_u = r_u
    + gamma * R_(u+1)``. A_step compares returns within a step group: the turns of a task with the same anchor, the
    state in which the turn began, be they of one leaf or several. A step group of one gets 0.

    The paper takes the episode's mean and deviation over trajectories (equation 3). The released code takes them over
    *turns* by default, so that long trajectories weigh more: ``statistic="steps"``.

    Args:
        rewards: [L] finite, of the whole episode.
        group: [L] int64.
        turn: [L, T] int64, which turn of its path a policy token belongs to, counted from 0; -1 elsewhere.
        anchor: [L, U] int64, the state in which each turn began (``anchor_ids``), compared within a task only; -1
            where the state is unknown, which gives that turn 0 as A_step.
        step_rewards: [L, U], the reward of each turn; not read beyond a leaf's last turn.
        gamma: discount per turn, in [0, 1].
        step_weight: weight of A_step.
        normalize_std: divide both terms by the group's standard deviation: the code's ``mean_std_norm``, where
            ``mean_norm`` is its default.
        statistic: "trajectories" (the paper) or "steps" (the code).
        eps: see ``group_advantages``.

    Returns:
        [L, T], 0 where ``turn`` is -1.

    Raises:
        NonFiniteError: a reward, or the reward of a turn, is NaN or infinite.
        UnknownName: no such statistic.
        TrainingError: a turn is missing from ``anchor`` and ``step_rewards``.
    """
    if statistic not in get_args(EpisodeStatistic):
        raise UnknownName("episode statistic", statistic, get_args(EpisodeStatistic))
    turns = turn.amax(-1) + 1
    if (turns > anchor.shape[1]).any():
        raise TrainingError(f"turn: expected numbers below U = {anchor.shape[1]}, got {int(turns.max()) - 1}.")
    taken = torch.arange(anchor.shape[1], device=turn.device) < turns.unsqueeze(-1)
    require_finite("rewards", rewards)
    per_step = _known("step rewards", step_rewards, taken, "turn")
    episode = rewards.new_zeros(rewards.shape)
    if statistic == "trajectories":
        episode = group_advantages(rewards, group, normalize_std=normalize_std, eps=eps)
    else:
        leaf = taken.nonzero()[:, 0]
        episode[leaf] = group_advantages(rewards[leaf], group[leaf], normalize_std=normalize_std, eps=eps)
    known = taken & (anchor >= 0)
    returns = returns_to_go(per_step, taken, gamma=gamma)[known]
    step_group = within(group.unsqueeze(-1).expand(anchor.shape)[known], anchor[known])
    step = torch.zeros_like(per_step).masked_scatter(
        known, group_advantages(returns, step_group, normalize_std=normalize_std, eps=eps)
    )
    per_turn = episode.unsqueeze(-1) + step_weight * step
    return torch.where(turn >= 0, per_turn.gather(1, turn.clamp(min=0)), 0.0)


def anchor_ids(states: Sequence[Sequence[str]], group: Sequence[int], *, similarity: float | None = None) -> Tensor:
    """Numbers the states in which turns began, so that equal or similar states of a task share a number.

    The anchors of GiGPO (arXiv:2505.10978). With ``similarity`` a state joins the first earlier state of its task, in
    the order given, whose ``difflib`` ratio with it is at least that (0.95 in the released code, 0.9 for its search
    tasks); if there is none it starts a number of its own. That takes time quadratic in the turns of a task.

    Args:
        states: for each leaf, one text for each turn.
        group: which task each leaf belongs to.
        similarity: in (0, 1); None for equal texts only.

    Returns:
        [L, U] int64 from 0, no number in two tasks; -1 beyond a leaf's last turn.

    Raises:
        ConfigError: ``similarity`` is out of range.
    """
    if similarity is not None and not 0 < similarity < 1:
        raise ConfigError(f"anchor similarity: expected a ratio between 0 and 1, or none for equal, got {similarity}.")
    exact: dict[tuple[int, str], int] = {}
    founders: dict[int, list[tuple[SequenceMatcher[str], int]]] = {}
    ids = torch.full((len(states), max((len(leaf) for leaf in states), default=0)), -1)
    fresh = 0
    for row, (leaf, task) in enumerate(zip(states, group, strict=True)):
        for u, state in enumerate(leaf):
            found = exact.get((task, state))
            if found is None and similarity is not None:
                found = _similar(state, founders.setdefault(task, []), similarity)
            if found is None:
                found, fresh = fresh, fresh + 1
                if similarity is not None:
                    founders[task].append((SequenceMatcher(None, b=state), found))
            exact[task, state] = found
            ids[row, u] = found
    return ids


def shared_mean(advantages: Tensor, token_id: Tensor) -> Tensor:
    """Gives a token that several leaves share the mean of their advantages.

    The hard form of ARPO's advantage (Dong et al. 2025, arXiv:2507.19849). The soft form, the paper's default and all
    that its code has, leaves each copy its leaf's advantage: ``advantages`` as they are. The two have the same gradient
    while no ratio is clipped and all copies of a token weigh the same, as in a mean over tokens; averaged per answer,
    soft credit weighs the copies in short answers more.

    Args:
        advantages: [L], the same for all tokens of a leaf, or [L, T].
        token_id: [L, T] int64; equal numbers are the same token of the rollout tree, -1 is masked.

    Returns:
        [L, T], 0 where masked; unchanged for the tokens of one leaf.

    Raises:
        NonFiniteError: an advantage is NaN or infinite.
    """
    mask = token_id >= 0
    spread = advantages.unsqueeze(-1).expand(token_id.shape) if advantages.dim() == 1 else advantages
    kept = _known("advantages", spread, mask)[mask]
    _, index, count = torch.unique(token_id[mask], return_inverse=True, return_counts=True)
    total = kept.new_zeros(len(count)).index_add(0, index, kept)
    return kept.new_zeros(token_id.shape).masked_scatter(mask, (total / count)[index])


def entropy_scaled(advantages: Tensor, entropies: Tensor, mask: Tensor, *, weight: float = 0.2) -> Tensor:
    """Weighs up the advantage where the policy was uncertain, ``A * (1 + weight * (H - mean) / std)``.

    AEPO (Dong et al. 2025, arXiv:2510.14545). Mean and deviation (unbiased) are over the policy tokens passed; the
    released code takes those of the micro-batch, so that a token's advantage depends on its neighbours in memory. The
    factor is negative for entropies more than ``1 / weight`` deviations below the mean.

    Args:
        advantages: [L], the same for all tokens of a leaf, or [L, T].
        entropies: [L, T] in any unit, of the distribution each token was drawn from; no gradient flows into it.
        mask: [L, T] bool.
        weight: 0.2 in the released code.

    Returns:
        [L, T], 0 where masked; the advantages themselves if all entropies are equal or there is one token.

    Raises:
        NonFiniteError: a policy token's advantage or entropy is NaN or infinite.
    """
    spread = advantages.unsqueeze(-1).expand(mask.shape) if advantages.dim() == 1 else advantages
    return _known("advantages", spread, mask) * (1 + weight * whiten(entropies.detach(), mask, eps=0.0))


def _known(name: str, values: Tensor, mask: Tensor, column: str = "token") -> Tensor:
    """``values`` with 0 where masked, finite."""
    known = values.masked_fill(~mask, 0.0)
    require_finite(name, known, column)
    return known


def _similar(state: str, founders: list[tuple[SequenceMatcher[str], int]], threshold: float) -> int | None:
    for matcher, number in founders:
        matcher.set_seq1(state)
        # the quick ratios are upper bounds, so that most pairs are told apart in linear time
        if all(r() >= threshold for r in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio)):
            return number
    return None
