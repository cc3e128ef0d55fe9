"""``agentrl doctor``: what isolation this machine gives, found out by doing, and what each sandbox backend needs.

Nothing is concluded from a version number: sessions are opened, attacked, forked, filled up and timed.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

from agentrl.errors import AgentRLError, ForkRefused, IsolationUnavailable
from agentrl.sandbox import ExecStatus, Limits, LocalSandbox, Session, landlock, probe
from agentrl.sandbox import profile as profiles
from agentrl.sandbox.base import Sandbox
from agentrl.sandbox.cgroup import MemoryGroups

State = Literal["ok", "weaker", "missing", "not set up"]
_FORKS = 5
_HOG = """
import os, time
children = []
while len(children) < 4:
    child = os.fork()
    if child == 0:
        x = bytearray(b'x') * {bytes}; time.sleep(2); os._exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
"""Four processes that each hold three eighths of the limit: none has too much, all together they have."""
_MEMORY = 320 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        backend: local, docker or remote.
        what: what was tried.
        state: how it went; ``weaker`` works with less than it could be, ``not set up`` is optional.
        detail: what was seen, or what to do.
    """

    backend: str
    what: str
    state: State
    detail: str


async def examine() -> AsyncIterator[Finding]:
    """Look at every backend; findings come as they are made."""
    async for finding in _local():
        yield finding
    yield await _docker()
    yield _remote()


async def _local() -> AsyncIterator[Finding]:
    async with LocalSandbox() as sandbox:
        try:
            session = await sandbox.open(limits=probe.LIMITS)
            missing = await probe.audit(session)
            await session.close()
        except AgentRLError as error:
            yield Finding("local", "sessions", "missing", str(error))
            return
        if missing:
            yield Finding("local", "isolation", "missing", f"did not hold: {', '.join(missing)}")
            return
        user = "nobody (started by root)" if os.geteuid() == 0 else f"the user with id {os.getuid()}"
        yield Finding(
            "local",
            "isolation",
            "ok",
            "user, mount, PID, IPC, network and UTS namespaces, no_new_privs, seccomp with user notification, rlimits, "
            f"no capabilities: attacked from inside and held; runs as {user}",
        )
        yield _landlock()
        yield await _memory(sandbox)
        yield await _fork(sandbox)


def _landlock() -> Finding:
    latest = landlock.version()
    if latest >= 2:
        return Finding("local", "Landlock", "ok", f"version {latest} of the kernel's interface")
    return Finding("local", "Landlock", "weaker", "not in this kernel (Linux 5.19): the other walls stand without it")


async def _memory(sandbox: Sandbox) -> Finding:
    """Whether a session as a whole is held to its memory, and by what."""
    session = await sandbox.open(limits=Limits(memory_bytes=_MEMORY, scratch_bytes=64 * 1024))
    try:
        result = await session.exec(_HOG.format(bytes=_MEMORY * 3 // 8), 10.0)
    finally:
        await session.close()
    held = result.status is ExecStatus.MEMORY or "-9" in result.output
    try:
        groups = MemoryGroups.find()
    except OSError as error:
        what = f"a watchdog that looks every 0.2 s; no cgroups: {error}"
        return Finding("local", "memory", "weaker" if held else "missing", what)
    groups.close()
    where = f"a cgroup for each session, below {groups.folder.parent}"
    return Finding("local", "memory", "ok" if held else "missing", where if held else f"{where}, did not hold")


async def _fork(sandbox: Sandbox) -> Finding:
    opening = await _typical(sandbox.open)
    session = await sandbox.open()
    try:
        await session.exec("x = 1")
        forking = await _typical(session.fork)
    except ForkRefused as error:
        return Finding("local", "fork", "missing", str(error))
    finally:
        await session.close()
    return Finding("local", "fork", "ok", f"exact; {forking * 1e3:.1f} ms, a new session {opening * 1e3:.1f} ms")


async def _typical(make: Callable[[], Awaitable[Session]]) -> float:
    taken = []
    for _ in range(_FORKS):
        began = time.perf_counter()
        made = await make()
        taken.append(time.perf_counter() - began)
        await made.close()
    return statistics.median(taken)


async def _docker() -> Finding:
    from agentrl.sandbox.docker import DockerSandbox

    try:
        async with DockerSandbox() as sandbox:
            session = await sandbox.open()
            fork = await session.fork()
            await fork.exec("1 + 1")
            forking = await _typical(session.fork)
            await fork.close()
            await session.close()
    except IsolationUnavailable as error:
        return Finding("docker", "sessions", "not set up", f"missing {', '.join(error.missing)}")
    except AgentRLError as error:
        return Finding("docker", "sessions", "not set up", str(error))
    return Finding("docker", "sessions", "ok", f"in hardened containers; a fork {forking * 1e3:.1f} ms")


def _remote() -> Finding:
    from agentrl.sandbox.remote import TOKEN_VARIABLE

    if os.environ.get(TOKEN_VARIABLE):
        return Finding("remote", "token", "ok", f"{TOKEN_VARIABLE} is set; set sandbox.url to the server's address")
    return Finding(
        "remote",
        "token",
        "not set up",
        "run `agentrl sandbox serve` on the machine with the sandboxes; here, set sandbox.backend to remote, "
        f"sandbox.url to its address and {TOKEN_VARIABLE} to its token",
    )


def profile_names() -> str:
    """The profiles that sessions can be opened with, for the report."""
    packages = {name: ", ".join(profiles.load(name).packages) for name in profiles.names()}
    return ", ".join(f"{name} ({inside or 'no packages'})" for name, inside in packages.items())
