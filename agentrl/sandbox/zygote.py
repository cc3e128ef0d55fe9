"""The process that sessions are forked from.

Two processes, in fact: a parent that builds the jail and then only waits, and its child, the first process of a new
PID namespace. When that child ends, for whatever reason, the kernel kills every session with it. It ends when the
manager closes the control socket, and when the manager dies.

The control socket (SOCK_SEQPACKET, JSON) carries one greeting out and then only requests in: "open", with the
session's end of a socket pair. The zygote keeps a copy of that end. When the manager hangs up, it kills the session;
when the session ends, it reaps it, writes how it ended into the socket and closes it, so that whoever reads the end
of file knows that no process is left.

Runs on its own, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import builtins
import contextlib
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
from typing import Any, NoReturn

from agentrl.sandbox import interpreter, jail, kernel, runner, seccomp, wire

_PACKET_BYTES = 4096
_ONE_DESCRIPTOR = socket.CMSG_LEN(4)


class Zygote:
    """Forks sessions, kills them when the manager hangs up, reaps them when they end."""

    def __init__(
        self, control: socket.socket, manager: int, own_namespace: int, program: interpreter.Interpreter
    ) -> None:
        self.control, self.manager, self.own_namespace = control, manager, own_namespace
        self.program = program
        self.filter = seccomp.assemble()
        self.links: dict[int, socket.SocketType] = {}  # by process id
        self.processes: dict[int, int] = {}  # by descriptor, as long as the session is wanted
        self.epoll = select.epoll()
        self.bell, ringer = socket.socketpair()
        self.bell.setblocking(False)
        ringer.setblocking(False)
        self.ringer = ringer
        signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def run(self) -> None:
        """Serve until the manager goes away, then end every session."""
        for watched in (self.control.fileno(), self.manager, self.bell.fileno()):
            self.epoll.register(watched, select.EPOLLIN)
        while True:
            ready = {descriptor for descriptor, _ in self.epoll.poll()}
            if self.manager in ready:
                return
            for descriptor in ready & self.processes.keys():
                self.epoll.unregister(descriptor)
                os.kill(self.processes.pop(descriptor), signal.SIGKILL)
            if self.bell.fileno() in ready:
                self.bell.recv(4096)
                self._reap()
            if self.control.fileno() in ready:  # last: a new session may get the number of a descriptor closed above
                data, passed, _, _ = self.control.recvmsg(_PACKET_BYTES, _ONE_DESCRIPTOR)
                if not data:
                    return
                if passed:  # else there was no descriptor left, and the manager reads the end of file
                    self._open(json.loads(data), int.from_bytes(passed[0][2], sys.byteorder))

    def _open(self, request: dict[str, Any], descriptor: int) -> None:
        # SocketType: the bare C type, as the fewer objects are touched here, the fewer pages a fork has to copy
        link = socket.SocketType(socket.AF_UNIX, socket.SOCK_STREAM, 0, descriptor)
        try:
            kernel.set_pid_namespace(self.own_namespace)  # where the last unshare left us, there is no second one
            kernel.unshare(kernel.CLONE_NEWPID)
            process = os.fork()
        except OSError as error:
            _tell(link, {"fatal": f"a new process: {error.strerror}"})
            link.close()
            return
        if process == 0:
            _become_session(request, descriptor, self)
        self.links[process] = link
        self.processes[descriptor] = process
        self.epoll.register(descriptor, select.EPOLLRDHUP)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                process, status, usage = os.wait4(-1, os.WNOHANG)
                if process == 0:
                    return
                link = self.links.pop(process)
                if self.processes.pop(link.fileno(), None) is not None:
                    self.epoll.unregister(link.fileno())
                code = os.waitstatus_to_exitcode(status)
                _tell(link, {"exit": code, "cpu": round(usage.ru_utime + usage.ru_stime, 3)})
                link.close()


def _tell(link: socket.SocketType, head: dict[str, Any]) -> None:
    """Write a frame if there is anybody left to read it; never wait."""
    with contextlib.suppress(OSError):
        link.send(wire.encode(head), socket.MSG_DONTWAIT)


def _become_session(request: dict[str, Any], link: int, zygote: Zygote) -> NoReturn:
    """The rest of a session's life; never returns into the zygote's loop."""
    try:
        os.dup2(link, runner.CONTROL)
        kernel.close_from(runner.CONTROL + 1)
        signal.set_wakeup_fd(-1)
        _signal.signal(signal.SIGCHLD, _signal.SIG_DFL)
        jail.confine(request["limits"], zygote.filter)
        printed = os.open("/tmp", os.O_TMPFILE | os.O_RDWR | os.O_APPEND)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        os.close(printed)
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
        own_namespace = os.open("self/ns/pid", os.O_RDONLY, dir_fd=host_proc)
        os.close(host_proc)
        zygote = Zygote(control, manager, own_namespace, _prepare(config))
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
