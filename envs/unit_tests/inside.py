"""What runs inside a grading session, and the form in which values go in and come out.

A session gets the text of this file before anything of the policy's; outside, the same text is the module that turns
expected values into the same form. So it imports nothing but the standard library.

Plain data is JSON, with a tag for what JSON does not have:

==================  ==========================================================================================
Python              JSON
==================  ==========================================================================================
None, bool, str     itself
int                 itself; from 2**63 on ``{"$int": "0x..."}``
float               itself; ``{"$float": "inf"}``, ``"-inf"`` or ``"nan"``
list                itself
tuple               ``{"$tuple": [...]}``
set, frozenset      ``{"$set": [...]}``, ``{"$frozenset": [...]}``, in the order of the items' own JSON
dict                itself where all keys are strings without a leading ``$``, else ``{"$dict": [[key, value], ...]}``
==================  ==========================================================================================

An instance of a subclass counts as the plain value that it is (a ``Counter`` as a dict), read with the methods of the
base class: whatever it overrides is not asked. Everything else (generators, arrays, objects) is not plain.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

MARK = "agentrl-result "
"""Begins the line that carries the result out."""
MOST_CHARS = 60_000
"""Longest result, as JSON; more would not fit into a cell's output."""

_PLAIN_INT = 2**63


class NotPlain(TypeError):
    """A value that is no plain data."""


def to_json(value: Any) -> Any:
    """``value`` as above.

    Raises:
        NotPlain: it is, or holds, something else.
    """
    if value is None or value is True or value is False:
        return value
    for kind, convert in _WRITE.items():
        if isinstance(value, kind):
            return convert(value)
    raise NotPlain(f"a value of type {type(value).__name__}")


def from_json(data: Any) -> Any:
    """The inverse of ``to_json``.

    Raises:
        ValueError: an unknown tag.
        TypeError: a tag around something that it cannot be.
    """
    if isinstance(data, list):
        return [from_json(item) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        ((tag, inner),) = data.items()
        if tag in _READ:
            return _READ[tag](inner)
    if tags := [key for key in data if key.startswith("$")]:
        raise ValueError(f"unknown tag {tags[0]!r}; known: {', '.join(_READ)}")
    return {key: from_json(item) for key, item in data.items()}


def preload(modules: Iterable[str]) -> None:
    """Import those that are installed, so that importing them costs a submission none of its time."""
    for name in modules:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def run(function: str, arguments: str, source: str) -> None:
    """Define what ``source`` defines, call ``function``, and print its result after ``MARK``.

    What the program prints meanwhile goes nowhere: the output has room for the result only.

    Args:
        function: its name.
        arguments: the list of arguments, as JSON text.
        source: the submission.
    """
    stream = sys.stdout
    sys.stdout = sys.stderr = _Nowhere()
    module = sys.modules["solution"] = types.ModuleType("solution")
    try:
        exec(compile(source, "<solution>", "exec", dont_inherit=True), module.__dict__)
        if not callable(module.__dict__.get(function)):
            raise NameError(f"the submission defines no function {function!r}")
        value = module.__dict__[function](*from_json(json.loads(arguments)))
        reply = _reply(value)
    finally:
        sys.stdout = sys.stderr = stream
    print(MARK + reply)


def _reply(value: Any) -> str:
    try:
        reply = json.dumps({"value": to_json(value)})
    except NotPlain as problem:
        reply = json.dumps({"strange": str(problem)})
    if len(reply) > MOST_CHARS:
        return json.dumps({"strange": f"a value of {len(reply)} characters; at most {MOST_CHARS} are read"})
    return reply


class _Nowhere:
    """A text stream that keeps nothing."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _int(value: int) -> Any:
    plain = int.__index__(value)
    return plain if abs(plain) < _PLAIN_INT else {"$int": hex(plain)}


def _float(value: float) -> Any:
    plain = float.__float__(value)
    return plain if plain - plain == 0 else {"$float": repr(plain)}


def _dict(value: dict[Any, Any]) -> Any:
    items = [[to_json(key), to_json(item)] for key, item in dict.items(value)]
    if all(type(key) is str and not key.startswith("$") for key, _ in items):
        return dict(items)
    return {"$dict": sorted(items, key=lambda pair: json.dumps(pair[0]))}


def _sorted(items: Any) -> list[Any]:
    return sorted(map(to_json, items), key=json.dumps)


_WRITE: dict[type, Callable[[Any], Any]] = {
    int: _int,
    float: _float,
    str: str.__str__,
    list: lambda value: [to_json(item) for item in list.__iter__(value)],
    tuple: lambda value: {"$tuple": [to_json(item) for item in tuple.__iter__(value)]},
    set: lambda value: {"$set": _sorted(set.__iter__(value))},
    frozenset: lambda value: {"$frozenset": _sorted(frozenset.__iter__(value))},
    dict: _dict,
}

_READ: dict[str, Callable[[Any], Any]] = {
    "$int": lambda text: int(text, 16),
    "$float": float,
    "$tuple": lambda items: tuple(map(from_json, items)),
    "$set": lambda items: set(map(from_json, items)),
    "$frozenset": lambda items: frozenset(map(from_json, items)),
    "$dict": lambda pairs: {from_json(key): from_json(item) for key, item in pairs},
}
