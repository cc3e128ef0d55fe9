"""A container and the sessions in it, as the docker backend keeps them."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Literal, TypeVar

from agentrl.errors import SandboxError, SessionClosed, SessionFrozen
from agentrl.sandbox.attachment import Attachment
from agentrl.sandbox.base import ExecResult, ExecStatus, Rng, check_deadline
from agentrl.sandbox.called import CalledSandbox, CalledSession
from agentrl.sandbox.calls import Lost
from agentrl.sandbox.engine import Death, Engine, Started

_THREADS = 8
_T = TypeVar("_T")


class Threads:
    """Where the engine's blocking calls run; not in the event loop's threads, which anything else may keep busy."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="agentrl-docker")
        self._kept: set[Future[None]] = set()

    def start(self, work: Callable[[], _T]) -> Future[_T]:
        """Run ``work``."""
        return self._pool.submit(work)

    async def run(self, work: Callable[[], _T]) -> _T:
        """What ``work`` gives."""
        return await asyncio.wrap_future(self.start(work))

    def keep(self, work: Callable[[], None]) -> Future[None]:
        """Run ``work`` whatever becomes of the caller; ``finish`` waits for it."""
        future = self.start(work)
        self._kept.add(future)
        future.add_done_callback(self._kept.discard)
        return future

    async def finish(self) -> None:
        """Wait for what is kept, take no more work, raise the first error."""
        try:
            await settle(map(asyncio.wrap_future, tuple(self._kept)))
        finally:
            self._pool.shutdown(wait=False)


async def settle(work: Iterable[Awaitable[None]]) -> None:
    """Wait for everything; then raise the first error."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


class Tree:
    """A container and the sessions in it.

    Args:
        threads: where the engine is called.
        engine: what the container runs on.
        started: the container.
        on_end: called once, when its removal begins.

    Attributes:
        sessions: those that are open.
    """

    def __init__(self, threads: Threads, engine: Engine, started: Started, on_end: Callable[[Tree], None]) -> None:
        self._threads, self._engine, self._name, self._on_end = threads, engine, started.name, on_end
        self._attachment = Attachment(started.socket, started.name, self._on_loss)
        self._calls = CalledSandbox(self._attachment.transport)
        self._removal: Future[None] | None = None
        self._autopsy: asyncio.Future[Death] | None = None
        self._running_at_loss = 0
        self._running = 0
        self.sessions: set[DockerSession] = set()

    async def open(self, seed: int) -> DockerSession:
        """The first session."""
        await self._attachment.connect()
        return await self.add(self._calls.open(seed=seed))

    async def add(self, starting: Awaitable[CalledSession]) -> DockerSession:
        """A session of this tree."""
        session = DockerSession(self, await self.result(starting))
        self.sessions.add(session)
        return session

    async def result(self, call: Awaitable[_T]) -> _T:
        """What ``call`` gives; where the container is lost, an error that says how."""
        try:
            return await call
        except Lost as lost:
            raise await self.explain(lost) from lost

    async def explain(self, lost: Lost) -> SandboxError:
        """Why a call was not answered; ``_OutOfMemory`` where the only running program is to blame."""
        if not self._attachment.lost:
            return lost
        if self._removal is not None:
            return SandboxError(f"the session was closed meanwhile, and container {self._name} is gone.")
        if self._autopsy is None:
            self._autopsy = asyncio.ensure_future(self._threads.run(partial(self._engine.death, self._name)))
        death = await asyncio.shield(self._autopsy)
        said = self._attachment.complaints
        message = f"container {self._name} {death.how}" + (f"; it said: {said}" if said else ".")
        return (_OutOfMemory if death.out_of_memory and self._running_at_loss == 1 else SandboxError)(message)

    async def cell(self, call: Awaitable[ExecResult]) -> ExecResult:
        """The result of a cell.

        Raises:
            _OutOfMemory: its process was killed because the container was full, or the container was and this was the
                only cell that ran in it.
        """
        since = time.time()
        self._running += 1
        try:
            return await self.result(call)
        except (_OutOfMemory, SessionClosed, SessionFrozen):
            raise
        except SandboxError as error:
            known = self._attachment.lost or type(error) is Lost
            if known or not await self._threads.run(partial(self._engine.killed_for_memory, self._name, since)):
                raise
            raise _OutOfMemory(
                f"container {self._name} was full, and of all in it this program held the most"
            ) from error
        finally:
            self._running -= 1

    def fell(self) -> Future[None]:
        """Kill the container and all sessions in it; the result comes when nothing is left."""
        if self._removal is None:
            self._removal = self._threads.keep(partial(self._engine.remove, self._name))
            self._attachment.close()
            self._on_end(self)
        return self._removal

    async def close(self) -> None:
        """Kill the container and wait until nothing is left."""
        removal = self.fell()
        await self._calls.close()
        await asyncio.wrap_future(removal)

    async def leave(self, session: DockerSession, inner: CalledSession) -> None:
        """Close a session, and the container with the last one."""
        if session not in self.sessions:
            return
        self.sessions.discard(session)
        if not self.sessions:
            await self.close()
            return
        try:
            await inner.close()
        except SandboxError:
            if not self._attachment.lost:
                raise

    def _on_loss(self) -> None:
        self._running_at_loss = self._running


class _OutOfMemory(SandboxError):
    """The container ran out of memory, and it was this program's doing."""


class DockerSession:
    """A session of a ``DockerSandbox``; see ``agentrl.sandbox.base.Session`` for its methods."""

    def __init__(self, tree: Tree, inner: CalledSession) -> None:
        self._tree, self._inner = tree, inner
        self.seed: int = inner.seed
        self.rng: Literal["seeded"] | Rng = inner.rng
        self._lost: str | None = None  # by the program's own doing: how
        self._failed = False

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """Run one cell; see ``Session.exec``."""
        check_deadline(deadline)
        if self._lost is not None and self in self._tree.sessions:
            return ExecResult(ExecStatus.KILLED, "", f"the session was lost earlier: {self._lost}", False, 0.0)
        began = time.perf_counter()
        cell = self._inner.exec(code, deadline)
        try:
            return await (self._tree.result(cell) if self._failed else self._tree.cell(cell))
        except _OutOfMemory as error:
            self._lost = str(error).rstrip(".")
            text = f"MemoryError: {self._lost}; variables and files are lost"
            return ExecResult(ExecStatus.MEMORY, "", text, False, time.perf_counter() - began)
        except (SessionClosed, SessionFrozen):
            raise
        except SandboxError:
            self._failed = True
            raise

    async def fork(self, rng: Rng = "inherit", *, branch: int | None = None) -> DockerSession:
        """A session in the same state, in the same container; see ``Session.fork``."""
        if self._lost is not None:
            raise SessionClosed(f"the session was lost and cannot be forked: {self._lost}")
        return await self._tree.add(self._inner.fork(rng, branch=branch))

    async def put_file(self, path: str, data: bytes) -> None:
        """Write a file; see ``Session.put_file``."""
        self._check_files(path)
        await self._tree.result(self._inner.put_file(path, data))

    async def get_file(self, path: str) -> bytes:
        """Read a file; see ``Session.get_file``."""
        self._check_files(path)
        return await self._tree.result(self._inner.get_file(path))

    async def close(self) -> None:
        """End the session, and with the last one of a tree its container. Safe to call twice."""
        await self._tree.leave(self, self._inner)

    def _check_files(self, path: str) -> None:
        if self._lost is not None and self in self._tree.sessions:
            raise FileNotFoundError(errno.ENOENT, f"the session and its files were lost: {self._lost}", path)
