"""Runs every attack as whoever starts it and prints a report as JSON. Started by ``test_isolation.py`` as nobody."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import sys
import types
from pathlib import Path

# That user's Python need not have agentrl's dependencies, and the sandbox needs none of them.
_HERE = Path(__file__).parent
_package = types.ModuleType("agentrl")
_package.__path__ = [str(_HERE / "agentrl")]
sys.modules["agentrl"] = _package

from agentrl.sandbox import LocalSandbox, Profile, session  # noqa: E402

session.GRACE_SECONDS = 0.4


async def main() -> dict[str, object]:
    attacks = runpy.run_path(str(_HERE / "attacks.py"))["ATTACKS"]
    slots = asyncio.Semaphore(8)
    broken = []

    async def attempt(attack):
        async with slots:
            opened = await sandbox.open()
            result = await opened.exec(attack.code, attack.deadline)
            await opened.close()
        if str(result.status) not in attack.statuses or attack.shows not in str(result):
            broken.append(f"{attack.name}: {result.status} {result}")

    async with LocalSandbox(Profile("bare")) as sandbox:
        await asyncio.gather(*(attempt(attack) for attack in attacks))
        opened = await sandbox.open()
        await opened.exec("x = 6")
        state = (await opened.exec("x * 7")).output
    return {"user": os.getuid(), "attacks": len(attacks), "broken": broken, "state": state}


def _command_line(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
    except OSError:
        return b""


report = asyncio.run(main())
mine = f'"manager": {os.getpid()},'.encode()
print(json.dumps(report | {"left": sum(mine in _command_line(entry) for entry in Path("/proc").iterdir())}))
