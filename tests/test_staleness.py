"""A staleness of 1: the next batch is played during the update, one version old, and a resumed run is still the run."""

from __future__ import annotations

import asyncio
import json
import threading
import time

import pytest
import torch
from same_run import assert_same_run, require_equal_bits

from agentrl import registry
from agentrl._together import in_thread, timed, together
from agentrl.config import OWN_CORRECTION, load_config
from agentrl.errors import ConfigError, NonFiniteError, PolicyMismatch, TooManyFailures, TrainingCollapsed
from agentrl.learner.step import Learner
from agentrl.learner.surrogate import SURROGATES
from agentrl.rollout.batch import Batch, staleness
from agentrl.run import run_train
from agentrl.sampler.hf import HFSampler
from agentrl.trace import RunFolder, read_metrics, read_rollouts
from agentrl.train import train
from agentrl.types import Leaf, Node, Outcome, RolloutTree, Task

STEPS = 7
STALE = {"train.staleness": 1, "algorithm.correction": "token_tis", "algorithm.old_logprobs": "learner"}
SETTINGS = STALE | {
    "sampler.max_length": 160,
    "sampler.max_slots": 32,
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.max_tokens": 48,
    "train.steps": STEPS,
    "train.lr": 1e-3,
    "train.warmup": 2,
    "train.checkpoint_every": 3,
    "algorithm.max_refills": 1,
    "policy.threads": 1,
}


@pytest.fixture
def config(scripted, policy_folder):
    def make(env="Shy", **changes):
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(None, SETTINGS | {"env": scripted(env), "policy.path": str(policy_folder)} | keys)

    return make


def start(config, out, on_step=None):
    with RunFolder.create(out, config.model_dump(mode="json")) as run:
        return asyncio.run(train(config, run, on_step=on_step))


@pytest.fixture(scope="module")
def unbroken(scripted, policy_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("stale") / "unbroken"
    start(load_config(None, SETTINGS | {"env": scripted("Shy"), "policy.path": str(policy_folder)}), out)
    return out


# -- which weights play what ------------------------------------------------------------------------------------------


def test_a_batch_is_of_one_version_one_update_old_but_after_a_checkpoint(unbroken):
    rows = read_metrics(unbroken)
    assert all("loss" in row for row in rows), "every step of the fixture updates"
    fresh = [1, 4, 7]
    for row in rows:
        step, stale = row["step"], row["step"] not in fresh
        nodes = [node for tree in read_rollouts(unbroken, step) for node in tree.nodes if node.author == "policy"]
        assert {version for node in nodes for version in node.policy_version} == {step - 1 - stale}
        assert row["staleness/mean"] == row["staleness/max"] == float(stale)
        ahead = step + 1 <= STEPS and step + 1 not in fresh
        assert (row["time/overlap"] > 0) == ahead
        assert row["time/overlap"] <= row["time/update"] + 1e-3
        assert 0 < row["probe/mean"] < row["probe/bound"] < row["probe/moved"]


def test_the_gap_of_stale_tokens_is_measured_and_not_held_against_the_sampler(unbroken, config, tmp_path):
    gaps = {row["step"]: row["sampling/sampling_logp_difference/mean"] for row in read_metrics(unbroken)}
    assert max(gaps[step] for step in (1, 4, 7)) < 1e-5
    assert min(gaps[step] for step in (2, 3, 5, 6)) > 1e-4
    start(config(train__max_gap=1e-4, train__steps=3), tmp_path / "run")
    weights = [row["sampling/importance_sampling_ratio/mean"] for row in read_metrics(unbroken)]
    assert weights[0] == pytest.approx(1.0, abs=1e-4) != pytest.approx(weights[1], abs=1e-4)


def test_a_gap_of_fresh_tokens_still_stops_the_run(config, tmp_path):
    with pytest.raises(PolicyMismatch, match=r"train\.max_gap"):
        start(config(train__max_gap=1e-9, train__steps=2), tmp_path / "run")


def versions(*numbers):
    nodes = (Node(-1, "prompt", (1,)), *(Node(0, "policy", (2,), (-1.0,), (0.0,), (n,)) for n in numbers))
    return RolloutTree(Task("t"), nodes, (Leaf(1, 1.0, Outcome.ANSWERED),))


def test_staleness_counts_updates_and_not_steps():
    """Steps 5 and 6 had nothing to learn from, so that version 4 is one update behind version 7."""
    batch = Batch(informative=[versions(4, 4, 7), versions(7)])
    assert staleness(batch, [0, 3, 4, 7]) == {"staleness/mean": 0.5, "staleness/max": 1.0}
    assert staleness(Batch(), [0]) == {"staleness/mean": None, "staleness/max": None}
    with pytest.raises(PolicyMismatch, match=r"tokens of version 9 .* the last of which is 7"):
        staleness(Batch(informative=[versions(9)]), [0, 7])


# -- going on ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_run(config, tmp_path, unbroken, policy_folder, at):
    """Before the first checkpoint, right at one, and where a batch had been played ahead."""
    require_equal_bits(policy_folder)
    out = tmp_path / "run"

    def stop(step, metrics):
        if step == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        start(config(), out, stop)
    run_train(None, out)
    assert_same_run(out, unbroken)


def test_a_checkpoint_holds_no_task_that_was_played_ahead(unbroken):
    for step in (6, 7):
        state = json.loads((unbroken / "checkpoints" / f"step_{step:06d}" / "trainer_state.json").read_text())
        assert state["cursor"] == sum(len(read_rollouts(unbroken, number)) for number in range(1, step + 1))
        assert (state["step"], state["version"]) == (step, step)


# -- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_update_ends_what_is_being_played(config, tmp_path, monkeypatch):
    step = Learner.step

    def poisoned(self, trees, **options):
        if self.updates == 1:
            with torch.no_grad():
                self.model.model.norm.weight[0] = torch.nan
        return step(self, trees, **options)

    monkeypatch.setattr(Learner, "step", poisoned)
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError):
        start(config(), out)
    (failure,) = (out / "failures").iterdir()
    assert failure.name == "step_000002.json"
    assert [row["step"] for row in read_metrics(out)] == [1]


def test_failed_episodes_of_the_next_step_end_the_update(config, tmp_path, monkeypatch, scripted):
    """The update is in a thread, which nobody leaves behind."""
    shy, learning = registry.load("envs", scripted("Shy")), threading.Event()
    reward, step, ended = shy.reward, Learner.step, []

    async def failing(self, task, episode):
        if learning.is_set():
            raise RuntimeError("the judge is out")
        return await reward(self, task, episode)

    def slow(self, trees, **options):
        learning.set()
        time.sleep(2.0)
        ended.append(True)
        return step(self, trees, **options)

    monkeypatch.setattr(shy, "reward", failing)
    monkeypatch.setattr(Learner, "step", slow)

    async def watched(run):
        with pytest.raises(TooManyFailures, match="the judge is out"):
            await train(setting, run)
        assert ended == [True], "over before the run is"

    setting = config(rollout__retries=0)
    with RunFolder.create(tmp_path / "run", setting.model_dump(mode="json")) as run:
        asyncio.run(watched(run))


def test_a_lost_update_is_found_at_once(config, tmp_path, monkeypatch):
    load = HFSampler._load

    def lose(self, source, version):
        load(self, dict(self.model.named_parameters()) if version == 2 else source, version)

    monkeypatch.setattr(HFSampler, "_load", lose)
    with pytest.raises(PolicyMismatch) as failure:
        start(config(), tmp_path / "run")
    assert failure.value.group == "update"
    assert [path.name for path in (tmp_path / "run" / "failures").iterdir()] == ["step_000002.json"]


def test_a_collapse_stops_a_stale_run_too(config, tmp_path):
    with pytest.raises(TrainingCollapsed):
        run_train(config(train__min_entropy=50.0, train__patience=2), tmp_path / "run")
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]


# -- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm.correction": "none"},
            r'is "none": expected .*"token_tis" \(truncated imp.*"decoupled"',
        ),
        ({"algorithm.old_logprobs": "sampler"}, 'algorithm.old_logprobs is "sampler": set it to "learner"'),
        ({"train.checkpoint_every": 1}, "nothing is played ahead of a checkpoint"),
        ({"train.staleness": 2}, r"train\.staleness"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, STALE | changes)


def test_surrogates_whose_ratio_is_to_the_sampler_need_no_correction():
    assert set(OWN_CORRECTION) == {name for name, surrogate in SURROGATES.items() if surrogate.anchor == "sampler"}
    for name in OWN_CORRECTION:
        load_config(None, {"train.staleness": 1, "algorithm.surrogate": name})


# -- several things at once -------------------------------------------------------------------------------------------


async def test_what_runs_together_is_timed():
    first, second = await together(timed(asyncio.sleep(0.05, 1)), timed(asyncio.sleep(0.1, 2)))
    assert (first.result, second.result) == (1, 2)
    assert first.overlap(second) == second.overlap(first) == pytest.approx(first.seconds, abs=0.02)
    third = await timed(asyncio.sleep(0))
    assert third.overlap(first) == 0.0


async def test_the_first_error_comes_alone_and_the_others_are_ended():
    ended = []

    async def wait():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def fail():
        raise NonFiniteError("the loss is nan")

    with pytest.raises(NonFiniteError):
        await together(wait(), fail())
    assert ended == [True]


async def test_a_thread_is_waited_for_when_its_caller_is_cancelled():
    ended = []

    def work():
        time.sleep(0.2)
        ended.append(True)

    task = asyncio.create_task(in_thread(work))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]
    assert await in_thread(max, 1, 2) == 2
