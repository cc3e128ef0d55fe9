"""The parts of ``benchmarks/gpu.py`` that need no GPU."""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from agentrl.sampler.hf import HFSampler
from agentrl.tiny import build_model, build_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _found(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def tiny():
    made = build_model(build_tokenizer(["a few words"], vocab=300), hidden=64, layers=2, context=2048)
    made.resize_token_embeddings(320)
    return made


def test_the_operations_of_a_pass_are_those_that_torch_counts(tiny):
    """Of a plain row, where attention that is written out computes every pair, seen or not."""
    length = 40
    tiny.set_attn_implementation("eager")
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counted:
        tiny(input_ids=ids, use_cache=False).logits.sum().backward()
    flops = importlib.import_module("_flops").training_flops
    found = flops(tiny, tokens=length, targets=length, pairs=length * length)
    rotations = 0.01 * found  # positions times frequencies, which is a matrix product too
    assert counted.get_total_flops() == pytest.approx(found, abs=rotations)
    assert flops(tiny, tokens=length, targets=0, pairs=0) < found


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L40", None),
        ("NVIDIA B200", None),
    ],
)
def test_the_peak_is_that_of_the_named_gpu(name, peak):
    assert importlib.import_module("_flops").peak(name) == peak


def test_rollouts_and_requests_are_the_same_work(tiny, monkeypatch):
    """Every token in the trees was asked for in a noted request; trees ask again at their branches."""
    turns = importlib.import_module("_turns")
    monkeypatch.setattr(turns, "SHORTEST", 4)
    monkeypatch.setattr(turns, "LONGEST", 12)
    monkeypatch.setattr(turns, "POLICIES", {"group": {}, "entropy_tree": {"first_tokens": 4}})

    async def grow():
        sampler = HFSampler(tiny, None, max_slots=64, max_length=1500)
        try:
            field = turns.Field(sampler, tasks=2, leaves=4)
            return [await field.grow(name, seed=1) for name in ("group", "entropy_tree")]
        finally:
            await sampler.close()

    group, tree = asyncio.run(grow())
    assert len(group) == 2 * 4 * turns.TURNS
    assert len(tree) < len(group), "branches do not write again what they share"
    assert all(4 <= request.tokens <= 12 for request in (*group, *tree))
    opening = min(len(request.prompt) for request in group)
    first = [request for request in group if len(request.prompt) < opening + 10]
    assert len({request.prompt for request in first}) == 2, "four leaves begin from each of two prompts"


def test_the_arguments_and_what_is_missing_here(monkeypatch, capsys):
    gpu = importlib.import_module("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--only", "weights", "--rounds", "2"]) == 0
    assert "benchmarks/gpu.py was not run: torch finds no GPU here" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.main([]) == 0
    assert "vLLM is not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--only", "everything"])


def test_the_forest_of_the_learner_is_shared_as_groups_are():
    forest = importlib.import_module("_forest").forest
    batch, flat, pairs = forest(prompts=2, group=3, prompt=10, answer=5, vocabulary=50, device="cpu")
    assert batch.token_ids.shape == (1, 2 * (10 + 3 * 5))
    assert len(batch.target_ids) == 2 * 3 * 5
    assert flat.shape == (6, 15)
    by_hand = sum(range(1, 11)) + 3 * sum(range(11, 16))
    assert pairs == 2 * by_hand
