"""agentrl: async environments and a tool-use trainer for language models.

What most programs need is here; everything else is in the module that its name says.
"""

from agentrl.env import Env, ToolEnv, require_answer
from agentrl.errors import AgentRLError
from agentrl.registry import make
from agentrl.tool import Tool, tool
from agentrl.types import (
    Completion,
    Episode,
    ForkLevel,
    Message,
    Node,
    Outcome,
    RolloutTree,
    SamplingParams,
    StepResult,
    StopReason,
    Task,
    ToolCall,
    ToolResult,
)

__version__ = "0.1.0"

__all__ = [
    "AgentRLError",
    "Completion",
    "Env",
    "Episode",
    "ForkLevel",
    "Message",
    "Node",
    "Outcome",
    "RolloutTree",
    "SamplingParams",
    "StepResult",
    "StopReason",
    "Task",
    "Tool",
    "ToolCall",
    "ToolEnv",
    "ToolResult",
    "make",
    "require_answer",
    "tool",
]
