"""Tasks from files and data sets, and splits that are disjoint by construction.

::

    load_tasks("questions.jsonl")                                        # {"prompt": ..., "answer": ...} per line
    load_tasks("train.parquet", prompt="question")                       # needs pyarrow
    load_tasks("hf:openai/gsm8k/main", split="train", prompt="question") # needs the `datasets` extra

The prompt's column holds a string or a list of ``{"role", "content"}`` messages; the answer's column may be absent;
every other column becomes the task's metadata.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from agentrl.errors import TaskError
from agentrl.types import Message, Role, Task

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, for messages, and its columns."""


def load_tasks(
    source: str | Path,
    *,
    split: str = "train",
    prompt: str = "prompt",
    answer: str = "answer",
    limit: int | None = None,
) -> list[Task]:
    """Tasks from a JSONL file, a Parquet file or a Hugging Face data set, in the source's order.

    Args:
        source: a path ending in ``.jsonl`` or ``.parquet``, or ``hf:NAME`` or ``hf:OWNER/NAME[/CONFIG]``.
        split: which split of a Hugging Face data set; of files, one named ``NAME.SPLIT.jsonl`` is up to you.
        prompt: the column with the problem, a string or a list of messages.
        answer: the column with the reference answer; a row without it gives a task without an answer.
        limit: most tasks to read; None for all.

    Raises:
        TaskError: a source that is missing, unreadable, empty or of another form; names file, line, expected and got.
    """
    name = str(source)
    if name.startswith("hf:"):
        rows = _hugging_face(name.removeprefix("hf:"), split)
    elif name.endswith((".jsonl", ".parquet")):
        if not Path(name).is_file():
            raise TaskError(f"{name}: no such file; expected a .jsonl or .parquet file, or 'hf:NAME'.")
        rows = _jsonl(name) if name.endswith(".jsonl") else _parquet(name)
    else:
        raise TaskError(
            f"{name}: cannot tell what this is; expected a path ending in .jsonl or .parquet, or 'hf:NAME'."
        )
    tasks = [_task(where, row, prompt, answer) for where, row in islice(rows, limit)]
    if not tasks:
        raise TaskError(f"{name}: no tasks; expected at least one row, got an empty data set.")
    return tasks


def is_test(split: str) -> bool:
    """Whether ``split`` names the test split.

    Raises:
        TaskError: neither ``"train"`` nor ``"test"``.
    """
    if split not in ("train", "test"):
        raise TaskError(f"unknown split {split!r}: expected 'train' or 'test'.")
    return split == "test"


def held_out(key: str, fraction: float) -> bool:
    """Whether ``key`` belongs to the test split: a fixed pseudo-random ``fraction`` of all keys does.

    It depends on nothing but the key, so equal questions always fall on the same side.
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < fraction * 2**64


def split_by_hash(tasks: Iterable[Task], test_fraction: float) -> tuple[list[Task], list[Task]]:
    """Train and test tasks, parted by what their prompts say; equal prompts never stand on both sides.

    Args:
        tasks: any tasks; their order is kept.
        test_fraction: expected share of the test split, from 0 to 1.

    Raises:
        TaskError: a fraction outside 0 to 1.
    """
    if not 0 <= test_fraction <= 1:
        raise TaskError(f"test_fraction: expected a number from 0 to 1, got {test_fraction!r}.")
    train: list[Task] = []
    test: list[Task] = []
    for task in tasks:
        key = json.dumps([[m.role, m.content] for m in task.prompt])
        (test if held_out(key, test_fraction) else train).append(task)
    return train, test


def _jsonl(name: str) -> Iterator[Row]:
    with Path(name).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{name}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{where}: expected one JSON object per line, got {_short(line)}: {error}.") from error
            if not isinstance(row, dict):
                raise TaskError(f"{where}: expected a JSON object, got {_short(row)}.")
            yield where, row


def _parquet(name: str) -> Iterator[Row]:
    parquet = _optional("pyarrow.parquet", name, "pip install 'agentrl[datasets]'")
    try:
        table = parquet.ParquetFile(name)
        for number, row in enumerate((r for batch in table.iter_batches() for r in batch.to_pylist()), 1):
            yield f"{name}: row {number}", row
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise TaskError(f"{name}: expected a Parquet file, but it cannot be read: {error}") from error


def _hugging_face(name: str, split: str) -> Iterator[Row]:
    datasets = _optional("datasets", f"hf:{name}", "pip install 'agentrl[datasets]'")
    *owner, last = name.split("/")
    path, config = ("/".join(owner), last) if len(owner) == 2 else (name, None)
    try:
        rows = datasets.load_dataset(path, config, split=split)
    except Exception as error:  # the hub, the cache and the builders raise many unrelated types
        raise TaskError(
            f"hf:{name}: expected a Hugging Face data set with a split {split!r}, but it cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"hf:{name}[{split}]: row {number}", row


def _optional(module: str, source: str, remedy: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise TaskError(f"{source}: reading it needs {package}, which is not installed: {remedy}.") from error


def _task(where: str, row: Mapping[str, Any], prompt: str, answer: str) -> Task:
    if prompt not in row:
        columns = ", ".join(sorted(row)) or "none"
        raise TaskError(f"{where}: expected a column {prompt!r} with the problem, got columns {columns}.")
    reference = row.get(answer)
    if reference is not None and not isinstance(reference, str | int | float):
        raise TaskError(f"{where}: expected the answer in {answer!r} as text or a number, got {_short(reference)}.")
    metadata = {name: value for name, value in row.items() if name not in (prompt, answer)}
    return Task(_prompt(where, row[prompt], prompt), None if reference is None else str(reference), metadata=metadata)


def _prompt(where: str, value: Any, column: str) -> str | list[Message]:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(_is_message(item) for item in value):
        return [Message(item["role"], item["content"]) for item in value]
    raise TaskError(
        f"{where}: expected {column!r} to be a non-empty string or a list of "
        f'{{"role": "user", "content": "..."}}, got {_short(value)}.'
    )


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and item.get("role") in get_args(Role) and isinstance(item.get("content"), str)


def _short(value: Any) -> str:
    text = repr(value.strip() if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:80]}..."
