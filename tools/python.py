"""``python``: a Python session in a sandbox, whose variables and files last as long as the episode."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

from agentrl.errors import ForkRefused, SandboxError
from agentrl.sandbox.base import ExecResult, Rng, Sandbox, Session
from agentrl.sandbox.limit import fork_in_place
from agentrl.sandbox.shared import shared_sandbox
from agentrl.tool import Tool
from agentrl.types import ForkLevel

ERROR_LINES = 6
"""Lines of a traceback that the policy reads: the last ones."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One thing that the environment did to the session: a cell run, or a file put in."""

    code: str = ""
    path: str = ""
    data: bytes = b""
    status: str = ""


class Python(Tool):
    """A stateful session, opened at the first call: most episodes of an untrained policy never need one.

    What an environment does through ``exec`` and ``put_file`` is part of the task: when a cell takes the session down
    with it, a new one gets that part again, and the policy reads that its own variables are gone.

    A fork is an exact one, of the live session: variables, open files and the scratch folders. What it was forked from
    goes on in a fork of its own, made when it is next used.

    Args:
        deadline: seconds that one cell may run.
        profile: what the session is made of, a folder of ``sandboxes/``.
        rng: random numbers in a fork; see ``agentrl.sandbox.base.Rng``.
        sandbox: where to open the session; default the event loop's shared one.
    """

    name = "python"
    timeout = 120.0  # covers cells of one turn that wait for each other; the session's own deadline comes first
    fork_level = ForkLevel.SNAPSHOT

    def __init__(
        self,
        *,
        deadline: float = 5.0,
        profile: str = "python",
        rng: Rng = "inherit",
        sandbox: Sandbox | None = None,
    ) -> None:
        self.deadline, self.profile, self.rng = deadline, profile, rng
        self._sandbox = sandbox
        self._seed = 0
        self._setup: list[_Entry] = []
        self._session: Session | None = None
        self._forked = False  # then the session is frozen, and what goes on is a fork of it
        self._turn = asyncio.Lock()

    async def start(self, seed: int) -> None:
        """Note the seed; nothing is opened yet."""
        self._seed = seed

    async def run(self, code: str) -> str:
        """Run Python code.

        Args:
            code: The code.
        """
        return _describe(await self._exec(code))

    async def exec(self, code: str) -> ExecResult:
        """Run a cell on the environment's behalf, in ``setup`` or ``reward``; cells run one at a time.

        Raises:
            SandboxError: the sandbox failed.
        """
        result = await self._exec(code)
        if result.state_kept:
            self._setup.append(_Entry(code, status=str(result.status)))
        return result

    async def put_file(self, path: str, data: bytes) -> None:
        """Put a file into the session's folder on the environment's behalf.

        Raises:
            SandboxError: the sandbox failed.
        """
        async with self._turn:
            await (await self._open()).put_file(path, data)
            self._setup.append(_Entry(path=path, data=data))

    async def get_file(self, path: str) -> bytes:
        """A file of the session's folder.

        Raises:
            SandboxError: the sandbox failed.
        """
        async with self._turn:
            return await (await self._open()).get_file(path)

    async def fork(self) -> Python:
        """A tool whose session is in the same state, independent from now on.

        Raises:
            ForkRefused: the program holds what cannot be forked; lists what.
            SandboxError: the sandbox failed.
        """
        async with self._turn:
            twin = Python(deadline=self.deadline, profile=self.profile, rng=self.rng, sandbox=self._sandbox)
            twin._seed, twin._setup = self._seed, list(self._setup)
            if self._session is not None:
                forking = asyncio.ensure_future(self._session.fork(self.rng))
                try:
                    twin._session = await asyncio.shield(forking)
                except ForkRefused as refusal:  # it goes on as it is
                    raise ForkRefused(f"tool {self.name!r}: {refusal}", refusal.reasons) from refusal
                except asyncio.CancelledError:  # seen through: what is half forked can go on in no way
                    with suppress(ForkRefused, SandboxError):
                        unwanted = await forking
                        self._forked = True
                        await unwanted.close()
                    raise
                except BaseException:
                    self._forked = True  # it may be frozen by now
                    raise
                self._forked = True
            return twin

    async def close(self) -> None:
        """Close the session if one was opened. Safe to call twice."""
        session, self._session = self._session, None
        self._forked = False
        if session is not None:
            await session.close()

    async def _exec(self, code: str) -> ExecResult:
        async with self._turn:
            session = await self._open()
            try:
                result = await session.exec(code, self.deadline)
            except (asyncio.CancelledError, SandboxError):
                await self.close()  # nobody knows the state of a session that was left in the middle of a cell
                raise
            if not result.state_kept:
                await self.close()
            return result

    async def _open(self) -> Session:
        if self._session is None:
            sandbox = self._sandbox or shared_sandbox()
            session = await sandbox.open(self.profile, seed=self._seed)
            try:
                for entry in self._setup:
                    await self._repeat(session, entry)
            except BaseException:
                await session.close()
                raise
            self._session = session
        elif self._forked:
            frozen = self._session
            try:
                self._session = await fork_in_place(frozen)
            except ForkRefused as refusal:
                raise SandboxError(f"python: the session was forked and cannot go on itself: {refusal}") from refusal
            self._forked = False
            await frozen.close()
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
