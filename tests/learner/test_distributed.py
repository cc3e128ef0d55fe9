"""Two processes under torchrun are one learner: same metrics, same weights, same checkpoints, one error.

This file is also the program that torchrun starts (``main``). It runs everything once, since most of its time goes into
starting; the tests compare what it left in a folder with a learner that is alone.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from fixed_rollouts import fixed_rollouts

from agentrl.config import load_config
from agentrl.errors import AgentRLError, ConfigError, NonFiniteError, RunFolderError, TrainingError
from agentrl.learner import distributed
from agentrl.learner.checkpoint import LEARNER, SHARDS, load_state, save_checkpoint
from agentrl.learner.leader import Leader, follow
from agentrl.learner.step import Learner

CASES = {
    "all weights": {},
    "adapters": {"policy.lora_rank": 4, "algorithm.kl_coef": 0.1, "train.gradient_checkpointing": True},
    "critic": {"algorithm.name": "ppo", "algorithm.old_logprobs": "learner"},
}
"""What is learnt in both worlds."""


def needs_two(test):
    """Whichever test comes first waits for the two processes."""
    return pytest.mark.slow(pytest.mark.timeout(170)(test))


def make_learner(model, case):
    base = {"train.lr": 1e-3, "train.warmup": 0, "train.max_gap": 1e9, "train.micro_tokens": 60}
    return Learner(model, load_config(None, base | {"algorithm.overlong_filter": True} | CASES[case]))


def make_model():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=97, num_hidden_layers=2, head_dim=8, tie_word_embeddings=True, **sizes)
    )


def rollouts(seed):
    """Micro-batches of at most 60 unique tokens make an odd number, and one of them teaches nothing."""
    return fixed_rollouts(seed, cut=4)


class Tokenizer:
    """Its place in a checkpoint is not what is tested."""

    def save_pretrained(self, folder):
        (Path(folder) / "tokenizer_config.json").write_text("{}")


# -- what torchrun runs -----------------------------------------------------------------------------------------------


def main(folder, scenario):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.start("cpu", deadline=60)
    if scenario in ALONE:
        lead(folder, ALONE[scenario])
        return
    report = {"world": distributed.world_size()}
    for case in CASES:
        learn_and_resume(folder / case, case)
    resume_what_one_process_saved(folder)
    report |= collectives()
    learner = make_learner(make_model(), "all weights")
    if distributed.rank() == 0:
        report |= fail(Leader(learner))
        (folder / "report.json").write_text(json.dumps(report))
    else:
        follow(learner)
    distributed.stop()


def learn_and_resume(folder, case):
    """Two steps with a checkpoint between them, and the second step again from there."""
    learner = make_learner(make_model(), case)
    metrics = [learner.step(rollouts(1))]
    if distributed.rank() == 0:
        (folder / "checkpoint").mkdir(parents=True)
    distributed.barrier()
    save_checkpoint(folder / "checkpoint", learner, Tokenizer(), {"step": 1})
    metrics.append(learner.step(rollouts(2)))
    keep(folder / "through.pt", learner, metrics)
    again = make_learner(base_of(folder / "checkpoint", case), case)
    load_state(folder / "checkpoint", again)
    keep(folder / "resumed.pt", again, [metrics[0], again.step(rollouts(2))])


def resume_what_one_process_saved(folder):
    again = make_learner(base_of(folder / "one", "all weights"), "all weights")
    load_state(folder / "one", again)
    keep(folder / "one to two.pt", again, [again.step(rollouts(2))])


def base_of(checkpoint, case):
    """The policy that a resumed learner begins with: with adapters it is the one that they were put into."""
    if CASES[case].get("policy.lora_rank"):
        return make_model()
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


def keep(path, learner, metrics):
    weights = learner.weights()
    if distributed.rank() == 0:
        torch.save({"metrics": metrics, "weights": {name: w.clone() for name, w in weights.items()}}, path)


def collectives():
    """Every process asserts for itself."""
    rank = distributed.rank()
    assert distributed.share([10, 11, 12]) == ([10, 12] if rank == 0 else [11, None])
    found = distributed.sum_metrics({"loss": 1.0, "gap/max": float(rank), **({"only/one": 3.0} if rank else {})})
    assert found == {"loss": 2.0, "gap/max": 1.0, "only/one": 3.0}
    table = torch.full((2,), float(rank + 1))
    distributed.sum_tensors(table)
    assert table.tolist() == [3.0, 3.0]
    assert distributed.broadcast("from 0" if rank == 0 else None) == "from 0"
    return {"collectives": True}


def fail(leader):
    """A command that works, one whose error only process 1 sees while this one waits for it, and what comes after."""
    found = {"works": leader.run(rank_of)}
    found["result"] = leader.step(rollouts(3))["loss"]
    began = time.monotonic()
    try:
        with leader:
            leader.run(break_in_the_second)
    except NonFiniteError as error:
        found |= {"message": str(error), "sample": error.sample}
    found["seconds"] = time.monotonic() - began
    try:
        leader.weights()
    except NonFiniteError as error:
        found["after"] = str(error)
    return found


def lead(folder, command):
    """Into an error; what the leader says of it is in the folder too."""
    learner = make_learner(make_model(), "all weights")
    if distributed.rank() != 0:
        follow(learner)
        return
    try:
        with Leader(learner) as leader:
            leader.run(command)
    except AgentRLError as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
        raise


def break_in_the_first(learner):
    if distributed.rank() == 0:
        raise NonFiniteError("the loss is nan")
    learner.step(rollouts(3))


def kill_the_second(learner):
    """Process 0 waits for process 1 when that is gone, without a word."""
    if distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    learner.step(rollouts(3))


ALONE = {"the leader fails": break_in_the_first, "a process is killed": kill_the_second}
"""Scenarios that leave no world behind."""


def rank_of(learner):
    return distributed.rank()


def break_in_the_second(learner):
    """Process 0 is in the middle of a collective call when process 1 stops making them."""
    if distributed.rank() == 1:
        error = NonFiniteError("a log-prob is nan")
        error.sample = [{"token_ids": [1, 2, 3]}]
        raise error
    learner.step(rollouts(3))


# -- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have filled."""
    folder = tmp_path_factory.mktemp("two processes")
    learner = make_learner(make_model(), "all weights")
    learner.step(rollouts(1))
    (folder / "one").mkdir()
    save_checkpoint(folder / "one", learner, Tokenizer(), {"step": 1})
    done = torchrun(folder, "everything")
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def torchrun(folder, scenario):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*command, __file__, str(folder), scenario],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )


def alone(case):
    learner = make_learner(make_model(), case)
    metrics = [learner.step(rollouts(seed)) for seed in (1, 2)]
    return metrics, learner.weights()


@needs_two
@pytest.mark.parametrize("case", CASES)
def test_two_processes_learn_what_one_learns(two, case):
    metrics, weights = alone(case)
    found = torch.load(two / case / "through.pt")
    start = {name: p.detach() for name, p in make_model().named_parameters()}
    assert found["weights"].keys() == weights.keys() == start.keys()
    for step, expected in zip(found["metrics"], metrics, strict=True):
        assert step == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name, weight in weights.items():
        assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name
    assert max((weights[name] - start[name]).abs().max().item() for name in weights) > 1e-3


@needs_two
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two, case):
    through, resumed = (torch.load(two / case / f"{name}.pt") for name in ("through", "resumed"))
    assert through["metrics"] == resumed["metrics"]
    assert all(torch.equal(w, resumed["weights"][name]) for name, w in through["weights"].items())


@needs_two
@pytest.mark.parametrize("case", CASES)
def test_what_two_processes_saved_one_process_resumes(two, case):
    assert (two / case / "checkpoint" / SHARDS).is_dir()
    learner = make_learner(base_of(two / case / "checkpoint", case), case)
    assert load_state(two / case / "checkpoint", learner) == {"step": 1}
    metrics, weights = learner.step(rollouts(2)), learner.weights()
    through = torch.load(two / case / "through.pt")
    assert metrics == pytest.approx(through["metrics"][1], rel=1e-5, abs=1e-6)
    assert all(torch.allclose(w, through["weights"][name], rtol=0, atol=1e-6) for name, w in weights.items())


@needs_two
def test_what_one_process_saved_two_processes_resume(two):
    assert (two / "one" / LEARNER).is_file()
    metrics, weights = alone("all weights")
    found = torch.load(two / "one to two.pt")
    assert found["metrics"][0] == pytest.approx(metrics[1], rel=1e-5, abs=1e-6)
    assert all(torch.allclose(w, found["weights"][name], rtol=0, atol=1e-6) for name, w in weights.items())


@needs_two
def test_the_saved_policy_is_whole_and_plain(two):
    from transformers import AutoModelForCausalLM

    for case in CASES:
        folder = two / case / "checkpoint"
        assert "lora" not in (folder / "config.json").read_text()
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
        learner = make_learner(make_model(), case)
        learner.step(rollouts(1))
        expected = learner.weights()
        for name, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
            assert torch.allclose(parameter, expected[name], rtol=0, atol=1e-6)


@needs_two
def test_shards_of_another_policy_are_refused(two):
    learner = make_learner(make_model(), "critic")
    with pytest.raises(RunFolderError, match=r"missing \['critic:decoder"):
        load_state(two / "all weights" / "checkpoint", learner)


@needs_two
def test_an_error_in_one_process_is_raised_by_the_leader(two):
    report = json.loads((two / "report.json").read_text())
    assert report["world"] == 2
    assert report["collectives"]
    assert report["works"] == 0
    assert report["result"] == pytest.approx(
        make_learner(make_model(), "all weights").step(rollouts(3))["loss"], abs=1e-6
    )
    assert report["message"] == "process 1: a log-prob is nan"
    assert report["sample"] == [{"token_ids": [1, 2, 3]}], "it is saved in the run folder"
    assert report["seconds"] < 10, "not the deadline of 60 s"
    assert report["after"] == report["message"], "nothing more can be asked of a broken world"


@needs_two
def test_an_error_in_the_leader_ends_the_others(tmp_path):
    began = time.monotonic()
    done = torchrun(tmp_path, "the leader fails")
    assert time.monotonic() - began < 50, "not the deadline of 60 s"
    assert done.returncode != 0
    assert "NonFiniteError: the loss is nan" in done.stderr
    assert "process 0" not in done.stderr, "the follower repeats nothing"


@needs_two
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    """Without torchrun to end it, as where the other one was on another machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    where |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(tmp_path), "a process is killed"]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    both = [subprocess.Popen(command, env=os.environ | where | rank, stderr=subprocess.DEVNULL) for rank in ranks]
    began = time.monotonic()
    try:
        assert both[1].wait(100) == -signal.SIGKILL
        assert both[0].wait(50) == 1, "not the deadline of 60 s"
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert time.monotonic() - began < 100
    assert (tmp_path / "error.txt").read_text().startswith("TrainingError: another process of this run has ended")


# -- a world of one ---------------------------------------------------------------------------------------------------


def test_without_torchrun_there_is_no_process_group():
    distributed.start("cpu")
    assert not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    model = make_model()
    assert distributed.shard(model) is model
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert distributed.call(model, lambda m, x: (m is model, x), 3) == (True, 3)
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.sum_metrics({"loss": 1.5}) == {"loss": 1.5}
    tensor = torch.ones(2)
    distributed.sum_tensors(tensor)
    assert tensor.tolist() == [1.0, 1.0]
    assert distributed.broadcast([1]) == [1]
    distributed.stop()


def test_a_leader_alone_is_the_learner():
    learner = make_learner(make_model(), "all weights")
    with Leader(learner) as leader:
        metrics = leader.step(rollouts(1))
        weights = leader.weights()
    assert metrics == make_learner(make_model(), "all weights").step(rollouts(1))
    assert all(weights[name].data_ptr() == p.data_ptr() for name, p in learner.model.named_parameters())


def test_what_only_several_processes_have_is_refused_to_one():
    with pytest.raises(TrainingError, match="this process learns alone"):
        distributed.store()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="process 3 of its machine, which has 2 GPUs"):
        distributed.start("cuda")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
