from __future__ import annotations

import sys

import pytest

from agentrl.errors import ConfigError, IsolationUnavailable, SandboxError
from agentrl.sandbox import LocalSandbox, Profile, launcher, probe

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True)
def _unprobed(monkeypatch, sandbox):
    monkeypatch.setattr(probe, "_passed", False)


async def test_the_probe_runs_once_per_process(monkeypatch):
    audits = []
    real = probe.audit

    async def counted(session):
        audits.append(session)
        return await real(session)

    monkeypatch.setattr(probe, "audit", counted)
    for _ in range(2):
        async with LocalSandbox(Profile("bare")) as sandbox:
            await sandbox.open()
            await sandbox.open()
    assert len(audits) == 1


async def test_a_wall_that_does_not_hold_is_named_and_nothing_is_left(monkeypatch, processes):
    async def audit(_session):
        return ["seccomp filter", "network namespace"]

    monkeypatch.setattr(probe, "audit", audit)
    before = set(processes())
    async with LocalSandbox(Profile("bare")) as sandbox:
        for _ in range(2):
            with pytest.raises(IsolationUnavailable, match="seccomp filter, network namespace") as caught:
                await sandbox.open()
            assert caught.value.missing == ("seccomp filter", "network namespace")
            assert set(processes()) == before


@pytest.mark.parametrize(
    ("before", "missing"),
    [
        ("import os\nos.environ['X'] = '1'\n", ["cleared environment"]),
        ("import os, socket\nsocket.socket = lambda *_: None\n", ["network namespace"]),
        (
            "import os\nos.fork = lambda: 1\nos.kill = os.waitpid = lambda *_: 0\n",
            ["process limit of a session (Linux 5.14)"],
        ),
        ("import resource\nresource.getrlimit = lambda kind: (-1, -1)\n", ["rlimits"]),
    ],
)
async def test_the_audit_sees_a_wall_that_is_missing(sandbox, before, missing):
    session = await sandbox.open(limits=probe.LIMITS)
    await session.exec(before)
    assert await probe.audit(session) == missing
    assert not probe.passed()
    await session.close()


async def test_an_audit_that_does_not_finish_is_no_pass(sandbox):
    session = await sandbox.open(limits=probe.LIMITS)
    await session.exec("import os\nos.fork = None")
    with pytest.raises(SandboxError, match="self-test did not finish"):
        await probe.audit(session)
    assert not probe.passed()
    await session.close()


async def test_another_system_is_refused_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(IsolationUnavailable, match="Linux \\(this is darwin\\)"):
        await LocalSandbox().open()


async def test_an_interpreter_that_does_not_start_is_an_infrastructure_failure(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(SandboxError, match="cannot start the interpreter '/nonexistent/python'"):
        await LocalSandbox(Profile("bare")).open()
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(SandboxError, match="did not start"):
        await LocalSandbox(Profile("bare")).open()


async def test_what_the_zygote_says_before_it_dies_is_in_the_message(monkeypatch):
    monkeypatch.setattr(launcher, "_BOOTSTRAP", "import sys; sys.exit('no such thing')")
    with pytest.raises(SandboxError, match="no such thing"):
        await LocalSandbox(Profile("bare")).open()


async def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ConfigError, match="'no_such_package' is not installed"):
        await LocalSandbox(Profile("odd", packages=("no_such_package",))).open()


async def test_a_module_that_cannot_be_loaded_ahead_is_named():
    with pytest.raises(SandboxError, match="no_such_module"):
        await LocalSandbox(Profile("odd", preload=("no_such_module",))).open()
