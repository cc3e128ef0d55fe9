"""``agentrl replay``: recorded trees grown again, and differences named where they are."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shutil

import pytest
from same_run import require_equal_bits

from agentrl import registry
from agentrl.cli import main
from agentrl.config import load_config
from agentrl.errors import IsolationUnavailable
from agentrl.renderer import Renderer
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.sandbox.local import LocalSandbox
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.tiny import build_model, save_policy
from agentrl.trace import RunFolder
from agentrl.train import train
from agentrl.types import SamplingParams

SETTINGS = {
    "sampler.temperature": 0.6,  # the tiny policy then makes calls that can be run, and some that cannot
    "sampler.max_length": 160,
    "sampler.max_slots": 64,
    "rollout.prompts": 4,
    "rollout.group": 4,
    "rollout.max_tokens": 48,
    "train.steps": 2,
    "train.lr": 1e-3,
    "train.checkpoint_every": 1,
    "train.keep_checkpoints": 3,
    "algorithm.max_refills": 0,
    "policy.threads": 1,
}
POLICIES = {
    "group": {},
    "random_tree": {},
    "threshold": {"alpha": 0.6, "penalty": 0.05, "first_tokens": 4},
    "bernoulli": {"rule": "bernoulli", "normalize": "size", "first_tokens": 4},
    "monitor": {"monitor": True, "alpha": 0.7, "penalty": 0.3, "first_tokens": 4},
    "arpo_code": {"rule": "arpo_code", "first_tokens": 6},
    "expand_random": {"nodes": 2, "rounds": 2},
    "expand_entropy": {"rank": "entropy", "nodes": 3},
}
ENTROPY = {"threshold", "bernoulli", "monitor", "arpo_code"}


def kind(name):
    return "entropy_tree" if name in ENTROPY else "expand_tree" if name.startswith("expand") else name


@pytest.fixture(scope="session")
def start(policy_folder, scripted):
    """Trains in a folder; other settings win."""
    require_equal_bits(policy_folder)

    def run(out, **changes):
        fixed = {"env": scripted("Shy"), "policy.path": str(policy_folder)}
        config = load_config(None, SETTINGS | fixed | {key.replace("__", "."): value for key, value in changes.items()})
        values = config.model_dump(mode="json")
        with RunFolder.create(out, values, environment=config.env, keep=config.train.keep_checkpoints) as folder:
            asyncio.run(train(config, folder))
        return out

    return run


@pytest.fixture(scope="session")
def runs(start, tmp_path_factory):
    """A run of two steps by the name of its policy, made when it is first asked for."""
    made = {}

    def run(name):
        if name not in made:
            out = tmp_path_factory.mktemp("runs") / name
            made[name] = start(out, rollout__policy=kind(name), rollout__policy_options=POLICIES[name])
        return made[name]

    return run


@pytest.fixture
def agentrl(capsys):
    """``agentrl`` with some words: exit status, output, errors."""

    def call(*words):
        try:
            main([str(word) for word in words])
            status = 0
        except SystemExit as ended:
            status = ended.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def same(agentrl):
    """Asserts that a rollout comes out as it was; gives the notes."""

    def check(run, rollout, *flags):
        step, place = map(int, rollout.split("/"))
        tree = trees_of(run, step)[place]
        status, printed, error = agentrl("replay", run, "--rollout", rollout, *flags)
        tokens = sum(len(node["token_ids"]) for node in tree["nodes"])
        counts = f"{len(tree['nodes'])} nodes, {tokens} tokens, {len(tree['leaves'])} leaves"
        *notes, verdict = printed.splitlines() or [""]
        assert verdict == f"identical: {counts}, {len(tree['decisions'])} decisions", printed + error
        assert status == 0
        return "\n".join(notes)

    return check


@pytest.fixture
def tampered(runs, tmp_path):
    """A run like that of a policy, with a change to one of its trees."""

    def make(name, change, rollout="2/0"):
        run, out = runs(name), tmp_path / "tampered"
        shutil.copytree(run, out, ignore=shutil.ignore_patterns("checkpoints"))
        (out / "checkpoints").symlink_to(run / "checkpoints")
        step, place = map(int, rollout.split("/"))
        trees = trees_of(out, step)
        change(trees[place])
        file = out / "rollouts" / f"step_{step:06d}.jsonl"
        file.write_text("".join(json.dumps(tree) + "\n" for tree in trees))
        return out

    return make


def trees_of(run, step):
    return [json.loads(line) for line in (run / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def largest(run, step):
    """The ID of the tree with the most nodes."""
    trees = trees_of(run, step)
    return f"{step}/{max(range(len(trees)), key=lambda place: len(trees[place]['nodes']))}"


def with_result(run):
    """The ID of a tree whose tool was really run, and the index of the first such node."""
    return next(
        (f"{step}/{place}", index)
        for step in (2, 1)
        for place, tree in enumerate(trees_of(run, step))
        for index, node in enumerate(tree["nodes"])
        if node["tool_results"] and not node["tool_results"][0]["error"]
    )


def path_to(tree, node):
    """Names of the leaves below a node, the first first."""
    below = []
    for leaf in tree["leaves"]:
        index = leaf["node"]
        while index >= 0:
            if index == node:
                below.append(".".join(map(str, leaf["name"])))
            index = tree["nodes"][index]["parent"]
    return below


# -- the same --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_a_tree_comes_out_as_it_was(runs, same, name):
    """Steps 1 and 2 were written by different weights."""
    run = runs(name)
    same(run, largest(run, 1))
    notes = same(run, largest(run, 2), "--recorded-tokens")
    assert "log-probs and entropies are the record's own" in notes
    decisions = [each for step in (1, 2) for tree in trees_of(run, step) for each in tree["decisions"]]
    if kind(name) in ("entropy_tree", "random_tree"):
        assert any(each["granted"] for each in decisions)
        assert any(not each["granted"] for each in decisions)
    assert ("what was pruned is not in the record" in notes) == name.startswith("expand")
    if name.startswith("expand"):
        notes = same(run, largest(run, 2), "--live")
        assert "pruned" not in notes


@pytest.mark.parametrize(
    ("name", "budget"), [("bernoulli", "task_budget"), ("expand_random", "task_budget"), ("group", "step_budget")]
)
def test_where_a_budget_cut_is_as_recorded(start, same, tmp_path, name, budget):
    most = {"task_budget": {"tokens": 40, "calls": 2}, "step_budget": {"tokens": 120}}
    options = {"rollout__policy": kind(name), "rollout__policy_options": POLICIES[name]}
    run = start(tmp_path / "run", **options, **{f"rollout__{budget}": most[budget]}, train__steps=1)
    trees = trees_of(run, 1)
    cut = [i for i, tree in enumerate(trees) if any(leaf["outcome"] == "budget" for leaf in tree["leaves"])]
    assert cut
    same(run, f"1/{cut[0]}")
    same(run, f"1/{cut[-1]}", "--recorded-tokens")


def test_results_of_the_last_turn_are_recorded(start, same, tmp_path, monkeypatch, scripted):
    """No node holds them, and the reward hangs on them."""
    monkeypatch.setattr(registry.load("envs", scripted("Shy")), "max_turns", 1)
    run = start(tmp_path / "run", train__steps=1)
    trees = trees_of(run, 1)
    last = [(i, leaf) for i, tree in enumerate(trees) for leaf in tree["leaves"] if leaf["tool_results"]]
    assert all(leaf["reward"] == 1.0 for _, leaf in last)
    place, _ = next((i, leaf) for i, leaf in last if leaf["tool_results"][0]["name"] == "double")
    same(run, f"1/{place}", "--recorded-tokens")


@pytest.mark.parametrize("name", ["group", "random_tree", "threshold", "expand_random"])
def test_failures_are_said_and_not_compared(start, same, tmp_path, monkeypatch, scripted, name):
    shy = registry.load("envs", scripted("Shy"))
    reward, asked = shy.reward, 0

    async def sometimes(self, task, episode):
        nonlocal asked
        asked += 1
        if asked % 3 == 0:
            raise RuntimeError("the judge is out")
        return await reward(self, task, episode)

    with monkeypatch.context() as patch:
        patch.setattr(shy, "reward", sometimes)
        options = {"rollout__policy": kind(name), "rollout__policy_options": POLICIES[name], "rollout__retries": 0}
        run = start(tmp_path / "run", **options, train__steps=1, rollout__max_failures=1.0)
    said = ""
    for place, tree in enumerate(trees_of(run, 1)):
        failed = any(leaf["outcome"] == "env_failure" for leaf in tree["leaves"])
        notes = same(run, f"1/{place}", *(("--recorded-tokens",) if place else ()))
        assert ("ended with env_failure: compared as far as it got" in notes) == failed
        said += notes
    assert ("ended with env_failure" if name == "group" else "branches that failed are not in the record") in said


def test_an_environment_that_is_no_tool_env_is_played_live(start, same, tmp_path, scripted):
    file = tmp_path / "plain.py"
    file.write_text(
        "from agentrl import registry\n"
        f"Shy = registry.load('envs', {scripted('Shy')!r})\n"
        "class Plain:\n"
        "    def __init__(self): self.inner = Shy()\n"
        "    def __getattr__(self, name): return getattr(self.inner, name)\n"
    )
    run = start(tmp_path / "run", env=f"{file}:Plain", train__steps=1)
    assert "Plain is no ToolEnv: it was played again live" in same(run, largest(run, 1))


# -- another machine, another day ------------------------------------------------------------------------------------


def test_tools_answer_from_the_record_unless_they_are_asked_again(runs, same, agentrl, monkeypatch, scripted, tmp_path):
    run = runs("random_tree")
    (tool,) = registry.load("envs", scripted("Shy")).tools
    monkeypatch.setattr(tool, "run", lambda x: asyncio.sleep(0, str(3 * x)))  # the schema is in the prompt and stays
    (rollout, index), target = with_result(run), tmp_path / "verdict.json"
    same(run, rollout)
    same(run, rollout, "--recorded-tokens")
    status, printed, _ = agentrl("replay", run, "--rollout", rollout, "--live", "--json", target)
    assert status == 1
    step, place = map(int, rollout.split("/"))
    verdict, nodes = json.loads(target.read_text()), trees_of(run, step)[place]["nodes"]
    first = verdict["difference"]
    assert not verdict["identical"]
    assert first["what"] == "token"
    assert first["node"] == index
    assert first["recorded"] == nodes[index]["token_ids"][first["token"]] != first["replayed"]
    leaf = ".".join(map(str, first["leaf"]))
    assert f"different: token, at leaf {leaf}, turn 1, node {index} (tool), token {first['token']}\n" in printed
    before, after = verdict["text"]
    assert before != after
    assert f"{before!r}" in printed


def test_without_the_weights_of_then(start, same, agentrl, tmp_path):
    run = start(tmp_path / "run", train__keep_checkpoints=1, rollout__policy="random_tree")
    status, printed, error = agentrl("replay", run, "--rollout", "2/1")
    assert (status, printed) == (2, "")
    assert "rollout 2/1 was sampled by version 1 of the policy" in error
    assert "there are versions 0, 2. Rollouts of these steps can be sampled again: 1." in error
    same(run, "1/1")
    same(run, "2/1", "--recorded-tokens")


def test_mixed_weights_are_refused(tampered, agentrl):
    def mix(tree):
        node = next(node for node in tree["nodes"] if node["author"] == "policy")
        node["policy_version"][-1] = 0

    status, _, error = agentrl("replay", tampered("group", mix), "--rollout", "2/0")
    assert status == 2
    assert "versions [0, 1] of the policy" in error


# -- differences -----------------------------------------------------------------------------------------------------


def policy_node(tree):
    """The last node of the policy, and its index."""
    return max((i, node) for i, node in enumerate(tree["nodes"]) if node["author"] == "policy" and i)


@pytest.mark.parametrize("column", ["token_ids", "logprobs", "entropies"])
def test_a_changed_token_is_found(tampered, agentrl, column):
    place = None

    def change(tree):
        nonlocal place
        index, node = policy_node(tree)
        position = len(node[column]) // 2
        node[column][position] += 1 if column == "token_ids" else 1e-6
        place = path_to(tree, index)[0], index, position, node[column][position]

    status, printed, _ = agentrl("replay", tampered("random_tree", change), "--rollout", "2/0")
    leaf, node, position, value = place
    what = {"token_ids": "token", "logprobs": "log-prob", "entropies": "entropy"}[column]
    where = rf"leaf {re.escape(leaf)}, turn \d, node {node} \(policy\), token {position}"
    assert re.search(rf"^different: {what}, at {where}$", printed, re.M)
    assert re.search(rf"^  recorded  {re.escape(str(value))}\b", printed, re.M)
    assert status == 1


def test_a_changed_reward_is_found(tampered, agentrl):
    def change(tree):
        tree["leaves"][2]["reward"] += 0.5

    run = tampered("group", change)
    for flags in ((), ("--recorded-tokens",)):
        status, printed, _ = agentrl("replay", run, "--rollout", "2/0", *flags)
        assert "different: reward, at leaf 2, turn" in printed
        assert status == 1


def test_a_changed_mask_is_found(runs, tampered, agentrl):
    rollout, index = with_result(runs("random_tree"))

    def change(tree):
        tree["nodes"][index]["author"] = "prompt"

    status, printed, _ = agentrl("replay", tampered("random_tree", change, rollout), "--rollout", rollout)
    assert re.search(rf"^different: author, at leaf [\d.]+, turn 1, node {index} \(prompt\)$", printed, re.M)
    assert status == 1


def test_a_changed_tool_result_is_found(runs, tampered, agentrl):
    """The tokens that it became are other ones from the first changed character on."""
    rollout, index = with_result(runs("random_tree"))

    def change(tree):
        result = tree["nodes"][index]["tool_results"][0]
        result["content"] = "9" + result["content"]

    run = tampered("random_tree", change, rollout)
    for flags in ((), ("--recorded-tokens",)):
        status, printed, _ = agentrl("replay", run, "--rollout", rollout, *flags)
        place = rf"leaf [\d.]+, turn 1, node {index} \(tool\), token \d+"
        assert re.search(rf"^different: token, at {place}$", printed, re.M)
        assert status == 1


@pytest.mark.parametrize("name", ["random_tree", "bernoulli"])
@pytest.mark.parametrize("what", ["draw", "wanted"])
def test_a_changed_decision_is_found(runs, tampered, agentrl, name, what):
    run = runs(name)
    place = next(i for i, tree in enumerate(trees_of(run, 2)) if tree["decisions"])
    first = trees_of(run, 2)[place]["decisions"][0]

    def change(tree):
        decision = tree["decisions"][0]
        decision[what] = not decision[what] if what == "wanted" else decision[what] / 2

    status, printed, _ = agentrl("replay", tampered(name, change, f"2/{place}"), "--rollout", f"2/{place}")
    where = f"leaf {'.'.join(map(str, first['name']))}, turn {first['turn']}"
    assert f"different: decision, at {where}\n" in printed
    assert status == 1


def test_a_leaf_that_is_not_granted_is_missing(runs, tampered, agentrl):
    run = runs("random_tree")
    trees = trees_of(run, 2)
    place, decision = next((i, d) for i, tree in enumerate(trees) for d in tree["decisions"] if d["granted"])

    def change(tree):
        next(each for each in tree["decisions"] if each["granted"]).update(granted=False, reason="")

    changed = tampered("random_tree", change, f"2/{place}")
    status, printed, _ = agentrl("replay", changed, "--rollout", f"2/{place}", "--recorded-tokens")
    name = ".".join(map(str, (*decision["name"], decision["turn"])))
    assert f"different: leaf, at leaf {name}\n  recorded  True\n  now       False" in printed
    assert status == 1


# -- what is asked for -----------------------------------------------------------------------------------------------


def test_what_there_is(runs, agentrl):
    run = runs("group")
    status, printed, _ = agentrl("replay", run)
    assert status == 0
    head, *rows, note, last = printed.splitlines()
    assert head.split() == ["rollout", "leaves", "mean", "task"]
    assert note == "mean: of the rewards of all leaves"
    assert [row.split()[0] for row in rows] == ["2/0", "2/1", "2/2", "2/3"]
    assert [row.split()[3] for row in rows] == [tree["task"]["id"] for tree in trees_of(run, 2)]
    assert last == "the rollouts of steps 1 to 2 are there"


def test_by_the_tasks_name(runs, agentrl):
    run = runs("group")
    task = trees_of(run, 1)[2]["task"]["id"]
    assert agentrl("replay", run, "--rollout", f"1/{task}", "--recorded-tokens")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rollout", "7/0"], "no rollouts of step 7"),
        (["--rollout", "1/4"], "step 1 has the trees 0 to 3, and no task '4'"),
        (["--rollout", "1/nobody"], "step 1 has the trees 0 to 3, and no task 'nobody'"),
        (["--rollout", "first"], "expected STEP/INDEX or STEP/TASK_ID"),
        (["--rollout"], "--rollout needs a value"),
        (["--live"], "expected --rollout STEP/INDEX"),
        (["--rollout", "1/0", "--train.steps", "3"], "--train.steps does not go with this command"),
        (["--rollout", "1/0", "--json", "/nowhere/at/all.json"], "/nowhere/at is no folder"),
    ],
)
def test_what_cannot_be_asked_for(runs, agentrl, words, message):
    status, _, error = agentrl("replay", runs("group"), *words)
    assert message in error
    assert status == 2


def test_what_is_no_run(agentrl, tmp_path, runs, tampered):
    status, _, error = agentrl("replay", tmp_path, "--rollout", "1/0")
    assert status == 2
    assert "is not a run folder" in error
    run = tampered("group", lambda tree: tree.pop("seed"))
    status, _, error = agentrl("replay", run, "--rollout", "2/1")
    assert status == 2
    assert "step_000002.jsonl, line 1 cannot be read (KeyError: 'seed')" in error


# -- a live sandbox --------------------------------------------------------------------------------------------------


async def test_a_notebook_is_played_again_in_live_sandboxes(tokenizer, scripted_sampler, tmp_path, agentrl, same):
    """The first turn's variable is there after the fork, in the record and again."""
    async with LocalSandbox() as sandbox:
        try:
            await (await sandbox.open()).close()
        except IsolationUnavailable as error:
            pytest.skip(str(error))
    policy = tmp_path / "policy"
    save_policy(build_model(tokenizer, hidden=64, layers=2, context=4096, seed=1), tokenizer, policy)
    options = {"probability": 1.0, "initial": 1}
    config = load_config(
        None,
        {"env": "notebook", "env_options": {"length": 3, "count": 4}, "policy.path": str(policy)}
        | {"sampler.max_length": 4000, "rollout.max_tokens": 2000, "rollout.group": 3}
        | {"rollout.policy": "random_tree", "rollout.policy_options": options},
    )
    notebook = registry.make("notebook", length=3, count=4)
    task = next(iter(notebook.tasks("train")))
    renderer = Renderer(tokenizer)
    said = [tokenizer.decode(renderer.assistant(message)) for message in notebook.expert(task, random.Random(0))]
    params = SamplingParams(2000)
    sampler = scripted_sampler(*said)
    sampler.max_length = 4000
    limits = config.rollout
    scheduler = Scheduler(
        lambda: registry.make("notebook", length=3, count=4),
        lambda seed: TokenWriter(sampler, renderer, params, seed),
        limits,
        params,
    )
    trees = await scheduler.grow([task], seed=3)
    await close_shared_sandboxes()
    run = tmp_path / "run"
    with RunFolder.create(run, config.model_dump(mode="json"), environment="notebook") as folder:
        folder.write_rollouts(1, trees)
    assert [leaf.reward for leaf in trees[0].leaves] == [1.0] * 3
    assert sum(decision.granted for decision in trees[0].decisions) == 2
    await asyncio.to_thread(same, run, "1/0", "--recorded-tokens", "--live")
    notes = await asyncio.to_thread(same, run, "1/0", "--recorded-tokens")
    assert "tool python has a state" in notes
