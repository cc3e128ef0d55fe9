from __future__ import annotations

import errno
import os

import pytest

from agentrl.errors import SandboxError, UserError
from agentrl.sandbox import Limits
from agentrl.sandbox.base import FILE_BYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize("path", ["data.bin", "/work/data.bin", "/tmp/data.bin", "deep/er/data.bin", "/work/../tmp/x"])
async def test_a_file_goes_in_and_out_unchanged(session, path):
    data = os.urandom(300_000)
    await session.put_file(path, data)
    assert await session.get_file(path) == data


async def test_the_program_and_the_caller_see_the_same_files(session):
    await session.put_file("in.txt", "süß".encode())
    assert (await session.exec("open('in.txt').read()")).output == "'süß'\n"
    await session.exec("open('out.txt', 'w').write('a\\n')")
    assert await session.get_file("out.txt") == b"a\n"
    await session.put_file("in.txt", b"")
    assert await session.get_file("in.txt") == b""


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../etc/passwd", "/work/../etc/passwd", "/tmp/../dev/null", "/", "", ".", "/workshop/x", "a\0b"],
)
async def test_a_path_that_leaves_the_scratch_folders_is_refused(session, path):
    with pytest.raises(UserError, match="/work and /tmp"):
        await session.get_file(path)
    with pytest.raises(UserError, match="/work and /tmp"):
        await session.put_file(path, b"")


async def test_a_file_that_is_too_large_is_refused_on_both_ways(sandbox):
    with pytest.raises(UserError, match=str(FILE_BYTES)):
        await (await sandbox.open()).put_file("x", bytes(FILE_BYTES + 1))
    session = await sandbox.open()
    await session.exec(f"open('x', 'wb').truncate({FILE_BYTES + 1})")
    with pytest.raises(OSError, match="can be fetched") as caught:
        await session.get_file("x")
    assert caught.value.errno == errno.EFBIG
    await session.exec(f"open('x', 'wb').truncate({FILE_BYTES})")
    assert await session.get_file("x") == bytes(FILE_BYTES)


async def test_a_file_that_is_not_there(session):
    with pytest.raises(FileNotFoundError, match=r"/work/answer\.txt"):
        await session.get_file("answer.txt")
    assert (await session.exec("1")).output == "1\n"


@pytest.mark.parametrize(
    "program",
    [
        "os.mkdir('x')",
        "os.symlink('/dev/zero', 'x')",
        "os.symlink('/usr/lib', 'x')",
        "open('y', 'w'); os.symlink('y', 'x')",
    ],
)
async def test_only_regular_files_come_out(session, program):
    await session.exec(f"import os\n{program}")
    with pytest.raises(OSError, match="/work/x"):
        await session.get_file("x")


async def test_a_full_folder_says_so(sandbox):
    session = await sandbox.open(limits=Limits(scratch_bytes=100_000))
    with pytest.raises(OSError, match="No space left") as caught:
        await session.put_file("x", bytes(500_000))
    assert caught.value.errno == errno.ENOSPC


async def test_files_of_a_lost_session_are_gone(session):
    await session.put_file("x", b"1")
    await session.exec("import os; os._exit(1)")
    with pytest.raises(FileNotFoundError, match="lost"):
        await session.get_file("x")


async def test_a_closed_session_has_no_files(session):
    await session.close()
    with pytest.raises(SandboxError, match="closed"):
        await session.get_file("x")
