"""At most so many sessions at once, in a way that nothing can wait for itself.

Every open session has a *place*, from ``open`` or ``fork`` until its ``close`` has returned. Who opens waits for one.
Who forks holds one already, and all could hold one and wait for another; so a fork never waits: it is refused. Nor does
it take the last free place: whatever becomes of the sessions that forks have left standing, one can still be opened,
used and closed. A frozen session runs nothing, so the fork in which it goes on may share its place.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

from agentrl.errors import ForkRefused, SandboxError, SessionClosed
from agentrl.sandbox.base import ExecResult, Limits, Profile, Rng, Sandbox, Session

WAIT_SECONDS = 100.0
"""Longest wait for a place. Below the timeout of the ``python`` tool, which would be the policy's to answer for."""

Notice = Callable[[str], AbstractContextManager[None]]
notice: ContextVar[Notice | None] = ContextVar("agentrl.sandbox.notice", default=None)
"""Who wants to know for what a call waits; the stall report reads it."""
_waits: ContextVar[bool] = ContextVar("agentrl.sandbox.waits", default=True)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Inside, ``open`` is as ``fork`` is: refused where there is no place. For what repeats an episode to fork it."""
    token = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(token)


async def fork_in_place(session: Session, rng: Rng = "inherit") -> Session:
    """A fork that shares the place of ``session``, which runs nothing any more. For one at a time.

    Raises:
        ForkRefused: the session itself cannot be forked.
        SandboxError: the sandbox failed.
    """
    if isinstance(session, LimitedSession):
        return await session.fork_in_place(rng)
    return await session.fork(rng)


class LimitedSandbox:
    """Opens sessions of ``sandbox``, but at most ``most`` of them at once; see ``agentrl.sandbox.base.Sandbox``.

    Args:
        sandbox: where sessions come from; closed with this one.
        most: places, at least 1.
    """

    def __init__(self, sandbox: Sandbox, most: int) -> None:
        self._sandbox, self._room = sandbox, _Room(most)
        self.fork_level = sandbox.fork_level

    @property
    def places(self) -> int:
        """Places that are taken."""
        return self._room.taken

    async def open(
        self, profile: str | Profile | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> LimitedSession:
        """A new session, as soon as there is a place.

        Raises:
            SandboxError: there was none for ``WAIT_SECONDS``, or the sandbox failed.
            ForkRefused: there is none, inside ``without_waiting``.
        """
        place = await self._room.enter() if _waits.get() else self._room.take()
        try:
            return LimitedSession(await self._sandbox.open(profile, seed=seed, limits=limits), place)
        except BaseException:
            place.leave()
            raise

    async def close(self) -> None:
        """Close the sandbox; who waits for a place gets an error. Safe to call twice."""
        self._room.close()
        await self._sandbox.close()


class LimitedSession:
    """A session with a place; see ``agentrl.sandbox.base.Session`` for its methods."""

    def __init__(self, session: Session, place: _Place) -> None:
        self._session, self._place, self._left = session, place, False
        self.seed = session.seed
        self.rng: Literal["seeded"] | Rng = session.rng

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """See ``Session.exec``."""
        return await self._session.exec(code, deadline)

    async def put_file(self, path: str, data: bytes) -> None:
        """See ``Session.put_file``."""
        await self._session.put_file(path, data)

    async def get_file(self, path: str) -> bytes:
        """See ``Session.get_file``."""
        return await self._session.get_file(path)

    async def fork(self, rng: Rng = "inherit", *, branch: int | None = None) -> LimitedSession:
        """See ``Session.fork``; refused where there is no place."""
        return await self._fork(self._place.room.take(), rng, branch)

    async def fork_in_place(self, rng: Rng = "inherit") -> LimitedSession:
        """See the function."""
        if self._left:
            raise SessionClosed("this session is closed: open another one.")
        return await self._fork(self._place.share(), rng, None)

    async def close(self) -> None:
        """See ``Session.close``; its place is free when this returns, whatever it raises."""
        left, self._left = self._left, True
        try:
            await self._session.close()
        finally:
            if not left:
                self._place.leave()

    async def _fork(self, place: _Place, rng: Rng, branch: int | None) -> LimitedSession:
        try:
            return LimitedSession(await self._session.fork(rng, branch=branch), place)
        except BaseException:
            place.leave()
            raise


class _Place:
    """One of a room's places, and how many sessions share it."""

    def __init__(self, room: _Room) -> None:
        self.room, self._sharing = room, 1

    def share(self) -> _Place:
        self._sharing += 1
        return self

    def leave(self) -> None:
        self._sharing -= 1
        if not self._sharing:
            self.room.leave()


class _Room:
    """Counts places; who waits for one is served in the order of arrival."""

    def __init__(self, most: int) -> None:
        self._most, self.taken = most, 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = False

    def take(self) -> _Place:
        """A place at once, though not the last one.

        Raises:
            ForkRefused: there is none.
        """
        if self.taken >= self._most - 1:
            raise ForkRefused(
                f"there is no room for another session: {self.taken} of at most {self._most} are open "
                "(sandbox.max_sessions; forks leave one place to those who open)."
            )
        self.taken += 1
        return _Place(self)

    async def enter(self) -> _Place:
        """A place, as soon as there is one.

        Raises:
            SandboxError: not for ``WAIT_SECONDS``; or the sandbox was closed meanwhile.
        """
        if self.taken < self._most or self._closed:  # a closed sandbox has its own word to say
            self.taken += 1
            return _Place(self)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        told = notice.get()
        try:
            async with asyncio.timeout(WAIT_SECONDS) as timer:
                with told(f"one of {self._most} sandbox sessions (sandbox.max_sessions)") if told else nullcontext():
                    await turn
        except BaseException as error:
            self._give_up(turn)
            if isinstance(error, TimeoutError) and timer.expired():
                raise SandboxError(
                    f"no session could be opened for {WAIT_SECONDS:g} s: all {self._most} were in use. Raise "
                    "sandbox.max_sessions, or lower rollout.max_live."
                ) from error
            raise
        return _Place(self)

    def leave(self) -> None:
        """Pass a place on to who has waited longest, or keep it free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.taken -= 1

    def close(self) -> None:
        """Send away who waits."""
        self._closed = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(SandboxError("the sandbox was closed while a session waited to be opened."))

    def _give_up(self, turn: asyncio.Future[None]) -> None:
        if turn.done() and not turn.cancelled() and turn.exception() is None:  # let in and called off at once
            self.leave()
        elif turn in self._waiting:
            self._waiting.remove(turn)
