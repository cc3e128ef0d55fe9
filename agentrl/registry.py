"""Environments and tools by name: content folders, then entry points of installed packages, then the working directory.

A content module or an entry point (groups ``agentrl.envs`` and ``agentrl.tools``) names one class or function: the
module's public attribute ``ENV`` or ``TOOL``, or the object that the entry point loads. ``module.py:Class`` or
``package.module:Class`` reaches code that is not registered.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from agentrl._content import content_names
from agentrl.errors import UnknownName, UserError

Kind = Literal["envs", "tools"]
_ATTRIBUTE: dict[Kind, str] = {"envs": "ENV", "tools": "TOOL"}


def names(kind: Kind) -> list[str]:
    """All names that ``load`` knows, sorted."""
    package = importlib.import_module(f"agentrl.{kind}")
    points = {point.name for point in entry_points(group=f"agentrl.{kind}")}
    return sorted(content_names(list(package.__path__)) | points)


@lru_cache(maxsize=256)
def load(kind: Kind, name: str) -> Callable[..., Any]:
    """The environment class or tool behind ``name``.

    Raises:
        UnknownName: with the nearest valid name.
        UserError: where the module exists but does not publish what it should.
    """
    if ":" in name:
        return _load_path(name)
    package = importlib.import_module(f"agentrl.{kind}")
    if name in content_names(list(package.__path__)):
        module = importlib.import_module(f"agentrl.{kind}.{name}")
        found = getattr(module, _ATTRIBUTE[kind], None)
        if found is None:
            raise UserError(f"{module.__file__} defines no {_ATTRIBUTE[kind]}: add `{_ATTRIBUTE[kind]} = YourClass`.")
        return found  # type: ignore[no-any-return]
    for point in entry_points(group=f"agentrl.{kind}", name=name):
        return point.load()  # type: ignore[no-any-return]
    for path in (Path(name, "__init__.py"), Path(f"{name}.py")):
        if path.is_file():
            return _load_path(f"{path}:{_ATTRIBUTE[kind]}")
    raise UnknownName("environment" if kind == "envs" else "tool", name, names(kind))


def make(name: str, **options: Any) -> Any:
    """A new environment: ``make("gazetteer", hops=2)``.

    Raises:
        UnknownName: no such environment.
        UserError: the environment does not take these options.
    """
    factory = load("envs", name)
    try:
        return factory(**options)
    except TypeError as error:
        raise UserError(f"environment {name!r} does not take {options or 'no options'}: {error}") from error


def _load_path(spec: str) -> Callable[..., Any]:
    """``path/to/file.py:Class`` or ``package.module:Class``."""
    where, _, attribute = spec.rpartition(":")
    if where.endswith(".py"):
        path = Path(where).resolve()
        if not path.is_file():
            raise UserError(f"{where}: no such file (asked for as {spec!r}).")
        package = path.stem == "__init__"
        name = "agentrl_user_" + (path.parent.name if package else path.stem)
        inside = [str(path.parent)] if package else None  # so that the folder's modules can be imported relatively
        module_spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inside)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module
        module_spec.loader.exec_module(module)
    else:
        if not where or where.startswith("."):
            raise UserError(f"cannot import {where!r} (asked for as {spec!r}): expected file.py:Class or module:Class.")
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise UserError(f"cannot import {where!r} (asked for as {spec!r}): {error}") from error
    if not hasattr(module, attribute):
        raise UnknownName(f"name in {where}", attribute, [n for n in vars(module) if not n.startswith("_")])
    return getattr(module, attribute)  # type: ignore[no-any-return]
