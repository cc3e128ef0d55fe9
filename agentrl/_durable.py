"""Writes that survive ``kill -9`` and a full disk: whole or not at all.

A file or a folder is written under a temporary name, synced, and renamed; the rename is what makes it exist. A sealed
folder also holds ``COMPLETE``, a manifest with every file's size and CRC-32, so that later damage is noticed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from agentrl.errors import RunFolderError

TMP_PREFIX = ".tmp-"
_MANIFEST = "COMPLETE"


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``: after a crash there is the old content or the new, never a part."""
    tmp = path.with_name(TMP_PREFIX + path.name)
    try:
        with open(tmp, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


def append_line(file: FileIO, text: str) -> None:
    """Append ``text`` and a newline to the unbuffered ``file`` and wait for the disk; on failure nothing is added."""
    size = os.fstat(file.fileno()).st_size
    left = (text + "\n").encode()
    try:
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())
    except OSError:
        file.truncate(size)
        raise


def sync_dir(path: Path) -> None:
    """Make renames and removals inside of ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(path: Path) -> None:
    """Remove the folder ``path``; at no moment does a part of it stand under its own name."""
    doomed = path if path.name.startswith(TMP_PREFIX) else path.with_name(f"{TMP_PREFIX}removed-{path.name}")
    if doomed != path:
        os.replace(path, doomed)
    shutil.rmtree(doomed)


def seal(folder: Path) -> None:
    """Write the manifest of ``folder`` and sync it with everything inside."""
    manifest = {}
    for file in _files(folder):
        manifest[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "crc32": _crc32(file)}
        _sync_file(file)
    write_atomic(folder / _MANIFEST, json.dumps({"files": manifest}, indent=1))
    for directory in (path for path in folder.rglob("*") if path.is_dir()):
        sync_dir(directory)


def damage(folder: Path) -> str | None:
    """What differs between ``folder`` and its manifest, in words; None where it is whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["bytes"], entry["crc32"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"it has no {_MANIFEST} file"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {_MANIFEST} file cannot be read"
    for name, (size, crc32) in expected.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _crc32(file) != crc32:
            return f"the content of {name} has changed since it was saved"
    return None


@contextmanager
def disk_full_explained(what: str, folder: Path) -> Iterator[None]:
    """Turn "no space left" into a ``RunFolderError`` that says what was being written.

    Raises:
        RunFolderError: the disk or the quota is full. Any other error passes through.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if not _means_disk_full(error, free):
            raise
        raise RunFolderError(
            f"disk full while writing {what} in {folder}: {free / 2**20:.1f} MiB are left ({error}). What was saved "
            "before is untouched. Free some space, or keep fewer checkpoints, then go on with --resume."
        ) from error


def _means_disk_full(error: Exception, free: int) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors keeps only the text of the OSError; torch.save not even that ("unexpected pos 576 vs 534").
    return os.strerror(errno.ENOSPC) in str(error) or (isinstance(error, RuntimeError) and free < 2**20)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _crc32(file: Path) -> int:
    value = 0
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            value = zlib.crc32(chunk, value)
    return value


def _sync_file(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
