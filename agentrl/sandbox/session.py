"""One session as the manager sees it: a socket, a lock, and what is known about the process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from agentrl.errors import ForkRefused, IsolationUnavailable, SandboxError, SessionClosed, SessionFrozen, UserError
from agentrl.sandbox import probe, wire
from agentrl.sandbox.base import (
    CODE_BYTES,
    FILE_BYTES,
    OUTPUT_BYTES,
    ExecResult,
    ExecStatus,
    Limits,
    Rng,
    check_deadline,
    check_fork,
    scratch_path,
)
from agentrl.sandbox.cgroup import Group
from agentrl.sandbox.channel import Channel
from agentrl.sandbox.launcher import Hearer
from agentrl.seeds import derive_seed

GRACE_SECONDS = 1.0
"""Time between the interrupt at a cell's deadline and the kill."""
FILE_SECONDS = 20.0
CLOSE_SECONDS = 10.0
FORK_SECONDS = 20.0
_MOMENT = 0.2
_TRIES, _BETWEEN = 100, 0.02
_ERROR_CHARS = 32 * 1024
_MESSAGE_CHARS = 300
_FILE_ERRORS = {
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.EINVAL, errno.EFBIG, errno.EACCES, errno.EPERM),
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.ENXIO, errno.EMFILE, errno.EEXIST),
}
"""What the file system says. Others would be taken for failures of ours: 110 is a TimeoutError."""
_TOO_DEEP = (errno.ENOSPC, errno.EUSERS)
_DEPTH = "it is a fork of a fork of ...: the kernel nests namespaces 32 deep"
_NEARLY = 0.5
"""Share of its CPU time from which a killed session is taken to have used it up. The kernel counts ticks to enforce the
limit and reports precise time; on a crowded virtual machine it was seen to kill at three quarters."""
_GONE = "variables and files are lost"
_REPORTED = {ExecStatus.OK, ExecStatus.ERROR, ExecStatus.TIMEOUT, ExecStatus.MEMORY}


class Ended(Exception):
    """The process behind the socket is gone by its program's doing; the message says how."""

    def __init__(self, how: str, status: ExecStatus = ExecStatus.KILLED) -> None:
        super().__init__(how)
        self.status = status


class Owner(Protocol):
    """What a session needs of the manager that opened it."""

    def backend_failed(self) -> str | None:
        """Why no session can be alive any more, or None."""
        ...

    def next_name(self) -> int:
        """A number that no other session has."""
        ...

    def ask(self, request: Mapping[str, Any], hearer: Hearer) -> Channel:
        """Ask the zygote for a session or a fork; ``hearer`` gets its news of it."""
        ...

    def group(self, limits: Limits) -> Group | None:
        """A new memory cgroup for a session; None where the zygote looks after memory."""
        ...

    def adopt(self, session: LocalSession) -> None:
        """A session has come to life."""
        ...

    def forget(self, session: LocalSession) -> None:
        """A session is gone."""
        ...


class LocalSession:
    """A session of a ``LocalSandbox``; see ``agentrl.sandbox.base.Session`` for its methods.

    What comes over its socket, its program may have written. What it hears from the zygote is true: that it lives,
    how it ended, why it cannot be forked.
    """

    def __init__(self, owner: Owner, limits: Limits, seed: int, parent: LocalSession | None = None) -> None:
        self.name, self.limits, self.seed = owner.next_name(), limits, seed
        self.rng: Literal["seeded"] | Rng = "seeded"
        self._owner, self._parent = owner, parent
        self._group = owner.group(limits)
        self._channel: Channel | None = None
        self._placing: asyncio.Future[None] | None = None
        self._reasons: list[str] = []  # why the zygote lets it not be forked from its parent
        self._born = asyncio.get_running_loop().create_future()  # whether a fork has come to life
        self._over: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._lock = asyncio.Lock()
        self._number = 0
        self._branches = 0
        self._given_up: set[str] = set()  # requests whose answers nobody waits for any more
        self._forks: set[LocalSession] = set()  # those that live
        self._lost: str | None = None  # by the program's own doing: how
        self._failed: str | None = None  # not by the program: why
        self._frozen = self._closed = self._exceeded = False

    def connect(self, request: dict[str, Any]) -> None:
        """Ask the zygote for it.

        Raises:
            SandboxError: it cannot be asked.
        """
        self._channel = self._owner.ask(request | {"name": self.name}, self._hear)

    def _hear(self, news: dict[str, Any]) -> None:
        pid = news.get("pid")
        if pid and self._group is not None:  # in a thread: the kernel may take milliseconds
            self._placing = asyncio.get_running_loop().run_in_executor(None, self._group.place, pid)
            self._placing.add_done_callback(
                lambda placing: placing.cancelled() or placing.exception()
            )  # or nobody asks
        self._reasons += news.get("refused", []) + news.get("failed", [])
        over = "exit" in news or "failed" in news
        if (over or "born" in news) and not self._born.done():
            self._born.set_result("born" in news)
        if over and not self._over.done():
            self._over.set_result(news)
            self._ungroup()

    async def ready(self) -> None:
        """Wait until the walls stand.

        Raises:
            IsolationUnavailable: a mechanism was refused, and no session of this process ever had it.
            SandboxError: the process did not come up.
        """
        assert self._channel is not None
        try:
            head, _ = await self._channel.receive(0)
            await self._placed()
        except (EOFError, wire.ProtocolError, OSError) as error:
            why = (
                self._owner.backend_failed() or (self._over.done() and self._over.result().get("fatal")) or repr(error)
            )
            raise SandboxError(f"a session did not start: {why}") from error
        if "fatal" in head and not probe.passed():
            raise IsolationUnavailable([str(head["fatal"])])
        if head.get("ready") is not True:
            raise SandboxError(f"a session did not start; it said {str(head)[:200]}.")

    async def _placed(self) -> None:
        """Wait until the process is in its cgroup.

        Raises:
            SandboxError: it cannot be put there, so nothing would bound its memory.
        """
        if self._placing is None:
            return
        try:
            await self._placing
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT, errno.ENODEV):  # else it has ended, and will say how
                raise SandboxError(f"a session cannot be put into its memory cgroup: {error}.") from error

    def abandon(self) -> None:
        """Let go of everything; the zygote ends what there is."""
        if self._channel is not None:
            self._channel.close()
        if self._channel is None or self._over.done():
            self._ungroup()

    def _ungroup(self, tries: int = _TRIES) -> None:
        """Remove the cgroup, as soon as the process that is being killed has left it; closing the manager does, too."""
        if self._group is None:
            return
        self._exceeded = self._exceeded or self._group.exceeded()
        if not self._group.remove() and tries > 1:
            asyncio.get_running_loop().call_later(_BETWEEN, self._ungroup, tries - 1)

    async def exec(self, code: str, deadline: float = 5.0) -> ExecResult:
        """Run one cell; see ``Session.exec``."""
        check_deadline(deadline)
        source = code.encode("utf-8", "surrogatepass")
        async with self._lock:
            began = time.perf_counter()
            self._check_usable()
            if self._lost is not None:
                return self._result(ExecStatus.KILLED, f"the session was lost earlier: {self._lost}", began)
            if len(source) > CODE_BYTES:
                error = f"ValueError: the cell is {len(source)} bytes long; at most {CODE_BYTES} can be run"
                return self._result(ExecStatus.ERROR, error, began)
            try:
                request = {"op": "exec", "deadline": float(deadline)}
                head, output = await self._request(request, source, OUTPUT_BYTES, deadline + GRACE_SECONDS)
                return self._read_result(head, output, began)
            except TimeoutError:
                self._lose(f"a cell ran for more than {deadline:g} s, could not be interrupted and was killed")
                return self._result(ExecStatus.TIMEOUT, f"TimeoutError: {self._lost}; {_GONE}", began)
            except Ended as end:
                self._lose(f"the Python process {end}")
                return self._result(end.status, f"Killed: {self._lost}; {_GONE}", began)

    async def put_file(self, path: str, data: bytes) -> None:
        """Write a file; see ``Session.put_file``."""
        if len(data) > FILE_BYTES:
            raise UserError(f"{path!r} is {len(data)} bytes; put_file takes at most {FILE_BYTES}. Send it in parts.")
        await self._file({"op": "put", "path": scratch_path(path)}, data)

    async def get_file(self, path: str) -> bytes:
        """Read a file; see ``Session.get_file``."""
        return await self._file({"op": "get", "path": scratch_path(path), "cap": FILE_BYTES}, b"")

    async def fork(self, rng: Rng = "inherit", *, branch: int | None = None) -> LocalSession:
        """A session in the same state; see ``Session.fork``."""
        check_fork(rng, branch)
        async with self._lock:
            self._check_usable(for_fork=True)
            if self._lost is not None:
                raise SessionClosed(f"the session was lost ({self._lost}), so there is nothing to fork.")
            branch = self._branches if branch is None else branch
            seed = derive_seed(self.seed, "branch", branch) if rng == "derive" else self.seed
            child = LocalSession(self._owner, self.limits, seed, self)
            try:
                async with asyncio.timeout(FORK_SECONDS):
                    await self._split(child, {"op": "fork", "rng": rng, "seed": seed})
            except TimeoutError as error:
                child.abandon()
                self._lose(f"it did not answer the request to fork within {FORK_SECONDS:g} s")
                raise SessionClosed(f"the session was lost while it was forked: {self._lost}.") from error
            except asyncio.CancelledError:
                child.abandon()
                self._frozen = True  # as it may be, in the zygote
                raise
            except BaseException:
                child.abandon()
                raise
            child.rng = rng
            self._frozen = True
            self._branches += 1
            self._forks.add(child)
            self._owner.adopt(child)
            return child

    async def _split(self, child: LocalSession, request: dict[str, Any]) -> None:
        """Let the process clone itself. It answers only where that fails; of a birth the zygote tells."""
        child.connect({"op": "fork", "parent": self.name})
        self._number += 1
        assert self._channel is not None
        await self._channel.send(wire.encode(request | {"id": self._number}))
        refusal = asyncio.ensure_future(self._answer(0))
        try:
            await asyncio.wait((refusal, child._born), return_when=asyncio.FIRST_COMPLETED)
        finally:
            refusal.cancel()
            done = await asyncio.gather(refusal, return_exceptions=True)
        if child._born.done() and child._born.result():
            await child._placed()
            return
        if not isinstance(done[0], tuple):
            self._given_up.add(str(self._number))
        match done[0]:
            case Ended() as end:
                self._lose(f"the Python process {end}")
                raise SessionClosed(f"the session was lost while it was forked: {self._lost}.") from end
            case SandboxError() as failure:
                raise failure
            case tuple((dict() as head, _)):
                child._reasons += _texts(head.get("reasons"))
                code = head.get("errno")
                if code == errno.ENOSYS:  # what the kernel answers for a zygote that is gone; of that we hear later
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_MOMENT):
                            await asyncio.shield(child._born)
                if not child._reasons:
                    child._reasons.append(
                        _DEPTH if code in _TOO_DEEP else f"the kernel refused (error {str(code)[:9]})"
                    )
        if gone := self._owner.backend_failed():
            raise SandboxError(f"sandbox: the fork is lost: {gone}.")
        if not child._reasons:  # the program's doing, which must not pass for a failure of the sandbox
            child._reasons.append("it ended before it came to life")
        raise ForkRefused(f"the session cannot be forked: {'; '.join(child._reasons)}.", child._reasons)

    async def close(self) -> None:
        """End the session; returns when its processes are gone, or at once while it has live forks. Safe twice."""
        if self._closed:
            return
        self._closed = True
        if not self._forks:
            await self._end()

    async def _end(self) -> None:
        """End the process, and those of its ancestors that were closed and only lived on for their forks."""
        assert self._channel is not None
        self._channel.hang_up()
        try:
            async with asyncio.timeout(CLOSE_SECONDS), self._lock:
                await asyncio.shield(self._over)
        except TimeoutError as error:
            raise SandboxError(f"a session was killed but its process did not end in {CLOSE_SECONDS:g} s.") from error
        finally:
            self.abandon()
            self._owner.forget(self)
            parent, self._parent = self._parent, None
            if parent is not None:
                parent._forks.discard(self)
                if parent._closed and not parent._forks:
                    await parent._end()

    async def _file(self, request: dict[str, Any], data: bytes) -> bytes:
        async with self._lock:
            self._check_usable()
            if self._lost is None:
                try:
                    head, content = await self._request(request, data, FILE_BYTES, FILE_SECONDS)
                except TimeoutError:
                    self._lose(f"it did not answer for {FILE_SECONDS:g} s and was killed")
                except Ended as end:
                    self._lose(f"the Python process {end}")
            if self._lost is not None:
                why = f"the session and its files were lost: {self._lost}"
                raise FileNotFoundError(errno.ENOENT, why, request["path"])
        if "errno" in head:
            said = head["errno"]
            code = said if isinstance(said, int) and said in _FILE_ERRORS else errno.EIO
            raise OSError(code, _printable(str(head.get("strerror")))[:_MESSAGE_CHARS], request["path"])
        return content

    async def _request(
        self, request: dict[str, Any], body: bytes, max_body: int, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer.

        Raises:
            TimeoutError: no answer in ``seconds``.
            Ended: the process ended, by the program's doing, or it sent nonsense.
            SandboxError: the sandbox failed, or the session was closed meanwhile.
        """
        assert self._channel is not None
        self._number += 1
        request["id"] = self._number
        try:
            await self._channel.send(wire.encode(request, body), seconds)
            return await self._answer(max_body, seconds)
        except asyncio.CancelledError:
            self._fail("a call on it was cancelled")
            raise

    async def _answer(self, max_body: int, seconds: float | None = None) -> tuple[dict[str, Any], bytes]:
        """The answer to the last request; raises as ``_request`` does."""
        assert self._channel is not None
        try:
            frame = await self._channel.receive(max_body, seconds)
            while (
                frame[0].get("id") != self._number and str(frame[0].get("id")) in self._given_up
            ):  # a fork that the zygote had already said has failed
                self._given_up.discard(str(frame[0]["id"]))
                frame = await self._channel.receive(max_body, seconds)
        except wire.ProtocolError as error:
            raise self._nonsense(str(error)) from error
        except EOFError as error:
            self._channel.hang_up()  # a program that closed its own side still lives
            async with asyncio.timeout(CLOSE_SECONDS):
                head = await asyncio.shield(self._over)
            if self._closed or head.get("gone"):
                self._fail("it was closed meanwhile" if self._closed else "the sandbox's zygote is gone")
                raise SandboxError(f"sandbox: the session is gone: {self._failed}.") from error
            if head.get("killed_for") == wire.ANCESTOR and await self._parent_was_killed():
                head = head | {"killed_for": None}
            raise self._end_of(head) from error
        if frame[0].get("id") != self._number:
            raise self._nonsense(f"an answer to request {str(frame[0].get('id'))[:20]} instead of {self._number}")
        return frame

    async def _parent_was_killed(self) -> bool:
        """Whether a session that this one was forked from was itself killed from outside, and took it along."""
        above = self._parent
        while above is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MOMENT):
                    news = await asyncio.shield(above._over)
                    if news.get("exit") == -signal.SIGKILL and not news.get("killed_for") and not above._exceeded:
                        return True
            above = above._parent
        return False

    def _nonsense(self, what: str) -> Ended:
        """Only the program can have sent it. As an infrastructure failure it would be a way out of a bad reward."""
        return Ended(f"broke the control protocol ({what}) and was killed")

    def _read_result(self, head: dict[str, Any], output: bytes, began: float) -> ExecResult:
        status: Any = head.get("status")
        error: Any = head.get("error")
        cut: Any = head.get("cut")
        well_formed = isinstance(status, str) and isinstance(error, str | None) and type(cut) is int
        if not well_formed or status not in _REPORTED or cut < 0:
            raise Ended("broke the control protocol (an answer without a valid status, error or cut) and was killed")
        text = output.decode("utf-8", "backslashreplace")
        if cut:
            text += f"\n[... {cut} more bytes of output cut ...]"
        seconds = time.perf_counter() - began
        if error is not None:
            error = _printable(error)[:_ERROR_CHARS]
        return ExecResult(ExecStatus(status), text, error, True, seconds)

    def _end_of(self, head: dict[str, Any]) -> Ended:
        """How the process ended, from what the zygote wrote as its last word.

        Raises:
            SandboxError: it was killed by something that is not the program's doing.
        """
        code, cpu = head["exit"], head.get("cpu")
        if (code == -signal.SIGKILL and self._exceeded) or head.get("killed_for") == wire.MEMORY:
            return Ended(f"held more than its {self.limits.memory_bytes} bytes of memory", ExecStatus.MEMORY)
        if head.get("killed_for"):
            return Ended(f"was ended for {head['killed_for']}")
        if code == -signal.SIGKILL and isinstance(cpu, float | int) and cpu > _NEARLY * self.limits.cpu_seconds:
            return Ended(f"used up its {self.limits.cpu_seconds} s of CPU time")
        if code is None or code == -signal.SIGKILL:
            # The first process of a PID namespace cannot be killed from within; so it was somebody outside.
            self._fail("its process was killed from outside the sandbox")
            raise SandboxError(f"sandbox: {self._failed}: by an operator, or for lack of memory on the machine.")
        if not isinstance(code, int) or code >= 0:
            return Ended(f"ended with exit status {str(code)[:20]}")
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return Ended(f"was ended by {name}")

    def _result(self, status: ExecStatus, error: str, began: float) -> ExecResult:
        return ExecResult(status, "", error, self._lost is None, time.perf_counter() - began)

    def _check_usable(self, *, for_fork: bool = False) -> None:
        if self._closed:
            raise SessionClosed("this session is closed: open another one.")
        if self._frozen and not for_fork:
            raise SessionFrozen("this session has been forked and runs no more: fork it again and use the fork.")
        if self._failed is not None:
            raise SandboxError(f"this session has failed ({self._failed}): close it and open another one.")

    def _lose(self, how: str) -> None:
        self._lost = how
        self._hang_up()

    def _fail(self, why: str) -> None:
        self._failed = why
        self._hang_up()

    def _hang_up(self) -> None:
        assert self._channel is not None
        self._channel.hang_up()


def _texts(value: object) -> list[str]:
    """Reasons as they came over the socket: text, and little of it."""
    return [_printable(str(item))[:_MESSAGE_CHARS] for item in value[:50]] if isinstance(value, list) else []


def _printable(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer and no file takes."""
    return text.encode("utf-8", "backslashreplace").decode()
