"""Trees over live sandboxes: what branches share, what they do not, and what is left when they are over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import signal
import textwrap
import time
from pathlib import Path

import pytest

from agentrl import registry
from agentrl.cli import main
from agentrl.config import RolloutConfig, SandboxConfig
from agentrl.env import make_tool
from agentrl.errors import IsolationUnavailable, SandboxError
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.sandbox.launcher import PROCESS_NAME
from agentrl.sandbox.local import LocalSandbox
from agentrl.sandbox.session import LocalSession
from agentrl.sandbox.shared import close_shared_sandboxes, shared_sandbox, use_sandbox
from agentrl.seeds import derive_seed
from agentrl.types import ForkLevel, Outcome, SamplingParams

Notebook, UnitTests = (registry.load("envs", name) for name in ("notebook", "unit_tests"))
PARAMS = SamplingParams(20_000)
SEED = 3
IDLE = 0
"""Processes of a manager without sessions."""

POLICIES = {
    "random_tree": {"initial": 2, "probability": 1.0},
    "entropy_tree": {"initial": 2, "alpha": 9.0, "first_tokens": 5},
    "expand_tree": {"trees": 2, "nodes": 3, "rounds": 2},
}
CELL = """
    seen = globals().get("seen", []) + [{number}]
    notes = open("notes.txt", "a+"); notes.write("{number} "); notes.seek(0)
    import random
    print(seen, notes.read(), random.random())
"""


class Small(Notebook):
    """Pages of ten numbers."""

    max_turns = 5

    def __init__(self):
        super().__init__(length=10, count=8)


class Replayed(Small):
    """Whose forks play the episode again."""

    def make_tools(self):
        python = make_tool("python")
        python.fork_level = ForkLevel.REPLAY
        return [python]


class Coding(UnitTests):
    max_turns = 5

    def __init__(self):
        super().__init__(level=1, count=8)


def notebook_answer(task, number):
    return task.answer if number % 3 else "0"


def coding_answer(task, number):
    wrong = f"def {task.metadata['function']}(*given):\n    return {number % 3}"
    return task.metadata["solution"] if number % 3 else wrong


WORLDS = {"notebook": (Small, notebook_answer), "unit_tests": (Coding, coding_answer)}
ALL = WORLDS | {"replayed": (Replayed, notebook_answer)}


def written(code):
    return f"<tool_call>\n{json.dumps({'name': 'python', 'arguments': {'code': code}})}\n</tool_call><|im_end|>"


def cell(number):
    return textwrap.dedent(CELL).format(number=number)


def number_of(name, turn, task, copy=1):
    """What tells a trajectory's turn from all others': its seed, cut."""
    return derive_seed(derive_seed(derive_seed(SEED, task.id, copy, *name), turn)) % 10**6


@pytest.fixture(autouse=True)
async def _sandboxes():
    """Nothing that was opened is open when a test is over, before the manager is closed."""
    descriptors, others = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    try:
        await (await shared_sandbox().open()).close()
    except IsolationUnavailable as error:
        pytest.skip(str(error))
    global IDLE
    IDLE = len(processes())
    yield
    await nothing_open()
    await close_shared_sandboxes()
    use_sandbox(SandboxConfig())
    assert not processes()
    assert len(asyncio.all_tasks()) == others
    assert len(os.listdir("/proc/self/fd")) == descriptors


def processes():
    """The zygotes and sessions of this process."""
    wanted, found = f'"manager": {os.getpid()},'.encode(), []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if line.rstrip(b"\0").endswith(PROCESS_NAME.encode()) and wanted in line:
                found.append(int(entry.name))
    return found


async def nothing_open():
    manager = shared_sandbox()
    assert manager.places == 0
    assert not manager._sandbox._sessions
    end = time.monotonic() + 5
    while len(processes()) > IDLE:
        assert time.monotonic() < end, "sessions live on"
        await asyncio.sleep(0.01)


@pytest.fixture
def policy(renderer, scripted_sampler):
    """A scheduler of an environment, and a policy that does something else in every turn of every trajectory.

    ``cells[number]`` is what it does instead in that turn. ``calls`` turns are calls, the next is the answer.
    """

    def make(make_env, answer, tasks, *, cells=None, calls=3, **limits):
        prompts = {}

        def script(ids, params):
            number = derive_seed(params.seed) % 10**6
            turn = (list(ids).count(start) - 3) // 2
            if turn < calls:
                return written((cells or {}).get(number) or cell(number))
            (task,) = (task for prompt, task in prompts.items() if tuple(ids[: len(prompt)]) == prompt)
            return f"{answer(task, number)}<|im_end|>"

        start = renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")
        sampler = scripted_sampler(script)
        sampler.max_length = 100_000
        tools = [made.schema for made in make_env().make_tools()]
        prompts |= {renderer.prompt(task.prompt, tools): task for task in tasks}
        options = {"group": 6, "max_tokens": PARAMS.max_tokens, "max_failures": 1.0, "deadline": 50.0} | limits
        return Scheduler(
            make_env, lambda seed: TokenWriter(sampler, renderer, PARAMS, seed), RolloutConfig(**options), PARAMS
        )

    return make


def tasks_of(make_env, count=1):
    return list(make_env().tasks("train"))[:count]


def actions_of(tree, leaf):
    return [node.messages[0] for node in tree.path(leaf) if node.author == "policy"]


def results_of(tree, leaf):
    return [result.content for node in tree.path(leaf) for result in node.tool_results]


def content(tree):
    """What each trajectory was, by name; numbers of nodes are left out."""
    return {
        leaf.name: ([node.token_ids for node in tree.path(leaf)], results_of(tree, leaf), leaf.reward, leaf.outcome)
        for leaf in tree.leaves
    }


async def alone(make_env, tree, leaf):
    """The results and the reward of the same actions, played without any fork."""
    env = make_env()
    results = []
    try:
        await env.reset(seed=derive_seed(SEED, tree.task.id, tree.copy, leaf.name[0]), options={"task": tree.task})
        for action in actions_of(tree, leaf):
            step = await env.step(action)
            results += [result.content for result in step.info["tool_results"]]
        return results, step.reward
    finally:
        await env.close()


@pytest.mark.parametrize("world", ALL)
@pytest.mark.parametrize("kind", POLICIES)
async def test_every_branch_has_exactly_its_own_state(policy, kind, world):
    make_env, answer = ALL[world]
    tasks = tasks_of(make_env, 1 if world == "unit_tests" else 2)
    limits = {"policy": kind, "policy_options": POLICIES[kind]}
    trees = await policy(make_env, answer, tasks, **limits).grow(tasks, seed=SEED)
    await nothing_open()
    for tree in trees:
        assert len(tree.leaves) == 6
        assert sum(len(leaf.name) > 1 for leaf in tree.leaves) >= 2, "most of them branched off"
        assert tree.spent.get("forks_failed", 0) == tree.spent.get("dropped", 0) == 0
        assert len(set(tree.rewards)) == 2, "not all of them did the same"
        for leaf in tree.leaves:
            results, reward = await alone(make_env, tree, leaf)
            assert (results_of(tree, leaf), leaf.reward) == (results, reward)
            seen = []
            for action, result in zip(actions_of(tree, leaf), results, strict=False):
                seen.append(int(action.tool_calls[0].arguments["code"].split("[", 2)[2].split("]")[0]))
                assert result.startswith(f"{seen} {' '.join(map(str, seen))}  0.")


@pytest.mark.parametrize("world", ["notebook", pytest.param("unit_tests", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", POLICIES)
async def test_cancelling_at_any_moment_leaves_nothing(policy, kind, world):
    make_env, answer = WORLDS[world]
    tasks = tasks_of(make_env, 1)
    limits = {"policy": kind, "policy_options": POLICIES[kind]}
    began = time.perf_counter()
    await policy(make_env, answer, tasks, **limits).grow(tasks, seed=SEED)
    whole, rng = time.perf_counter() - began, random.Random(f"{kind} {world}")
    before, called_off = asyncio.all_tasks(), 0
    moments = 15 if world == "notebook" else 6
    for moment in range(moments):
        growing = asyncio.create_task(policy(make_env, answer, tasks, **limits).grow(tasks, seed=SEED))
        await asyncio.sleep(whole * (moment + rng.random()) / moments)
        growing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await growing
        called_off += growing.cancelled()
        assert asyncio.all_tasks() == before
        await nothing_open()
    assert called_off > moments / 2


# -- failures of one branch -------------------------------------------------------------------------------------------

VICTIM, TURN = (0, 1), 2
"""The branch that fails, and in which of its turns."""
BRANCHING = {"policy": "random_tree", "policy_options": {"initial": 1, "probability": 1.0}, "group": 8}
"""With three calls each, all the trajectories that there can be: one for every set of turns at which it branched."""


async def undisturbed(policy, make_env=Small, **options):
    tasks = tasks_of(make_env)
    (tree,) = await policy(make_env, notebook_answer, tasks, **BRANCHING, **options).grow(tasks, seed=SEED)
    assert [leaf.name[1:] for leaf in tree.leaves] == [(), (1,), (1, 2), (1, 2, 3), (1, 3), (2,), (2, 3), (3,)]
    return tree, tasks[0]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os._exit(3)", "ended with exit status 3"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("hoard = []\nwhile True: hoard.append(bytearray(10**7))", "MemoryError"),
        ("import signal\nsignal.signal(2, signal.SIG_IGN)\nwhile True: pass", "killed"),
        ("import os; os.close(3)", "lost"),
        ("import os\nfor n in range(100):\n    os.fork() or os._exit(0)\n    os.wait()", "No output."),
    ],
    ids=["exit", "crash", "memory", "deaf", "hang-up", "children"],
)
async def test_what_a_branch_does_to_its_session_is_its_own_affair(policy, monkeypatch, code, said):
    monkeypatch.setattr("agentrl.sandbox.session.GRACE_SECONDS", 0.3)
    monkeypatch.setattr(registry.load("tools", "python"), "deadline", 0.5, raising=False)
    tree, task = await undisturbed(policy)
    cells = {number_of(VICTIM, TURN, task): code}
    (hit,) = await policy(Small, notebook_answer, [task], cells=cells, **BRANCHING).grow([task], seed=SEED)
    expected, found = content(tree), content(hit)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == [VICTIM, (*VICTIM, TURN + 1)]
    (leaf,) = (leaf for leaf in hit.leaves if leaf.name == VICTIM)
    assert leaf.outcome is Outcome.ANSWERED, "it is the policy's own doing, and has a reward"
    assert said in results_of(hit, leaf)[TURN]
    await nothing_open()


class Judged(Small):
    """Its reward fails for whoever confesses."""

    async def reward(self, task, episode):
        if any("guilty" in result.content for result in episode.tool_results):
            raise RuntimeError("the judge is out")
        return await super().reward(task, episode)


async def test_a_reward_that_raises_is_no_one_elses_affair(policy):
    tree, task = await undisturbed(policy, Judged)
    cells = {number_of(VICTIM, TURN, task): "'guilty'"}
    (hit,) = await policy(Judged, notebook_answer, [task], cells=cells, **BRANCHING).grow([task], seed=SEED)
    expected, found = content(tree), content(hit)
    assert VICTIM not in found
    assert all(found[name] == expected[name] for name in expected if name in found)
    assert {name for name in expected if name not in (VICTIM, (*VICTIM, TURN + 1))} <= found.keys()
    assert len(found) == len(expected), "the leaf was played anew from the prompt"
    assert hit.spent["dropped"] == 2, "and one that branched off it later, with the same confession"
    (reason,) = (each.reason for each in hit.decisions if (*each.name, each.turn) == VICTIM)
    assert "env_failure" in reason


async def test_a_tool_that_dies_during_a_fork_is_named_and_costs_only_that_branch(policy, monkeypatch):
    tree, task = await undisturbed(policy)
    python, forks = registry.load("tools", "python"), []
    fork = python.fork

    async def dying(self):
        forks.append(self)
        if len(forks) == 1:
            raise SandboxError("the zygote is gone")
        return await fork(self)

    monkeypatch.setattr(python, "fork", dying)
    (hit,) = await policy(Small, notebook_answer, [task], **BRANCHING).grow([task], seed=SEED)
    lost = next(each for each in hit.decisions if each.wanted and not each.granted)
    assert "tool 'python' failed while it was forked: SandboxError: the zygote is gone" in lost.reason
    assert hit.spent["forks_failed"] == 1
    expected, found = content(tree), content(hit)
    assert all(found[name] == expected[name] for name in expected.keys() & found.keys())
    assert (0,) in found
    assert len(found) == len(expected)


async def test_a_zygote_killed_in_the_middle_of_a_fork_costs_no_reward(policy, monkeypatch):
    """It takes all sessions with it; what can be repeated is repeated, the rest is played from the prompt."""
    tree, task = await undisturbed(policy)
    split, killed = LocalSession._split, []

    async def struck(self, child, request):
        if not killed:
            (zygote,) = shared_sandbox()._sandbox._zygotes.values()
            killed.append(zygote._process.pid)
            os.kill(killed[0], signal.SIGKILL)
        await split(self, child, request)

    monkeypatch.setattr(LocalSession, "_split", struck)
    (hit,) = await policy(Small, notebook_answer, [task], **BRANCHING).grow([task], seed=SEED)
    assert killed
    expected, found = content(tree), content(hit)
    assert all(leaf.outcome is Outcome.ANSWERED for leaf in hit.leaves)
    assert len(found) == len(expected)
    assert all(found[name] == expected[name] for name in expected.keys() & found.keys())
    for leaf in hit.leaves:
        assert await alone(Small, hit, leaf) == (results_of(hit, leaf), leaf.reward)
    lost = [each.reason for each in hit.decisions if each.wanted and not each.granted]
    assert any("tool 'python' failed while it was forked: Sandbox" in reason for reason in lost), lost


async def test_a_program_that_cannot_be_forked_is_named_and_goes_on(policy):
    task = tasks_of(Small)[0]
    thread = "import threading; gone = threading.Event(); threading.Thread(target=gone.wait).start(); 'started'"
    cells = {number_of((0,), 1, task): thread, number_of((0,), 2, task): "gone.set(); 'over'"}
    (tree,) = await policy(Small, notebook_answer, [task], cells=cells, **BRANCHING).grow([task], seed=SEED)
    (lost,) = (each for each in tree.decisions if each.wanted and each.reason.startswith("ForkRefused"))
    assert (lost.name, lost.turn) == ((0,), 2)
    assert "Small cannot fork: tool 'python'" in lost.reason
    assert "running thread" in lost.reason
    assert "python is not declared pure" in lost.reason
    assert tree.spent["forks_failed"] == 1
    assert len(tree.leaves) == 8
    assert results_of(tree, tree.leaves[0])[1:] == ["'started'", "'over'"]


@pytest.mark.parametrize("after", [0.0, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006])
async def test_what_was_being_forked_goes_on_when_the_fork_is_called_off(after):
    python = make_tool("python")
    await python.start(0)
    try:
        await python.run("x = 1")
        forking = asyncio.create_task(python.fork())
        await asyncio.sleep(after)
        forking.cancel()
        twin = (await asyncio.gather(forking, return_exceptions=True))[0]
        if not isinstance(twin, BaseException):
            await twin.close()
        assert await python.run("x + 1") == "2"
    finally:
        await python.close()


# -- the end of a chain of forks ---------------------------------------------------------------------------------------


class Long(Small):
    max_turns = 40


@pytest.mark.parametrize("kind", [pytest.param("random_tree", marks=pytest.mark.slow), "expand_tree"])
async def test_a_chain_of_forks_that_is_too_deep_is_counted_and_goes_on_without(policy, kind):
    options = {"random_tree": {"initial": 1, "probability": 1.0}, "expand_tree": {"trees": 1, "nodes": 3}}[kind]
    group = {"random_tree": 40, "expand_tree": 4}[kind]
    task = tasks_of(Long)[0]
    scheduler = policy(
        Long, notebook_answer, [task], calls=34, policy=kind, policy_options=options, group=group, max_live=1
    )
    (tree,) = await scheduler.grow([task], seed=SEED)
    assert tree.spent["forks_failed"] >= 3
    assert len(tree.leaves) == group
    (root,) = (leaf for leaf in tree.leaves if leaf.name == (0,))
    results, reward = await alone(Long, tree, root)
    assert (results_of(tree, root), root.reward, len(results)) == (results, reward, 34)
    refused = [each.reason for each in tree.decisions if each.reason.startswith("ForkRefused")]
    assert all("the kernel nests namespaces 32 deep" in reason for reason in refused)
    assert bool(refused) is (kind == "random_tree")


async def test_expand_tree_at_the_shipped_length_never_reaches_the_end(policy):
    class Whole(Small):
        max_turns = Notebook.max_turns

    options = {"trees": 1, "nodes": 4, "rounds": 4}
    tasks = tasks_of(Whole)
    scheduler = policy(Whole, notebook_answer, tasks, calls=5, policy="expand_tree", policy_options=options, group=16)
    (tree,) = await scheduler.grow(tasks, seed=SEED)
    assert tree.spent.get("forks_failed", 0) == 0
    assert len(tree.leaves) == 16


# -- how many sessions ------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """How many sessions that can run something were alive at once; those that only live on for their forks are not."""
    most = [0]
    opened, forked = LocalSandbox.open, LocalSession.fork

    def count():
        alive = [s for s in shared_sandbox()._sandbox._sessions if not s._closed and not s._frozen]
        most[0] = max(most[0], len(alive))

    async def counting_open(self, *arguments, **options):
        session = await opened(self, *arguments, **options)
        count()
        return session

    async def counting_fork(self, *arguments, **options):
        session = await forked(self, *arguments, **options)
        count()
        return session

    monkeypatch.setattr(LocalSandbox, "open", counting_open)
    monkeypatch.setattr(LocalSession, "fork", counting_fork)
    return most


async def limited_to(most):
    await close_shared_sandboxes()
    use_sandbox(SandboxConfig(max_sessions=most))


@pytest.mark.parametrize(
    ("world", "kind", "most"),
    [
        *(("notebook", kind, 4) for kind in POLICIES),
        ("notebook", "random_tree", 1),
        ("replayed", "random_tree", 4),
        ("unit_tests", "random_tree", 1),
        pytest.param("unit_tests", "random_tree", 4, marks=pytest.mark.slow),
    ],
)
async def test_no_more_sessions_than_allowed_and_everybody_gets_there(policy, counted, world, kind, most):
    await limited_to(most)
    make_env, answer = ALL[world]
    tasks = tasks_of(make_env, 2 if world == "unit_tests" else 4)
    options = POLICIES[kind] | ({"trees": 4} if kind == "expand_tree" else {})
    scheduler = policy(make_env, answer, tasks, group=8, max_live=6, policy=kind, policy_options=options)
    async with asyncio.timeout(40):
        trees = await scheduler.grow(tasks, seed=SEED)
    assert [len(tree.leaves) for tree in trees] == [8] * len(tasks)
    assert {leaf.outcome for tree in trees for leaf in tree.leaves} == {Outcome.ANSWERED}
    assert counted[0] == most
    assert sum(tree.spent.get("forks_failed", 0) for tree in trees) > 0
    reasons = {each.reason for tree in trees for each in tree.decisions if each.reason.startswith("ForkRefused")}
    assert all("there is no room for another session" in reason for reason in reasons)
    await nothing_open()
    rewards = [leaf.reward for tree in trees for leaf in tree.leaves[:2]]
    await limited_to(100)
    assert rewards == [(await alone(make_env, tree, leaf))[1] for tree in trees for leaf in tree.leaves[:2]]


async def test_who_waits_for_a_session_is_named_in_the_stall_report(policy, caplog):
    await limited_to(1)
    tasks = tasks_of(Small, 1)
    held = await shared_sandbox().open()
    scheduler = policy(Small, notebook_answer, tasks, group=1, stall=0.05)
    growing = asyncio.create_task(scheduler.grow(tasks, seed=SEED))
    with caplog.at_level(logging.WARNING):
        for _ in range(500):
            await asyncio.sleep(0.01)
            if "stalled" in caplog.text:
                break
    await held.close()
    await growing
    said = "has been in reset, waiting for one of 1 sandbox sessions (sandbox.max_sessions), of turn 0"
    assert said in caplog.text


# -- an environment that cannot be forked -----------------------------------------------------------------------------

STUBBORN = '''
from agentrl import Message, Task, ToolEnv
from agentrl.tool import Tool
from agentrl.types import ForkLevel


class Printer(Tool):
    name = "printer"
    fork_level = ForkLevel.REFUSED

    async def run(self, text: str) -> str:
        """Print.

        Args:
            text: what.
        """
        return "printed"


class Office(ToolEnv):
    def tasks(self, split):
        return [Task(f"print {n} {split}", answer="", id=f"{split}{n}") for n in range(4)]

    def make_tools(self):
        return [Printer()]

    async def reward(self, task, episode):
        return 0.0
'''


@pytest.mark.parametrize("kind", POLICIES)
def test_a_policy_that_forks_is_refused_where_a_tool_refuses(tmp_path, policy_folder, capsys, kind):
    file = tmp_path / "office.py"
    file.write_text(STUBBORN)
    words = ["train", f"{file}:Office", "--policy.path", str(policy_folder), "--out", str(tmp_path / "run")]
    words += [
        "--rollout.policy",
        kind,
        "--rollout.group=6",
        "--sampler.max_length=160",
        "--rollout.max_tokens=48",
        "--policy.threads=1",
    ]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"rollout.policy = {kind!r}" in said
    assert "tool 'printer' of Office refuses to be forked" in said
    assert "rollout.policy = 'group'" in said
    assert "Traceback" not in said
