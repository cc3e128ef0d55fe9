"""The walls, tried by the programs of ``attacks.py`` and looked at from the host; as root and as an ordinary user."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agentrl.sandbox import Limits, LocalSandbox, Profile

pytestmark = pytest.mark.asyncio(loop_scope="module")

_HERE = Path(__file__).parent
_ATTACKS = runpy.run_path(str(_HERE / "attacks.py"))
NOBODY = 65534


@pytest.mark.parametrize("attack", [a for a in _ATTACKS["ATTACKS"] if a not in _ATTACKS["CALLS"]], ids=lambda a: a.name)
async def test_the_attack_fails(session, attack):
    result = await session.exec(attack.code, attack.deadline)
    assert str(result.status) in attack.statuses, result
    assert attack.shows in str(result)


async def test_every_dangerous_system_call_is_refused(session):
    results = {attack.name: str(await session.exec(attack.code)) for attack in _ATTACKS["CALLS"]}
    assert results == dict.fromkeys(results, "refused")
    assert len(results) > 60


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


def _interpreter_for_nobody() -> str | None:
    """A Python that an ordinary user can start: ours, if it is not hidden in root's home."""
    for path in (os.path.realpath(sys.executable), shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if path is None:
            continue
        check = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(check, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", check=False).returncode == 0:
                return path
        except OSError:
            continue
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: the tests above have just run as an ordinary user")
async def test_all_of_it_holds_for_an_ordinary_user(tmp_path_factory):
    python = _interpreter_for_nobody()
    if python is None:
        pytest.skip("no Python 3.11 that uid 65534 may start")
    copy = Path("/var/tmp") / f"agentrl-test-{os.getpid()}"  # pytest's own folders are closed to others
    try:
        shutil.copytree(_HERE.parent.parent / "agentrl", copy / "agentrl", ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("attacks.py", "ordinary_user.py"):
            shutil.copy(_HERE / name, copy)
        for path in [copy, *copy.rglob("*")]:
            path.chmod(0o755)
        process = await asyncio.create_subprocess_exec(
            python,
            str(copy / "ordinary_user.py"),
            stdout=subprocess.PIPE,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
        )
        output, _ = await process.communicate()
    finally:
        shutil.rmtree(copy)
    assert process.returncode == 0
    report = json.loads(output)
    assert report.pop("user") == NOBODY
    assert report.pop("attacks") == len(_ATTACKS["ATTACKS"])
    assert report == {"broken": [], "left": 0, "state": "42\n"}
