"""Which calls of a client ran, and their answers: what makes a repeated call safe."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from agentrl.sandbox.calls import Reply

FORGOTTEN = 65_536
"""Most numbers of calls that are remembered one by one after their answers were dropped."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What one client may use.

    An answer is kept until the client says that it has it (``settled``), so that a client whose connection broke can
    ask again. One that is never fetched is dropped when one of the last three bounds is passed, oldest first; its call
    is then refused rather than run again.

    Args:
        sessions: live sessions, those that were forked included; default 512.
        calls: calls at the same time; default 1024.
        replies: answers that are kept; default 1024.
        reply_bytes: bytes of their bodies; default 64 MiB.
        reply_seconds: how long one is kept; looked at with each new call; default 300.
    """

    sessions: int = 512
    calls: int = 1024
    replies: int = 1024
    reply_bytes: int = 64 * 1024 * 1024
    reply_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class _Kept:
    reply: Reply
    since: float


class Ledger:
    """Remembers calls that have ended.

    Numbers up to ``_floor`` are over. Above it, ``_forgotten`` has those whose answers were dropped; when there are
    too many of them, the floor rises over the oldest. A call that comes for the first time after that is refused
    although it never ran: a mistake is always on this side.
    """

    def __init__(self, quota: Quota) -> None:
        self._quota = quota
        self._kept: dict[int, _Kept] = {}  # in the order in which they ended
        self._forgotten: dict[int, None] = {}
        self._floor = 0
        self._bytes = 0

    def answer(self, number: int) -> Reply | None:
        """The answer of a call, where it is still kept."""
        kept = self._kept.get(number)
        return None if kept is None else kept.reply

    def is_over(self, number: int) -> bool:
        """Whether a call without an answer must not be run."""
        return number <= self._floor or number in self._forgotten

    def keep(self, number: int, reply: Reply) -> None:
        """Keep the answer of a call that has just ended."""
        if number > self._floor:
            self._kept[number] = _Kept(reply, time.monotonic())
            self._bytes += len(reply[1])
            self.trim()

    def forget(self, number: int) -> None:
        """Drop the answer of a call, or refuse the call if it has yet to come."""
        self._drop(number)
        if number > self._floor:
            self._forgotten[number] = None
            if len(self._forgotten) > FORGOTTEN:
                oldest = next(iter(self._forgotten))
                del self._forgotten[oldest]
                self._floor = max(self._floor, oldest)

    def trim(self) -> None:
        """Drop the oldest answers until the bounds hold."""
        stale = time.monotonic() - self._quota.reply_seconds
        while self._kept:
            number, oldest = next(iter(self._kept.items()))
            few = len(self._kept) <= self._quota.replies and self._bytes <= self._quota.reply_bytes
            if few and oldest.since >= stale:
                return
            self.forget(number)

    def settle(self, below: int) -> None:
        """Take the client's word that it will not ask for calls below this number again."""
        if below - 1 <= self._floor:
            return
        over: Any = range(self._floor + 1, below)
        if len(over) > len(self._kept) + len(self._forgotten):  # the number may be anything
            over = [number for number in (*self._kept, *self._forgotten) if number < below]
        for number in over:
            self._drop(number)
            self._forgotten.pop(number, None)
        self._floor = below - 1

    def _drop(self, number: int) -> None:
        kept = self._kept.pop(number, None)
        if kept is not None:
            self._bytes -= len(kept.reply[1])
