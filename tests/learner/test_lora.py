"""Adapters: what is trained, what the sampler is given, and what comes back from a folder."""

from __future__ import annotations

import asyncio
import builtins
import copy
import gc
import weakref

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from agentrl.errors import ConfigError, RunFolderError, UnknownName, UserError
from agentrl.learner.attention import ATTENTION
from agentrl.learner.logprob import target_logprobs
from agentrl.learner.lora import add_lora, has_lora, load_adapter, merged_weights, plain_model, save_adapter
from agentrl.learner.optimizer import Optimizer
from agentrl.learner.pack import pack
from agentrl.sampler.hf import HFSampler
from agentrl.types import SamplingParams

PROMPT = tuple(range(20, 40))


def batch_of(rows):
    """Rows of (prompt, answer) of equal lengths."""
    ids = torch.tensor([[*prompt, *answer] for prompt, answer in rows])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(rows[0][0]) :] = True
    return pack(ids, torch.full((len(rows),), ids.shape[1]), mask)


FIXED = [(PROMPT, tuple(range(50 + n, 62 + n))) for n in range(3)]


def trained(model, steps=1, lr=0.02):
    """``model`` with adapters after ``steps`` updates towards ``FIXED``."""
    tuned = add_lora(model, rank=4, alpha=8.0).train()
    tuned.set_attn_implementation(ATTENTION)
    optimizer = Optimizer({"policy": tuned.named_parameters()})
    for _ in range(steps):
        learn(tuned, optimizer, lr)
    return tuned, optimizer


def learn(model, optimizer, lr=0.02):
    loss = -target_logprobs(model, batch_of(FIXED))[0].mean()
    loss.backward()
    optimizer.collect()
    optimizer.step(lr)
    return loss.item()


def test_only_the_adapters_are_trained(make_model):
    before = {name: p.clone() for name, p in make_model().named_parameters()}
    model, _ = trained(make_model(), steps=2)
    free = [name for name, p in model.named_parameters() if p.requires_grad]
    assert free
    assert all(".lora_" in name for name in free)
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in free}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, "not the head"
    for name, parameter in plain_model(model).named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), f"{name} is frozen"


def test_fresh_adapters_are_the_starting_policy_and_switching_them_off_brings_it_back(make_model):
    plain = make_model()
    plain.set_attn_implementation(ATTENTION)
    expected = target_logprobs(plain, batch_of(FIXED))[0].detach()
    model, optimizer = trained(make_model(), steps=0)
    assert torch.equal(target_logprobs(model, batch_of(FIXED))[0], expected)
    learn(model, optimizer)
    assert not torch.allclose(target_logprobs(model, batch_of(FIXED))[0], expected, atol=1e-3)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(target_logprobs(model, batch_of(FIXED))[0], expected)
    assert learn(model, optimizer) > learn(model, optimizer), "and they can be trained again"


def test_merging_gives_the_plain_names_and_leaves_the_weights_in_training_alone(make_model):
    model, _ = trained(make_model(), steps=3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    merged = merged_weights(model)
    assert [(n, w.shape) for n, w in merged.items()] == [(n, p.shape) for n, p in make_model().named_parameters()]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    expected = copy.deepcopy(model).merge_and_unload()
    assert all(torch.allclose(merged[name], p, atol=1e-7) for name, p in expected.named_parameters())
    assert not any(weight.requires_grad for weight in merged.values())


def test_merging_a_model_without_adapters_gives_its_own_parameters(make_model):
    model = make_model()
    merged = merged_weights(model)
    assert not has_lora(model)
    assert all(merged[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters()), "no copies"


async def answer_greedily(sampler):
    """Greedy answers to two prompts."""
    params = SamplingParams(12, temperature=0.0)
    return await asyncio.gather(*(sampler.sample(PROMPT[n:], params) for n in range(2)))


async def test_the_sampler_sees_every_change_of_the_adapters(make_model):
    """One update on the adapters, handed over: the sampler's log-probs are the learner's, and not the old ones."""
    sampler = HFSampler(make_model(), max_slots=8, max_length=64)
    model, optimizer = trained(make_model(), steps=0)
    gaps = {}
    for moment in ("start", "stale", "fresh"):
        if moment == "stale":
            learn(model, optimizer)
        if moment == "fresh":
            await sampler.update_weights(merged_weights(model), 1)
        answers = await answer_greedily(sampler)
        gap = 0.0
        for n, answer in enumerate(answers):
            found = target_logprobs(model, batch_of([(PROMPT[n:], answer.token_ids)]))[0].detach()
            gap = max(gap, float((found[0, len(PROMPT[n:]) :] - torch.tensor(answer.logprobs)).abs().max()))
        gaps[moment] = gap
    await sampler.close()
    assert gaps["start"] < 1e-5
    assert gaps["stale"] > 0.05, "without the hand-over the sampler would be another policy"
    assert gaps["fresh"] < 1e-5


def test_without_the_adapters_the_handed_over_weights_would_be_the_old_ones(make_model):
    """So the test above can fail: the frozen weights alone do not change."""
    model, optimizer = trained(make_model(), steps=0)
    before = {name: weight.clone() for name, weight in merged_weights(model).items()}
    learn(model, optimizer)
    changed = {name for name, weight in merged_weights(model).items() if not torch.equal(weight, before[name])}
    frozen = {name for name, p in plain_model(model).named_parameters() if "lora" not in name and "base" not in name}
    assert changed == before.keys() - frozen


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
def test_a_saved_adapter_comes_back_to_the_bit_and_peft_reads_it(make_model, tmp_path):
    model, _ = trained(make_model(), steps=3)
    save_adapter(model, tmp_path / "adapter")
    again = add_lora(make_model(), rank=4, alpha=8.0, seed=7)
    load_adapter(again, tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    foreign = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
    foreign.set_attn_implementation(ATTENTION)
    batch = batch_of(FIXED)
    assert torch.equal(target_logprobs(foreign, batch)[0], target_logprobs(model, batch)[0])


def test_the_merged_policy_loads_without_peft(make_model, tmp_path):
    model, _ = trained(make_model(), steps=3)
    plain_model(model).save_pretrained(tmp_path, state_dict=merged_weights(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = merged_weights(model)
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight, "still tied"


def test_adapters_of_another_shape_or_none_are_refused(make_model, tmp_path):
    model, _ = trained(make_model(), steps=1)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(RunFolderError, match="have r 4, expected 8"):
        load_adapter(add_lora(make_model(), rank=8, alpha=8.0), tmp_path / "adapter")
    with pytest.raises(RunFolderError, match=r"have lora_alpha 8\.0, expected 16\.0"):
        load_adapter(add_lora(make_model(), rank=4, alpha=16.0), tmp_path / "adapter")
    with pytest.raises(RunFolderError, match="belong to other layers"):
        load_adapter(add_lora(make_model(), rank=4, alpha=8.0, targets=["q_proj"]), tmp_path / "adapter")
    with pytest.raises(RunFolderError, match=r"expected LoRA adapters in .*nothing"):
        load_adapter(model, tmp_path / "nothing")


def test_targets(make_model):
    model = add_lora(make_model(), rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
    found = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"q_proj", "v_proj"}
    with pytest.raises(UnknownName, match="did you mean 'q_proj'"):
        add_lora(make_model(), rank=2, alpha=4.0, targets=["q_porj"])
    with pytest.raises(UnknownName, match="unknown LoRA target 'lm_head'"):
        add_lora(make_model(), rank=2, alpha=4.0, targets="lm_head")
    with pytest.raises(ConfigError, match="'embed_tokens' is a Embedding: expected a linear layer of the decoder"):
        add_lora(make_model(), rank=2, alpha=4.0, targets=["embed_tokens"])


def test_adapters_depend_on_their_seed_alone_and_leave_the_generator_as_it_is(make_model):
    state = torch.get_rng_state()
    first = add_lora(make_model(), rank=2, alpha=4.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    same, other = (add_lora(make_model(), rank=2, alpha=4.0, seed=seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_bf16_weights_keep_fp32_adapters_and_are_rounded_once_when_merged(make_model):
    model, _ = trained(make_model().bfloat16(), steps=3)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    merged = merged_weights(model)
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    exact = merged_weights(copy.deepcopy(model).float())
    assert all(torch.equal(weight, exact[name].bfloat16()) for name, weight in merged.items())


def test_nothing_holds_on_to_the_merged_weights(make_model):
    model, _ = trained(make_model(), steps=1)
    merged = merged_weights(model)
    own = {p.data_ptr() for p in model.parameters()}
    copies = [weakref.ref(weight) for weight in merged.values() if weight.data_ptr() not in own]
    assert copies
    del merged
    gc.collect()
    assert not any(copy() is not None for copy in copies)


def test_without_peft_the_message_says_what_to_install(make_model, monkeypatch):
    original = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "agentrl\[lora\]"'):
        add_lora(make_model(), rank=2, alpha=4.0)
