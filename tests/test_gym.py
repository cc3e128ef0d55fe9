from __future__ import annotations

import asyncio
import warnings

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check

from agentrl import Message, Outcome, Task, ToolEnv, tool
from agentrl.errors import EnvError
from agentrl.gym import FromGymnasium, SyncEnv


@tool
def double(x: int) -> str:
    """Double a number.

    Args:
        x: the number.
    """
    return str(2 * x)


class Doubling(ToolEnv):
    tools = (double,)

    def tasks(self, split):
        for i in range(20):
            yield Task(f"double {i}", answer=str(2 * i))

    async def reward(self, task, episode):
        return float(episode.answer == task.answer)


@pytest.fixture
def doubling():
    env = SyncEnv(Doubling(), max_length=4096)
    yield env
    env.close()


def test_gymnasium_accepts_it(doubling):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gymnasium_check(doubling, skip_render_check=True)


def test_an_episode_of_texts(doubling):
    observation, info = doubling.reset(options={"task": Task("double 4", answer="8")})
    assert observation == "double 4"
    assert info["tools"][0]["function"]["name"] == "double"
    call = '<tool_call>{{"name": "double", "arguments": {{"x": {}}}}}</tool_call>'
    observation, reward, terminated, truncated, info = doubling.step(f"hm\n{call.format(4)}\n{call.format('[]')}")
    first, second = observation.split("\n")
    assert (first, reward, terminated, truncated) == ("8", 0.0, False, False)
    assert second.startswith("Wrong arguments")
    assert [r.call_id for r in info["tool_results"]] == ["call_0_0", "call_0_1"]
    assert doubling.step("<tool_call>{broken")[0].startswith("The tool call has no closing")
    assert doubling.step("8")[:4] == ("", 1.0, True, False)


def test_seeds_draw_tasks_and_carry_on(doubling):
    def draws():
        return [doubling.reset(seed=3)[0], *(doubling.reset()[0] for _ in range(5))]

    first = draws()
    assert first == draws()
    assert len(set(first)) > 1


def test_observations_are_cut_to_the_space():
    env = SyncEnv(Doubling(), max_length=5)
    assert env.observation_space.contains(env.reset(seed=0)[0])
    assert not env.observation_space.contains("too long")
    env.close()
    env.close()


def cart_pole(**options):
    return FromGymnasium("CartPole-v1", parse=int, prompt="Answer 0 or 1.", **options)


def say(text):
    return Message("assistant", text)


async def test_the_same_episode_as_gymnasiums_own():
    env = cart_pole()
    task = next(iter(env.tasks("train")))
    opening, info = await env.reset(seed=99, options={"task": task})
    own = gymnasium.make("CartPole-v1")
    assert [m.content for m in opening] == ["Answer 0 or 1.", str(own.reset(seed=0)[0])]
    assert info["task_id"] == task.id
    total = expected = 0.0
    ended = False
    while not ended:
        result = await env.step(say("1"))
        state, reward, ended, _, _ = own.step(1)
        assert result.observation == (Message("user", str(state)),)
        total, expected = total + result.reward, expected + float(reward)
    assert (result.terminated, result.info["outcome"], total) == (True, Outcome.ANSWERED, expected)
    with pytest.raises(EnvError, match="call reset"):
        await env.step(say("1"))
    await env.close()
    await env.close()
    own.close()


async def test_no_action_costs_a_turn():
    env = cart_pole(max_turns=2)
    await env.reset(seed=0)
    result = await env.step(say("left"))
    assert result.observation[0].content.startswith("Not an action: invalid literal")
    assert not result.truncated
    last = await env.step(say("left"))
    assert (last.terminated, last.truncated, last.info["outcome"]) == (False, True, Outcome.TURN_LIMIT)
    await env.close()


async def test_a_failing_environment_is_an_infrastructure_failure():
    env = FromGymnasium("CartPole-v1", parse=str)
    await env.reset(seed=0)
    with pytest.raises(EnvError, match=r"step\('9'\) raised AssertionError"):
        await env.step(say("9"))
    await env.close()


async def test_truncation_from_outside():
    env = cart_pole()
    await env.reset(seed=0)
    await env.step(say("1"))
    result = await env.truncate(say("1"), Outcome.LENGTH)
    assert (result.reward, result.truncated, result.info["outcome"]) == (0.0, True, Outcome.LENGTH)
    await env.close()


def test_it_keeps_the_contract(env_conformance):
    checks = asyncio.run(env_conformance(lambda: cart_pole(max_turns=8)))
    assert "replay" in checks[-1].detail
