from __future__ import annotations

import asyncio
import threading
import time

import pytest

from agentrl.errors import ForkRefused, ToolInfrastructureError, ToolSchemaError
from agentrl.tool import MAX_RESULT_CHARS, Tool, dispatch, dispatch_all, tool
from agentrl.types import ForkLevel, ToolCall


@tool
async def nap(seconds: float) -> str:
    """Sleep.

    Args:
        seconds: how long.
    """
    await asyncio.sleep(seconds)
    return f"slept {seconds:g}"


@tool(timeout=0.05)
async def stuck(reason: str = "none") -> str:
    """Never end.

    Args:
        reason: why.
    """
    await asyncio.Event().wait()
    return reason


@tool
def area(width: float, height: float = 2.0) -> str:
    """Area of a rectangle.

    Args:
        width: width in metres.
        height: height in metres.
    """
    if width < 0:
        raise ValueError("a negative width")
    return f"{width * height:g}"


@tool
async def broken(query: str) -> str:
    """Fail.

    Args:
        query: anything.
    """
    raise ToolInfrastructureError("the server is down")


TOOLS = {t.name: t for t in (nap, stuck, area, broken)}


def test_a_function_becomes_a_schema():
    function = area.schema["function"]
    assert function["name"] == "area"
    assert function["description"] == "Area of a rectangle."
    assert function["parameters"]["properties"]["width"] == {"type": "number", "description": "width in metres."}
    assert function["parameters"]["required"] == ["width"]


def test_a_function_without_descriptions_is_refused():
    def mute(x: int) -> int:
        return x

    def untyped(x):
        """Do.

        Args:
            x: a number.
        """

    for function in (mute, untyped):
        with pytest.raises(ToolSchemaError, match=f"{function.__name__}.*Google-style"):
            tool(function)


async def test_calls_of_one_turn_run_at_the_same_time_and_keep_their_order():
    both = asyncio.Barrier(2)  # one after the other, they would wait for ever

    @tool(timeout=10)
    async def meet(name: str) -> str:
        """Wait for the other.

        Args:
            name: who waits.
        """
        await both.wait()
        await asyncio.sleep(0.02 if name == "slow" else 0)
        return name

    calls = (ToolCall("a", "meet", {"name": "slow"}), ToolCall("b", "meet", {"name": "fast"}))
    results = await dispatch_all({"meet": meet}, calls)
    assert [(r.call_id, r.content, r.error) for r in results] == [("a", "slow", None), ("b", "fast", None)]


async def test_synchronous_tools_do_not_block_each_other():
    both = threading.Barrier(2, timeout=10)

    @tool
    def block() -> str:
        """Block a thread until the other one is there."""
        both.wait()
        return "done"

    results = await dispatch_all({"block": block}, (ToolCall("a", "block"), ToolCall("b", "block")))
    assert [r.content for r in results] == ["done", "done"]


async def test_a_slow_tool_meets_its_deadline_and_is_named():
    result = await dispatch(TOOLS, ToolCall("a", "stuck"))
    assert result.error == "timeout"
    assert "'stuck' did not finish within 0.05 s" in result.content


async def test_a_timeout_raised_inside_a_tool_is_its_own_exception():
    @tool
    async def impatient() -> str:
        """Raise TimeoutError."""
        raise TimeoutError("upstream")

    result = await dispatch({"impatient": impatient}, ToolCall("a", "impatient"))
    assert (result.error, result.content) == ("exception", "TimeoutError: upstream")


async def test_an_unknown_tool_gets_the_nearest_name():
    result = await dispatch(TOOLS, ToolCall("a", "areas", {"width": 1}))
    assert result.error == "unknown_tool"
    assert "Did you mean 'area'?" in result.content
    assert "area, broken, nap, stuck" in result.content


@pytest.mark.parametrize(
    ("arguments", "part"),
    [({}, "width: Field required"), ({"width": "wide"}, "width: "), ({"width": 1, "depth": 2}, "depth: Extra inputs")],
)
async def test_wrong_arguments_are_explained(arguments, part):
    result = await dispatch(TOOLS, ToolCall("a", "area", arguments))
    assert result.error == "arguments"
    assert part in result.content
    assert "width in metres" in result.content


async def test_arguments_are_converted_and_defaults_kept():
    assert (await dispatch(TOOLS, ToolCall("a", "area", {"width": "3"}))).content == "6"


async def test_a_malformed_call_is_answered_with_its_error():
    result = await dispatch(TOOLS, ToolCall("a", "", error="not JSON"))
    assert (result.content, result.error) == ("not JSON", "malformed")


async def test_an_exception_is_a_message_and_an_infrastructure_failure_is_not():
    result = await dispatch(TOOLS, ToolCall("a", "area", {"width": -1}))
    assert (result.content, result.error) == ("ValueError: a negative width", "exception")
    with pytest.raises(ToolInfrastructureError, match="server is down"):
        await dispatch(TOOLS, ToolCall("a", "broken", {"query": "x"}))


async def test_an_infrastructure_failure_cancels_the_other_calls_of_the_turn():
    began = time.perf_counter()
    with pytest.raises(ToolInfrastructureError):
        await dispatch_all(TOOLS, (ToolCall("a", "nap", {"seconds": 5}), ToolCall("b", "broken", {"query": "x"})))
    assert time.perf_counter() - began < 1


async def test_results_are_text_and_cut():
    @tool
    def big(n: int) -> dict:
        """Give much.

        Args:
            n: how much.
        """
        return {"x": "y" * n}

    assert (await dispatch({"big": big}, ToolCall("a", "big", {"n": 1}))).content == '{"x": "y"}'
    content = (await dispatch({"big": big}, ToolCall("a", "big", {"n": MAX_RESULT_CHARS}))).content
    assert len(content) < MAX_RESULT_CHARS + 60
    assert content.endswith("more characters cut]")


async def test_fork_levels():
    assert await area.fork() is area

    class Stateful(Tool):
        name = "stateful"
        fork_level = ForkLevel.REPLAY

    with pytest.raises(ForkRefused, match=r"stateful.*replay"):
        await Stateful().fork()


async def test_hung_synchronous_tools_starve_nobody():
    release = threading.Event()

    @tool(timeout=0.2)
    def hang() -> str:
        """Hang."""
        release.wait(30)
        return "late"

    @tool(timeout=10)
    def quick() -> str:
        """Answer."""
        return "here"

    tools = {"hang": hang, "quick": quick}
    try:
        hung = await dispatch_all(tools, tuple(ToolCall(str(i), "hang") for i in range(40)))
        assert {r.error for r in hung} == {"timeout"}
        assert (await dispatch_all(tools, (ToolCall("q", "quick"),)))[0].content == "here"
    finally:
        release.set()
