"""The pytest fixture ``env_conformance``, for whoever writes an environment. Installed with agentrl.

::

    def test_conformance(env_conformance):
        asyncio.run(env_conformance(MyEnv))

It imports nothing of agentrl until it is used, so it costs other test suites nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from agentrl.conformance import Check


@pytest.fixture
def env_conformance() -> Callable[..., Awaitable[list[Check]]]:
    """A coroutine function that takes what ``check_env`` takes and raises ``AssertionError`` where a check fails."""
    return _conform


async def _conform(make: Callable[[], Any], **options: Any) -> list[Check]:
    """The checks of ``make``; raises ``AssertionError`` listing every one that failed."""
    from agentrl.conformance import check_env
    from agentrl.sandbox.shared import close_shared_sandboxes

    try:
        checks = await check_env(make, **options)
    finally:
        await close_shared_sandboxes()
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    if failed:
        raise AssertionError("the environment breaks its contract:\n  " + "\n  ".join(failed))
    return checks
