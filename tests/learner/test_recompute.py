"""Gradient checkpointing: the same gradients out of less memory, with the tree in every layer's arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentrl.errors import ConfigError
from agentrl.learner.attention import ATTENTION
from agentrl.learner.logprob import target_logprobs
from agentrl.learner.lora import add_lora
from agentrl.learner.pack import pack
from agentrl.learner.recompute import recompute_layers


@pytest.fixture(scope="module")
def batch():
    """A group of four answers to one prompt, the last two of which share their beginning."""
    ids = torch.randint(3, 400, (4, 90), generator=torch.Generator().manual_seed(0))
    ids[:, :30] = ids[0, :30]
    ids[3, :60] = ids[2, :60]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 30:] = True
    return pack(ids, torch.tensor([90, 80, 90, 85]), mask)


@pytest.fixture(scope="module")
def deep():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=448, num_hidden_layers=6, head_dim=16, **sizes))


def backward(model, batch):
    """Loss, gradients and the bytes that autograd keeps for the backward pass, parameters left out."""
    model.train().set_attn_implementation(ATTENTION)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -target_logprobs(model, batch)[0].mean()
    bytes_kept = sum(kept.values())
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, bytes_kept


def tuned(model):
    model = add_lora(model, rank=4, alpha=8.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # which begins at 0, where A has no gradient
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("lora", [False, True])
def test_the_same_loss_and_gradients_out_of_a_fraction_of_the_memory(deep, batch, lora):
    plain, saving = (tuned(copy.deepcopy(deep)) if lora else copy.deepcopy(deep) for _ in range(2))
    recompute_layers(saving)
    loss, gradients, kept = backward(plain, batch)
    again, others, kept_less = backward(saving, batch)
    assert again == loss
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert others[name] is not None, f"{name} has lost its gradient"
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, others[name]), name
    assert kept_less < 0.25 * kept


def test_nothing_is_recomputed_where_nothing_is_learnt(deep, batch):
    """The sampler's side and the reference run without it."""
    model = copy.deepcopy(deep)
    recompute_layers(model)
    model.eval().set_attn_implementation(ATTENTION)
    calls = []
    model.get_decoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = target_logprobs(model, batch)[0]
    assert len(calls) == 1
    assert not found.requires_grad


def test_a_class_that_cannot_is_refused():
    with pytest.raises(ConfigError, match="Linear does not support gradient checkpointing"):
        recompute_layers(torch.nn.Linear(2, 2))
