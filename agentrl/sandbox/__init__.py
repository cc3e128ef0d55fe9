"""Isolated Python sessions, for code that a model wrote, that fork exactly."""

from agentrl.sandbox.base import ExecResult, ExecStatus, Limits, Profile, Sandbox, Session
from agentrl.sandbox.local import LocalSandbox

__all__ = ["ExecResult", "ExecStatus", "Limits", "LocalSandbox", "Profile", "Sandbox", "Session"]
