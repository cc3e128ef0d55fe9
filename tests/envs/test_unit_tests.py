from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter

import pytest
import pytest_asyncio

from agentrl import Message, Outcome, Task, ToolCall
from agentrl.envs import unit_tests
from agentrl.envs.unit_tests import problems, rows
from agentrl.envs.unit_tests.inside import from_json
from agentrl.errors import TaskError, UnknownName, UserError

module_loop = pytest.mark.asyncio(loop_scope="module")

# -- the environment -------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def play(sandbox):
    """Plays messages on a task and gives the last step."""
    envs = []

    async def _play(messages, task=None, **options):
        env = unit_tests.UnitTests(sandbox=sandbox, **options)
        envs.append(env)
        task = task or env.tasks("train")[0]
        await env.reset(seed=0, options={"task": task})
        for message in messages:
            result = await env.step(message)
        return result

    yield _play
    for env in envs:
        await env.close()


TASKS = unit_tests.UnitTests().tasks("train")
FIRST = {}
for task in TASKS:
    FIRST.setdefault(task.metadata["kind"], task)


def says(text):
    return [Message("assistant", text)]


@module_loop
@pytest.mark.parametrize("kind", problems.KINDS)
async def test_the_expert_is_right_and_the_guesser_is_not(play, kind):
    env, task = unit_tests.UnitTests(), FIRST[kind]
    step = await play(env.expert(task, random.Random(0)), task)
    assert (step.reward, step.info["outcome"]) == (1.0, Outcome.ANSWERED)
    assert [str(verdict.kind) for verdict in step.info["tests"]] == ["passed"] * problems.HIDDEN
    guesses = [env.guesser(task, random.Random(seed))[0].content for seed in range(20)]
    wrong = next(text for text in guesses if text != task.metadata["solution"])
    assert (await play(says(wrong), task)).reward < 1


@module_loop
async def test_the_expert_sees_that_its_code_does_what_the_example_says(play):
    task = TASKS[0]
    (arguments, expected), *_ = task.metadata["examples"]
    step = await play(unit_tests.UnitTests().expert(task, random.Random(0))[:1], task)
    assert step.observation[0].content == str(expected)
    assert f"affine({arguments[0]}) == {expected}" in task.prompt[0].content


@module_loop
async def test_half_right_is_half_the_reward(play):
    task = FIRST["affine"]
    tests = task.metadata["tests"]
    some = {arguments[0]: expected for arguments, expected in tests[:6]}
    code = f"def affine(x):\n    return {some}.get(x)"
    assert (await play(says(code), task)).reward == 0.75
    assert (await play(says(code), task, all_or_nothing=True)).reward == 0.0
    assert (await play(says(task.metadata["solution"]), task, all_or_nothing=True)).reward == 1.0


@module_loop
async def test_a_constant_earns_little(play):
    for task in FIRST.values():
        values = Counter(json.dumps(expected) for _, expected in task.metadata["tests"])
        constant = from_json(json.loads(values.most_common(1)[0][0]))
        code = f"def {task.metadata['function']}(*a):\n    return {constant!r}"
        assert (await play(says(code), task)).reward <= 0.25


@module_loop
async def test_without_an_answer_there_is_no_reward(play):
    call = Message("assistant", "", (ToolCall("call", "python", {"code": "1"}),))
    step = await play([call] * 4)
    assert (step.reward, step.info["outcome"], step.info["tests"]) == (0.0, Outcome.TURN_LIMIT, ())
    assert (await play(says(""))).reward == 0.0


@module_loop
async def test_the_agents_session_has_no_tests_and_does_not_reach_the_graders(play):
    solution = TASKS[0].metadata["solution"]
    leave = "import builtins\nbuiltins.helper = 1\nopen('/tmp/left', 'w').write('x')\n"
    look = leave + "sorted(n for n in dir() if n[0] != '_')"
    call = Message("assistant", "", (ToolCall("call", "python", {"code": look}),))
    assert (await play([call])).observation[0].content == "['builtins']"
    code = f"import os\n{solution}\nassert not os.path.exists('/tmp/left')\nhelper"
    step = await play([call, *says(code)])
    assert {verdict.detail for verdict in step.info["tests"]} == {"NameError: name 'helper' is not defined"}


@module_loop
async def test_the_same_submission_gets_the_same_score_again(play):
    code = "import random\ndef affine(x):\n    return x * 9 + 7 if random.random() < 0.5 else 0"
    kinds = {tuple(v.kind for v in (await play(says(code))).info["tests"]) for _ in range(3)}
    assert len(kinds) == 1


@module_loop
async def test_a_reward_that_is_cancelled_leaves_nothing(sandbox):
    env = unit_tests.UnitTests(sandbox=sandbox)
    await env.reset(options={"task": TASKS[0]})
    step = asyncio.create_task(env.step(says("def affine(x):\n    while True:\n        pass")[0]))
    await asyncio.sleep(0.4)
    assert len(sandbox.live) > 1
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    assert not sandbox.live
    await env.close()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("So:\n```python\ndef f(x):\n    return x\n```\nDone.", "def f(x):\n    return x"),
        ("```py\ndef f(x):\n    return x\n```\nUse it:\n```\nprint(f(1))\n```", "def f(x):\n    return x"),
        ("```\ndef f(x): 1\n```\nno:\n```\ndef f(x): 2\n```", "def f(x): 2"),
        ("```\ndef f2(x): 1\n```\n```\nf = abs\n```", "f = abs"),
        ("<answer>\ndef f(x): 1\n</answer>", "def f(x): 1"),
        ("```\ndef f(x): 1\n```<answer>```python\ndef f(x): 2\n```</answer>", "def f(x): 2"),
        ("```python\n    def f(x):\n        return 1\n```", "def f(x):\n    return 1"),
        ("```python\ndef f(x): 1", "def f(x): 1"),
        ("```f(x)```", "```f(x)```"),
        ("", ""),
    ],
)
async def test_where_the_code_is_in_an_answer(text, code):
    env = unit_tests.UnitTests()
    env.task = rows.make_task("here", "p", {"function": "f", "tests": [[[1], 1]]})
    assert env.extract_answer(text) == code


# -- tasks -----------------------------------------------------------------------------------------------------------


def test_splits_do_not_meet():
    splits = [unit_tests.UnitTests().tasks(split) for split in ("train", "test")]
    assert list(map(len, splits)) == [1000, 250]
    sources = [{task.metadata["solution"] for task in tasks} for tasks in splits]
    prompts = [{task.prompt for task in tasks} for tasks in splits]
    assert not sources[0] & sources[1]
    assert not prompts[0] & prompts[1]
    assert list(map(len, sources)) == [1000, 250]
    for tasks in splits:
        assert {task.metadata["kind"] for task in tasks} == set(problems.KINDS)


def test_hidden_tests_are_not_in_the_prompt():
    for task in TASKS:
        (message,) = task.prompt
        assert len(task.metadata["tests"]) == problems.HIDDEN
        calls = [rows._call(task.metadata["function"], arguments) for arguments, _ in task.metadata["tests"]]
        assert not any(call in message.content for call in calls)
        assert task.metadata["solution"] not in message.content


EXAMPLES = {
    "affine-9-7": ((5,), 52),
    "clamp-8-35": ((2,), 8),
    "surround->-#": (("a",), ">a#"),
    "scale-6-19": (([-2, 3],), [-31, -1]),
    "count-c-2": (("cacb",), 4),
    "keep-6-3": (([3, 6, 9, 10, 12],), [9, 12]),
    "every-1-2": (("abcdef",), "bdf"),
    "rotate-7-5": (([0, 1, 2, 3, 4, 5, 6, 7, 8],), [7, 8, 0, 1, 2]),
    "average-46": (([45, 46, 49],), 47.5),
    "shift-5": (("az A.",), "fe A."),
    "tally-2-a": (("aabbc",), {"b": 2}),
    "group-2-1": ((["ab", "c", "de", "fgh"],), {2: ["a", "d"], 3: ["f"]}),
    "span-16": (([16, 17, 40],), (17, 40)),
    "common-0-5": (([0, 1, 2], [2, 1, 0]), {5, 10}),
    "turn-3": (([[1, 2], [3, 4]],), [[6, 4], [7, 5]]),
    "series-1-1-2-2": ((3,), 10),
    "nested-3-5": (([1, [2, [3]]],), 6 + 3 * (7 + 3 * 8)),
    "digits-55": ((55 * 2 + 7,), [2, 7]),
    "ways-2-5-8": ((9,), 3),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_solutions_do_what_the_texts_say(name):
    """Worked out by hand from the text of the problem."""
    (task,) = [task for task in TASKS if task.id == name]
    defined, (arguments, expected) = {}, EXAMPLES[name]
    exec(task.metadata["solution"], defined)
    found = defined[task.metadata["function"]](*arguments)
    assert (type(found), found) == (type(expected), expected)


def test_levels_and_kinds_choose():
    easy = unit_tests.UnitTests(level=1, count=40).tasks("train")
    assert [task.metadata["kind"] for task in easy[:5]] == ["affine", "clamp", "surround", "scale", "affine"]
    assert len(easy) == 40
    assert {task.metadata["kind"] for task in unit_tests.UnitTests(kinds=["ways"]).tasks("test")} == {"ways"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"level": 0}, UserError, "level from 1 to 4"),
        ({"count": 3}, UserError, "count of at least 4"),
        ({"deadline": 0}, UserError, "deadline to be a positive number"),
        ({"total": math.inf}, UserError, "total to be a positive number"),
        ({"kinds": ["series"], "level": 1}, UserError, "kinds of level 1"),
        ({"kinds": ["serie"]}, UnknownName, "did you mean 'series'"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        unit_tests.UnitTests(**options)


ROW = {"prompt": "Double x.", "function": "twice", "tests": [[[1], 2], [[2], 4]]}


def written(folder, *found):
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@module_loop
async def test_problems_from_a_file(play, tmp_path):
    whole = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Swap a pair."}],
        "function": "swap",
        "examples": [[[{"$tuple": [1, 2]}], {"$tuple": [2, 1]}]],
        "tests": [[[{"$tuple": [3, 4]}], {"$tuple": [4, 3]}], [[{"$dict": [[1, 2]]}], None]],
        "solution": "def swap(p):\n    return (p[1], p[0]) if isinstance(p, tuple) else None",
        "id": "swap",
    }
    path = written(tmp_path, ROW, whole)
    env = unit_tests.UnitTests(path=path, test_fraction=0)
    plain_task, swap = env.tasks("train")
    assert (
        plain_task.prompt[0].content
        == "Double x.\nThe function is called twice.\nAnswer with the code of the function."
    )
    assert [message.role for message in swap.prompt] == ["system", "user"]
    assert "swap((1, 2)) == (2, 1)" in swap.prompt[1].content
    assert (swap.id, len(plain_task.id)) == ("swap", 16)
    assert (await play(env.expert(swap, random.Random(0)), swap)).reward == 1.0
    assert (await play(env.guesser(swap, random.Random(0)), swap, path=path)).reward == 0.5
    assert (await play(says("def twice(x):\n    return x + x"), plain_task)).reward == 1.0
    with pytest.raises(NotImplementedError, match="no solution"):
        env.expert(plain_task, random.Random(0))
    with pytest.raises(TaskError, match="no problem is in the test split with test_fraction=0; raise it"):
        env.tasks("test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": None}, "expected 'function' to be the name of a function, got None"),
        ({"function": "a b"}, "got 'a b'"),
        ({"tests": None}, "expected 'tests' to be a list"),
        ({"tests": []}, "at least one pair"),
        ({"tests": [[[1], 2], [1, 2]]}, r"tests\[1\]: expected \[arguments, expected\]"),
        ({"tests": [[[1], 2, 3]]}, r"tests\[0\]"),
        ({"tests": [[[{"$tupel": [1]}], 2]]}, "unknown tag '.tupel'"),
        ({"tests": [[[{"$set": 1}], 2]]}, "values that can be written as JSON"),
        ({"tests": [[[{"$set": [[1]]}], 2]]}, "values that can be written as JSON"),
        ({"tests": [[["a" * 200_000], 2]]}, "arguments of at most 200000 characters"),
        ({"tests": [[[1], "a" * 60_000]]}, "expected value of at most 60000 characters"),
        ({"examples": [[[2], 4]]}, r"other arguments than the examples"),
        ({"examples": "f(2) == 4"}, "expected 'examples' to be a list"),
        ({"solution": 3}, "expected 'solution' to be source code"),
        ({"id": 3}, "expected 'id' to be text"),
        ({"prompt": " "}, "expected 'prompt'"),
        ({"prompt": [{"role": "assistant", "content": "a"}]}, "last message to be a user's"),
    ],
)
def test_rows_are_checked(tmp_path, change, message):
    path = written(tmp_path, ROW, ROW | change)
    with pytest.raises(TaskError, match=message) as caught:
        unit_tests.UnitTests(path=path).tasks("train")
    assert "problem 2" in str(caught.value) or "problems.jsonl:2" in str(caught.value)


def test_a_task_of_another_environment_says_so():
    with pytest.raises(TaskError, match="has no tests"):
        rows.cases(Task("double 3"))


async def test_it_keeps_the_contract(env_conformance):
    await env_conformance(unit_tests.UnitTests, tasks=3)
