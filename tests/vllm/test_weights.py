"""Weights on their way into a real vLLM: every road arrives, every known way of not arriving is caught and named."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import socket
import subprocess
import sys

import pytest
import pytest_asyncio
import torch
from fixed_rollouts import fixed_rollouts
from safetensors.torch import save_file

from agentrl.config import load_config
from agentrl.errors import PolicyMismatch, SamplerError
from agentrl.handover import Handover
from agentrl.learner import suspects
from agentrl.learner.leader import Leader
from agentrl.learner.lora import save_adapter
from agentrl.learner.step import Learner
from agentrl.sampler.transport import Transport
from agentrl.sampler.vllm import VLLMSampler
from agentrl.tiny import build_model, save_policy
from agentrl.types import SamplingParams

pytestmark = pytest.mark.vllm

VOCABULARY, SIZES = 97, {"max_slots": 32, "max_length": 320}
PROMPT = tuple(range(1, 90))


def tiny_model(*, tied=True):
    """Logits as a trained policy has them, and heads of 32, which vLLM's attention on the CPU wants."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    made = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCABULARY, num_hidden_layers=2, head_dim=32, tie_word_embeddings=tied, **sizes)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 3.0)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model, with tied and with separate output layers, as Hugging Face folders."""
    made = {}
    for tied in (True, False):
        made[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        tiny_model(tied=tied).save_pretrained(made[tied])
    return made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(folders):
    sampler = await VLLMSampler.start(folders[True], **SIZES)
    yield sampler
    await sampler.close()


class Through:
    """The engine, except for what a test replaces."""

    def __init__(self, engine, **replaced):
        self._engine = engine
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._engine, name)


async def handing_over(sampler, model, **changes):
    fixed = {"train.lr": 1e-2, "train.warmup": 0, "train.max_gap": 1e9, "policy.lora_alpha": 64.0}
    config = load_config(None, fixed | {key.replace("__", "."): value for key, value in changes.items()})
    return Handover(sampler, Leader(Learner(model, config)), config)


@pytest_asyncio.fixture(loop_scope="session")
async def fresh(engine):
    """A sampler around the shared engine, which has the weights of ``tiny_model`` again; and its hand-over."""
    sampler = VLLMSampler(engine.engine, engine._board, engine.shapes, VOCABULARY, **SIZES)
    model = tiny_model()
    await sampler.update_weights(dict(model.named_parameters()), 0)
    return sampler, await handing_over(sampler, model)


def update(handover, seed=1):
    handover.leader.step(fixed_rollouts(seed, vocabulary=VOCABULARY))


async def caught(handover):
    await handover.probe()
    update(handover)
    with pytest.raises(PolicyMismatch) as failure:
        await handover(1)
    return failure.value


async def scores(sampler, seed=0):
    return await sampler.sample(PROMPT, SamplingParams(16, seed=seed))


def boards():
    return {name for name in os.listdir("/dev/shm") if name.startswith("agentrl-vllm-")}


# -- roads ------------------------------------------------------------------------------------------------------------


async def test_healthy_updates_pass_the_probe(fresh):
    sampler, handover = fresh
    await handover.probe()
    for version in (1, 2, 5):
        update(handover, version)
        found = await handover(version)
        assert found["probe/mean"] < found["probe/bound"] / 2
        assert found["probe/moved"] > 100 * found["probe/bound"], "a lost update would show"
    assert sampler.version == 5


async def test_a_checkpoint_folder_is_taken_and_nothing_stays_behind(fresh, tmp_path):
    sampler, handover = fresh
    before = await scores(sampler)
    update(handover)
    model = copy.deepcopy(handover.leader.learner.model)
    model.save_pretrained(tmp_path / "checkpoint")
    await sampler.update_weights(tmp_path / "checkpoint", 3)
    from_folder = await scores(sampler)
    assert from_folder.policy_version == (3,) * 16
    assert from_folder.logprobs != before.logprobs
    sampler.transport._folder = tmp_path
    await sampler.update_weights(handover.leader.weights(), 4)
    assert (await scores(sampler)).logprobs == pytest.approx(from_folder.logprobs, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


async def test_separate_output_layers_are_loaded_too(folders):
    sampler = await VLLMSampler.start(folders[False], **SIZES)
    try:
        handover = await handing_over(sampler, tiny_model(tied=False))
        await handover.probe()
        update(handover)
        await handover(1)
    finally:
        await sampler.close()


async def test_siblings_share_their_prefix_by_the_engines_own_count(fresh):
    sampler, _ = fresh
    prefix = list(range(1, 97)) * 3  # 288 tokens, 9 blocks of 32
    await sampler.sample(prefix, SamplingParams(1))
    before = sampler.reused_tokens
    await asyncio.gather(*(sampler.sample([*prefix, token], SamplingParams(4, seed=token)) for token in range(8)))
    assert sampler.reused_tokens - before == 8 * 288


async def test_an_update_empties_the_prefix_cache(fresh):
    sampler, handover = fresh
    await scores(sampler)
    before = sampler.reused_tokens
    await scores(sampler)
    assert sampler.reused_tokens - before == 64, "two blocks of 32"
    await sampler.update_weights(handover.leader.weights(), 1)
    before = sampler.reused_tokens
    await scores(sampler)
    assert sampler.reused_tokens == before


# -- planted failures -------------------------------------------------------------------------------------------------


async def test_a_lost_update_is_caught(fresh):
    sampler, handover = fresh

    async def rpc(method, args=()):
        if method != "agentrl_load":
            return await sampler.engine._engine.collective_rpc(method, args=args)
        await sampler.engine._engine.collective_rpc("agentrl_version", args=args[1:])
        return [len(sampler.shapes)]

    sampler.engine = Through(sampler.engine, collective_rpc=rpc)
    assert (await caught(handover)).group == suspects.UPDATE


async def test_a_stale_prefix_cache_is_caught(fresh):
    sampler, handover = fresh

    async def keep(**_):
        return True

    sampler.engine = Through(sampler.engine, reset_prefix_cache=keep)
    assert (await caught(handover)).group == "prefix cache"


@pytest.mark.parametrize(
    ("forgotten", "group"),
    [
        ("model.layers.1.mlp", "layers.1.mlp"),
        ("model.layers.0.self_attn", "layers.0.self_attn"),
        ("model.embed_tokens", "embedding and head"),
    ],
)
async def test_a_group_that_was_not_loaded_is_named(fresh, forgotten, group):
    sampler, handover = fresh
    old = {name: value.detach().clone() for name, value in handover.leader.weights().items()}
    send = sampler.transport.send

    async def partly(source, version, receivers):
        mixed = {name: old[name] if name.startswith(forgotten) else value for name, value in source.items()}
        await send(mixed, version, receivers)

    sampler.transport.send = partly
    failure = await caught(handover)
    assert failure.group == group
    assert group in str(failure)


async def test_half_loaded_weights_are_caught_and_the_place_is_named(fresh):
    sampler, handover = fresh
    old = {name: value.detach().clone() for name, value in handover.leader.weights().items()}
    cut = next(place for place, name in enumerate(old) if name.startswith("model.layers.1."))
    send = sampler.transport.send

    async def half(source, version, receivers):
        mixed = {name: value if place < cut else old[name] for place, (name, value) in enumerate(source.items())}
        await send(mixed, version, receivers)

    sampler.transport.send = half
    assert "layers.1" in (await caught(handover)).group


async def test_an_engine_that_failed_while_it_loaded_samples_no_more(fresh):
    sampler, handover = fresh
    waiting = asyncio.create_task(sampler.sample(PROMPT, SamplingParams(200, seed=1)))
    await asyncio.sleep(0.02)

    async def fail(method, args=()):
        raise RuntimeError("the worker broke off")

    whole = sampler.engine
    sampler.engine = Through(whole, collective_rpc=fail)
    with pytest.raises(SamplerError, match=r"did not take the weights.*broke off"):
        await sampler.update_weights(handover.leader.weights(), 1)
    for request in (waiting, sampler.sample(PROMPT, SamplingParams(4))):
        with pytest.raises(SamplerError, match="did not take the weights"):
            await request
    assert sampler.version == 0
    await whole.resume_generation()


# -- bad input --------------------------------------------------------------------------------------------------------


async def test_weights_of_another_architecture_are_refused(fresh, tmp_path):
    sampler, _ = fresh
    before = await scores(sampler)
    (tmp_path / "other").mkdir()
    save_file({"model.wte.weight": torch.zeros(3, 3)}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(SamplerError, match=r"the weights do not fit: missing .*model.wte.weight"):
        await sampler.update_weights(tmp_path / "other", 1)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    with pytest.raises(SamplerError, match="not a whole safetensors file"):
        await sampler.update_weights(tmp_path / "cut", 1)
    with pytest.raises(SamplerError, match="holds no weights"):
        await sampler.update_weights(tmp_path, 1)
    assert (await scores(sampler)) == before


async def test_no_room_for_the_weights_is_said(fresh, tmp_path):
    sampler, handover = fresh
    sampler.transport._folder = tmp_path / "nowhere"
    with pytest.raises(SamplerError, match=r"cannot write .*sampler.weights_dir"):
        await sampler.update_weights(handover.leader.weights(), 1)
    assert len((await scores(sampler)).token_ids) == 16, "nothing was loaded, so the old weights go on"


async def test_options_that_break_our_sampling_or_are_unknown_are_refused(folders):
    with pytest.raises(SamplerError, match="logits_processors is agentrl's own"):
        await VLLMSampler.start(folders[True], **SIZES, options={"logits_processors": []})
    with pytest.raises(SamplerError, match=r"does not take them.*tensor_size"):
        await VLLMSampler.start(folders[True], **SIZES, options={"tensor_size": 2})


async def test_an_engine_without_memory_does_not_start_and_leaves_nothing(folders):
    before = boards()
    with pytest.raises(SamplerError, match="vLLM did not start"):
        await VLLMSampler.start(folders[True], **SIZES, options={"kv_cache_memory_bytes": 1 << 12})
    assert boards() == before


async def test_heads_that_vllm_cannot_do_are_refused_before_it_dies_of_them(tokenizer, tmp_path):
    save_policy(build_model(tokenizer, hidden=64, layers=1), tokenizer, tmp_path)
    with pytest.raises(SamplerError, match="heads of 32 and more, a multiple of 16: got 16"):
        await VLLMSampler.start(tmp_path, **SIZES)


async def test_an_engine_that_dies_fails_its_requests(folders):
    sampler = await VLLMSampler.start(folders[True], **SIZES)
    try:
        job = asyncio.create_task(sampler.sample(PROMPT, SamplingParams(200)))
        await asyncio.sleep(0.05)
        for process in sampler.engine.engine_core.resources.engine_manager.processes:
            process.kill()
        with pytest.raises(SamplerError, match="engine process has ended"):
            await job
        with pytest.raises(SamplerError):
            await sampler.sample(PROMPT, SamplingParams(4))
        with pytest.raises(SamplerError):
            await sampler.update_weights(tiny_model().state_dict(), 1)
    finally:
        await sampler.close()


async def test_an_engine_that_dies_while_it_loads_does_not_hang(folders):
    sampler = await VLLMSampler.start(folders[True], **SIZES)
    try:
        (process,) = sampler.engine.engine_core.resources.engine_manager.processes
        os.kill(process.pid, signal.SIGSTOP)
        loading = asyncio.create_task(sampler.update_weights(dict(tiny_model().named_parameters()), 1))
        await asyncio.sleep(0.5)
        process.kill()
        async with asyncio.timeout(20):
            with pytest.raises(SamplerError, match="engine process has ended"):
                await loading
    finally:
        await sampler.close()


KILLED = """
import asyncio, sys
from agentrl.sampler.vllm import VLLMSampler
from agentrl.types import SamplingParams

async def main():
    sampler = await VLLMSampler.start(sys.argv[1], max_slots=4, max_length=64)
    (process,) = sampler.engine.engine_core.resources.engine_manager.processes
    print(process.pid, flush=True)
    await sampler.sample([1, 2, 3], SamplingParams(4))
    print("ready", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_a_killed_process_leaves_no_engine_no_board_and_no_socket(folders, tmp_path):
    script, temporary = tmp_path / "script.py", tmp_path / "temporary"
    script.write_text(KILLED)
    temporary.mkdir()
    before = boards()
    process = await asyncio.create_subprocess_exec(
        sys.executable, script, folders[True], env=os.environ | {"TMPDIR": str(temporary)}, stdout=subprocess.PIPE
    )
    engine = int(await process.stdout.readline())
    assert await process.stdout.readline() == b"ready\n"
    process.kill()
    await process.wait()
    async with asyncio.timeout(10):
        while os.path.exists(f"/proc/{engine}"):  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(0.1)
    assert boards() == before
    left = [name for name in os.listdir(temporary) if not name.startswith("vllm_dist_")]  # torch's rendezvous, a file
    assert left == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    dead, alive = subprocess.Popen(["true"]), os.getpid()
    dead.wait()
    name = f"agentrl-{socket.gethostname()}"
    for left in (f"{name}-{dead.pid}-00.safetensors", f"{name}-{alive}-00.safetensors", "agentrl-elsewhere-1-0"):
        (tmp_path / left).touch()
    (tmp_path / f"{name}-{dead.pid}-01").mkdir()
    Transport("file", {}, tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([f"{name}-{alive}-00.safetensors", "agentrl-elsewhere-1-0"])


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def adapting(folders):
    options = {"max_lora_rank": 8}
    sampler = await VLLMSampler.start(folders[True], **SIZES, transport="adapter", options=options)
    yield sampler
    await sampler.close()


ADAPTERS = {"policy__lora_rank": 4, "sampler__transport": "adapter", "sampler__backend": "vllm"}


async def test_adapters_alone_are_enough(adapting, tmp_path):
    handover = await handing_over(adapting, tiny_model(), **ADAPTERS)
    await handover(0)
    plain = await scores(adapting)
    for version in (1, 2):
        update(handover, version)
        found = await handover(version)
        assert found["probe/moved"] > 2 * found["probe/bound"]
    moved = await scores(adapting)
    assert moved.logprobs != plain.logprobs
    assert set(moved.policy_version) == {2}
    with pytest.raises(SamplerError, match="takes a folder of adapters"):
        await adapting.update_weights(handover.leader.weights(), 3)
    save_adapter(handover.leader.learner.model, tmp_path / "adapter")
    await adapting.update_weights(tmp_path / "adapter", 3)
    assert (await scores(adapting)).logprobs == pytest.approx(moved.logprobs, abs=1e-6)


async def test_an_ignored_adapter_is_caught(adapting):
    handover = await handing_over(adapting, tiny_model(), **ADAPTERS)
    await handover(0)
    load = adapting.load_adapter

    async def ignored(folder, version):
        await load(folder, version)
        adapting._adapter = None

    adapting.load_adapter = ignored
    try:
        await handover.probe()
        update(handover)
        with pytest.raises(PolicyMismatch) as failure:
            await handover(1)
    finally:
        del adapting.load_adapter
    assert failure.value.group in (suspects.ADAPTERS, suspects.UPDATE)
