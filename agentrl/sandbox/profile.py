"""Profiles by name: ``sandboxes/NAME/profile.toml`` in a checkout or in the wheel.

::

    packages = ["numpy"]                # import names, besides the standard library
    preload = ["math", "random"]        # optional: modules loaded ahead
    image = "agentrl-sandbox-python"    # optional: container image of the docker backend

    [limits]                            # optional: keys of ``agentrl.sandbox.Limits``
    memory_bytes = 536870912
"""

from __future__ import annotations

import importlib
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentrl.errors import ConfigError, UnknownName
from agentrl.sandbox.base import PRELOAD, Limits, Profile

DEFAULT = "python"
_LISTS = ("packages", "preload")


def names() -> list[str]:
    """All names that ``load`` knows, sorted."""
    return sorted(_folders())


def folder(name: str) -> Path:
    """The folder of the profile ``name``, with its ``profile.toml`` and whatever builds its image.

    Raises:
        UnknownName: with the nearest valid name.
    """
    folders = _folders()
    if name not in folders:
        raise UnknownName("sandbox profile", name, folders)
    return folders[name]


@lru_cache(maxsize=64)
def load(name: str) -> Profile:
    """The profile ``name``.

    Raises:
        UnknownName: no such profile, or an unknown key in its file.
        ConfigError: its file is not valid.
    """
    file = folder(name) / "profile.toml"
    try:
        content = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{file} cannot be read as TOML: {error}.") from error
    _check_keys(content, {*_LISTS, "image", "limits"}, file)
    for key in _LISTS:
        value = content.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{file}: {key} must be a list of names, got {value!r}.")
    limits, image = content.get("limits", {}), content.get("image")
    if not isinstance(limits, dict) or not isinstance(image, str | None):
        raise ConfigError(f"{file}: limits must be a table and image a name, got {limits!r} and {image!r}.")
    _check_keys(limits, Limits.__dataclass_fields__.keys(), file)
    packages, preload = tuple(content.get("packages", ())), tuple(content.get("preload", PRELOAD))
    return Profile(name, packages, preload, Limits(**limits), image)


def resolve(profile: str | Profile | None, default: str | Profile) -> Profile:
    """The profile meant by an argument of ``Sandbox.open``.

    Raises:
        UnknownName: no such profile.
        ConfigError: its file is not valid.
    """
    chosen = default if profile is None else profile
    return chosen if isinstance(chosen, Profile) else load(chosen)


def _folders() -> dict[str, Path]:
    package = importlib.import_module("agentrl.sandboxes")
    return {
        entry.parent.name: entry.parent for place in package.__path__ for entry in Path(place).glob("*/profile.toml")
    }


def _check_keys(content: dict[str, Any], known: Any, file: Path) -> None:
    for key in content:
        if key not in known:
            raise UnknownName(f"key in {file}", key, known)
