"""AdamW over fp32 masters: torch's own in fp32, and progress in bf16 where rounding would eat it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from agentrl.errors import ConfigError, RunFolderError
from agentrl.learner.optimizer import Optimizer

BETAS = (0.9, 0.99)


def network(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype)


def loss_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 8, generator=generator)
    y = x.sum(-1, keepdim=True).sin()
    return (model(x.to(model[0].weight.dtype)).float() - y).square().mean()


def update(model, optimizer, lr, seeds=(0,)):
    for seed in seeds:
        loss_of(model, seed).backward()
        optimizer.collect()
    norm = optimizer.clip(1.0)
    optimizer.step(lr)
    return norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_are_updated_as_torch_does_to_the_bit(dtype):
    ours, theirs = network(dtype), network(dtype)
    optimizer = Optimizer({"policy": ours.named_parameters()}, betas=BETAS, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.0, betas=BETAS, weight_decay=0.1)
    for number in range(5):
        norm = update(ours, optimizer, lr=1e-2 / (number + 1), seeds=(number, number + 1))
        for seed in (number, number + 1):
            loss_of(theirs, seed).backward()
        assert norm == float(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
        reference.param_groups[0]["lr"] = 1e-2 / (number + 1)
        reference.step()
        reference.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_masters_make_progress_where_bf16_alone_rounds_every_update_away():
    """Between 0.5 and 1 bf16 numbers are 0.004 apart, so a plain AdamW at a rate of 1e-4 never leaves its start."""
    ours = network(torch.bfloat16).requires_grad_(False)
    ours[0].weight.uniform_(0.55, 0.95).mul_(torch.randn(16, 8).sign())
    ours[0].weight.requires_grad_(True)
    plain, start = copy.deepcopy(ours), ours[0].weight.detach().clone()
    optimizer = Optimizer({"policy": ours.named_parameters()}, betas=BETAS)
    reference = torch.optim.AdamW([plain[0].weight], lr=1e-4, betas=BETAS, weight_decay=0.0)
    before = loss_of(ours).item()
    for _ in range(300):
        update(ours, optimizer, 1e-4)
        loss_of(plain).backward()
        reference.step()
        plain.zero_grad()
    assert torch.equal(plain[0].weight, start)
    assert (ours[0].weight != start).double().mean() > 0.9
    assert loss_of(ours).item() < before - 0.01


def test_gradients_of_many_micro_batches_are_added_in_fp32():
    """A bf16 sum of 1 and a thousand times 0.001 stays 1."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"policy": [("w", weight)]})
    (weight * 1.0).sum().backward()
    optimizer.collect()
    assert weight.grad is None, "the 16-bit gradient is freed"
    for _ in range(1000):
        (weight * 0.001).sum().backward()
        optimizer.collect()
    assert optimizer.clip(1e9) == pytest.approx(1 + 1000 * float(torch.tensor(0.001, dtype=torch.bfloat16)), rel=1e-5)


def test_clipping_scales_all_groups_together_and_says_the_norm_before():
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = Optimizer({"policy": [("a", a)], "critic": [("b", b)]})
    (3 * a + 4 * b).sum().backward()
    optimizer.collect()
    assert optimizer.clip(1.0) == 5.0
    assert optimizer.clip(10.0) == pytest.approx(1.0)
    assert float(a.grad) == pytest.approx(0.6, abs=1e-5)
    optimizer.zero_grad()
    assert optimizer.clip(1.0) == 0.0, "nothing is left"


def test_groups_have_learning_rates_of_their_own():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Optimizer({"policy": [("a", a)], "critic": [("b", b)]})
    (a + b).sum().backward()
    optimizer.step({"policy": 0.1, "critic": 0.25})
    assert (float(a.detach()), float(b.detach())) == pytest.approx((0.9, 0.75))
    assert a.grad is None


def test_a_parameter_without_gradient_stays_where_it_is():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = Optimizer({"policy": [("a", a), ("b", b)]}, weight_decay=0.5)
    a.sum().backward()
    optimizer.step(0.1)
    assert float(a.detach()) < 1.0
    assert float(b.detach()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_to_the_bit(dtype):
    model = network(dtype)
    optimizer = Optimizer({"policy": model.named_parameters()}, betas=BETAS)
    for _ in range(3):
        update(model, optimizer, 1e-3)
    state = copy.deepcopy(optimizer.state_dict())
    assert ("policy.0.weight/master" in state) == (dtype == torch.bfloat16)
    again = copy.deepcopy(model)
    resumed = Optimizer({"policy": again.named_parameters()}, betas=BETAS)
    resumed.load_state_dict(state)
    for _ in range(3):
        assert update(model, optimizer, 1e-3) == update(again, resumed, 1e-3)
    one, two = optimizer.state_dict(), resumed.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_without_its_moments_a_resumed_run_would_go_elsewhere():
    """So the test above can fail."""
    model = network()
    optimizer = Optimizer({"policy": model.named_parameters()}, betas=BETAS)
    for _ in range(3):
        update(model, optimizer, 1e-3)
    again = copy.deepcopy(model)
    update(model, optimizer, 1e-3)
    update(again, Optimizer({"policy": again.named_parameters()}, betas=BETAS), 1e-3)
    assert not torch.equal(model[0].weight, again[0].weight)


def test_a_state_of_another_model_is_refused_and_nothing_changes():
    model = network()
    optimizer = Optimizer({"policy": model.named_parameters()})
    update(model, optimizer, 1e-3)
    before = copy.deepcopy(optimizer.state_dict())
    other = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    with pytest.raises(RunFolderError, match=r"policy\.2\.weight/exp_avg has shape \(2, 16\), expected \(1, 16\)"):
        optimizer.load_state_dict(Optimizer({"policy": other.named_parameters()}).state_dict())
    rounded = Optimizer({"policy": network(torch.bfloat16).named_parameters()})
    with pytest.raises(RunFolderError, match=r"unknown \['policy\.0\.bias/master'.*the dtype that it was saved with"):
        optimizer.load_state_dict(rounded.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state_dict().items())


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    optimizer = Optimizer({"policy": model.named_parameters()})
    assert {name.partition("/")[0] for name in optimizer.state_dict()} == {"policy.2.weight", "policy.2.bias"}


def test_groups_that_cannot_be_trained():
    model = network()
    with pytest.raises(ConfigError, match="given twice"):
        Optimizer({"policy": model.named_parameters(), "critic": model[2].named_parameters()})
    with pytest.raises(ConfigError, match="'policy': expected parameters that require gradients"):
        Optimizer({"policy": model.requires_grad_(False).named_parameters()})
