"""What sandbox managers have in common: they serve one event loop and close themselves after ``async with``."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from agentrl.errors import UserError


class OneLoop:
    """A manager bound to the event loop that first uses it."""

    _loop: asyncio.AbstractEventLoop | None = None

    async def close(self) -> None:
        """Close everything."""
        raise NotImplementedError

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _check_loop(self) -> None:
        """Raises ``UserError`` in another event loop than the first time."""
        loop, name = asyncio.get_running_loop(), type(self).__name__
        if self._loop is None:
            self._loop = loop
        if self._loop is not loop:
            raise UserError(
                f"this {name} belongs to the event loop that first used it and cannot serve another one; "
                f"make one {name} per event loop."
            )
