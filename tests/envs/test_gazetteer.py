from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from agentrl import Message, make
from agentrl.env import make_tool
from agentrl.envs import gazetteer
from agentrl.errors import UserError
from agentrl.sandbox.shared import close_shared_sandboxes

TOWNS = gazetteer.towns()
ENV = gazetteer.Gazetteer()
TRAIN, TEST = list(ENV.tasks("train")), list(ENV.tasks("test"))


def question(task):
    """The kind, the operator and the towns in the text itself, whatever their order."""
    text = task.prompt[0].content
    return "its twin" in text, "higher" in text, frozenset(name for name in TOWNS if name in text)


def test_the_bundled_corpus_can_be_made_again():
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import runpy, json, sys; rows = runpy.run_path(sys.argv[1])['make_corpus'](); "
            "print(*map(json.dumps, rows), sep='\\n')",
            str(gazetteer.CORPUS.with_name("make_corpus.py")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert made.stdout == gazetteer.CORPUS.read_text()


def test_names_are_distinct_words_and_twins_are_others():
    assert len(TOWNS) == 48
    assert all(re.fullmatch("[A-Z][a-z]{3,6}", name) for name in TOWNS)
    assert not any(longer.startswith(shorter) for shorter, longer in pairwise(sorted(TOWNS)))
    assert all(town.twin in TOWNS and town.twin != town.name for town in TOWNS.values())
    assert all(10 <= number < 100 for town in TOWNS.values() for number in (town.people, town.high))


async def test_searching_a_name_finds_its_town_first():
    tool = make_tool("search", corpus=gazetteer.CORPUS)
    for town in TOWNS.values():
        expected = f"{town.name}: {town.people} thousand people, {town.high} m high, twin town {town.twin}."
        assert await tool.run(town.name) == expected


def test_train_and_test_share_no_question_not_even_turned_round():
    assert not {question(task) for task in TRAIN} & {question(task) for task in TEST}
    assert {len(question(task)[2]) for task in (*TRAIN, *TEST)} == {1, 2}


def test_a_swapped_question_falls_on_the_same_side():
    for kind in ("sum", "difference"):
        sides = {(q.first.name, q.second.name): gazetteer.held_out(q.key, 0.15) for q in gazetteer.questions(kind)}
        assert all(side == sides[b, a] for (a, b), side in sides.items())


def test_tests_are_asked_about_an_edition_that_nobody_trains_on():
    assert {task.metadata["edition"] for task in TEST} == {0}
    assert {task.metadata["edition"] for task in TRAIN} == set(gazetteer.TRAIN_EDITIONS)
    same = [name for name, town in TOWNS.items() for e in gazetteer.TRAIN_EDITIONS if gazetteer.towns(e)[name] == town]
    assert not same


def test_the_held_out_share():
    pairs = Counter("twin" not in task.prompt[0].content for task in TEST)
    assert 0.12 < pairs[True] / (4 * 48 * 47 / 2) < 0.18
    assert pairs[False] >= 34


@pytest.mark.parametrize(("tasks", "upto"), [(TRAIN, len(TRAIN)), (TEST, 102)])
def test_kinds_are_equal_in_every_prefix(tasks, upto):
    counts: Counter[str] = Counter(dict.fromkeys(gazetteer.KINDS, 0))
    for task in tasks[:upto]:
        counts[task.metadata["kind"]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1


def test_tests_ask_every_question_once():
    assert len({task.prompt for task in TEST}) == len(TEST)
    assert len({task.id for task in TRAIN}) == len(TRAIN)
    assert [t.id for t in gazetteer.Gazetteer().tasks("train")] == [t.id for t in TRAIN]


def test_answers_follow_from_the_corpus():
    for task in random.Random(0).sample(TRAIN, 300) + TEST:
        rows = {row["title"]: row for row in gazetteer.records(task.metadata["edition"])}
        text = task.prompt[0].content
        names = re.findall("[A-Z][a-z]+", text)[1:]
        first, second = names if len(names) == 2 else (names[0], rows[names[0]]["twin"])
        expected = (
            rows[first]["high"] - rows[second]["high"]
            if "higher" in text
            else rows[first]["people"] + rows[second]["people"]
        )
        assert task.answer == str(expected)


def test_kinds_can_be_chosen():
    only = make("gazetteer", kinds=["bridge"])
    assert {task.metadata["kind"] for task in only.tasks("train")} == {"bridge"}
    with pytest.raises(UserError, match="expected kinds among sum, difference, bridge"):
        make("gazetteer", kinds=["hops"])


@pytest.mark.parametrize("kind", gazetteer.KINDS)
async def test_the_expert_finds_the_answer_by_its_tools(kind):
    env = gazetteer.Gazetteer()
    task = next(task for task in TEST if task.metadata["kind"] == kind)
    demonstration = env.expert(task, random.Random(0))
    assert [len(message.tool_calls) for message in demonstration] == ([1, 1, 1, 0] if kind == "bridge" else [2, 1, 0])
    await env.reset(seed=0, options={"task": task})
    seen = ""
    for message in demonstration:
        for call in message.tool_calls:
            needed = re.findall(r"[A-Z][a-z]+|\d+", str(call.arguments))
            assert all(word in seen + task.prompt[0].content for word in needed), "it knows what it cannot know"
        result = await env.step(message)
        seen += "".join(m.content for m in result.observation)
    assert seen.endswith(str(task.answer))
    assert (result.reward, result.terminated) == (1.0, True)
    await env.close()
    await close_shared_sandboxes()


async def test_the_guesser_uses_no_tool_and_is_mostly_wrong():
    env, right = gazetteer.Gazetteer(), 0.0
    rng = random.Random(0)
    for task in TRAIN[:300]:
        (message,) = env.guesser(task, rng)
        assert not message.tool_calls
        await env.reset(options={"task": task})
        right += (await env.step(message)).reward
    assert right < 15


@pytest.mark.parametrize("text", ["", "the answer is {}", "{}.0", "+{}"])
async def test_only_the_bare_integer_counts(text):
    task = next(task for task in TEST if int(task.answer or 0) > 0)
    env = gazetteer.Gazetteer()
    await env.reset(options={"task": task})
    assert (await env.step(Message("assistant", text.format(task.answer)))).reward == 0.0


async def test_it_keeps_the_contract(env_conformance):
    await env_conformance(gazetteer.Gazetteer)
