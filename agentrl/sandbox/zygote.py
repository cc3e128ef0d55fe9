"""The process that sessions are forked from.

Two processes, in fact: a parent that builds the jail and then only waits, and its child, the first process of a new
PID namespace. When that child ends, for whatever reason, the kernel kills every session with it. It ends when the
manager closes the control socket, and when the manager dies.

The control socket (SOCK_SEQPACKET, JSON) carries requests in, "open" and "fork", and news of sessions out. A request
brings the new session's end of a socket pair, of which the zygote keeps a copy. When the manager hangs up, it kills
the session; when the session ends, it closes the copy and tells the manager how it ended: no process is left then.

Runs on its own, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import builtins
import contextlib
import errno
import fcntl
import functools
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from agentrl.sandbox import interpreter, jail, kernel, landlock, runner, seccomp
from agentrl.sandbox.forks import Notary, Pending, Process, State
from agentrl.sandbox.inspection import Proc
from agentrl.sandbox.watchdog import Watchdog

_PACKET_BYTES = 4096
_ONE_DESCRIPTOR = socket.CMSG_LEN(4)
_SOON = 0.001
"""Seconds between two looks for a child that is being cloned."""


class Zygote:
    """Forks sessions, kills them when the manager hangs up, reaps them when they end."""

    def __init__(
        self, control: socket.socket, manager: int, host_proc: int, program: interpreter.Interpreter, watching: bool
    ) -> None:
        self.control, self.manager, self.host_proc, self.program = control, manager, host_proc, program
        self.filter, self.rules = seccomp.assemble(), landlock.ruleset()
        self.own_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=host_proc)
        self.notary = Notary(host_proc, os.open("self/ns/mnt", os.O_RDONLY, dir_fd=host_proc), self._report)
        self.watchdog = Watchdog(watching)
        self.processes: dict[int, Process] = {}  # by the manager's number
        self.handlers: dict[int, Callable[[], None]] = {}  # by descriptor
        self.epoll = select.epoll()
        self.bell, ringer = socket.socketpair()
        self.announced, self.announcing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.bell, ringer, self.announced):
            end.setblocking(False)
        self.ringer = ringer
        signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def run(self) -> None:
        """Serve until the manager goes away, then end every session."""
        self._watch(self.bell.fileno(), self._reap)
        for watched in (self.control.fileno(), self.announced.fileno(), self.manager):
            self.epoll.register(watched, select.EPOLLIN)
        while True:
            ready = [descriptor for descriptor, _ in self.epoll.poll(self._wait())]
            if self.manager in ready:
                return
            # First what explains the rest: a session announces itself before it is used, and the manager asks for a
            # fork before the session does.
            if self.announced.fileno() in ready:
                self._register_announced()
            if self.control.fileno() in ready and not self._take_requests():
                return
            handlers = [(descriptor, self.handlers.get(descriptor)) for descriptor in ready]
            for descriptor, handler in handlers:
                if handler is not None and self.handlers.get(descriptor) is handler:  # else an earlier one closed it
                    handler()
            self.watchdog.look(self.processes)
            self._look_for_children()

    def _report(self, name: int, **said: object) -> None:
        """Tell the manager about a session, on the socket that no session can write to."""
        self.control.send(json.dumps({"name": name, **said}).encode())

    def _wait(self) -> float:
        """Seconds until there is something to do without being asked; -1: for ever."""
        if any(p.pending is not None and p.pending.state is State.CLONED for p in self.processes.values()):
            return _SOON
        return self.watchdog.wait(self.processes)

    def _look_for_children(self) -> None:
        """See forks under way as soon as they exist: until then their parents' limit of processes is lifted."""
        for parent in list(self.processes.values()):
            pending = parent.pending
            if pending is not None and pending.state is not State.WAITING and pending.pidfd not in self.handlers:
                with contextlib.suppress(OSError):
                    if self.notary.find_child(parent, pending):
                        self._watch(pending.pidfd, functools.partial(self._stillborn, parent, pending))

    def _watch(self, descriptor: int, handler: Callable[[], None], events: int = select.EPOLLIN) -> None:
        self.handlers[descriptor] = handler
        self.epoll.register(descriptor, events)

    def _forget(self, descriptor: int) -> None:
        if self.handlers.pop(descriptor, None) is not None:
            self.epoll.unregister(descriptor)

    def _take_requests(self) -> bool:
        """Take every request that is there; False when the manager has gone."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, passed, _, _ = self.control.recvmsg(_PACKET_BYTES, _ONE_DESCRIPTOR, socket.MSG_DONTWAIT)
                if not data:
                    return False
                if passed:  # else there was no descriptor left, and the manager reads the end of file
                    # SocketType: the bare C type: the fewer objects are touched here, the fewer pages a fork copies
                    descriptor = int.from_bytes(passed[0][2], sys.byteorder)
                    link = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
                    request = json.loads(data)
                    (self._open if request["op"] == "open" else self._expect_fork)(request, link)
        return True

    def _open(self, request: dict[str, Any], link: socket.SocketType) -> None:
        try:
            kernel.unshare(kernel.CLONE_NEWPID)
            pid = -1
            try:
                pid = os.fork()
            finally:
                if pid:
                    kernel.set_pid_namespace(self.own_namespace)  # for the next child, which need not be a session
        except OSError as error:
            self._report(request["name"], exit=None, fatal=f"a new process: {error.strerror}")
            link.close()
            return
        if pid == 0:
            _become_session(request, link.fileno(), self)
        pidfd = os.pidfd_open(pid)
        process = Process(request["name"], pid, link, request["limits"], Proc.behind(self.host_proc, pidfd))
        os.close(pidfd)
        self._report(process.name, pid=process.proc.number)
        self.processes[process.name] = process
        self._watch_link(process)

    def _register_announced(self) -> None:
        """A new session's process has put up its walls: take hold of where its calls arrive.

        It is taken, not sent: how many descriptors may be under way in messages is counted per user, so that one
        session could keep all others from sending any.
        """
        with contextlib.suppress(BlockingIOError):
            while True:
                name, number = map(int, self.announced.recv(_PACKET_BYTES).split())
                process = self.processes.get(name)
                if process is None:
                    continue
                pidfd = os.pidfd_open(process.pid)
                try:
                    process.listener = kernel.take_descriptor(pidfd, number)
                    self._watch(process.listener, functools.partial(self._notified, process))
                except OSError as error:
                    process.kill()
                    if error.errno != errno.ESRCH:  # else it has died meanwhile
                        self._report(process.name, exit=None, fatal=f"pidfd_getfd: {error.strerror}")
                os.close(pidfd)

    def _expect_fork(self, request: dict[str, Any], link: socket.SocketType) -> None:
        parent = self.processes.get(request["parent"])
        if parent is not None and parent.pending is not None:  # the manager has given that one up
            self._abandon(parent, parent.pending)
        if parent is None:
            self._report(request["name"], failed=["the session has ended meanwhile"])
            link.close()
            return
        parent.go_on()
        pending = parent.pending = Pending(request["name"], link, parent.limits)
        self._watch(link.fileno(), lambda: self._abandon(parent, pending), select.EPOLLRDHUP)

    def _abandon(self, parent: Process, pending: Pending) -> None:
        parent.pending = None
        self._forget(pending.link.fileno())
        self._forget(pending.pidfd)
        pending.abandon()
        self.notary.settle(parent)
        (parent.stop if parent.frozen else parent.go_on)()
        self._report(pending.name, failed=[])  # nobody may be left to hear that

    def _stillborn(self, parent: Process, pending: Pending) -> None:
        assert pending.proc is not None
        code, _ = pending.proc.ended()
        why = os.strerror(code) if code is not None and code > 0 else "it ended"
        self._report(pending.name, failed=[f"its files cannot be copied: {why}"])
        self._abandon(parent, pending)

    def _notified(self, root: Process) -> None:
        tree = [root, *(p for p in self.processes.values() if p.listener == root.listener and p is not root)]
        born = self.notary.answer(root.listener, tree)
        if born is not None:
            self._forget(born.link.fileno())
            self._forget(born.pidfd)
            self.processes[born.name] = born
            self._watch_link(born)
            self._watch(born.pidfd, lambda: self._ended(born, *born.proc.ended()))

    def _watch_link(self, process: Process) -> None:
        def hung_up() -> None:
            self._forget(process.link.fileno())
            process.killed_for = process.killed_for or "closing its control socket"  # unless the manager did, and knows
            process.kill()

        self._watch(process.link.fileno(), hung_up, select.EPOLLRDHUP)

    def _reap(self) -> None:
        self.bell.recv(4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return
                for process in self.processes.values():
                    if process.pid == pid and process.pidfd < 0:
                        self._ended(process, os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime)
                        break

    def _ended(self, process: Process, code: int | None, cpu: float) -> None:
        """A session is gone with all its processes: say so, and let go of what belonged to it."""
        del self.processes[process.name]
        if process.pending is not None:
            self._abandon(process, process.pending)
        self._forget(process.link.fileno())
        if process.pidfd >= 0:
            self._forget(process.pidfd)
            os.close(process.pidfd)
        elif process.listener >= 0:
            self._forget(process.listener)
            os.close(process.listener)
        if code in (None, -signal.SIGKILL) and process.killed_for is None:
            process.killed_for = process.killer_below()
        process.link.close()
        self._report(process.name, exit=code, cpu=round(cpu, 3), killed_for=process.killed_for)


def _become_session(request: dict[str, Any], link: int, zygote: Zygote) -> NoReturn:
    """The rest of a session's life; never returns into the zygote's loop."""
    try:
        number = os.readlink("self", dir_fd=zygote.host_proc)
        kept = [link, zygote.announcing.fileno(), zygote.host_proc]
        kept += [zygote.rules] if zygote.rules >= 0 else []
        aside = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 16) for descriptor in kept]  # so that none replaces another
        for place, descriptor in enumerate(aside, runner.CONTROL):
            os.dup2(descriptor, place)
        announcing, host_proc = runner.CONTROL + 1, runner.CONTROL + 2
        rules = host_proc + 1 if zygote.rules >= 0 else -1
        kernel.close_from(runner.CONTROL + len(kept))
        signal.set_wakeup_fd(-1)
        _signal.signal(signal.SIGCHLD, _signal.SIG_DFL)
        listener = jail.confine(request["limits"], zygote.filter, host_proc, number, rules)
        os.write(announcing, f"{request['name']} {listener}".encode())
        os.close(announcing)
        kernel.rendezvous()  # until the zygote has it
        os.close(listener)
        runner.open_output()
        zygote.program.adopt(request["seed"])
    except BaseException as error:
        runner.send({"fatal": str(error) if isinstance(error, jail.Missing) else repr(error)})
        os._exit(1)
    try:
        runner.send({"ready": True})
        runner.serve(zygote.program)
    finally:
        os._exit(1)


def _prepare(config: dict[str, Any]) -> interpreter.Interpreter:
    """Bring the interpreter into the state that every session starts from."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.path[:] = ["/work", *(path for path in sys.path if path), jail.PACKAGES]
    for name in config["preload"]:
        importlib.import_module(name)
    os.environ.clear()
    sys.argv[:] = sys.orig_argv[:] = [""]
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # what the site module would have put there
    for name in [name for name in sys.modules if name.partition(".")[0] == "agentrl"]:
        del sys.modules[name]
    program = interpreter.Interpreter(config["output_bytes"])
    program.warm_up()
    gc.collect()
    gc.freeze()
    return program


def main(config: dict[str, Any]) -> NoReturn:
    """Build the jail, fork the zygote proper, wait for it."""
    os.umask(0o022)
    control = socket.socket(fileno=config["control"])
    manager = os.pidfd_open(config["manager"])
    if os.getppid() != config["manager"]:
        os._exit(0)
    try:
        if missing := jail.diagnose():
            raise jail.Missing(*missing)
        host_proc = jail.build(config["packages"])
        process = os.fork()
        if process:
            control.close()
            os.close(host_proc)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) & 0xFF)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        zygote = Zygote(control, manager, host_proc, _prepare(config), config["watching"])
        control.send(b'{"ready": true}')
    except jail.Missing as error:
        control.send(json.dumps({"missing": error.args}).encode())
        os._exit(1)
    except BaseException:
        control.send(json.dumps({"failed": traceback.format_exc()[-8000:]}).encode())
        os._exit(1)
    try:
        zygote.run()
    except BaseException:
        os.write(2, traceback.format_exc().encode())  # sys.stderr belongs to the sessions
        os._exit(1)
    os._exit(0)  # as the first process of its PID namespace it takes every session with it
