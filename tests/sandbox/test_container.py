"""What the docker backend does about its engine and its container, without either."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
import sys

import pytest

from agentrl.errors import ConfigError, IsolationUnavailable, SandboxError, SessionClosed, UserError
from agentrl.sandbox import ExecStatus, Profile
from agentrl.sandbox.attachment import Blocks
from agentrl.sandbox.container import Threads, Tree
from agentrl.sandbox.docker import OVERHEAD_BYTES, DockerSandbox
from agentrl.sandbox.engine import Death, Engine, Specification, Started
from agentrl.sandbox.inside import decode, encode
from agentrl.sandbox.profile import load
from agentrl.sandbox.stream import serve_stream

from .fake_sandbox import FakeSandbox

OUT_OF_MEMORY = Death("was killed: it had reached its memory limit", out_of_memory=True)


# --- the attached socket


def block(stream: int, data: bytes) -> bytes:
    return struct.pack(">B3xI", stream, len(data)) + data


def test_blocks_are_taken_apart_however_they_are_cut():
    generator = random.Random(1)
    written = {1: b"", 2: b""}
    stream = b""
    for _ in range(50):
        number, data = generator.choice((1, 2)), generator.randbytes(generator.choice((0, 1, 7, 300)))
        written[number] += data
        stream += block(number, data)
    for size in (1, 2, 7, 8, 9, 100, len(stream)):
        read: dict[int, bytes] = {1: b"", 2: b""}
        blocks = Blocks(
            lambda data, read=read: read.update({1: read[1] + data}),
            lambda data, read=read: read.update({2: read[2] + data}),
        )
        for start in range(0, len(stream), size):
            blocks.feed(stream[start : start + size])
        assert read == written


def test_a_block_of_another_stream_is_an_error():
    with pytest.raises(ValueError, match="stream 9"):
        Blocks(lambda _: None, lambda _: None).feed(block(9, b"x"))


# --- the container


class FakeEngine:
    """A container is a task that serves a fake sandbox over a socket, its answers wrapped as an engine does."""

    def __init__(self, death: Death | None = None, full: bool = False) -> None:
        self.how, self.full, self.removed = death or Death("was killed"), full, 0

    def death(self, _name):
        return self.how

    def killed_for_memory(self, _name, _since):
        return self.full

    def remove(self, _name):
        self.removed += 1


class FakeContainer:
    def __init__(self) -> None:
        self.sandbox = FakeSandbox(lost=SandboxError("killed from outside"))
        self.socket, self.theirs = socket.socketpair()
        self.socket.setblocking(False)
        self.theirs.setblocking(False)
        self.requests, self.answers = os.pipe(), os.pipe()

    async def run(self):
        loop = asyncio.get_running_loop()
        serving = loop.create_task(serve_stream(self.requests[0], self.answers[1], self.sandbox))
        with contextlib.suppress(OSError):
            await asyncio.gather(self._carry_in(loop), self._carry_out(loop))
        await serving

    async def _carry_in(self, loop):
        while data := await loop.sock_recv(self.theirs, 65536):
            os.write(self.requests[1], data)
        os.close(self.requests[1])

    async def _carry_out(self, loop):
        os.set_blocking(self.answers[0], False)
        while True:
            ready = loop.create_future()
            loop.add_reader(self.answers[0], ready.set_result, None)
            try:
                await ready
            finally:
                loop.remove_reader(self.answers[0])
            data = os.read(self.answers[0], 65536)
            if not data:
                return
            await loop.sock_sendall(self.theirs, block(2, b"complaint") + block(1, data))

    def die(self):
        self.theirs.shutdown(socket.SHUT_RDWR)


@contextlib.asynccontextmanager
async def planted(engine):
    """A tree in a fake container; a session is open."""
    container, threads, ended = FakeContainer(), Threads(), []
    running = asyncio.create_task(container.run())
    tree = Tree(threads, engine, Started("agentrl-test", container.socket), ended.append)
    try:
        yield container, tree, await tree.open(7)
    finally:
        await tree.close()
        await threads.finish()
        container.die()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        container.theirs.close()
        for descriptor in (*container.requests, *container.answers):
            with contextlib.suppress(OSError):
                os.close(descriptor)
    assert (ended, engine.removed) == ([tree], 1)


async def test_calls_and_forks_go_through_the_container():
    async with planted(FakeEngine()) as (_, tree, session):
        assert (await session.exec("hello")).output == "hello"
        fork = await session.fork(rng="derive", branch=3)
        assert (session.seed, session.rng, fork.rng) == (7, "seeded", "derive")
        assert len(tree.sessions) == 2
        await session.close()
        assert tree.sessions == {fork}


async def test_the_last_session_takes_the_container_with_it():
    engine = FakeEngine()
    async with planted(engine) as (_, _, session):
        await session.close()
        assert engine.removed == 1
        await session.close()
        with pytest.raises(SessionClosed):
            await session.exec("x")


async def test_the_death_of_a_container_is_an_infrastructure_failure_that_says_how():
    async with planted(FakeEngine(Death("ended with exit status 3"))) as (container, _, session):
        cell = asyncio.create_task(session.exec("wait"))
        await asyncio.sleep(0.05)
        container.die()
        with pytest.raises(SandboxError, match=r"agentrl-test ended with exit status 3; it said: .*complaint"):
            await cell
        with pytest.raises(SandboxError):
            await session.exec("x")


async def test_a_container_that_ran_full_is_the_doing_of_the_only_program_that_ran():
    async with planted(FakeEngine(OUT_OF_MEMORY)) as (container, _, session):
        cell = asyncio.create_task(session.exec("wait"))
        await asyncio.sleep(0.05)
        container.die()
        result = await cell
        assert (result.status, result.state_kept) == (ExecStatus.MEMORY, False)
        assert (await session.exec("x")).status is ExecStatus.KILLED
        with pytest.raises(SessionClosed, match="lost"):
            await session.fork()
        with pytest.raises(FileNotFoundError, match="lost"):
            await session.get_file("x")


async def test_a_container_that_ran_full_under_several_programs_is_nobodys_doing():
    async with planted(FakeEngine(OUT_OF_MEMORY)) as (container, _, session):
        forks = [await session.fork(), await session.fork()]
        cells = [asyncio.create_task(fork.exec("wait")) for fork in forks]
        await asyncio.sleep(0.05)
        container.die()
        for result in await asyncio.gather(*cells, return_exceptions=True):
            assert type(result) is SandboxError


@pytest.mark.parametrize("full", [False, True])
async def test_a_session_that_the_kernel_killed_in_a_full_container_is_out_of_memory(full):
    async with planted(FakeEngine(full=full)) as (_, _, session):
        if not full:
            with pytest.raises(SandboxError, match="killed from outside"):
                await session.exec("raise lost")
            return
        result = await session.exec("raise lost")
        assert (result.status, result.state_kept) == (ExecStatus.MEMORY, False)
        assert "was full" in result.error


# --- the manager


def test_a_profile_crosses_the_wall_unchanged():
    for profile in (load("python"), Profile("x", ("a",), ("b", "c"), image=None)):
        assert decode(encode(profile)) == profile


async def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    async with DockerSandbox() as sandbox:
        with pytest.raises(UserError, match=r"pip install 'agentrl\[docker\]'"):
            await sandbox.open()


async def test_a_missing_engine_says_what_to_do(tmp_path):
    pytest.importorskip("docker")
    async with DockerSandbox(engine=f"unix://{tmp_path}/docker.sock") as sandbox:
        with pytest.raises(IsolationUnavailable, match=r"a Docker engine at unix:.*Start one, or set DOCKER_HOST"):
            await sandbox.open()


@pytest.mark.parametrize("arguments", [{"processes": 1}, {"processes": "64"}, {"processes": True}])
def test_a_container_needs_sensible_numbers(arguments):
    with pytest.raises(ConfigError, match="64 to 1000000"):
        DockerSandbox(**arguments)


@pytest.mark.parametrize("memory", [1, 2.5e9, "2g", load("python").limits.memory_bytes + OVERHEAD_BYTES - 1])
async def test_a_container_holds_at_least_one_session(memory):
    async with DockerSandbox(memory_bytes=memory) as sandbox:
        with pytest.raises(ConfigError, match="memory_bytes of a container"):
            await sandbox.open()


async def test_a_sandbox_belongs_to_one_event_loop():
    async with DockerSandbox(memory_bytes=1) as sandbox:
        with pytest.raises(ConfigError):
            await sandbox.open()
        with pytest.raises(UserError, match="one DockerSandbox per event loop"):
            await asyncio.to_thread(asyncio.run, sandbox.open())


def security_options(*engine_has: str) -> list[str]:
    engine = Engine.__new__(Engine)
    engine._security = list(engine_has)
    specification = Specification("image", ("{}",), '{"defaultAction":"SCMP_ACT_ERRNO"}', 2**30, 64)
    return engine._configuration(specification)["HostConfig"]["SecurityOpt"]


def test_apparmor_is_left_only_where_the_engine_would_enter_it():
    both = ["no-new-privileges", 'seccomp={"defaultAction":"SCMP_ACT_ERRNO"}']
    assert security_options("name=seccomp,profile=default") == both
    assert security_options("name=apparmor", "name=seccomp,profile=default") == [*both, "apparmor=unconfined"]
