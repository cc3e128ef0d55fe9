from __future__ import annotations

import asyncio
import json
import random
import struct

import pytest

from agentrl.errors import ConfigError
from agentrl.sandbox import ExecStatus, Limits, LocalSandbox, Profile
from agentrl.sandbox.base import CODE_BYTES, OUTPUT_BYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("1 + 1", "2\n"),
        ("None", ""),
        ("x = 3", ""),
        ("x = 3\nx", "3\n"),
        ("3; 4", "4\n"),
        ("'text'", "'text'\n"),
        ("print('a')\nprint('b')", "a\nb\n"),
        ("print('a'); 5", "a\n5\n"),
        ("import sys\nsys.stderr.write('e\\n')\nprint('o')", "e\no\n"),
        ("for i in range(2):\n    i", ""),
        ("", ""),
        ("# nothing", ""),
        ("__name__", "'__main__'\n"),
        ("import os; os.getcwd()", "'/work'\n"),
        ("print('é', end='')", "é"),
    ],
)
async def test_a_cell_shows_what_a_notebook_shows(session, code, output):
    result = await session.exec(code)
    assert (result.status, result.output, result.error, result.state_kept) == (ExecStatus.OK, output, None, True)


async def test_names_functions_classes_and_files_last(session):
    await session.exec("import pickle\nx = [1]\ndef f(): return x\nclass A: pass\nopen('f', 'w').write('data')")
    assert (await session.exec("x.append(2); f()")).output == "[1, 2]\n"
    assert (await session.exec("type(pickle.loads(pickle.dumps(A()))) is A")).output == "True\n"
    assert (await session.exec("open('/work/f').read()")).output == "'data'\n"


async def test_sessions_share_nothing(sandbox, session):
    other = await sandbox.open()
    await session.exec("x = 1; open('/tmp/f', 'w').close(); import json; json.mark = 1")
    result = await other.exec("import os, json\n'x' in globals(), os.listdir('/tmp'), hasattr(json, 'mark')")
    await other.close()
    assert result.output == "(False, [], False)\n"


async def test_a_traceback_shows_the_programs_frames_only(session):
    await session.exec("import json\ndef load(text):\n    return json.loads(text)")
    result = await session.exec("load('{')")
    assert result.status is ExecStatus.ERROR
    assert result.error == (
        "Traceback (most recent call last):\n"
        '  File "<cell 2>", line 1, in <module>\n'
        "    load('{')\n"
        '  File "<cell 1>", line 3, in load\n'
        "    return json.loads(text)\n"
        "           ^^^^^^^^^^^^^^^^\n"
        "json.decoder.JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"
    )


async def test_chained_errors_hide_the_runner_too(session):
    error = (
        await session.exec("try:\n    1 / 0\nexcept ZeroDivisionError as e:\n    raise ValueError('x') from e")
    ).error
    assert "direct cause" in error
    assert "ZeroDivisionError" in error
    assert error.endswith("ValueError: x")
    assert "interpreter.py" not in error


async def test_a_syntax_error_points_at_the_place(session):
    result = await session.exec("x = = 1")
    assert result.status is ExecStatus.ERROR
    assert result.error.startswith('  File "<cell 1>", line 1\n    x = = 1\n        ^')
    assert result.error.endswith("SyntaxError: invalid syntax")


async def test_what_was_printed_before_an_error_is_shown(session):
    result = await session.exec("print('before')\n1 / 0")
    assert result.output == "before\n"
    assert str(result).startswith("before\nTraceback")


@pytest.mark.parametrize("code", ["raise SystemExit(3)", "exit(3)", "import sys; sys.exit(3)"])
async def test_leaving_politely_is_an_error_and_keeps_the_state(session, code):
    await session.exec("x = 5")
    result = await session.exec(code)
    assert (result.status, result.state_kept) == (ExecStatus.ERROR, True)
    assert "SystemExit: 3" in result.error
    assert (await session.exec("x")).output == "5\n"


async def test_leaving_at_once_loses_the_session_and_says_so_from_then_on(session):
    result = await session.exec("import os; print('lost'); os._exit(7)")
    assert (result.status, result.state_kept) == (ExecStatus.KILLED, False)
    assert "exit status 7" in result.error
    again = await session.exec("1")
    assert (again.status, again.state_kept) == (ExecStatus.KILLED, False)
    assert "lost earlier" in again.error


async def test_a_thread_that_ends_the_process_between_cells_is_the_programs_doing(session):
    await session.exec("import os, threading\nthreading.Timer(0.05, os._exit, (9,)).start()")
    await asyncio.sleep(0.3)
    result = await session.exec("1")
    assert result.status is ExecStatus.KILLED
    assert "exit status 9" in result.error


async def test_an_interrupted_cell_keeps_state_and_output(session):
    await session.exec("x = 5")
    result = await session.exec("print('so far')\nwhile True:\n    pass", 0.2)
    assert (result.status, result.state_kept, result.output) == (ExecStatus.TIMEOUT, True, "so far\n")
    assert "TimeoutError: the cell was interrupted after 0.2 s" in result.error
    assert 0.2 <= result.seconds < 0.6
    assert (await session.exec("x")).output == "5\n"


async def test_a_cell_that_does_not_yield_is_killed_and_the_session_lost(session):
    result = await session.exec("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nwhile True: pass", 0.2)
    assert (result.status, result.state_kept) == (ExecStatus.TIMEOUT, False)
    assert "could not be interrupted" in result.error
    assert (await session.exec("1")).status is ExecStatus.KILLED


async def test_a_cell_that_took_the_signal_gets_it_back_with_the_next(session):
    await session.exec("import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)")
    assert (await session.exec("while True: pass", 0.2)).state_kept


async def test_the_programs_own_alarm_and_interrupt_work(session):
    code = "import signal, time\ndef ring(*_): raise OSError('rang')\nsignal.signal(signal.SIGALRM, ring)\n"
    assert (
        "OSError: rang"
        in (await session.exec(code + "signal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(5)")).error
    )
    result = await session.exec("import os\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)")
    assert result.status is ExecStatus.ERROR
    assert result.error.endswith("KeyboardInterrupt")


async def test_too_much_memory_is_its_own_status_and_keeps_the_state(session):
    await session.exec("x = 5")
    result = await session.exec("y = [0] * 10**10")
    assert (result.status, result.state_kept) == (ExecStatus.MEMORY, True)
    assert (await session.exec("x")).output == "5\n"


async def test_cpu_time_is_limited_over_the_whole_session(sandbox):
    session = await sandbox.open(limits=Limits(cpu_seconds=1))
    result = await session.exec("while True: pass", 10.0)
    await session.close()
    assert result.status is ExecStatus.KILLED
    assert "used up its 1 s of CPU time" in result.error


async def test_long_output_is_cut_and_the_rest_counted(session):
    result = await session.exec("print('a' * 100_000)")
    assert result.output == "a" * OUTPUT_BYTES + f"\n[... {100_001 - OUTPUT_BYTES} more bytes of output cut ...]"
    assert (await session.exec("print('b')")).output == "b\n"


@pytest.mark.parametrize(
    ("code", "output"),
    [
        ("import sys; sys.stdout.buffer.write(b'\\xff\\x00'); None", "\\xff\x00"),
        ("import os; os.write(1, b'raw\\xfe'); None", "raw\\xfe"),
        ("print('\\ud800')", "\\ud800\n"),
        ("import os\nif os.fork() == 0: print('child')\nelse: os.wait(); print('parent')", "parent\nchild\n"),
    ],
)
async def test_any_output_comes_back_as_clean_text(session, code, output):
    result = await session.exec(code)
    assert result.output == output
    result.output.encode()


async def test_an_error_text_is_clean_too(session):
    (await session.exec("raise ValueError('\\ud800')")).error.encode()


async def test_closing_stdout_lasts_for_one_cell(session):
    await session.exec("import sys; sys.stdout.close()")
    assert (await session.exec("print(1)")).output == "1\n"


async def test_there_is_nothing_to_read_from(session):
    assert "EOFError" in (await session.exec("input('name? ')")).error


async def test_a_forked_process_does_not_become_a_second_session(session):
    await session.exec("import os, time\npid = os.fork()")
    assert (await session.exec("os.waitpid(pid, 0)[1], pid != 0")).output == "(0, True)\n"


async def test_random_numbers_follow_the_seed(sandbox):
    async def draw(seed):
        session = await sandbox.open(seed=seed)
        result = await session.exec("import random, numpy\n(random.random(), numpy.random.rand())")
        await session.close()
        return result.output

    first, second, other = await asyncio.gather(draw(3), draw(3), draw(4))
    assert first == second != other
    random.seed(3)
    assert first.startswith(f"({random.random()}, 0.5507979025745755")


async def test_string_hashes_are_the_same_in_every_manager(session):
    here = await session.exec("hash('a'), list({'a', 'b', 'c'})")
    async with LocalSandbox(Profile("bare")) as sandbox:
        there = await (await sandbox.open()).exec("hash('a'), list({'a', 'b', 'c'})")
    assert here.output == there.output


async def test_what_programs_ordinarily_use_works(session):
    programs = {
        "import asyncio\nasyncio.run(asyncio.sleep(0.01, 3))": "3\n",
        "import threading\nt = threading.Thread(target=print, args=(1,)); t.start(); t.join()": "1\n",
        "import multiprocessing\nwith multiprocessing.Pool(2) as p: print(p.map(abs, [-1, -2]))": "[1, 2]\n",
        "import sqlite3\nsqlite3.connect('/work/db').execute('select 3').fetchall()": "[(3,)]\n",
        "import tempfile\nwith tempfile.TemporaryFile() as f: print(f.write(b'ab'))": "2\n",
        "open('m.py', 'w').write('v = 7'); import m; m.v": "7\n",
        "import shutil; open('a', 'w').close(); shutil.copy2('a', 'b')": "'b'\n",
        "import hashlib; hashlib.sha256(b'').hexdigest()[:6]": "'e3b0c4'\n",
        "import numpy; int((numpy.ones((200, 200)) @ numpy.ones((200, 200))).sum())": "8000000\n",
        "import inspect\ndef f(): return 1\ninspect.getsource(f)": "'def f(): return 1\\n'\n",
    }
    got = {code: str(await session.exec(code)) for code in programs}
    assert got == {code: output.rstrip("\n") for code, output in programs.items()}


async def test_hundreds_of_sessions_live_at_once(sandbox):
    sessions = await asyncio.gather(*(sandbox.open(seed=i) for i in range(200)))
    await asyncio.gather(*(s.exec(f"x = {i}") for i, s in enumerate(sessions)))
    results = await asyncio.gather(*(s.exec("x") for s in sessions))
    await asyncio.gather(*(s.close() for s in sessions))
    assert [r.output for r in results] == [f"{i}\n" for i in range(200)]


async def test_calls_on_one_session_take_turns(session):
    await session.exec("import time\nx = []")
    code = "x.append('in'); time.sleep(0.01); x.append('out')"
    await asyncio.gather(*(session.exec(code) for _ in range(5)))
    assert (await session.exec("x == ['in', 'out'] * 5")).output == "True\n"


async def test_a_cell_that_is_too_long_is_the_programs_error(session):
    result = await session.exec("#" * (CODE_BYTES + 1))
    assert (result.status, result.state_kept) == (ExecStatus.ERROR, True)
    assert str(CODE_BYTES) in result.error


@pytest.mark.parametrize("deadline", [0, -1, float("nan"), float("inf"), "5"])
async def test_a_deadline_is_a_positive_number(session, deadline):
    with pytest.raises(ConfigError, match="positive number of seconds"):
        await session.exec("1", deadline)


@pytest.mark.parametrize(
    ("limits", "name"),
    [({"processes": 0}, "processes"), ({"memory_bytes": 1}, "memory_bytes"), ({"open_files": 2.5}, "open_files")],
)
async def test_limits_out_of_range_are_named(limits, name):
    with pytest.raises(ConfigError, match=name):
        Limits(**limits)


async def test_a_seed_is_an_integer(sandbox):
    with pytest.raises(ConfigError, match="integer"):
        await sandbox.open(seed="1")


def frame(head: bytes, body: bytes = b"") -> bytes:
    return struct.pack("!II", len(head), len(body)) + head + body


FORGED = {
    "four gigabytes": b"\xff" * 8,
    "not JSON": frame(b"hello"),
    "a pickle": frame(b"\x80\x04N."),
    "no object": frame(b"[1]"),
    "nesting": frame(b"[" * 100_000),
    "another request": frame(b'{"id": 99, "status": "ok", "error": null, "cut": 0}'),
    "no status": frame(b'{"id": 1}'),
    "unknown status": frame(b'{"id": 1, "status": "great", "error": null, "cut": 0}'),
    "status of a wrong type": frame(b'{"id": 1, "status": [], "error": null, "cut": 0}'),
    "error of a wrong type": frame(b'{"id": 1, "status": "ok", "error": [], "cut": 0}'),
    "a large body": struct.pack("!II", 2, OUTPUT_BYTES + 1) + b"{}",
}


@pytest.mark.parametrize("sent", FORGED.values(), ids=FORGED)
async def test_nonsense_on_the_control_socket_kills_the_session(sandbox, session, sent):
    result = await session.exec(f"import os, time\nos.write(3, {sent!r})\ntime.sleep(5)")
    assert (result.status, result.state_kept) == (ExecStatus.KILLED, False)
    assert "control protocol" in (result.error or "")
    assert (await session.exec("1")).status is ExecStatus.KILLED
    other = await sandbox.open()
    assert (await other.exec("1")).output == "1\n"
    await other.close()


async def test_a_forged_answer_is_no_more_than_output(session):
    head = json.dumps({"id": 1, "status": "ok", "error": None, "cut": 0}).encode()
    result = await session.exec(f"import os, time\nos.write(3, {frame(head, b'forged')!r})\ntime.sleep(0.1)")
    assert result.output == "forged"
    late = await session.exec("1")  # now the real answer comes, to the wrong question
    assert late.status is ExecStatus.KILLED
