"""A run that is killed again and again is, in the end, the run that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from same_run import assert_same_run, require_equal_bits

from agentrl.config import load_config
from agentrl.run import run_train
from agentrl.trace import RunFolder, read_metrics

KILLS = 20
STEPS = 40
"""More than ``KILLS`` processes can do before they are killed."""

SETTINGS = {
    "sampler.max_length": 160,
    "sampler.max_slots": 32,
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.max_tokens": 48,
    "train.steps": STEPS,
    "train.lr": 1e-4,
    "train.warmup": 5,
    "train.decay": 0.5,
    "train.minibatches": 2,
    "train.checkpoint_every": 2,
    "algorithm.max_refills": 1,
    "algorithm.kl_coef": 0.1,
    "algorithm.kl_target": 0.05,
    "policy.threads": 1,
}

SERVER = """
import os, sys, traceback
import agentrl.run, agentrl.learner.checkpoint, agentrl.learner.step
from agentrl.cli import main

for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            main(["train", "--resume", "--out", sys.argv[1]])
            status = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    print("started", child, flush=True)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Resumes the run once for each line that it reads, in a child of its own, which need not import torch anew."""


@contextmanager
def resuming(out) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server
        finally:
            server.stdin.close()


def resume(server, *, rows=None, delay=0.0):
    """One process that goes on with the run, killed ``delay`` seconds after its ``rows``-th step; its exit status."""
    print("go", file=server.stdin, flush=True)
    child = None
    for line in server.stdout:
        first, *rest = line.split()
        if first == "started":
            child = int(rest[0])
        elif first == "ended":
            return int(rest[0])
        elif first.isdigit() and rows is not None:
            rows -= 1
        if child is not None and rows == 0:
            rows = None
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
    raise AssertionError("the server has ended")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_kills_change_nothing(scripted, policy_folder, tmp_path):
    """At moments drawn over start-up, rollouts, updates and saving. Every second step saves: others are done again."""
    require_equal_bits(policy_folder)
    config = load_config(None, SETTINGS | {"env": scripted("Shy"), "policy.path": str(policy_folder)})
    whole, out = tmp_path / "whole", tmp_path / "run"
    began = time.monotonic()
    run_train(config, whole)
    a_step = (time.monotonic() - began) / STEPS
    rows = read_metrics(whole)
    assert len({row["kl_coef"] for row in rows if "kl_coef" in row}) > STEPS / 4, "the coefficient adapts"
    assert any(row["rollout/refills"] for row in rows), "dynamic sampling is at work"
    with RunFolder.create(out, config.model_dump(mode="json")):
        pass
    rng, again = random.Random(0), 0
    with resuming(out) as server:
        for kill in range(KILLS):
            after = rng.randrange(4)
            # Before its first step a process also reads the checkpoint and proves its sampler.
            status = resume(server, rows=after, delay=rng.random() * (a_step if after else 4 * a_step))
            assert status == -signal.SIGKILL, f"the run had ended before kill {kill + 1}, which shows nothing"
            again += last_step(out) % 2
        assert again > 0, "no kill left a step to be done again"
        assert resume(server) == 0
    assert_same_run(out, whole)


def last_step(out):
    """The last step that has metrics."""
    return max((row["step"] for row in read_metrics(out)), default=0) if (out / "metrics.jsonl").exists() else 0
