"""The walls, looked at from the host and from the session next door. ``hostile`` has the programs that try them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agentrl.sandbox import Limits, LocalSandbox, Profile

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_another_session_goes_on_beside_an_attack(sandbox):
    quiet = await sandbox.open(limits=Limits(processes=4))
    loud = await sandbox.open()
    bomb = asyncio.create_task(
        loud.exec("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass", 0.5)
    )
    await asyncio.sleep(0.1)
    result = await quiet.exec("import os\npid = os.fork()\nif pid: print(os.waitpid(pid, 0)[1])", 10.0)
    await bomb
    await asyncio.gather(loud.close(), quiet.close())
    assert result.output == "0\n"


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_how_a_session_looks_from_the_host(processes):
    kinds = ("user", "mnt", "pid", "ipc", "net", "uts")
    async with LocalSandbox(Profile("bare")) as sandbox:
        sessions = [await sandbox.open() for _ in range(2)]
        # the first process of a namespace within the zygote's namespace
        inside = [pid for pid in processes() if len(_status(pid)["NSpid"].split()) >= 3]
        statuses = [_status(pid) for pid in inside if _status(pid)["Seccomp"] == "2"]
        namespaces = [{kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in kinds} for pid in inside]
        del sessions
    assert len(statuses) == 2
    ours = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds}
    for status, spaces in zip(statuses, namespaces, strict=True):
        assert "0" not in status["Uid"].split()
        assert "0" not in status["Gid"].split()
        assert status["NoNewPrivs"] == "1"
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {0}
        assert not spaces.items() & ours.items()
    first, second = namespaces
    assert {kind for kind in kinds if first[kind] == second[kind]} == {"uts"}
