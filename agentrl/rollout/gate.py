"""A limit on how much goes on at once, shared fairly."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from heapq import heappop, heappush


class Gate:
    """Lets ``limit`` through; who waits goes in by rank, the lowest first, and among equals by arrival.

    Args:
        limit: how much may be held at once, at least 1.
    """

    def __init__(self, limit: int) -> None:
        self._limit = self._free = limit
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []
        self._arrivals = 0

    def hold(self, count: int = 1, rank: int = 0) -> AbstractAsyncContextManager[None]:
        """Wait for room, and keep it until the block ends.

        Args:
            count: how much to hold; what is above the limit waits for all of it.
            rank: how many of its kind went before: the fewer, the sooner it goes in. From 1 on it is compared with
                all that arrive at the same time: the first ones would take every place else.
        """
        return _Held(self, min(count, self._limit), rank)

    async def enter(self, count: int, rank: int) -> None:
        """Wait for room; see ``hold``."""
        if not rank and count <= self._free and not self._waiting:
            self._free -= count
            return
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heappush(self._waiting, (rank, self._arrivals, count, turn))
        self._arrivals += 1
        loop.call_soon(self._admit)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and called off at the same moment
                self._free += count
            turn.cancel()
            self._admit()
            raise

    def leave(self, count: int) -> None:
        """Give room back."""
        self._free += count
        self._admit()

    def _admit(self) -> None:
        while self._waiting:
            _, _, count, turn = self._waiting[0]
            if turn.done():
                heappop(self._waiting)
            elif count <= self._free:
                heappop(self._waiting)
                self._free -= count
                turn.set_result(None)
            else:
                break


class _Held(AbstractAsyncContextManager[None]):
    """A class, since every tool call passes here, and a generator's context takes microseconds."""

    __slots__ = ("_count", "_gate", "_rank")

    def __init__(self, gate: Gate, count: int, rank: int) -> None:
        self._gate, self._count, self._rank = gate, count, rank

    async def __aenter__(self) -> None:
        await self._gate.enter(self._count, self._rank)

    async def __aexit__(self, *_: object) -> None:
        self._gate.leave(self._count)
