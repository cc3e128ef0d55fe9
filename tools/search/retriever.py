"""A client for retrieval servers that take ``POST {"queries": [...], "topk": k}``.

The form is Search-R1's (Jin et al. 2025, arXiv:2503.09516), which its successors kept::

    {"result": [[{"document": {"contents": "..."}, "score": 1.0}, ...], ...]}

with one list per query; without scores each item is the document itself, ``{"contents": "..."}``.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from agentrl.errors import ToolInfrastructureError

if TYPE_CHECKING:
    import httpx


@dataclass(slots=True)
class _Lane:
    """What is bound to one event loop."""

    client: httpx.AsyncClient
    slots: asyncio.Semaphore
    users: int = 0


class _Retry(Exception):
    """An attempt failed in a way that may pass."""


class HttpRetriever:
    """Asks a retrieval server; one object serves all episodes.

    Connection errors, 429 and 5xx are tried again, other statuses are not. Whatever still fails is the infrastructure's
    fault and raised: an episode never sees an empty result instead.

    Args:
        url: full address, as in ``http://127.0.0.1:8000/retrieve``.
        deadline: seconds for one query, waiting and all attempts included.
        attempt_timeout: seconds for one attempt.
        retries: attempts after the first.
        backoff: seconds before the second attempt; doubled for each further one.
        concurrency: requests in flight at once, per event loop.
        cache: answers kept, least recently used first out; 0 for none.
    """

    def __init__(
        self,
        url: str,
        *,
        deadline: float = 30.0,
        attempt_timeout: float = 10.0,
        retries: int = 4,
        backoff: float = 0.2,
        concurrency: int = 32,
        cache: int = 10_000,
    ) -> None:
        self.url = url
        self.deadline, self.attempt_timeout = deadline, attempt_timeout
        self.retries, self.backoff = retries, backoff
        self.concurrency = concurrency
        self._cache_size = cache
        self._cache: OrderedDict[tuple[str, int], tuple[str, ...]] = OrderedDict()
        self._lanes: WeakKeyDictionary[asyncio.AbstractEventLoop, _Lane] = WeakKeyDictionary()

    async def acquire(self) -> None:
        """Open this loop's client, or share it."""
        loop = asyncio.get_running_loop()
        if loop not in self._lanes:
            import httpx

            client = httpx.AsyncClient(timeout=self.attempt_timeout)
            self._lanes[loop] = _Lane(client, asyncio.Semaphore(self.concurrency))
        self._lanes[loop].users += 1

    async def release(self) -> None:
        """Close this loop's client when its last user has finished."""
        loop = asyncio.get_running_loop()
        lane = self._lanes[loop]
        lane.users -= 1
        if lane.users == 0:
            del self._lanes[loop]
            await lane.client.aclose()

    async def search(self, query: str, topk: int) -> Sequence[str]:
        """Contents of the best documents, in the server's order.

        Raises:
            ToolInfrastructureError: no usable answer within the deadline and the retries.
        """
        key = (query, topk)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        lane = self._lanes.get(asyncio.get_running_loop())
        if lane is None:
            raise ToolInfrastructureError(f"retrieval from {self.url}: not open; expected acquire() before search().")
        failure = "waiting for a free connection"
        try:
            async with asyncio.timeout(self.deadline), lane.slots:
                for attempt in range(self.retries + 1):
                    if attempt:
                        await asyncio.sleep(self.backoff * 2 ** (attempt - 1))
                    try:
                        found = await self._ask(lane.client, query, topk)
                    except _Retry as error:
                        failure = str(error)
                        continue
                    return self._remember(key, found)
        except TimeoutError:
            raise self._error(f"no answer within {self.deadline:g} s; last: {failure}") from None
        raise self._error(f"{self.retries + 1} attempts failed; last: {failure}")

    async def _ask(self, client: httpx.AsyncClient, query: str, topk: int) -> tuple[str, ...]:
        import httpx

        try:
            response = await client.post(self.url, json={"queries": [query], "topk": topk, "return_scores": True})
        except httpx.TransportError as error:
            raise _Retry(f"{type(error).__name__}: {error}") from error
        except httpx.InvalidURL as error:
            raise self._error(f"not a usable address: {error}") from error
        if response.status_code == 429 or response.status_code >= 500:
            raise _Retry(f"HTTP {response.status_code}")
        if response.status_code != 200:
            raise self._error(f"HTTP {response.status_code}: {response.text[:200]!r}; not tried again")
        try:
            return _contents(response.json())
        except ValueError as error:
            wanted = '{"result": [[{"document": {"contents": "..."}}]]}'
            raise self._error(f"expected {wanted}, got {response.text[:200]!r} ({error})") from error

    def _remember(self, key: tuple[str, int], found: tuple[str, ...]) -> tuple[str, ...]:
        if self._cache_size:
            self._cache[key] = found
            if len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return found

    def _error(self, problem: str) -> ToolInfrastructureError:
        return ToolInfrastructureError(f"retrieval from {self.url} failed: {problem}. Is the server running?")


@lru_cache(maxsize=16)
def shared_retriever(url: str) -> HttpRetriever:
    """The retriever of ``url`` with default settings, one per process."""
    return HttpRetriever(url)


def _contents(body: Any) -> tuple[str, ...]:
    """The texts of a response to one query; raises ``ValueError`` where it has another form."""
    lists = body.get("result") if isinstance(body, dict) else None
    if not isinstance(lists, list) or len(lists) != 1 or not isinstance(lists[0], list):
        raise ValueError("no list of one list under 'result'")
    texts = []
    for item in lists[0]:
        document = item.get("document", item) if isinstance(item, dict) else None
        contents = document.get("contents") if isinstance(document, dict) else None
        if not isinstance(contents, str):
            raise ValueError("a document without a text under 'contents'")
        texts.append(contents)
    return tuple(texts)
