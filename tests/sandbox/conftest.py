from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from pathlib import Path

import pytest
import pytest_asyncio

from agentrl.errors import IsolationUnavailable, UserError
from agentrl.sandbox import LocalSandbox, image, profile
from agentrl.sandbox import session as session_module
from agentrl.sandbox.docker import DockerSandbox
from agentrl.sandbox.engine import Engine
from agentrl.sandbox.launcher import PROCESS_NAME
from agentrl.sandbox.remote import RemoteSandbox
from agentrl.sandbox.serve import ServeOptions, serving


def pytest_runtest_setup(item):
    """Tests marked ``docker`` are skipped, with the reason, where there is no engine; `make test-docker` brings one."""
    if item.get_closest_marker("docker") and (reason := _no_docker()):
        if os.environ.get("AGENTRL_DOCKER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)


@lru_cache(maxsize=1)
def _no_docker() -> str | None:
    python = profile.load("python")
    try:
        engine = Engine()
        try:
            engine.find_image(python.image, image.fingerprint(python.packages), "make test-docker")
        finally:
            engine.close()
    except (IsolationUnavailable, UserError) as error:
        return f"docker: {error}"
    return None


@contextlib.asynccontextmanager
async def _local():
    """Sessions of this process."""
    async with LocalSandbox() as sandbox:
        yield sandbox


@contextlib.asynccontextmanager
async def _remote():
    """The same behind a server on the loopback interface."""
    token, options = "token-for-the-tests", ServeOptions(port=0)
    async with (
        LocalSandbox() as served,
        serving(served, token, options) as (url, _),
        RemoteSandbox(url, token) as sandbox,
    ):
        yield sandbox


@contextlib.asynccontextmanager
async def _docker():
    """The same in containers."""
    async with DockerSandbox() as sandbox:
        yield sandbox


BACKENDS = {"local": _local, "remote": _remote, "docker": _docker}


@pytest.fixture(scope="session")
def backends():
    """Every backend by name, as something that opens and closes it."""
    return BACKENDS


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
