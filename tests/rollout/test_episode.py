"""One episode: how it can end, and that only the policy's own endings are scored."""

from __future__ import annotations

import asyncio
import math
import re

import pytest

from agentrl import Message, Task, ToolEnv, tool
from agentrl.errors import IsolationUnavailable, SamplerError, TaskError, ToolInfrastructureError
from agentrl.rollout import episode
from agentrl.rollout.episode import play
from agentrl.rollout.writer import TokenWriter
from agentrl.types import Outcome, SamplingParams, StepResult, StopReason

TASK = Task("double 7", answer="14", id="seven")
CALL = '<tool_call>\n{"name": "double", "arguments": {"x": 7}}\n</tool_call><|im_end|>'
WRONG_CALL = '<tool_call>\n{"name": "double", "arguments": {"y": 7}}\n</tool_call><|im_end|>'
MALFORMED = "<tool_call>\n{\n</tool_call><|im_end|>"


@pytest.fixture
def episode_of(renderer, scripted_sampler):
    """Play ``turns`` in ``env``; returns what was played and the sampler."""

    async def run(env, *turns, budget=200, deadline=5.0, task=TASK, seed=3):
        sampler = scripted_sampler(*turns)
        writer = TokenWriter(sampler, renderer, SamplingParams(budget), seed)
        return await play(env, task, writer, seed=seed, deadline=deadline), sampler

    return run


@pytest.fixture
def answers(doubling):
    """``Doubling``, noting whether it was closed."""

    class Noted(doubling):
        closed = 0

        async def close(self):
            await super().close()
            self.closed += 1

    return Noted


# -- the policy's endings ---------------------------------------------------------------------------------------------


async def test_answered(answers, episode_of, tokenizer):
    env = answers()
    played, sampler = await episode_of(env, CALL, "14<|im_end|>")
    leaf = played.leaf
    assert (leaf.outcome, leaf.reward, leaf.error, leaf.node, leaf.seed) == (Outcome.ANSWERED, 1.0, None, 3, 3)
    assert leaf.metrics == {"turns": 2.0, "tool_calls": 1.0, "tool_failures": 0.0}
    assert [node.author for node in played.nodes] == ["prompt", "policy", "tool", "policy"]
    assert [node.parent for node in played.nodes] == [-1, 0, 1, 2]
    assert played.nodes[2].tool_results[0].content == "14"
    assert [m.role for node in played.nodes for m in node.messages] == ["user", "assistant", "tool", "assistant"]
    assert env.closed == 2, "once by reset, once at the end"
    whole = [token for node in played.nodes for token in node.token_ids]
    prompts = [ids for ids, _ in sampler.requests]
    assert list(prompts[1]) == whole[: len(prompts[1])], "the next turn is asked for with exactly what was sampled"
    assert tokenizer.decode(whole).endswith("<|im_start|>assistant\n14<|im_end|>")
    assert len({params.seed for _, params in sampler.requests}) == 2, "every turn has its own random numbers"
    assert [params.max_tokens for _, params in sampler.requests] == [200, 200 - len(played.nodes[1].token_ids)]


async def test_a_wrong_answer_is_answered(answers, episode_of):
    played, _ = await episode_of(answers(), "15<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ANSWERED, 0.0)


async def test_turn_limit(answers, episode_of):
    played, _ = await episode_of(answers(), CALL)
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.TURN_LIMIT, 0.0)
    assert [node.author for node in played.nodes] == ["prompt", *["policy", "tool"] * 2, "policy"]
    assert played.leaf.metrics["turns"] == 3


async def test_tool_limit(answers, episode_of):
    class Once(answers):
        max_tool_calls = 1

    played, _ = await episode_of(Once(), CALL)
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.TOOL_LIMIT, 0.0)


async def test_parse_error(answers, episode_of):
    played, _ = await episode_of(answers(), MALFORMED)
    assert played.leaf.outcome is Outcome.PARSE_ERROR
    assert played.leaf.metrics["tool_failures/malformed"] == 3


async def test_mistakes_are_messages_and_are_counted(answers, episode_of):
    played, _ = await episode_of(answers(), MALFORMED, WRONG_CALL, "14<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ANSWERED, 1.0)
    assert played.leaf.metrics == {
        "turns": 3.0,
        "tool_calls": 2.0,
        "tool_failures": 2.0,
        "tool_failures/arguments": 1.0,
        "tool_failures/malformed": 1.0,
    }
    assert "not valid JSON" in played.nodes[2].messages[0].content


@pytest.mark.parametrize("budget", [1, 5])
async def test_length_in_the_middle_of_a_turn(answers, episode_of, budget):
    played, _ = await episode_of(answers(), CALL, budget=budget)
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.LENGTH, 0.0)
    assert played.nodes[-1].stop_reason is StopReason.LENGTH
    assert len(played.nodes[-1].token_ids) == budget


async def test_length_after_a_turn_that_used_the_budget_up(answers, episode_of, tokenizer):
    exactly = len(tokenizer(CALL, add_special_tokens=False)["input_ids"])
    played, sampler = await episode_of(answers(), CALL, budget=exactly)
    assert played.leaf.outcome is Outcome.LENGTH
    assert [node.author for node in played.nodes] == ["prompt", "policy", "tool"]
    assert len(sampler.requests) == 1


async def test_length_of_a_prompt_that_fills_the_context(answers, episode_of):
    played, sampler = await episode_of(answers(), CALL, task=Task("double " * 400, answer="1"))
    assert played.leaf.outcome is Outcome.LENGTH
    assert (len(played.nodes), sampler.requests) == (1, [])


async def test_an_answer_on_the_last_token_of_the_budget_counts(answers, episode_of, tokenizer):
    exactly = len(tokenizer("14<|im_end|>", add_special_tokens=False)["input_ids"])
    played, _ = await episode_of(answers(), "14<|im_end|>", budget=exactly)
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ANSWERED, 1.0)


# -- the environment's failures ---------------------------------------------------------------------------------------


def failing(base, where, error):
    """``base`` whose method ``where`` raises ``error``."""

    async def fail(self, *args, **kwargs):
        raise error

    return type("Failing", (base,), {where: fail})


@pytest.mark.parametrize("where", ["reward", "setup", "reset", "step"])
async def test_an_environment_that_raises_is_a_failure_and_no_reward(answers, episode_of, where):
    env = failing(answers, where, RuntimeError("the judge is out"))()
    played, _ = await episode_of(env, CALL, "14<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ENV_FAILURE, None)
    assert "RuntimeError: the judge is out" in played.leaf.error
    assert "Traceback" in played.leaf.error
    assert not played.leaf.outcome.scored
    assert env.closed


@pytest.mark.parametrize("value", [math.nan, math.inf, None, "1"])
async def test_a_reward_that_is_no_number_is_a_failure(answers, episode_of, value):
    class Bad(answers):
        async def reward(self, task, episode):
            return value

    played, _ = await episode_of(Bad(), "14<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ENV_FAILURE, None)
    assert "expected a finite float" in played.leaf.error


@pytest.mark.parametrize("value", [math.nan, -math.inf, None])
async def test_that_holds_for_environments_that_are_no_tool_env(episode_of, value):
    class Plain(ToolEnv):
        async def step(self, action):
            return StepResult((), value, True, False, {})

    played, _ = await episode_of(Plain(), "14<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ENV_FAILURE, None)
    assert "Traceback" in played.leaf.error


async def test_an_environment_may_say_itself_that_it_failed(episode_of):
    class Honest(ToolEnv):
        async def step(self, action):
            return StepResult((), 1.0, False, True, {"outcome": Outcome.ENV_FAILURE})

    played, _ = await episode_of(Honest(), "14<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ENV_FAILURE, None)


async def test_a_failing_tool_backend_is_not_the_policys_fault(answers, episode_of):
    @tool
    def double(x: int) -> str:
        """Double.

        Args:
            x: the number.
        """
        raise ToolInfrastructureError("the index is down")

    class Down(answers):
        tools = (double,)

    played, _ = await episode_of(Down(), CALL, "14<|im_end|>")
    assert played.leaf.outcome is Outcome.ENV_FAILURE
    assert "the index is down" in played.leaf.error


async def test_a_timeout_inside_the_environment_is_a_failure_not_the_deadline(answers, episode_of):
    env = failing(answers, "reward", TimeoutError("the judge took too long"))()
    played, _ = await episode_of(env, "14<|im_end|>")
    assert played.leaf.outcome is Outcome.ENV_FAILURE
    assert "the judge took too long" in played.leaf.error


async def test_rewards_of_several_steps_add_up(episode_of):
    class Paying(ToolEnv):
        steps = 0

        async def step(self, action):
            self.steps += 1
            return StepResult((Message("tool", "on", tool_call_id="c"),), 0.25, self.steps == 3, False, {})

    played, _ = await episode_of(Paying(), CALL)
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ANSWERED, 0.75)


# -- deadlines --------------------------------------------------------------------------------------------------------


async def hang(*_, **__):
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("where", "stuck"),
    [
        ("reset", "reset of turn 0"),
        ("sampling", "sampling of turn 0"),
        ("step", r"env\.step \(double\) of turn 1"),
        ("reward", r"env\.step \(answer\) of turn 2"),
    ],
)
async def test_a_timeout_names_what_was_stuck(answers, episode_of, where, stuck):
    class Stuck(answers):
        pass

    turns = (CALL, "14<|im_end|>")
    if where == "sampling":
        turns = (hang,)
    else:
        setattr(Stuck, where, hang)
    env = Stuck()
    played, _ = await episode_of(env, *turns, deadline=0.25)
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.TIMEOUT, None)
    assert f"task {TASK.id} did not finish within 0.25 s (rollout.deadline)" in played.leaf.error
    assert re.search(stuck, played.leaf.error)
    assert env.closed
    assert played.leaf.seconds < 5


async def test_a_close_that_fails_or_hangs_is_a_failure_of_its_episode_only(answers, episode_of, monkeypatch):
    class Grumpy(answers):
        began = False

        async def close(self):
            if self.began:
                raise OSError("cannot let go")
            self.began = True

    played, _ = await episode_of(Grumpy(), "14<|im_end|>")
    assert (played.leaf.outcome, played.leaf.reward) == (Outcome.ENV_FAILURE, None)
    assert "OSError: cannot let go" in played.leaf.error

    class Hanging(Grumpy):
        async def close(self):
            if self.began:
                await hang()
            self.began = True

    monkeypatch.setattr(episode, "CLOSING", 0.05)
    played, _ = await episode_of(Hanging(), "14<|im_end|>")
    assert played.leaf.outcome is Outcome.ENV_FAILURE
    assert "TimeoutError" in played.leaf.error


# -- what ends more than the episode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [TaskError("task has no answer"), SamplerError("gone"), IsolationUnavailable(["user namespaces"])]
)
async def test_what_no_other_episode_would_survive_is_raised(answers, episode_of, error):
    env = failing(answers, "setup", error)()
    with pytest.raises(type(error)) as raised:
        await episode_of(env, CALL)
    assert raised.value is error
    assert env.closed


async def test_cancelling_closes_the_environment(answers, episode_of):
    env = answers()
    running = asyncio.create_task(episode_of(env, hang))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert env.closed == 2
