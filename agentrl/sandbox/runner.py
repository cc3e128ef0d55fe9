"""The inside of a session: takes requests from the control socket, runs cells, moves files.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Any, NoReturn

from agentrl.sandbox import cloning, wire
from agentrl.sandbox.interpreter import SESSION_PID, Interpreter

CONTROL = 3
"""The descriptor of the control socket."""
_CHUNK_BYTES = 64 * 1024


def _put(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(path, flags, 0o644), "wb", buffering=0) as file:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]


def _get(path: str, cap: int) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
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
        chunk = os.read(CONTROL, _CHUNK_BYTES)
        if not chunk:
            os._exit(0)
        data += chunk
        if len(data) >= start:
            head, body = wire.HEADER.unpack_from(data)
            size = start + head + body
    return wire.decode_head(data[start : start + head]), data[start + head :]


def send(head: dict[str, Any], body: bytes = b"") -> None:
    """Answer the manager."""
    rest = memoryview(wire.encode(head, body))
    while rest:
        rest = rest[os.write(CONTROL, rest) :]


def open_output() -> None:
    """Let descriptors 1 and 2 end in a file without a name."""
    printed = os.open("/tmp", os.O_TMPFILE | os.O_RDWR | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(printed)


def _fork(interpreter: Interpreter, request: dict[str, Any]) -> dict[str, Any]:
    """Fork this session; what to tell the manager, in the parent and in the child, each on its own socket."""
    try:
        if not cloning.fork(CONTROL):
            return {"id": request["id"], "forked": True}
        interpreter.alarm.create()  # timers are not inherited
        if request["rng"] == "derive":
            interpreter.reseed(request["seed"])
    except cloning.Stranded as error:
        if error.furnished:
            send({"reasons": [str(error)]})
        os._exit(1)
    except cloning.CannotFork as refusal:
        return {"id": request["id"], "reasons": refusal.args}
    except OSError as error:
        return {"id": request["id"], "errno": error.errno, "strerror": error.strerror}
    return {"ready": True}


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
            if os.getpid() != SESSION_PID:
                os._exit(0)  # a process that the program forked ends with the cell
            answer, reply["cut"] = interpreter.output.take()
        elif request["op"] == "fork":
            reply = _fork(interpreter, request)
        else:
            try:
                if request["op"] == "put":
                    _put(request["path"], body)
                else:
                    answer = _get(request["path"], request["cap"])
            except OSError as error:
                reply["errno"], reply["strerror"] = error.errno, error.strerror
        send(reply, answer)
