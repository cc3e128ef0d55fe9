"""What a rollout may cost: tokens, tool calls and wall time, of one task and of a whole step."""

from __future__ import annotations

import math
import time

from pydantic import BaseModel, ConfigDict, Field


class Caps(BaseModel):
    """Most that may be spent; None: no limit."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    tokens: int | None = Field(None, ge=1, description="tokens that the policy generates")
    calls: int | None = Field(None, ge=0, description="tool calls")
    seconds: float | None = Field(None, gt=0, description="wall time")


class Budget:
    """Counts what is spent, once, however many leaves share it, and says when to stop.

    Args:
        caps: the limits.
        parent: a budget that pays too, as the step's does for every task's.

    Attributes:
        tokens: generated tokens so far, those of trajectories that were dropped included.
        calls: tool calls so far.
    """

    def __init__(self, caps: Caps, parent: Budget | None = None) -> None:
        self._caps, self._parent = caps, parent
        self._began = time.monotonic()
        self.tokens = self.calls = 0

    @property
    def metered(self) -> bool:
        """Whether tokens have to be counted one by one."""
        own = self._caps.tokens is not None or self._caps.seconds is not None
        return own or (self._parent is not None and self._parent.metered)

    @property
    def exhausted(self) -> bool:
        """Whether nothing more may be generated; calls may be used up without that."""
        if self._caps.tokens is not None and self.tokens >= self._caps.tokens:
            return True
        if self._caps.seconds is not None and self.seconds_left <= 0:
            return True
        return self._parent is not None and self._parent.exhausted

    @property
    def seconds_left(self) -> float:
        """Wall time that is left; infinite where nothing limits it."""
        own = math.inf if self._caps.seconds is None else self._caps.seconds - (time.monotonic() - self._began)
        return own if self._parent is None else min(own, self._parent.seconds_left)

    def spend_tokens(self, count: int) -> None:
        """Note generated tokens."""
        self.tokens += count
        if self._parent is not None:
            self._parent.spend_tokens(count)

    def take_calls(self, count: int) -> bool:
        """Pay for ``count`` calls; False, and nothing is paid, where there are not so many left."""
        if self._caps.calls is not None and self.calls + count > self._caps.calls:
            return False
        if self._parent is not None and not self._parent.take_calls(count):
            return False
        self.calls += count
        return True

    def return_calls(self, count: int) -> None:
        """Take back what was paid for calls that were not run."""
        self.calls -= count
        if self._parent is not None:
            self._parent.return_calls(count)
