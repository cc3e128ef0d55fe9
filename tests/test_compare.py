"""``agentrl compare`` on the scripted environment: what it runs, what it leaves, how it goes on, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from same_run import require_equal_bits

from agentrl import compare as comparing
from agentrl.cli import main
from agentrl.compare import load_plan
from agentrl.errors import ConfigError, UnknownName, UserError
from agentrl.run import run_compare
from agentrl.trace import read_metrics

BASE = """
env = "{env}"
policy = {{path = "{policy}", threads = 1}}
sampler = {{max_length = 160, max_slots = 32}}
rollout = {{prompts = 2, group = 4, max_tokens = 48}}
algorithm = {{dynamic_sampling = false}}
train = {{steps = {steps}, lr = 1e-3, warmup = 1}}
eval = {{tasks = 2, samples = 2, k = [1]}}

[compare]
seeds = [0, 1]
budget = {{{budget}}}
probes = 2

[compare.methods.group]

[compare.methods.random_tree]
rollout.policy = "random_tree"
rollout.policy_options = {{probability = 1.0}}
"""


@pytest.fixture(scope="module")
def write(scripted, policy_folder):
    def to(folder: Path, *, env="Shy", steps=9, budget="tokens = 260", change=("", "")) -> str:
        text = BASE.format(env=scripted(env), policy=policy_folder, steps=steps, budget=budget)
        assert change[0] in text
        (folder / "compare.toml").write_text(text.replace(*change))
        return str(folder / "compare.toml")

    return to


@pytest.fixture(scope="module")
def finished(write, tmp_path_factory):
    """(file, folder) of a comparison that nothing happened to."""
    folder = tmp_path_factory.mktemp("compare")
    file = write(folder)
    main(["compare", "@", file, "--out", str(folder / "out")])
    return file, folder / "out"


def saved(out: Path) -> dict[str, Any]:
    return json.loads((out / "compare.json").read_text())


def without_seconds(runs: Any) -> Any:
    for run in runs:
        for point in run["points"]:
            del point["cost"]["seconds"]
    return runs


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_run_spends_the_budget_and_no_step_more(finished):
    _, out = finished
    runs = saved(out)["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("group", 0), ("random_tree", 0), ("group", 1), ("random_tree", 1),
    ]  # fmt: skip
    for run in runs:
        rows = read_metrics(out / run["method"] / f"seed_{run['seed']}")
        tokens = [row["spent/tokens"] for row in rows]
        assert sum(tokens[:-1]) < 260 <= sum(tokens)
        last = run["points"][-1]
        assert (last["step"], last["cost"]["tokens"]) == (len(rows), sum(tokens))
        assert last["cost"]["calls"] == sum(row["spent/calls"] for row in rows)
        assert last["cost"]["learner_tokens"] == sum(row.get("num_tokens/unique", 0) for row in rows)


@pytest.mark.slow
def test_the_policy_is_probed_at_the_start_and_on_the_way(finished):
    runs = saved(finished[1])["runs"]
    starts = {run["points"][0]["reward"] for run in runs}
    assert len(starts) == 1, "every run begins with the same policy, which plays the same episodes"
    for run in runs:
        costs = [point["cost"]["tokens"] for point in run["points"]]
        assert costs[0] == 0
        assert costs == sorted(set(costs))
        assert len(costs) <= 3
        # The first probe is after the first step that reaches half of the budget.
        assert len(costs) == 2 or 130 <= costs[1] < 260


@pytest.mark.slow
def test_methods_differ_in_what_they_override_alone(finished):
    group, tree = saved(finished[1])["configs"].values()
    assert tree["rollout"].pop("policy") == "random_tree"
    assert tree["rollout"].pop("policy_options") == {"probability": 1.0}
    assert (group["rollout"].pop("policy"), group["rollout"].pop("policy_options")) == ("group", {})
    assert group == tree


@pytest.mark.slow
def test_it_says_what_came_out(finished, capsys):
    file, out = finished
    main(["compare", "@", file, "--out", str(out)])
    said = capsys.readouterr().out
    assert "after 260 generated tokens" in said
    assert "generated tokens until group's reward, as a share of what group took" in said
    assert "with 2 seeds the exact sign-flip test knows none below 0.5" in " ".join(said.split())
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    rows = saved(out)["rows"]
    assert [row["method"] for row in rows] == ["group", "random_tree"]
    assert rows[1]["claim"] in ("met", "not met", "not decided")


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_repeats_nothing(finished, tmp_path, policy_folder, monkeypatch, capsys):
    require_equal_bits(policy_folder)
    file, unbroken = finished
    train, steps = comparing.train, []

    async def interrupted(config, run, *, on_step):
        def count(step, metrics):
            steps.append(step)
            if len(steps) == 3:
                raise KeyboardInterrupt
            on_step(step, metrics)

        return await train(config, run, on_step=count)

    monkeypatch.setattr(comparing, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "@", file, "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert "go on with the same command" in capsys.readouterr().err
    assert not (tmp_path / "compare.json").exists()
    main(["compare", "@", file, "--out", str(tmp_path)])
    assert without_seconds(saved(tmp_path)["runs"]) == without_seconds(saved(unbroken)["runs"])
    done = sum(
        len(read_metrics(tmp_path / name / f"seed_{seed}")) for name in ("group", "random_tree") for seed in (0, 1)
    )
    assert len(steps) == done, "no step was done twice"


@pytest.mark.slow
def test_what_is_finished_is_not_trained_again(finished, monkeypatch):
    file, out = finished

    async def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(comparing, "train", forbidden)
    monkeypatch.setattr(comparing, "evaluate", forbidden)
    before = without_seconds(saved(out)["runs"])
    main(["compare", "@", file, "--out", str(out)])
    assert without_seconds(saved(out)["runs"]) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tokens = 260", "tokens = 300"), "Keep the budget and the number of probes"),
        (("lr = 1e-3", "lr = 2e-3"), "holds a run with another configuration: train was"),
    ],
    ids=["budget", "configuration"],
)
def test_a_folder_of_another_comparison_is_refused(finished, write, tmp_path, capsys, change, message):
    with pytest.raises(SystemExit) as refused:
        main(["compare", "@", write(tmp_path, change=change), "--out", str(finished[1])])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


# -- what must not be silent ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_budget_that_the_steps_do_not_reach_is_said_aloud(write, tmp_path, capsys):
    file = write(tmp_path, steps=1, budget="calls = 1000", change=("seeds = [0, 1]", "seeds = [0]"))
    main(["compare", "@", file, "--out", str(tmp_path / "out")])
    assert "group DID NOT SPEND THE BUDGET" in " ".join(capsys.readouterr().out.split())
    before = saved(tmp_path / "out")
    assert set(before["rows"][0]["unspent"]) == {"0"}
    main(["compare", "@", file, "--out", str(tmp_path / "out"), "--train.steps", "2"])
    after = saved(tmp_path / "out")
    assert [run["points"][-1]["step"] for run in after["runs"]] == [2, 2]
    assert after["runs"][0]["points"][:2] == before["runs"][0]["points"]


@pytest.mark.slow
def test_a_failed_run_is_named_and_the_others_go_on(finished, write, tmp_path, capsys):
    """The gap between sampler and learner is never so small, so the tree's runs stop at their first update."""
    _, out = finished
    shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "random_tree")
    broken = write(tmp_path, change=('rollout.policy = "random_tree"', "train.max_gap = 1e-12"))
    text = Path(broken).read_text().replace("rollout.policy_options = {probability = 1.0}", "")
    Path(broken).write_text(text)
    main(["compare", "@", broken, "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().out.split())
    assert "random_tree seed 0 failed: PolicyMismatch" in said
    assert "random_tree seed 1 FAILED and is left out: PolicyMismatch" in said
    found = saved(tmp_path / "out")
    assert [row["finished"] for row in found["rows"]] == [2, 0]
    assert without_seconds(found["runs"])[0] == without_seconds(saved(out)["runs"])[0]


def test_without_a_run_of_the_reference_there_is_no_comparison(write, tmp_path, capsys):
    file = write(tmp_path, env="Broken", change=("seeds = [0, 1]", "seeds = [0]"))
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "@", file, "--out", str(tmp_path / "out")])
    assert stopped.value.code == 3
    assert "every run of group failed" in capsys.readouterr().err


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (("probes = 2", "probe = 2"), UnknownName, r"'compare.probe': did you mean 'compare.probes'"),
        (('rollout.policy = "random_tree"', "rollout.polcy = 1"), UnknownName, "'rollout.polcy'"),
        (('rollout.policy = "random_tree"', 'rollout.policy = "entropy_tree"'), UnknownName, "option of entropy_tree"),
        (
            ('rollout.policy = "random_tree"', 'seed = 3\nrollout.policy = "random_tree"'),
            ConfigError,
            "left to the comp",
        ),
        (("probes = 2", "probes = 2\nreference = 'groop'"), UnknownName, "did you mean 'group'"),
        (("tokens = 260", "tokens = 260, calls = 9"), ConfigError, "compare.budget: .*expected one of calls, tokens"),
        (("tokens = 260", "tokens = 0"), ConfigError, "a number above 0"),
        (("tokens = 260", "leaves = 8"), ConfigError, "learner_tokens"),
        (("seeds = [0, 1]", "seeds = [0, 0]"), ConfigError, "different seeds"),
        (("seeds = [0, 1]", "seeds = []"), ConfigError, "compare.seeds"),
        (("warmup = 1}", "warmup = 1, decay = 0.5}"), ConfigError, "train.decay is 0.5, expected 0"),
        (("warmup = 1}", "warmup = 1, checkpoint_every = 5}"), ConfigError, "checkpoint_every to be left out"),
        (("[compare.methods.random_tree]", '[compare.methods."a/b"]'), ConfigError, "a method's name is a folder's"),
        (("[compare]", "[compare"), ConfigError, "cannot read the configuration"),
    ],
    ids=lambda value: value[1][:24] if isinstance(value, tuple) else "",
)
def test_what_a_file_may_not_say(write, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        load_plan(write(tmp_path, change=change), {})


def test_a_comparison_without_methods_is_refused(write, tmp_path):
    file = Path(write(tmp_path))
    file.write_text(file.read_text().split("[compare.methods")[0] + "methods = {}")
    with pytest.raises(ConfigError, match=r"compare\.methods"):
        load_plan(str(file), {})


def test_a_run_s_configuration_alone_is_no_comparison(write, tmp_path):
    file = Path(write(tmp_path))
    file.write_text(file.read_text().split("[compare]")[0])
    with pytest.raises(ConfigError, match=r"has no table \[compare\]"):
        load_plan(str(file), {})


@pytest.mark.parametrize("name", ["gazetteer", "notebook"])
def test_the_examples_compare_what_the_docs_say(name):
    plan = load_plan(str(Path(__file__).parents[1] / "examples" / f"compare_{name}.toml"), {})
    policies = {method: config.rollout.policy for (method, _), config in plan.configs.items()}
    assert list(policies) == ["group", "random_tree", "entropy_tree", "expand_tree"]
    assert all(method == policy for method, policy in policies.items())
    assert (plan.reference, plan.unit, len(plan.configs)) == ("group", "calls", 20)
    assert {config.env for config in plan.configs.values()} == {name}


def test_flags_change_what_all_methods_share_and_no_methods_own(write, tmp_path):
    plan = load_plan(write(tmp_path), {"train.lr": 5e-4, "rollout.policy": "expand_tree"})
    assert {config.train.lr for config in plan.configs.values()} == {5e-4}
    assert plan.configs["random_tree", 1].rollout.policy == "random_tree"
    assert plan.configs["random_tree", 1].seed == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x"], "expected @ file.toml"),
        (["@", "none.toml"], "compare needs --out DIR"),
        (["@", "none.toml", "--out", "x"], "cannot read the configuration none.toml"),
    ],
    ids=["file", "folder", "no such file"],
)
def test_the_command_asks_for_what_it_needs(words, message, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["compare", *words])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_torchrun_and_a_missing_matplotlib_are_said_before_anything_is_run(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        run_compare("no.toml", {}, tmp_path)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"agentrl\[plots\]"):
        run_compare("no.toml", {}, tmp_path)
