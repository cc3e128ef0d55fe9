"""The inside of a session: takes requests from the control socket, runs cells, moves files.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Any, NoReturn

from agentrl.sandbox import wire
from agentrl.sandbox.interpreter import SESSION_PID, Interpreter

CONTROL = 3
"""The descriptor of the control socket."""


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
    """The next request; ends the process when the manager has gone."""
    head, body = wire.HEADER.unpack(_read(wire.HEADER.size))
    return wire.decode_head(_read(head)), _read(body)


def _read(size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = os.read(CONTROL, size - len(data))
        if not chunk:
            os._exit(0)
        data += chunk
    return data


def send(head: dict[str, Any], body: bytes = b"") -> None:
    """Answer the manager."""
    rest = memoryview(wire.encode(head, body))
    while rest:
        rest = rest[os.write(CONTROL, rest) :]


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
        else:
            try:
                if request["op"] == "put":
                    _put(request["path"], body)
                else:
                    answer = _get(request["path"], request["cap"])
            except OSError as error:
                reply["errno"], reply["strerror"] = error.errno, error.strerror
        send(reply, answer)
