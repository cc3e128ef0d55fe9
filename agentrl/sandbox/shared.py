"""One sandbox manager per event loop, shared by every episode that runs on it.

A manager owns a helper process or connections and is bound to the loop that started it. Tools reach it through
``shared_sandbox``; whoever owns the loop (``train``, ``evaluate``, a test) closes it with ``close_shared_sandboxes``
before the loop ends.
"""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

from agentrl.config import SandboxConfig
from agentrl.sandbox.base import Sandbox
from agentrl.sandbox.limit import LimitedSandbox
from agentrl.sandbox.local import LocalSandbox

_managers: WeakKeyDictionary[asyncio.AbstractEventLoop, LimitedSandbox] = WeakKeyDictionary()
_config = SandboxConfig()


def use_sandbox(config: SandboxConfig) -> None:
    """Choose the backend of the managers that are created from here on, in this process."""
    global _config
    _config = config


def make_sandbox(config: SandboxConfig) -> Sandbox:
    """A manager as configured.

    Raises:
        UserError: the backend's package is not installed, or there is no token for the server.
    """
    match config.backend:
        case "docker":
            from agentrl.sandbox.docker import DockerSandbox

            return DockerSandbox(engine=config.url or None)
        case "remote":
            from agentrl.sandbox.remote import RemoteSandbox

            return RemoteSandbox(config.url)
        case "local":
            return LocalSandbox()


def shared_sandbox() -> LimitedSandbox:
    """The running loop's manager, created on first use; it has at most ``sandbox.max_sessions`` sessions open at once.

    Raises:
        RuntimeError: no loop is running.
        IsolationUnavailable: this machine cannot isolate a session.
        UserError: the configured backend cannot be had.
    """
    loop = asyncio.get_running_loop()
    if loop not in _managers:
        _managers[loop] = LimitedSandbox(make_sandbox(_config), _config.max_sessions)
    return _managers[loop]


async def close_shared_sandboxes() -> None:
    """Close the running loop's manager and all its sessions. Safe to call when there is none."""
    manager = _managers.pop(asyncio.get_running_loop(), None)
    if manager is not None:
        await manager.close()
