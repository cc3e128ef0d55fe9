"""A run whose policy has collapsed stops, says why, keeps everything and can be gone on with."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentrl.cli import main
from agentrl.collapse import Watch
from agentrl.config import TrainConfig
from agentrl.errors import TrainingCollapsed
from agentrl.tiny import save_policy
from agentrl.trace import RunFolder, latest_checkpoint, read_metrics


def entropies(*values):
    return [{"entropy": value, "frac_reward_zero_std": 0.5} for value in values]


def steps_until_it_stops(watch, history):
    for number, metrics in enumerate(history, start=1):
        try:
            watch.check(metrics)
        except TrainingCollapsed as error:
            return number, error
    return None, None


# -- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ((0.09, 0.09, 0.09), 3),
        ((1.0, 0.09, 0.09, 0.09), 4),
        ((0.09, 0.09, 0.11, 0.09, 0.09), None),
        ((0.09, 0.09, None, 0.09), 4),
        ((0.1, 0.1, 0.1, 0.1), None),
        ((), None),
    ],
)
def test_a_row_of_low_entropies_stops_the_run(values, stops):
    number, error = steps_until_it_stops(Watch(min_entropy=0.1, patience=3), entropies(*values))
    assert number == stops
    if stops:
        assert (error.reason, error.value, error.bound, error.steps) == ("entropy", 0.09, 0.1, 3)
        assert "is 0.09, below 0.1 (train.min_entropy) for 3 steps in a row" in str(error)
        assert "--train.min_entropy 0" in str(error)


def test_groups_with_equal_rewards_stop_the_run():
    shares = [{"frac_reward_zero_std": share} for share in (0.95, 0.85, 0.95, 1.0)]
    number, error = steps_until_it_stops(Watch(min_informative=0.1, patience=2), shares)
    assert number == 4
    assert (error.reason, error.value, error.steps) == ("reward variance", 0.0, 2)
    assert "is 0, below 0.1 (train.min_informative)" in str(error)


def test_each_sign_has_its_own_row():
    """Two steps below the one and then two below the other are no row of four."""
    history = [{"entropy": e, "frac_reward_zero_std": s} for e, s in ((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), (1.0, 1.0))]
    assert steps_until_it_stops(Watch(0.1, 0.1, 3), history) == (None, None)
    assert steps_until_it_stops(Watch(0.1, 0.1, 2), history[2:])[1].reason == "reward variance"


def test_it_is_off_by_default():
    assert steps_until_it_stops(Watch.of(TrainConfig()), entropies(0.0) * 50) == (None, None)


def test_the_past_is_counted_and_never_stops():
    assert steps_until_it_stops(Watch(0.1, 0.0, 3, history=entropies(0.0, 0.0)), entropies(0.0))[0] == 1
    assert steps_until_it_stops(Watch(0.1, 0.0, 3, history=entropies(0.0, 0.0, 1.0)), entropies(0.0))[0] is None
    _, error = steps_until_it_stops(Watch(0.1, 0.0, 3, history=entropies(*[0.0] * 9)), entropies(0.0))
    assert error.steps == 10


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collapsed_policy(policy_folder, tmp_path_factory):
    """Logits fifty times as large: the same answer every time, hence no entropy and one reward a group."""
    model = AutoModelForCausalLM.from_pretrained(policy_folder)
    with torch.no_grad():
        model.model.norm.weight *= 50
    folder = tmp_path_factory.mktemp("collapsed")
    save_policy(model, AutoTokenizer.from_pretrained(policy_folder), folder)
    return folder


@pytest.fixture
def train(capsys, scripted, collapsed_policy, tmp_path):
    """Run ``agentrl train`` in a folder: (exit status, standard error, metrics)."""
    out = tmp_path / "run"
    sizes = ["--rollout.prompts=2", "--rollout.group=2", "--rollout.max_tokens=24", "--sampler.max_length=160"]
    sizes += ["--train.steps=5", "--train.checkpoint_every=2", "--algorithm.max_refills=0", "--policy.threads=1"]

    def run(*words):
        begin = [] if out.exists() else [scripted("Shy"), "--policy", collapsed_policy, *sizes]
        resume = ["--resume"] if out.exists() else []
        status = 0
        try:
            main([str(word) for word in ("train", *begin, *resume, "--out", out, *words)])
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err, read_metrics(out)

    run.out = out
    return run


@pytest.mark.parametrize(
    ("key", "reason", "other"),
    [
        ("train.min_entropy", "entropy", "train.min_informative"),
        ("train.min_informative", "reward variance", "train.min_entropy"),
    ],
)
def test_a_collapsed_run_stops_keeps_everything_and_goes_on(train, key, reason, other):
    status, error, rows = train(f"--{key}", 0.05, "--train.patience", 3)
    assert status == 3, error
    assert f"agentrl: training has collapsed ({reason})" in error
    assert f"below 0.05 ({key}) for 3 steps in a row" in error
    assert "Traceback" not in error
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["entropy"] < 0.05 and row["frac_reward_zero_std"] == 1 for row in rows)
    assert latest_checkpoint(train.out).step == 2
    with RunFolder.resume(train.out, keep=2) as folder:
        assert len(folder.read_rollouts(2)) == 2

    status, error, rows = train()
    assert status == 3, "the two steps before the checkpoint still count"
    assert "for 3 steps in a row" in error
    assert [row["step"] for row in rows] == [1, 2, 3]

    status, error, rows = train(f"--{key}", 0)
    assert (status, error) == (0, "")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]

    status, error, _ = train(f"--{other}", 0.01, "--train.lr", 1.0)
    assert status == 2
    assert "keeps its configuration but for train.steps, got train.lr = 1.0" in error
