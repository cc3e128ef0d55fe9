"""Sandbox calls on the wire: what a client asks of a sandbox that runs elsewhere, and how it is answered.

The remote and the docker backend speak it. A call is one frame of ``wire`` each way, a JSON head and a raw body:

======= ============================== ============= ==========================================
op      head                           body          answer
======= ============================== ============= ==========================================
open    profile, seed, limits                        session, seed, rng
exec    session, deadline              UTF-8 source  status, state_kept, seconds; output, error
put     session, path                  content
get     session, path                                content in the body
fork    session, rng, branch                         session, seed, rng
close   session
cancel  call                                         the call is undone: stopped, or its session closed
leave                                                every session of the client is closed
ping                                                 idle_seconds
======= ============================== ============= ==========================================

Every request also has ``v``, the version; ``id``, the client's number of the call, from 1; and ``settled``: the client
has all answers below this number, or gave them up, and will not ask again. An answer carries the request's ``id``, and
``error`` where the call failed. A call that is asked twice is answered twice and run once (``dispatch``).

The server's half is ``dispatch.Dispatcher``, the client's half ``called.CalledSandbox`` over a ``Transport``; both ends
of a byte stream are in ``stream``, HTTP is in ``remote`` and ``serve``. Everything but these last two also runs in a
container that has only the standard library.
"""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from typing import Any, Protocol

from agentrl.errors import (
    AgentRLError,
    ConfigError,
    ForkRefused,
    IsolationUnavailable,
    SandboxError,
    SessionClosed,
    SessionFrozen,
    UnknownName,
    UserError,
)
from agentrl.sandbox import wire
from agentrl.sandbox.base import FILE_BYTES, OUTPUT_BYTES, ExecResult, ExecStatus, Limits, Session

VERSION = 1
"""Version of this protocol; both sides must have the same."""
MAX_BODY = FILE_BYTES
"""Longest body of a request or an answer, in bytes."""
MAX_RESULT = 16 * OUTPUT_BYTES
"""Longest output and error of a cell together: as UTF-8, a byte may take four, and there is the traceback."""
MAX_FRAME = wire.HEADER.size + wire.HEAD_BYTES + MAX_BODY
"""Longest request or answer in all, in bytes."""
MEDIA_TYPE = "application/x-agentrl-call"
"""Content type of a frame over HTTP."""
MESSAGE_CHARS = 8192
"""Longest message of an error that is passed on; the middle of a longer one is cut."""
REASONS = 32
"""Most reasons of one error that are passed on, each of at most ``REASON_CHARS``."""
REASON_CHARS = 200

Reply = tuple[dict[str, Any], bytes]
"""Head and body of an answer."""

ERRORS: tuple[type[AgentRLError], ...] = (
    *(UserError, ConfigError, UnknownName),
    *(SandboxError, SessionClosed, SessionFrozen),
    *(ForkRefused, IsolationUnavailable),
)
"""Errors that cross the wire as themselves, besides ``OSError``; a subclass crosses as its nearest listed parent."""

_LISTS: dict[type[AgentRLError], str] = {ForkRefused: "reasons", IsolationUnavailable: "missing"}
_NAMES = ("kind", "name", "nearest")  # attributes of UnknownName
_BY_NAME = {kind.__name__: kind for kind in ERRORS}


class Lost(SandboxError):
    """A call was not answered: whether it ran is unknown. For callers a ``SandboxError`` like any other."""


class Transport(Protocol):
    """Carries calls to a ``Dispatcher`` that may be far away."""

    async def call(self, head: dict[str, Any], body: bytes, seconds: float) -> Reply:
        """The answer to one request.

        Args:
            head: JSON object of the request; its ``id`` tells answers apart.
            body: at most ``MAX_BODY`` bytes.
            seconds: longest wait.

        Raises:
            Lost: no answer came, or something that is none.
            UserError: the other side does not let this client in.
        """
        ...

    async def close(self) -> None:
        """Give up the connection. Safe to call twice."""
        ...


def write_error(error: BaseException, *, files: bool = False) -> dict[str, Any] | None:
    """``error`` as the head of an answer; None for one that no caller was promised.

    Args:
        error: what the sandbox raised.
        files: whether the call was about a file, so that an ``OSError`` is the answer of the session's file system.
    """
    if isinstance(error, OSError):
        if not files or type(error.errno) is not int:
            return None
        name = None if error.filename is None else _cut(os.fsdecode(error.filename))
        return {"error": "OSError", "errno": error.errno, "message": _cut(str(error.strerror)), "filename": name}
    kind = next((kind for kind in type(error).__mro__ if kind in ERRORS), None)
    if kind is None:
        return None
    head: dict[str, Any] = {"error": kind.__name__, "message": _cut(str(error))}
    if kind is UnknownName:
        head |= {name: getattr(error, name) and _cut(getattr(error, name), REASON_CHARS) for name in _NAMES}
    if kind in _LISTS:
        reasons = list(getattr(error, _LISTS[kind]))
        more = [f"and {len(reasons) - REASONS} more"] if len(reasons) > REASONS else []
        head["reasons"] = [_cut(reason, REASON_CHARS) for reason in reasons[:REASONS]] + more
    return head


def read_error(head: dict[str, Any]) -> Exception:
    """The error that ``write_error`` wrote, of the same type and with the same message.

    Raises:
        ProtocolError: it wrote no such thing.
    """
    name, message = take(head, "error", str), take(head, "message", str)
    if name == "OSError":
        return OSError(take(head, "errno", int), message, take(head, "filename", str, type(None)))
    kind = _BY_NAME.get(name)
    if kind is None:
        raise wire.ProtocolError(f"an error {name[:80]!r}")
    error = kind.__new__(kind)
    error.args = (message,)
    if kind is UnknownName:
        for attribute in _NAMES:
            setattr(error, attribute, take(head, attribute, str, type(None)))
    if kind in _LISTS:
        reasons = take(head, "reasons", list)
        if not all(isinstance(reason, str) for reason in reasons):
            raise wire.ProtocolError("reasons that are not text")
        setattr(error, _LISTS[kind], tuple(reasons))
    return error


def write_result(result: ExecResult) -> Reply:
    """A cell's result as an answer: output and error share the body, as either may be too long for a head."""
    output = result.output.encode("utf-8", "backslashreplace")
    error = (result.error or "").encode("utf-8", "backslashreplace")
    head = {
        "status": result.status.value,
        "state_kept": result.state_kept,
        "seconds": result.seconds,
        "output_bytes": len(output),
        "has_error": result.error is not None,
    }
    return head, output + error


def read_result(head: dict[str, Any], body: bytes) -> ExecResult:
    """The result that ``write_result`` wrote.

    Raises:
        ProtocolError: it wrote no such thing.
    """
    size = take(head, "output_bytes", int)
    if len(body) > MAX_RESULT:
        raise wire.ProtocolError(f"a result of {len(body)} bytes; at most {MAX_RESULT} are allowed")
    if not 0 <= size <= len(body):
        raise wire.ProtocolError(f"an output of {size} bytes in a body of {len(body)}")
    try:
        status = ExecStatus(take(head, "status", str))
        output, error = body[:size].decode(), body[size:].decode()
    except ValueError as problem:  # UnicodeDecodeError is one
        raise wire.ProtocolError(f"a result with {problem}") from problem
    has_error, kept = take(head, "has_error", bool), take(head, "state_kept", bool)
    return ExecResult(status, output, error if has_error else None, kept, float(take(head, "seconds", int, float)))


def write_session(handle: str, session: Session) -> dict[str, Any]:
    """A new session as an answer."""
    return {"session": handle, "seed": session.seed, "rng": session.rng}


def read_session(head: dict[str, Any]) -> tuple[str, int, Any]:
    """Handle, seed and rng of a new session.

    Raises:
        ProtocolError: ``head`` describes none.
    """
    rng = take(head, "rng", str)
    if rng not in ("seeded", "inherit", "derive"):
        raise wire.ProtocolError(f"a session with rng {rng[:80]!r}")
    return take(head, "session", str), take(head, "seed", int), rng


def read_frame(data: bytes) -> Reply:
    """Head and body of one whole frame, as ``wire.encode`` made it.

    Raises:
        ProtocolError: it is not exactly one frame, or longer than allowed.
    """
    start = wire.HEADER.size
    if len(data) < start:
        raise wire.ProtocolError(f"{len(data)} bytes instead of a frame")
    head, body = wire.frame_length(data[:start], MAX_BODY)
    if len(data) != start + head + body:
        raise wire.ProtocolError(f"{len(data)} bytes instead of a frame of {start} + {head} + {body}")
    return wire.decode_head(data[start : start + head]), data[start + head :]


def write_limits(limits: Limits | None) -> dict[str, int] | None:
    """Limits as JSON."""
    return None if limits is None else asdict(limits)


def read_limits(value: Any) -> Limits | None:
    """The limits that ``write_limits`` wrote.

    Raises:
        ProtocolError: it wrote no such thing.
        ConfigError: a limit is out of its range.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or value.keys() - {field.name for field in fields(Limits)}:
        raise wire.ProtocolError(f"limits {str(value)[:200]}")
    return Limits(**value)


def take(head: dict[str, Any], key: str, *kinds: type) -> Any:
    """``head[key]``, or None where it is missing and None is allowed.

    Raises:
        ProtocolError: it is of none of these types (exactly: a bool is no int).
    """
    value = head.get(key)
    if type(value) not in kinds:
        raise wire.ProtocolError(f"{key} = {str(value)[:80]!r}; expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def _cut(value: object, size: int = MESSAGE_CHARS) -> str:
    text = str(value)
    if len(text) <= size:
        return text
    note = f" [... {len(text) - size} characters cut ...] "
    half = size // 2
    return text[:half] + note + text[-half:]
