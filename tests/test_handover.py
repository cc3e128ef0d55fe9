"""The probe of a hand-over: healthy ones pass in every dtype, and each known failure is caught and named.

This file is also the program that torchrun starts (``main``), for the probe of a learner in shards.
"""

from __future__ import annotations

import asyncio
import copy
import json
import os
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import replace
from heapq import heapify
from pathlib import Path

import pytest
import torch
from fixed_rollouts import fixed_rollouts

from agentrl.config import load_config
from agentrl.errors import PolicyMismatch, SamplerError
from agentrl.handover import CAUSES, LENGTHS, TOKENS, Handover
from agentrl.learner import distributed, suspects
from agentrl.learner.leader import Leader, follow
from agentrl.learner.step import Learner
from agentrl.sampler.hf import HFSampler

VOCABULARY = 97


def tiny_model(*, tied=True, dtype=torch.float32, layers=2):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=VOCABULARY, num_hidden_layers=layers, head_dim=8, tie_word_embeddings=tied, **sizes)
    )
    with torch.no_grad():  # logits as a trained policy has them, not nearly flat
        for name, parameter in made.named_parameters():
            parameter.mul_(1.0 if "norm" in name else 4.0)
    return made.to(dtype)


# -- samplers that fail in one way ------------------------------------------------------------------------------------


class Lost(HFSampler):
    """The weights do not arrive."""

    async def update_weights(self, source, version):
        self.version = version


class Partial(HFSampler):
    """Parameters that ``forgets(name, place)`` keep their old values."""

    forgets = staticmethod(lambda name, place: False)

    async def update_weights(self, source, version):
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        chosen = {n: own[n] if self.forgets(n, place) else w for place, (n, w) in enumerate(source.items())}
        await super().update_weights(chosen, version)


class Base(HFSampler):
    """The policy that the adapters were put into, under every version."""

    async def update_weights(self, source, version):
        self.base = getattr(self, "base", None) or copy.deepcopy(dict(self.model.named_parameters()))
        await super().update_weights(self.base, version)


class StaleCache(HFSampler):
    """Keeps what older weights computed."""

    def _load(self, source, version):
        idle, clear = OrderedDict(self._idle), self._index.clear
        self._index.clear = lambda: None
        super()._load(source, version)
        self._index.clear, self._idle = clear, idle
        self._free = [slot for slot in self._free if slot not in idle]
        heapify(self._free)


class Unchanged(HFSampler):
    """The version stays."""

    async def update_weights(self, source, version):
        await super().update_weights(source, self.version)


class Tempered(HFSampler):
    """Samples at another temperature than it is asked to."""

    async def sample(self, token_ids, params):
        return await super().sample(token_ids, replace(params, temperature=0.6))


class Bits(HFSampler):
    """Entropies in bits."""

    async def sample(self, token_ids, params):
        done = await super().sample(token_ids, params)
        return replace(done, entropies=tuple(entropy / 0.6931 for entropy in done.entropies))


class Silent(HFSampler):
    """Log-probs of minus infinity."""

    async def sample(self, token_ids, params):
        done = await super().sample(token_ids, params)
        return replace(done, logprobs=(-torch.inf,) * len(done.token_ids))


@pytest.fixture(autouse=True)
def few_tokens(request, monkeypatch):
    """Shorter prompts where their length is not what is tested: each hypothesis costs a forward pass over them."""
    if "whole_probe" not in request.fixturenames:
        monkeypatch.setattr("agentrl.handover.LENGTHS", (3, 17, 45))


@pytest.fixture
def whole_probe():
    """The probe as it is."""


# -- the parts --------------------------------------------------------------------------------------------------------


def make_config(changes):
    fixed = {"train.lr": 1e-2, "train.warmup": 0, "train.max_gap": 1e9, "algorithm.overlong_filter": True}
    return load_config(None, fixed | changes)


@asynccontextmanager
async def handing_over(kind=HFSampler, *, model=None, max_length=320, slots=32, **changes):
    """A hand-over between a learner and a sampler of ``kind`` that begin alike."""
    config = make_config({key.replace("__", "."): value for key, value in changes.items()})
    model = model or tiny_model()
    sampler = kind(copy.deepcopy(model), max_slots=slots, max_length=max_length)
    try:
        with Leader(Learner(model, config)) as leader:
            yield Handover(sampler, leader, config)
    finally:
        await sampler.close()


def update(handover, seed=1):
    """A real step of the optimizer."""
    handover.leader.step(fixed_rollouts(seed, vocabulary=VOCABULARY))


async def caught(handover, *, updates=1):
    """The mismatch that the probe finds after the last of ``updates``; those before are healthy."""
    await handover.probe()
    for version in range(1, updates):
        update(handover, version)
        await handover(version)
    update(handover, updates)
    before = parameters(handover.leader.learner)
    with pytest.raises(PolicyMismatch) as failure:
        await handover(updates)
    after = parameters(handover.leader.learner)
    assert all(torch.equal(after[name], before[name]) for name in before), "looking for the cause changes nothing"
    return failure.value


def parameters(learner):
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


# -- healthy ----------------------------------------------------------------------------------------------------------

HEALTHY = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "tempered": {"sampler__temperature": 0.7},
    "greedy": {"sampler__temperature": 0.0},
    "untied": {"tied": False},
    "adapters": {"policy__lora_rank": 4},
    "adapters in bf16": {"policy__lora_rank": 4, "dtype": torch.bfloat16, "sampler__temperature": 0.7},
    "short and few": {"max_length": 16, "slots": 2},
}


@pytest.mark.usefixtures("whole_probe")
@pytest.mark.parametrize("case", HEALTHY)
async def test_healthy_updates_pass(case):
    given = dict(HEALTHY[case])
    model = tiny_model(tied=given.pop("tied", True), dtype=given.pop("dtype", torch.float32))
    async with handing_over(model=model, **given) as handover:
        first = await handover.probe()
        assert first["probe/moved"] == 0.0
        for version in (1, 2, 5):
            update(handover, version)
            found = await handover(version)
            assert 0 <= found["probe/mean"] <= found["probe/max"]
            assert found["probe/mean"] < found["probe/bound"] / 2, "with room to spare"
            assert found["probe/max"] < suspects.LARGEST * found["probe/bound"] / 2
            assert found["probe/moved"] > 0
            assert found["time/probe"] > 0
        assert handover.versions == [0, 1, 2, 5]
        assert handover.sampler.version == 5


@pytest.mark.usefixtures("whole_probe")
async def test_the_prompts_are_the_same_every_time_and_fill_blocks_of_a_prefix_cache():
    async with handing_over() as handover:
        before = handover.sampler.prompt_tokens, handover.sampler.reused_tokens
        await handover.probe()
        await handover.probe()
        asked = handover.sampler.prompt_tokens - before[0]
        reused = handover.sampler.reused_tokens - before[1]
        assert asked == 2 * sum(LENGTHS)
        assert reused > 0.45 * asked, "all but the first tokens of the second probe"
        assert sum(length > 3 * 32 for length in LENGTHS) >= 2
        fresh = handover._draw(1)
        assert not set(fresh) & set(handover._prompts)
        assert [len(prompt) for prompt in fresh] == list(LENGTHS)
        assert max(map(max, handover._prompts)) >= VOCABULARY - 5


async def test_an_update_below_the_roundings_is_told_by_what_has_moved():
    """In bf16 a lost update of this size cannot be seen, and the metrics say so; what adds up is."""
    model = tiny_model(dtype=torch.bfloat16)
    async with handing_over(Lost, model=model, train__lr=4e-4) as handover:
        await handover.probe()
        for version in range(1, 60):
            update(handover, version)
            try:
                found = await handover(version)
            except PolicyMismatch as failure:
                group = failure.group
                break
            assert found["probe/moved"] < 2 * found["probe/bound"], "it says that it has not seen it"
        assert group == suspects.UPDATE
        assert 1 < version < 50


async def test_what_a_checkpoint_settles_is_what_a_resumed_run_begins_with():
    async with handing_over(train__lr=1e-9) as handover:
        await handover.probe()
        update(handover)
        await handover(1)
        assert handover._proven is not handover._latest, "an update of 1e-9 proves nothing"
        await handover.settle()
        again = await handover.probe()
        assert again["probe/moved"] == 0.0


# -- planted failures -------------------------------------------------------------------------------------------------


async def test_a_lost_update():
    async with handing_over(Lost) as handover:
        error = await caught(handover, updates=1)
    assert error.group == suspects.UPDATE
    assert "the update was lost" in str(error)
    assert CAUSES[suspects.UPDATE][1:] in str(error)
    assert [len(sample["prompt"]) for sample in error.sample] == [3, 17, 45]
    assert len(error.sample[0]["token_ids"]) == len(error.sample[0]["learner"]) == TOKENS
    assert json.dumps(error.sample)


GROUPS = {
    "embedding and head": "embed_tokens",
    "layers.1.mlp": "layers.1.mlp",
    "layers.1 norms": "layers.1.(in|post)",
    "self_attn.k_proj.weight of all layers": "k_proj",
}


@pytest.mark.parametrize("group", GROUPS)
async def test_a_group_that_was_not_copied(group):
    class Forgetful(Partial):
        forgets = staticmethod(lambda name, place: re.search(GROUPS[group], name) is not None)

    async with handing_over(Forgetful) as handover:
        error = await caught(handover)
    assert error.group == group
    assert f"{group} of the sampler is that of before" in str(error)


@pytest.mark.parametrize("group", ["embedding", "head"])
async def test_an_untied_head_and_its_embedding_are_two(group):
    class Forgetful(Partial):
        forgets = staticmethod(lambda name, place: {"embedding": "embed", "head": "lm_head"}[group] in name)

    async with handing_over(Forgetful, model=tiny_model(tied=False)) as handover:
        error = await caught(handover)
    assert error.group == group


async def test_half_loaded_weights():
    class First(Partial):
        forgets = staticmethod(lambda name, place: "layers.1" in name or name == "model.norm.weight")

    class Last(Partial):
        forgets = staticmethod(lambda name, place: "embed" in name or "layers.0" in name)

    async with handing_over(First) as handover:
        error = await caught(handover)
    assert error.group == "layers.1.self_attn"
    assert "half loaded: from layers.1.self_attn on they are those of before" in str(error)
    async with handing_over(Last) as handover:
        error = await caught(handover)
    assert error.group == "layers.0 norms"
    assert "half loaded: up to layers.0 norms" in str(error)


async def test_a_load_that_stopped_within_a_group():
    class Within(Partial):
        forgets = staticmethod(lambda name, place: "layers.1.mlp.gate" in name or "layers.1.mlp.up" in name)

    async with handing_over(Within) as handover:
        error = await caught(handover)
    assert error.group == "layers.1.mlp"
    assert "This explains it: of layers.1.mlp, model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj" in str(error)


async def test_what_no_single_story_explains_is_named_by_what_comes_nearest():
    class Scattered(Partial):
        forgets = staticmethod(lambda name, place: "layers.0.mlp" in name or "layers.1.self_attn.k" in name)

    async with handing_over(Scattered) as handover:
        error = await caught(handover)
    assert error.group.startswith(("layers.0.mlp", "mlp"))
    assert "This comes nearest" in str(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_ignored_adapters(dtype):
    """After the first update the sampler of before and the one without adapters are one and the same."""
    async with handing_over(
        Base, model=tiny_model(dtype=dtype), policy__lora_rank=4, train__lr=0.05, algorithm__name="grpo"
    ) as handover:
        error = await caught(handover)
    assert error.group == suspects.ADAPTERS
    assert "(or update" in str(error)


async def test_adapters_that_are_ignored_later_are_no_lost_update():
    class Later(Base):
        async def update_weights(self, source, version):
            self.base = getattr(self, "base", None) or copy.deepcopy(dict(self.model.named_parameters()))
            await (super().update_weights if version == 2 else super(Base, self).update_weights)(source, version)

    async with handing_over(Later, policy__lora_rank=4, train__lr=0.05) as handover:
        error = await caught(handover, updates=2)
    assert error.group == suspects.ADAPTERS
    assert "(or" not in str(error)


async def test_a_lost_update_of_adapters_and_one_of_their_groups():
    class Later(Lost):
        async def update_weights(self, source, version):
            await (super().update_weights if version == 2 else super(Lost, self).update_weights)(source, version)

    class Forgetful(Partial):
        forgets = staticmethod(lambda name, place: "layers.1.self_attn" in name)

    async with handing_over(Later, policy__lora_rank=4, train__lr=0.05) as handover:
        assert (await caught(handover, updates=2)).group == suspects.UPDATE
    async with handing_over(Forgetful, policy__lora_rank=4, train__lr=0.05) as handover:
        assert (await caught(handover)).group == "layers.1.self_attn"


@pytest.mark.usefixtures("whole_probe")
@pytest.mark.parametrize("between", [0, 40])
async def test_a_stale_prefix_cache(between):
    """Also where rollouts have pushed the probe's prompts out of the cache meanwhile."""
    async with handing_over(StaleCache, slots=16) as handover:
        await handover.probe()
        await asyncio.gather(
            *(handover.sampler.sample([n, *range(60)], handover._params) for n in range(between)),
        )
        error = await caught(handover)
    assert error.group == "prefix cache"
    assert "reset the prefix cache" in str(error)


@pytest.mark.parametrize("asked", [1.0, 0.8])
async def test_another_temperature(asked):
    async with handing_over(Tempered, sampler__temperature=asked) as handover:
        with pytest.raises(PolicyMismatch, match=r"those of temperature 0\.6") as failure:
            await handover.probe()
    assert failure.value.group == suspects.TEMPERATURE


async def test_a_version_that_is_not_raised():
    async with handing_over(Unchanged) as handover:
        error = await caught(handover)
    assert error.group == "version"
    assert "says they are version 0, its tokens 0; expected 1" in str(error)


async def test_entropies_of_another_unit():
    async with handing_over(Bits) as handover:
        with pytest.raises(PolicyMismatch, match="differs in its entropies") as failure:
            await handover.probe()
    assert failure.value.group == "entropies"


@pytest.mark.parametrize("kind", ["another policy", "no numbers"])
async def test_what_nothing_explains_says_what_to_check(kind):
    config = make_config({})
    other = tiny_model()
    if kind == "another policy":
        torch.manual_seed(5)
        other.init_weights()
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    sampler = (Silent if kind == "no numbers" else HFSampler)(other, max_slots=8, max_length=320)
    with Leader(Learner(tiny_model(), config)) as leader, pytest.raises(PolicyMismatch, match="Check that") as failure:
        await Handover(sampler, leader, config).probe()
    await sampler.close()
    assert failure.value.group == ""


async def test_a_sampler_that_fails_says_so_itself():
    async with handing_over() as handover:
        await handover.sampler.close()
        with pytest.raises(SamplerError, match="closed"):
            await handover.probe()


async def test_parameters_are_put_back_whatever_happens(monkeypatch):
    async with handing_over(Lost) as handover:
        await handover.probe()
        update(handover)
        learner, count = handover.leader.learner, 0
        before, score = parameters(learner), Learner.score

        def fail(self, *args, **kwargs):
            nonlocal count
            count += 1
            if count == 40:
                changed = parameters(learner)
                assert any(not torch.equal(changed[name], before[name]) for name in before), "in the middle of it"
                raise RuntimeError("out of memory")
            return score(self, *args, **kwargs)

        monkeypatch.setattr(Learner, "score", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            await handover(1)
        assert all(torch.equal(parameter, before[name]) for name, parameter in parameters(learner).items())


def test_groups_are_the_parts_of_the_model_in_order():
    learner = Learner(tiny_model(tied=False), make_config({}))
    parts = [f"layers.{n}{part}" for n in range(2) for part in (".self_attn", ".mlp", " norms")]
    groups = suspects.parameter_groups(learner)
    assert list(groups) == ["embedding", *parts, "norm", "head"]
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in learner.model.named_parameters())


def test_only_what_is_trained_is_remembered():
    learner = Learner(tiny_model(), make_config({"policy.lora_rank": 4}))
    suspects.remember(learner)
    assert learner.remembered
    assert all(".lora_" in name for name in learner.remembered)
    kept = learner.remembered[name := next(iter(learner.remembered))]
    with torch.no_grad():
        dict(learner.model.named_parameters())[name].add_(1.0)
    assert not torch.equal(kept, dict(learner.model.named_parameters())[name]), "a copy"


# -- in shards --------------------------------------------------------------------------------------------------------


def main(folder):
    """A healthy update, a lost one and a forgotten group, by two processes."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.start("cpu", deadline=60)
    config = make_config({"train.micro_tokens": 200})
    learner = Learner(tiny_model(), config)
    if distributed.rank() == 0:
        with Leader(learner) as leader:
            (Path(folder) / "report.json").write_text(json.dumps(asyncio.run(lead(leader, config))))
    else:
        follow(learner)
    distributed.stop()


async def lead(leader, config):
    class Failing(Partial):
        forgets = staticmethod(lambda name, place: sampler.version == 2 and "layers.1.mlp" in name)

        async def update_weights(self, source, version):
            self.version = version - 1
            await (HFSampler if version == 1 else Partial).update_weights(self, source, version)

    sampler = Failing(tiny_model(), max_slots=16, max_length=320)
    handover = Handover(sampler, leader, config)
    report = [await handover.probe()]
    leader.step(fixed_rollouts(1, vocabulary=VOCABULARY))
    report.append(await handover(1))
    leader.step(fixed_rollouts(2, vocabulary=VOCABULARY))
    report.append(await handover(2))
    leader.step(fixed_rollouts(3, vocabulary=VOCABULARY))
    before = {name: weight.clone() for name, weight in leader.weights().items()}
    try:
        await handover(3)
    except PolicyMismatch as error:
        report.append({"group": error.group, "message": str(error)})
    after = leader.weights()
    report.append({"unchanged": all(torch.equal(after[name], before[name]) for name in before)})
    await sampler.close()
    return report


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_processes_find_the_same(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, __file__, str(tmp_path)], capture_output=True, text=True, timeout=110, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    start, *healthy, failure, end = json.loads((tmp_path / "report.json").read_text())
    assert start["probe/mean"] < start["probe/bound"]
    assert all(found["probe/moved"] > 2 * found["probe/bound"] for found in healthy)
    assert failure["group"] == "layers.1.mlp"
    assert end["unchanged"]


if __name__ == "__main__":
    main(sys.argv[1])
