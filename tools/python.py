"""``python``: a Python session in a sandbox, whose variables and files last as long as the episode."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from agentrl.errors import SandboxError
from agentrl.sandbox.base import ExecResult, Sandbox, Session
from agentrl.sandbox.shared import shared_sandbox
from agentrl.tool import Tool
from agentrl.types import ForkLevel

ERROR_LINES = 6
"""Lines of a traceback that the policy reads: the last ones."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One thing done to the session: a cell run, or a file put in."""

    code: str = ""
    path: str = ""
    data: bytes = b""
    status: str = ""
    setup: bool = False


class Python(Tool):
    """A stateful session, opened at the first call: most episodes of an untrained policy never need one.

    What an environment does through ``exec`` and ``put_file`` is part of the task: when a cell takes the session down
    with it, a new one gets that part again, and the policy reads that its own variables are gone.

    A fork is a new session with the same seed in which everything is done again.

    Args:
        deadline: seconds that one cell may run.
        sandbox: where to open the session; default the event loop's shared one.
    """

    name = "python"
    timeout = 120.0  # covers cells of one turn that wait for each other; the session's own deadline comes first
    fork_level = ForkLevel.REPLAY

    def __init__(self, *, deadline: float = 5.0, sandbox: Sandbox | None = None) -> None:
        self.deadline = deadline
        self._sandbox = sandbox
        self._seed = 0
        self._done: list[_Entry] = []
        self._session: Session | None = None
        self._turn = asyncio.Lock()

    async def start(self, seed: int) -> None:
        """Note the seed; nothing is opened yet."""
        self._seed = seed

    async def run(self, code: str) -> str:
        """Run Python code.

        Args:
            code: The code.
        """
        return _describe(await self._exec(_Entry(code)))

    async def exec(self, code: str) -> ExecResult:
        """Run a cell on the environment's behalf, in ``setup`` or ``reward``; cells run one at a time.

        Raises:
            SandboxError: the sandbox failed.
        """
        return await self._exec(_Entry(code, setup=True))

    async def put_file(self, path: str, data: bytes) -> None:
        """Put a file into the session's folder on the environment's behalf.

        Raises:
            SandboxError: the sandbox failed.
        """
        async with self._turn:
            await (await self._open()).put_file(path, data)
            self._done.append(_Entry(path=path, data=data, setup=True))

    async def get_file(self, path: str) -> bytes:
        """A file of the session's folder.

        Raises:
            SandboxError: the sandbox failed.
        """
        async with self._turn:
            return await (await self._open()).get_file(path)

    async def fork(self) -> Python:
        """A tool that repeats what was done here when it is first used."""
        async with self._turn:
            twin = Python(deadline=self.deadline, sandbox=self._sandbox)
            twin._seed, twin._done = self._seed, list(self._done)
            return twin

    async def close(self) -> None:
        """Close the session if one was opened. Safe to call twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _exec(self, entry: _Entry) -> ExecResult:
        async with self._turn:
            session = await self._open()
            try:
                result = await session.exec(entry.code, self.deadline)
            except (asyncio.CancelledError, SandboxError):
                # Nobody knows the state of a session that was left in the middle of a cell.
                await self._lose()
                raise
            if result.state_kept:
                self._done.append(replace(entry, status=str(result.status)))
            else:
                await self._lose()
            return result

    async def _open(self) -> Session:
        if self._session is None:
            sandbox = self._sandbox or shared_sandbox()
            session = await sandbox.open(seed=self._seed)
            try:
                for entry in self._done:
                    await self._repeat(session, entry)
            except BaseException:
                await session.close()
                raise
            self._session = session
        return self._session

    async def _repeat(self, session: Session, entry: _Entry) -> None:
        if entry.path:
            await session.put_file(entry.path, entry.data)
            return
        result = await session.exec(entry.code, self.deadline)
        if str(result.status) != entry.status or not result.state_kept:
            raise SandboxError(
                f"python: a repeated cell ended with {result.status} instead of {entry.status}, so the session is not "
                f"what it was; the cell was {entry.code[:200]!r}. Cells that depend on time cannot be repeated."
            )

    async def _lose(self) -> None:
        self._done = [entry for entry in self._done if entry.setup]
        await self.close()


def _describe(result: ExecResult) -> str:
    """What the policy reads: the output, then the end of the error, which also says whether the state was kept."""
    parts = [result.output.rstrip("\n")] if result.output else []
    if result.error:
        lines = result.error.rstrip("\n").splitlines()
        parts.append("\n".join(["...", *lines[-ERROR_LINES:]] if len(lines) > ERROR_LINES else lines))
    if not result.state_kept:
        parts.append("The next call starts a new session.")
    return "\n".join(parts) or "No output."


TOOL = Python
