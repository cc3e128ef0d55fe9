"""Problems as rows of a file, checked, and the prompt that a problem becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentrl.data import load_tasks
from agentrl.errors import TaskError
from agentrl.types import Message, Task

from .grader import ARGUMENTS_CHARS, Case
from .inside import MOST_CHARS, from_json, to_json

CLOSING = "Answer with the code of the function."
_FORM = "[arguments, expected], with a list of arguments"


def read_problems(path: str | Path) -> list[Task]:
    """The problems of a file, in its order.

    A row has ``prompt`` (text or messages), ``function`` (its name), ``tests`` (``[[arguments, expected], ...]``,
    values as ``inside`` writes them: plain JSON but for tuples, sets and the like), and may have ``examples`` (the
    same, shown to the policy), ``solution`` (source, for the expert) and ``id``.

    Raises:
        TaskError: no such file, or a row of another form; says which, what was expected and what came.
    """
    tasks = []
    for number, task in enumerate(load_tasks(path), 1):
        where = f"{path}: problem {number}"
        identifier = task.metadata.get("id", "")
        if not isinstance(identifier, str):
            raise TaskError(f"{where}: expected 'id' to be text, got {_short(identifier)}.")
        if task.prompt[-1].role != "user":
            raise TaskError(f"{where}: expected the last message to be a user's, got {task.prompt[-1].role!r}.")
        tasks.append(make_task(where, task.prompt, task.metadata, identifier))
    return tasks


def make_task(where: str, prompt: str | Sequence[Message], row: Mapping[str, Any], identifier: str = "") -> Task:
    """A task whose prompt shows the examples, and whose metadata keeps the tests.

    Args:
        where: for messages.
        prompt: what to write; the last message is a user's.
        row: ``function``, ``tests``, ``examples``, ``solution`` and whatever else, as ``read_problems`` says.
        identifier: the task's id; default a hash.

    Raises:
        TaskError: a column is missing or has another form.
    """
    function, solution = row.get("function"), row.get("solution")
    if not (isinstance(function, str) and function.isidentifier()):
        raise TaskError(f"{where}: expected 'function' to be the name of a function, got {_short(function)}.")
    if not isinstance(solution, str | None):
        raise TaskError(f"{where}: expected 'solution' to be source code, got {_short(solution)}.")
    examples = _pairs(where, "examples", row.get("examples") or [])
    tests = _pairs(where, "tests", row.get("tests"))
    if not tests:
        raise TaskError(f"{where}: expected at least one pair in 'tests', got none.")
    shown = {json.dumps(arguments) for arguments, _ in examples}
    if leaked := [arguments for arguments, _ in tests if json.dumps(arguments) in shown]:
        raise TaskError(
            f"{where}: expected tests on other arguments than the examples, which the policy reads, got "
            f"{_short(leaked[0])} in both."
        )
    metadata = {**row, "examples": examples, "tests": tests}
    return Task(_with_examples(prompt, function, examples), id=identifier, metadata=metadata)


def cases(task: Task) -> list[Case]:
    """The hidden tests of a task.

    Raises:
        TaskError: it has none; it was not made by ``make_task``.
    """
    tests = task.metadata.get("tests")
    if not tests:
        raise TaskError(f"task {task.id} has no tests: expected a task of this environment's own, or of its file.")
    return [Case(json.dumps(arguments), expected) for arguments, expected in tests]


def first_call(task: Task) -> str:
    """The function called as in the first example; empty where there is none."""
    examples = task.metadata.get("examples")
    return _call(task.metadata["function"], examples[0][0]) if examples else ""


def _with_examples(prompt: str | Sequence[Message], function: str, examples: list[list[Any]]) -> str | list[Message]:
    lines = [f"{_call(function, arguments)} == {from_json(expected)!r}" for arguments, expected in examples]
    if isinstance(prompt, str):
        return "\n".join([prompt, *lines, CLOSING])
    *before, last = prompt
    called = f"The function is called {function}."
    return [*before, Message("user", "\n".join([last.content, called, *lines, CLOSING]))]


def _call(function: str, arguments: list[Any]) -> str:
    return f"{function}({', '.join(repr(from_json(argument)) for argument in arguments)})"


def _pairs(where: str, column: str, found: Any) -> list[list[Any]]:
    """``found`` as pairs in the one form that ``inside`` writes, whatever form they were given in."""
    if not isinstance(found, list):
        raise TaskError(f"{where}: expected {column!r} to be a list of {_FORM}, got {_short(found)}.")
    return [_pair(f"{where}, {column}[{place}]", pair) for place, pair in enumerate(found)]


def _pair(where: str, pair: Any) -> list[Any]:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], list)):
        raise TaskError(f"{where}: expected {_FORM}, got {_short(pair)}.")
    try:
        arguments, expected = (to_json(from_json(value)) for value in pair)
        sizes = len(json.dumps(arguments)), len(json.dumps({"value": expected}))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TaskError(
            f"{where}: expected values that can be written as JSON, got {_short(pair)}: {error}."
        ) from error
    for size, most, what in zip(sizes, (ARGUMENTS_CHARS, MOST_CHARS), ("arguments", "expected value"), strict=True):
        if size > most:
            raise TaskError(f"{where}: expected {what} of at most {most} characters as JSON, got {size}.")
    return [arguments, expected]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
