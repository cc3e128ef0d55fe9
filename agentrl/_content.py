"""Finds the content folders ``envs/``, ``tools/`` and ``sandboxes/``.

In a wheel they are inside the package. In a checkout they stand beside ``agentrl/``, and the package's
``__path__`` is extended to reach them, so that ``agentrl.envs.gazetteer`` is one module in both.
"""

from __future__ import annotations

from pathlib import Path


def extend_path(package_path: list[str], name: str) -> list[str]:
    """``package_path`` with the checkout's folder ``name`` appended where there is one."""
    beside = Path(__file__).resolve().parent.parent / name
    marker = Path(__file__).resolve().parent.parent / "pyproject.toml"
    return [*package_path, str(beside)] if marker.is_file() and beside.is_dir() else package_path


def content_names(package_path: list[str]) -> set[str]:
    """Names of the content modules and folders reachable through ``package_path``."""
    found: set[str] = set()
    for folder in map(Path, package_path):
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.name.startswith(("_", ".")):
                continue
            if entry.suffix == ".py" or (entry.is_dir() and (entry / "__init__.py").is_file()):
                found.add(entry.stem)
    return found
