"""Our formulas against numbers made by the reference implementations (verl, TRL, slime, Minimal-RL, ...).

A case is matched, or differs on purpose (``DELIBERATE`` says why, and the test asserts that it does), or is not covered
yet; a function or parameter that is in no list fails. ``AGENTRL_REFERENCE_CASES`` names another file of the same form.
The counts are printed at the end of the run by ``conftest.py``; the adapters are in ``tests/support/reference_*.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference_advantages
import reference_losses
import reference_rewards
import torch
from reference_harness import ATOL, RTOL, Case, Pair, load

ADAPTERS = reference_advantages.ADAPTERS | reference_losses.ADAPTERS | reference_rewards.ADAPTERS
DELIBERATE = reference_advantages.DELIBERATE | reference_losses.DELIBERATE | reference_rewards.DELIBERATE

NOT_COVERED = {
    # other estimators and losses
    "_calc_entropy/ln(vocab)",
    "_extract_content",
    "adv_estimator='tree'",
    "adv_estimator='tree_2norm'",
    "compute_cispo_loss",
    "compute_gae_advantage_return",
    "compute_gigpo_outcome_advantage",
    "compute_gpg_outcome_advantage",
    "compute_grpo_passk_outcome_advantage",
    "compute_maxrl_advantage",
    "compute_opo_outcome_advantage",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_entropy_balanced_clipping",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_gvpo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_reinforce",
    "compute_policy_loss_sapo",
    "compute_policy_loss_turn",
    "compute_raft_outcome_advantage",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_reinforce_rej_outcome_advantage",
    "compute_remax_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_value_loss",
    # sampler corrections
    "compute_opsm_mask",
    "compute_rollout_correction_weights",
    "compute_rollout_rejection_mask",
    "default_loss_fn",
    "dppo_policy_loss",
    "icepop_function",
    "ipo_loss_fn",
    "ppo_actor_loss_fn",
    "rollout_is_policy_loss",
    # rewards of particular environments
    "compute_score",
    "compute_score_em",
}


def is_covered(case: Case) -> bool:
    """Whether the project has something to compare with the case, going by its function and parameters."""
    return case.fn in ADAPTERS and reference_losses.is_covered(case)


CASES = load()


def test_every_case_has_an_adapter_or_is_listed(record_property: Callable[[str, object], None]) -> None:
    unknown = sorted({case.fn for case in CASES} - ADAPTERS.keys() - NOT_COVERED)
    assert not unknown, f"functions with neither an adapter nor an entry in NOT_COVERED: {unknown}"
    for _ in (case for case in CASES if not is_covered(case)):
        record_property("reference_case", "not covered")


@pytest.mark.parametrize("case", [case for case in CASES if is_covered(case)], ids=lambda case: case.id)
def test_case(case: Case, record_property: Callable[[str, object], None]) -> None:
    outcome = "FAILED"
    try:
        different = [check(name, pair) for name, pair in ADAPTERS[case.fn](case).items()]
        outcome = "deliberately different" if any(different) else "matched"
    finally:
        record_property("reference_case", outcome)


def check(name: str, pair: Pair) -> bool:
    """Asserts agreement, and disagreement where it is meant; returns whether there is any of the latter."""
    theirs = pair.theirs
    rtol, atol = RTOL[theirs.dtype], ATOL[theirs.dtype]
    ours = pair.ours.detach().to(theirs.dtype)
    differs = torch.zeros_like(theirs, dtype=torch.bool) if pair.differs is None else pair.differs
    torch.testing.assert_close(
        ours[~differs], theirs[~differs], rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )
    if not differs.any():
        return False
    assert pair.reason in DELIBERATE
    assert not torch.isclose(ours[differs], theirs[differs], rtol=rtol, atol=atol).any(), name
    return True
