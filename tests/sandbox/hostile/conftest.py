"""Where the hostile programs are played: on each backend, or a reason why not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agentrl.sandbox import LocalSandbox, session

from .reading import SECRET
from .stage import Crowd, Stage, shorten_waits

NOBODY = 65534
_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parent.parent.parent


@contextlib.asynccontextmanager
async def root(_names: list[str]) -> AsyncIterator[Stage]:
    """The embedded backend, started by root."""
    if os.geteuid() != 0:
        pytest.skip("not root; the same programs run as an ordinary user")
    async with Stage(LocalSandbox()) as stage:
        yield stage
        assert not await stage.finish()


class Actor:
    """A ``Stage`` in another process, of another user."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def play(self, name: str) -> list[str]:
        """See ``Stage.play``."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(name)}\n".encode())
        return await self.read()

    async def finish(self) -> list[str]:
        """See ``Stage.finish``."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await self.read()

    async def read(self) -> Any:
        """What the other process says next."""
        assert self._process.stdout is not None
        answer = await self._process.stdout.readline()
        assert answer, f"the other process has ended ({self._process.returncode}); see its standard error"
        return json.loads(answer)


@contextlib.asynccontextmanager
async def ordinary_user(_names: list[str]) -> AsyncIterator[Actor]:
    """The embedded backend, started by somebody without any rights."""
    python = _interpreter_for_nobody()
    if python is None:
        pytest.skip(f"no Python 3.11 that uid {NOBODY} may start")
    identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory(prefix="agentrl-hostile-", dir="/var/tmp") as folder:  # pytest's own are closed
        copy = Path(folder)
        for source in (_CHECKOUT / "agentrl", _HERE):
            shutil.copytree(source, copy / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "agentrl" / "__init__.py").write_text("")
        (copy / "tmp").mkdir()
        _open_to_all(copy)
        process = await asyncio.create_subprocess_exec(
            *(python, "-B", "-m", "hostile.ordinary_user"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=copy,
            env={"TMPDIR": str(copy / "tmp"), SECRET: "1"},
            limit=1 << 20,
            **identity,
        )
        actor = Actor(process)
        try:
            assert await actor.read() == {"user": identity.get("user", os.geteuid())}
            yield actor
            assert not await actor.finish()
            assert await process.wait() == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@contextlib.asynccontextmanager
async def docker(names: list[str]) -> AsyncIterator[Stage]:
    """The docker backend. Without an engine its items are skipped, with the reason, by the conftest above this one."""
    import docker

    from agentrl.sandbox.docker import DockerSandbox

    def containers() -> list[str]:
        with contextlib.closing(docker.from_env()) as client:
            return sorted(container.id for container in client.containers.list(all=True))

    async with Crowd(DockerSandbox(), names, containers) as stage:
        yield stage
        assert not await stage.finish()


BACKENDS = {"root": root, "ordinary user": ordinary_user, "docker": docker}


@pytest.fixture(autouse=True, scope="module")
def _surroundings(tmp_path_factory):
    """A secret in the environment, a folder of our own for temporary files, short waits."""
    waits = session.GRACE_SECONDS, session.FILE_SECONDS, session.FORK_SECONDS
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SECRET, "1")
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        shorten_waits()
        yield
    session.GRACE_SECONDS, session.FILE_SECONDS, session.FORK_SECONDS = waits


_ends: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report):
    """Notes how every test ended; for a skipped one, why."""
    if report.when == "call" or report.skipped:
        _ends[report.nodeid] = (report.outcome, report.longrepr[2] if report.skipped else "")


@pytest.fixture
def ends() -> dict[str, tuple[str, str]]:
    """(outcome, reason for skipping) of the tests so far, by their ids."""
    return _ends


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=[pytest.param(name, marks=pytest.mark.docker) if name == "docker" else name for name in BACKENDS],
)
async def stage(request, _surroundings):
    """The backend under test; skips, with the reason, where this machine cannot have it."""
    parameters = (item.callspec.params for item in request.session.items if hasattr(item, "callspec"))
    names = [given["name"] for given in parameters if given.get("stage") == request.param]
    async with BACKENDS[request.param](names) as made:
        yield made


def _open_to_all(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    (folder / "tmp").chmod(0o777)


def _interpreter_for_nobody() -> str | None:
    """A Python that an ordinary user can start: ours, if it is not hidden in root's home."""
    identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    for path in (os.path.realpath(sys.executable), shutil.which("python3", path="/usr/bin:/usr/local/bin")):
        if path is None:
            continue
        check = [path, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        try:
            if subprocess.run(check, cwd="/", check=False, **identity).returncode == 0:
                return path
        except OSError:
            continue
    return None
