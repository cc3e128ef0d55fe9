"""Who is served next, and where: first come, first served, on the server that has seen the most of the prompt."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from agentrl.errors import SamplerError
from agentrl.sampler.prefix import PrefixIndex
from agentrl.sampler.vllm_connection import Server, Unreachable

_LOG = logging.getLogger(__name__)

REMEMBERED = 256
"""Sequences for each server whose beginnings are known."""


@dataclass(slots=True, eq=False)
class _Turn:
    prompt: list[int]
    place: asyncio.Future[Server]


class Turns:
    """Gives requests places on servers.

    A prompt goes to the server that has seen its beginning, where its keys and values still are, unless that one has
    ``slack`` more requests than the one with the fewest.

    Args:
        servers: to choose from; each takes ``slots`` requests at once.
        patience: seconds without an answer of any server after which whoever waits gets an error.

    Attributes:
        slack: a quarter of a server's slots, at least 4.
    """

    def __init__(self, servers: Sequence[Server], patience: float) -> None:
        self.patience = patience
        self._servers = servers
        self._waiting: deque[_Turn] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._silent_since: float | None = None
        self._index = PrefixIndex()
        self._holders: dict[int, Server] = {}  # sequence in the index -> who has it; oldest first
        self._numbers = itertools.count()

    async def take(self, prompt: list[int], *, again: bool = False) -> Server:
        """A place for a request; ``give`` has to follow.

        Args:
            prompt: its tokens.
            again: it had one before, and so goes before the others.

        Raises:
            SamplerError: no server has answered for ``patience`` seconds, or ``close`` was called.
        """
        if not again and not self._waiting and not any(server.running for server in self._servers):
            self._silent_since = None  # nobody has asked for a while
        turn = _Turn(prompt, asyncio.get_running_loop().create_future())
        (self._waiting.appendleft if again else self._waiting.append)(turn)
        self._serve()
        try:
            return await turn.place
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
                self._serve()
            elif turn.place.exception() is None:
                self.give(turn.place.result(), [], [])
            raise

    def give(self, server: Server, prompt: list[int], done: list[int]) -> None:
        """A place is free again; ``server`` has seen ``prompt`` and ``done``."""
        server.running -= 1
        if prompt and server.ready:
            self._note(server, prompt + done)
        self._serve()

    def answered(self, server: Server) -> None:
        """``server`` gave tokens."""
        server.failures = 0
        self._silent_since = None

    def failed(self, server: Server, problem: Unreachable) -> None:
        """``server`` gave no more."""
        server.rest(problem)
        if not server.ready:
            if self._silent_since is None:
                self._silent_since = asyncio.get_running_loop().time()
                _LOG.warning("%s does not answer (%s); asking for up to %.0f s", server.url, problem, self.patience)
            for number in [number for number, holder in self._holders.items() if holder is server]:
                self._drop(number)

    def forget(self) -> None:
        """New weights: nobody holds anything of use."""
        self._index.clear()
        self._holders.clear()

    def close(self, error: SamplerError) -> None:
        """Fail whoever waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            place = self._waiting.popleft().place
            if not place.done():
                place.set_exception(SamplerError(str(error)))

    def _serve(self) -> None:
        """Place as many of those who wait as there is room for."""
        now = asyncio.get_running_loop().time()
        silent = self._silent_since is not None and now - self._silent_since > self.patience
        if silent and self._waiting and not any(server.ready for server in self._servers):
            problems = "; ".join(f"{server.url}: {server.problem}" for server in self._servers if server.problem)
            self.close(SamplerError(f"no server has answered for {self.patience:g} s. {problems}. Are they running?"))
        while self._waiting:
            server = self._choose(self._waiting[0].prompt, now)
            if server is None:
                break
            turn = self._waiting.popleft()
            if not turn.place.done():
                server.running += 1
                server.served += 1
                turn.place.set_result(server)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        resting = [server.rests_until for server in self._servers if server.rests_until > now]
        if self._waiting and resting:
            self._timer = asyncio.get_running_loop().call_at(min(resting), self._serve)

    def _choose(self, prompt: list[int], now: float) -> Server | None:
        room = [server for server in self._servers if server.rests_until <= now and server.running < server.slots]
        if len(self._servers) == 1 or not room:
            return room[0] if room else None
        idlest = min(room, key=lambda server: (server.running, server.served))
        found = [self._holders[number] for number, _ in self._index.find(prompt)]
        held = min((server for server in found if server in room), key=lambda server: server.running, default=idlest)
        chosen = held if held.running - idlest.running < max(4, held.slots // 4) else idlest
        self._note(chosen, prompt)  # siblings come right behind
        return chosen

    def _note(self, server: Server, tokens: list[int]) -> None:
        if len(self._servers) == 1:
            return
        for number, shared in self._index.find(tokens):
            if self._holders[number] is server and shared == len(tokens):
                return
        number = next(self._numbers)
        self._holders[number] = server
        self._index.put(number, tokens)
        if len(self._holders) > REMEMBERED * len(self._servers):
            self._drop(next(iter(self._holders)))

    def _drop(self, number: int) -> None:
        del self._holders[number]
        self._index.drop(number)
