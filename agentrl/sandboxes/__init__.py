"""Content found by name: the top-level ``sandboxes/`` folder in a checkout, shipped in the wheel."""

from agentrl._content import extend_path

__path__ = extend_path(list(__path__), "sandboxes")
