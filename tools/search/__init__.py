"""``search``: look something up in a corpus (BM25, in this process) or at a retrieval server (HTTP)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from agentrl.errors import UserError
from agentrl.tool import Tool
from agentrl.types import ForkLevel

from .bm25 import Bm25Index, load_index, read_document
from .retriever import HttpRetriever, shared_retriever

__all__ = ["TOOL", "Backend", "Bm25Index", "HttpRetriever", "Search"]


class Backend(Protocol):
    """What answers queries. One is shared by all episodes."""

    async def search(self, query: str, topk: int) -> Sequence[str]:
        """At most ``topk`` texts, best first; raises ``ToolInfrastructureError`` where it cannot answer."""
        ...

    async def acquire(self) -> None:
        """An episode begins to use it."""
        ...

    async def release(self) -> None:
        """An episode has finished with it; the last one of an event loop closes what is bound to that loop."""
        ...


class Search(Tool):
    """Search, with one argument. Nothing of an episode is kept, so a fork costs nothing.

    Args:
        corpus: a folder of ``.txt`` and ``.md`` files, a JSONL file of ``{"id", "title", "text"}``, or such records.
            Files are indexed once for all episodes; records anew by every ``Search`` (pass its ``backend`` on).
        url: address of a retrieval server; exactly one of ``corpus``, ``url`` and ``backend`` is given.
        topk: most texts per query.
        backend: your own source of texts.

    Raises:
        UserError: none or several of ``corpus``, ``url`` and ``backend``.
        TaskError: a corpus that cannot be read.
    """

    name = "search"
    timeout = 60.0
    fork_level = ForkLevel.COPY

    def __init__(
        self,
        corpus: str | Path | Sequence[Mapping[str, Any]] | None = None,
        *,
        url: str | None = None,
        topk: int = 1,
        backend: Backend | None = None,
    ) -> None:
        given = [name for name, value in (("corpus", corpus), ("url", url), ("backend", backend)) if value is not None]
        if len(given) != 1:
            raise UserError(f"search: expected one of corpus, url and backend, got {' and '.join(given) or 'none'}.")
        self.topk = topk
        self._held = False
        if backend is not None:
            self.backend = backend
        elif url is not None:
            self.backend = shared_retriever(url)
        elif isinstance(corpus, str | Path):
            self.backend = load_index(Path(corpus).resolve())
        else:
            self.backend = Bm25Index([read_document(f"record {n}", row) for n, row in enumerate(corpus or ())])

    async def start(self, seed: int) -> None:
        """Take part in the backend."""
        await self.backend.acquire()
        self._held = True

    async def run(self, query: str) -> str:
        """Search the documents.

        Args:
            query: What to look for.
        """
        found = await self.backend.search(query, self.topk)
        return "\n".join(found) or "Nothing found."

    async def fork(self) -> Search:
        """Another user of the same backend."""
        twin = Search(backend=self.backend, topk=self.topk)
        await twin.start(0)
        return twin

    async def close(self) -> None:
        """Give the backend up. Safe to call twice."""
        if self._held:
            self._held = False
            await self.backend.release()


TOOL = Search
