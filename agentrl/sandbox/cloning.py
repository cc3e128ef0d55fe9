"""The session's part in a fork: clone this process, then give the child its own files.

The child starts as an exact copy in every respect but one: its files are still the parent's. It copies the scratch
folders into the empty ones that the zygote has mounted over them and opens every descriptor again, at its offset.

Calls ``posix`` and not ``os``, whose functions the program may have replaced. Runs inside the zygote, so it imports
nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import posix
import signal
import stat
import sys
from collections.abc import Iterator, Mapping
from os import SEEK_CUR, SEEK_DATA, SEEK_HOLE, SEEK_SET
from resource import RLIMIT_NOFILE, getrlimit

from agentrl.sandbox import kernel

ROOTS = ("/work", "/tmp")
_SPARE = 2
"""Descriptors that copying a file takes."""
_KEPT_FLAGS = posix.O_ACCMODE | posix.O_APPEND | posix.O_NONBLOCK | posix.O_PATH | posix.O_SYNC
_READ_UNSEEN = posix.O_RDONLY | posix.O_NOFOLLOW | posix.O_NONBLOCK
_TIMERS = {"REAL": signal.ITIMER_REAL, "VIRTUAL": signal.ITIMER_VIRTUAL, "PROF": signal.ITIMER_PROF}


class Stranded(Exception):
    """This is the child, and it could not be given its own files.

    Attributes:
        code: the error number, for the exit status: there is no socket yet to say it.
    """

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.code = (error.errno if isinstance(error, OSError) else None) or errno.EIO


class CannotFork(Exception):
    """What the program holds that cannot be forked and is only visible from inside; one reason per argument."""


def fork(control: int) -> bool:
    """Clone this session.

    Returns:
        Whether this is the child, which by now has its own files and, at ``control``, its own socket, put there by
        the zygote.

    Raises:
        CannotFork: with the reasons.
        OSError: the zygote refused, and has told the manager why; or the kernel did.
        Stranded: in the child, which has to end.
    """
    opened = _opened(control)
    if reasons := list(_obstacles(opened)):
        with contextlib.suppress(OSError):
            kernel.rendezvous()  # the zygote adds what it sees from outside
        raise CannotFork(*reasons)
    old = _open_roots()
    try:
        if kernel.clone_session():
            return False
        _settle(old, opened)
        return True
    finally:
        for folder in old.values():
            posix.close(folder)


def _obstacles(opened: list[int]) -> Iterator[str]:
    for name, timer in _TIMERS.items():
        if any(signal.getitimer(timer)):
            yield f"a running timer (signal.ITIMER_{name})"
    if pending := signal.sigpending():
        yield f"pending signals ({', '.join(sorted(signal.Signals(number).name for number in pending))})"
    try:
        posix.getcwd()
    except OSError:
        yield "a working directory that was deleted"
    for number in opened:
        status, flags = posix.fstat(number), fcntl.fcntl(number, fcntl.F_GETFL)
        if stat.S_ISDIR(status.st_mode):
            if not flags & posix.O_PATH and posix.lseek(number, 0, SEEK_CUR):
                yield f"descriptor {number}: a half-read folder"
            elif not status.st_nlink:
                yield f"descriptor {number}: a folder that was deleted"
        elif not status.st_nlink and flags & posix.O_ACCMODE == posix.O_WRONLY:
            yield f"descriptor {number}: a deleted file open for writing only"
    if "_sqlite3" in sys.modules:
        yield from _databases()


def _databases() -> Iterator[str]:
    import sqlite3

    for thing in gc.get_objects():
        if isinstance(thing, sqlite3.Connection):
            try:
                opened = list(sqlite3.Connection.execute(thing, "pragma database_list"))
            except sqlite3.Error:  # closed, or another thread's
                continue
            yield from (f"a sqlite connection to {file} ({name})" for _, name, file in opened if file)


def _open_roots() -> dict[str, int]:
    opened: list[int] = []
    try:
        for path in (*ROOTS, *("/" for _ in range(_SPARE))):
            opened.append(posix.open(path, posix.O_RDONLY | posix.O_DIRECTORY | posix.O_CLOEXEC))
    except OSError as error:
        for number in opened:
            posix.close(number)
        raise CannotFork(f"fewer than {len(ROOTS) + _SPARE} free descriptors ({error.strerror})") from error
    for number in opened[len(ROOTS) :]:
        posix.close(number)
    return dict(zip(ROOTS, opened, strict=False))


# -- in the child ---------------------------------------------------------------------------------------------------


def _settle(old: dict[str, int], opened: list[int]) -> None:
    """Wait for the new folders, fill them, turn every descriptor to them; wait until the zygote has seen to it."""
    try:
        kernel.drop_capabilities()
        here = posix.getcwd()
        posix.chdir("/")
        kernel.rendezvous()
        move = _Move(old)
        for root in old:
            move.copy(root)
        for numbers in _by_description(opened):
            move.reopen(numbers)
        move.finish()
        while old:
            posix.close(old.popitem()[1])
        posix.chdir(here)
        kernel.rendezvous()
    except BaseException as error:
        raise Stranded(error) from error


def _opened(control: int) -> list[int]:
    """Descriptors of files and folders; everything else has been refused, or is a device without state."""
    found = []
    for number in range(getrlimit(RLIMIT_NOFILE)[0]):
        try:
            kind = posix.fstat(number).st_mode
        except OSError:
            continue
        if number != control and (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
            found.append(number)
    return found


def _by_description(opened: list[int]) -> list[list[int]]:
    """Descriptors grouped by open file description: those that share an offset."""
    groups: list[list[int]] = []
    for number in opened:
        for group in groups:
            if _shared(group[0], number):
                group.append(number)
                break
        else:
            groups.append([number])
    return groups


def _shared(one: int, other: int) -> bool:
    a, b = posix.fstat(one), posix.fstat(other)
    if (a.st_dev, a.st_ino) != (b.st_dev, b.st_ino) or not _has_offset(one) or not _has_offset(other):
        return False
    before, at = posix.lseek(one, 0, SEEK_CUR), posix.lseek(other, 0, SEEK_CUR)
    posix.lseek(one, before + 1, SEEK_SET)
    moved = posix.lseek(other, 0, SEEK_CUR) != at
    posix.lseek(one, before, SEEK_SET)
    return moved


def _has_offset(number: int) -> bool:
    return stat.S_ISREG(posix.fstat(number).st_mode) and not fcntl.fcntl(number, fcntl.F_GETFL) & posix.O_PATH


class _Move:
    """Copies the old scratch folders, open at ``old`` by the path of their new places, and remembers what went where.

    It walks by path and not by descriptor: a program may nest folders deeper than it may open files.
    """

    def __init__(self, old: Mapping[str, int]) -> None:
        self.old = old
        self.devices = {posix.fstat(folder).st_dev: root for root, folder in old.items()}
        self.places: dict[tuple[int, int], str] = {}  # (device, inode) -> path of the copy
        self.copied: list[tuple[str, posix.stat_result]] = []  # a folder comes before what is in it

    def copy(self, root: str) -> None:
        """Copy what is in one of the roots."""
        top = posix.fstat(self.old[root])
        self._note(root, top)
        todo = ["."]
        while todo:
            folder = todo.pop()
            for name in self._names(root, folder):
                path = f"{folder}/{name}"
                status = posix.stat(path, dir_fd=self.old[root], follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    posix.mkdir(f"{root}/{path}")
                    self._note(f"{root}/{path}", status)
                    todo.append(path)
                else:
                    self._copy_entry(root, path, status)

    def _copy_entry(self, root: str, path: str, status: posix.stat_result) -> None:
        place, known = f"{root}/{path}", self.places.get((status.st_dev, status.st_ino))
        if known is not None:
            posix.link(known, place, follow_symlinks=False)
            return
        if stat.S_ISLNK(status.st_mode):
            posix.symlink(posix.readlink(path, dir_fd=self.old[root]), place)
        else:
            source = self._open(root, path, status, _READ_UNSEEN)
            _fill(place, source, status.st_size)
            posix.close(source)
        self._note(place, status)

    def _names(self, root: str, folder: str) -> list[str]:
        status = posix.stat(folder, dir_fd=self.old[root])
        descriptor = self._open(root, folder, status, posix.O_RDONLY | posix.O_DIRECTORY)
        try:
            return posix.listdir(descriptor)
        finally:
            posix.close(descriptor)

    def _open(self, root: str, path: str, status: posix.stat_result, flags: int) -> int:
        """Open an original, even one that its owner has locked himself out of."""
        needed = stat.S_IRUSR | (stat.S_IXUSR if stat.S_ISDIR(status.st_mode) else 0)
        if status.st_mode & needed != needed:  # a folder stays open for what is in it; all of it is frozen anyway
            posix.chmod(path, 0o700, dir_fd=self.old[root])
        return posix.open(path, flags, dir_fd=self.old[root])

    def _note(self, place: str, status: posix.stat_result) -> None:
        self.places[status.st_dev, status.st_ino] = place
        self.copied.append((place, status))

    def reopen(self, numbers: list[int]) -> None:
        """Turn descriptors that share a description to one of the copy."""
        first = numbers[0]
        status, flags = posix.fstat(first), fcntl.fcntl(first, fcntl.F_GETFL)
        place = self.places.get((status.st_dev, status.st_ino))
        if place is None:  # it has no name any more
            place = f"{self.devices[status.st_dev]}/.unnamed"
            _fill(place, first, status.st_size)
        new = posix.open(place, flags & _KEPT_FLAGS)
        if _has_offset(first):
            posix.lseek(new, posix.lseek(first, 0, SEEK_CUR), SEEK_SET)
        for number in numbers:
            posix.dup2(new, number, posix.get_inheritable(number))
        posix.close(new)
        if (status.st_dev, status.st_ino) not in self.places:
            posix.unlink(place)

    def finish(self) -> None:
        """Give every copy the rights and times of its original, a folder after what is in it."""
        for place, status in reversed(self.copied):
            link = stat.S_ISLNK(status.st_mode)
            if not link:
                posix.chmod(place, stat.S_IMODE(status.st_mode))
            posix.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=not link)


def _fill(place: str, source: int, size: int) -> None:
    """Make the file ``place`` with the content of ``source``, holes kept."""
    target = posix.open(place, posix.O_WRONLY | posix.O_CREAT | posix.O_EXCL, 0o600)
    try:
        posix.ftruncate(target, size)
        end = 0
        while end < size:
            try:
                at = posix.lseek(source, end, SEEK_DATA)
            except OSError:  # nothing but a hole from here on
                return
            end = posix.lseek(source, at, SEEK_HOLE)
            posix.lseek(target, at, SEEK_SET)
            while at < end:
                at += posix.sendfile(target, source, at, end - at)
    finally:
        posix.close(target)
