"""The HTTP backend against a real server on 127.0.0.1."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agentrl.env import make_tool
from agentrl.errors import ToolInfrastructureError
from agentrl.tool import dispatch
from agentrl.tools import search
from agentrl.types import ToolCall


class Server(ThreadingHTTPServer):
    """Answers with whatever ``script`` says for the n-th request; the last entry goes on for ever."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, *script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests = script or (ok,), []
        self.lock, self.busy, self.busiest = threading.Lock(), 0, 0
        self.url = f"http://127.0.0.1:{self.server_port}/retrieve"

    def handle_error(self, request, client_address):
        """A client that gave up closes its connection; that is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            answer = server.script[min(len(server.requests), len(server.script) - 1)]
            server.requests.append(request)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        status, body = answer(request)
        with server.lock:
            server.busy -= 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def ok(request):
    """Search-R1's answer, with scores."""
    texts = [f"{request['queries'][0]} {i}" for i in range(request["topk"])]
    return 200, json.dumps({"result": [[{"document": {"contents": t}, "score": 1.0} for t in texts]]}).encode()


def plain(request):
    return 200, json.dumps({"result": [[{"id": "7", "contents": "plain"}]]}).encode()


def status(code):
    return lambda request: (code, b"sorry")


def body(text):
    return lambda request: (200, text.encode())


def slow(seconds):
    def answer(request):
        time.sleep(seconds)
        return ok(request)

    return answer


@asynccontextmanager
async def serving(*script, **options):
    with Server(*script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        retriever = search.HttpRetriever(server.url, backoff=0.01, **options)
        await retriever.acquire()
        try:
            yield server, retriever
        finally:
            await retriever.release()
            server.shutdown()
            thread.join()


async def test_the_common_form_and_the_plain_one():
    async with serving(ok, plain) as (server, retriever):
        assert await retriever.search("towns", 2) == ("towns 0", "towns 1")
        assert {"queries": ["towns"], "topk": 2}.items() <= server.requests[0].items()
        assert await retriever.search("other", 2) == ("plain",)


@pytest.mark.parametrize("code", [500, 503, 429])
async def test_passing_failures_are_tried_again(code):
    async with serving(status(code), status(code), ok) as (server, retriever):
        assert await retriever.search("x", 1) == ("x 0",)
        assert len(server.requests) == 3


@pytest.mark.parametrize("code", [400, 404, 422])
async def test_other_statuses_are_not_tried_again(code):
    async with serving(status(code)) as (server, retriever):
        with pytest.raises(ToolInfrastructureError, match=rf"{server.url}.*HTTP {code}: 'sorry'; not tried again"):
            await retriever.search("x", 1)
        assert len(server.requests) == 1


async def test_it_gives_up_after_its_retries():
    async with serving(status(500), retries=2) as (server, retriever):
        with pytest.raises(ToolInfrastructureError, match="3 attempts failed; last: HTTP 500"):
            await retriever.search("x", 1)
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    "text",
    [
        "{not json",
        "[]",
        '{"results": []}',
        '{"result": []}',
        '{"result": [[], []]}',
        '{"result": [{"contents": "x"}]}',
        '{"result": [[{"text": "x"}]]}',
        '{"result": [[{"document": null, "contents": "x"}]]}',
        '{"result": [["x"]]}',
    ],
)
async def test_another_form_is_an_infrastructure_failure(text):
    async with serving(body(text)) as (server, retriever):
        with pytest.raises(ToolInfrastructureError, match=r"expected .*result.*contents.*, got "):
            await retriever.search("x", 1)
        assert len(server.requests) == 1


async def test_an_empty_list_is_an_answer():
    async with serving(body('{"result": [[]]}')) as (_, retriever):
        assert await search.Search(backend=retriever).run("x") == "Nothing found."


async def test_the_deadline_covers_everything_and_is_named():
    async with serving(slow(5), deadline=0.1) as (_, retriever):
        began = time.perf_counter()
        with pytest.raises(ToolInfrastructureError, match=r"no answer within 0\.1 s"):
            await retriever.search("x", 1)
        assert time.perf_counter() - began < 1


async def test_a_stuck_attempt_is_tried_again():
    async with serving(slow(2), ok, attempt_timeout=0.1) as (server, retriever):
        assert await retriever.search("x", 1) == ("x 0",)
        assert len(server.requests) == 2


async def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    retriever = search.HttpRetriever(url, retries=1, backoff=0.01)
    await retriever.acquire()
    with pytest.raises(
        ToolInfrastructureError, match=r"2 attempts failed; last: ConnectError.*Is the server running\?"
    ):
        await retriever.search("x", 1)
    await retriever.release()


async def test_answers_are_remembered_least_recently_used_first_out():
    async with serving(cache=2) as (server, retriever):
        for query in ("a", "b", "a", "c", "a", "b"):
            await retriever.search(query, 1)
        assert [r["queries"][0] for r in server.requests] == ["a", "b", "c", "b"]
        await retriever.search("a", 2)
        assert len(server.requests) == 5


async def test_no_more_requests_at_once_than_allowed():
    async with serving(slow(0.02), concurrency=3) as (server, retriever):
        await asyncio.gather(*(retriever.search(str(i), 1) for i in range(12)))
        assert 2 <= server.busiest <= 3


async def test_a_failure_leaves_the_episode_and_no_policy_to_blame():
    async with serving(status(404)) as (server, _):
        tool = make_tool("search", url=server.url)
        await tool.start(0)
        with pytest.raises(ToolInfrastructureError):
            await dispatch({"search": tool}, ToolCall("a", "search", {"query": "x"}))
        await tool.close()


async def test_the_last_user_closes_the_client():
    async with serving() as (_, retriever):
        tools = [search.Search(backend=retriever) for _ in range(2)]
        for tool in tools:
            await tool.start(0)
        twin = await tools[0].fork()
        for tool in (*tools, tools[0]):
            await tool.close()
        assert await twin.run("x") == "x 0"
        await twin.close()
        assert await retriever.search("y", 1) == ("y 0",)
    with pytest.raises(ToolInfrastructureError, match="not open"):
        await retriever.search("z", 1)


def test_one_event_loop_after_another():
    async def ask(url):
        tool = make_tool("search", url=url)
        await tool.start(0)
        try:
            return await tool.run("x")
        finally:
            await tool.close()

    async def both():
        async with serving() as (server, _):
            loops = [asyncio.to_thread(asyncio.run, ask(server.url)) for _ in range(2)]
            return await asyncio.gather(*loops)

    assert asyncio.run(both()) == ["x 0", "x 0"]
