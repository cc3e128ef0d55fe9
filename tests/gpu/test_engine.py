"""vLLM on a GPU beside the learner: bf16, every road for weights, sleep, updates in flight, three steps of training."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from engine_on_gpu import (
    EAGER,
    GPUS,
    NEEDS_VLLM,
    PROMPT,
    SHARE,
    VOCABULARY,
    half_a_billion,
    handing_over,
    random_qwen3,
    running,
    scores,
)
from fixed_rollouts import fixed_rollouts

from agentrl.assemble import Actors
from agentrl.config import load_config
from agentrl.run import run_sft, run_train
from agentrl.trace import latest_checkpoint, read_metrics
from agentrl.types import SamplingParams

pytestmark = NEEDS_VLLM


def update(handover, seed):
    handover.leader.step(fixed_rollouts(seed, vocabulary=VOCABULARY))


def free_bytes():
    """Of the first GPU, whoever uses the rest."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(0)[0]


# -- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_in_bf16_sampler_and_learner_agree_but_for_rounding(tmp_path, temperature):
    """With CUDA graphs, as in a run, and a model of a real one's depth and width."""
    model = half_a_billion()
    async with running(model, tmp_path, options={"gpu_memory_utilization": SHARE}) as sampler:
        handover = handing_over(sampler, model, sampler__temperature=temperature)
        found = await handover.probe()
        print({name: f"{value:.3g}" for name, value in found.items()})
        assert 0 < found["probe/mean"] <= found["probe/bound"]


# -- roads ------------------------------------------------------------------------------------------------------------


async def hand_over_three_times(handover):
    """Each probe passes, and would not have passed with the weights of before."""
    await (handover(0) if handover.adapters else handover.probe())
    for version in (1, 2, 3):
        update(handover, version)
        found = await handover(version)
        print({name: f"{value:.3g}" for name, value in found.items()})
        assert found["probe/moved"] > 4 * found["probe/bound"], "a lost update would not show"
    done = await scores(handover.sampler)
    assert set(done.policy_version) == {3}


@pytest.mark.parametrize("transport", ["file", "ipc"])
async def test_weights_reach_an_engine_on_the_learners_gpu(tmp_path, transport):
    model = random_qwen3()
    async with running(model, tmp_path, transport=transport) as sampler:
        await hand_over_three_times(handing_over(sampler, model, sampler__transport=transport))


@pytest.mark.skipif(GPUS < 2, reason=f"nccl joins two GPUs; here there are {GPUS}")
async def test_weights_reach_an_engine_on_another_gpu(tmp_path):
    """The engine takes the first GPU."""
    model = random_qwen3(device="cuda:1")
    async with running(model, tmp_path, transport="nccl") as sampler:
        await hand_over_three_times(handing_over(sampler, model, sampler__transport="nccl", policy__device="cuda:1"))


async def test_adapters_alone_are_enough(tmp_path):
    pytest.importorskip("peft", reason='needs peft: pip install "agentrl[lora]"')
    model = random_qwen3()
    options = EAGER | {"max_lora_rank": 8}
    async with running(model, tmp_path, transport="adapter", options=options) as sampler:
        await hand_over_three_times(handing_over(sampler, model, policy__lora_rank=4, sampler__transport="adapter"))


# -- in flight --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def distances(model, ids, logprobs):
    """|sampled log-prob - that of ``model``| of the last tokens of ``ids``."""
    row = torch.tensor([ids], device=model.device)
    found = model(input_ids=row, use_cache=False).logits[0, :-1].float().log_softmax(-1).gather(1, row[0, 1:, None])
    return (found[-len(logprobs) :, 0].cpu() - torch.tensor(logprobs)).abs()


async def test_tokens_in_flight_go_on_with_the_new_weights(tmp_path):
    old = random_qwen3().eval()
    new = copy.deepcopy(old)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if "norm" not in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    async with running(old, tmp_path) as sampler:
        events = []
        async for event in sampler.stream(PROMPT, SamplingParams(600, seed=1)):
            events.append(event)
            if len(events) == 20:
                await sampler.update_weights(dict(new.named_parameters()), 1)
    assert len(events) == 600
    versions = [event.policy_version for event in events]
    assert versions == sorted(versions)
    begun = versions.index(1)
    assert begun >= 20
    assert len(versions) - begun > 50, "too few tokens came after the update"
    ids = [*PROMPT, *(event.token_id for event in events)]
    by_old, by_new = (distances(model, ids, [event.logprob for event in events]) for model in (old, new))
    print(f"after {begun} tokens; right weights {by_old[:begun].mean():.2g}, {by_new[begun:].mean():.2g} nats")
    assert by_old[:begun].mean() < 0.1 * by_new[:begun].mean()
    assert by_new[begun:].mean() < 0.1 * by_old[begun:].mean()


# -- one GPU for both -------------------------------------------------------------------------------------------------


async def test_a_sleeping_engine_gives_its_memory_to_the_learner_and_takes_it_back(tmp_path):
    model = random_qwen3()
    absent = free_bytes()
    async with running(model, tmp_path, options=EAGER | {"enable_sleep_mode": True}) as sampler:
        handover = handing_over(sampler, model)
        await handover.probe()
        awake = free_bytes()
        async with Actors(None, sampler).resting():  # type: ignore[arg-type]
            given = free_bytes() - awake
            print(f"engine {(absent - awake) / 2**30:.2f} GiB, given back {given / 2**30:.2f} GiB")
            assert given > 0.6 * (absent - awake)
            used = torch.ones(int(0.9 * (free_bytes())), dtype=torch.uint8, device="cuda")  # more than was left
            assert used.numel() > awake
            del used  # to torch's cache; the engine needs it
        assert free_bytes() < awake + 0.2 * given
        await handover.probe()
        update(handover, 1)
        await handover(1)


def test_three_steps_of_training_on_one_gpu(tmp_path, scripted):
    """From nothing: a warm start on the CPU, then the loop itself, with an engine that sleeps during the update."""
    warm = {"env": scripted("Shy"), "sft.optimizer": "muon", "sft.lr": 3e-3, "sft.guess_fraction": 0.5}
    warm |= {"sft.demonstrations": 200, "sft.steps": 60, "sft.batch": 16, "sft.warmup": 5, "policy.device": "cpu"}
    run_sft(load_config(None, warm), tmp_path / "policy")
    in_half(tmp_path / "policy")
    config = load_config(
        None,
        {
            "env": scripted("Shy"),
            "policy.path": str(tmp_path / "policy"),
            "policy.dtype": "bfloat16",
            "sampler.backend": "vllm",
            "sampler.options": EAGER | {"enable_sleep_mode": True},
            "sampler.max_slots": 32,
            "sampler.max_length": 512,
            "rollout.prompts": 4,
            "rollout.group": 4,
            "rollout.max_tokens": 64,
            "algorithm.dynamic_sampling": False,
            "train.steps": 3,
            "train.lr": 1e-4,
            "train.warmup": 0,
            "train.gradient_checkpointing": True,
        },
    )
    run_train(config, tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        print({name: row[name] for name in ("reward", "probe/mean", "probe/bound", "time/rollout", "time/update")})
        assert row["probe/mean"] <= row["probe/bound"]
        assert row["staleness/max"] == 0
        assert row["sampling/sampling_logp_difference/mean"] < config.train.max_gap
    assert latest_checkpoint(tmp_path / "run").step == 3


def in_half(folder):
    """The policy in ``folder`` in bf16, which vLLM then computes in."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
