"""What a run ran on, for ``versions.json``."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

_LIBRARIES = ("agentrl", "torch", "transformers", "tokenizers", "gymnasium", "numpy", "vllm")


def collect_versions(environment: str | None = None) -> dict[str, str | None]:
    """Versions by name; None for what is not installed.

    ``environment`` is the version of the distribution that publishes the environment of that name, None for one of
    the library's own or of a file. ``git_commit`` is the checkout's, with ``+dirty`` where files differ from it.
    """
    found: dict[str, str | None] = {"python": platform.python_version(), "platform": platform.platform()}
    found.update({name: _version(name) for name in _LIBRARIES})
    if environment is not None:
        found["environment"] = _environment_version(environment)
    found["git_commit"] = _git_commit(Path(__file__).resolve().parent.parent)
    return found


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _environment_version(name: str) -> str | None:
    for point in entry_points(group="agentrl.envs", name=name):
        if point.dist is not None:
            return f"{point.dist.name} {point.dist.version}"
    return None


def _git_commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    dirty = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+dirty" if commit and dirty else commit


def _git(checkout: Path, *arguments: str) -> str | None:
    """Output of a read-only git command; None where git is missing, slow or refuses."""
    command = ["git", "--no-optional-locks", "-C", str(checkout), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
