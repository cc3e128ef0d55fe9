"""Tools: a typed function with a Google-style docstring becomes a schema the model reads and a call it can make.

A stateless tool is a function, sync or async::

    @tool
    def area(width: float, height: float) -> str:
        '''Area of a rectangle.

        Args:
            width: width in metres.
            height: height in metres.
        '''
        return f"{width * height:g} m2"

A tool with state per episode subclasses ``Tool`` and overrides ``start``, ``run``, ``fork`` and ``close``.
``dispatch`` turns a ``ToolCall`` into a ``ToolResult``: whatever the policy did wrong, and whatever the tool's code
raised, becomes text the policy can read; only a failure of the tool's *infrastructure* is raised.
"""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, NotRequired, overload

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from agentrl.errors import ForkRefused, ToolInfrastructureError, ToolSchemaError
from agentrl.types import ForkLevel, ToolCall, ToolResult

MAX_RESULT_CHARS = 8_192


class Tool:
    """One tool of one episode.

    Attributes:
        name: what the policy calls it.
        schema: the OpenAI function schema shown to the policy.
        timeout: seconds that one call may take (default 10).
        fork_level: what ``fork`` guarantees; the default, ``copy``, suits tools without state.
        pure: whether a call gives the same result when the episode is played again, and changes nothing outside the
            episode; then calls may be repeated where a fork is refused. Default False.
    """

    name: str = ""
    timeout: float = 10.0
    fork_level: ForkLevel = ForkLevel.COPY
    pure: bool = False

    async def start(self, seed: int) -> None:
        """Called once at the start of an episode; ``seed`` feeds whatever randomness the tool has."""

    async def run(self, *args: Any, **kwargs: Any) -> str:
        """Do the work. Subclasses give it a typed signature and a docstring with an Args section."""
        raise NotImplementedError(f"{type(self).__name__} defines no run()")

    async def fork(self) -> Tool:
        """A tool in the same state, independent from now on.

        Raises:
            ForkRefused: where the state cannot be forked.
        """
        if self.fork_level is ForkLevel.COPY and type(self).close is Tool.close:
            return self
        closing = " and has a close()" if self.fork_level is ForkLevel.COPY else ""
        raise ForkRefused(f"tool {self.name!r} declares fork level {self.fork_level}{closing} but defines no fork().")

    async def close(self) -> None:
        """Called once at the end of an episode."""

    @property
    def schema(self) -> dict[str, Any]:
        """The OpenAI function schema, from ``run``'s signature and docstring."""
        return _schema(_function_of(self), self.name)

    def validate(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """``arguments`` checked and converted to the types of ``run``; raises pydantic's ``ValidationError``."""
        return _arguments_check(_function_of(self))(arguments)


class FunctionTool(Tool):
    """A plain function as a tool. A sync one runs in a thread of its own, so that it cannot stall other episodes."""

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, timeout: float = 10.0, pure: bool = False
    ) -> None:
        self.function = function
        self.name = name or function.__name__
        self.timeout, self.pure = timeout, pure
        self._awaited = inspect.iscoroutinefunction(function)
        _schema(function, self.name)
        _arguments_check(function)  # not in the first call: it takes milliseconds

    async def run(self, *args: Any, **kwargs: Any) -> str:
        """Call the function."""
        if self._awaited:
            return _as_text(await self.function(*args, **kwargs))
        return _as_text(await _in_own_thread(lambda: self.function(*args, **kwargs)))


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(
    *, name: str | None = None, timeout: float = 10.0, pure: bool = False
) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    timeout: float = 10.0,
    pure: bool = False,
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Make a tool of a function.

    Args:
        function: typed, with a docstring whose Args section describes every parameter.
        name: what the policy calls it; default the function's name.
        timeout: seconds that one call may take.
        pure: whether a call may be repeated; see ``Tool``.

    Raises:
        ToolSchemaError: a type hint or the description of a parameter is missing.
    """
    if function is not None:
        return FunctionTool(function)
    return lambda f: FunctionTool(f, name=name, timeout=timeout, pure=pure)


async def dispatch(tools: Mapping[str, Tool], call: ToolCall) -> ToolResult:
    """Run one call. Never raises for anything the policy or the tool's own code did.

    Raises:
        ToolInfrastructureError: the tool's backend failed; the episode is not the policy's to answer for.
    """
    if call.error is not None:
        return ToolResult(call.id, call.name, call.error, "malformed")
    found = tools.get(call.name)
    if found is None:
        return ToolResult(call.id, call.name, _unknown(call.name, tools), "unknown_tool")
    try:
        arguments = found.validate(call.arguments)
    except ValidationError as error:
        return ToolResult(call.id, call.name, _wrong_arguments(found, error), "arguments")
    began = time.perf_counter()
    failure: str | None = None
    try:
        async with asyncio.timeout(found.timeout) as deadline:
            content = _as_text(await found.run(**arguments))
    except TimeoutError as error:
        failure, content = "exception", f"TimeoutError: {error}"
        if deadline.expired():
            failure, content = "timeout", f"Tool {call.name!r} did not finish within {found.timeout:g} s."
    except (ToolInfrastructureError, ForkRefused):  # neither is the policy's doing
        raise
    except Exception as error:
        failure, content = "exception", f"{type(error).__name__}: {error}"
    return ToolResult(call.id, call.name, _cut(content), failure, time.perf_counter() - began)


async def dispatch_all(tools: Mapping[str, Tool], calls: tuple[ToolCall, ...]) -> tuple[ToolResult, ...]:
    """Run the calls of one turn concurrently; results in the order of the calls."""
    if len(calls) == 1:
        return (await dispatch(tools, calls[0]),)
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(dispatch(tools, call)) for call in calls]
    except* (ToolInfrastructureError, ForkRefused) as errors:
        raise errors.exceptions[0] from errors
    return tuple(task.result() for task in running)


async def _in_own_thread(work: Callable[[], Any]) -> Any:
    """Run ``work`` in a thread of its own.

    Not in asyncio's pool: a few calls that hang past their timeout would fill it, starve everybody else's calls, and
    keep the process from ending. A thread cannot be stopped; a daemon can at least be left behind.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if done.done():
            return
        if error is None:
            done.set_result(value)
        else:
            done.set_exception(error)

    def run() -> None:
        value: Any = None
        error: BaseException | None = None
        try:
            value = work()
        except BaseException as raised:
            error = RuntimeError("StopIteration") if isinstance(raised, StopIteration) else raised
        with suppress(RuntimeError):  # the loop may have been closed meanwhile
            loop.call_soon_threadsafe(settle, value, error)

    threading.Thread(target=run, name="agentrl-tool", daemon=True).start()
    return await done


def _function_of(found: Tool) -> Callable[..., Any]:
    return found.function if isinstance(found, FunctionTool) else type(found).run


@lru_cache(maxsize=256)
def _schema(function: Callable[..., Any], name: str) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # transformers raises several unrelated types here
        raise ToolSchemaError(
            f"cannot describe tool {name!r}: {error}. Expected type hints on every parameter and a Google-style "
            "docstring whose Args section describes each of them."
        ) from error
    schema["function"]["name"] = name
    schema["function"].pop("return", None)
    return schema


@lru_cache(maxsize=256)
def _arguments_check(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Checks a call's arguments. A typed dict, because a model's attributes would forbid names such as ``schema``."""
    hints = inspect.get_annotations(function, eval_str=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name != "self":
            hint = hints.get(parameter.name, Any)
            fields[parameter.name] = hint if parameter.default is parameter.empty else NotRequired[hint]
    closed = with_config(ConfigDict(extra="forbid", arbitrary_types_allowed=True))
    check: Callable[[Mapping[str, Any]], dict[str, Any]]
    check = TypeAdapter(closed(TypedDict("Arguments", fields))).validator.validate_python  # type: ignore[operator]
    return check


def _unknown(name: str, tools: Mapping[str, Tool]) -> str:
    near = difflib.get_close_matches(name, tools, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"Unknown tool {name!r}.{hint} Available: {', '.join(sorted(tools)) or 'none'}."


def _wrong_arguments(found: Tool, error: ValidationError) -> str:
    problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'arguments'}: {e['msg']}" for e in error.errors())
    expected = json.dumps(found.schema["function"]["parameters"]["properties"])
    return f"Wrong arguments for {found.name!r}: {problems}. Expected {expected}."


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _cut(text: str) -> str:
    if len(text) <= MAX_RESULT_CHARS:
        return text
    return f"{text[:MAX_RESULT_CHARS]}\n[{len(text) - MAX_RESULT_CHARS} more characters cut]"
