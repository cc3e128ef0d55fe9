"""Isolated Python sessions for code that a model wrote."""

from agentrl.sandbox.base import ExecResult, ExecStatus, Limits, Sandbox, Session
from agentrl.sandbox.local import LocalSandbox

__all__ = ["ExecResult", "ExecStatus", "Limits", "LocalSandbox", "Sandbox", "Session"]
