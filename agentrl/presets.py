"""The published algorithms, each a handful of choices.

A preset is what an algorithm changes about DAPO's settings, the defaults of ``config.AlgorithmConfig``; keys given
beside ``algorithm.name`` override it, and a preset of one's own is a TOML file. The formulas are not here: every choice
names a function of ``agentrl.learner`` whose docstring has formula, shapes, defaults and source.

===================  ====================================================================================
key                  where its values are explained
===================  ====================================================================================
``estimator``        ``learner.advantage`` (one number per leaf), ``learner.credit`` (one per token)
``ratio``            ``learner.loss.log_ratio``
``surrogate``        ``learner.surrogate``
``aggregation``      ``learner.loss.aggregate``
``kl_estimator``     ``learner.loss.kl_penalty``
``correction``       ``learner.correction``
===================  ====================================================================================

Notation in the docstrings: ``A`` advantage, ``rho`` = pi / pi_old of a token, ``r`` reward, ``o`` answer, ``G`` group
size, ``sg`` stop-gradient. "Code" is the authors' released code, or verl's where a paper names verl; where it differs
from the paper, the preset has the paper's form and the docstring says how to get the code's.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

Choices = dict[str, Any]

PRESETS: dict[str, Callable[[], Choices]] = {}
"""Presets by name, in the order of ``agentrl algorithms``."""

PLAIN: Choices = {"clip_high": 0.2, "dynamic_sampling": False, "overlong_filter": False}
"""What papers before DAPO have in common: one clip, no filters."""


def preset(function: Callable[[], Choices]) -> Callable[[], Choices]:
    """Register ``function`` under its name."""
    PRESETS[function.__name__] = function
    return function


def summaries() -> dict[str, str]:
    """The first line of each preset's description."""
    return {name: (function.__doc__ or "").splitlines()[0] for name, function in PRESETS.items()}


def describe(name: str) -> str:
    """A preset's description and its choices, as one may write them into a TOML file."""
    choices = [f"{key} = {_toml(value)}" for key, value in PRESETS[name]().items()]
    return "\n".join([inspect.cleandoc(PRESETS[name].__doc__ or ""), "", "[algorithm]", f'name = "{name}"', *choices])


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    return json.dumps(value)


# -- group baselines --------------------------------------------------------------------------------------------------


@preset
def dapo() -> Choices:
    """DAPO, the default: GRPO with clip-higher, a mean over tokens, and no groups that teach nothing.

    Yu et al. 2025 (arXiv:2503.14476). GRPO's advantage; clip 0.2 below and 0.28 above; mean over all tokens of the
    step; no KL; groups without two different rewards are replaced; answers cut by the budget are left out. The released
    recipe has the soft overlong penalty (``overlong_buffer``) in place of the filter.
    """
    return {}


@preset
def grpo() -> Choices:
    """GRPO: every answer against the mean of its group, in standard deviations.

    Shao et al. 2024 (arXiv:2402.03300). ``A = (r - mean) / std`` over the group; PPO's clip at 0.2; mean over the
    tokens of an answer, then over answers. The paper adds 0.04 x KL (k3) to the starting policy; here as in TRL it is
    off until ``kl_coef`` is set. verl's GRPO averages over tokens (``aggregation = "token-mean"``). std is unbiased, as
    in verl and TRL.
    """
    return PLAIN | {"aggregation": "seq-mean-token-mean"}


@preset
def dr_grpo() -> Choices:
    """Dr. GRPO: GRPO without its two biases, the division by std and by the answer's length.

    Liu et al. 2025 (arXiv:2503.20783). ``A = r - mean``; token losses summed and divided by the constant
    ``rollout.max_tokens``, so that neither easy tasks nor short answers weigh more. verl divides by the padded length
    unless told a constant.
    """
    return PLAIN | {"normalize": "none", "aggregation": "seq-mean-token-sum-norm"}


@preset
def rloo() -> Choices:
    """RLOO: REINFORCE against the mean of the *other* answers.

    Ahmadian et al. 2024 (arXiv:2402.14740). ``A_i = r_i - mean of the others``, REINFORCE on the whole answer: ``-A
    sum_t log pi``, mean over answers. TRL's has a clipped ratio of whole answers, ``exp(sum_t log rho)``: ``surrogate =
    "clip"``, ``ratio = "sequence"``, ``surrogate_options = {reduce = "sum", gradient = "segment"}``, ``aggregation =
    "seq-mean-token-mean"``.
    """
    reinforce = {"surrogate": "reinforce", "aggregation": "seq-mean-token-sum"}
    return PLAIN | reinforce | {"estimator": "leave_one_out", "normalize": "none"}


@preset
def opo() -> Choices:
    """OPO: exactly on policy, against the length-weighted mean.

    Hao et al. 2025 (arXiv:2505.23585). ``A = r - sum(len r) / sum(len)`` over the group, ``-A log pi``, mean over
    tokens.
    """
    return PLAIN | {"estimator": "opo", "normalize": "none", "surrogate": "reinforce"}


@preset
def maxrl() -> Choices:
    """MaxRL: the centred reward over the success rate, which weighs up what is seldom solved.

    Tajwar et al. 2026 (arXiv:2602.02710). ``A = (r - mean) / mean``, rewards of 0 or more.
    """
    return PLAIN | {"estimator": "maxrl", "normalize": "none"}


@preset
def gpg() -> Choices:
    """GPG: the plain policy gradient of centred rewards.

    Chu et al. 2025 (arXiv:2504.02546). ``A = alpha (r - mean)``, alpha = leaves / leaves of groups with two rewards;
    ``-A log pi``, mean over tokens. verl counts the leaves whose reward is not 0 (``estimator_options = {valid =
    "nonzero"}``).
    """
    return PLAIN | {"estimator": "gpg", "normalize": "none", "surrogate": "reinforce"}


@preset
def pass_at_k() -> Choices:
    """Pass@k training: only the best of a group learns, by its lead.

    Tang et al. 2025 (arXiv:2503.19595). ``A = r_max - r_2nd`` for the best answer, 0 for the others. verl also divides
    by the group's standard deviation (``normalize = "group"``).
    """
    return PLAIN | {"estimator": "best_of_group", "normalize": "none"}


# -- another ratio or clip --------------------------------------------------------------------------------------------


@preset
def gspo() -> Choices:
    """GSPO: one ratio for a whole answer, clipped tightly.

    Zheng et al. 2025 (arXiv:2507.18071). ``s = exp(mean_t log rho)``, as ``sg(s) pi / sg(pi)`` per token; clip 3e-4 /
    4e-4; mean over tokens, then answers. Tree-GRPO's GSPO lets the gradient flow through the mean
    (``surrogate_options = {gradient = "segment"}``), has a dual clip of 3 and averages over tokens.
    """
    return PLAIN | {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq-mean-token-mean",
    }


@preset
def gmpo() -> Choices:
    """GMPO: the geometric mean of an answer's clipped ratios.

    Zhao et al. 2025 (arXiv:2507.20673). ``-A exp(mean_t d)``, where ``d`` is ``log rho`` clipped to
    +-0.4 on the side that A pushes to; mean over answers.
    """
    return PLAIN | {
        "surrogate": "gmpo",
        "clip_low": 0.4,
        "clip_high": 0.4,
        "aggregation": "seq-mean-token-mean",
    }


@preset
def cispo() -> Choices:
    """CISPO: the clip bounds a token's weight and never takes its gradient away.

    MiniMax-M1, 2025 (arXiv:2506.13585). ``-sg(min(rho, 1 + high)) A log pi``, mean over tokens. The bound is 5 in all
    (ScaleRL and TRL, as an absolute ratio); verl's example has 1.2 and slime 5.
    """
    return PLAIN | {"surrogate": "cispo", "clip_high": 4.0}


@preset
def sapo() -> Choices:
    """SAPO: a soft gate in place of the clip.

    2025 (arXiv:2511.20347). ``-A 4/tau sigmoid(tau (rho - 1))``, tau 1.0 for A > 0 and 1.05 for A < 0; mean over
    tokens, then answers.
    """
    return PLAIN | {"surrogate": "sapo", "aggregation": "seq-mean-token-mean"}


@preset
def luspo() -> Choices:
    """LUSPO: GSPO with an answer's loss multiplied by its length, against a leaning to short answers."""
    return gspo() | {"aggregation": "seq-mean-token-sum"}


@preset
def vespo() -> Choices:
    """VESPO: answers weighed by ``e^lam w^k e^(-lam w)`` of their ratio, smooth where a clip has edges."""
    return PLAIN | {"surrogate": "vespo"}


@preset
def dppo() -> Choices:
    """DPPO: tokens whose probability has moved too far lose their gradient, in place of a clip.

    arXiv:2602.04879. "Far" is ``|pi - pi_sampler| > 0.2`` (binary total variation) or, with ``surrogate_options = {kind
    = "kl"}``, a binary KL above 0.05.
    """
    return PLAIN | {"surrogate": "dppo"}


@preset
def ppo_unclipped_kl() -> Choices:
    """PPO-penalty over a group baseline: ``-A rho + beta KL(old, new)`` with beta adapted; see ppo_penalty."""
    return PLAIN | {"surrogate": "unclipped", "kl_reference": "old", "kl_coef": 1.0, "kl_target": 0.01}


# -- entropy ----------------------------------------------------------------------------------------------------------


@preset
def clip_cov() -> Choices:
    """Clip-Cov: no gradient for a few of the tokens through which entropy falls.

    Cui et al. 2025 (arXiv:2505.22617). Entropy falls through tokens where log-prob and advantage rise together: 2e-4 of
    the tokens, drawn from those with a covariance in (1, 5), get no gradient. Otherwise PPO's clip, mean over tokens.
    """
    return PLAIN | {"surrogate": "clip_cov"}


@preset
def kl_cov() -> Choices:
    """KL-Cov: a KL penalty on the few tokens through which entropy falls.

    Cui et al. 2025 (arXiv:2505.22617). ``-A rho`` without a clip; the 2e-4 of the tokens with the largest covariance
    also pay ``|log rho|``. The paper's coefficient is 1; verl's data class says 0.1, its fallback 1.
    """
    return PLAIN | {"surrogate": "kl_cov"}


@preset
def top_entropy() -> Choices:
    """DAPO on the 20 % most uncertain tokens (Wang et al. 2025, arXiv:2506.01939)."""
    return {"top_entropy": 0.2}


# -- sequences of rewards, and positive examples ----------------------------------------------------------------------


@preset
def reinforce_pp() -> Choices:
    """REINFORCE++: no group, but advantages whitened over the batch.

    Hu 2025 (arXiv:2501.03262). Returns of the rewards minus 0.01 x k1, whitened over the tokens of the batch; PPO's
    clip; mean over tokens. The return crosses tool results; verl's starts anew after each (``estimator_options =
    {cross_holes = false}``).
    """
    return PLAIN | {
        "estimator": "reinforce_pp",
        "normalize": "none",
        "kl_coef": 0.01,
        "kl_estimator": "k1",
        "kl_placement": "reward",
    }


@preset
def reinforce_pp_baseline() -> Choices:
    """REINFORCE++-baseline: the group's mean, the batch's standard deviation.

    Hu 2025 (arXiv:2501.03262). ``r - mean`` of the group, whitened over the batch's tokens. KL as a loss term with k2,
    whose slope is that of KL(pi, start).
    """
    return PLAIN | {
        "estimator": "reinforce_pp_baseline",
        "normalize": "none",
        "kl_coef": 0.01,
        "kl_estimator": "k2",
    }


@preset
def raft() -> Choices:
    """RAFT: fit the rewarded answers.

    Dong et al. 2023 (arXiv:2304.06767), Xiong et al. 2025 (arXiv:2504.11343). ``-r log pi`` for r > 0, mean over the
    tokens of those answers. The code's mean is over all tokens (``estimator_options = {keep_all = true}``). Code and
    paper take n = 4.
    """
    return PLAIN | {"estimator": "raft", "normalize": "none", "surrogate": "reinforce"}


@preset
def raft_pp() -> Choices:
    """RAFT++: RAFT with the importance ratio and PPO's clip (Xiong et al. 2025, arXiv:2504.11343).

    ``keep_all`` as in ``raft``. The code's dual clip of 3 does nothing here, as no advantage is negative.
    """
    return PLAIN | {"estimator": "raft", "normalize": "none"}


@preset
def reinforce_rej() -> Choices:
    """Reinforce-Rej: ``A = r``, without tasks all right or all wrong (Xiong et al. 2025, arXiv:2504.11343).

    Ratio and PPO's clip; mean over the tokens of the tasks that are left (the code's: of all, ``estimator_options =
    {keep_all = true}``). The paper has rewards of 1 and -1. The code keeps a group of one, and has a dual clip of 3.
    """
    return PLAIN | {"estimator": "reinforce_rej", "normalize": "none"}


@preset
def gvpo() -> Choices:
    """GVPO: the policy's implicit reward is fitted to the actual one, within each group.

    Zhang et al. 2025 (arXiv:2504.19599). ``1/2 (beta (R - mean R) - (r - mean r))^2 / (G - 1)`` with ``R = sum_t log
    rho``, beta 0.1, summed over a group, mean over groups. The code sums over groups too; the README has no ``G - 1``.
    """
    return PLAIN | {"normalize": "none", "surrogate": "gvpo", "aggregation": "seq-mean-token-mean"}


# -- turns and trees --------------------------------------------------------------------------------------------------


@preset
def gigpo() -> Choices:
    """GiGPO: a group baseline for episodes and one for steps.

    Feng et al. 2025 (arXiv:2505.10978). ``A = A_episode + A_step``, where a step is compared with the steps of its task
    that began in the same state (here: that read the same tool result), by their discounted return (gamma 0.95). Both
    are divided by their group's standard deviation; the code's default is not to (``normalize = "none"``), and to take
    the episode's statistics over turns (``estimator_options = {statistic = "steps"}``). KL 0.01.
    """
    return PLAIN | {"estimator": "gigpo", "normalize": "none", "kl_coef": 0.01}


@preset
def arpo() -> Choices:
    """ARPO with soft advantages: GRPO over the leaves of the tree.

    Dong et al. 2025 (arXiv:2507.19849). A shared token stands in every leaf's row with that leaf's advantage. Mean over
    tokens, clip 0.2, no KL. Branching belongs to ``rollout``.
    """
    return PLAIN


@preset
def arpo_hard() -> Choices:
    """ARPO with hard advantages: a shared token gets the mean advantage of the leaves below it.

    With the mean over tokens the gradient is that of the soft form but where the ratio is clipped. The released code
    has only the soft form.
    """
    return PLAIN | {"credit": "hard"}


@preset
def aepo() -> Choices:
    """AEPO: more weight and no lost gradient where the policy was uncertain.

    Dong et al. 2025 (arXiv:2510.14545). Advantages ``A (1 + 0.2 (H - mean) / std)``; and a token clipped from
    above keeps the gradient ``(1 + high) A grad log pi``. Dual clip 3, mean over tokens. As in the code, it acts on all
    tokens.
    """
    return PLAIN | {"credit": "entropy", "surrogate": "aepo", "dual_clip": 3.0}


@preset
def tree_grpo() -> Choices:
    """Tree-GRPO: advantage among all leaves of a task plus that within one tree.

    Ji et al. 2025 (arXiv:2509.21240). Both ``(r - mean) / std``; dual clip 3, KL 0.001 (k3), mean over tokens. A tree
    with one leaf has no inner one; the code takes its raw reward. The code's entropy bonus of 0.001 is
    ``entropy_coef``.
    """
    return PLAIN | {"estimator": "tree", "dual_clip": 3.0, "kl_coef": 0.001}


@preset
def tree_grpo_inter() -> Choices:
    """Tree-GRPO with the advantage among all leaves of a task only."""
    return tree_grpo() | {"estimator_options": {"intra": False}}


@preset
def tree_grpo_intra() -> Choices:
    """Tree-GRPO with the advantage within a tree only; the paper reports that it collapses."""
    return tree_grpo() | {"estimator_options": {"inter": False}}


# -- a critic ---------------------------------------------------------------------------------------------------------


@preset
def ppo() -> Choices:
    """PPO with a critic and GAE.

    Schulman et al. 2017 (arXiv:1707.06347), GAE: 2015 (arXiv:1506.02438). gamma = lambda = 1, advantages whitened over
    the batch's tokens, clip 0.2, value clip 0.5. Value and trace are carried across tool results, which are nobody's
    action; ARPO's fork of verl does not.
    """
    return PLAIN | {"estimator": "gae", "normalize": "none"}


@preset
def ppo_penalty() -> Choices:
    """PPO with an adaptive KL penalty in place of the clip, a critic and GAE.

    Schulman et al. 2017 (arXiv:1707.06347, section 4). ``-A rho + beta KL(old, new)``; beta is doubled after a step
    whose KL exceeds 1.5 x ``kl_target`` and halved after one below ``kl_target`` / 1.5.
    """
    return ppo() | ppo_unclipped_kl()
