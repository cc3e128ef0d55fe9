"""Process 0 leads, the others follow: the training loop runs once and its learner everywhere.

Process 0 plays episodes, writes the run folder and talks to the user. Whatever concerns the learner it does through a
``Leader``, which tells the other processes what to run before it runs it too. They sit in ``follow`` and know nothing
of environments, samplers or files. Waiting for the next command has no deadline, since rollouts take as long as they
take; a collective call within a command has (``distributed.DEADLINE``).

An error in any process ends the run in all of them: it is published under a name in the store that torchrun keeps,
where it is seen even by processes that wait in a collective call, and the leader raises it. A follower then ends
quietly, so that the one who reports is the leader.
"""

from __future__ import annotations

import base64
import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from agentrl.errors import AgentRLError, TrainingError
from agentrl.learner import distributed
from agentrl.learner.checkpoint import load_state, save_checkpoint
from agentrl.learner.lora import save_adapter
from agentrl.learner.step import Learner, Metrics
from agentrl.types import RolloutTree

P = ParamSpec("P")
T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_STOP = "stop"
_FAILURE, _STOPPED = "failure", "stopped"
_LOOK = 0.2  # seconds between two looks at the store while a command runs
_PATIENCE = 30.0  # seconds that the leader waits at the end for a job that it had left behind


class Leader:
    """The learner as the training loop has it: what it is told, all processes do. In a world of one it does it alone.

    Use it as a context manager: the others are let go at its end, and told why if that is an exception.

    Args:
        learner: this process's; the others give theirs to ``follow``.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self._commands = 0
        self._last: Future[Any] | None = None
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] | None = None

    def step(self, trees: Sequence[RolloutTree]) -> Metrics:
        """See ``Learner.step``."""
        return self.run(Learner.step, trees)

    def weights(self) -> dict[str, Tensor]:
        """See ``Learner.weights``."""
        return self.run(Learner.weights)

    def save_adapter(self, folder: Path) -> None:
        """See ``lora.save_adapter``."""
        self.run(_save_adapter, folder)

    def save(self, folder: Path, tokenizer: Any, state: dict[str, Any]) -> None:
        """See ``save_checkpoint``."""
        self.run(_save, folder, tokenizer, state)

    def load(self, folder: Path) -> dict[str, Any]:
        """See ``load_state``."""
        return self.run(_load, folder)

    def run(self, function: Callable[Concatenate[Learner, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """``function(learner, ...)`` in every process, with the arguments of this one; returns this one's result.

        Args:
            function: found by name in the other processes: of a module, or of the learner's class.
            *args: can be pickled.
            **kwargs: likewise.

        Raises:
            TrainingError: it failed in another process, or another process is gone.
            Exception: what ``function`` raises; an ``AgentRLError`` of another process is raised as it is, with the
                number of the process in its message.
        """
        if distributed.world_size() == 1:
            return function(self.learner, *args, **kwargs)
        if (failure := _published()) is not None:
            raise failure
        distributed.store().set(f"command/{self._commands}", _text(function))
        self._commands += 1
        done: Future[T] = Future()
        self._last = done
        self._queue().put((done, lambda: _obey(self.learner, function, (args, kwargs))))
        while not wait([done], timeout=_LOOK).done:
            if (failure := _published()) is not None:
                raise failure  # without waiting for the job, which may never hear of a process that is gone
        error = done.exception()
        if error is None:
            return done.result()
        first = _publish(error)
        if first is error and _lost(error):
            raise TrainingError(
                "another process of this run has ended or does not answer, and did not say why: look at the end of its "
                "output, and resume the run from its last checkpoint."
            ) from error
        if first is error or isinstance(error, AgentRLError):
            raise error
        raise first from error

    def close(self, error: BaseException | None = None) -> None:
        """Let the other processes go; safe to call twice."""
        if distributed.world_size() == 1:
            return
        if error is not None:
            _publish(error)
        distributed.store().set(f"command/{self._commands}", _STOP)
        distributed.store().set(_STOPPED, "")
        if self._last is not None:
            # A job that was left behind in a collective call ends when its peers go. Python must not end before it: a
            # thread that comes back from C++ into an interpreter that is being closed aborts the process.
            wait([self._last], timeout=_PATIENCE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def _queue(self) -> SimpleQueue[tuple[Future[Any], Callable[[], Any]]]:
        """The jobs of one thread that lives as long as the process, and does not keep it from ending."""
        if self._jobs is None:
            self._jobs = SimpleQueue()
            device = torch.cuda.current_device() if torch.cuda.is_available() else None
            threading.Thread(target=_work, args=(self._jobs, device), name="agentrl-learner", daemon=True).start()
        return self._jobs


def follow(learner: Learner) -> None:
    """Run what the leader says until it is done or the run has failed somewhere; then process 0 reports, not this one.

    Args:
        learner: made as process 0 made its own.

    Raises:
        RuntimeError: process 0, or the store that torchrun keeps, cannot be reached any more.
    """
    number = 0
    while (function := _next(number)) is not None:
        number += 1
        try:
            _obey(learner, function, None)
        except Exception as error:
            if _publish(error) is error and not isinstance(error, AgentRLError):  # whose message says it all
                _LOG.exception("process %d failed", distributed.rank())
            with suppress(dist.DistStoreError):  # while this process lives, torchrun lets process 0 say what happened
                distributed.store().wait([_STOPPED], timedelta(seconds=distributed.DEADLINE))
            return


def _save(learner: Learner, folder: Path, tokenizer: Any, state: dict[str, Any]) -> None:
    save_checkpoint(folder, learner, tokenizer, state)


def _save_adapter(learner: Learner, folder: Path) -> None:
    save_adapter(learner.model, folder)


def _load(learner: Learner, folder: Path) -> dict[str, Any]:
    return load_state(folder, learner)


def _obey(learner: Learner, function: Callable[..., T], arguments: Any) -> T:
    """One command; over only when every process has done it."""
    args, kwargs = distributed.broadcast(arguments)
    result = function(learner, *args, **kwargs)
    distributed.barrier()
    return result


def _next(number: int) -> Callable[..., Any] | None:
    """The leader's next command; None at the end."""
    name = f"command/{number}"
    while _published() is None:
        with suppress(dist.DistStoreError):  # nothing yet; short waits, so that an interrupt is heard
            distributed.store().wait([name], timedelta(seconds=1))
            command = distributed.store().get(name)
            return None if command.decode() == _STOP else _value(command)
    return None


def _work(jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]]], device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # a new thread begins on the first GPU
    while True:
        done, job = jobs.get()
        try:
            done.set_result(job())
        except BaseException as error:
            done.set_exception(error)
        del done, job  # else the last result lives until the next command


def _publish(error: BaseException) -> BaseException:
    """Tell all processes, unless another error is already known; returns the one that came first."""
    own = _text((distributed.rank(), _portable(error)))
    first = distributed.store().compare_set(_FAILURE, "", own)
    return error if first.decode() == own else _read(first)


def _lost(error: BaseException) -> bool:
    """Whether a collective call failed because a process it waited for was gone; gloo has no type for that."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _published() -> BaseException | None:
    """The error that ended the run, if one has."""
    return _read(distributed.store().get(_FAILURE)) if distributed.store().check([_FAILURE]) else None


def _read(published: bytes) -> BaseException:
    rank, error = _value(published)
    found: BaseException = error
    if rank != distributed.rank():
        found.args = (f"process {rank}: {error}",)
    return found


def _portable(error: BaseException) -> BaseException:
    """``error`` where another process can make it again; else its words."""
    with suppress(Exception):
        if isinstance(error, AgentRLError):
            pickle.loads(pickle.dumps(error))
            return error
    return TrainingError(f"{type(error).__name__}: {error}")


def _text(value: Any) -> str:
    return base64.b64encode(pickle.dumps(value)).decode()


def _value(text: bytes) -> Any:
    return pickle.loads(base64.b64decode(text))
