from __future__ import annotations

import os
from pathlib import Path

import pytest
import pytest_asyncio

from agentrl.errors import IsolationUnavailable
from agentrl.sandbox import LocalSandbox
from agentrl.sandbox import session as session_module
from agentrl.sandbox.launcher import PROCESS_NAME


@pytest.fixture(autouse=True, scope="module")
def _short_grace():
    """Programs that ignore the interrupt would each cost a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "GRACE_SECONDS", 0.4)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sandbox():
    """One manager for all tests of a module."""
    async with LocalSandbox() as made:
        try:
            await (await made.open()).close()
        except IsolationUnavailable as error:
            pytest.skip(str(error))
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def session(sandbox):
    """A fresh session."""
    made = await sandbox.open(seed=1)
    yield made
    await made.close()


def processes_of(manager: int = 0) -> list[int]:
    """The zygotes and sessions that belong to the manager with this process id (default: this process)."""
    wanted = f'"manager": {manager or os.getpid()},'.encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if line.rstrip(b"\0").endswith(PROCESS_NAME.encode()) and wanted in line:
            found.append(int(entry.name))
    return found


@pytest.fixture
def processes():
    return processes_of
