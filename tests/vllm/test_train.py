"""Training with vLLM is training with the embedded engine: groups, trees, adapters, a version behind."""

from __future__ import annotations

import asyncio

import pytest

from agentrl.config import load_config
from agentrl.errors import PolicyMismatch
from agentrl.sampler.transport import Transport
from agentrl.trace import RunFolder, read_metrics, read_rollouts
from agentrl.train import train

pytestmark = pytest.mark.vllm

SETTINGS = {
    "sampler.max_length": 160,
    "sampler.max_slots": 32,
    "rollout.prompts": 6,
    "rollout.group": 4,
    "rollout.max_tokens": 48,
    "train.steps": 4,
    "train.lr": 1e-3,
    "train.warmup": 2,
    "train.checkpoint_every": 4,
    "policy.threads": 1,
}
TREES = {"rollout.policy": "entropy_tree", "rollout.policy_options": {"alpha": 0.9, "first_tokens": 4}}
STALE = {"train.staleness": 1, "algorithm.correction": "token_tis", "algorithm.old_logprobs": "learner"}
ADAPTERS = {"policy.lora_rank": 4, "train.lr": 1e-2}


@pytest.fixture
def play(scripted, policy_folder, tmp_path):
    """``await play(name, keys)``: a run's metrics, and the tokens of every leaf by step, tree and name."""

    async def run(name, keys):
        fixed = {"env": scripted("Doubling"), "policy.path": str(policy_folder)}
        config = load_config(None, SETTINGS | fixed | keys)
        with RunFolder.create(tmp_path / name, config.model_dump(mode="json")) as folder:
            await train(config, folder)
        written = {}
        for step in range(1, SETTINGS["train.steps"] + 1):
            for index, tree in enumerate(read_rollouts(tmp_path / name, step)):
                for leaf in tree.leaves:
                    written[step, index, leaf.name] = [node.token_ids for node in tree.path(leaf)]
        return read_metrics(tmp_path / name), written

    return run


@pytest.mark.parametrize("keys", [{}, STALE, ADAPTERS], ids=["group", "stale", "adapters merged"])
async def test_a_run_with_vllm_is_the_run_with_the_embedded_engine(play, keys):
    """Token by token: seeds mean the same, and the logits agree to the last digits that matter here."""
    embedded, tokens = await play("hf", keys)
    found, found_tokens = await play("vllm", keys | {"sampler.backend": "vllm"})
    assert found_tokens == tokens
    assert any(step["rollout/groups"] for step in found), "something was learnt"
    for one, other in zip(found, embedded, strict=True):
        for name in ("reward", "entropy", "loss", "grad_norm", "rollout/leaves", "staleness/max", "probe/moved"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-2, abs=1e-4), name
        if one["rollout/groups"]:
            assert one["probe/mean"] < one["probe/bound"]


async def test_trees_are_those_of_the_embedded_engine(play):
    """Where two trajectories ask at once, time decides who may branch; who has the same name wrote the same."""
    _, tokens = await play("hf", TREES)
    found, found_tokens = await play("vllm", TREES | {"sampler.backend": "vllm"})
    common = [leaf for leaf in tokens.keys() & found_tokens.keys() if leaf[0] == 1]
    assert any(len(name) > 1 for _, _, name in common), "branches too"
    assert all(found_tokens[leaf] == tokens[leaf] for leaf in common)
    assert sum(step["spent/branches"] for step in found) > 5
    assert all(step["probe/mean"] < step["probe/bound"] for step in found if step["rollout/groups"])


async def test_adapters_alone_make_the_same_run(play):
    merged, tokens = await play("merged", ADAPTERS | {"sampler.backend": "vllm"})
    found, found_tokens = await play("alone", ADAPTERS | {"sampler.backend": "vllm", "sampler.transport": "adapter"})
    assert all(found_tokens[leaf] == tokens[leaf] for leaf in tokens if leaf[0] == 1)
    rewards = [[step["reward"] for step in metrics] for metrics in (found, merged)]
    assert rewards[0] == pytest.approx(rewards[1], abs=0.1)


async def test_a_run_whose_sampler_is_not_updated_stops_and_says_so(play, monkeypatch):
    async def lose(self, source, version, receivers):
        for receiver in receivers:
            await receiver.engine.collective_rpc("agentrl_version", args=(version,))
            receiver.version = version

    monkeypatch.setattr(Transport, "send", lose)
    with pytest.raises(PolicyMismatch, match="update"):
        await play("lost", {"sampler.backend": "vllm", "train.lr": 1e-2})
    assert not [task for task in asyncio.all_tasks() if "agentrl" in repr(task.get_coro())][1:], "nothing goes on"
