"""The docker backend: one container per tree, in which the same zygote forks sessions as the embedded backend has.

A container starts with a tree's first session and is spoken to over its standard streams (``attachment``); what runs
in it is ``inside``, the calls are those of ``calls``. A fork happens within, so it costs what it costs in the embedded
backend. The last session of a tree takes the container with it, and so does the end of this process, however it comes.

A session in a container has two walls around it: its own, as everywhere, and the container's: no capabilities, no
network, a read-only root, a seccomp profile of its own (``sandboxes/python/seccomp.json``), and memory and processes
bounded by the kernel for the tree as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import threading
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from agentrl.errors import ConfigError, SandboxError
from agentrl.sandbox import image as images
from agentrl.sandbox import inside
from agentrl.sandbox import profile as profiles
from agentrl.sandbox.base import Limits, Profile, check_seed
from agentrl.sandbox.container import DockerSession, Threads, Tree, settle
from agentrl.sandbox.engine import Engine, Specification, Started, seccomp_profile
from agentrl.sandbox.one_loop import OneLoop
from agentrl.types import ForkLevel

OVERHEAD_BYTES = 256 * 1024 * 1024
"""What a container needs for itself, besides its sessions."""
_SESSIONS = 4
_PROCESSES = 1024


class DockerSandbox(OneLoop):
    """Opens each session in a container of its own, which its forks share; bound to the event loop that first uses it.

    Args:
        profile: what sessions are made of; default ``"python"``. ``sandboxes/python/build.py`` builds its image.
        image: tag of the image; default the profile's.
        engine: URL of the Docker engine; default DOCKER_HOST, or unix:///var/run/docker.sock.
        memory_bytes: of one container, so of all sessions of a tree together; default four times what one session may
            use, and 256 MiB.
        processes: processes and threads of one container; default 1024.

    Raises:
        UnknownName: no such profile.
        ConfigError: a number is out of its range.

    Example:
        ```python
        async with DockerSandbox() as sandbox:
            session = await sandbox.open(seed=1)
            result = await session.exec("1 + 1")
            branch = await session.fork()
        ```
    """

    fork_level = ForkLevel.SNAPSHOT

    def __init__(
        self,
        profile: str | Profile | None = None,
        *,
        image: str | None = None,
        engine: str | None = None,
        memory_bytes: int | None = None,
        processes: int = _PROCESSES,
    ) -> None:
        self._profile, self._image, self._url = profiles.resolve(profile, profiles.DEFAULT), image, engine
        self._memory_bytes, self._processes = memory_bytes, processes
        if type(processes) is not int or not 64 <= processes <= 1_000_000:
            raise ConfigError(f"processes of a container are an integer from 64 to 1000000, got {processes!r}.")
        self._threads = Threads()
        self._engine: Engine | None = None
        self._starting, self._connecting = asyncio.Lock(), threading.Lock()
        self._trees: set[Tree] = set()
        self._closed = False

    async def open(
        self, profile: str | Profile | None = None, *, seed: int = 0, limits: Limits | None = None
    ) -> DockerSession:
        """A new session in a new container; see ``Sandbox.open``.

        Raises:
            UserError: the docker package is not installed, there is no image or an old one, or this sandbox belongs to
                another event loop.
            IsolationUnavailable: no engine answers, or it cannot enforce a limit, or the container cannot isolate
                sessions from each other.
            ConfigError: the limits do not fit into the container, or as in ``Sandbox.open``.
        """
        check_seed(seed)
        self._check_loop()
        chosen = profiles.resolve(profile, self._profile)
        chosen = replace(chosen, limits=limits or chosen.limits)
        memory = self._memory(chosen.limits)
        async with self._starting:
            engine = await self._answering()
        tree = await self._plant(engine, chosen, memory)
        self._trees.add(tree)
        try:
            if self._closed:
                raise SandboxError("this DockerSandbox was closed meanwhile.")
            return await tree.open(seed)
        except BaseException:
            tree.fell()
            raise

    async def close(self) -> None:
        """Close every session; returns when no container is left. Safe to call twice.

        Raises:
            SandboxError: the engine could not remove a container.
        """
        self._check_loop()
        self._closed = True
        async with self._starting:
            try:
                await settle(tree.close() for tree in tuple(self._trees))
            finally:
                try:
                    await self._threads.finish()
                finally:
                    engine, self._engine = self._engine, None
                    if engine is not None:
                        engine.close()

    def _memory(self, limits: Limits) -> int:
        least = limits.memory_bytes + OVERHEAD_BYTES
        memory = self._memory_bytes
        if memory is None:
            return _SESSIONS * limits.memory_bytes + OVERHEAD_BYTES
        if type(memory) is not int or memory < least:
            raise ConfigError(
                f"memory_bytes of a container is an integer of at least {least} (one session's "
                f"{limits.memory_bytes} and {OVERHEAD_BYTES}), got {memory!r}."
            )
        return memory

    async def _answering(self) -> Engine:
        if self._closed:
            raise SandboxError("this DockerSandbox is closed: make another one.")
        if self._engine is None:
            await asyncio.wrap_future(self._threads.keep(self._connect))
        assert self._engine is not None
        return self._engine

    def _connect(self) -> None:
        with self._connecting:  # a cancelled ``open`` leaves its thread at work
            if self._engine is None:
                engine = Engine(self._url)
                engine.remove_unstarted()
                self._engine = engine

    async def _plant(self, engine: Engine, profile: Profile, memory: int) -> Tree:
        """A started container; one that is started for nobody is removed again."""
        name = self._image or profile.image
        if name is None:
            raise ConfigError(
                f'profile {profile.name!r} has no container image: add image = "NAME" to it, or pass image=.'
            )
        command = f"python -m agentrl.sandboxes.python.build {shlex.quote(profile.name)} --tag {shlex.quote(name)}"
        seccomp = seccomp_profile((profiles.folder(profiles.DEFAULT) / "seccomp.json").read_text())

        def start() -> Started:
            identity = engine.find_image(name, images.fingerprint(profile.packages), command)
            arguments = (inside.encode(profile),)
            return engine.start(Specification(identity, arguments, seccomp, memory, self._processes))

        future = self._threads.start(start)
        try:
            started = await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                self._threads.keep(partial(_discard, engine, future))
            raise
        return Tree(self._threads, engine, started, self._trees.discard)


def _discard(engine: Engine, starting: Future[Started]) -> None:
    """Remove a container that nobody waits for any more."""
    with contextlib.suppress(Exception):  # it did not start
        started = starting.result()
        started.socket.close()
        engine.remove(started.name)
