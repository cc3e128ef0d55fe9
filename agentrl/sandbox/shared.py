"""One sandbox manager per event loop, shared by every episode that runs on it.

A manager owns a helper process and is bound to the loop that started it. Tools reach it through ``shared_sandbox``;
whoever owns the loop (``train``, ``evaluate``, a test) closes it with ``close_shared_sandboxes`` before the loop ends.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from agentrl.sandbox.local import LocalSandbox

_managers: WeakKeyDictionary[asyncio.AbstractEventLoop, LocalSandbox] = WeakKeyDictionary()


def shared_sandbox() -> LocalSandbox:
    """The running loop's manager, created on first use.

    Raises:
        RuntimeError: no loop is running.
        IsolationUnavailable: this machine cannot isolate a session.
    """
    loop = asyncio.get_running_loop()
    if loop not in _managers:
        _managers[loop] = LocalSandbox()
    return _managers[loop]


async def close_shared_sandboxes() -> None:
    """Close the running loop's manager and all its sessions. Safe to call when there is none."""
    manager = _managers.pop(asyncio.get_running_loop(), None)
    if manager is not None:
        await manager.close()
