"""The client of ``agentrl serve`` against servers that fail as they are told to. The real one is in tests/vllm."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections import deque
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from agentrl.errors import SamplerError
from agentrl.sampler import vllm_connection, vllm_server
from agentrl.sampler.board import Cells
from agentrl.sampler.server_wire import WIRE, Piece, WireError, decode_line, encode_piece, print_shapes, print_tokenizer
from agentrl.sampler.vllm_server import VLLMServerSampler
from agentrl.types import SamplingParams, StopReason

PROMPT = tuple(range(20, 60))
SHAPES = {"a": (2, 3), "b": (4,)}
WEIGHTS = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
PARAMS = SamplingParams(12, seed=5)
TOKEN = "a-token-of-the-tests"


class Tokenizer:
    def get_vocab(self):
        return {"a": 0, "b": 1}


def truth(seed, count, start=0):
    """A policy's tokens: a function of seed and position."""
    return [(7 * seed + 13 * place + place * place) % 90 for place in range(start, start + count)]


def exist(files):
    return [Path(file).is_file() for file in files]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 -- what is waited for happens in the server
            await asyncio.sleep(0.001)


class Script:
    """A server that follows ``faults``: each answer to a request for tokens takes the next one, then there are none."""

    def __init__(self, version=0, slots=64, **facts):
        self.version, self.slots, self.facts = version, slots, facts
        self.faults, self.asked, self.received, self.seen = deque(), [], [], []
        self.running = self.most = self.left = 0
        self.hold = asyncio.Event()
        self.hold.set()
        self.loads_fail = deque()
        self.port = 0
        self._serving = {}

    async def start(self):
        self.instance = self.revision = uuid.uuid4().hex
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def stop(self):
        self._server.close()
        for writer in self._serving.values():
            writer.transport.abort()
        if self._serving:
            await asyncio.wait(self._serving)

    async def restart(self, version=0):
        await self.stop()
        self.version = version
        await self.start()

    def info(self):
        facts = {"wire": WIRE, "policy": print_shapes(SHAPES), "tokenizer": print_tokenizer(Tokenizer())}
        facts |= {"vocabulary": 100, "max_length": 512, "max_slots": self.slots, "workers": 1, "model": "scripted"}
        facts |= {"instance": self.instance, "revision": self.revision, "version": self.version}
        return facts | {"prompt_tokens": 40, "reused_tokens": 30} | self.facts

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._serving[task] = writer
        task.add_done_callback(self._serving.pop)
        try:
            while True:
                await self._answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()

    async def _answer(self, reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1].removeprefix("/agentrl/")
        size = next((line for line in head.lower().split("\r\n") if line.startswith("content-length")), ":0")
        body = json.loads(await reader.readexactly(int(size.split(":")[1])) or b"{}")
        if f"authorization: bearer {TOKEN}" not in head.lower():
            await self._status(writer, 401)
        elif path == "info":
            await self._status(writer, 200, self.info())
        elif path == "receive":
            await self._take(writer, body)
        else:
            await self._sample(reader, writer, body)

    async def _status(self, writer, status, data=None, headers=""):
        content = json.dumps(data).encode() + b"\n"
        writer.write(f"HTTP/1.1 {status} X\r\n{headers}content-length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()

    async def _take(self, writer, body):
        problem = self.loads_fail.popleft() if self.loads_fail else None
        if problem == "break":
            raise ConnectionError
        if problem == "fail":
            return await self._status(writer, 500, {"error": "failed", "message": "the engine is dead"})
        self.received.append(body["arguments"])
        self.seen.append(exist(body["arguments"]["files"]))
        self.version, self.revision = body["arguments"]["version"], body["revision"]
        return await self._status(writer, 200, {"version": self.version})

    async def _sample(self, reader, writer, body):
        kind, *details = self.faults.popleft() if self.faults else (None,)
        self.asked.append(body)
        if self.revision not in body["revisions"]:
            await self._status(writer, 409, {"error": "stale", "message": "other weights"})
            return
        if kind == "status":
            await self._status(writer, *details)
            return
        if kind == "hang up":
            raise ConnectionError
        self.running += 1
        self.most = max(self.most, self.running)
        leaving = asyncio.ensure_future(reader.read(1))
        holding = asyncio.ensure_future(self.hold.wait())
        try:
            await asyncio.wait([leaving, holding], return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self.left += 1
                raise ConnectionError
            leaving.cancel()
            with suppress(asyncio.CancelledError):
                await leaving
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for line in self._lines(body, kind, *details):
                if line is None:
                    await writer.drain()
                    raise ConnectionError
                if isinstance(line, float):
                    await asyncio.sleep(line)
                else:
                    writer.write(b"%x\r\n%s\r\n" % (len(line), line))
            writer.write(b"0\r\n\r\n")
            await writer.drain()
        finally:
            holding.cancel()
            self.running -= 1

    def _lines(self, body, kind, at=0, what=None):
        """The answer, with ``kind`` of fault at token ``at``."""
        params, start = body["params"], body["start"]
        assert body["token_ids"][len(body["token_ids"]) - start :] == truth(params["seed"], start)
        ids = truth(params["seed"], params["max_tokens"], start)
        step = 1 if body["pieces"] else len(ids)
        for place in range(0, len(ids), step):
            part = ids[place : place + step]
            if kind == "break" and place >= at:
                yield None
            if kind == "half a line" and place >= at:
                yield b"[0,[1,2],[-0.5,"
                yield None
            if kind in ("line", "silence") and place >= at:
                yield what
                kind = None
            version = what if kind == "version" and place >= at else self.version
            numbers = [-float(start + each) for each in range(place, place + len(part))]
            reason = StopReason.LENGTH if place + step >= len(ids) else None
            line = encode_piece(Piece(place, Cells(part, numbers, numbers, [version] * len(part)), reason))
            if kind == "twice" and place >= at:
                yield line
            if kind == "no reason" and reason:
                continue
            yield b"\n"
            yield line


@pytest.fixture(autouse=True)
def short_rests(monkeypatch):
    monkeypatch.setattr(vllm_connection, "REST_SECONDS", 0.01)
    monkeypatch.setattr(vllm_connection, "LONGEST_REST_SECONDS", 0.05)


@pytest.fixture
async def make_script():
    """``await make_script(...)``: a ``Script`` that runs."""
    made = []

    async def make(**options):
        made.append(await Script(**options).start())
        return made[-1]

    yield make
    for server in made:
        await server.stop()


@pytest.fixture
async def script(make_script):
    return await make_script()


@pytest.fixture
async def other(make_script):
    return await make_script()


@pytest.fixture
async def connect(tmp_path):
    """``await connect(*servers, **options)``: a sampler, closed at the end."""
    made = []

    async def start(*servers, **options):
        options = {"max_length": 512, "patience": 0.4, "silent_seconds": 0.2, "tokenizer": Tokenizer()} | options
        options = {"shapes": SHAPES, "vocabulary": 100, "token": TOKEN, "weights_dir": tmp_path} | options
        made.append(await VLLMServerSampler.start([server.url for server in servers], **options))
        return made[-1]

    yield start
    for sampler in made:
        await sampler.close()


async def read(sampler, params=PARAMS, prompt=PROMPT):
    return [event async for event in sampler.stream(prompt, params)]


def check(events, count=12, version=0):
    """Each token once, in order, the reason with the last one."""
    assert [event.token_id for event in events] == truth(5, count)
    assert [event.logprob for event in events] == [-float(place) for place in range(count)]
    assert [event.stop_reason for event in events] == [None] * (count - 1) + [StopReason.LENGTH]
    assert {event.policy_version for event in events} == {version}


async def test_samples_and_streams(script, connect):
    sampler = await connect(script)
    done = await sampler.sample(PROMPT, PARAMS)
    assert (list(done.token_ids), done.stop_reason) == (truth(5, 12), StopReason.LENGTH)
    check(await read(sampler))
    await sampler.count()
    assert (sampler.prompt_tokens, sampler.reused_tokens) == (40, 30)


STALE = {"error": "stale", "message": "other weights"}
FAILED = {"error": "failed", "message": "vLLM failed: CUDA out of memory"}


@pytest.mark.parametrize(
    ("fault", "start"),
    [
        (("status", 503, FAILED), 0),
        (("status", 502, "a proxy's words"), 0),
        (("status", 500, FAILED), 0),
        (("status", 503, {"error": "busy", "message": "many"}, "retry-after: 0\r\n"), 0),
        (("status", 409, STALE), 0),
        (("hang up",), 0),
        (("break", 0), 0),
        (("break", 5), 5),
        (("half a line", 5), 5),
        (("line", 5, b"<html>no</html>\n"), 5),
        (("line", 5, b"[6,[1],[-0.1],[0.1],[0],null]\n"), 5),
        (("line", 5, b"[5,[1,2],[-0.1],[0.1],[0],null]\n"), 5),
        (("line", 5, b"[5,[1],[NaN],[0.1],[0],null]\n"), 5),
        (("line", 5, json.dumps(FAILED).encode() + b"\n"), 5),
        (("line", 5, b'{"what": 1}\n'), 5),
        (("twice", 5), 6),
        (("silence", 5, 0.5), 5),
        (("no reason",), 11),
    ],
    ids=str,
)
async def test_what_breaks_off_goes_on_and_no_token_comes_twice(script, connect, fault, start):
    script.faults.append(fault)
    events = await read(await connect(script))
    check(events)
    assert [body["start"] for body in script.asked] == [0, start]
    assert script.asked[1]["params"]["max_tokens"] == 12 - start
    assert len({body["id"] for body in script.asked}) == 1, "under the same id, which ends the older one"


async def test_a_whole_answer_that_breaks_off_is_asked_for_again(script, connect):
    script.faults.extend([("break", 0), ("half a line", 0)])
    done = await (await connect(script)).sample(PROMPT, PARAMS)
    assert list(done.token_ids) == truth(5, 12)


@pytest.mark.parametrize("version", [1, -1])
async def test_tokens_of_weights_that_nobody_expected_are_an_error(script, connect, version):
    script.faults.append(("version", 4, version))
    sampler = await connect(script)
    with pytest.raises(SamplerError, match=f"{script.url} sampled with version {version} .* expected 0"):
        await read(sampler)
    assert len(script.asked) == 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (("status", 400, {"error": "refused", "message": "no such thing"}), "refuses: no such thing"),
        (("status", 404, "lost"), "is not a server of agentrl: HTTP 404"),
        (("status", 413, "long"), "HTTP 413"),
    ],
)
async def test_what_can_never_be_served_is_not_asked_again(script, connect, fault, message):
    script.faults.append(fault)
    sampler = await connect(script)
    with pytest.raises(SamplerError, match=message):
        await read(sampler)
    assert len(script.asked) == 1
    check(await read(sampler))


async def test_answers_without_a_token_are_counted_and_a_token_starts_anew(script, connect):
    sampler = await connect(script, patience=30.0)
    script.faults.extend([("break", 1)] * 11)
    check(await read(sampler))
    script.faults.extend([("break", 0)] * vllm_server.ATTEMPTS)
    with pytest.raises(SamplerError, match=rf"{script.url} broke off 5 answers in a row.*Tried"):
        await read(sampler)
    check(await read(sampler))


async def test_no_server_answers_for_longer_than_patience(script, connect):
    sampler = await connect(script)
    await script.stop()
    began = asyncio.get_running_loop().time()
    found = await asyncio.gather(*(read(sampler) for _ in range(5)), return_exceptions=True)
    assert {type(error) for error in found} == {SamplerError}
    assert f"{script.url}: ConnectError" in str(found[0])
    assert 0.4 < asyncio.get_running_loop().time() - began < 2
    await script.start()
    check(await read(sampler))  # a new attempt has its own patience


async def test_a_failure_long_ago_counts_for_nothing(script, connect):
    sampler = await connect(script, patience=0.1)
    script.faults.append(("hang up",))
    reading = asyncio.create_task(read(sampler))
    await until(lambda: script.asked)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    await asyncio.sleep(0.15)
    script.faults.append(("hang up",))
    check(await read(sampler))


async def test_a_busy_server_is_waited_for(script, connect):
    sampler = await connect(script, patience=0.05)
    busy = ("status", 503, {"error": "busy", "message": "many"}, "retry-after: 0\r\n")
    script.faults.extend([busy] * 2 * vllm_server.ATTEMPTS)
    check(await read(sampler))


# -- weights ----------------------------------------------------------------------------------------------------------


async def test_a_restarted_server_gets_the_last_weights_again(script, connect):
    sampler = await connect(script)
    await sampler.update_weights(WEIGHTS, 3)
    assert (script.version, sampler.version, script.seen) == (3, 3, [[True]])
    script.faults.append(("break", 5))
    stream = sampler.stream(PROMPT, PARAMS)
    events = [await anext(stream) for _ in range(5)]
    await script.restart()
    events += [event async for event in stream]
    check(events, version=3)
    assert (script.version, script.seen) == (3, [[True], [True]])
    await sampler.update_weights(WEIGHTS, 4)
    check(await read(sampler), version=4)
    files = {each["files"][0] for each in script.received}
    assert exist(files).count(True) == 1, "only the last ones are kept"
    await sampler.close()
    assert not any(exist(files))


async def test_a_restarted_server_with_other_weights_is_an_error_where_there_are_none_to_give(script, connect):
    sampler = await connect(script)
    await script.restart(version=0)
    check(await read(sampler))  # it was started with what this client expects
    await script.restart(version=2)
    with pytest.raises(
        SamplerError, match=f"{script.url} has version 2 of the weights, expected 0. Call update_weights"
    ):
        await read(sampler)


async def test_a_restarted_server_that_does_not_take_the_last_weights_is_an_error(script, connect):
    sampler = await connect(script)
    await sampler.update_weights(WEIGHTS, 3)
    await script.restart()
    script.loads_fail.append("fail")
    with pytest.raises(SamplerError, match=f"{script.url} was restarted and did not get the last weights again"):
        await read(sampler)
    check(await read(sampler), version=3)


async def test_version_skew_at_the_start_is_an_error_until_weights_come(script, connect):
    sampler = await connect(script, version=7)
    with pytest.raises(SamplerError, match="has version 0 of the weights, expected 7"):
        await read(sampler)
    await sampler.update_weights(WEIGHTS, 8)
    check(await read(sampler), version=8)


async def test_weights_from_somebody_else_are_an_error(script, connect):
    one, two = await connect(script), await connect(script)
    await two.update_weights(WEIGHTS, 0)  # other weights under the same version
    with pytest.raises(SamplerError, match="somebody else gave weights"):
        await read(one)


async def test_in_an_update_old_and_new_weights_are_expected_and_after_it_only_new_ones(script, connect):
    sampler = await connect(script)
    script.faults.append(("break", 5))
    stream = sampler.stream(PROMPT, PARAMS)
    events = [await anext(stream) for _ in range(5)]
    await sampler.update_weights(WEIGHTS, 1)
    events += [event async for event in stream]
    assert [event.policy_version for event in events] == [0] * 5 + [1] * 7
    assert [event.token_id for event in events] == truth(5, 12)
    script.faults.append(("version", 0, 0))
    with pytest.raises(SamplerError, match=r"sampled with version 0 .* expected 1"):
        await read(sampler)


async def test_an_update_that_is_lost_on_its_way_is_made_again(script, other, connect):
    sampler = await connect(script, other)
    other.loads_fail.extend(["break", "break"])
    await sampler.update_weights(WEIGHTS, 1)
    assert (script.version, other.version, sampler.version) == (1, 1, 1)


async def test_an_update_that_one_server_does_not_take_is_an_error_and_the_others_go_back(script, other, connect):
    sampler = await connect(script, other)
    await sampler.update_weights(WEIGHTS, 1)
    other.loads_fail.append("fail")
    with pytest.raises(SamplerError, match=f"{other.url} did not take new weights .load_files.: the engine is dead"):
        await sampler.update_weights(WEIGHTS, 2)
    assert (script.version, other.version, sampler.version) == (2, 1, 1)
    check(await read(sampler), version=1)
    assert script.version == 1, "it got the last weights that all of them have"


async def test_an_update_waits_no_longer_than_patience(script, other, connect):
    sampler = await connect(script, other)
    await other.stop()
    with pytest.raises(SamplerError, match=f"{other.url} did not take new weights"):
        await sampler.update_weights(WEIGHTS, 1)
    assert sampler.version == 0


# -- who is asked -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"wire": 2}, "expected wire 1, found 2"),
        ({"policy": "3 parameters"}, "expected policy 2 parameters, 10 numbers, .*, found 3 parameters"),
        ({"tokenizer": "9 tokens"}, "expected tokenizer 2 tokens, .*, found 9 tokens"),
        ({"vocabulary": 99}, "expected vocabulary 100, found 99"),
        ({"max_length": 511}, "takes 511 tokens a sequence, expected 512"),
    ],
)
async def test_another_kind_of_server_is_refused(make_script, connect, facts, message):
    server = await make_script(**facts)
    with pytest.raises(SamplerError, match=f"{server.url}.*{message}"):
        await connect(server)


async def test_a_server_that_comes_back_as_another_one_is_refused(script, connect):
    sampler = await connect(script)
    script.facts["policy"] = "3 parameters"
    await script.restart()
    with pytest.raises(SamplerError, match="expected policy"):
        await read(sampler)


async def test_starting_without_a_server_a_url_or_a_token(script, connect, monkeypatch):
    monkeypatch.delenv("AGENTRL_SERVER_TOKEN", raising=False)
    with pytest.raises(SamplerError, match="refused the token"):
        await connect(script, token="another-token-altogether")
    with pytest.raises(SamplerError, match="AGENTRL_SERVER_TOKEN is not set"):
        await connect(script, token=None)
    with pytest.raises(SamplerError, match=r"sampler.urls is empty"):
        await connect()
    await script.stop()
    with pytest.raises(SamplerError, match=f"{script.url} does not answer: ConnectError"):
        await connect(script)
    script.url = "localhost"
    with pytest.raises(SamplerError, match=r"'localhost' in sampler.urls is no url"):
        await connect(script)


async def test_siblings_and_later_turns_go_where_their_prompt_is(script, other, connect):
    sampler = await connect(script, other)
    prompts = [tuple(range(first, first + 30)) for first in (0, 20, 40, 60)]
    jobs = [sampler.sample(p, SamplingParams(12, seed=s)) for p in prompts for s in range(4)]
    done = await asyncio.gather(*jobs)
    where = {
        prompt: {s.port for s in (script, other) for b in s.asked if tuple(b["token_ids"]) == prompt}
        for prompt in prompts
    }
    assert all(len(ports) == 1 for ports in where.values())
    assert len(script.asked) == len(other.asked) == 8
    for prompt, answer in zip(prompts, done[::4], strict=True):
        asked = len(script.asked)
        await sampler.sample([*prompt, *answer.token_ids, 1, 2, 3], PARAMS)
        assert (len(script.asked) > asked) == (where[prompt] == {script.port})


async def test_affinity_ends_where_one_server_has_too_much_to_do(script, other, connect):
    sampler = await connect(script, other, max_slots=16)
    script.hold.clear()
    other.hold.clear()
    jobs = [asyncio.create_task(sampler.sample(PROMPT, SamplingParams(12, seed=s))) for s in range(5)]
    await until(lambda: script.running + other.running == 5)
    assert sorted([script.running, other.running]) == [1, 4]
    jobs += [asyncio.create_task(sampler.sample(PROMPT, SamplingParams(12, seed=s))) for s in range(5, 20)]
    await until(lambda: script.running + other.running == 20)
    assert script.running == other.running == 10, "both have it by now"
    script.hold.set()
    other.hold.set()
    await asyncio.gather(*jobs)


async def test_the_other_server_takes_over(script, other, connect):
    sampler = await connect(script, other)
    for server in (script, other):
        server.faults.append(("break", 5))
    stream = sampler.stream(PROMPT, PARAMS)
    events = [await anext(stream) for _ in range(5)]
    dead, alive = (script, other) if script.asked else (other, script)
    alive.faults.clear()
    await dead.stop()
    events += [event async for event in stream]
    check(events)
    assert [body["start"] for body in alive.asked] == [5]
    found = await asyncio.gather(*(sampler.sample(range(i, i + 20), PARAMS) for i in range(30)))
    assert all(list(done.token_ids) == truth(5, 12) for done in found)
    await dead.start()
    await asyncio.sleep(0.1)
    asked = len(dead.asked)
    await asyncio.gather(*(sampler.sample(range(i, i + 20), PARAMS) for i in range(30)))
    assert len(dead.asked) > asked, "it is back at work"


async def test_no_more_than_its_slots_first_come_first_served(make_script, connect):
    server = await make_script(slots=3)
    server.hold.clear()
    sampler = await connect(server)
    jobs = [asyncio.create_task(sampler.sample(PROMPT, SamplingParams(2, seed=s))) for s in range(12)]
    await asyncio.sleep(0)
    jobs[6].cancel()
    await until(lambda: server.running == 3)
    server.hold.set()
    await asyncio.gather(*jobs, return_exceptions=True)
    assert server.most == 3
    assert sorted(body["params"]["seed"] for body in server.asked) == [*range(6), *range(7, 12)]
    assert [body["params"]["seed"] for body in server.asked][-1] > 8
    assert not sampler.servers[0].running


async def test_cancelling_hangs_up_and_closing_ends_everything(script, connect):
    sampler = await connect(script, max_slots=2)
    script.hold.clear()
    jobs = [asyncio.create_task(sampler.sample(PROMPT, SamplingParams(2, seed=s))) for s in range(4)]
    await until(lambda: script.running == 2)
    jobs[0].cancel()
    await until(lambda: script.left and script.running == 2)
    await sampler.close()
    found = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(each) for each in found] == [asyncio.CancelledError] + [SamplerError] * 3
    with pytest.raises(SamplerError, match="closed"):
        await sampler.sample(PROMPT, PARAMS)
    with pytest.raises(SamplerError, match="closed"):
        await sampler.update_weights(WEIGHTS, 1)


def test_lines_carry_every_bit():
    cells = Cells([1, 2], [-0.1000000014901161, -1e-30], [0.0, 5.5], [0, 3])
    piece = Piece(7, cells, StopReason.STOP)
    assert decode_line(encode_piece(piece)) == piece
    for line in (b"[]", b"7", b"[0,[],[],[],[],null]", b"[0,[1],[-1],[0.5],[0],null]", b'[0,[1],[-1.0],[0.5],[0],"x"]'):
        with pytest.raises(WireError):
            decode_line(line)
