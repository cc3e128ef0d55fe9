"""Every exception that agentrl raises on purpose.

::

    AgentRLError
    ├── UserError                   something you wrote has to change; the message says what
    │   ├── ConfigError             a configuration key or value
    │   ├── UnknownName             an environment, tool, algorithm or key that does not exist
    │   ├── TaskError               a task, a data file or an empty data set
    │   ├── TemplateError           a chat template that rewrites history or cannot take tools
    │   ├── ToolSchemaError         a function that cannot be turned into a tool
    │   └── RunFolderError          a run folder in use, incomplete or of another run
    ├── EnvError                    one episode failed; the run goes on and counts it
    │   ├── RewardError             the reward raised, or was None, NaN or infinite
    │   ├── ToolInfrastructureError a tool's backend failed (never the policy's fault)
    │   │   └── SandboxError        the sandbox itself failed or was lost
    │   │       ├── SessionClosed   a session was used after its close or its program's end
    │   │       └── SessionFrozen   a session was used after it had been forked
    │   ├── DeadlineExceeded        an episode or a tool ran out of time; names what was stuck
    │   └── NotRecorded             a replay came to where its record has nothing to say
    ├── ForkRefused                 the environment's state cannot be forked; lists why
    ├── IsolationUnavailable        this machine cannot isolate a sandbox; lists what is missing
    ├── SamplerError                the sampling engine failed or was closed
    └── TrainingError               the run has to stop
        ├── NonFiniteError          a loss, gradient or log-prob is not finite; the sample is saved
        ├── PolicyMismatch          sampler and learner disagree about log-probs
        ├── TrainingCollapsed       the policy no longer explores, or nothing is left to learn from
        └── TooManyFailures         more episodes failed than ``rollout.max_failures`` allows

``UserError`` is caught by the command line and printed without a traceback (exit status 2); a ``TrainingError``
likewise (exit status 3). ``EnvError`` never leaves the rollout engine: it becomes the outcome of one leaf.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class AgentRLError(Exception):
    """Root of the tree."""


class UserError(AgentRLError):
    """Something the user wrote has to change."""


class ConfigError(UserError):
    """A configuration key or value is wrong."""


class UnknownName(UserError):
    """A name was looked up and is not there; the nearest valid name is suggested."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names) or 'none'}."
        super().__init__(f"unknown {kind} {name!r}: {hint}")
        self.kind, self.name, self.nearest = kind, name, near[0] if near else None


class TaskError(UserError):
    """A task or a data source is unusable."""


class TemplateError(UserError):
    """A chat template breaks token-in, token-out."""


class ToolSchemaError(UserError):
    """A function cannot be described as a tool."""


class RunFolderError(UserError):
    """A run folder is in use, incomplete or belongs to another run."""


class EnvError(AgentRLError):
    """One episode failed for a reason that is not the policy's."""


class RewardError(EnvError):
    """The reward raised or was not a finite number."""


class ToolInfrastructureError(EnvError):
    """A tool's backend failed."""


class SandboxError(ToolInfrastructureError):
    """The sandbox failed or was lost; the program inside is not to blame."""


class SessionClosed(SandboxError):
    """A session was used after it had been closed, or forked after its program had ended it."""


class SessionFrozen(SandboxError):
    """A session was used after it had been forked: tree nodes are immutable, so fork it again and use the fork."""


class DeadlineExceeded(EnvError):
    """A deadline passed; the message names what was stuck."""


class NotRecorded(EnvError):
    """A replay asked for a completion or a tool result that its record does not have."""


class ForkRefused(AgentRLError):
    """State that cannot be forked.

    Attributes:
        reasons: each thing that stands in the way; empty where the message says it all.
    """

    def __init__(self, message: str, reasons: Iterable[str] = ()) -> None:
        self.reasons = tuple(reasons)
        super().__init__(message)


_ADVICE = (
    "Expected Linux with user, mount, PID and network namespaces, no_new_privs, rlimits and seccomp. Enable "
    "unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1, user.max_user_namespaces>0) or run on a "
    "machine that has them;"
)


class IsolationUnavailable(AgentRLError):
    """This machine cannot isolate a sandbox.

    Args:
        missing: what was probed and failed.
        advice: what to do about it.

    Attributes:
        missing: what was probed and failed.
    """

    def __init__(self, missing: Iterable[str], advice: str = _ADVICE) -> None:
        self.missing = tuple(missing)
        super().__init__(
            f"cannot isolate a Python session: missing {', '.join(self.missing)}. {advice} "
            "agentrl never runs model-written code without isolation."
        )


class SamplerError(AgentRLError):
    """The sampling engine failed or is closed."""


class TrainingError(AgentRLError):
    """The run has to stop.

    Attributes:
        sample: the offending samples, ready for JSON; the training loop saves them in the run folder.
    """

    sample: list[Any] | None = None


class NonFiniteError(TrainingError):
    """A loss, a gradient or a log-prob is not finite."""


class PolicyMismatch(TrainingError):
    """Sampler and learner disagree about the log-probs of the same tokens.

    Attributes:
        group: what the probe of a hand-over found to be wrong: a group of parameters, as ``layers.1.mlp``, or one of
            ``agentrl.handover.CAUSES``; empty where nobody looked for it.
    """

    group: str = ""


class TrainingCollapsed(TrainingError):
    """The policy no longer explores, or its rewards no longer differ, and that has lasted.

    Attributes:
        reason: "entropy" or "reward variance".
        value: the last one measured.
        bound: what it should not stay below.
        steps: for how many steps in a row it has.
    """

    def __init__(self, message: str, *, reason: str, value: float, bound: float, steps: int) -> None:
        super().__init__(message)
        self.reason, self.value, self.bound, self.steps = reason, value, bound, steps


class TooManyFailures(TrainingError):
    """More episodes failed than allowed."""
