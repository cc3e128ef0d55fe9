"""The interpreter of a session: runs cells like a notebook, catches what they print, interrupts them at a deadline.

It is the same interpreter that its program runs in, so the program can reach and break all of it. That only ever harms
its own session: the manager trusts nothing that comes out.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the bare functions: signal's own build enums with every call
import ast
import builtins
import contextlib
import io
import linecache
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import CodeType, FrameType, ModuleType
from typing import Any

from agentrl.sandbox import wire
from agentrl.sandbox.kernel import Alarm

SESSION_PID = 1
"""A session's first process is the init of its own PID namespace."""
_AGAIN_SECONDS = 0.02
_WARM_UP_ROUNDS = 20
_ERROR_CHARS = 16 * 1024
_OWN_FILES = ("<cell ", "/work/", "/tmp/")

Outcome = tuple[str, str | None]
"""Status and error text of a cell."""


class Output(io.BufferedIOBase):
    """Bytes printed by one cell, the first ``cap`` of them kept and the rest counted.

    A process that the program forked has no way back to this object: what it prints goes to descriptor 1, a scratch
    file that is read after the cell.
    """

    def __init__(self, cap: int) -> None:
        self.cap, self.kept, self.cut = cap, bytearray(), 0

    def writable(self) -> bool:
        """Always."""
        return True

    def close(self) -> None:
        """Never: a program that closes ``sys.stdout`` gets a new one with the next cell."""

    def write(self, data: Any) -> int:
        """Keep what fits."""
        size = len(data)
        if os.getpid() != SESSION_PID:
            return os.write(1, data)
        room = self.cap - len(self.kept)
        if size <= room:
            self.kept += data
        else:
            self.kept += data[:room]
            self.cut += size - room
        return size

    def take(self) -> tuple[bytes, int]:
        """What was kept and the number of bytes cut; starts again from nothing."""
        with contextlib.suppress(OSError):  # the program may have closed or replaced descriptor 1
            if size := os.fstat(1).st_size:
                raw = os.pread(1, self.cap - len(self.kept), 0)
                self.kept += raw
                self.cut += size - len(raw)
                os.ftruncate(1, 0)
        kept, cut = bytes(self.kept), self.cut
        self.kept, self.cut = bytearray(), 0
        return kept, cut


Load = Callable[[ModuleType], None]
"""``exec_module`` of a loader."""


class NumpyHook:
    """Makes numpy fit for a session when the program imports it: one thread, and its global generator seeded."""

    def __init__(self) -> None:
        self.seed = 0
        self._hooks: dict[str, Callable[[Load], Load]] = {"numpy": _with_one_thread, "numpy.random": self._seeding}

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Numpy's ordinary spec with a wrapped loader; None for every other module."""
        hook = self._hooks.pop(name, None)
        spec = PathFinder.find_spec(name, path, target) if hook else None
        if hook and spec and spec.loader:
            setattr(spec.loader, "exec_module", hook(spec.loader.exec_module))  # noqa: B010 -- a method, replaced
        return spec

    def _seeding(self, load: Load) -> Load:
        def wrapped(module: ModuleType) -> None:
            load(module)
            module.seed(self.seed % 2**32)

        return wrapped


def _with_one_thread(load: Load) -> Load:
    """OpenBLAS starts a thread per core of the machine, which the limit on processes may not allow."""

    def wrapped(module: ModuleType) -> None:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        try:
            load(module)
        finally:
            os.environ.pop("OPENBLAS_NUM_THREADS", None)

    return wrapped


class Interpreter:
    """The program's ``__main__`` module and what surrounds it."""

    def __init__(self, output_cap: int) -> None:
        self.output = Output(output_cap)
        self.armed = False
        self.due = 0.0
        self.interrupts = 0
        self.alarm = Alarm(signal.SIGINT, _AGAIN_SECONDS)
        self.numpy_hook = NumpyHook()
        self._open_stream()
        self._reset()

    def warm_up(self) -> None:
        """Run a few cells in the zygote, so that what they load and specialise need not happen in every session."""
        self.alarm.create()
        for source in (
            b"x = 6\nprint(x * 7)\nx",
            b"1 / 0",
            b"def f(n):\n    return [i / 2 for i in range(n)]\nf(3)",
            b"*",
        ):
            for _ in range(_WARM_UP_ROUNDS):
                status, error = self.run(source, 1.0)
                self.stream.flush()
                kept, cut = self.output.take()
                wire.encode({"id": 1, "status": status, "error": error, "cut": cut}, kept)
        self._reset()

    def _reset(self) -> None:
        self.cells = 0
        self.module = ModuleType("__main__")
        self.module.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = self.module
        linecache.clearcache()

    def adopt(self, seed: int) -> None:
        """Make this process, fresh from the zygote, the session with this ``seed``."""
        if "numpy.random" not in sys.modules:
            sys.meta_path.insert(0, self.numpy_hook)
        self.reseed(seed)
        self.alarm.create()

    def reseed(self, seed: int) -> None:
        """Let the module-level random numbers start from ``seed``."""
        self.numpy_hook.seed = seed
        random.seed(seed)
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(seed % 2**32)

    def run(self, source: bytes, deadline: float) -> Outcome:
        """Run one cell. ``SIGINT`` comes at the deadline and then again and again until the cell yields."""
        self.cells += 1
        if self.stream.closed:
            self._open_stream()
        if _signal.getsignal(signal.SIGINT) != self._interrupt:  # the last cell has taken it
            _signal.signal(signal.SIGINT, self._interrupt)
        self.interrupts = 0
        self.due = time.monotonic() + deadline
        try:
            try:
                self.armed = True
                self.alarm.start(deadline)
                self._evaluate(source.decode("utf-8", "surrogatepass"), f"<cell {self.cells}>")
                return "ok", None
            except BaseException as error:
                return self._describe(error, deadline)
            finally:
                self._disarm()
        except KeyboardInterrupt:  # it struck in the instructions around the cell
            self._disarm()
            return "timeout", "TimeoutError: interrupted at the deadline"

    def _open_stream(self) -> None:
        self.stream = io.TextIOWrapper(self.output, encoding="utf-8", errors="backslashreplace")  # type: ignore[type-var]
        sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = self.stream  # type: ignore[misc, assignment]

    def _evaluate(self, source: str, name: str) -> None:
        names = self.module.__dict__
        linecache.cache[name] = (len(source), None, [line + "\n" for line in source.splitlines()], name)
        expression = _one_expression(source, name)
        if expression is None:
            tree: ast.Module = compile(source, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True)  # type: ignore[assignment]
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            if tree.body:
                exec(compile(tree, name, "exec", dont_inherit=True), names)
            if last is None:
                return
            assert isinstance(last, ast.Expr)
            expression = compile(ast.Expression(last.value), name, "eval", dont_inherit=True)
        value = eval(expression, names)
        if value is not None:
            print(repr(value))

    def _interrupt(self, _number: int, frame: FrameType | None) -> None:
        if not self.armed:
            return
        self.interrupts += 1
        if self.interrupts > 1:
            _raise_on_next_line(frame)
        raise KeyboardInterrupt

    def _disarm(self) -> None:
        self.armed = False
        self.alarm.stop()
        if self.interrupts > 1:
            sys.settrace(None)

    def _describe(self, error: BaseException, deadline: float) -> Outcome:
        """Status and traceback of a failed cell. Runs the program's ``__str__``, so it is interruptible too."""
        status = "memory" if isinstance(error, MemoryError) else "error"
        if isinstance(error, KeyboardInterrupt) and time.monotonic() >= self.due:
            self._disarm()  # nothing but our own text is formatted from here on
            status = "timeout"
            note = f"the cell was interrupted after {deadline:g} s; variables and files are kept"
            error = TimeoutError(note).with_traceback(error.__traceback__)
        try:
            return status, _program_traceback(error)
        except KeyboardInterrupt:
            raise
        except BaseException as failure:
            return status, f"{type(error).__name__}: (its traceback cannot be shown: {type(failure).__name__})"


def _one_expression(source: str, name: str) -> CodeType | None:
    """The code of a cell that is one expression on one line, without the detour over a syntax tree; None for others."""
    if not source or "\n" in source or source[0].isspace():
        return None
    try:
        return compile(source, name, "eval", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the other road says what is wrong with it
        return None


def _raise_on_next_line(frame: FrameType | None) -> None:
    """Interrupt the program once more, at the line it goes to from here: into the handler that caught the last one."""

    def strike(_frame: FrameType, event: str, _argument: object) -> Any:
        if event == "line":
            raise KeyboardInterrupt
        return strike

    sys.settrace(lambda *_: None)  # tracing has to be on for the frames' own functions to be called
    while frame is not None:
        if _is_own(frame.f_code.co_filename):
            frame.f_trace = strike
        frame = frame.f_back


def _is_own(filename: str) -> bool:
    """Whether a frame of this file is the program's."""
    return filename.startswith(_OWN_FILES) and filename != __file__


def _program_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, without the frames of this file and of libraries."""
    summary = traceback.TracebackException(type(error), error, error.__traceback__, compact=True)
    todo: list[traceback.TracebackException | None] = [summary]
    while todo:
        part = todo.pop()
        if part is None:
            continue
        own = [
            frame for frame in part.stack or () if frame.filename.startswith(_OWN_FILES) and frame.filename != __file__
        ]
        part.stack = traceback.StackSummary.from_list(own) if own else None  # type: ignore[assignment]
        todo += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
    text = "".join(summary.format()).rstrip("\n")
    if len(text) <= _ERROR_CHARS:
        return text
    half = _ERROR_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters of traceback cut ...]\n{text[-half:]}"
