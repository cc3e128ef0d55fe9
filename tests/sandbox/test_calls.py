from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import runpy
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import (
    ConfigError,
    DeadlineExceeded,
    ForkRefused,
    IsolationUnavailable,
    SandboxError,
    SessionClosed,
    SessionFrozen,
    UnknownName,
    UserError,
)
from agentrl.sandbox import ExecResult, ExecStatus, Limits, Profile, calls, wire
from agentrl.sandbox.base import FILE_BYTES
from agentrl.sandbox.called import CalledSandbox
from agentrl.sandbox.dispatch import Dispatcher
from agentrl.sandbox.ledger import FORGOTTEN, Ledger, Quota
from agentrl.sandbox.stream import Frames, StreamTransport, serve_stream

FakeSandbox = runpy.run_path(str(Path(__file__).parent / "fake_sandbox.py"))["FakeSandbox"]

TEXT = st.text(st.characters(codec=None), max_size=60)  # lone surrogates too


def over_the_wire(head, body=b""):
    """What the other side reads."""
    return calls.read_frame(wire.encode(head, body))


# --- records


def make_error(kind, text, texts):
    if kind is UnknownName:
        return UnknownName("profile", text, texts)
    if kind is ForkRefused:
        return ForkRefused(text, texts)
    if kind is IsolationUnavailable:
        return IsolationUnavailable(texts)
    return kind(text)


@given(st.sampled_from(calls.ERRORS), TEXT, st.lists(TEXT, max_size=calls.REASONS))
def test_an_error_arrives_as_it_was_raised(kind, text, texts):
    error = make_error(kind, text, texts)
    head, _ = over_the_wire(calls.write_error(error))
    back = calls.read_error(head)
    assert type(back) is kind
    assert (str(back), vars(back)) == (str(error), vars(error))


@given(st.sampled_from(sorted(errno.errorcode)), TEXT, st.one_of(st.none(), TEXT))
def test_an_error_of_the_file_system_arrives_as_it_was_raised(number, text, name):
    error = OSError(number, text, name)
    head, _ = over_the_wire(calls.write_error(error, files=True))
    back = calls.read_error(head)
    assert type(back) is type(error)
    assert (back.errno, back.strerror, back.filename, str(back)) == (number, text, name, str(error))


@pytest.mark.parametrize("kind", calls.ERRORS)
def test_an_error_of_any_size_fits_into_a_head(kind):
    error = make_error(kind, "\U0001f600" * 10**6, ["\U0001f600" * 10**4] * 1000)
    head = calls.write_error(error)
    assert len(json.dumps(head)) < wire.HEAD_BYTES
    assert "cut" in str(calls.read_error(head))
    if kind is ForkRefused:
        assert calls.read_error(head).reasons[-1] == f"and {1000 - calls.REASONS} more"


def test_a_subclass_arrives_as_its_listed_parent_and_others_not_at_all():
    class Special(SessionClosed):
        pass

    assert type(calls.read_error(calls.write_error(Special("x")))) is SessionClosed
    for error in (ValueError("x"), DeadlineExceeded("x"), KeyboardInterrupt(), OSError(errno.EIO, "x")):
        assert calls.write_error(error) is None
    assert calls.write_error(OSError("without a number"), files=True) is None


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"error": 1, "message": "x"},
        {"error": "SystemExit", "message": "x"},
        {"error": "SandboxError"},
        {"error": "ForkRefused", "message": "x"},
        {"error": "ForkRefused", "message": "x", "reasons": [1]},
        {"error": "OSError", "message": "x", "errno": "5", "filename": None},
        {"error": "UnknownName", "message": "x", "kind": [], "name": "", "nearest": None},
    ],
)
def test_what_is_no_error_is_not_read_as_one(head):
    with pytest.raises(wire.ProtocolError):
        calls.read_error(head)


RESULTS = st.builds(
    ExecResult,
    st.sampled_from(ExecStatus),
    st.text(),
    st.one_of(st.none(), st.text()),
    st.booleans(),
    st.floats(0, 1e6),
)


@given(RESULTS)
def test_a_result_arrives_as_it_was(result):
    assert calls.read_result(*over_the_wire(*calls.write_result(result))) == result


def test_a_result_with_a_lone_surrogate_arrives_as_clean_text():
    head, body = calls.write_result(ExecResult(ExecStatus.ERROR, "\ud800", "\udfff", True, 0.0))
    assert calls.read_result(head, body).output == "\\ud800"


@pytest.mark.parametrize(
    ("change", "body"),
    [
        ({"status": "great"}, b""),
        ({"output_bytes": -1}, b""),
        ({"output_bytes": 5}, b"1234"),
        ({"output_bytes": 1}, b"\xff"),
        ({"output_bytes": True}, b"1"),
        ({"seconds": "1"}, b""),
        ({"state_kept": 1}, b""),
        ({"has_error": None}, b""),
        ({}, bytes(calls.MAX_RESULT + 1)),
    ],
)
def test_what_is_no_result_is_not_read_as_one(change, body):
    head, _ = calls.write_result(ExecResult(ExecStatus.OK, "", None, True, 0.0))
    with pytest.raises(wire.ProtocolError):
        calls.read_result(head | change, body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        b"\0" * 8,
        wire.encode({}) + b"x",
        wire.encode({}, b"abc")[:-1],
        wire.HEADER.pack(2, calls.MAX_BODY + 1) + b"{}",
        wire.HEADER.pack(3, 0) + b"[1]",
        b"\xff" * 100,
        b"<html>502 Bad Gateway</html>",
    ],
)
def test_what_is_no_frame_is_not_read_as_one(data):
    with pytest.raises(wire.ProtocolError):
        calls.read_frame(data)


@given(st.lists(st.tuples(st.dictionaries(st.text(max_size=5), st.integers()), st.binary(max_size=50))), st.data())
def test_a_stream_is_cut_into_its_frames_wherever_it_breaks(sent, data):
    stream = b"".join(wire.encode(head, body) for head, body in sent)
    frames, got = Frames(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        got += frames.feed(stream[:size])
        stream = stream[size:]
    assert got == sent


# --- the ledger


def test_answers_are_kept_until_they_are_settled():
    ledger = Ledger(Quota())
    for number in (1, 2, 3):
        ledger.keep(number, ({"id": number}, b""))
    ledger.settle(3)
    assert [ledger.answer(number) is not None for number in (1, 2, 3)] == [False, False, True]
    assert [ledger.is_over(number) for number in (1, 2, 3, 4)] == [True, True, False, False]
    ledger.settle(2)
    assert ledger.answer(3) is not None
    ledger.settle(10**18)
    assert ledger.answer(3) is None
    assert ledger.is_over(10**18 - 1)


@pytest.mark.parametrize(("quota", "left"), [(Quota(replies=3), 3), (Quota(reply_bytes=250), 2)])
def test_unfetched_answers_are_dropped_oldest_first_and_their_calls_are_over(quota, left):
    ledger = Ledger(quota)
    for number in range(1, 11):
        ledger.keep(number, ({}, bytes(100)))
    assert [number for number in range(1, 11) if ledger.answer(number)] == list(range(11 - left, 11))
    assert all(ledger.is_over(number) for number in range(1, 11 - left))
    assert not ledger.is_over(11)


def test_an_old_answer_is_dropped(monkeypatch):
    now = 0.0
    monkeypatch.setattr("agentrl.sandbox.ledger.time.monotonic", lambda: now)
    ledger = Ledger(Quota(reply_seconds=10))
    ledger.keep(1, ({}, b""))
    now = 6.0
    ledger.keep(2, ({}, b""))
    now = 11.0
    ledger.trim()
    assert (ledger.answer(1), ledger.is_over(1), ledger.is_over(2)) == (None, True, False)


def test_the_memory_of_dropped_calls_is_bounded_and_errs_on_the_safe_side():
    ledger = Ledger(Quota(replies=1))
    for number in range(2, FORGOTTEN + 10):
        ledger.keep(number, ({}, b""))
    assert len(ledger._forgotten) == FORGOTTEN
    assert all(ledger.is_over(number) for number in range(1, FORGOTTEN + 9))
    assert not ledger.is_over(FORGOTTEN + 10)


STEPS = st.lists(st.tuples(st.sampled_from(["keep", "forget", "settle"]), st.integers(1, 12)), max_size=40)


@given(STEPS, st.integers(1, 4), st.integers(1, 400))
def test_a_call_that_ran_is_kept_or_over_whatever_happens(steps, replies, size):
    ledger, ran = Ledger(Quota(replies=replies, reply_bytes=size)), set()
    for step, number in steps:
        if step == "keep" and ledger.answer(number) is None and not ledger.is_over(number):
            ran.add(number)
            ledger.keep(number, ({}, bytes(100)))
        elif step == "forget":
            ledger.forget(number)
        elif step == "settle":
            ledger.settle(number)
        assert all(ledger.answer(n) is not None or ledger.is_over(n) for n in ran)
        assert ledger._bytes == 100 * len(ledger._kept) <= max(size, 0)
        assert len(ledger._kept) <= replies


# --- the server's half


@pytest.fixture
async def fake():
    return FakeSandbox()


@pytest.fixture
def faults():
    return []


@pytest.fixture
async def dispatcher(fake, faults):
    made = Dispatcher(fake, Quota(sessions=3, calls=4, replies=8), report=faults.append)
    yield made
    await made.close()
    assert not fake.live


def request(number, op, settled=1, **arguments):
    return {"v": calls.VERSION, "id": number, "settled": settled, "op": op, **arguments}


async def new_session(dispatcher, number=1):
    head, _ = await dispatcher.call(request(number, "open", profile=None, seed=0, limits=None), b"")
    return head["session"]


def execute(number, session, **more):
    return request(number, "exec", session=session, deadline=1.0, **more)


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_repeated_call_runs_once_and_gets_the_same_answer(dispatcher, fake):
    session = await new_session(dispatcher)
    first = await dispatcher.call(execute(2, session), b"a")
    assert await dispatcher.call(execute(2, session), b"a") == first
    assert await new_session(dispatcher) == session
    assert (fake.ran, len(fake.live)) == (["a"], 1)


async def test_a_call_repeated_while_it_runs_waits_for_the_first(dispatcher, fake):
    session = await new_session(dispatcher)
    waiting = [asyncio.create_task(dispatcher.call(execute(2, session), b"wait")) for _ in range(5)]
    await until(lambda: fake.ran)
    fake.release.set()
    first, *others = await asyncio.gather(*waiting)
    assert calls.read_result(*first).output == "wait"
    assert others == [first] * 4
    assert fake.ran == ["wait"]


async def test_a_caller_that_goes_does_not_take_the_call_with_it(dispatcher, fake):
    session = await new_session(dispatcher)
    gone = asyncio.create_task(dispatcher.call(execute(2, session), b"wait"))
    await until(lambda: fake.ran)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    fake.release.set()
    assert calls.read_result(*await dispatcher.call(execute(2, session), b"wait")).output == "wait"
    assert fake.ran == ["wait"]


async def test_a_call_whose_answer_was_dropped_is_refused(dispatcher, fake):
    session = await new_session(dispatcher)
    for number in range(2, 12):
        await dispatcher.call(execute(number, session), b"%d" % number)
    head, _ = await dispatcher.call(execute(2, session), b"2")
    with pytest.raises(SandboxError, match="never run twice"):
        raise calls.read_error(head)
    head, _ = await dispatcher.call(execute(11, session, settled=5), b"11")
    assert head["status"] == "ok"
    assert len(fake.ran) == 10


async def test_a_settled_call_is_refused(dispatcher, fake):
    session = await new_session(dispatcher)
    await dispatcher.call(execute(2, session, settled=2), b"a")
    await dispatcher.call(execute(3, session, settled=3), b"b")
    assert (await dispatcher.call(execute(2, session), b"a"))[0]["error"] == "SandboxError"
    assert fake.ran == ["a", "b"]


async def test_live_sessions_are_limited(dispatcher, fake):
    sessions = [await new_session(dispatcher, number) for number in (1, 2, 3)]
    for op in ("open", "fork"):
        head, _ = await dispatcher.call(
            request(9 + len(op), op, profile=None, seed=0, session=sessions[0], rng="inherit"), b""
        )
        with pytest.raises(SandboxError, match=r"3 live sessions.*--max-sessions"):
            raise calls.read_error(head)
    await dispatcher.call(request(20, "close", session=sessions[0]), b"")
    assert await new_session(dispatcher, 21)


async def test_sessions_that_are_being_opened_count(dispatcher, fake):
    fake.slow_open = True
    tasks = [asyncio.create_task(new_session(dispatcher, number)) for number in (1, 2, 3)]
    await until(lambda: len(fake.opened) == 3)
    assert (await dispatcher.call(request(4, "open", profile=None, seed=0), b""))[0]["error"] == "SandboxError"
    fake.release.set()
    assert len(set(await asyncio.gather(*tasks))) == 3


async def test_calls_at_the_same_time_are_limited(dispatcher, fake):
    session = await new_session(dispatcher)
    tasks = [asyncio.create_task(dispatcher.call(execute(number, session), b"wait")) for number in (2, 3, 4, 5)]
    await until(lambda: len(fake.ran) == 4)
    refused = calls.read_error((await dispatcher.call(execute(6, session), b"x"))[0])
    assert "4 calls running; raise --max-calls" in str(refused)
    fake.release.set()
    await asyncio.gather(*tasks)
    assert (await dispatcher.call(execute(6, session), b"x"))[0]["status"] == "ok"


@pytest.mark.parametrize(
    "wrong",
    [
        {"op": "reboot"},
        {"op": ["exec"]},
        {"op": "open", "profile": 1, "seed": 0},
        {"op": "open", "profile": None, "seed": "0"},
        {"op": "open", "profile": None, "seed": 0, "limits": {"speed": 1}},
        {"op": "exec", "deadline": "1"},
        {"op": "exec", "deadline": True},
        {"op": "exec", "deadline": 1.0, "session": 3},
        {"op": "put"},
        {"op": "get", "path": []},
        {"op": "fork", "rng": 1, "branch": None},
        {"op": "fork", "rng": "inherit", "branch": "1"},
        {"op": "cancel"},
        {"op": "cancel", "call": 2},
    ],
)
async def test_a_malformed_call_is_refused_and_the_client_lives_on(dispatcher, faults, wrong):
    session = await new_session(dispatcher)
    head, _ = await dispatcher.call({"session": session} | request(2, "") | wrong, b"")
    with pytest.raises(SandboxError, match="malformed sandbox call"):
        raise calls.read_error(head)
    assert (await dispatcher.call(execute(3, session), b"x"))[0]["status"] == "ok"
    assert not faults


async def test_source_that_is_not_utf8_is_malformed_but_surrogates_pass(dispatcher, fake):
    session = await new_session(dispatcher)
    assert (await dispatcher.call(execute(2, session), b"\xff"))[0]["error"] == "SandboxError"
    await dispatcher.call(execute(3, session), b"\xed\xa0\x80")
    assert fake.ran == ["\ud800"]


@pytest.mark.parametrize("head", [{}, {"id": "1"}, {"id": True}, {"id": 1, "v": calls.VERSION}])
async def test_what_is_no_request_has_no_answer(dispatcher, head):
    with pytest.raises(wire.ProtocolError):
        await dispatcher.call(head, b"")


@pytest.mark.parametrize("number", [0, -1])
async def test_calls_are_numbered_from_one(dispatcher, number):
    assert (await dispatcher.call(request(number, "ping"), b""))[0]["error"] == "SandboxError"


@pytest.mark.parametrize("version", [calls.VERSION + 1, None, "1"])
async def test_another_version_says_what_to_do(dispatcher, version):
    head, _ = await dispatcher.call(request(1, "ping") | {"v": version}, b"")
    with pytest.raises(UserError, match="install the same agentrl on both sides"):
        raise calls.read_error(head)


async def test_an_unknown_session_is_an_infrastructure_failure(dispatcher, fake):
    other = Dispatcher(fake)
    session = await new_session(other)
    for head in (execute(1, session), execute(2, "0"), request(3, "get", session=session, path="x")):
        error = calls.read_error((await dispatcher.call(head, b""))[0])
        assert type(error) is SandboxError
        assert "does not know this session" in str(error)
    assert (await dispatcher.call(request(4, "close", session=session), b""))[0] == {"id": 4}
    assert len(fake.live) == 1
    await other.close()


async def test_a_running_cell_can_be_cancelled(dispatcher, fake):
    session = await new_session(dispatcher)
    cell = asyncio.create_task(dispatcher.call(execute(2, session), b"wait"))
    await until(lambda: fake.ran)
    assert (await dispatcher.call(request(3, "cancel", call=2), b""))[0] == {"id": 3}
    assert "cancelled" in str(calls.read_error((await cell)[0]))
    assert fake.live[0].cancelled
    assert "error" in (await dispatcher.call(execute(2, session), b"wait"))[0]
    assert fake.ran == ["wait"]


async def test_a_cancelled_open_leaves_no_session_whenever_it_comes(dispatcher, fake):
    await new_session(dispatcher, 1)
    await dispatcher.call(request(2, "cancel", call=1), b"")
    assert not fake.live
    await dispatcher.call(request(4, "cancel", call=3), b"")  # before the call itself
    assert "error" in (await dispatcher.call(request(3, "open", profile=None, seed=0), b""))[0]
    both = [request(5, "open", profile=None, seed=0), request(6, "cancel", call=5)]
    await asyncio.gather(*(dispatcher.call(head, b"") for head in both))
    fake.slow_open = True
    opening = asyncio.create_task(dispatcher.call(request(7, "open", profile=None, seed=0), b""))
    await until(lambda: len(fake.opened) >= 2)
    await dispatcher.call(request(8, "cancel", call=7), b"")
    await opening
    assert not fake.live


async def test_a_client_that_leaves_has_nothing_left(dispatcher, fake):
    session = await new_session(dispatcher)
    await new_session(dispatcher, 2)
    cell = asyncio.create_task(dispatcher.call(execute(3, session), b"wait"))
    await until(lambda: fake.ran)
    await dispatcher.call(request(4, "leave"), b"")
    assert not fake.live
    assert (await cell)[0]["error"] == "SandboxError"


async def test_closing_ends_everything_and_refuses_what_comes_after(dispatcher, fake):
    session = await new_session(dispatcher)
    cells = [asyncio.create_task(dispatcher.call(execute(2, session), b"wait")) for _ in range(2)]
    await until(lambda: fake.ran)
    late = asyncio.create_task(dispatcher.call(execute(3, session), b"never"))  # cancelled before its first step
    await asyncio.gather(dispatcher.close(), *cells, late)
    assert not fake.live
    assert not dispatcher.busy
    assert "shutting down" in (await dispatcher.call(request(4, "ping"), b""))[0]["message"]
    await dispatcher.close()


async def test_a_fault_of_the_server_is_reported_there_and_is_a_sandbox_error_here(dispatcher, fake, faults):
    session = await new_session(dispatcher)
    fake.errors = {"bug": RuntimeError("oops"), "os": OSError(errno.EIO, "disk")}
    for number, name in ((2, "bug"), (3, "os")):
        head, _ = await dispatcher.call(execute(number, session), b"raise " + name.encode())
        with pytest.raises(SandboxError, match="the sandbox server failed"):
            raise calls.read_error(head)
    assert faults == [*fake.errors.values()]


# --- the client's half


class Direct:
    """A transport within the process; what goes through is encoded all the same."""

    def __init__(self, dispatcher):
        self.dispatcher, self.heads, self.closed = dispatcher, [], False
        self.lose: set[str] = set()
        self.answer = None

    async def call(self, head, body, seconds):
        self.heads.append(head)
        if head["op"] in self.lose:
            raise calls.Lost(f"lost {head['op']}")
        reply = await self.dispatcher.call(*over_the_wire(head, body))
        if self.answer is not None:
            return self.answer
        return over_the_wire(*reply)

    async def close(self):
        self.closed = True


@pytest.fixture
async def transport(fake):
    made = Direct(Dispatcher(fake))
    yield made
    await made.dispatcher.close()


@pytest.fixture
async def client(transport):
    async with CalledSandbox(transport) as made:
        yield made


async def test_everything_goes_through_and_comes_back(client, fake):
    limits = Limits(processes=5)
    session = await client.open("python", seed=7, limits=limits)
    assert fake.opened == [("python", 7, limits)]
    assert (session.seed, session.rng) == (7, "seeded")
    assert await session.exec("hello\ud800", 2) == ExecResult(ExecStatus.OK, "hello\\ud800", None, True, 0.5)
    await session.put_file("a/b", b"\0\xff")
    assert await session.get_file("/work/a/b") == b"\0\xff"
    fork = await session.fork("derive", branch=3)
    assert (fork.seed, fork.rng) == (10, "derive")
    assert await fork.get_file("a/b") == b"\0\xff"
    with pytest.raises(SessionFrozen):
        await session.get_file("a/b")
    await session.close()
    assert (await fork.exec("x")).output == "x"
    assert len(fake.live) == 1


ERRORS = {
    "user": UserError("do this"),
    "config": ConfigError("a deadline"),
    "name": UnknownName("profile", "pyton", ["python"]),
    "sandbox": SandboxError("it broke"),
    "closed": SessionClosed("it is closed"),
    "frozen": SessionFrozen("it is frozen"),
    "fork": ForkRefused("no", ["a thread", "a pipe"]),
    "isolation": IsolationUnavailable(["seccomp"]),
}


@pytest.mark.parametrize("name", ERRORS)
async def test_every_error_is_raised_as_in_this_process(client, fake, name):
    session = await client.open()
    fake.errors = ERRORS
    error = ERRORS[name]
    with pytest.raises(type(error)) as caught:
        await session.exec(f"raise {name}")
    assert type(caught.value) is type(error)
    assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))
    assert (await session.exec("x")).output == "x"


async def test_file_errors_are_the_file_systems(client):
    session = await client.open()
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '/work/x'"):
        await session.get_file("x")
    with pytest.raises(OSError, match="No space left") as caught:
        await session.put_file("full", b"")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="too long"):
        await session.put_file("x" * 10**6, b"")


async def test_arguments_are_checked_before_anything_is_sent(client, transport):
    session = await client.open()
    sent = len(transport.heads)
    for wrong, kind in [
        (client.open(seed="1"), ConfigError),
        (client.open(Profile("own")), UserError),
        (session.exec("1", 0), ConfigError),
        (session.fork("same"), ConfigError),
        (session.fork(branch=-1), ConfigError),
        (session.put_file("/etc/passwd", b""), UserError),
        (session.get_file("../etc/passwd"), UserError),
        (session.put_file("x", bytes(FILE_BYTES + 1)), UserError),
    ]:
        with pytest.raises(kind):
            await wrong
    with pytest.raises(UserError, match="record"):
        CalledSandbox(transport, profile=Profile("own"))
    result = await session.exec("#" * (calls.MAX_BODY + 1))
    assert (result.status, result.state_kept) == (ExecStatus.ERROR, True)
    assert len(transport.heads) == sent


async def test_an_unknown_profile_is_the_servers_to_refuse(client):
    with pytest.raises(UnknownName, match="did you mean 'python'") as caught:
        await client.open("pyton")
    assert caught.value.nearest == "python"


async def test_the_clients_own_profile_is_the_default(fake, transport):
    async with CalledSandbox(transport, profile="python") as client:
        await client.open()
    assert fake.opened == [("python", 0, None)]


async def test_a_closed_session_and_a_closed_sandbox_say_so(client, transport, fake):
    session, other = await client.open(), await client.open()
    await session.close()
    await session.close()
    assert len(fake.live) == 1
    for call in (session.exec("1"), session.fork(), session.get_file("x"), session.put_file("x", b"")):
        with pytest.raises(SessionClosed):
            await call
    await client.close()
    await client.close()
    assert transport.closed
    assert not fake.live
    with pytest.raises(SessionClosed):
        await other.exec("1")
    with pytest.raises(SandboxError, match="this CalledSandbox is closed"):
        await client.open()
    await other.close()


async def test_closing_during_a_cell_ends_the_cell(client, fake):
    session = await client.open()
    cell = asyncio.create_task(session.exec("wait"))
    await until(lambda: fake.ran)
    await session.close()
    with pytest.raises(SandboxError, match="closed meanwhile"):
        await cell


async def test_calls_on_one_session_take_turns(client, fake):
    session = await client.open()
    await asyncio.gather(*(session.exec(f"sleep {i}") for i in range(10)))
    assert fake.ran == [f"sleep {i}" for i in range(10)]


async def test_a_cancelled_cell_fails_its_session_on_both_sides(client, fake):
    session = await client.open()
    cell = asyncio.create_task(session.exec("wait"))
    await until(lambda: fake.ran)
    cell.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cell
    with pytest.raises(SandboxError, match=r"has failed \(a call on it was cancelled\)"):
        await session.exec("1")
    await until(lambda: fake.live[0].cancelled)
    await session.close()
    assert not fake.live


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_open_leaves_no_session(client, fake, turns):
    tasks = [asyncio.create_task(client.open()) for _ in range(5)]
    for _ in range(turns):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    opened = await asyncio.gather(*tasks, return_exceptions=True)
    for session in opened:
        if not isinstance(session, BaseException):
            await session.close()
    await until(lambda: not fake.live and not client._tasks)
    assert not client._pending


async def test_a_lost_call_fails_its_session_but_not_its_close(client, transport, fake):
    session = await client.open()
    transport.lose = {"exec", "close"}
    with pytest.raises(SandboxError, match="lost exec"):
        await session.exec("1")
    transport.lose = {"close"}
    with pytest.raises(SandboxError, match=r"has failed \(lost exec\)"):
        await session.exec("1")
    await session.close()
    other = await client.open()
    with pytest.raises(SandboxError, match="lost close"):
        await other.close()


async def test_a_sandbox_whose_server_is_gone_closes_in_peace(fake, transport):
    async with CalledSandbox(transport) as client:
        await client.open()
        transport.lose = {"leave"}
    assert transport.closed


@pytest.mark.parametrize(
    "answer",
    [
        ({}, b""),
        ({"error": "Nonsense", "message": "x"}, b""),
        ({"status": "ok"}, b""),
        ({"session": 1, "seed": 1, "rng": "seeded"}, b""),
    ],
)
async def test_a_malformed_answer_is_a_sandbox_error(client, transport, answer):
    session = await client.open()
    transport.answer = answer
    with pytest.raises(SandboxError, match="malformed answer"):
        await client.open()
    with pytest.raises(SandboxError, match="malformed answer"):
        await session.exec("1")
    with pytest.raises(SandboxError, match="has failed"):
        await session.exec("1")
    transport.answer = None


async def test_the_server_keeps_no_answers_that_have_arrived(client, transport):
    session = await client.open()
    for _ in range(50):
        await session.exec("x")
    assert len(transport.dispatcher._ledger._kept) <= 1


async def test_it_belongs_to_one_event_loop(client):
    await client.open()

    def other_loop():
        with pytest.raises(UserError, match="one CalledSandbox per event loop"):
            asyncio.run(client.open())

    await asyncio.to_thread(other_loop)


# --- both ends of a stream


@contextlib.asynccontextmanager
async def streamed(fake):
    """A client whose calls go through a pair of sockets; gives it, the task that serves, and the client's writer."""
    ours, theirs = socket.socketpair()

    async def serve():
        with theirs:
            await serve_stream(theirs.fileno(), theirs.fileno(), fake)

    serving = asyncio.create_task(serve())
    reader, writer = await asyncio.open_unix_connection(sock=ours)

    async def close():
        writer.close()
        await writer.wait_closed()

    transport = StreamTransport(writer.write, writer.drain, close, "the other end")

    async def pump():
        while data := await reader.read(2**16):
            transport.feed(data)
        transport.lose("it hung up")

    pumping = asyncio.create_task(pump())
    try:
        yield CalledSandbox(transport), serving, writer
    finally:
        await transport.close()
        await asyncio.gather(serving, pumping, return_exceptions=True)


async def test_calls_go_through_a_stream_at_the_same_time(fake):
    async with streamed(fake) as (client, _, _writer):
        sessions = await asyncio.gather(*(client.open(seed=i) for i in range(100)))
        assert [session.seed for session in sessions] == list(range(100))
        slow = asyncio.create_task(sessions[0].exec("wait"))
        results = await asyncio.gather(*(session.exec(f"{session.seed}") for session in sessions[1:]))
        assert [result.output for result in results] == [f"{i}" for i in range(1, 100)]
        assert not slow.done()
        fake.release.set()
        assert (await slow).output == "wait"


async def test_large_bodies_go_through_a_stream_with_a_slow_reader(fake):
    data = os.urandom(FILE_BYTES)
    async with streamed(fake) as (client, _, _writer):
        session = await client.open()
        await session.put_file("x", data)
        files = await asyncio.gather(*(session.get_file("x") for _ in range(4)), client.open())
        assert files[:4] == [data] * 4


async def test_the_end_of_a_stream_closes_everything(fake):
    async with streamed(fake) as (client, serving, writer):
        session = await client.open()
        cell = asyncio.create_task(session.exec("wait"))
        await until(lambda: fake.ran)
        writer.write_eof()
        await serving
        assert (fake.live, fake.closed) == ([], True)
        with pytest.raises(SandboxError, match="hung up"):
            await cell


@pytest.mark.parametrize("sent", [b"\xff" * 8, wire.HEADER.pack(3, 0) + b"[1]", wire.encode({"op": "ping"})])
async def test_nonsense_ends_a_stream_and_closes_everything(fake, sent):
    async with streamed(fake) as (client, serving, writer):
        await client.open()
        writer.write(sent)
        with pytest.raises(wire.ProtocolError):
            await serving
        assert (fake.live, fake.closed) == ([], True)


async def test_nonsense_from_the_server_fails_the_calls(fake):
    sent = []

    async def nothing():
        pass

    transport = StreamTransport(sent.append, nothing, nothing, "the container")
    client = CalledSandbox(transport)
    opening = asyncio.create_task(client.open())
    await until(lambda: sent)
    transport.feed(wire.encode({"id": 99}))  # nobody waits for it
    transport.feed(b"\xff" * 8)
    with pytest.raises(SandboxError, match=r"the container is lost \(it broke the protocol"):
        await opening
    with pytest.raises(SandboxError, match="is lost"):
        await client.open()
    await client.close()


async def test_a_stream_that_does_not_answer_has_a_deadline(monkeypatch):
    monkeypatch.setattr("agentrl.sandbox.called.OPEN_SECONDS", 0.05)

    async def nothing():
        pass

    client = CalledSandbox(StreamTransport(lambda _: None, nothing, nothing, "the container"))
    with pytest.raises(SandboxError, match=r"the container did not answer 'open' within 0.05 s"):
        await client.open()
    client._transport.lose("over")
    await client.close()


async def test_a_pipe_pair_serves_as_well_and_gets_its_mode_back(fake):
    (inward, ours_out), (ours_in, outward) = os.pipe(), os.pipe()
    serving = asyncio.create_task(serve_stream(inward, outward, fake))
    os.write(ours_out, wire.encode(request(1, "ping")))
    await until(lambda: not os.get_blocking(inward))
    answer = await asyncio.to_thread(os.read, ours_in, 1000)
    assert calls.read_frame(answer)[0] == {"id": 1, "idle_seconds": None}
    os.close(ours_out)
    await serving
    assert os.get_blocking(inward)
    for descriptor in (inward, outward, ours_in):
        os.close(descriptor)
