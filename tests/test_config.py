"""The configuration: where values come from, which one wins, and what is refused."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.config import PRESETS, AlgorithmConfig, RunConfig, describe_keys, known_keys, load_config, parse_flags
from agentrl.errors import ConfigError, UnknownName


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AGENTRL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# -- the reference ----------------------------------------------------------------------------------------------------


def test_every_key_is_documented_and_there_are_few():
    described = list(describe_keys())
    assert [key for key, _, _ in described] == known_keys()
    assert len(described) < 100
    for key, default, meaning in described:
        assert meaning, key
        assert load_config(None, {key: json.loads(default)}) == load_config(), f"{key}'s default is a valid value"


def test_what_was_loaded_can_be_saved_and_loaded_again():
    config = load_config(None, {"algorithm.name": "dr_grpo", "eval.k": [1, 3], "env_options": {"hops": {"a": [1]}}})
    saved = json.loads(json.dumps(config.model_dump(mode="json")))
    assert load_config(None, saved) == config
    assert load_config(None, {**saved, "train.steps": 7}).train.steps == 7
    assert saved["train"]["steps"] == 100, "loading does not write into what it was given"


# -- sources ----------------------------------------------------------------------------------------------------------


def test_flags_beat_variables_beat_the_file_beats_defaults(toml, monkeypatch):
    file = toml("env = 'arithmetic'\n[train]\nlr = 1e-3\nsteps = 3\nwarmup = 4\n")
    monkeypatch.setenv("AGENTRL_TRAIN__LR", "1e-4")
    monkeypatch.setenv("AGENTRL_TRAIN__STEPS", "5")
    config = load_config(file, {"train.lr": "1e-5"})
    assert (config.train.lr, config.train.steps, config.train.warmup, config.train.beta2) == (1e-5, 5, 4, 0.99)
    assert config.env == "arithmetic"


def test_variables_take_numbers_lists_and_whole_sections(monkeypatch):
    monkeypatch.setenv("AGENTRL_EVAL__K", "[1, 2]")
    monkeypatch.setenv("agentrl_seed", "3")
    monkeypatch.setenv("AGENTRL_SAMPLER", '{"temperature": 0.7}')
    monkeypatch.setenv("AGENTRL_ENV_OPTIONS__HOPS", "2")
    config = load_config()
    assert (config.eval.k, config.seed, config.sampler.temperature) == ((1, 2), 3, 0.7)
    assert config.env_options == {"hops": "2"}


def test_presets_are_defaults_that_any_key_overrides(toml, monkeypatch):
    grpo = load_config(None, {"algorithm.name": "grpo"}).algorithm
    assert (grpo.clip_high, grpo.aggregation, grpo.dynamic_sampling) == (0.2, "seq-mean-token-mean", False)
    file = toml("[algorithm]\nname = 'grpo'\nclip_high = 0.3\n")
    monkeypatch.setenv("AGENTRL_ALGORITHM__DYNAMIC_SAMPLING", "true")
    mixed = load_config(file, {"algorithm.kl_coef": 0.1}).algorithm
    assert (mixed.clip_high, mixed.dynamic_sampling, mixed.kl_coef) == (0.3, True, 0.1)
    assert mixed.aggregation == "seq-mean-token-mean"
    renamed = load_config(file, {"algorithm.name": "dapo"}).algorithm
    assert (renamed.clip_high, renamed.aggregation) == (0.3, "token-mean")
    for preset in PRESETS:
        assert load_config(None, {"algorithm.name": preset}).algorithm.name == preset


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        load_config().train.lr = 1.0


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lrr", "did you mean 'train.lr'"),
        ("trian.lr", "did you mean 'train.lr'"),
        ("lr", "did you mean 'sft.lr'"),
        ("banana", "known: algorithm.aggregation, .*train.weight_decay"),
        ("train", "did you mean 'train.lr'"),
        ("algorithm", "did you mean 'algorithm.name'"),
        ("train.lr.x", "did you mean 'train.lr'"),
        ("", "known: "),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(key, nearest):
    with pytest.raises(UnknownName, match=f"unknown configuration key '{key}': {nearest}"):
        load_config(None, {key: 1})


def test_unknown_keys_of_a_file_and_of_the_environment_are_refused(toml, monkeypatch):
    with pytest.raises(UnknownName, match=r"unknown configuration key 'train\.learning_rate'"):
        load_config(toml("[train]\nlearning_rate = 1\n"))
    for wrong in ("AGENTRL_TRAIN__LRR", "AGENTRL_TRIAN__LR"):
        monkeypatch.setenv(wrong, "1")
        with pytest.raises(
            UnknownName, match=f"unknown environment variable '{wrong}': did you mean 'AGENTRL_TRAIN__LR'"
        ):
            load_config()
        monkeypatch.delenv(wrong)
    monkeypatch.setenv("AGENTRL_REFERENCE_CASES", "somebody else's")
    assert load_config() == RunConfig()


@pytest.mark.parametrize("name", ["grop", "GRPO", 3, ["grpo"], None])
def test_unknown_algorithms_are_refused(name):
    with pytest.raises(UnknownName, match="unknown algorithm"):
        load_config(None, {"algorithm.name": name})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.lr", "fast", "train.lr: .* got 'fast'"),
        ("train.lr", 0, "train.lr: .*greater than 0, got 0"),
        ("train.lr", float("nan"), "train.lr: .*finite"),
        ("train.lr", float("inf"), "train.lr: .*finite"),
        ("train.steps", 2.5, "train.steps: .* got 2.5"),
        ("train.steps", None, "train.steps: .* got None"),
        ("rollout.deadline", -1, "rollout.deadline"),
        ("sampler.top_p", 1.5, "sampler.top_p"),
        ("sampler.temperature", -1, "sampler.temperature"),
        ("seed", -1, "seed"),
        ("eval.k", [], "eval.k"),
        ("eval.k", [0], "eval.k"),
        ("eval.k", "abc", "eval.k"),
        ("eval.split", "dev", "eval.split"),
        ("algorithm.aggregation", "mean", "algorithm.aggregation"),
        ("algorithm.dual_clip", 1.0, "algorithm.dual_clip"),
        ("algorithm.overlong_buffer", 257, "overlong_buffer is 257: expected at most rollout.max_tokens, which is 256"),
        ("env_options", "abc", "env_options"),
        ("env", 5, "env: .* got 5"),
    ],
)
def test_wrong_values_are_refused_with_key_and_value(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, {key: value})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backend": "vllm_server"}, r"sampler\.urls is needed"),
        ({"backend": "vllm", "urls": ["http://x"]}, "expected vllm_server, or no urls"),
        ({"urls": ["http://x"]}, "sampler.backend is hf"),
        ({"options": {"dtype": "half"}}, "sampler.backend is hf"),
        ({"backend": "vllm_server", "urls": ["http://x"], "options": {"dtype": "half"}}, "agentrl serve --vllm"),
        ({"transport": "ipc"}, "which needs none"),
        ({"backend": "vllm_server", "urls": ["http://x"], "transport": "ipc"}, "expected backend vllm"),
        ({"backend": "vllm", "transport": "adapter"}, "policy.lora_rank is 0"),
        ({"backend": "vllm", "transport": "shm"}, r"sampler\.transport"),
        ({"backend": "sglang"}, r"sampler\.backend"),
    ],
)
def test_keys_of_another_engine_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, {f"sampler.{name}": value for name, value in keys.items()})


def test_an_engine_that_sleeps_cannot_play_ahead():
    ahead = {"train.staleness": 1, "algorithm.correction": "token_tis", "algorithm.old_logprobs": "learner"}
    sleepy = {"sampler.backend": "vllm", "sampler.options": {"enable_sleep_mode": True}}
    with pytest.raises(ConfigError, match="enable_sleep_mode"):
        load_config(None, ahead | sleepy)
    load_config(None, sleepy)


def test_all_wrong_values_are_told_at_once():
    with pytest.raises(ConfigError, match=r"seed: .*; train\.lr: "):
        load_config(None, {"seed": "x", "train.lr": "y"})


def test_wrong_variables_are_refused(monkeypatch):
    monkeypatch.setenv("AGENTRL_EVAL__K", "1,2")
    with pytest.raises(ConfigError, match="expected JSON"):
        load_config()
    monkeypatch.delenv("AGENTRL_EVAL__K")
    monkeypatch.setenv("AGENTRL_TRAIN__LR", "fast")
    with pytest.raises(ConfigError, match=r"train\.lr: .* got 'fast'"):
        load_config()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlr = 1\n[train]\n", "not valid TOML"),
        ("train = {", "not valid TOML"),
        (b"x = \xff", "not valid TOML"),
    ],
)
def test_files_that_are_no_toml(toml, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(toml(text))


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=f"cannot read the configuration {path}"):
            load_config(str(path))


# -- flags ------------------------------------------------------------------------------------------------------------


def test_flags():
    words = [
        "@",
        "a.toml",
        "--train.lr",
        "1e-4",
        "--env_options.hops=2",
        "--dry-run",
        "--eval.k",
        "[1,2]",
        "--out",
        "x y",
    ]
    assert parse_flags(words) == (
        "a.toml",
        {"train.lr": 1e-4, "env_options.hops": 2, "dry_run": True, "eval.k": [1, 2], "out": "x y"},
    )
    assert parse_flags(["@a.toml", "--seed=-3"]) == ("a.toml", {"seed": -3})
    assert parse_flags(["--train.lr", "-1"]) == (None, {"train.lr": -1})
    assert parse_flags(["--out=--odd"]) == (None, {"out": "--odd"})


def test_a_flag_without_a_value_does_not_swallow_the_file():
    assert parse_flags(["--dry-run", "@", "a.toml"]) == ("a.toml", {"dry_run": True})
    assert parse_flags(["--short", "--seed", "3"]) == (None, {"short": True, "seed": 3})


@pytest.mark.parametrize(
    ("words", "message"), [(["@"], "file name after '@'"), (["lr=3"], "unexpected argument 'lr=3'")]
)
def test_what_is_no_flag_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_flags(words)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,6}(\.[a-z_]{1,6})?", fullmatch=True), st.integers() | st.booleans()))
def test_flags_come_back_as_they_were_given(overrides):
    words = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
    assert parse_flags(words) == (None, overrides)


def test_a_preset_made_in_python_has_its_own_choices():
    assert AlgorithmConfig(name="grpo").clip_high == PRESETS["grpo"]()["clip_high"] != AlgorithmConfig().clip_high
    assert AlgorithmConfig(name="grpo", clip_high=0.5).clip_high == 0.5
    with pytest.raises(UnknownName, match="did you mean 'grpo'"):
        AlgorithmConfig(name="grpoo")
