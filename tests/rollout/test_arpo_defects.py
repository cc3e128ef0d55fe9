"""What is wrong with the released ARPO code is not wrong here: one test for each defect.

Each was found by reading or running RUC-NLPIR/ARPO@a95cd089. What its decision does on purpose is in
``test_policies.py``, as the rule ``arpo_code``.
"""

from __future__ import annotations

import asyncio
import math
import time

import pytest
from streaming import (
    TASKS,
    VOCABULARY,
    Look,
    Streaming,
    Turn,
    World,
    by_turn,
    check_tree,
    request_of,
    scheduler,
)
from tokenizers.processors import TemplateProcessing

from agentrl import Message
from agentrl.renderer import Renderer
from agentrl.types import Outcome

LOG = math.log(VOCABULARY)


async def grow(sampler, world=None, tasks=TASKS[:1], *, policy="entropy_tree", grower=None, seed=0, **limits):
    options = {"first_tokens": 2, "initial": 1} if policy == "entropy_tree" else {}
    limits = {"policy": policy, "policy_options": options, "group": 4} | limits
    grower = grower or scheduler(sampler, world or World(), **limits)
    return await grower.grow(tasks, seed=seed)


def signals(tree):
    return {(decision.name, decision.turn): decision.signal for decision in tree.decisions}


def entropies(*turns):
    """Turns of two tokens of these entropies; all but the last one call."""
    return by_turn(*(Turn(int(i + 1 < len(turns)), [value] * 2) for i, value in enumerate(turns)))


# -- rounds -----------------------------------------------------------------------------------------------------------


async def test_no_round_waits_for_the_slowest():
    """One generation for all, again and again: here a trajectory makes all its turns while another makes its first."""
    others = asyncio.Event()

    async def held(i):
        if i == 1:
            async with asyncio.timeout(3):
                await others.wait()

    def script(request):
        if request.turn == 0 and request_of(sampler, (0,), 0) is request:
            return Turn(0, [1.0] * 2, held)
        if request.turn == 2:
            others.set()
        return Turn(1 if request.turn < 2 else 0, [1.0 + request.turn] * 2)

    sampler = Streaming(script)
    options = {"first_tokens": 2, "initial": 2}
    (tree,) = await grow(sampler, group=4, policy_options=options)
    check_tree(tree, 4)
    assert tree.spent["branches"] > 0, "nor does a branch"


async def test_what_is_left_of_the_budget_begins_all_at_once():
    """With 2 of 8 begun and no tool calls, batches of 2, 1, 1, 1, 1, 1, 1 were measured."""
    at_once = []

    async def first(i):
        if i == 0:
            at_once.append(sampler.streams)
            await asyncio.sleep(0.01)

    sampler = Streaming(by_turn(Turn(0, [1.0] * 2, first)))
    (tree,) = await grow(sampler, group=8, policy_options={"first_tokens": 2, "initial": 2})
    check_tree(tree, 8)
    assert max(at_once) >= 6
    assert len(at_once) == 8


async def test_a_trajectory_is_given_what_is_left_of_its_own_budget():
    """Not the most that any other one has left, to be thrown away afterwards."""
    sampler = Streaming(lambda request: Turn(1, [1.0] * (4 if request.params.seed % 2 else 9)))
    (tree,) = await grow(sampler, World(max_turns=9), group=6, policy="random_tree", policy_options={}, max_tokens=20)
    for leaf in tree.leaves:
        written = [len(node.token_ids) for node in tree.path(leaf) if node.author == "policy"]
        assert sum(written) == 20
        assert leaf.outcome is Outcome.LENGTH
    for request in sampler.requests:
        before = sum(token >= 100 or 10 <= token < 20 for token in request.ids) - 1 - request.turn
        assert request.params.max_tokens == 20 - before


# -- entropies --------------------------------------------------------------------------------------------------------


async def test_a_baseline_does_not_outlive_its_tree():
    """The same slots of the same scheduler, a batch later, under a policy that is less certain from the start."""
    sampler = Streaming(entropies(1.0, 2.0, 0.0))
    grower = scheduler(
        sampler, World(), group=2, policy="entropy_tree", policy_options={"first_tokens": 2, "initial": 1}
    )
    (one,) = await grow(sampler, grower=grower)
    sampler.script = entropies(7.0, 8.0, 0.0)
    (other,) = await grow(sampler, grower=grower)
    assert signals(one)[(0,), 1] == pytest.approx(2 * (2 - 1) / LOG)
    assert signals(other)[(0,), 1] == pytest.approx(2 * (8 - 7) / LOG)


async def test_a_childs_baseline_is_its_roots():
    """Its own first segment would be that after the fork, and its first change always 0."""
    (tree,) = await grow(Streaming(entropies(1.0, 5.0, 3.0, 0.0)))
    assert signals(tree)[(0, 1), 2] == pytest.approx(2 * (3 - 1) / LOG)


async def test_the_turn_before_the_call_has_no_say():
    """What comes after the tool result decides: the call itself was made in doubt, or was not."""
    (calm,) = await grow(Streaming(entropies(1.0, 1.0, 9.0, 0.0)))
    (doubt,) = await grow(Streaming(entropies(1.0, 9.0, 1.0, 0.0)))
    assert signals(calm)[(0,), 1] == pytest.approx(0.0)
    assert signals(calm)[(0,), 2] == pytest.approx(2 * 8 / LOG)
    assert signals(doubt)[(0,), 1] == pytest.approx(2 * 8 / LOG)
    assert signals(doubt)[(0,), 2] == pytest.approx(0.0)


async def test_the_first_call_has_a_change_as_well():
    (tree,) = await grow(Streaming(entropies(1.0, 4.0)))
    assert signals(tree)[(0,), 1] == pytest.approx(2 * 3 / LOG)
    assert tree.decisions[0].granted


@pytest.mark.parametrize(("first", "after"), [(20, 3), (3, 20)])
async def test_a_short_turn_does_not_look_certain(first, after):
    """The same entropy at every token: nothing has changed, however many there are."""
    sampler = Streaming(by_turn(Turn(1, [2.0] * first), Turn(0, [2.0] * after)))
    (tree,) = await grow(sampler, policy_options={"first_tokens": 20, "initial": 1})
    assert signals(tree)[(0,), 1] == pytest.approx(0.0)


# -- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["group", "random_tree", "entropy_tree", "expand_tree"])
async def test_every_policy_token_was_sampled_and_every_prompt_is_what_came_before(policy):
    """No end of turn is put into a trajectory's mouth at a limit, and nothing is decoded and encoded again."""

    class Strict(World):
        def env(self):
            made = super().env()
            made.max_tool_calls = 2
            return made

    sampler = Streaming(lambda request: Turn(1 if request.params.seed % 5 else 0, [1.0 + request.turn] * 4))
    options = {"first_tokens": 2} if policy == "entropy_tree" else {}
    (tree,) = await grow(sampler, Strict(), policy=policy, policy_options=options, group=6)
    made = {(request.ids, tuple(request.made)) for request in sampler.requests}
    outcomes = set()
    for leaf in tree.leaves:
        before: tuple[int, ...] = ()
        for node in tree.path(leaf):
            if node.author == "policy":
                assert (before, node.token_ids) in made
            before += node.token_ids
        outcomes.add(leaf.outcome)
        assert tree.path(leaf)[-1].author == "policy"
    assert Outcome.TOOL_LIMIT in outcomes


def test_no_beginning_of_text_in_a_tool_result(tokenizer):
    """A Llama tokenizer puts one before everything that it encodes; a result is in the middle."""
    begins = type(tokenizer)(tokenizer_object=type(tokenizer._tokenizer).from_str(tokenizer._tokenizer.to_str()))
    begins.chat_template, begins.eos_token = tokenizer.chat_template, tokenizer.eos_token
    start = begins.convert_tokens_to_ids("<|im_start|>")
    begins._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    assert begins("14")["input_ids"][0] == start
    result = [Message("tool", "14", tool_call_id="call_0_0")]
    assert Renderer(begins).continuation(result) == Renderer(tokenizer).continuation(result)


# -- tools ------------------------------------------------------------------------------------------------------------


async def test_a_tools_deadline_ends_its_call(monkeypatch):
    """There it was set on the result of a call that had been waited for already, and never passed."""
    monkeypatch.setattr(Look, "timeout", 0.05)
    world = World(run=lambda tool: asyncio.sleep(30) if not tool.seen else None)
    began = time.perf_counter()
    (tree,) = await grow(Streaming(by_turn(Turn(1), Turn(0))), world, policy="group", group=2)
    assert time.perf_counter() - began < 2
    for leaf in tree.leaves:
        (result,) = [result for node in tree.path(leaf) for result in node.tool_results]
        assert result.error == "timeout"
        assert leaf.outcome is Outcome.ANSWERED, "and the policy reads that it did"


async def test_an_empty_result_does_not_end_a_trajectory(monkeypatch):
    async def run(self, x: int) -> str:
        """Look there.

        Args:
            x: where.
        """
        return ""

    monkeypatch.setattr(Look, "run", run)
    (tree,) = await grow(Streaming(by_turn(Turn(1), Turn(0))), policy="group", group=2)
    assert {leaf.outcome for leaf in tree.leaves} == {Outcome.ANSWERED}
    assert all(leaf.metrics["tool_calls"] == 1 for leaf in tree.leaves)


async def test_what_is_in_the_prompt_is_no_call(renderer, tools):
    """The last call was looked for in the whole text, examples in the prompt included."""
    example = '<tool_call>\n{"name": "double", "arguments": {"x": 7}}\n</tool_call>'
    assert renderer.prompt([Message("user", f"For instance {example}")], tools)
    answer = renderer.assistant(Message("assistant", "14"))
    assert renderer.parse(answer, tools).tool_calls == ()


async def test_branches_that_are_refused_their_number_of_leaves_do_not_duplicate_others():
    """There, a short group would have been filled with copies of its last trajectory."""
    sampler = Streaming(lambda request: Turn(1 if request.turn < 2 else 0, [1.0 + request.turn] * 6))
    (tree,) = await grow(sampler, group=8)
    check_tree(tree, 8)
    whole = {tuple(token for node in tree.path(leaf) for token in node.token_ids) for leaf in tree.leaves}
    assert len(whole) == 8
