"""Several coroutines at once, without an exception group where one of them fails; and when each was at work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def together(*work: Coroutine[Any, Any, T]) -> list[T]:
    """The results of ``work``, all run at once, in order.

    Raises:
        BaseException: what the first of them to fail raised, when the others, cancelled by then, have ended.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


_LEARNER = ThreadPoolExecutor(1, "agentrl-learner")
"""One thread: glibc gives each its own arena and keeps there what an update freed, 0.35 to 0.55 GiB in the demo."""


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run ``function`` in the learner's thread; over only when it is, also where the one who waits is cancelled."""
    call = asyncio.get_running_loop().run_in_executor(_LEARNER, partial(function, *args, **kwargs))
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        await asyncio.wait([call])
        call.exception()  # nobody else will ask for it
        raise


@dataclass(frozen=True, slots=True)
class Timed:
    """What came of some work, and when it was done, by ``time.perf_counter``."""

    result: Any
    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began

    def overlap(self, other: Timed) -> float:
        """Seconds in which both were being done."""
        return max(min(self.ended, other.ended) - max(self.began, other.began), 0.0)


async def timed(work: Coroutine[Any, Any, Any]) -> Timed:
    """Await ``work``."""
    began = time.perf_counter()
    return Timed(await work, began, time.perf_counter())
