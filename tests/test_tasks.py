"""The stream of training tasks: every epoch in its own order, exact after a resume."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.errors import TaskError
from agentrl.seeds import derive_seed
from agentrl.tasks import TaskStream, unique_tasks
from agentrl.types import Task


def tasks(count):
    return [Task(f"q{n}", id=f"t{n}") for n in range(count)]


def ids(taken):
    return [task.id for task in taken]


def test_an_epoch_has_every_task_once_and_the_next_another_order():
    stream = TaskStream(tasks(20), seed=1)
    first, second = ids(stream.take(20)), ids(stream.take(20))
    assert sorted(first) == sorted(second) == sorted(ids(tasks(20)))
    assert first != second
    assert stream.cursor == 40


@given(st.integers(1, 9), st.integers(0, 5), st.lists(st.integers(0, 7), max_size=6), st.integers(0, 40))
def test_position_and_seed_say_everything(count, seed, takes, skip):
    stream = TaskStream(tasks(count), seed)
    whole = ids(TaskStream(tasks(count), seed).take(100))
    stream.take(skip)
    resumed = TaskStream(tasks(count), seed, cursor=stream.cursor)
    at = skip
    for take in takes:
        expected = whole[at : at + take]
        assert ids(stream.take(take)) == ids(resumed.take(take)) == expected
        at += take


def test_another_seed_is_another_order():
    orders = {tuple(ids(TaskStream(tasks(10), seed).take(10))) for seed in range(5)}
    assert len(orders) == 5


def test_impossible_lists_are_refused():
    with pytest.raises(TaskError, match="training: the task list is empty"):
        TaskStream([], 0)
    with pytest.raises(TaskError, match="two tasks have the id 't1'"):
        unique_tasks([*tasks(3), Task("other", id="t1")], "test")
    with pytest.raises(TaskError, match="two tasks have the id"):
        unique_tasks([Task("same"), Task("same")], "test")


@given(
    st.lists(st.integers() | st.text(max_size=5), max_size=4), st.lists(st.integers() | st.text(max_size=5), max_size=4)
)
def test_seeds_differ_where_their_parts_do(first, second):
    one, two = derive_seed(*first), derive_seed(*second)
    assert 0 <= one < 2**63
    assert (one == two) == (first == second)


def test_seeds_are_the_same_in_every_process_and_version():
    assert derive_seed() == 2847183694713211083
    assert derive_seed(0, "rollout", 1) == 3050895180762774129
