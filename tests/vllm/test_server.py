"""``agentrl serve`` and its client, for real: killed, stopped, restarted, overloaded, and asked for what it is not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch

from agentrl.errors import SamplerError
from agentrl.sampler.server_wire import encode_params
from agentrl.sampler.vllm_connection import Server, Unreachable
from agentrl.sampler.vllm_server import VLLMServerSampler
from agentrl.serve import ServeOptions, serving
from agentrl.tiny import build_model, build_tokenizer, save_policy
from agentrl.types import SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]  # a start takes 15 s on an idle machine, and it seldom is

TOKEN = "a-token-of-the-tests"
SLOTS, LENGTH = 8, 512
PROMPT = tuple(range(30, 71))
LONG = SamplingParams(300, seed=4)


class Runner:
    """A server that can be killed and started again at the same address."""

    def __init__(self, folder):
        self.folder, self.port, self._stack = folder, 0, AsyncExitStack()

    async def start(self):
        options = ServeOptions(str(self.folder), port=self.port, max_slots=SLOTS, max_length=LENGTH)
        self._stack = AsyncExitStack()
        served = await self._stack.enter_async_context(serving(options, TOKEN))
        self.url, self.process = served.url, served.process
        self.port = int(served.url.rsplit(":", 1)[1])
        return self

    async def stop(self):
        await self._stack.aclose()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)

    def engine(self):
        (child,) = [p for p in psutil.Process(self.process.pid).children() if "EngineCore" in p.name()]
        return child


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(tokenizer, hidden=128, layers=2, context=LENGTH, seed=1)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_policy(model, tokenizer, folder)
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def runners(folder):
    pair = [Runner(folder), Runner(folder)]
    await asyncio.gather(*(runner.start() for runner in pair))
    yield pair
    await asyncio.gather(*(runner.stop() for runner in pair))


@pytest_asyncio.fixture(loop_scope="session")
async def connect(model, tokenizer):
    """``await connect(*runners, **options)``: a client, closed at the end."""
    made = []

    async def start(*runners, **options):
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        options = {"shapes": shapes, "tokenizer": tokenizer, "vocabulary": model.config.vocab_size} | options
        options = {"max_length": LENGTH, "token": TOKEN, "patience": 250.0} | options
        if "version" not in options:
            server = Server(runners[0].url, TOKEN)
            options["version"] = (await server.info())["version"]
            await server.close()
        made.append(await VLLMServerSampler.start([runner.url for runner in runners], **options))
        return made[-1]

    yield start
    for sampler in made:
        await sampler.close()


def moved(model, scale=0.05):
    """Its parameters, a little away from where they are."""
    torch.manual_seed(0)
    return {name: p.detach() + scale * torch.randn_like(p) for name, p in model.named_parameters()}


def versions_of(model, version):
    return moved(model) if version % 2 else dict(model.named_parameters())


async def ready(*samplers, model, version):
    """Every server has ``version`` of the weights, whatever the test before left there."""
    for sampler in samplers:
        await sampler.update_weights(versions_of(model, version), version)


async def infos(sampler):
    return [await server.info() for server in sampler.servers]


async def idle(sampler):
    async with asyncio.timeout(5):
        while any(info["requests"] or info["waiting"] for info in await infos(sampler)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def equal(events, done):
    assert [event.token_id for event in events] == list(done.token_ids)
    assert [event.logprob for event in events] == pytest.approx(list(done.logprobs), abs=1e-4)
    assert [event.entropy for event in events] == pytest.approx(list(done.entropies), abs=1e-4)
    assert [event.policy_version for event in events] == list(done.policy_version)
    assert events[-1].stop_reason is done.stop_reason


async def test_siblings_go_to_one_server_and_find_their_prompt_there(runners, connect, model):
    sampler = await connect(*runners)
    await ready(sampler, model=model, version=1)
    prompts = [tuple((7 * i + k) % 440 for i in range(200)) for k in range(2)]
    before = await infos(sampler)
    for prompt in prompts:  # one of each comes first, as the root of a tree does
        await sampler.sample(prompt, SamplingParams(1))
    await asyncio.gather(*(sampler.sample(p, SamplingParams(8, seed=s)) for p in prompts for s in range(3)))
    after = await infos(sampler)
    asked = [b["prompt_tokens"] - a["prompt_tokens"] for a, b in zip(before, after, strict=True)]
    reused = [b["reused_tokens"] - a["reused_tokens"] for a, b in zip(before, after, strict=True)]
    assert asked == [800, 800], "all of a prompt on one server"
    assert sum(reused) == 6 * 192, "all full blocks of 32 tokens, of every sibling"
    await sampler.count()
    assert sampler.reused_tokens == sum(info["reused_tokens"] for info in after)


async def test_leaving_frees_the_slot(runners, connect):
    sampler = await connect(runners[0])
    streams = [sampler.stream(PROMPT, SamplingParams(400, seed=s)) for s in range(SLOTS)]
    for stream in streams:
        await anext(stream)
    assert (await infos(sampler))[0]["requests"] == SLOTS
    for stream in streams[1:]:
        await stream.aclose()
    cancelled = asyncio.create_task(sampler.sample(PROMPT, SamplingParams(400)))
    await asyncio.sleep(0.05)
    cancelled.cancel()
    await streams[0].aclose()
    await idle(sampler)


def body_of(server, name, **changes):
    body = {"id": name, "token_ids": list(PROMPT), "params": encode_params(SamplingParams(400)), "start": 0}
    return body | {"pieces": True, "revisions": list(server.revisions)} | changes


async def test_the_same_id_again_ends_the_older_request_and_abort_ends_any(runners, connect):
    sampler = await connect(runners[0])
    (server,) = sampler.servers
    older = server.sample(body_of(server, "x"))
    await anext(older)
    newer = server.sample(body_of(server, "x"))
    await anext(newer)
    with pytest.raises(Unreachable, match="ended here"):
        async for _ in older:
            pass
    assert (await server.info())["requests"] == 1
    assert await server._one("POST", "abort", {"ids": ["x", "y"]}) == {"aborted": ["x"]}
    with pytest.raises(Unreachable, match="ended here"):
        async for _ in newer:
            pass
    await idle(sampler)


async def test_too_many_who_wait_are_sent_away(runners, connect):
    sampler = await connect(runners[0])
    (server,) = sampler.servers

    async def ask(number):
        body = body_of(server, f"crowd {number}", pieces=False, params=encode_params(SamplingParams(200, seed=number)))
        return [piece async for piece in server.sample(body)]

    found = await asyncio.gather(*(ask(number) for number in range(8 * SLOTS)), return_exceptions=True)
    refused = [each for each in found if isinstance(each, Unreachable)]
    assert len(refused) == 3 * SLOTS, "slots, and four times as many who wait"
    assert all(each.seconds == 1.0 and "running or waiting" in str(each) for each in refused)
    await idle(sampler)


async def test_a_stopped_server_is_taken_for_gone_and_found_again(runners, connect):
    sampler = await connect(runners[0], silent_seconds=1.0)
    expected = await sampler.sample(PROMPT, LONG)
    process = psutil.Process(runners[0].process.pid)
    stream = sampler.stream(PROMPT, LONG)
    events = [await anext(stream) for _ in range(20)]
    process.suspend()
    try:
        reading = asyncio.create_task(collect(stream))
        await asyncio.sleep(2.5)
    finally:
        process.resume()
    equal(events + await reading, expected)
    await idle(sampler)


async def collect(stream):
    return [event async for event in stream]


# -- what is refused --------------------------------------------------------------------------------------------------


async def test_another_model_or_tokenizer_is_refused(runners, connect, model, tokenizer):
    url = runners[0].url
    with pytest.raises(
        SamplerError, match=rf"{url} serves something else .*expected policy 1 parameters.*, found \d\d"
    ):
        await connect(runners[0], shapes={"a": (2, 3)})
    other = build_tokenizer(["other words altogether, and still others"], vocab=300)
    with pytest.raises(SamplerError, match=rf"{url} .*expected tokenizer \d+ tokens, .* found {len(tokenizer)} tokens"):
        await connect(runners[0], tokenizer=other)
    with pytest.raises(SamplerError, match="expected vocabulary"):
        await connect(runners[0], vocabulary=model.config.vocab_size + 1)
    with pytest.raises(SamplerError, match=rf"{url} takes {LENGTH} tokens a sequence, expected {LENGTH + 1}"):
        await connect(runners[0], max_length=LENGTH + 1)
    with pytest.raises(SamplerError, match=f"{url} refused the token"):
        await connect(runners[0], token="another-token-of-the-tests")


async def test_version_skew_is_an_error(runners, connect, model):
    sampler = await connect(runners[0])
    await ready(sampler, model=model, version=1)
    behind = await connect(runners[0], version=2)
    with pytest.raises(SamplerError, match="has version 1 of the weights, expected 2"):
        await behind.sample(PROMPT, SamplingParams(4))
    await ready(behind, model=model, version=2)
    assert set((await behind.sample(PROMPT, SamplingParams(4))).policy_version) == {2}
    with pytest.raises(SamplerError, match="somebody else gave weights"):
        await sampler.sample(PROMPT, SamplingParams(4))


async def test_weights_of_another_client_end_our_requests_whatever_their_version_is_called(runners, connect, model):
    ours = await connect(runners[0])
    await ready(ours, model=model, version=4)
    other = await connect(runners[0])
    stream, events = ours.stream(PROMPT, SamplingParams(300, seed=1)), []

    async def read():
        async for event in stream:
            events.append(event)

    reading = asyncio.create_task(read())
    while len(events) < 5:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await other.update_weights(moved(model), 4)
    with pytest.raises(SamplerError, match="somebody else gave weights"):
        await reading
    alone = await connect(runners[0])
    await alone.update_weights(versions_of(model, 4), 4)
    equal(events[:-1], cut(await alone.sample(PROMPT, SamplingParams(len(events) - 1, seed=1))))
    for sampler in (ours, other):
        with pytest.raises(SamplerError, match="somebody else gave weights"):
            await sampler.update_weights(dict(model.named_parameters()), 5)


def cut(done):
    """``done``, as far as a stream that was broken off: no reason to stop."""
    return replace(done, stop_reason=None)


async def test_one_server_by_two_names_is_refused(runners, connect):
    with pytest.raises(SamplerError, match="names one server twice"):
        await connect(runners[0], runners[0])


async def test_what_cannot_be_served_is_refused_by_the_server_too(runners, connect, model, tmp_path):
    sampler = await connect(runners[0])
    await ready(sampler, model=model, version=1)
    (server,) = sampler.servers
    for changes, message in (
        ({"token_ids": [1] * LENGTH}, f"a prompt of {LENGTH} tokens cannot be continued"),
        ({"token_ids": [9999]}, "token id 9999"),
        ({"params": {"max_tokens": 4, "beams": 2}}, "not a request for tokens"),
        ({"token_ids": None}, "not a request for tokens"),
    ):
        with pytest.raises(SamplerError, match=message):
            await anext(server.sample(body_of(server, "z", **changes)))
    with pytest.raises(SamplerError, match=r"not a whole safetensors file.*sampler.weights_dir"):
        await server.receive("load_files", files=[str(tmp_path / "nowhere.safetensors")], version=9)
    with pytest.raises(SamplerError, match=r"does not take these arguments"):
        await server.receive("load_files", version=9)
    with pytest.raises(Unreachable, match="takes no weights"):
        await server.receive("close")
    assert set((await sampler.sample(PROMPT, SamplingParams(4))).policy_version) == {1}, "and nothing is broken"


# -- what dies --------------------------------------------------------------------------------------------------------


async def test_killed_in_mid_request_and_restarted_it_goes_on_with_the_same_tokens(runners, connect, model):
    runner = runners[0]
    sampler = await connect(runner)
    await ready(sampler, model=model, version=3)
    expected = await sampler.sample(PROMPT, LONG)
    beside = await sampler.sample(PROMPT[:9], LONG)
    waiting = asyncio.create_task(sampler.sample(PROMPT[:9], LONG))
    stream = sampler.stream(PROMPT, LONG)
    events = [await anext(stream) for _ in range(40)]
    runner.kill()
    reading = asyncio.create_task(collect(stream))
    await runner.stop()
    assert not reading.done()
    await runner.start()
    equal(events + await reading, expected)  # of version 3: the restarted server was given its weights again
    again = await waiting
    assert again.token_ids == beside.token_ids
    assert set(again.policy_version) == {3}


async def test_one_of_two_dies_and_the_other_takes_over(runners, connect, model):
    sampler = await connect(*runners)
    await ready(sampler, model=model, version=5)
    prompts = [tuple(range(k, k + 20)) for k in range(12)]
    expected = [await sampler.sample(prompt, LONG) for prompt in prompts]
    jobs = [asyncio.create_task(sampler.sample(prompt, LONG)) for prompt in prompts]
    stream = sampler.stream(PROMPT, LONG)
    await anext(stream)
    runners[1].engine().kill()  # as the kernel does when memory is short; the HTTP server lives a little longer
    assert [done.token_ids for done in await asyncio.gather(*jobs)] == [done.token_ids for done in expected]
    assert len(await collect(stream)) == 299
    async with asyncio.timeout(20):
        await runners[1].process.wait()
    alone = await connect(runners[0], version=5)
    await alone.sample(PROMPT, SamplingParams(4))
    with pytest.raises(SamplerError, match=rf"{runners[1].url} does not answer: ConnectError"):
        await connect(*runners, version=5)
    sampler._turns.patience = 2.0
    with pytest.raises(SamplerError, match=rf"{runners[1].url} did not take new weights"):
        await ready(sampler, model=model, version=6)
    assert set((await sampler.sample(PROMPT, SamplingParams(4))).policy_version) == {5}
    await runners[1].stop()
    await runners[1].start()
    await ready(sampler, model=model, version=6)
    found = await asyncio.gather(*(sampler.sample(prompt, SamplingParams(4)) for prompt in prompts))
    assert {version for done in found for version in done.policy_version} == {6}


# -- the command ------------------------------------------------------------------------------------------------------


async def command(folder, *words):
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "agentrl", "serve", str(folder), "--port", "0", "--max-slots", "4"),
        *("--max-length", str(LENGTH), *words),
        env={**os.environ, "AGENTRL_SERVER_TOKEN": TOKEN},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_the_command_serves_until_it_is_told_to_stop(folder):
    before = set(Path("/dev/shm").glob("agentrl-serve-*"))  # noqa: ASYNC240
    asked, killed = await command(folder), await command(folder)
    for process in (asked, killed):
        url = (await process.stdout.readline()).decode().removeprefix("server: ").strip()
        assert url in (await process.stdout.readline()).decode()
        server = Server(url, TOKEN)
        assert (await server.info())["max_slots"] == 4
        await server.close()
    assert set(Path("/dev/shm").glob("agentrl-serve-*")) <= before  # noqa: ASYNC240
    children = [p for process in (asked, killed) for p in psutil.Process(process.pid).children(recursive=True)]
    assert len(children) >= 4
    asked.terminate()
    killed.kill()
    said = (await asked.communicate())[1].decode()
    with suppress(ProcessLookupError):
        await killed.communicate()
    assert asked.returncode == 0, said
    assert "is ready after" in said
    await asyncio.to_thread(psutil.wait_procs, children, timeout=20)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["--vllm.kv-cache-memory-bytes", "1000"], 1, ["too little memory", "ValueError: No available memory"]),
        (["--max-length", "99999"], 1, ["Give --max-length", "max_model_len (99999) is greater"]),
        (["--vllm.no-such-thing", "1"], 2, ["unrecognized arguments: --no-such-thing 1"]),
    ],
)
async def test_a_server_that_cannot_start_says_why(folder, words, status, says):
    process = await command(folder, *words)
    shown = (await process.communicate())[1].decode()
    assert process.returncode == 3
    said = shown[shown.rindex("agentrl: vllm serve ended") :]
    assert f"ended with status {status} before it was ready" in said
    assert all(each in said for each in says), said
