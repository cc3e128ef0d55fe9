"""What every backend has to do alike. A new backend is one more entry in ``conftest.BACKENDS``."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random

import pytest
import pytest_asyncio

from agentrl.errors import (
    ConfigError,
    ForkRefused,
    IsolationUnavailable,
    SandboxError,
    SessionClosed,
    SessionFrozen,
    UnknownName,
    UserError,
)
from agentrl.sandbox import ExecStatus, Limits
from agentrl.sandbox.base import CODE_BYTES, FILE_BYTES, OUTPUT_BYTES
from agentrl.types import ForkLevel

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAMES = ("local", "remote", "docker")
MARKED = [pytest.param(name, marks=pytest.mark.docker if name == "docker" else ()) for name in NAMES]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=MARKED)
async def backend(request, backends):
    """The backend under test, already started; skips, with the reason, where this machine cannot have it."""
    async with backends[request.param]() as sandbox:
        try:
            await (await sandbox.open()).close()
        except IsolationUnavailable as error:
            pytest.skip(str(error))
        yield sandbox


@pytest_asyncio.fixture(loop_scope="module")
async def session(backend):
    made = await backend.open(seed=1)
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def forks(session, number=2, **arguments):
    """Several forks of a session, closed at the end."""
    made = []
    try:
        for _ in range(number):
            made.append(await session.fork(**arguments))
        yield made
    finally:
        for fork in made:
            await fork.close()


# --- cells


@pytest.mark.parametrize(
    ("code", "output"),
    [("1 + 1", "2\n"), ("x = 3", ""), ("print('a')\n5", "a\n5\n"), ("", ""), ("print('é', end='')", "é")],
)
async def test_a_cell_gives_its_value_and_its_output(session, code, output):
    result = await session.exec(code)
    assert (result.status, result.output, result.error, result.state_kept) == (ExecStatus.OK, output, None, True)
    assert 0 < result.seconds < 5


async def test_names_and_files_last_from_cell_to_cell(session):
    await session.exec("x = [1]\nopen('f', 'w').write('data')")
    assert (await session.exec("x.append(2); x, open('/work/f').read()")).output == "([1, 2], 'data')\n"


async def test_an_error_has_the_programs_traceback_and_keeps_the_state(session):
    await session.exec("def f(x):\n    return 1 / x")
    result = await session.exec("print('before')\nf(0)")
    assert (result.status, result.output, result.state_kept) == (ExecStatus.ERROR, "before\n", True)
    assert result.error.startswith('Traceback (most recent call last):\n  File "<cell 2>", line 2, in <module>\n')
    assert result.error.endswith("ZeroDivisionError: division by zero")
    assert (await session.exec("f(2)")).output == "0.5\n"


async def test_an_interrupted_cell_keeps_its_state(session):
    await session.exec("x = 5")
    result = await session.exec("print('so far')\nwhile True:\n    pass", 0.2)
    assert (result.status, result.state_kept, result.output) == (ExecStatus.TIMEOUT, True, "so far\n")
    assert "interrupted after 0.2 s" in result.error
    assert (await session.exec("x")).output == "5\n"


async def test_a_cell_that_does_not_yield_loses_its_session(session):
    result = await session.exec("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass", 0.2)
    assert (result.status, result.state_kept) == (ExecStatus.TIMEOUT, False)
    assert "could not be interrupted" in result.error
    again = await session.exec("1")
    assert (again.status, again.state_kept) == (ExecStatus.KILLED, False)
    assert "lost earlier" in again.error


async def test_too_much_memory_is_its_own_status(session):
    result = await session.exec("y = [0] * 10**10")
    assert (result.status, result.state_kept) == (ExecStatus.MEMORY, True)
    assert "MemoryError" in result.error


async def test_a_program_that_ends_its_process_loses_its_session(session):
    await session.put_file("f", b"1")
    result = await session.exec("import os; os._exit(7)")
    assert (result.status, result.state_kept) == (ExecStatus.KILLED, False)
    assert "exit status 7" in result.error
    assert (await session.exec("1")).status is ExecStatus.KILLED
    with pytest.raises(FileNotFoundError, match="lost"):
        await session.get_file("f")
    with pytest.raises(SessionClosed):
        await session.fork()


async def test_long_output_is_cut_and_the_rest_counted(session):
    result = await session.exec("print('a' * 4_000_000)")
    assert result.output == "a" * OUTPUT_BYTES + f"\n[... {4_000_001 - OUTPUT_BYTES} more bytes of output cut ...]"
    assert (await session.exec("print('b')")).output == "b\n"


async def test_a_long_error_is_cut(session):
    result = await session.exec("raise ValueError('é' * 4_000_000)")
    assert result.status is ExecStatus.ERROR
    assert len(result.error) < 100_000
    assert "cut" in result.error


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("import sys; sys.stdout.buffer.write(b'\\xff\\x00'); None", "\\xff\x00"),
        ("import os; os.write(1, b'raw\\xfe'); None", "raw\\xfe"),
        ("print('\\ud800')", "\\ud800\n"),
    ],
)
async def test_binary_output_comes_back_as_clean_text(session, code, output):
    result = await session.exec(code)
    assert result.output == output
    result.output.encode()


async def test_binary_output_of_any_length_comes_back(session):
    result = await session.exec("import sys; sys.stdout.buffer.write(bytes([255]) * 200_000); None")
    assert result.output.startswith("\\xff" * OUTPUT_BYTES)
    assert "bytes of output cut" in result.output


async def test_code_that_is_not_utf8_is_the_programs_error(session):
    for code in ("x = '\ud800'", "\udcff = 1"):
        result = await session.exec(code)
        assert result.state_kept
        assert result.status in (ExecStatus.ERROR, ExecStatus.OK)
    (await session.exec("x = '\ud800'\nraise ValueError(x)")).error.encode()
    assert (await session.exec("1")).output == "1\n"


async def test_a_cell_that_is_too_long_is_the_programs_error(session):
    result = await session.exec("#" * (CODE_BYTES + 1))
    assert (result.status, result.state_kept) == (ExecStatus.ERROR, True)
    assert str(CODE_BYTES) in result.error
    assert (await session.exec("1")).output == "1\n"


async def test_calls_on_one_session_take_turns(session):
    await session.exec("import time\nx = []")
    await asyncio.gather(*(session.exec("x.append('in'); time.sleep(0.01); x.append('out')") for _ in range(5)))
    assert (await session.exec("x == ['in', 'out'] * 5")).output == "True\n"


async def test_sessions_run_at_the_same_time(backend):
    sessions = await asyncio.gather(*(backend.open(seed=number) for number in range(40)))
    cells = [session.exec(f"import time; time.sleep(0.3); {number}") for number, session in enumerate(sessions)]
    loop = asyncio.get_running_loop()
    began = loop.time()
    results = await asyncio.gather(*cells)
    assert loop.time() - began < 8  # one after another: 12
    assert [result.output for result in results] == [f"{number}\n" for number in range(40)]
    await asyncio.gather(*(session.close() for session in sessions))


# --- files


@pytest.mark.parametrize("path", ["data.bin", "/work/data.bin", "/tmp/data.bin", "deep/er/data.bin", "/work/../tmp/x"])
async def test_a_file_goes_in_and_out_unchanged(session, path):
    data = os.urandom(300_000)
    await session.put_file(path, data)
    assert await session.get_file(path) == data
    await session.put_file(path, b"")
    assert await session.get_file(path) == b""


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../etc/passwd", "/tmp/../dev/null", "/", "", ".", "/workshop/x", "\0"]
)
async def test_a_path_that_leaves_the_scratch_folders_is_refused(session, path):
    with pytest.raises(UserError, match="/work and /tmp"):
        await session.get_file(path)
    with pytest.raises(UserError, match="/work and /tmp"):
        await session.put_file(path, b"")


async def test_the_largest_file_goes_both_ways_and_a_larger_one_does_not(session):
    data = os.urandom(FILE_BYTES)
    await session.put_file("x", data)
    assert await session.get_file("x") == data
    with pytest.raises(UserError, match=str(FILE_BYTES)):
        await session.put_file("y", data + b"1")
    await session.exec("open('x', 'ab').write(b'1')")
    with pytest.raises(OSError, match="can be fetched") as caught:
        await session.get_file("x")
    assert caught.value.errno == errno.EFBIG


async def test_a_file_that_is_not_there(session):
    with pytest.raises(FileNotFoundError, match=r"/work/answer\.txt"):
        await session.get_file("answer.txt")
    await session.exec("import os\nos.mkdir('folder'); os.symlink('/dev/zero', 'link')")
    for path in ("folder", "link"):
        with pytest.raises(OSError, match=f"/work/{path}"):
            await session.get_file(path)


async def test_a_name_that_is_too_long_is_the_file_systems_error(session):
    for name in ("n" * 300, "n/" * 3000 + "n"):
        with pytest.raises(OSError, match="too long") as caught:
            await session.put_file(name, b"")
        assert caught.value.errno == errno.ENAMETOOLONG
    assert (await session.exec("1")).output == "1\n"


async def test_a_name_that_no_file_system_takes_is_the_callers_mistake(session):
    for call in (session.put_file("\ud800", b""), session.get_file("\ud800")):
        with pytest.raises((UserError, OSError)):
            await call
    assert (await session.exec("1")).output == "1\n"


async def test_a_full_folder_says_so(backend):
    session = await backend.open(limits=Limits(scratch_bytes=100_000))
    with pytest.raises(OSError, match="No space left") as caught:
        await session.put_file("x", bytes(500_000))
    assert caught.value.errno == errno.ENOSPC
    await session.close()


# --- what a caller may get wrong


async def test_limits_hold(backend):
    session = await backend.open(limits=Limits(cpu_seconds=1))
    result = await session.exec("while True: pass", 10.0)
    assert result.status is ExecStatus.KILLED
    assert "used up its 1 s of CPU time" in result.error
    await session.close()


async def test_an_unknown_profile_is_named_with_the_nearest(backend):
    with pytest.raises(UnknownName, match="unknown sandbox profile 'pyhton': did you mean 'python'") as caught:
        await backend.open("pyhton")
    assert (caught.value.name, caught.value.nearest) == ("pyhton", "python")
    session = await backend.open("python")
    assert (await session.exec("1")).output == "1\n"
    await session.close()


@pytest.mark.parametrize("seed", ["1", 1.0, None, True])
async def test_a_seed_is_an_integer(backend, seed):
    with pytest.raises(ConfigError, match="integer"):
        await backend.open(seed=seed)


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "5"])
async def test_a_deadline_is_a_positive_number(session, deadline):
    with pytest.raises(ConfigError, match="positive number of seconds"):
        await session.exec("1", deadline)


@pytest.mark.parametrize("wrong", [{"rng": "same"}, {"branch": -1}, {"branch": "1"}, {"branch": True}])
async def test_wrong_arguments_of_a_fork_are_refused(session, wrong):
    with pytest.raises(ConfigError):
        await session.fork(**wrong)
    assert (await session.exec("1")).output == "1\n"


async def test_a_closed_session_says_so(backend):
    session = await backend.open()
    await session.close()
    await session.close()
    for call in (session.exec("1"), session.fork(), session.get_file("x"), session.put_file("x", b"")):
        with pytest.raises(SessionClosed, match="closed"):
            await call


async def test_closing_during_a_cell_ends_the_cell(backend):
    session = await backend.open()
    cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
    await asyncio.sleep(0.1)
    await session.close()
    with pytest.raises(SandboxError):
        await cell


async def test_a_cancelled_cell_fails_its_session_only(backend, session):
    other = await backend.open()
    cell = asyncio.create_task(other.exec("import time; time.sleep(60)", 60.0))
    await asyncio.sleep(0.1)
    cell.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cell
    with pytest.raises(SandboxError, match=r"a call on it was cancelled.*open another one"):
        await other.exec("1")
    await other.close()
    assert (await session.exec("1")).output == "1\n"


# --- forks


async def test_a_backend_says_how_it_forks(backend):
    assert backend.fork_level is ForkLevel.SNAPSHOT


async def test_a_fork_has_the_variables_the_files_and_the_offsets(session):
    await session.put_file("f", b"0123456789")
    await session.exec("x = {'a': [1, 2]}\ny = x['a']\nf = open('f')\nf.read(3)\ndef g(): return x\nimport json")
    async with forks(session) as made:
        for fork in made:
            assert (fork.seed, fork.rng) == (1, "inherit")
            assert (
                await fork.exec("x['a'] is y, g(), f.read(3), f.tell()")
            ).output == "(True, {'a': [1, 2]}, '345', 6)\n"
            assert await fork.get_file("f") == b"0123456789"
            assert (await fork.exec("json.dumps(y)")).output == "'[1, 2]'\n"


async def test_forks_and_their_parent_share_nothing(session):
    await session.exec("x = [0]\nopen('f', 'w').write('parent')\nw = open('log', 'w')\nw.write('a'); w.flush()")
    async with forks(session) as (left, right):
        await left.exec("x.append('left'); open('f', 'w').write('left'); open('new', 'w'); w.write('L'); w.flush()")
        await right.put_file("f", b"right")
        await right.exec("w.write('R'); w.flush()")
        assert (await left.exec("x, open('f').read()")).output == "([0, 'left'], 'left')\n"
        assert (await right.exec("import os; x, open('f').read(), os.path.exists('new')")).output == (
            "([0], 'right', False)\n"
        )
        assert (await left.get_file("log"), await right.get_file("log")) == (b"aL", b"aR")
        async with forks(session, 1) as (third,):
            assert (await third.get_file("f"), await third.get_file("log")) == (b"parent", b"a")
            assert (await third.exec("x")).output == "[0]\n"


DRAW = "import random, numpy\nrandom.random(), numpy.random.rand(), own.random(), other.random()"
OWN = "import random, numpy\nown, other = random.Random(5), numpy.random.default_rng(5)\n"


async def test_inherited_random_numbers_go_on_where_they_stood(backend):
    draws = []
    for _ in range(2):
        session = await backend.open(seed=11)
        await session.exec(OWN + "random.random(); numpy.random.rand(3)")
        async with forks(session) as made:
            draws += [(await fork.exec(DRAW)).output for fork in made]
        await session.close()
    assert len(set(draws)) == 1
    generator = random.Random(11)
    generator.random()
    assert draws[0].startswith(f"({generator.random()}, ")


async def test_derived_random_numbers_come_from_the_seed_and_the_branch(backend):
    draws, seeds = [], []
    for _ in range(2):
        session = await backend.open(seed=11)
        await session.exec(OWN)
        async with forks(session, rng="derive") as made, forks(session, 1, rng="derive", branch=0) as (again,):
            assert {fork.rng for fork in made} == {"derive"}
            draws.append([(await fork.exec(DRAW)).output for fork in (*made, again)])
            seeds.append([fork.seed for fork in (*made, again)])
        await session.close()
    assert draws[0] == draws[1]
    assert seeds[0] == seeds[1]
    first, second, again = draws[0]
    assert first == again != second
    assert seeds[0][0] == seeds[0][2] != seeds[0][1]
    assert first.split(", ")[2:] == second.split(", ")[2:]  # a generator that the program made is inherited


async def test_a_forked_session_is_frozen_but_can_be_forked_again(session):
    await session.exec("x = 1; open('f', 'w').write('1')")
    async with forks(session, 1) as (first,):
        for call in (session.exec("x = 2"), session.put_file("f", b"2"), session.get_file("f")):
            with pytest.raises(SessionFrozen, match="fork it again"):
                await call
        await first.exec("x = 3")
        async with forks(session, 1) as (second,):
            assert (await second.exec("x")).output == "1\n"


async def test_a_fork_outlives_its_parent_and_forks_again(backend):
    session = await backend.open()
    await session.exec("path = ['root']")
    generations = [session]
    for name in ("a", "b", "c"):
        generations.append(await generations[-1].fork())
        await generations[-1].exec(f"path.append('{name}')")
    for ancestor in generations[:-1]:
        await ancestor.close()
    assert (await generations[-1].exec("path")).output == "['root', 'a', 'b', 'c']\n"
    with pytest.raises(SessionClosed):
        await session.fork()
    await generations[-1].close()


async def test_the_end_of_one_fork_is_not_the_end_of_another(session):
    async with forks(session, 3) as (killed, closed, alive):
        assert (await killed.exec("import os; os._exit(1)")).status is ExecStatus.KILLED
        await closed.close()
        assert (await alive.exec("1")).output == "1\n"


REFUSED = {
    "a thread": "import threading, time\nt = threading.Thread(target=time.sleep, args=(60,), daemon=True); t.start()",
    "a child process": "import os, time\nif os.fork() == 0: time.sleep(60); os._exit(0)",
    "shared writable memory": "import mmap\nm = mmap.mmap(-1, 4096)",
    "a pipe": "import os\np = os.pipe()",
    "a database file": "import sqlite3\nd = sqlite3.connect('db'); d.execute('create table t (x)'); d.commit()",
}


@pytest.mark.parametrize("program", REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_forked_is_refused_with_its_reasons(session, program):
    assert (await session.exec("x = 1\n" + program)).status is ExecStatus.OK
    with pytest.raises(ForkRefused) as caught:
        await session.fork()
    assert caught.value.reasons
    assert all(reason in str(caught.value) for reason in caught.value.reasons)
    assert (await session.exec("x")).output == "1\n"


async def test_all_reasons_of_a_refusal_are_listed(session):
    await session.exec("\n".join(REFUSED[name] for name in ("a thread", "shared writable memory", "a pipe")))
    with pytest.raises(ForkRefused) as caught:
        await session.fork()
    assert len(caught.value.reasons) >= 3
