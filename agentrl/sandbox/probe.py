"""Whether this machine's isolation holds, found out by trying to break it from inside a session."""

from __future__ import annotations

import json
from pathlib import Path

from agentrl.errors import SandboxError
from agentrl.sandbox.base import Limits, Session

LIMITS = Limits(processes=8, scratch_bytes=1024 * 1024, file_bytes=512 * 1024)
"""Small ones, so that reaching them takes no time."""
_SECONDS = 20.0
_passed = False


def passed() -> bool:
    """Whether an audit in this process has found nothing missing."""
    return _passed


async def audit(session: Session) -> list[str]:
    """Run the hostile program ``audit.py`` in a session opened with ``LIMITS``.

    Returns:
        The mechanisms that did not hold; empty when all of them did, which is remembered for this process.

    Raises:
        SandboxError: the program itself did not come to its end.
    """
    global _passed
    result = await session.exec(Path(__file__).with_name("audit.py").read_text(), _SECONDS)
    try:
        missing = json.loads(result.output)
    except ValueError as error:
        raise SandboxError(f"the sandbox's self-test did not finish: {result.status}\n{result}") from error
    _passed = not missing
    return [str(name) for name in missing]
