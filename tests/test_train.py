"""The training loop on the scripted environment: what it writes, and that a resumed run is the run."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading

import pytest
import torch
from same_run import assert_same_run, comparable, require_equal_bits, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl import _durable
from agentrl.config import load_config
from agentrl.errors import NonFiniteError, RunFolderError, SamplerError, TaskError, TooManyFailures, UserError
from agentrl.learner.step import Learner
from agentrl.rollout.batch import Batch, collect, rollout_metrics
from agentrl.rollout.budget import Budget, Caps
from agentrl.run import dry_run, run_train
from agentrl.sampler.hf import HFSampler
from agentrl.tasks import TaskStream
from agentrl.trace import RunFolder, latest_checkpoint, read_metrics
from agentrl.train import train
from agentrl.types import Leaf, Outcome, RolloutTree, Task

STEPS = 4


SETTINGS = {
    "sampler.max_length": 160,
    "sampler.max_slots": 32,
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.max_tokens": 48,
    "train.steps": STEPS,
    "train.lr": 1e-3,
    "train.warmup": 2,
    "train.checkpoint_every": 2,
    "algorithm.max_refills": 1,
    "policy.threads": 1,
}


@pytest.fixture
def config(scripted, policy_folder):
    def make(env="Shy", **changes):
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        fixed = {"env": scripted(env), "policy.path": str(policy_folder)}
        return load_config(None, SETTINGS | fixed | keys)

    return make


def start(config, out, on_step=None):
    with RunFolder.create(out, config.model_dump(mode="json"), keep=config.train.keep_checkpoints) as run:
        return asyncio.run(train(config, run, on_step=on_step))


@pytest.fixture(scope="module")
def equal_bits(policy_folder):
    require_equal_bits(policy_folder)


@pytest.fixture(scope="module")
def unbroken(scripted, policy_folder, tmp_path_factory):
    """A run of ``STEPS`` steps that nothing happened to."""
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    fixed = {"env": scripted("Shy"), "policy.path": str(policy_folder)}
    start(load_config(None, SETTINGS | fixed), out)
    return out


# -- what a run leaves ------------------------------------------------------------------------------------------------


def test_metrics_have_trls_names(unbroken):
    rows = read_metrics(unbroken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    expected = {
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "entropy",
        "loss",
        "grad_norm",
        "learning_rate",
        "approx_kl",
        "clip_ratio/low_mean",
        "clip_ratio/high_mean",
        "clip_ratio/region_mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "sampling/sampling_logp_difference/mean",
        "sampling/sampling_logp_difference/max",
        "tools/call_frequency",
        "tools/failure_frequency",
        "time/rollout",
        "time/update",
    }
    for row in rows:
        assert expected <= row.keys(), "the policy of the fixture has rewards that differ"
        assert row["sampling/sampling_logp_difference/mean"] < 1e-5
        assert row["grad_norm"] > 0
    assert [row["learning_rate"] for row in rows] == [5e-4, 1e-3, 1e-3, 1e-3]


def test_every_rollout_is_kept(unbroken):
    with pytest.raises(RunFolderError, match="holds a run already"):
        RunFolder.create(unbroken, {})
    with RunFolder.resume(unbroken) as run:
        for row in read_metrics(unbroken):
            trees = run.read_rollouts(row["step"])
            fresh = trees[:4]
            rewards = [reward for tree in fresh for reward in tree.rewards]
            assert row["reward"] == pytest.approx(sum(rewards) / len(rewards))
            assert len(trees) >= 4
            assert all(len(tree.leaves) == 4 for tree in trees)
            policy = [node for tree in trees for node in tree.nodes if node.author == "policy"]
            for node in policy:
                assert len(node.token_ids) == len(node.logprobs) == len(node.entropies) == len(node.policy_version)
                assert set(node.policy_version) == {row["step"] - 1}


def test_checkpoints_are_ordinary_policies(unbroken, tokenizer, policy_folder):
    names = sorted(path.name for path in (unbroken / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000004"]
    last = unbroken / "checkpoints" / "step_000004"
    assert AutoTokenizer.from_pretrained(last).chat_template == tokenizer.chat_template
    moved, began = weights(last), weights(policy_folder)
    assert any(not torch.equal(moved[name], began[name]) for name in began)
    ids = torch.tensor([tokenizer("double 3")["input_ids"]])
    assert AutoModelForCausalLM.from_pretrained(last)(ids).logits.isfinite().all()


def test_the_policy_learns_what_pays(config, tmp_path):
    """Calling the tool is rewarded, whatever the answer: the policy does it more often soon."""
    out = tmp_path / "run"
    start(config(train__steps=18, train__lr=1e-3, rollout__prompts=8, rollout__group=8), out)
    rewards = [row["reward"] for row in read_metrics(out)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.15


# -- going on ---------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.usefixtures("equal_bits")
@pytest.mark.parametrize("at", [1, 3])
def test_a_resumed_run_is_the_run(config, tmp_path, unbroken, at):
    """At step 1 there is no checkpoint yet; at step 3 one step is done again."""
    out = tmp_path / "run"

    def stop(step, metrics):
        if step == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        start(config(), out, stop)
    assert len(read_metrics(out)) == at
    run_train(None, out)
    assert_same_run(out, unbroken)


@pytest.mark.slow
@pytest.mark.usefixtures("equal_bits")
def test_that_holds_with_a_kl_and_without_updates(config, tmp_path):
    """The KL stays that to the starting policy; a step without a group to learn from changes no version."""
    settings = {"algorithm__kl_coef": 0.1, "algorithm__max_refills": 0, "rollout__prompts": 1, "rollout__group": 2}
    settings |= {"train__checkpoint_every": 1, "train__steps": 6}
    out = tmp_path / "run"
    for seed in range(20):  # which of them has both depends on how this CPU rounds
        whole = tmp_path / f"whole-{seed}"
        settings["seed"] = seed
        start(config(**settings), whole)
        rows = read_metrics(whole)
        if any("loss" not in row for row in rows) and any(row.get("kl", 0) > 1e-6 for row in rows):
            break
    else:
        pytest.fail("no seed has a step without an update and one with a KL")
    for at in (1, 3, 5):

        def stop(step, metrics, at=at):
            if step == at:
                raise Interrupted

        with pytest.raises(Interrupted):
            start(config(**settings), out, stop)
        run_train(None, out)
        assert_same_run(out, whole)
        shutil.rmtree(out)


@pytest.mark.usefixtures("equal_bits")
def test_a_longer_run_goes_on_where_it_ended(config, tmp_path, unbroken):
    out = tmp_path / "run"
    start(config(train__steps=2), out)
    with pytest.raises(UserError, match=r"has done 2 of 2 steps; to go on, give --train.steps a larger number"):
        run_train(None, out)
    run_train(None, out, overrides={"train.steps": STEPS})
    assert comparable(out) == comparable(unbroken)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.lr": 1.0}, r"keeps its configuration but for train.steps, got train.lr = 1.0"),
        ({"train.lrr": 1.0}, "unknown configuration key 'train.lrr'"),
        ({"train.steps": "many"}, r"train.steps: .*got 'many'"),
        ({"train.steps": 0}, r"train.steps: .*got 0"),
    ],
)
def test_a_resumed_run_keeps_its_configuration(unbroken, overrides, message):
    before = comparable(unbroken)
    with pytest.raises(UserError, match=message):
        run_train(None, unbroken, overrides=overrides)
    assert comparable(unbroken) == before


def test_what_is_said_again_on_resume_is_no_change(unbroken, scripted):
    same = {"env": scripted("Shy"), "train.lr": "1e-3"}
    with pytest.raises(UserError, match="has done 4 of 4 steps"):
        run_train(None, unbroken, overrides=same)


def test_a_folder_in_use_is_refused(config, tmp_path, unbroken):
    with RunFolder.resume(unbroken), pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
        run_train(None, unbroken)
    with pytest.raises(RunFolderError, match="holds a run already"):
        run_train(config(), unbroken)
    with pytest.raises(RunFolderError, match="there is no run to resume"):
        run_train(None, tmp_path / "nothing")


# -- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("equal_bits")
def test_a_full_disk_while_saving_a_checkpoint_loses_nothing(config, tmp_path, unbroken, monkeypatch):
    out = tmp_path / "run"
    seal = _durable.seal

    def full(folder):
        if "000004" in folder.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(folder)

    monkeypatch.setattr("agentrl.trace.seal", full)
    with pytest.raises(RunFolderError, match="disk full while writing checkpoint step_000004"):
        start(config(), out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000002"]
    monkeypatch.setattr("agentrl.trace.seal", seal)
    run_train(None, out)
    assert_same_run(out, unbroken)


def test_a_value_that_is_not_finite_stops_the_run_and_saves_the_sample(config, tmp_path, monkeypatch):
    out = tmp_path / "run"
    step = Learner.step

    def poisoned(self, trees, **options):
        if self.updates == 2:
            with torch.no_grad():
                self.model.model.norm.weight[0] = torch.nan
        return step(self, trees, **options)

    monkeypatch.setattr(Learner, "step", poisoned)
    with pytest.raises(NonFiniteError):
        start(config(), out)
    (failure,) = (out / "failures").iterdir()
    saved = json.loads(failure.read_text())
    assert failure.name == "step_000003.json"
    assert "a log-prob is nan" in saved["error"]
    assert saved["sample"][0]["token_ids"]
    assert len(read_metrics(out)) == 2
    assert latest_checkpoint(out).step == 2


def test_too_many_failures_stop_the_run_with_the_traceback(config, tmp_path):
    with pytest.raises(TooManyFailures, match=r"(?s)16 of 16 episodes failed.*RuntimeError: the judge is out"):
        start(config("Broken"), tmp_path / "run")


def test_some_failures_are_counted_aloud(config, tmp_path, monkeypatch, scripted):
    from agentrl import registry

    shy = registry.load("envs", scripted("Shy"))
    reward, count = shy.reward, 0

    async def sometimes(self, task, episode):
        nonlocal count
        count += 1
        if count % 9 == 0:
            raise RuntimeError("the judge is out")
        return await reward(self, task, episode)

    monkeypatch.setattr(shy, "reward", sometimes)
    out = tmp_path / "run"
    start(config(train__steps=1, rollout__retries=0, rollout__max_failures=0.5), out)
    (row,) = read_metrics(out)
    assert row["rollout/failures"] >= 1
    with RunFolder.resume(out) as run:
        failed = [leaf for tree in run.read_rollouts(1) for leaf in tree.leaves if leaf.reward is None]
    assert failed
    assert all("the judge is out" in leaf.error and leaf.outcome is Outcome.ENV_FAILURE for leaf in failed)


def test_the_sampler_is_closed_whatever_happens(config, tmp_path, monkeypatch):
    def stop(step, metrics):
        assert [t.name for t in threading.enumerate() if t not in before].count("agentrl-sampler") == 1
        raise Interrupted

    before = threading.enumerate()
    with pytest.raises(Interrupted):
        start(config(), tmp_path / "run", stop)
    left = [t.name for t in threading.enumerate() if t not in before]
    assert "agentrl-sampler" not in left
    assert len(left) <= 1, left


# -- dynamic sampling -------------------------------------------------------------------------------------------------


class Groups:
    """A scheduler whose groups have the rewards it is told."""

    def __init__(self, *rounds):
        self.rounds, self.asked = list(rounds), []
        self.budget = Budget(Caps())

    def step_budget(self):
        return self.budget

    async def grow(self, tasks, *, seed, budget):
        assert budget is self.budget, "one for all rounds of a step"
        self.asked.append((len(tasks), seed))
        rewards = self.rounds.pop(0)
        assert len(rewards) == len(tasks)
        return [
            RolloutTree(task, (), tuple(Leaf(-1, r, Outcome.ANSWERED) for r in rs))
            for task, rs in zip(tasks, rewards, strict=True)
        ]


FLAT, MIXED, DEAD = (1.0, 1.0), (0.0, 1.0), (None, None)


def stream():
    return TaskStream([Task(f"t{i}") for i in range(50)], 0)


@pytest.mark.parametrize(
    ("rounds", "asked", "informative"),
    [
        ([[MIXED] * 4], [4], 4),
        ([[MIXED, FLAT, FLAT, MIXED], [MIXED, FLAT], [MIXED]], [4, 2, 1], 4),
        ([[FLAT] * 4, [FLAT] * 4, [MIXED, FLAT, DEAD, FLAT]], [4, 4, 4], 1),
        ([[FLAT] * 4] * 3, [4, 4, 4], 0),
    ],
)
def test_groups_without_a_difference_are_replaced_a_bounded_number_of_times(config, rounds, asked, informative):
    scheduler = Groups(*rounds)
    setting = config(algorithm__max_refills=2)
    batch = asyncio.run(collect(scheduler, stream(), setting, 1))
    assert [count for count, _ in scheduler.asked] == asked
    assert len({seed for _, seed in scheduler.asked}) == len(asked), "every round has its own random numbers"
    assert len(batch.informative) == informative
    assert batch.refills == len(asked) - 1
    assert len(batch.fresh) == 4
    assert len(batch.played) == sum(asked)


def test_without_dynamic_sampling_every_scored_group_is_learnt_from(config):
    batch = asyncio.run(collect(Groups([FLAT, MIXED, DEAD, (None, 1.0)]), stream(), config(algorithm__name="grpo"), 1))
    assert len(batch.informative) == 3
    assert batch.refills == 0


# -- before a run -----------------------------------------------------------------------------------------------------


def test_dry_run_says_what_would_be_done(config, capsys):
    dry_run(config())
    printed = capsys.readouterr().out
    assert json.loads(printed[: printed.rindex("}") + 1]) == config().model_dump(mode="json")
    assert "ok: 4 x 4 rollouts a step, first task 'train-" in printed


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"policy.path": "/nowhere"}, UserError, "expected a Hugging Face folder"),
        ({"sampler.top_p": 0.9}, UserError, "top_p"),
        ({"env": "arithmetik"}, UserError, "did you mean 'arithmetic'"),
        ({"env": ""}, UserError, "no environment named"),
        ({"env_options": {"x": 1}}, UserError, "does not take options"),
    ],
)
def test_dry_run_finds_what_a_run_would_stumble_over(config, changes, error, message):
    with pytest.raises(error, match=message):
        dry_run(load_config(None, {**config().model_dump(mode="json"), **changes}))


def test_an_environment_without_tasks_is_refused(config, tmp_path, monkeypatch, scripted):
    from agentrl import registry

    monkeypatch.setattr(registry.load("envs", scripted("Shy")), "count", 0)
    with pytest.raises(TaskError, match="task list is empty"):
        start(config(), tmp_path / "run")


def test_a_sampler_that_fails_ends_the_run(config, tmp_path, monkeypatch):
    def fail(self, chunks):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        enter = HFSampler.__init__

        def broken(self, *args, **kwargs):
            enter(self, *args, **kwargs)
            self._forward = lambda chunks: fail(self, chunks)

        patch.setattr(HFSampler, "__init__", broken)
        with pytest.raises(SamplerError, match="out of memory"):
            start(config(), tmp_path / "run")


def test_the_reward_that_is_reported_is_that_of_what_began_from_the_prompt():
    """A tree has more leaves where tools are called; what began from the prompt is a sample of the policy."""
    leaves = [Leaf(-1, 1.0, Outcome.ANSWERED, name=name) for name in ((0, 1), (0, 1, 2), (0, 2))]
    leaves += [Leaf(-1, reward, Outcome.ANSWERED, name=(i,)) for i, reward in enumerate((1.0, 0.0))]
    tree = RolloutTree(Task("t"), (), tuple(leaves), spent={"tokens": 5.0, "forks_failed": 1.0})
    metrics = rollout_metrics(Batch(fresh=[tree], played=[tree, tree], informative=[tree]))
    assert metrics["reward"] == 0.5
    assert (metrics["spent/tokens"], metrics["spent/forks_failed"], metrics["spent/calls"]) == (10.0, 2.0, 0)
    pruned = RolloutTree(Task("t"), (), tuple(leaves[:3]))
    assert rollout_metrics(Batch(fresh=[pruned]))["reward"] == 1.0
