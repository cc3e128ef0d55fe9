"""Evaluation: numbers with intervals from a local policy or from a server, on tasks that can be compared."""

from __future__ import annotations

import asyncio
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from rich.console import Console

from agentrl.config import load_config
from agentrl.errors import ConfigError, SamplerError, TaskError, TooManyFailures, UnknownName, UserError
from agentrl.evaluate import compare_evaluations, evaluate, on_leaf, summarise, table
from agentrl.run import run_eval
from agentrl.sampler import openai
from agentrl.types import Leaf, Outcome, RolloutTree, Task

SETTINGS = {
    "sampler.max_length": 160,
    "sampler.max_slots": 64,
    "rollout.max_tokens": 48,
    "eval.tasks": 5,
    "eval.samples": 4,
    "eval.k": [1, 2, 4],
    "policy.threads": 1,
}


@pytest.fixture
def config(scripted):
    def make(env="Shy", **changes):
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(None, SETTINGS | {"env": scripted(env)} | keys)

    return make


def run(config, policy):
    return asyncio.run(evaluate(config, str(policy)))


def printed(view):
    console = Console(width=160)
    with console.capture() as capture:
        console.print(view)
    return capture.get()


# -- a local policy ---------------------------------------------------------------------------------------------------


def test_an_evaluation(config, policy_folder):
    done = run(config(), policy_folder)
    assert list(done.scores) == [f"test-{n}" for n in range(100, 105)]
    assert all(len(rewards) == 4 for rewards in done.scores.values())
    assert [e.k for e in done.pass_at_k] == [1, 2, 4]
    values = [e.value for e in done.pass_at_k]
    assert values == sorted(values)
    assert all(e.low <= e.value <= e.high and e.tasks == 5 and e.samples == 20 for e in done.pass_at_k)
    flat = [reward for rewards in done.scores.values() for reward in rewards]
    assert values[0] == pytest.approx(sum(flat) / 20) == pytest.approx(done.average.value)
    assert sum(done.outcomes.values()) == 20
    assert done.outcomes.keys() <= {outcome.value for outcome in Outcome}
    assert 0 < done.tool_calls < 3
    assert json.loads(json.dumps(done.to_json()))["scores"]["test-100"] == done.scores["test-100"]


def test_the_seed_decides_and_nothing_else(config, policy_folder):
    first = run(config(), policy_folder)
    assert run(config(), policy_folder) == first
    assert run(config(rollout__max_live=2), policy_folder).scores == first.scores
    assert run(config(seed=1), policy_folder).scores != first.scores
    fewer = run(config(eval__tasks=3), policy_folder)
    assert fewer.scores == {task: first.scores[task] for task in list(first.scores)[:3]}
    train = run(config(eval__split="train"), policy_folder)
    assert list(train.scores) == [f"train-{n}" for n in range(5)]


def test_two_policies_on_the_same_tasks(config, policy_folder, tmp_path, make_model, tokenizer, capsys):
    from agentrl.tiny import save_policy

    save_policy(make_model(), tokenizer, tmp_path / "random")
    target = tmp_path / "result.json"
    before, after = run_eval(config(), [str(tmp_path / "random"), str(policy_folder)], target)
    assert before.scores.keys() == after.scores.keys()
    written = json.loads(target.read_text())
    assert [e["policy"] for e in written["evaluations"]] == [str(tmp_path / "random"), str(policy_folder)]
    assert [d["k"] for d in written["difference"]] == [1, 2, 4]
    assert written["difference"][0]["difference"] == pytest.approx(after.pass_at_k[0].value - before.pass_at_k[0].value)
    assert written["config"]["eval"]["tasks"] == 5
    shown = capsys.readouterr().out
    assert "(paired)" in shown
    assert "p = " in shown


def trees(*rewards, outcome=Outcome.ANSWERED):
    for number, group in enumerate(rewards):
        leaves = tuple(
            Leaf(-1, r, outcome if r is not None else Outcome.ENV_FAILURE, metrics={"tool_calls": 2.0}) for r in group
        )
        yield RolloutTree(Task(f"t{number}", id=f"t{number}"), (), leaves)


def test_what_could_not_be_scored_is_left_out_and_said(config):
    setting = config(eval__samples=2, eval__k=[1, 2])
    done = summarise("p", list(trees((1.0, 0.0), (None, 1.0), (None, None))), setting, (0.0, 1.0))
    assert [(e.tasks, e.excluded) for e in done.pass_at_k] == [(2, 1), (1, 2)]
    assert done.pass_at_k[0].value == 0.75
    assert done.outcomes == {"answered": 3, "env_failure": 3}
    view = printed(table({"p": done}))
    assert "0.750" in view
    assert "1 tasks left out" in view
    assert "2 tasks left out" in view
    assert "95 % intervals over tasks" in view


def test_a_threshold_makes_graded_rewards_pass_or_fail(config):
    setting = config(eval__samples=2, eval__k=[1], eval__threshold=0.5)
    done = summarise("p", list(trees((0.4, 0.6), (0.5, 0.9))), setting, (0.0, 1.0))
    assert done.pass_at_k[0].value == 0.75
    assert done.average.value == pytest.approx(0.6)


def test_a_comparison_pairs_by_task(config):
    setting = config(eval__samples=2, eval__k=[1, 2])
    before = summarise("a", list(trees((0.0, 0.0), (1.0, 0.0))), setting, (0.0, 1.0))
    after = summarise("b", list(trees((1.0, 1.0), (1.0, 0.0))), config(eval__samples=2, eval__k=[1]), (0.0, 1.0))
    (found,) = compare_evaluations(before, after)
    assert (found.k, found.difference, found.tasks) == (1, 0.5, 2)
    view = printed(table({"before": before, "after": after}, [found]))
    assert "+0.500" in view
    other = summarise("c", list(trees((1.0, 1.0))), setting, (0.0, 1.0))
    with pytest.raises(TaskError, match="needs the same tasks on both sides; 1 only in the first: t1"):
        compare_evaluations(before, other)


def test_progress_shows_the_running_mean():
    notes = []
    finished = on_leaf(lambda steps, note: notes.append((steps, note)))
    for reward in (None, 1.0, 0.0):
        finished(Leaf(0, reward, Outcome.ANSWERED))
    assert notes == [(1, ""), (1, "reward 1.000"), (1, "reward 0.500")]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eval.k": [1, 8]}, ConfigError, r"eval.k contains 8, but eval.samples is 4"),
        ({"env": "gazeteer"}, UnknownName, "did you mean 'gazetteer'"),
        ({"env": "nowhere.py:Env"}, UserError, "no such file"),
        ({"env": "nowhere:Env"}, UserError, "cannot import 'nowhere'"),
        ({"env": ""}, ConfigError, "no environment named"),
    ],
)
def test_evaluations_that_cannot_be(config, policy_folder, changes, error, message):
    with pytest.raises(error, match=message):
        run(load_config(None, {**config().model_dump(mode="json"), **changes}), policy_folder)


def test_policies_that_cannot_be(config, policy_folder, tmp_path, tokenizer):
    for folder in (tmp_path, "/nowhere", "Qwen/Qwen3-0.6B"):
        with pytest.raises(UserError, match=r"expected a Hugging Face folder with a config\.json"):
            run(config(), folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        run(config(), tmp_path)


def test_infrastructure_that_fails_too_often_gives_no_number(config, policy_folder):
    with pytest.raises(TooManyFailures, match="the judge is out"):
        run(config("Broken"), policy_folder)


def test_the_folder_of_the_result_is_checked_before_the_work(config, policy_folder, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        run_eval(config(), ["/nowhere"], tmp_path / "none" / "result.json")


# -- an OpenAI-compatible server --------------------------------------------------------------------------------------


class Server:
    """A local server that answers chat completions with ``reply(body)``: a message, or (status, body)."""

    def __init__(self, reply):
        self.requests, self.headers = [], []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer((200, {"data": [{"id": "the-model"}]}) if self.path == "/v1/models" else (404, "no"))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append(body)
                server.headers.append(dict(self.headers))
                self.answer(reply(body) if self.path == "/v1/chat/completions" else (404, "no"))

            def answer(self, found):
                if isinstance(found, dict):
                    reason = "tool_calls" if found.get("tool_calls") else "stop"
                    choice = {"index": 0, "message": found, "finish_reason": found.pop("finish_reason", reason)}
                    found = 200, {"choices": [choice], "usage": {"completion_tokens": 7}}
                status, body = found
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = type("Many", (ThreadingHTTPServer,), {"request_queue_size": 64})(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def calling(arguments, name="double"):
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "abc", "type": "function", "function": function}],
    }


def expert(body):
    """Calls the tool with the task's number, then answers with what it said."""
    last = body["messages"][-1]
    if last["role"] == "tool":
        return {"role": "assistant", "content": f"<answer>{last['content']}</answer>"}
    return calling(json.dumps({"x": int(last["content"].split()[1])}))


def test_a_server_that_calls_tools(config, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Server(expert) as server:
        done = run(config("Doubling"), server.url)
    assert (done.policy, done.pass_at_k[0].value, done.tool_calls) == (server.url, 1.0, 1.0)
    assert done.outcomes == {"answered": 20}
    first, second = (next(b for b in server.requests if len(b["messages"]) == n) for n in (1, 3))
    assert first["model"] == "the-model"
    assert first["tools"][0]["function"]["name"] == "double"
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (1.0, 1.0, 48)
    assert second["max_tokens"] == 48 - 7
    user, said, heard = second["messages"]
    assert said["tool_calls"][0]["id"] == heard["tool_call_id"] == "abc"
    assert isinstance(said["tool_calls"][0]["function"]["arguments"], str), "the API wants arguments as text"
    assert heard["content"] == str(2 * int(user["content"].split()[1]))
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_samples_ask_with_seeds_of_their_own_that_come_again(config):
    seen = []
    for _ in range(2):
        with Server(lambda body: {"role": "assistant", "content": "1"}) as server:
            run(config("Doubling"), server.url)
        seen.append(sorted(body["seed"] for body in server.requests))
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 20


def test_a_model_can_be_named(config):
    with Server(expert) as server:
        run(config("Doubling", policy__path="another", eval__tasks=1), server.url)
    assert {body["model"] for body in server.requests} == {"another"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ('{"x": ', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"x": NaN}', "not valid JSON"),
        ('{"x": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"y": 1}', "Wrong arguments for 'double'"),
    ],
)
def test_malformed_arguments_are_told_to_the_model(config, arguments, said):
    def reply(body):
        last = body["messages"][-1]
        return {"role": "assistant", "content": "1"} if last["role"] == "tool" else calling(arguments)

    with Server(reply) as server:
        done = run(config("Doubling", eval__tasks=1), server.url)
    assert done.outcomes == {"answered": 4}
    assert said in server.requests[-1]["messages"][-1]["content"]


def test_a_reply_cut_by_its_length(config):
    with Server(lambda body: {"role": "assistant", "content": "200 and", "finish_reason": "length"}) as server:
        done = run(config("Doubling"), server.url)
    assert done.outcomes == {"length": 20}
    assert done.pass_at_k[0].value == 0.0


def test_a_budget_that_is_used_up(config):
    with Server(lambda body: calling('{"x": 1}')) as server:
        done = run(config("Doubling", rollout__max_tokens=10), server.url)
    assert done.outcomes == {"length": 20}
    assert max(body["max_tokens"] for body in server.requests) == 10
    assert min(body["max_tokens"] for body in server.requests) == 3


@pytest.mark.parametrize("status", [500, 429, 503])
def test_a_server_that_is_busy_is_asked_again(config, status):
    failed = set()

    def reply(body):
        key = json.dumps(body)
        if key not in failed:
            failed.add(key)
            return status, "try again"
        return {"role": "assistant", "content": "1"}

    with Server(reply) as server:
        done = run(config("Doubling", eval__tasks=1), server.url)
    assert done.outcomes == {"answered": 4}
    assert len(server.requests) == 8


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, "wrong key"), "HTTP 401: wrong key"),
        ((404, {"error": "no such model"}), "HTTP 404"),
        ((200, "<html>"), "did not answer with JSON: <html>"),
        ((200, []), "not a chat completion"),
        ((200, {"choices": []}), "not a chat completion"),
        ((200, {"choices": [{"message": None}]}), "not a chat completion"),
        ((200, {"choices": [{"message": {"tool_calls": [{"id": "a"}]}}]}), "not a chat completion"),
        ((200, {"choices": [{"message": {}}], "usage": {"completion_tokens": "many"}}), "not a chat completion"),
    ],
)
def test_a_server_that_cannot_be_used_ends_the_evaluation(config, reply, message):
    with Server(lambda body: reply) as server, pytest.raises(SamplerError, match=message):
        run(config("Doubling", eval__tasks=1, rollout__max_live=1), server.url)
    assert len(server.requests) == 1, "asking again would not help"


def test_a_server_that_is_not_there(config, monkeypatch):
    monkeypatch.setattr(openai, "ATTEMPTS", 2)
    with pytest.raises(SamplerError, match=r"http://127\.0\.0\.1:9/v1/models failed: ConnectError"):
        run(config("Doubling"), "http://127.0.0.1:9/v1")


def test_a_server_that_hangs_is_a_timeout_of_its_episodes(config):
    free = threading.Event()
    with Server(lambda body: free.wait(5) and {"role": "assistant", "content": "1"}) as server:
        setting = config("Doubling", rollout__deadline=0.2, rollout__retries=0, eval__tasks=1, eval__samples=4)
        with pytest.raises(TooManyFailures, match="stuck in sampling"):
            run(setting, server.url)
        free.set()
