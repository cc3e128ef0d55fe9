from __future__ import annotations

import asyncio
import contextlib
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from agentrl.cli import main
from agentrl.errors import ConfigError, SandboxError, SessionClosed, UnknownName, UserError
from agentrl.sandbox import Profile, calls, remote, serve, wire
from agentrl.sandbox.app import App
from agentrl.sandbox.remote import CLIENT_HEADER, TOKEN_VARIABLE, HttpTransport, RemoteSandbox
from agentrl.sandbox.serve import ServeOptions, read_options, serving

FakeSandbox = runpy.run_path(str(Path(__file__).parent / "fake_sandbox.py"))["FakeSandbox"]

TOKEN = "token-for-the-tests"
COMMAND = [sys.executable, "-m", "agentrl.cli", "sandbox", "serve", "--port", "0"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.01)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)


@pytest.fixture
async def fake():
    return FakeSandbox()


@pytest.fixture
async def url(fake):
    """A server of the fake sandbox on this loop."""
    async with serving(fake, TOKEN, ServeOptions(port=0)) as (address, _):
        yield address
    assert not fake.live


@pytest.fixture
async def client(url):
    async with RemoteSandbox(url, TOKEN) as made:
        yield made


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def descriptors():
    return len(os.listdir("/proc/self/fd"))


class Proxy:
    """Stands between client and server; does with each answer what ``script`` says, then passes them on.

    ``drop``: the request reaches the server, and the connection breaks when its answer comes. ``cut``: half of the
    answer. ``refuse``: the connection breaks before the server hears of it. A number: that HTTP status.
    """

    def __init__(self, url):
        self.target = httpx.URL(url)
        self.script: list[str | int] = []
        self.requests = 0
        self.tasks = set()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.server.wait_closed()

    async def _serve(self, reader, writer):
        self.tasks.add(asyncio.current_task())
        up_reader, up_writer = await asyncio.open_connection(self.target.host, self.target.port)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while await self._one(reader, writer, up_reader, up_writer):
                    pass
        finally:
            for each in (writer, up_writer):
                each.transport.abort()

    async def _one(self, reader, writer, up_reader, up_writer):
        request = await self._message(reader)
        self.requests += 1
        action = self.script.pop(0) if self.script else "pass"
        if action == "refuse":
            return False
        if isinstance(action, int):
            writer.write(b"HTTP/1.1 %d No\r\ncontent-length: 4\r\n\r\nbusy" % action)
            return True
        up_writer.write(request)
        answer = await self._message(up_reader)
        writer.write({"pass": answer, "drop": b"", "cut": answer[: len(answer) // 2]}[action])
        await writer.drain()
        return action == "pass"

    async def _message(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        return head + await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))


@pytest.fixture
async def proxy(url):
    async with Proxy(url) as made:
        yield made


@pytest.fixture
async def behind(proxy):
    """A client behind the proxy."""
    async with RemoteSandbox(proxy.url, TOKEN) as made:
        made._beating = True  # its pings would use up the script
        yield made


# --- the whole road


@contextlib.contextmanager
def command(*words, token=TOKEN):
    """``agentrl sandbox serve`` in a process of its own; gives the process and what it printed until it was ready."""
    environment = {**os.environ, "PYTHONWARNINGS": "error"} | ({TOKEN_VARIABLE: token} if token else {})
    with subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            printed = []
            while not (printed and printed[-1].startswith("sandbox server: ")):
                line = process.stdout.readline()
                if not line:
                    error = process.stderr.read()
                    if "cannot isolate" in error:
                        pytest.skip(error)
                    raise AssertionError(error)
                printed.append(line.strip())
            yield process, printed
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_serves_real_sessions_and_leaves_no_process(processes, number):
    with command() as (process, printed):
        before = descriptors()
        async with RemoteSandbox(printed[0].split()[-1], TOKEN) as client:
            session = await client.open(seed=3)
            assert (await session.exec("import os\nx = 6\nx * 7")).output == "42\n"
            fork = await session.fork()
            assert (await fork.exec("x, 'AGENTRL_SANDBOX_TOKEN' in os.environ")).output == "(6, False)\n"
            assert len(processes(process.pid)) >= 4
            cell = asyncio.create_task(fork.exec("import time; time.sleep(60)", 60.0))
            await asyncio.sleep(0.1)
            process.send_signal(number)
            with pytest.raises(SandboxError):
                await cell
            assert await asyncio.to_thread(process.wait, 10) == 0
            assert not processes(process.pid)
        assert descriptors() == before
        assert process.stderr.read() == ""


async def test_a_server_that_is_killed_is_a_sandbox_error_and_leaves_no_process(processes):
    with command() as (process, printed):
        url = printed[0].split()[-1]
        async with RemoteSandbox(url, TOKEN) as client:
            session = await client.open()
            cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
            await asyncio.sleep(0.1)
            process.kill()
            with pytest.raises(SandboxError, match=f"{url} failed: .*is it running"):
                await cell
            with pytest.raises(SandboxError, match="this session has failed"):
                await session.exec("1")
            with pytest.raises(SandboxError, match=re.escape(url)):
                await client.open()
            await session.close()
        process.wait()
        await until(lambda: not processes(process.pid))


def test_without_a_token_one_is_made_and_printed():
    with command(token="") as (process, printed):
        made = re.fullmatch(rf"token, made for this run; on the client, set {TOKEN_VARIABLE}=(\S+)", printed[0])[1]
        assert len(made) >= 32
        url = printed[1].split()[-1]
        answer = httpx.post(f"{url}/call", headers={"authorization": f"Bearer {made}"}, trust_env=False)
        assert answer.status_code == 400
        assert httpx.post(f"{url}/call", trust_env=False).status_code == 401
        process.terminate()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for 127.0.0.1: (certificate, key)."""
    folder = tmp_path_factory.mktemp("certificate")
    files = folder / "server.crt", folder / "server.key"
    try:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=IP:127.0.0.1", "-out", str(files[0]), "-keyout", str(files[1])),
            ],
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl command to make a certificate with")
    return files


async def test_tls(fake, certificate):
    options = ServeOptions(port=0, certfile=str(certificate[0]), keyfile=str(certificate[1]))
    async with serving(fake, TOKEN, options) as (url, _):
        assert url.startswith("https://127.0.0.1:")
        for verify in (certificate[0], str(certificate[0]), False):
            async with RemoteSandbox(url, TOKEN, verify=verify) as client:
                assert (await (await client.open()).exec("x")).output == "x"
        async with RemoteSandbox(url, TOKEN) as client:
            with pytest.raises(UserError, match=r"is not trusted .*give its file with verify="):
                await client.open()
        async with RemoteSandbox(url.replace("https", "http"), TOKEN) as client:
            with pytest.raises(SandboxError):
                await client.open()


async def test_certificates_that_cannot_be_read_say_so(fake, tmp_path):
    with pytest.raises(UserError, match="cannot be read as certificates"):
        RemoteSandbox("https://127.0.0.1:1", TOKEN, verify=tmp_path / "none.crt")
    options = ServeOptions(port=0, certfile=str(tmp_path / "none.crt"))
    with pytest.raises(UserError, match=r"none\.crt cannot be used"):
        async with serving(fake, TOKEN, options):
            pass


async def test_hundreds_of_calls_at_once(client, fake):
    before = descriptors()
    sessions = await asyncio.gather(*(client.open(seed=number) for number in range(400)))
    results = await asyncio.gather(*(session.exec(f"cell {session.seed}") for session in sessions))
    assert [result.output for result in results] == [f"cell {number}" for number in range(400)]
    assert sorted(fake.ran) == sorted(f"cell {number}" for number in range(400))
    await client.close()
    assert not fake.live
    await until(lambda: descriptors() <= before)


async def test_more_calls_than_connections_wait_for_each_other(url, fake):
    async with RemoteSandbox(url, TOKEN, connections=2) as client:
        sessions = await asyncio.gather(*(client.open() for _ in range(20)))
        assert len(await asyncio.gather(*(session.exec("x") for session in sessions))) == 20


async def test_the_largest_file_goes_both_ways(client):
    data = os.urandom(calls.MAX_BODY)
    session = await client.open()
    await session.put_file("x", data)
    assert await session.get_file("x") == data


async def test_a_cancelled_cell_is_cancelled_on_the_server(client, fake):
    session = await client.open()
    cell = asyncio.create_task(session.exec("wait"))
    await until(lambda: fake.ran)
    cell.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cell
    await until(lambda: fake.live[0].cancelled)
    with pytest.raises(SandboxError, match="cancelled"):
        await session.exec("1")


# --- broken connections


@pytest.mark.parametrize("script", [["drop"], ["cut", "drop"], ["refuse"], ["drop", 503, "refuse"], [500, 502]])
async def test_a_call_whose_answer_is_lost_is_repeated_but_runs_once(behind, proxy, fake, script):
    session = await behind.open()
    proxy.script, proxy.requests = list(script), 0
    assert (await session.exec("once")).output == "once"
    assert fake.ran == ["once"]
    assert proxy.requests == len(script) + 1


@pytest.mark.parametrize("script", [["drop"], ["cut", "refuse"]])
async def test_a_session_is_opened_and_forked_once(behind, proxy, fake, script):
    proxy.script = list(script)
    session = await behind.open()
    assert len(fake.live) == 1
    proxy.script = list(script)
    await session.fork()
    assert len(fake.live) == 2


async def test_a_call_that_runs_when_its_connection_breaks_is_waited_for(behind, proxy, fake, monkeypatch):
    session = await behind.open()
    monkeypatch.setattr(remote, "_LEAST_SECONDS", 0.2)
    monkeypatch.setattr("agentrl.sandbox.called.EXEC_GRACE_SECONDS", -0.9)  # the first attempt gives up at once
    cell = asyncio.create_task(session.exec("wait", 1.0))
    await until(lambda: proxy.requests >= 3)
    fake.release.set()
    assert (await cell).output == "wait"
    assert fake.ran == ["wait"]


@pytest.mark.parametrize(("action", "said"), [("drop", "Error"), ("refuse", "Error"), (503, "HTTP 503: busy")])
async def test_a_connection_that_stays_broken_is_a_sandbox_error(behind, proxy, fake, action, said):
    session = await behind.open()
    proxy.script = [action] * remote.ATTEMPTS
    with pytest.raises(SandboxError, match=f"{proxy.url} failed: .*{said}.*asked {remote.ATTEMPTS} times") as caught:
        await session.exec("x")
    assert not isinstance(caught.value, SessionClosed)
    assert fake.ran == ([] if action != "drop" else ["x"])
    with pytest.raises(SandboxError, match="this session has failed"):
        await session.exec("x")


async def test_a_server_that_does_not_answer_is_a_sandbox_error(behind, fake, monkeypatch):
    session = await behind.open()
    monkeypatch.setattr(remote, "_LEAST_SECONDS", 0.02)
    monkeypatch.setattr("agentrl.sandbox.called.EXEC_GRACE_SECONDS", -0.9)
    with pytest.raises(SandboxError, match=r"no answer within 0\.1 s"):
        await session.exec("wait", 1.0)
    assert fake.ran == ["wait"]


async def test_a_server_that_was_restarted_has_lost_its_sessions(fake):
    async with serving(fake, TOKEN, ServeOptions(port=0)) as (url, _):
        client = RemoteSandbox(url, TOKEN)
        session, other = await client.open(), await client.open()
    again = FakeSandbox()
    async with serving(again, TOKEN, ServeOptions(port=int(url.rpartition(":")[2]))), client:
        with pytest.raises(SandboxError, match="does not know this session: it was restarted") as caught:
            await session.exec("x")
        assert type(caught.value) is SandboxError
        assert not again.ran
        await other.close()
        assert (await (await client.open()).exec("y")).output == "y"


async def test_nobody_is_listening():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    async with RemoteSandbox(url, TOKEN) as client:
        with pytest.raises(SandboxError, match=f"{url} failed: ConnectError.*is it running"):
            await client.open()


# --- who may call, and how much


async def test_a_wrong_token_says_what_to_do(url, fake):
    for token in ("another-token-than-that", TOKEN[:-1], "x"):
        async with RemoteSandbox(url, token) as client:
            with pytest.raises(UserError, match=f"refused the token.*{TOKEN_VARIABLE}"):
                await client.open()
    assert not fake.opened


async def test_no_token_says_what_to_do(url, monkeypatch):
    with pytest.raises(UserError, match=TOKEN_VARIABLE):
        RemoteSandbox(url)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    async with RemoteSandbox(url) as client:
        await client.open()


@pytest.mark.parametrize("token", ["two words", "a\nheader: x", "süß"])
def test_a_token_is_visible_ascii(token):
    with pytest.raises(UserError, match="visible ASCII"):
        RemoteSandbox("http://127.0.0.1:1", token)


@pytest.mark.parametrize("address", ["", "127.0.0.1:8421", "ftp://127.0.0.1", "http://", "http://a:b", "unix:///x"])
def test_an_address_that_is_no_url_is_refused(address):
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:8421"):
        RemoteSandbox(address, TOKEN)


async def test_an_address_with_something_else_behind_it(proxy):
    async with RemoteSandbox(proxy.url + "/elsewhere", TOKEN) as client:
        with pytest.raises(UserError, match=r"there is no sandbox server at .*/elsewhere: HTTP 404"):
            await client.open()


async def _answer(text):
    """A server that says ``text`` to everything; gives its url."""

    async def handle(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(text)
            await writer.drain()
        writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>", "no answer of a sandbox server"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n", "an answer of 999999999 bytes"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", "an answer of unknown bytes"),
        (
            b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(wire.encode({"id": 77})) + wire.encode({"id": 77}),
            "answered another call",
        ),
        (b"HTTP/1.1 400 No\r\ncontent-length: 3\r\n\r\nbad", "did not understand a call: HTTP 400: bad"),
        (b"nonsense\r\n\r\n", "RemoteProtocolError"),
    ],
)
async def test_an_answer_that_is_none_is_a_sandbox_error(text, said):
    server = await _answer(text)
    async with server, RemoteSandbox(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", TOKEN) as client:
        with pytest.raises(SandboxError, match=said):
            await client.open()


async def test_profiles_go_by_name_only(client, fake):
    with pytest.raises(UserError, match="a record"):
        await client.open(Profile("own"))
    with pytest.raises(UnknownName, match="did you mean 'python'"):
        await client.open("pyhton")
    await client.open("python")
    assert [profile for profile, *_ in fake.opened] == ["python"]


async def test_each_client_has_its_own_limits(fake):
    options = ServeOptions(port=0, max_sessions=2, max_calls=2)
    async with (
        serving(fake, TOKEN, options) as (url, _),
        RemoteSandbox(url, TOKEN) as one,
        RemoteSandbox(url, TOKEN) as other,
    ):
        one._beating = other._beating = True
        first, second = await one.open(), await one.open()
        with pytest.raises(SandboxError, match=r"2 live sessions.*--max-sessions"):
            await one.open()
        third = await other.open()
        cells = [asyncio.create_task(session.exec("wait")) for session in (first, second)]
        await until(lambda: len(fake.ran) == 2)
        with pytest.raises(SandboxError, match=r"2 calls running; raise --max-calls"):
            await one.open()
        assert (await third.exec("x")).output == "x"
        fake.release.set()
        await asyncio.gather(*cells)


async def test_a_clients_sessions_are_nobody_elses(url, client, fake):
    session = await client.open()
    async with RemoteSandbox(url, TOKEN) as other:
        with pytest.raises(SandboxError, match="does not know"):
            await other.call("exec", 5.0, b"x", session=session._handle, deadline=1.0)
    assert (await session.exec("y")).output == "y"
    assert fake.ran == ["y"]


PING = {"v": calls.VERSION, "id": 1, "settled": 1, "op": "ping"}


@contextlib.asynccontextmanager
async def in_process(fake):
    """The application and a way to ask it without a network: ``ask(client's name, head, body)``."""
    app = App(fake, TOKEN, idle_seconds=100.0)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as http:

        async def ask(name, head, body=b""):
            headers = {"authorization": f"Bearer {TOKEN}", CLIENT_HEADER: name * 32}
            answer = await http.post("/call", content=wire.encode(PING | head, body), headers=headers)
            return answer if answer.status_code != 200 else calls.read_frame(answer.content)[0]

        yield app, ask
    await app.close()
    assert not fake.live


async def test_a_silent_client_is_ended_and_one_in_a_call_is_not_silent(fake):
    async with in_process(fake) as (app, ask):
        sessions = {name: (await ask(name, {"op": "open", "seed": 0}))["session"] for name in "abc"}
        cell = {"id": 2, "op": "exec", "session": sessions["a"], "deadline": 1.0}
        busy = asyncio.create_task(ask("a", cell, b"wait"))
        await until(lambda: fake.ran)
        for name in "ab":
            app._clients[name * 32].last_call -= 101
        await app.end_silent()
        assert len(fake.live) == 2
        fake.release.set()
        assert (await busy)["status"] == "ok"
        lost = await ask("b", cell | {"session": sessions["b"]}, b"x")
        assert "silent for too long" in lost["message"]
        assert (await ask("c", cell | {"session": sessions["c"]}, b"y"))["status"] == "ok"


async def test_a_client_that_left_is_not_brought_back_by_a_late_call(fake):
    async with in_process(fake) as (_, ask):
        await ask("a", {"op": "open", "seed": 0})
        assert await ask("a", {"op": "leave", "id": 3}) == {"id": 3}
        late = await ask("a", {"op": "open", "id": 2, "seed": 0})
        assert (late.status_code, late.text) == (410, "this client has left")
        assert not fake.live


async def test_clients_are_limited(fake, monkeypatch):
    monkeypatch.setattr("agentrl.sandbox.app.MOST_CLIENTS", 2)
    async with in_process(fake) as (_, ask):
        assert [(await ask(name, {}))["id"] for name in "ab"] == [1, 1]
        assert (await ask("c", {})).status_code == 503
        await ask("a", {"op": "leave", "id": 2})
        assert (await ask("c", {}))["id"] == 1


async def test_a_client_shows_that_it_lives(url, fake, monkeypatch):
    monkeypatch.setattr(remote, "_MOST_SILENT_SECONDS", 0.01)
    ops = []
    async with RemoteSandbox(url, TOKEN) as client:
        carry = client._transport.call

        async def noted(head, body, seconds):
            ops.append(head["op"])
            return await carry(head, body, seconds)

        monkeypatch.setattr(client._transport, "call", noted)
        await client.open()
        await until(lambda: ops.count("ping") >= 3)
    assert (ops[0], ops[-1]) == ("open", "leave")
    assert not client._tasks


async def test_another_version_of_the_protocol_says_what_to_do(url):
    transport = HttpTransport(url, TOKEN, True, 1)
    head, _ = await transport.call({"v": calls.VERSION + 1, "id": 1, "settled": 1, "op": "open"}, b"", 5.0)
    with pytest.raises(UserError, match="install the same agentrl on both sides"):
        raise calls.read_error(head)
    await transport.close()


async def test_what_the_server_says_to_strangers(url, fake):
    right = {"authorization": f"Bearer {TOKEN}", CLIENT_HEADER: "0" * 32}
    ping = wire.encode(PING)
    async with httpx.AsyncClient(base_url=url, trust_env=False) as http:
        health = await http.get("/health")
        assert (health.status_code, health.json()) == (200, {"status": "ok", "version": calls.VERSION})
        assert "server" not in health.headers
        assert (await http.post("/call", content=ping, headers=right)).status_code == 200
        for status, method, path, headers, content in [
            (404, "GET", "/", right, b""),
            (404, "POST", "/health", right, b""),
            (405, "GET", "/call", right, b""),
            (401, "POST", "/call", {}, ping),
            (401, "POST", "/call", right | {"authorization": TOKEN}, ping),
            (401, "POST", "/call", right | {"authorization": "Bearer é".encode()}, ping),
            (400, "POST", "/call", right | {CLIENT_HEADER: "me"}, ping),
            (400, "POST", "/call", right, b""),
            (400, "POST", "/call", right, b"\xff" * 100),
            (400, "POST", "/call", right, wire.encode({"op": "ping"})),
            (413, "POST", "/call", right, bytes(calls.MAX_FRAME + 1)),
        ]:
            answer = await http.request(method, path, headers=headers, content=content)
            assert answer.status_code == status, answer.text
            assert TOKEN not in answer.text
    assert not fake.opened


# --- the options of the command


def test_options_are_read_from_flags():
    options = read_options({"host": "0.0.0.0", "port": 0, "max_sessions": 5, "idle_seconds": 1.5})
    assert options == ServeOptions(host="0.0.0.0", port=0, max_sessions=5, idle_seconds=1.5)


@pytest.mark.parametrize(
    ("flags", "kind", "said"),
    [
        ({"prot": 1}, UnknownName, "--prot.*did you mean '--port'"),
        ({"max_session": 1}, UnknownName, "did you mean '--max-sessions'"),
        ({"token": "secret"}, ConfigError, "--token-file"),
        ({"port": 70_000}, ConfigError, "--port must be a number from 0 to 65535, got 70000"),
        ({"port": "http"}, ConfigError, "--port"),
        ({"max_calls": True}, ConfigError, "--max-calls"),
        ({"max_sessions": 0}, ConfigError, "--max-sessions"),
        ({"idle_seconds": float("nan")}, ConfigError, "--idle-seconds"),
        ({"host": True}, ConfigError, "--host needs a value"),
        ({"keyfile": "x"}, ConfigError, "--keyfile needs --certfile"),
    ],
)
def test_options_that_cannot_be_used_are_refused(flags, kind, said):
    with pytest.raises(kind, match=said):
        read_options(flags)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sandbox"], "agentrl sandbox serve"),
        (["sandbox", "sreve"], "did you mean 'serve'"),
        (["sandbox", "serve", "--prot", "1"], "did you mean '--port'"),
        (["sandbox", "serve", "here"], "unexpected argument 'here'"),
        (["sandbox", "serve", "@", "x.toml"], "does not go with this command"),
        (["sandbox", "serve", "--token-file", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_the_command_refuses_what_it_does_not_know(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def served(monkeypatch):
    """What the command would serve with."""
    got = []

    async def note(options, token):
        got.append((options, token))

    monkeypatch.setattr(serve, "serve", note)
    return got


@pytest.mark.parametrize("token", ["short", "x" * 15, "sixteen letters with spaces", "sechzehnzeichenüber"])
def test_a_weak_token_is_refused(monkeypatch, served, token):
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(UserError, match="at least 16 visible ASCII characters"):
        serve.run(ServeOptions())
    assert not served


def test_the_token_comes_from_the_file_before_the_environment(monkeypatch, served, tmp_path):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    (tmp_path / "token").write_text("token-from-the-file\n")
    serve.run(ServeOptions(token_file=str(tmp_path / "token")))
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    serve.run(ServeOptions())
    assert [token for _, token in served] == ["token-from-the-file", TOKEN]
    assert TOKEN_VARIABLE not in os.environ  # no child process needs it
    (tmp_path / "token").write_text("")
    with pytest.raises(UserError, match="at least 16"):
        serve.run(ServeOptions(token_file=str(tmp_path / "token")))


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        (ServeOptions(), False),
        (ServeOptions(host="localhost"), False),
        (ServeOptions(host="::1"), False),
        (ServeOptions(host="0.0.0.0"), True),
        (ServeOptions(host="sandboxes.lan"), True),
        (ServeOptions(host="0.0.0.0", certfile="x"), False),
    ],
)
def test_an_open_address_without_tls_is_warned_of(monkeypatch, served, capsys, options, warns):
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    serve.run(options)
    assert ("there is no TLS" in capsys.readouterr().err) is warns


async def test_an_address_that_is_taken_says_so(url, fake):
    with pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1:.*in use"):
        async with serving(fake, TOKEN, ServeOptions(port=int(url.rpartition(":")[2]))):
            pass


async def test_without_uvicorn_the_command_says_what_to_install(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'agentrl\[serve\]'"):
        async with serving(fake, TOKEN, ServeOptions(port=0)):
            pass
