"""A limit on how much goes on at once, shared fairly."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
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

    @asynccontextmanager
    async def hold(self, count: int = 1, rank: int = 0) -> AsyncIterator[None]:
        """Wait for room, and keep it until the block ends.

        Args:
            count: how much to hold; what is above the limit waits for all of it.
            rank: how many of its kind went before: the fewer, the sooner it goes in.
        """
        count = min(count, self._limit)
        await self._enter(count, rank)
        try:
            yield
        finally:
            self._free += count
            self._admit()

    async def _enter(self, count: int, rank: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heappush(self._waiting, (rank, self._arrivals, count, turn))
        self._arrivals += 1
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and called off at the same moment
                self._free += count
            turn.cancel()
            self._admit()
            raise

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
