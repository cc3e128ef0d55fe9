from __future__ import annotations

import asyncio

import pytest

from agentrl.env import make_tool
from agentrl.errors import ForkRefused, SandboxError
from agentrl.sandbox.base import ExecResult, ExecStatus
from agentrl.sandbox.shared import close_shared_sandboxes, shared_sandbox
from agentrl.tool import dispatch, dispatch_all
from agentrl.types import ForkLevel, ToolCall


@pytest.fixture
async def python():
    """Makes started tools and closes them."""
    made = []

    async def make(seed=0, **options):
        tool = make_tool("python", **options)
        made.append(tool)
        await tool.start(seed)
        return tool

    yield make
    for tool in made:
        await tool.close()
    await close_shared_sandboxes()


async def test_state_lasts_from_call_to_call(python):
    tool = await python()
    assert await tool.run("x = 3\nopen('f.txt', 'w').write('kept')") == "4"
    assert await tool.run("print('a'); x * 2") == "a\n6"
    assert await tool.run("open('f.txt').read()") == "'kept'"
    assert await tool.run("y = x") == "No output."


async def test_the_schema_is_short_enough_for_a_tiny_policy(python):
    function = (await python()).schema["function"]
    assert (function["name"], function["description"]) == ("python", "Run Python code.")
    assert function["parameters"]["properties"] == {"code": {"type": "string", "description": "The code."}}


async def test_nothing_is_opened_before_the_first_call():
    class NoSandbox:
        async def open(self, profile, **options):
            raise AssertionError("opened")

    tool = make_tool("python", sandbox=NoSandbox())
    await tool.start(0)
    await (await tool.fork()).close()
    await tool.close()
    with pytest.raises(AssertionError, match="opened"):
        await tool.run("1")


async def test_errors_are_read_from_their_end(python):
    tool = await python()
    content = await tool.run("print('before')\ndef f(n):\n    return f(n - 1) if n else 1 / 0\nf(20)")
    assert content.startswith("before\n...\n")
    assert content.endswith("ZeroDivisionError: division by zero")
    assert len(content.splitlines()) == 8
    assert (await tool.run("def")).endswith("SyntaxError: invalid syntax")


async def test_a_timeout_says_that_the_state_was_kept(python):
    tool = await python(deadline=0.3)
    await tool.run("x = 1")
    content = await tool.run("while True: pass")
    assert "TimeoutError: the cell was interrupted after 0.3 s" in content
    assert "kept" in content
    assert await tool.run("x") == "1"


async def test_a_lost_session_is_replaced_and_the_environments_part_done_again(python):
    tool = await python()
    await tool.put_file("note.txt", b"hello")
    assert (await tool.exec("given = 5")).status is ExecStatus.OK
    await tool.run("own = 1")
    content = await tool.run("import os; os._exit(1)")
    assert "lost" in content
    assert content.endswith("The next call starts a new session.")
    assert await tool.run("print(given, open('note.txt').read())") == "5 hello"
    assert (await tool.run("own")).endswith("NameError: name 'own' is not defined")


async def test_seeds_decide_random_numbers(python):
    code = "import random; random.random()"
    first, again, other = [await (await python(seed)).run(code) for seed in (1, 1, 2)]
    assert first == again != other


async def test_sessions_do_not_see_each_other(python):
    one, two = await python(), await python()
    await one.run("x = 1")
    assert "NameError" in await two.run("x")


async def test_cells_of_one_turn_run_in_their_order(python):
    tool = await python()
    codes = ("import time; time.sleep(0.05); seen = ['a']", "seen.append('b')", "seen")
    calls = tuple(ToolCall(str(i), "python", {"code": code}) for i, code in enumerate(codes))
    results = await dispatch_all({"python": tool}, calls)
    assert results[-1].content == "['a', 'b']"


async def test_a_fork_is_the_same_state_and_independent(python):
    tool = await python(seed=7)
    assert tool.fork_level is ForkLevel.SNAPSHOT
    await tool.put_file("f.txt", b"data")
    await tool.run("import random, time; xs = [random.random(), time.time()]; f = open('f.txt'); f.read(2)")
    await tool.run("xs.append(1 / 0)")
    twin = await tool.fork()
    try:
        await tool.run("xs.append('parent'); f.read()")
        assert await twin.run("len(xs)") == "2"
        assert await twin.run("xs[:2]") == await tool.run("xs[:2]")  # a time cannot be repeated, only kept
        assert await twin.run("f.read()") == "'ta'"
        assert await twin.run("random.random()") == await tool.run("random.random()")
        await twin.run("xs.append('twin'); open('f.txt', 'w').write('twin')")
        assert await tool.run("xs[2:], open('f.txt').read()") == "(['parent'], 'data')"
    finally:
        await twin.close()


async def test_forks_of_forks_and_siblings(python):
    tool = await python()
    await tool.run("path = 'root'")
    twins = [await tool.fork() for _ in range(3)]
    for number, twin in enumerate(twins):
        await twin.run(f"path += '.{number}'")
    inner = await twins[1].fork()
    await tool.close()
    await twins[1].close()
    assert await inner.run("path + '.0'") == "'root.1.0'"
    assert [await twins[i].run("path") for i in (0, 2)] == ["'root.0'", "'root.2'"]
    for twin in (*twins, inner):
        await twin.close()


async def test_a_fork_can_have_random_numbers_of_its_own(python):
    tool = await python(rng="derive")
    await tool.run("import random, numpy")
    twins = [await tool.fork() for _ in range(2)]
    drawn = [await t.run("random.random(), numpy.random.rand()") for t in (tool, *twins)]
    for twin in twins:
        await twin.close()
    assert len(set(drawn)) == 3


async def test_what_cannot_be_forked_is_named(python):
    tool = await python()
    await tool.run(
        "import threading, os\nevent = threading.Event()\nthreading.Thread(target=event.wait).start()\np = os.pipe()"
    )
    with pytest.raises(ForkRefused, match=r"tool .python.*running thread.*pipe") as caught:
        await tool.fork()
    assert len(caught.value.reasons) == 3
    assert await tool.run("event.set(); 1") == "1"


async def test_a_fork_of_an_unused_tool_is_unused(python):
    tool = await python(seed=3)
    await tool.put_file("f", b"1")
    await tool.run("import os; os._exit(0)")
    twin = await tool.fork()
    assert await twin.run("open('f').read()") == await tool.run("open('f').read()") == "'1'"
    await twin.close()


async def test_a_setup_that_cannot_be_repeated_is_an_infrastructure_failure(python):
    tool = await python()
    await tool.exec("import time")  # starts the zygote, which takes longer than the cell may wait
    await tool.exec(f"assert time.time() < {__import__('time').time() + 0.3}")
    await asyncio.sleep(0.4)
    await tool.run("import os; os._exit(1)")
    with pytest.raises(SandboxError, match=r"ended with error instead of ok.*cannot be repeated"):
        await tool.run("1")


async def test_a_cancelled_cell_takes_its_session_along(python):
    tool = await python()
    await tool.exec("given = 5")
    await tool.run("own = 1")
    running = asyncio.create_task(tool.run("import time; time.sleep(3)"))
    await asyncio.sleep(0.1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert await tool.run("given") == "5"
    assert "NameError" in await tool.run("own")


async def test_sandbox_failures_are_raised_not_read():
    class Failing:
        async def open(self, profile, **options):
            return self

        async def exec(self, code, deadline):
            raise SandboxError("the zygote died")

        async def close(self):
            pass

    with pytest.raises(SandboxError):
        await dispatch({"python": make_tool("python", sandbox=Failing())}, ToolCall("a", "python", {"code": "1"}))


async def test_text_that_is_no_unicode_is_a_message(python):
    tool = await python()
    await tool.run("x = 1")
    result = await dispatch({"python": tool}, ToolCall("a", "python", {"code": "y = '\ud800'"}))
    assert "surrogates not allowed" in result.content
    assert await tool.run("x") == "1"


async def test_the_record_protocol_is_the_sandboxs():
    assert [*ExecResult.__dataclass_fields__] == ["status", "output", "error", "state_kept", "seconds"]


def test_one_manager_per_loop():
    async def managers():
        one, two = shared_sandbox(), shared_sandbox()
        assert one is two
        session = await one.open()
        result = await session.exec("1 + 1")
        await close_shared_sandboxes()
        await close_shared_sandboxes()
        return one, result.output.strip()

    (first, two), (second, again) = asyncio.run(managers()), asyncio.run(managers())
    assert first is not second
    assert (two, again) == ("2", "2")
