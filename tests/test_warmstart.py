"""Demonstrations: recorded from the real environment, written as a policy would write them, and learnt."""

from __future__ import annotations

import asyncio

import pytest
import torch

from agentrl import Message, Task, ToolCall, ToolEnv
from agentrl.config import SFTConfig
from agentrl.demonstrations import Tokens, encode, record
from agentrl.errors import EnvError, NonFiniteError, RewardError, TaskError, ToolInfrastructureError, UserError
from agentrl.renderer import Renderer
from agentrl.warmstart import sft

TASKS = [Task(f"double {n}", answer=str(2 * n), id=f"t{n}") for n in range(6)]


def recorded(env, tasks=TASKS, **options):
    return asyncio.run(record(env, tasks, seed=0, **options))


# -- recording --------------------------------------------------------------------------------------------------------


def test_an_experts_episode_is_played_against_the_real_tools(doubling):
    counted = []
    demonstrations = recorded(doubling, progress=lambda: counted.append(1))
    assert len(counted) == 6
    third = demonstrations[3]
    assert [m.role for m in third.messages] == ["user", "assistant", "tool", "assistant"]
    assert [m.content for m in third.messages][2:] == ["6", "6"]
    assert [d.reward for d in demonstrations] == [1.0] * 6
    assert third.tools[0]["function"]["name"] == "double"


def test_guesses_differ_by_task_and_come_again(doubling):
    first = [d.messages[-1].content for d in recorded(doubling, [*TASKS, *TASKS], guess=True)]
    assert first == [d.messages[-1].content for d in recorded(doubling, [*TASKS, *TASKS], guess=True)]
    assert first[:6] != first[6:]
    assert len(set(first)) > 1


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (None, UserError, "has no scripted expert"),
        ([], UserError, "stopped after 0 messages on task t0"),
        ([Message("assistant", "", (ToolCall("a", "double", {"x": 1}),))], UserError, "stopped after 1 messages"),
    ],
)
def test_experts_that_do_not_finish_are_the_users_to_mend(doubling, script, error, message):
    class Odd(doubling):
        def expert(self, task, rng):
            return script

    env = Odd if script is not None else type("Dumb", (doubling,), {"expert": ToolEnv.expert})
    with pytest.raises(error, match=message):
        recorded(env, TASKS[:1])


@pytest.mark.parametrize("error", [ToolInfrastructureError("the index is down"), EnvError("no")])
def test_failures_come_as_themselves_and_leave_nothing_open(doubling, error):
    closed = []

    class Down(doubling):
        async def setup(self, task):
            raise error

        async def close(self):
            await super().close()
            closed.append(self)

    with pytest.raises(type(error)) as raised:
        recorded(Down)
    assert raised.value is error
    assert len(set(closed)) == 6


def test_a_failing_reward_is_told(scripted):
    from agentrl import registry

    with pytest.raises(RewardError, match="RuntimeError"):
        recorded(registry.load("envs", scripted("Broken")))


# -- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool_format", ["hermes", "tags"])
def test_only_what_the_assistant_wrote_is_learnt(doubling, tokenizer, tool_format):
    (demonstration,) = recorded(doubling, TASKS[3:4])
    tokens = encode(Renderer(tokenizer, tool_format), demonstration)
    learnt = tokenizer.decode([i for i, own in zip(tokens.token_ids, tokens.policy, strict=True) if own])
    call = '<tool_call>\n{"name": "double", "arguments": {"x": 3}}\n</tool_call><|im_end|>'
    assert learnt == {"hermes": call, "tags": "<double>3</double>"}[tool_format] + "6<|im_end|>"
    whole = tokenizer.decode(tokens.token_ids)
    assert whole.count("<|im_end|>") == (4 + 1 if tool_format == "hermes" else 3)
    assert ("<result>\n6\n</result>" in whole) is (tool_format == "tags")


# -- learning ---------------------------------------------------------------------------------------------------------


def config(**changes):
    return SFTConfig(**({"steps": 12, "batch": 8, "lr": 3e-3, "warmup": 2} | changes))


@pytest.fixture(scope="module")
def tokens(doubling, renderer):
    encoded = [encode(renderer, d) for d in recorded(doubling)]
    return encoded, [encode(renderer, d) for d in recorded(doubling, guess=True)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_loss_falls_and_the_seed_decides(make_model, tokens, optimizer):
    seen = []
    runs = []
    for seed in (0, 0, 1):
        model = make_model()
        progress = lambda step, loss: seen.append((step, loss))  # noqa: E731
        losses = sft(model, *tokens, config(optimizer=optimizer, guess_fraction=0.5), seed=seed, progress=progress)
        runs.append((losses, model.lm_head.weight.detach()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][0][0] == pytest.approx(6.1, abs=0.3), "log of the vocabulary: nothing is known at first"
    assert runs[0][0][-1] < 0.6 * runs[0][0][0]
    assert [step for step, _ in seen[:12]] == list(range(12))


def test_the_loss_is_that_of_assistant_tokens_in_nats_per_token(make_model, tokens):
    expert, _ = tokens
    (loss,) = sft(make_model(), expert[:1], [], config(steps=1, batch=3), seed=0)
    ids, policy = torch.tensor([expert[0].token_ids]), torch.tensor(expert[0].policy[1:])
    with torch.inference_mode():
        logprobs = make_model()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert loss == pytest.approx(-float(logprobs[policy].mean()), abs=1e-4)


def test_only_as_many_guesses_as_asked(make_model, tokens):
    expert, guesses = tokens
    nothing = Tokens((1, 2, 3), (False, True, True))
    first = sft(make_model(), expert, [nothing], config(guess_fraction=0.0), seed=0)
    assert first == sft(make_model(), expert, guesses, config(guess_fraction=0.0), seed=0)


def test_nothing_to_learn_from_is_refused(make_model, tokens):
    for expert, guesses, fraction in (([], tokens[1], 0.0), (tokens[0], [], 0.5)):
        with pytest.raises(TaskError, match="expected demonstrations"):
            sft(make_model(), expert, guesses, config(guess_fraction=fraction), seed=0)


def test_a_loss_that_is_not_finite_stops(make_model, tokens):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.inf
    with pytest.raises(NonFiniteError, match="warm start's loss is nan at step 0"):
        sft(model, tokens[0], [], config(), seed=0)
