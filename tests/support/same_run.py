"""Whether two run folders hold the same run, to the last bit: everything but wall times."""

from __future__ import annotations

import asyncio
import json
import platform
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from agentrl.sampler.hf import HFSampler
from agentrl.trace import latest_checkpoint, read_metrics


def comparable(out):
    """metrics.jsonl without wall times, and the rollouts without their seconds."""
    metrics = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(out)]
    rollouts = []
    for file in sorted((Path(out) / "rollouts").iterdir()):
        for line in file.read_text().splitlines():
            rollouts.append(strip(json.loads(line)))
    return metrics, rollouts


def strip(value):
    if isinstance(value, dict):
        return {key: strip(inner) for key, inner in value.items() if key != "seconds"}
    return [strip(inner) for inner in value] if isinstance(value, list) else value


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_run(first, second):
    assert comparable(first) == comparable(second)
    one, two = (weights(latest_checkpoint(out).path) for out in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def require_equal_bits(policy_folder):
    """Skips where the sampler cannot promise them: a token then depends on how episodes happened to be batched."""
    sampler = HFSampler(AutoModelForCausalLM.from_pretrained(policy_folder), max_slots=32, max_length=160)
    asyncio.run(sampler.close())
    if not sampler.deterministic:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = (line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name"))
        name = next(names, platform.machine())
        pytest.skip(f"{name}: the sampler proves no equal bits here, so that a resumed run is only nearly the run")
