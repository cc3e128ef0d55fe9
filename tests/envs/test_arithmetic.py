from __future__ import annotations

import random
import re

import pytest

from agentrl import make
from agentrl.envs import arithmetic
from agentrl.errors import TaskError, UserError


@pytest.mark.parametrize("digits", [1, 2, 4])
def test_train_and_test_share_no_problem_not_even_turned_round(digits):
    env = arithmetic.Arithmetic(digits=digits)
    problems = []
    for split in ("train", "test"):
        found = set()
        for task in env.tasks(split):
            a, operator, *rest = task.metadata["expression"].split()
            b = rest.pop(0)
            found.add((frozenset((a, b)), operator, *rest))
        problems.append(found)
    assert not problems[0] & problems[1]


def test_problems_and_answers():
    tasks = list(arithmetic.Arithmetic().tasks("train"))
    assert len({task.id for task in tasks}) == len(tasks) == 1000
    for task in tasks:
        assert re.fullmatch(r"What is \d\d [*+] \d [+-] \d\d\?", task.prompt[0].content)
        assert task.answer == str(eval(task.metadata["expression"]))  # made here, not by a model
    assert [t.id for t in arithmetic.Arithmetic().tasks("train")] == [t.id for t in tasks]


@pytest.mark.parametrize("options", [{"digits": 0}, {"digits": 7}, {"count": 1}, {"digits": 1, "count": 5000}])
def test_options_out_of_range(options):
    with pytest.raises(UserError, match="arithmetic: expected"):
        make("arithmetic", **options)


def test_unknown_splits_are_refused():
    with pytest.raises(TaskError, match="unknown split 'valid'"):
        arithmetic.Arithmetic().tasks("valid")


def test_the_guesser_uses_no_tool():
    env = arithmetic.Arithmetic()
    for task in list(env.tasks("train"))[:20]:
        (message,) = env.guesser(task, random.Random(0))
        assert re.fullmatch(r"-?\d+", message.content)
        assert not message.tool_calls


async def test_it_keeps_the_contract(env_conformance):
    checks = await env_conformance(arithmetic.Arithmetic)
    assert "expert 1, wrong answer 0" in next(check.detail for check in checks if check.name == "reward")
