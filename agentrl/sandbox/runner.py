"""The inside of a session: takes requests from the control socket, runs cells, moves files.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import contextlib
import errno
import posix  # and not os, whose functions the program may have replaced
import stat
from typing import Any, NoReturn

from agentrl.sandbox import cloning, wire
from agentrl.sandbox.interpreter import SESSION_PID, Interpreter

CONTROL = 3
"""The descriptor of the control socket."""
_CHUNK_BYTES = 64 * 1024


def _make_folders(path: str) -> None:
    parts = path.split("/")[1:-1]
    for depth in range(2, len(parts) + 1):  # the first one is a scratch folder and there
        with contextlib.suppress(FileExistsError):
            posix.mkdir("/" + "/".join(parts[:depth]))


def _put(path: str, data: bytes) -> None:
    _make_folders(path)
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC
    with open(posix.open(path, flags, 0o644), "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def _get(path: str, cap: int) -> bytes:
    with open(posix.open(path, posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK | posix.O_CLOEXEC), "rb") as file:
        status = posix.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if status.st_size > cap:
            raise OSError(errno.EFBIG, f"{status.st_size} bytes; at most {cap} can be fetched")
        return file.read(cap)


def _receive() -> tuple[dict[str, Any], bytes]:
    """The next request; ends the process when the manager has gone. There is never more than one under way."""
    start, data = wire.HEADER.size, b""
    size = start
    while len(data) < size:
        chunk = posix.read(CONTROL, _CHUNK_BYTES)
        if not chunk:
            posix._exit(0)
        data += chunk
        if len(data) >= start:
            head, body = wire.HEADER.unpack_from(data)
            size = start + head + body
    return wire.decode_head(data[start : start + head]), data[start + head :]


def send(head: dict[str, Any], body: bytes = b"") -> None:
    """Answer the manager."""
    data = wire.encode(head, body)
    sent = posix.write(CONTROL, data)
    while sent < len(data):
        sent += posix.write(CONTROL, memoryview(data)[sent:])


def open_output() -> None:
    """Let descriptors 1 and 2 end in a file without a name."""
    printed = posix.open("/tmp", posix.O_TMPFILE | posix.O_RDWR | posix.O_APPEND)
    posix.dup2(printed, 1)
    posix.dup2(printed, 2)
    posix.close(printed)


def _fork(interpreter: Interpreter, request: dict[str, Any]) -> dict[str, Any] | None:
    """Fork this session; what to answer where that failed. Of a success the manager hears from the zygote."""
    try:
        if cloning.fork(CONTROL):  # the child; its socket is its own, and the manager knows of it
            interpreter.alarm.create()  # timers are not inherited
            if request["rng"] == "derive":
                interpreter.reseed(request["seed"])
    except cloning.Stranded as error:
        posix._exit(error.code)
    except cloning.CannotFork as refusal:
        return {"id": request["id"], "reasons": refusal.args}
    except OSError as error:
        return {"id": request["id"], "errno": error.errno}
    return None


def serve(interpreter: Interpreter) -> NoReturn:
    """Answer requests until the manager closes the socket."""
    while True:
        request, body = _receive()
        reply: dict[str, Any] = {"id": request["id"]}
        answer = b""
        if request["op"] == "exec":
            reply["status"], reply["error"] = interpreter.run(body, request["deadline"])
            with contextlib.suppress(Exception):  # a stream that the program closed or replaced has nothing to flush
                interpreter.stream.flush()
            if posix.getpid() != SESSION_PID:
                posix._exit(0)  # a process that the program forked ends with the cell
            answer, reply["cut"] = interpreter.output.take()
        elif request["op"] == "fork":
            refusal = _fork(interpreter, request)
            if refusal is None:
                continue
            reply = refusal
        else:
            try:
                if request["op"] == "put":
                    _put(request["path"], body)
                else:
                    answer = _get(request["path"], request["cap"])
            except OSError as error:
                reply["errno"], reply["strerror"] = error.errno, error.strerror
        send(reply, answer)
