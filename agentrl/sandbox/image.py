"""Container images: which files of this library one holds, and the label that says whether it is up to date."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

LABEL = "agentrl.content"
"""Label of an image: the fingerprint of what it was built from."""
ARGUMENTS = ("-I", "-B", "-X", "utf8", "-m", "agentrl.sandbox.inside")
"""What an image's Python is started with; the profile follows."""
_STARTED_INSIDE = ("agentrl.sandbox.inside", "agentrl.sandbox.zygote", "agentrl.sandbox.audit")
_PLACE = Path(__file__).resolve().parents[2]


@lru_cache(maxsize=1)
def library() -> dict[str, bytes]:
    """The part of this library that runs in a container, by path below a folder of Python's module path.

    It is what is started there and what that imports. The packages themselves are empty: what their ``__init__``
    imports is not there, and is not needed.
    """
    files = {"agentrl/__init__.py": b"", "agentrl/sandbox/__init__.py": b""}
    todo = list(_STARTED_INSIDE)
    while todo:
        name = f"{todo.pop().replace('.', '/')}.py"
        if name not in files and (_PLACE / name).is_file():
            files[name] = (_PLACE / name).read_bytes()
            todo += _imports(files[name])
    return dict(sorted(files.items()))


def fingerprint(packages: Sequence[str]) -> str:
    """What an image for these packages, built from this library, has as its ``LABEL``."""
    state = hashlib.sha256(" ".join(sorted(packages)).encode())
    for name, content in library().items():
        state.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return state.hexdigest()[:16]


def _imports(source: bytes) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
