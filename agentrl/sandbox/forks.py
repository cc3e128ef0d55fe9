"""The zygote's part in a fork: it inspects the parent, lets exactly one clone(2) through, and furnishes the child.

A confined session cannot make namespaces. Its filter stops two calls and hands them to the zygote, which knows whether
a fork was asked for; here is what it answers, in the order in which an honest session calls:

::

    parent  clone        WAITING   look at the parent from outside; refuse with the list of what cannot be forked, or
                                   let this one through
    child   unshare(0)   CLONED    mount an empty /work and /tmp over the parent's
            (the child copies its files, opens its descriptors anew)
    child   unshare(0)   MOUNTED   look at the child: nothing of the parent's may be left but the parent's control
                                   socket, in whose place the child's own is put; from here on it is a session

A parent that already knows why it cannot be forked calls unshare(0) in place of clone, to have the list completed.
Whatever comes out of this order gets EPERM. Nothing depends on the session being honest: both looks are from outside,
and what the manager hears of a fork before it is born, it hears from the zygote. A parent is stopped (SIGSTOP) as long
as no fork of it is asked for: nodes of a tree are immutable.

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
import time
from collections.abc import Callable
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
_MOMENT = 0.1
"""Seconds after which what a stopped parent did is over. What somebody outside does in them is taken for its doing."""
_FLOOD = "calls that are none of its business"
_STRIKES = 200
"""Every so many calls out of order, the process that makes them is killed: each costs the zygote's time."""


class State(Enum):
    """How far a fork has come."""

    WAITING = auto()
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
        proc: its folder in /proc.
        listener: where the calls of its tree are answered; -1 until it has put up its walls.
        pidfd: of a fork, which is not a child of the zygote; -1 for others.
        parent: the session it was forked from.
        announced: whether the zygote has its listener, for which it waits in its first call.
        mapped: whether its user namespace, which a fork made itself, knows its user.
        forks: names in /proc of the processes forked from it, dead ones too: nobody waits for them.
        pending: the fork of it that is under way.
        frozen: whether it has been forked.
        thawed: the time until which it was last running, where it has been forked.
        strikes: calls out of order, of the whole tree below a session from ``open``.
        flooded: the last time that one of the tree was killed for such calls.
        killed_for: why it was killed, where it was not the manager's wish.
    """

    name: int
    pid: int
    link: socket.SocketType
    limits: dict[str, int]
    proc: Proc
    listener: int = -1
    pidfd: int = -1
    parent: Process | None = None
    announced: bool = False
    mapped: bool = False
    forks: set[str] = field(default_factory=set)
    pending: Pending | None = None
    frozen: bool = False
    thawed: float = 0.0
    strikes: int = 0
    flooded: float = 0.0
    killed_for: str | None = None

    def signal(self, number: int) -> None:
        """Send a signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd >= 0:
                signal.pidfd_send_signal(self.pidfd, number)
            else:
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it and, as it is the first process of a PID namespace, everything below."""
        self.signal(signal.SIGKILL)

    def stop(self) -> None:
        """Let it stand still: as a parent, or while a child is made sure of."""
        self.signal(signal.SIGSTOP)
        self.thawed = time.monotonic()

    def go_on(self) -> None:
        """Let it run."""
        self.signal(signal.SIGCONT)

    def killer_below(self) -> str | None:
        """What in the sandbox can have killed it with SIGKILL a moment ago; None: it was somebody outside."""
        above, since = self, time.monotonic() - _MOMENT
        while above.parent is not None:
            above = above.parent
            if above.pending is not None or above.thawed > since:
                return wire.ANCESTOR
        return _FLOOD if above.flooded > since else None


@dataclass(slots=True, eq=False)
class Pending:
    """A fork under way: the link of the child to be, and the child once it has been seen."""

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
        report: tells the manager something about the session with this number.
    """

    def __init__(self, host_proc: int, own_mounts: int, report: Callable[..., None]) -> None:
        self.host_proc, self.own_mounts, self.report = host_proc, own_mounts, report
        self.level = len(Proc(host_proc, "self").status()["NSpid"].split()) - 1  # how deep our PID namespace is

    def answer(self, listener: int, tree: list[Process]) -> Process | None:
        """Answer one call of a process of ``tree``, the sessions that share ``listener``.

        Returns:
            The new session, when the call was the last of a fork.
        """
        buffer = bytearray(_NOTIFICATION.size)
        try:
            _patiently(listener, _RECEIVE, buffer)
        except OSError:  # the caller has died or was interrupted
            return None
        identity, pid, _, number, *_ = _NOTIFICATION.unpack(buffer)
        born, code, flags = None, 0, 0
        try:
            born, flags = self._decide(tree, identity, pid, listener, _CALLS.get(number))
        except Refused as refusal:
            code = -refusal.code
        except OSError as error:
            code = -(error.errno or errno.EIO)
        with contextlib.suppress(OSError):  # the caller may be gone by now
            fcntl.ioctl(listener, _SEND, _ANSWER.pack(identity, 0, code, flags))
        return born

    def settle(self, parent: Process) -> None:
        """Put the parent's own limit of processes back."""
        with contextlib.suppress(ProcessLookupError):
            self._let_fork(parent.pid, parent.limits, allowed=False)

    def find_child(self, parent: Process, pending: Pending) -> bool:
        """Whether the child is there; seen for the first time, it and its parent get their limits back."""
        if pending.pid:
            return True
        for number in parent.proc.children():
            if number in parent.forks:
                continue
            proc = parent.proc.sibling(number)
            pids = proc.status()["NSpid"].split()
            if pids[-1] == "1":  # it has a PID namespace of its own, as only the clone that was let through makes
                break
        else:
            return False
        pidfd = os.pidfd_open(int(pids[self.level]))
        if Proc.behind(self.host_proc, pidfd).number != proc.number:  # it is dead and somebody has its number
            os.close(pidfd)
            return False
        parent.forks.add(proc.number)
        pending.pid, pending.pidfd, pending.proc = int(pids[self.level]), pidfd, proc
        self.settle(parent)
        self._let_fork(pending.pid, pending.limits, allowed=False)
        parent.stop()
        self.report(pending.name, pid=proc.number)
        return True

    def _decide(
        self, tree: list[Process], identity: int, pid: int, listener: int, called: str | None
    ) -> tuple[Process | None, int]:
        """(new session, flags of the answer) for one call; raises ``Refused`` or ``OSError`` where it is refused."""
        for process in tree:
            if process.pid == pid:
                return None, self._of_parent(tree, process, called)
        for process in tree:
            pending = process.pending
            if pending is None or called != "unshare" or not self.find_child(process, pending) or pending.pid != pid:
                continue
            if pending.state is State.CLONED:
                self._furnish(pending)
                return None, 0
            if pending.state is State.MOUNTED:
                return self._register(process, pending, identity, listener), 0
        self._strike(tree, pid)
        raise Refused

    def _of_parent(self, tree: list[Process], process: Process, called: str | None) -> int:
        pending = process.pending
        if not process.announced and called == "unshare":
            process.announced = True
            return 0
        if pending is not None and pending.state is State.WAITING:
            helper = self._map_ids(process)
            reasons = process.proc.obstacles(process.forks)
            if helper is not None and (code := os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])):
                raise OSError(code, "id maps")
            if reasons:
                self.report(pending.name, refused=reasons)
            if reasons or called != "clone":
                raise Refused(errno.EBUSY)
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
        tree[0].flooded = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # it waits for its answer, so the number is still its own

    def _furnish(self, pending: Pending) -> None:
        kernel.enter_mounts(pending.pidfd)
        try:
            jail.mount_scratch(pending.limits)
        finally:
            kernel.enter_mounts(self.own_mounts)
        pending.state = State.MOUNTED

    def _map_ids(self, process: Process) -> int | None:
        """Let the user namespace of a fork know its user, without which it cannot be forked in its turn.

        Only somebody in its parent's user namespace may write that, and nobody comes back from there: a process of its
        own does it. Returns its number, or None where it is done already; it exits with an error number or 0.
        """
        parent = process.parent
        if parent is None or process.mapped:
            return None
        process.mapped = True
        helper = os.fork()
        if helper:
            return helper
        code = errno.EIO
        try:
            kernel.enter_users(parent.pidfd if parent.pidfd >= 0 else os.pidfd_open(parent.pid))
            jail.map_ids(self.host_proc, process.proc.number, *(f"{jail.UNPRIVILEGED} {jail.UNPRIVILEGED} 1",) * 2)
            code = 0
        except OSError as error:
            code = error.errno or code
        finally:
            os._exit(code)

    def _register(self, parent: Process, pending: Pending, identity: int, listener: int) -> Process:
        """The child as a session of its own, if nothing of the parent's is left in it."""
        assert pending.proc is not None
        status = pending.proc.status()
        found = pending.proc.obstacles()
        if any(int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")):
            found.append("capabilities")
        if pending.proc.socket() != os.fstat(parent.link.fileno()).st_ino:
            found.append("another control socket")
        if not parent.proc.stopped():
            found.append("a parent that does not stand still")
        if set(parent.proc.children()) - parent.forks:
            found.append("processes of its parent that were made meanwhile")
        if found:
            self.report(pending.name, failed=[f"the child has {thing}" for thing in found])
            signal.pidfd_send_signal(pending.pidfd, signal.SIGKILL)
            raise Refused
        put = _DESCRIPTOR.pack(identity, _AT_NUMBER, pending.link.fileno(), CONTROL, 0)
        _patiently(listener, _PUT, put)
        parent.pending, parent.frozen = None, True
        born = Process(pending.name, pending.pid, pending.link, pending.limits, pending.proc)
        born.listener, born.announced, born.pidfd, born.parent = listener, True, pending.pidfd, parent
        self.report(born.name, born=True)
        return born

    @staticmethod
    def _let_fork(pid: int, limits: dict[str, int], *, allowed: bool) -> None:
        """A fork counts among its parent's processes, so the parent's limit is lifted while it clones."""
        _, most = resource.prlimit(pid, resource.RLIMIT_NPROC)
        soft = most if allowed else jail.at_most(limits["processes"], most)
        resource.prlimit(pid, resource.RLIMIT_NPROC, (soft, most))


_CALLS = {number: name for name in ("unshare", "clone") for number in [kernel.number_of(name)]}


def _patiently(listener: int, request: int, argument: bytearray | bytes) -> None:
    """An ioctl that waits for the other side, where any session's end interrupts the zygote."""
    while True:
        try:
            fcntl.ioctl(listener, request, argument)
            return
        except InterruptedError:
            continue
