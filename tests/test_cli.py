"""The command line: what it prints, where it stops, and with which exit status."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agentrl import __version__, cli, registry, serve
from agentrl.cli import COMMANDS, USAGE, main
from agentrl.config import known_keys
from agentrl.errors import IsolationUnavailable, SamplerError, TooManyFailures
from agentrl.sampler.board import Board
from agentrl.trace import latest_checkpoint, read_metrics

SMALL = ["--sampler.max_length=160", "--rollout.max_tokens=48", "--policy.threads=1", "--algorithm.max_refills=0"]
TRAIN = ["--rollout.prompts=3", "--rollout.group=4", "--train.steps=2", "--train.checkpoint_every=1"]


@pytest.fixture
def agentrl(capsys):
    """Run ``agentrl WORDS``: (exit status, standard output, standard error)."""

    def run(*words):
        status = 0
        try:
            main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_help_names_every_command(agentrl):
    for words in ([], ["--help"], ["help"], ["train", "--help"]):
        assert agentrl(*words) == (0, USAGE + "\n", "")
    assert all(f"agentrl {command}" in USAGE for command in COMMANDS)
    assert agentrl("--version")[1] == f"agentrl {__version__}\n"


def test_keys_and_names(agentrl):
    status, shown, _ = agentrl("keys")
    assert status == 0
    assert [line.split()[0] for line in shown.splitlines()] == known_keys()
    status, shown, _ = agentrl("list")
    assert status == 0
    for name in (*registry.names("envs"), *registry.names("tools")):
        assert f"  {name} " in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train"], "expected an environment after the command"),
        (["train", "--policy", "x"], "expected an environment after the command"),
        (["train", "arithmetik", "--policy", "x"], "did you mean 'arithmetic'?"),
        (["train", "arithmetic"], "expected a Hugging Face folder"),
        (["train", "arithmetic", "--policy"], "--policy needs a value"),
        (["train", "arithmetic", "--policy", "x", "--out"], "--out needs a value"),
        (
            ["train", "arithmetic", "--train.lrr", "1"],
            "unknown configuration key 'train.lrr': did you mean 'train.lr'?",
        ),
        (["train", "arithmetic", "--algorithm.name", "grpoo"], "unknown algorithm 'grpoo': did you mean 'grpo'?"),
        (["train", "arithmetic", "lr=3"], "unexpected argument 'lr=3'"),
        (["train", "arithmetic", "@", "none.toml"], "cannot read the configuration none.toml"),
        (["train", "arithmetic", "--json", "x"], "--json does not go with this command"),
        (["train", "--resume"], "--resume needs --out DIR"),
        (["train", "--resume", "--out", "nowhere"], "there is no run to resume"),
        (["train", "--resume", "--out", "nowhere", "@", "x.toml"], "@ x.toml does not go with this command"),
        (["eval", "arithmetic"], "no policy: expected --policy DIR"),
        (["eval", "arithmetic", "--policy", "nowhere"], "expected a Hugging Face folder"),
        (["eval", "arithmetic", "--resume"], "--resume does not go with this command"),
        (["eval", "arithmetic", "--policy", "x", "--eval.k", "[16]"], "eval.k contains 16, but eval.samples is 8"),
        (["eval", "arithmetic", "--policy", "x", "--json", "no/where.json"], "no is no folder"),
        (["sft", "--out", "x"], "expected an environment after the command"),
        (["new"], "expected a name after the command"),
        (["new", "Word-Count"], "cannot call an environment 'Word-Count'"),
        (["new", "word_count", "--train.lr", "1"], "--train.lr does not go with this command"),
        (["list", "--verbose"], "--verbose does not go with this command"),
        (["keys", "@", "x.toml"], "@ x.toml does not go with this command"),
        (["demo", "@", "x.toml"], "@ x.toml does not go with this command"),
        (["check", "nowhere"], "unknown environment 'nowhere'"),
    ],
)
def test_what_the_user_can_mend_is_status_2_without_a_traceback(agentrl, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, shown, error = agentrl(*words)
    assert (status, shown) == (2, "")
    assert error.startswith("agentrl: ")
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TooManyFailures("3 of 4 episodes failed"), 3),
        (SamplerError("the sampler is closed"), 3),
        (IsolationUnavailable(["user namespaces"]), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_statuses(agentrl, monkeypatch, error, status):
    def fail(words):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    found, _, shown = agentrl("train", "arithmetic")
    assert found == status
    assert (str(error) or "--resume --out DIR") in shown


def test_a_programming_error_keeps_its_traceback(agentrl, monkeypatch):
    def fail(words):
        raise KeyError("x")

    monkeypatch.setitem(cli.COMMANDS, "train", fail)
    with pytest.raises(KeyError):
        agentrl("train", "arithmetic")


# -- commands that work -----------------------------------------------------------------------------------------------


def test_warm_start_from_nothing_then_evaluate(agentrl, tmp_path, scripted):
    out = tmp_path / "policy"
    words = ["--sft.steps", 2, "--sft.demonstrations", 8, "--sft.batch", 4, "--sft.guess_fraction", 0.5]
    status, shown, error = agentrl("sft", scripted("Doubling"), "--out", out, *words, "--policy.threads", 1)
    assert (status, error) == (0, "")
    assert "policy: Qwen3 from nothing" in shown
    assert f"policy saved in {out}" in shown.replace("\n", "")
    target = tmp_path / "eval.json"
    words = ["--eval.tasks", 2, "--eval.samples", 2, "--eval.k", "[1,2]", "--json", target, *SMALL]
    status, shown, error = agentrl("eval", scripted("Doubling"), "--policy", out, *words)
    assert (status, error) == (0, "")
    assert "pass@2" in shown
    assert json.loads(target.read_text())["evaluations"][0]["policy"] == str(out)
    status, _, error = agentrl("sft", scripted("Doubling"), "--out", out)
    assert status == 2
    assert "exists and is not empty" in error


def test_train_and_resume(agentrl, tmp_path, scripted, policy_folder):
    file, out = tmp_path / "run.toml", tmp_path / "run"
    file.write_text("[train]\nlr = 1e-4\n")
    words = [scripted("Shy"), "--policy", policy_folder, "--out", out, *SMALL, *TRAIN]
    status, shown, error = agentrl("train", *words, "--dry-run", "@", file)
    assert (status, error) == (0, "")
    assert '"lr": 0.0001' in shown
    assert not out.exists()
    status, shown, error = agentrl("train", *words, "@", file)
    assert (status, error) == (0, "")
    assert "train (dapo): 2/2" in shown
    titles, first = shown.splitlines()[:2]
    assert titles.startswith("step  reward  entropy   clip -/+  KL step")
    assert first.split()[:2] == ["1", f"{read_metrics(out)[0]['reward']:.3f}"]
    assert (out / "config.toml").read_text() == file.read_text()
    assert json.loads((out / "config.json").read_text())["train"]["lr"] == 1e-4
    status, _, error = agentrl("train", "--resume", "--out", out)
    assert status == 2
    assert "has done 2 of 2 steps" in error
    status, _, error = agentrl("train", "another_env", "--resume", "--out", out, "--train.steps", 3)
    assert status == 2
    assert "keeps its configuration" in error
    status, _, error = agentrl("train", scripted("Shy"), "--resume", "--out", out, "--train.steps", 3)
    assert (status, error) == (0, "")
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    assert latest_checkpoint(out).step == 3


def test_a_resumed_run_uses_its_own_number_of_threads(agentrl, tmp_path, scripted, policy_folder, monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    words = [scripted("Shy"), "--policy", policy_folder, "--out", tmp_path / "run", *SMALL, *TRAIN]
    assert agentrl("train", *words)[0] == 0
    assert asked
    asked.clear()
    assert agentrl("train", "--resume", "--out", tmp_path / "run", "--train.steps", 3)[0] == 0
    assert set(asked) == {1}


def test_check(agentrl, tmp_path, scripted):
    target = tmp_path / "check.json"
    status, shown, _ = agentrl("check", scripted("Doubling"), "--json", target)
    assert status == 0
    assert all(check["ok"] for check in json.loads(target.read_text()))
    assert "FAIL" not in shown
    status, shown, _ = agentrl("check", scripted("Broken"))
    assert status == 1
    assert "FAIL" in shown


def test_the_command_is_installed():
    command = Path(sys.executable).with_name("agentrl")
    done = subprocess.run([command, "frobnicate"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("agentrl: unknown command 'frobnicate'")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("rollout.policy_options", '{"inital": 2}', "did you mean 'initial'"),
        ("rollout.policy_options", '{"initial": 99}', "at most rollout.group"),
        ("rollout.task_budget", '{"token": 9}', "did you mean 'tokens'"),
        ("rollout.step_budget", '{"calls": -1}', "greater than or equal to 0"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(policy_folder, capsys, flag, value, says):
    words = ["train", "arithmetic", "--policy", str(policy_folder), "--dry-run", "--rollout.policy", "random_tree"]
    with pytest.raises(SystemExit) as ended:
        main([*words, f"--{flag}", value])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


# -- serve; that it serves is tested with vLLM ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve"], "expected a model's folder"),
        (["serve", "--port", "1"], "expected a model's folder"),
        (["serve", "nowhere"], "nowhere is no model: expected a Hugging Face folder"),
        (["serve", "x", "--prot", "1"], "did you mean '--port'"),
        (["serve", "x", "--port", "70000"], "--port must be a whole number from 0 to 65535, got 70000"),
        (["serve", "x", "--max-length", "long"], "--max-length must be a whole number"),
        (["serve", "x", "--host"], "--host needs a value"),
        (["serve", "x", "--transport", "pigeon"], "--transport must be one of file, ipc, nccl, adapter, got 'pigeon'"),
        (["serve", "x", "--token", "secret"], "every user of this machine can read the command line"),
        (["serve", "x", "@", "file.toml"], "does not go with this command"),
    ],
)
def test_serve_refuses_what_it_cannot_use(agentrl, words, says):
    status, shown, problem = agentrl(*words)
    assert (status, shown) == (2, "")
    assert says in problem


def test_serve_without_vllm_says_so(agentrl, policy_folder, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    status, _, problem = agentrl("serve", policy_folder)
    assert status == 2
    assert "agentrl serve needs vLLM: pip install 'agentrl[vllm]'" in problem


@pytest.mark.parametrize("token", ["short", "sixteen letters with spaces"])
def test_serve_takes_no_weak_token(agentrl, policy_folder, monkeypatch, tmp_path, token):
    monkeypatch.setattr(serve, "check_startable", lambda options: None)
    (tmp_path / "token").write_text(token)
    status, _, problem = agentrl("serve", policy_folder, "--token-file", tmp_path / "token")
    assert status == 2
    assert "at least 16 visible ASCII characters" in problem


def test_serve_ends_with_the_status_of_the_server(agentrl, policy_folder, monkeypatch):
    asked = []

    async def served(options, token):
        asked.append((options, token))
        return 7

    monkeypatch.setattr(serve, "check_startable", lambda options: None)
    monkeypatch.setattr(serve, "serve", served)
    monkeypatch.delenv("AGENTRL_SERVER_TOKEN", raising=False)
    status, shown, problem = agentrl("serve", policy_folder, "--host", "0.0.0.0", "--vllm.enable-lora")
    ((options, token),) = asked
    assert (status, options.vllm) == (7, {"enable_lora": True})
    assert f"AGENTRL_SERVER_TOKEN={token}" in shown
    assert "0.0.0.0 can be reached from other machines" in problem


def test_the_command_line_of_vllm_serve_is_that_of_the_engine(tmp_path, monkeypatch):
    found = {"model": "M", "max_model_len": 9, "enforce_eager": True, "async_scheduling": False, "a_list": ["x", "y"]}
    found["additional_config"] = {"agentrl": {"slots": 1}}
    monkeypatch.setattr("agentrl.sampler.vllm_engine.engine_arguments", lambda *given: found | given[-1])
    options = serve.read_options("M", {"tensor_parallel_size": 2, "vllm.seed": 3, "vllm.enable_lora": True})
    words = serve.command(options, Board.create(tmp_path / "board", 1, 2), 8123)
    text = " ".join(words)
    assert words[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "M"]
    for part in (
        "--port 8123",
        "--middleware agentrl.sampler.vllm_endpoint.Endpoint",
        "--max-model-len 9",
        "--enforce-eager",
        "--no-async-scheduling",
        "--a-list x y",
        '--additional-config {"agentrl": {"slots": 1}}',
        "--tensor-parallel-size 2",
        "--seed 3",
        "--enable-lora",
    ):
        assert part in text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_end_says_how_it_goes_on(policy_folder, scripted, tmp_path, number, status):
    out = tmp_path / "run"
    words = ["train", scripted("Doubling"), "--policy", policy_folder, "--out", out, *SMALL, "--train.steps=500"]
    with subprocess.Popen(
        [sys.executable, "-m", "agentrl", *map(str, words)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # these tests may be a background job
    ) as process:
        try:
            while not (out / "metrics.jsonl").exists() or not read_metrics(out):
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == status
    assert said.decode().splitlines()[-1] == f"agentrl: interrupted; go on with: agentrl train --resume --out {out}"
