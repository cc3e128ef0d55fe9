"""Our formulas against numbers made by the reference implementations (verl, TRL, slime, Minimal-RL, ...).

A case is matched, or differs on purpose (``DELIBERATE`` says why, and the test asserts that it does); a function or a
parameter without an adapter fails. ``AGENTRL_REFERENCE_CASES`` names another file of the same form.
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

CASES = load()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case(case: Case, record_property: Callable[[str, object], None]) -> None:
    outcome = "not covered"
    try:
        assert case.fn in ADAPTERS, f"{case.fn}: a function without an adapter in tests/support"
        outcome = "FAILED"
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
