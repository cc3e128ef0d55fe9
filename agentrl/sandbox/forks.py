"""The zygote's part in a fork: it inspects the parent, lets exactly one clone(2) through, and furnishes the child.

A confined session cannot make namespaces. Its filter stops three calls and hands them to the zygote, which knows
whether a fork was asked for; here is what it answers, in the order in which an honest session calls:

::

    parent  unshare(0)   WAITING   look at the parent from outside; refuse with the list of what cannot be forked
    parent  clone        INSPECTED let this one through
    child   capset       CLONED    let it give up what its new user namespace brought
    child   unshare(0)   CLONED    mount an empty /work and /tmp over the parent's, put the child's own control socket
                                   in the place of the parent's
            (the child copies its files, opens its descriptors anew)
    child   unshare(0)   MOUNTED   look at the child: nothing of the parent's may be left; from here on it is a session

Whatever comes out of this order gets EPERM. Nothing depends on the session being honest: both looks are from outside.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import struct
from dataclasses import dataclass, field
from enum import Enum, auto

from agentrl.sandbox import jail, kernel, wire
from agentrl.sandbox.inspection import Proc
from agentrl.sandbox.runner import CONTROL

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif: id, pid, flags; nr, architecture, pointer, arguments
_ANSWER = struct.Struct("=QqiI")  # struct seccomp_notif_resp: id, value, error, flags
_DESCRIPTOR = struct.Struct("=QIIII")  # struct seccomp_notif_addfd: id, flags, ours, theirs, theirs' flags
_RECEIVE, _SEND, _PUT = 0xC050_2100, 0xC018_2101, 0x4018_2103
_CONTINUE, _AT_NUMBER = 1, 1
_STRIKES = 200
"""Every so many calls out of order, the process that makes them is killed: each costs the zygote's time."""


class State(Enum):
    """How far a fork has come."""

    WAITING = auto()
    INSPECTED = auto()
    CLONED = auto()
    MOUNTED = auto()


@dataclass(slots=True, eq=False)
class Process:
    """A session's first process, as the zygote keeps it.

    Attributes:
        name: the manager's number for it.
        pid: in the zygote's PID namespace.
        link: the session's end of its control socket; a copy.
        limits: of the session.
        listener: where the calls of its tree are answered.
        proc: its /proc folder; None until a session from ``open`` has announced itself.
        pidfd: of a fork, which is not a child of the zygote; -1 for others.
        parent: the session it was forked from.
        forks: names in /proc of the processes forked from it.
        pending: the fork of it that is under way.
        strikes: calls out of order, of the whole tree below a session from ``open``.
        killed_for: why the zygote killed it, where it was not the manager's wish.
    """

    name: int
    pid: int
    link: socket.SocketType
    limits: dict[str, int]
    listener: int = -1
    proc: Proc | None = None
    pidfd: int = -1
    parent: Process | None = None
    forks: set[str] = field(default_factory=set)
    pending: Pending | None = None
    strikes: int = 0
    killed_for: str | None = None

    def kill(self) -> None:
        """End it and, as it is the first process of a PID namespace, everything below."""
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            else:
                os.kill(self.pid, signal.SIGKILL)


@dataclass(slots=True, eq=False)
class Pending:
    """A fork under way: the link of the child to be, and the child once it exists."""

    name: int
    link: socket.SocketType
    limits: dict[str, int]
    state: State = State.WAITING
    pid: int = 0
    pidfd: int = -1
    proc: Proc | None = None

    def abandon(self) -> None:
        """Kill the child if there is one and let go of everything."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            os.close(self.pidfd)
        self.link.close()


class Refused(Exception):
    """The answer to a call is this error number."""

    def __init__(self, code: int = errno.EPERM) -> None:
        self.code = code


class Notary:
    """Answers the calls that sessions' filters hand over.

    Args:
        host_proc: descriptor of a /proc in which the sessions are visible.
        own_mounts: descriptor of the zygote's mount namespace.
    """

    def __init__(self, host_proc: int, own_mounts: int) -> None:
        self.host_proc, self.own_mounts = host_proc, own_mounts

    def answer(self, listener: int, tree: list[Process]) -> Process | None:
        """Answer one call of a process of ``tree``, the sessions that share ``listener``.

        Returns:
            The new session, when the call was the last of a fork.
        """
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, buffer, True)
        except OSError:  # the caller has died or was interrupted
            return None
        identity, pid, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        born, code, flags = None, 0, 0
        try:
            born, flags = self._decide(tree, identity, pid, listener, number, arguments[0])
        except Refused as refusal:
            code = -refusal.code
        except OSError as error:
            code = -(error.errno or errno.EIO)
        with contextlib.suppress(OSError):  # the caller may be gone by now
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(identity, 0, code, flags))
        return born

    def settle(self, parent: Process) -> None:
        """Put the parent's own limit of processes back, after a fork or the attempt."""
        with contextlib.suppress(ProcessLookupError):
            self._let_fork(parent.pid, parent.limits, allowed=False)

    def _decide(
        self, tree: list[Process], identity: int, pid: int, listener: int, number: int, argument: int
    ) -> tuple[Process | None, int]:
        """(new session, flags of the answer) for one call; raises ``Refused`` or ``OSError`` where it is refused."""
        called = _CALLS.get(number)
        for process in tree:
            if process.pid == pid:
                return None, self._of_parent(tree, process, called)
        parent, pending = self._expected(tree, pid)
        if called == "capset" and pending.state is State.CLONED:
            return None, _CONTINUE
        if called == "unshare" and pending.state is State.CLONED:
            self._furnish(parent, pending, identity, listener)
            return None, 0
        if called == "unshare" and pending.state is State.MOUNTED:
            return self._register(parent, pending, listener), 0
        raise Refused

    def _of_parent(self, tree: list[Process], process: Process, called: str | None) -> int:
        pending = process.pending
        if pending is not None and called == "unshare" and pending.state is State.WAITING:
            assert process.proc is not None
            reasons = process.proc.obstacles(process.forks)
            tell(pending.link, {"reasons": reasons})
            if reasons:
                raise Refused(errno.EBUSY)
            pending.state = State.INSPECTED
            return 0
        if pending is not None and called == "clone" and pending.state is State.INSPECTED:
            self._let_fork(process.pid, process.limits, allowed=True)
            pending.state = State.CLONED
            return _CONTINUE
        self._strike(tree, process.pid)
        raise Refused

    @staticmethod
    def _strike(tree: list[Process], pid: int) -> None:
        tree[0].strikes += 1
        if tree[0].strikes % _STRIKES:
            return
        for process in tree:
            if process.pid == pid:
                process.killed_for = "calls that are none of its business"
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it waits for its answer, so the number is still its own

    def _expected(self, tree: list[Process], pid: int) -> tuple[Process, Pending]:
        """The fork whose child this process is; it is looked at when it calls for the first time."""
        waiting = [(process, process.pending) for process in tree if process.pending is not None]
        for process, pending in waiting:
            if pending.pid == pid:
                return process, pending
        pidfd = os.pidfd_open(pid)
        try:
            proc = Proc.behind(self.host_proc, pidfd)
            status = proc.status()
            for process, pending in waiting:
                first = status["NSpid"].split()[-1] == "1" and process.proc is not None
                if first and not pending.pid and status["PPid"] == process.proc.number:  # type: ignore[union-attr]
                    if pending.state is not State.CLONED:
                        break
                    process.forks.add(proc.number)
                    pending.pid, pending.pidfd, pending.proc, pidfd = pid, pidfd, proc, -1
                    return process, pending
        finally:
            if pidfd >= 0:
                os.close(pidfd)
        self._strike(tree, pid)
        raise Refused

    def _furnish(self, parent: Process, pending: Pending, identity: int, listener: int) -> None:
        self._let_fork(pending.pid, pending.limits, allowed=False)
        helper = self._map_ids(parent, pending)
        try:
            kernel.enter_mounts(pending.pidfd)
            try:
                jail.mount_scratch(pending.limits)
            finally:
                kernel.enter_mounts(self.own_mounts)
        finally:
            code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
        if code:
            raise Refused(code)
        fcntl.ioctl(listener, _PUT, _DESCRIPTOR.pack(identity, _AT_NUMBER, pending.link.fileno(), CONTROL, 0))
        pending.state = State.MOUNTED

    def _map_ids(self, parent: Process, pending: Pending) -> int:
        """Let the child's user namespace know its user, without which it could not be forked in its turn.

        Only somebody in the parent's user namespace may write that, and nobody comes back from there: a process of its
        own does it. Returns its number; it exits with an error number or 0.
        """
        helper = os.fork()
        if helper:
            return helper
        code = errno.EIO
        try:
            kernel.enter_users(parent.pidfd if parent.pidfd >= 0 else os.pidfd_open(parent.pid))
            assert pending.proc is not None
            jail.map_ids(self.host_proc, pending.proc.number, *(f"{jail.UNPRIVILEGED} {jail.UNPRIVILEGED} 1",) * 2)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)

    def _register(self, parent: Process, pending: Pending, listener: int) -> Process:
        """The child as a session of its own, if nothing of the parent's is left in it."""
        assert pending.proc is not None
        status = pending.proc.status()
        rights = {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")}
        if rights != {0} or pending.proc.obstacles():
            signal.pidfd_send_signal(pending.pidfd, signal.SIGKILL)
            raise Refused
        self.settle(parent)
        parent.pending = None
        tell(pending.link, {"pid": pending.proc.number})
        born = Process(pending.name, pending.pid, pending.link, pending.limits)
        born.listener, born.proc, born.pidfd, born.parent = listener, pending.proc, pending.pidfd, parent
        return born

    @staticmethod
    def _let_fork(pid: int, limits: dict[str, int], *, allowed: bool) -> None:
        """A fork counts among its parent's processes, so the parent's limit is lifted while it clones."""
        _, most = resource.prlimit(pid, resource.RLIMIT_NPROC)
        soft = most if allowed else jail.at_most(limits["processes"], most)
        resource.prlimit(pid, resource.RLIMIT_NPROC, (soft, most))


_CALLS = {number: name for name in ("unshare", "clone", "capset") for number in [kernel.number(name)]}


def tell(link: socket.SocketType, head: dict[str, object]) -> None:
    """Write a frame to the manager if there is anybody left to read it; never wait."""
    with contextlib.suppress(OSError):
        link.send(wire.encode(head), socket.MSG_DONTWAIT)
