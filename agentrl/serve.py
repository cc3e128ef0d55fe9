"""``agentrl serve MODEL``: starts ``vllm serve`` with what agentrl needs of it, and waits until it can be sampled from.

Whoever has the token can sample there, and make the server load files that it can read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from agentrl._serving import find_token, flag, is_loopback
from agentrl.errors import ConfigError, SamplerError, UnknownName, UserError
from agentrl.sampler.server_wire import TOKEN_VARIABLE

PASSED_ON = "vllm."
"""What follows it in a flag is an option of ``vllm serve``."""
Kind = Literal["file", "ipc", "nccl", "adapter"]
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.5
_IMPATIENT_SECONDS = 1.0  # `timeout` and terminals send a signal to the process and to its group
_KEPT_LINES, _SHOWN_LINES = 400, 5
_ERROR = re.compile(r"(?:^|(?<=\] ))(?:\w+\.)*\w*(?:Error|Exception): .*")
_MEMORY = ("out of memory", "no available memory", "cache blocks", "cannot allocate memory")
_KEEP_SECONDS = 75
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Options of ``agentrl serve``; each is a flag.

    Args:
        model: a Hugging Face folder.
        host: address to listen on; default 127.0.0.1, which only this machine can reach.
        port: default 8000; 0 takes a free one.
        max_slots: requests at once; default 256.
        max_length: most tokens of a sequence; default 1024.
        tensor_parallel_size: GPUs that share the model; default 1.
        dtype: of the weights, by vLLM's names; default: the model's, on the CPU float32.
        transport: how new weights come: file (default), adapter, ipc or nccl; as ``sampler.transport`` of the run.
        token_file: file with the token; default the variable ``AGENTRL_SERVER_TOKEN``, else a new one is printed.
        vllm: further options of ``vllm serve``; they win.

    Raises:
        ConfigError: one of them is out of its range.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    max_slots: int = 256
    max_length: int = 1024
    tensor_parallel_size: int = 1
    dtype: str | None = None
    transport: Kind = "file"
    token_file: str | None = None
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"--{flag(name)} must be a whole number from {low} to {high}, got {value!r}.")
        if self.transport not in get_args(Kind):
            raise ConfigError(f"--transport must be one of {', '.join(get_args(Kind))}, got {self.transport!r}.")
        for name in ("model", "host", "dtype", "token_file"):
            value = getattr(self, name)
            if not isinstance(value, str | None) or value == "":
                raise ConfigError(f"--{flag(name)} needs a value, got {value!r}.")


_RANGES = {
    "port": (0, 65535),
    "max_slots": (1, 65_536),
    "max_length": (2, 16_777_216),
    "tensor_parallel_size": (1, 1024),
}


@dataclass(slots=True)
class Served:
    """A server that can be sampled from."""

    url: str
    process: asyncio.subprocess.Process


def read_options(model: str, flags: Mapping[str, Any]) -> ServeOptions:
    """Options from parsed flags.

    Raises:
        UnknownName: there is no such flag.
        ConfigError: a value is out of its range.
    """
    names = {each.name for each in fields(ServeOptions)} - {"model", "vllm"}
    own, passed = {}, {}
    for name, value in flags.items():
        if name == "token":
            raise ConfigError(
                f"every user of this machine can read the command line: give --token-file, or set {TOKEN_VARIABLE}."
            )
        if name.startswith(PASSED_ON):
            passed[name.removeprefix(PASSED_ON)] = value
        elif name in names:
            own[name] = value
        else:
            known = [*(f"--{flag(each)}" for each in names), "--vllm.OPTION"]
            raise UnknownName("option of agentrl serve:", f"--{flag(name)}", known)
    return ServeOptions(model, **own, vllm=passed)


def check_startable(options: ServeOptions) -> None:
    """Look for what a server needs.

    Raises:
        UserError: the model is no folder, or vLLM is not installed.
    """
    if not (Path(options.model) / "config.json").is_file():
        raise UserError(f"{options.model} is no model: expected a Hugging Face folder, with a config.json.")
    if importlib.util.find_spec("vllm") is None:
        raise UserError("agentrl serve needs vLLM: pip install 'agentrl[vllm]'; on the CPU see docs/vllm.md.")


@contextlib.asynccontextmanager
async def serving(options: ServeOptions, token: str, tell: Callable[[str], None] = print) -> AsyncIterator[Served]:
    """Start a server and wait until it is healthy; it ends, with all its processes, when this is left.

    Args:
        options: its options.
        token: what clients have to show.
        tell: hears how it is coming along.

    Raises:
        UserError: vLLM is not installed, or the model is no folder.
        SamplerError: the server ended before it was ready; its last words are in the message.
    """
    check_startable(options)
    from agentrl.sampler.board import Board
    from agentrl.sampler.vllm_engine import engine_environment

    port = options.port or _free_port(options.host)
    url = f"http://{f'[{options.host}]' if ':' in options.host else options.host}:{port}"
    folder = Path(tempfile.mkdtemp(prefix="agentrl-serve-", dir="/dev/shm"))
    try:
        board = Board.create(folder / "board", options.max_slots, options.max_length)
        with engine_environment(options.transport, folder):
            own = {TOKEN_VARIABLE: token, "VLLM_API_KEY": token, "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(_KEEP_SECONDS)}
            environment = {"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **own}
        libc = ctypes.CDLL(None)
        process = await asyncio.create_subprocess_exec(
            *command(options, board, port),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # so that its engine's processes can be ended with it
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),  # not to outlive a kill -9 of this one
        )
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        reading = asyncio.create_task(_pass_on(process, lines), name="output of vllm serve")
        try:
            await _wait_until_ready(url, token, process, reading, lines, tell)
            shutil.rmtree(folder)  # all have it open by now; so it cannot be left behind
            yield Served(url, process)
        finally:
            await _stop(process)
            await reading
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command(options: ServeOptions, board: Any, port: int) -> list[str]:
    """The command line of ``vllm serve``, with the arguments that the in-process engine gets."""
    from agentrl.sampler.vllm_engine import engine_arguments

    wanted: dict[str, Any] = {"tensor_parallel_size": options.tensor_parallel_size}
    if options.dtype is not None:
        wanted["dtype"] = options.dtype
    sizes = options.max_slots, options.max_length
    arguments = engine_arguments(options.model, board, *sizes, options.transport, {**wanted, **options.vllm})
    arguments = {
        "host": options.host,
        "port": port,
        "middleware": "agentrl.sampler.vllm_endpoint.Endpoint",
        "api_server_count": 1,  # slots of the board are given out in one process
        "uvicorn_log_level": "warning",
        "disable_uvicorn_access_log": True,
    } | arguments
    model = arguments.pop("model")
    words = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    for name, value in arguments.items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag(name)}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag(name)}", *map(str, value)]
        else:
            words += [f"--{flag(name)}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


async def serve(options: ServeOptions, token: str) -> int:
    """Serve until the server ends, and return its exit status.

    SIGTERM and SIGINT are passed on to it; another one, a little later, kills it.
    """
    work = asyncio.create_task(_serve(options, token))
    loop = asyncio.get_running_loop()
    asked: list[float] = []

    def stop() -> None:
        if not asked or loop.time() > asked[0] + _IMPATIENT_SECONDS:
            work.cancel()
        asked.append(loop.time())

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return await work


def run(options: ServeOptions) -> int:
    """The command: find the token, warn of what is open, serve; returns the exit status.

    Raises:
        UserError: the token or an option cannot be used.
        SamplerError: the server did not start.
    """
    check_startable(options)
    token = find_token(TOKEN_VARIABLE, options.token_file)
    if not is_loopback(options.host):
        print(
            f"agentrl: warning: {options.host} can be reached from other machines and there is no TLS: whoever listens "
            "on the way sees the token. Better: tunnel to 127.0.0.1, or put a proxy with TLS before it.",
            file=sys.stderr,
        )
    return asyncio.run(serve(options, token))


async def _serve(options: ServeOptions, token: str) -> int:
    process: asyncio.subprocess.Process | None = None
    with contextlib.suppress(asyncio.CancelledError):
        async with serving(options, token, lambda text: print(f"agentrl: {text}", file=sys.stderr)) as served:
            process = served.process
            print(f"server: {served.url}", flush=True)
            print(
                f"train with it: --sampler.backend vllm_server --sampler.urls '[\"{served.url}\"]' "
                f"--sampler.max_length {options.max_length}",
                flush=True,
            )
            await process.wait()
    status = 0 if process is None or process.returncode is None else process.returncode
    return 128 - status if status < 0 else status


async def _wait_until_ready(
    url: str,
    token: str,
    process: asyncio.subprocess.Process,
    reading: asyncio.Task[None],
    lines: deque[str],
    tell: Callable[[str], None],
) -> None:
    """Poll vLLM's health, and then our part of it.

    Raises:
        SamplerError: the process ended.
    """
    import httpx

    began, told = time.monotonic(), 0.0
    headers = {"authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=5.0) as client:
        for path in ("/health", "/agentrl/info"):
            while True:
                if process.returncode is not None:
                    await reading
                    raise _ended(process.returncode, lines)
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get(path)).status_code == 200:
                        break
                seconds = time.monotonic() - began
                if seconds >= told + 10:
                    told = seconds
                    tell(f"vllm serve is starting, {seconds:.0f} s")
                await asyncio.sleep(_POLL_SECONDS)
    tell(f"vllm serve is ready after {time.monotonic() - began:.0f} s")


def _ended(status: int, lines: deque[str]) -> SamplerError:
    said = "\n".join(lines).lower()
    hint = ""
    if status == -signal.SIGKILL or any(words in said for words in _MEMORY):
        hint = " Was there too little memory? Less is needed with --max-slots, --max-length or --vllm.dtype bfloat16."
    elif "max_model_len" in said:
        hint = " Give --max-length, at most what the model takes."
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    errors = dict.fromkeys(found[0] for line in lines if (found := _ERROR.search(line)))
    last = [line for line in list(lines)[-_SHOWN_LINES:] if not any(error in line for error in errors)]
    words = "\n".join([*errors, *last])
    return SamplerError(f"vllm serve {how} before it was ready.{hint} Errors and last words:\n{words}")


async def _pass_on(process: asyncio.subprocess.Process, lines: deque[str]) -> None:
    """Show what the server says, and remember the end of it."""
    assert process.stdout is not None
    while True:
        try:
            line = await process.stdout.readline()
        except ValueError:  # longer than a line should be, and dropped; the pipe must not fill up
            continue
        if not line:
            return
        text = line.decode(errors="replace").rstrip()
        lines.append(text)
        print(text, file=sys.stderr, flush=True)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End the server, kindly at first; and whatever it left behind."""
    try:
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            process.terminate()
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, 0), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise UserError(f"cannot listen on {host}: {error.strerror or error}.") from error
