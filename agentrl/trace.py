"""The run folder: everything a run leaves behind, written so that ``kill -9`` at any moment loses at most one step.

::

    runs/first/
    ├── config.json  config.toml    what was asked for (the .toml is the user's own file, where there was one)
    ├── versions.json               Python, libraries, platform, git commit
    ├── metrics.jsonl               one line per step, synced before the next step begins
    ├── rollouts/step_000012.jsonl  one ``RolloutTree`` per line, see ``tree_json``
    ├── failures/                   offending samples, saved before an error stops the run
    └── checkpoints/step_000012/    whatever the learner writes, and COMPLETE, the manifest

A step is saved in this order: rollouts, metrics, then the checkpoint if one is due. ``resume`` goes back to the last
whole checkpoint and removes what later steps left, so that no step appears twice.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, Self

from agentrl._durable import (
    TMP_PREFIX,
    append_line,
    damage,
    disk_full_explained,
    remove_tree,
    seal,
    sync_dir,
    write_atomic,
)
from agentrl._versions import collect_versions
from agentrl.errors import NonFiniteError, RunFolderError
from agentrl.tree_json import dump_tree, load_tree, tree_from_json, tree_to_json
from agentrl.types import RolloutTree

__all__ = [
    "Checkpoint",
    "RunFolder",
    "latest_checkpoint",
    "read_metrics",
    "read_rollouts",
    "rollout_steps",
    "tree_from_json",
    "tree_to_json",
    "whole_checkpoints",
]

_LOG = logging.getLogger(__name__)
_STEP_NAME = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        step: the last step whose update is in it.
        path: its folder.
    """

    step: int
    path: Path


class RunFolder:
    """An open run folder; the process that holds it is its only writer.

    Made by ``create`` or ``resume``, never directly. Use it as a context manager, or call ``close``.

    Attributes:
        path: the folder.
        config: what ``create`` was given, read back from ``config.json`` on ``resume``.
        keep: how many checkpoints to keep; may be changed.
        start: the checkpoint that ``resume`` went back to; None in a new run and where none was saved yet.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], *, lock: IO[str], keep: int, start: Checkpoint | None
    ) -> None:
        self.path, self.config, self.start = path, config, start
        self._lock, self.keep = lock, keep
        self._last_step = start.step if start else -1
        self._metrics = FileIO(path / "metrics.jsonl", "a")

    # -- opening and closing --------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: Path | str,
        config: Mapping[str, Any],
        *,
        toml: str | None = None,
        environment: str | None = None,
        keep: int = 2,
    ) -> Self:
        """Start a run in ``path``, which is made with its parents.

        Args:
            path: the folder.
            config: the whole configuration, as JSON can hold it.
            toml: text of the configuration file, kept as ``config.toml``.
            environment: the environment's name, for ``versions.json``.
            keep: checkpoints to keep, at least 1.

        Raises:
            RunFolderError: the folder holds a run, is in use, or cannot be made.
        """
        path = Path(path).absolute()
        _require_keep(keep)
        try:
            for folder in (path, *_subfolders(path)):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"cannot make the run folder {path}: {error}. Choose another with --out.") from error
        lock = _take_lock(path)
        try:
            if (path / "config.json").exists():
                raise RunFolderError(
                    f"{path} holds a run already. Go on with it by --resume, or choose another folder with --out."
                )
            with disk_full_explained("the configuration", path):
                write_atomic(path / "versions.json", _dump(collect_versions(environment)))
                if toml is not None:
                    write_atomic(path / "config.toml", toml)
                # Last, because a folder with config.json is a run that can be resumed.
                write_atomic(path / "config.json", _dump(config))
                sync_dir(path.parent)
            return cls(path, config, lock=lock, keep=keep, start=None)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def resume(cls, path: Path | str, *, keep: int = 2) -> Self:
        """Go on with the run in ``path`` from its last whole checkpoint, which becomes ``start``.

        Leftovers of a killed process are removed, and so are the metrics and the rollouts of steps after the
        checkpoint (of all steps, where there is no checkpoint yet): the run does them again. A checkpoint that no
        longer matches its manifest is set aside as ``checkpoints/damaged-step_...`` with a warning.

        Raises:
            RunFolderError: there is no run in ``path``, it is in use, or its metrics are damaged.
        """
        path = Path(path).absolute()
        _require_keep(keep)
        if not (path / "config.json").is_file():
            raise RunFolderError(
                f"there is no run to resume in {path}: expected a config.json. Start it without --resume, or correct "
                "the path."
            )
        lock = _take_lock(path)
        try:
            with disk_full_explained("the resumed run", path):
                for folder in _subfolders(path):
                    folder.mkdir(exist_ok=True)
                _remove_leftovers(path)
                start = _go_back_to_whole(path)
                _rewind(path, start.step if start else -1)
            _warn_of_other_versions(path)
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return cls(path, config, lock=lock, keep=keep, start=start)
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        """Let go of the folder. Safe to call twice."""
        self._metrics.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what a step leaves ---------------------------------------------------------------------------------------

    def write_rollouts(self, step: int, trees: Iterable[RolloutTree]) -> Path:
        """Save the trees of ``step``, whole or not at all.

        Raises:
            NonFiniteError: a number in a tree is not finite.
            TaskError: a task's metadata is not JSON.
            RunFolderError: the disk is full.
        """
        path = self.path / "rollouts" / f"{_step_name(step)}.jsonl"
        text = "".join(dump_tree(tree) + "\n" for tree in trees)
        with disk_full_explained(f"the rollouts of step {step}", path.parent):
            write_atomic(path, text)
        return path

    def read_rollouts(self, step: int) -> list[RolloutTree]:
        """The trees of ``step``; see the function of the same name."""
        return read_rollouts(self.path, step)

    def log_metrics(self, step: int, metrics: Mapping[str, float | int | str | None]) -> None:
        """Append the line of ``step`` and wait until it is on the disk.

        Raises:
            NonFiniteError: a value is NaN or infinite; log None for what could not be measured.
            RunFolderError: the step is not after the last one, or the disk is full.
        """
        if step <= self._last_step:
            raise RunFolderError(f"metrics of step {step} after those of step {self._last_step}: a step has one line.")
        bad = {k: v for k, v in metrics.items() if isinstance(v, float) and not math.isfinite(v)}
        if bad:
            raise NonFiniteError(f"metrics of step {step} are not finite: {bad}. Expected numbers, text or None.")
        with disk_full_explained(f"the metrics of step {step}", self.path):
            append_line(self._metrics, json.dumps({"step": step, **metrics}))
        self._last_step = step

    def save_failure(self, name: str, payload: Mapping[str, Any]) -> Path:
        """Save an offending sample as ``failures/NAME.json`` (``NAME-2.json`` if there is one) and return its path.

        Takes what it is given: NaN and infinity become strings, an object that JSON does not know its ``repr``.

        Raises:
            RunFolderError: the disk is full.
        """
        folder, stem = self.path / "failures", re.sub(r"[^\w.=-]+", "_", name).lstrip(".") or "failure"
        path, count = folder / f"{stem}.json", 1
        while path.exists():
            count += 1
            path = folder / f"{stem}-{count}.json"
        with disk_full_explained(f"the failure {name!r}", folder):
            write_atomic(path, _dump(_printable(payload)))
        return path

    def write_json(self, name: str, payload: Mapping[str, Any]) -> Path:
        """Save ``payload`` as a file in the run folder (``result.json``), replacing it as a whole.

        Raises:
            RunFolderError: the disk is full.
        """
        with disk_full_explained(name, self.path):
            write_atomic(self.path / name, _dump(payload))
        return self.path / name

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """A temporary folder that becomes the checkpoint of ``step`` when the block ends without an exception.

        Only then are older checkpoints beyond ``keep`` removed. ::

            with folder.checkpoint(step) as tmp:
                model.save_pretrained(tmp)

        Raises:
            RunFolderError: that step has a checkpoint, or the disk is full; earlier checkpoints are untouched.
        """
        folder = self.path / "checkpoints"
        final, tmp = folder / _step_name(step), folder / f"{TMP_PREFIX}{_step_name(step)}"
        if final.exists():
            raise RunFolderError(f"{final} exists: expected to save step {step} once. Resume the run to go on from it.")
        with suppress(FileNotFoundError):
            remove_tree(tmp)
        tmp.mkdir()
        try:
            with disk_full_explained(f"checkpoint {final.name}", folder):
                yield tmp
                seal(tmp)
                os.replace(tmp, final)
                sync_dir(folder)
        except BaseException:
            with suppress(FileNotFoundError):
                remove_tree(tmp)
            raise
        for _, old in _checkpoint_folders(self.path)[self.keep :]:
            remove_tree(old)

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint; see the function of the same name."""
        return latest_checkpoint(self.path)


def latest_checkpoint(path: Path | str) -> Checkpoint | None:
    """The newest checkpoint of the run in ``path`` that matches its manifest; damaged ones are named in a warning."""
    return next(whole_checkpoints(path), None)


def whole_checkpoints(path: Path | str) -> Iterator[Checkpoint]:
    """Those that match their manifests, newest first; damaged ones are named in a warning."""
    for step, folder in _checkpoint_folders(Path(path)):
        problem = damage(folder)
        if problem is None:
            yield Checkpoint(step, folder)
        else:
            _LOG.warning("checkpoint %s is skipped: %s", folder, problem)


def rollout_steps(path: Path | str) -> list[int]:
    """The steps whose rollouts are in the run in ``path``."""
    files = (Path(path) / "rollouts").glob("step_*.jsonl")
    return sorted(int(match[1]) for file in files if (match := _STEP_NAME.fullmatch(file.stem)))


def read_rollouts(path: Path | str, step: int, first: int | None = None) -> list[RolloutTree]:
    """The trees of ``step`` of the run in ``path``, also of one that is running; only the ``first`` of them if asked.

    Raises:
        RunFolderError: that step has no rollouts here, or a line cannot be read.
    """
    file = Path(path) / "rollouts" / f"{_step_name(step)}.jsonl"
    if not file.is_file():
        raise RunFolderError(f"no rollouts of step {step} in {file.parent}: the run has not done that step.")
    trees: list[RolloutTree] = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(islice(lines, first), start=1):
            try:
                trees.append(load_tree(line))
            except (ValueError, KeyError, TypeError) as error:
                raise RunFolderError(
                    f"{file}, line {number} cannot be read ({type(error).__name__}: {error}): expected one rollout "
                    "tree as JSON. The file was damaged after it was written, or another version of agentrl wrote it."
                ) from error
    return trees


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` of the run in ``path``, also of one that is running.

    Raises:
        RunFolderError: there are no metrics, or a line before the last cannot be read.
    """
    file = Path(path) / "metrics.jsonl"
    if not file.is_file():
        raise RunFolderError(f"no metrics in {path}: expected {file}. Is it a run folder?")
    lines = file.read_bytes().split(b"\n")
    rows: list[dict[str, Any]] = []
    # What follows the last newline is empty, or a line that is being written or was cut by a kill.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RunFolderError(
                f"{file}, line {number} cannot be read: expected a JSON object, got {line[:60]!r}. The file was "
                "damaged after it was written; restore or remove that line."
            ) from error
    return rows


def _take_lock(path: Path) -> IO[str]:
    """The exclusive lock of ``path``; the kernel gives it back when the process ends, however it ends."""
    try:
        lock = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 -- held as long as the run
    except OSError as error:
        raise RunFolderError(f"cannot write in the run folder {path}: {error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "(unknown)"
        lock.close()
        raise RunFolderError(
            f"{path} is in use by process {holder}. Wait for it or stop it, or choose another folder with --out."
        ) from None
    except OSError as error:
        lock.close()
        raise RunFolderError(
            f"cannot lock the run folder {path}: {error}. Its file system must support flock; choose another --out."
        ) from error
    try:
        with disk_full_explained("the lock", path):
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
    except BaseException:
        with suppress(OSError):  # what could not be written is tried once more
            lock.close()
        raise
    return lock


def _rewind(path: Path, step: int) -> None:
    """Remove the metrics and the rollouts of the steps after ``step``."""
    metrics = path / "metrics.jsonl"
    if metrics.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        write_atomic(metrics, "".join(json.dumps(row) + "\n" for row in kept))
    for file in (path / "rollouts").glob("step_*.jsonl"):
        if int(file.stem.removeprefix("step_")) > step:
            file.unlink()
    sync_dir(path / "rollouts")


def _remove_leftovers(path: Path) -> None:
    for folder in (path, *_subfolders(path)):
        for leftover in folder.glob(f"{TMP_PREFIX}*"):
            if leftover.is_dir():
                remove_tree(leftover)
            else:
                leftover.unlink()


def _go_back_to_whole(path: Path) -> Checkpoint | None:
    """The newest whole checkpoint; damaged ones after it are renamed, for the run will save those steps again."""
    for step, folder in _checkpoint_folders(path):
        problem = damage(folder)
        if problem is None:
            return Checkpoint(step, folder)
        aside = folder.with_name(f"damaged-{folder.name}")
        if aside.exists():
            remove_tree(aside)
        os.replace(folder, aside)
        _LOG.warning("checkpoint %s is skipped and set aside as %s: %s", folder, aside.name, problem)
    return None


def _warn_of_other_versions(path: Path) -> None:
    then: dict[str, str | None] = json.loads((path / "versions.json").read_text(encoding="utf-8"))
    now = collect_versions()
    changed = [f"{name} {then[name]} -> {now[name]}" for name in then if name in now and now[name] != then[name]]
    if changed:
        _LOG.warning("resumed with other versions, so numbers may differ from an unbroken run: %s", "; ".join(changed))


def _checkpoint_folders(path: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the checkpoints of the run in ``path``, newest first, whole or not."""
    folder = path / "checkpoints"
    entries = folder.iterdir() if folder.is_dir() else ()
    found = [(int(match[1]), entry) for entry in entries if (match := _STEP_NAME.fullmatch(entry.name))]
    return sorted(found, reverse=True)


def _subfolders(path: Path) -> list[Path]:
    return [path / name for name in ("rollouts", "failures", "checkpoints")]


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _require_keep(keep: int) -> None:
    if keep < 1:
        raise RunFolderError(f"keep={keep} checkpoints: expected at least 1, or a killed run could not be resumed.")


def _dump(payload: Any) -> str:
    return json.dumps(payload, indent=2, allow_nan=False) + "\n"


def _printable(value: Any) -> Any:
    """``value`` as strict JSON takes it."""
    if isinstance(value, Mapping):
        return {str(key): _printable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_printable(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return repr(value)
