"""One typed configuration: a TOML file, then the environment (``AGENTRL_TRAIN__LR``), then flags (``--train.lr``).

Every key is here, with its unit and its default. Unknown keys are refused with the nearest valid name.
"""

from __future__ import annotations

import copy
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from agentrl.errors import ConfigError, UnknownName
from agentrl.presets import PRESETS

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Estimator = Literal[
    "group",
    "leave_one_out",
    "opo",
    "maxrl",
    "gpg",
    "best_of_group",
    "raft",
    "reinforce_rej",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "gigpo",
    "tree",
    "node_value",
    "gae",
]
Surrogate = Literal[
    "clip",
    "unclipped",
    "reinforce",
    "cispo",
    "sapo",
    "gmpo",
    "gvpo",
    "aepo",
    "clip_cov",
    "kl_cov",
    "dppo",
    "ipo",
    "rollout_is",
    "vespo",
]
CorrectionKind = Literal[
    "token_tis",
    "sequence_tis",
    "geometric_tis",
    "token_mask",
    "sequence_mask",
    "geometric_mask",
    "decoupled",
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]
Correction = Literal["none"] | CorrectionKind
LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)
"""What vLLM can be started for."""
OWN_CORRECTION = ("dppo", "ipo", "rollout_is")
"""Surrogates whose ratio is to the sampler, so that a correction beside them would count its age twice."""


class Section(BaseModel):
    """A group of keys; immutable, and closed to unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AlgorithmConfig(Section):
    """The loss: a preset (``agentrl algorithms``) over orthogonal choices. Keys given beside ``name`` override it."""

    name: str = Field("dapo", description="preset; see agentrl algorithms")
    estimator: Estimator = Field("group", description="how rewards become advantages")
    estimator_options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the estimator")
    normalize: Literal["none", "group", "batch"] = Field("group", description="whose standard deviation divides them")
    credit: Literal["soft", "hard", "entropy"] = Field("soft", description="of shared tokens: own leaf's, mean; AEPO's")
    ratio: Literal["token", "turn", "sequence"] = Field("token", description="level of the importance ratio")
    surrogate: Surrogate = Field("clip", description="what the ratio and the advantage become")
    surrogate_options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the surrogate")
    clip_low: float = Field(0.2, gt=0, description="lower clip: ratio >= 1 - clip_low")
    clip_high: float = Field(0.28, gt=0, description="upper clip: ratio <= 1 + clip_high")
    dual_clip: float | None = Field(None, gt=1, description="bound of the loss for negative advantages; none: off")
    aggregation: Aggregation = Field("token-mean", description="how token losses become one number")
    kl_coef: float = Field(0.0, ge=0, description="weight of the KL penalty; 0: no KL, and no second model")
    kl_estimator: Literal["k1", "abs", "k2", "k3", "k1+", "k3+"] = Field(
        "k3", description="KL estimator; +: k2's slope"
    )
    kl_reference: Literal["start", "old"] = Field("start", description="KL to the starting policy, or to the last one")
    kl_placement: Literal["loss", "reward"] = Field("loss", description="KL as a loss term, or taken off the rewards")
    kl_importance: bool = Field(False, description="weigh the KL by the importance ratio: unbiased off policy")
    kl_target: float = Field(0.0, ge=0, description="nats a token; kl_coef then adapts to keep the KL there; 0: fixed")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    entropy_target: float = Field(0.0, ge=0, description="nats; entropy_coef then adapts to keep it; 0: fixed")
    top_entropy: float = Field(1.0, gt=0, le=1, description="share of tokens, the most uncertain ones, that are learnt")
    old_logprobs: Literal["sampler", "learner"] = Field("sampler", description="whose log-probs the ratio divides by")
    correction: Correction = Field("none", description="for the gap between the learner that was and the sampler")
    correction_options: dict[str, Any] = Field(default_factory=dict, description="arguments of the correction")
    opsm_delta: float = Field(
        0.0, ge=0, description="drop bad answers grown unlikely by this many nats a token; 0: off"
    )
    dynamic_sampling: bool = Field(True, description="replace groups whose rewards are all equal")
    max_refills: int = Field(2, ge=0, description="rounds of replacement groups per step; then train on what there is")
    min_reward_std: float = Field(0.0, ge=0, description="groups whose rewards spread no more are not learnt from")
    overlong_filter: bool = Field(True, description="leave trajectories cut by the token budget out of the loss")
    overlong_buffer: int = Field(0, ge=0, description="tokens before the budget over which reward falls by 1; 0: off")

    @model_validator(mode="before")
    @classmethod
    def _begin_with_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        name = str(given.get("name", "dapo"))
        if name not in PRESETS:
            raise UnknownName("algorithm", name, PRESETS)
        return PRESETS[name]() | dict(given)


class PolicyConfig(Section):
    """Which model is trained or evaluated."""

    path: str = Field("", description="Hugging Face folder")
    tool_format: str = Field("hermes", description="how tool calls are written: a parser's name in vLLM, or tags")
    template_options: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the chat template, as {enable_thinking = false}"
    )
    threads: int = Field(0, ge=0, description="CPU threads for torch; 0: all cores")
    device: str = Field("auto", description="torch device; auto: cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the weights; auto: as they were saved"
    )
    lora_rank: int = Field(0, ge=0, description="train adapters of this rank (LoRA, needs peft); 0: all weights")
    lora_alpha: float = Field(32.0, gt=0, description="scale of the adapters: alpha / rank")
    lora_targets: str | tuple[str, ...] = Field("all-linear", description="modules that get an adapter")


class SamplerConfig(Section):
    """How tokens are drawn."""

    backend: Literal["hf", "vllm", "vllm_server"] = Field("hf", description="the engine; docs/vllm.md")
    options: dict[str, Any] = Field(default_factory=dict, description="vllm: further arguments of its engine")
    urls: tuple[str, ...] = Field((), description="vllm_server: addresses that agentrl serve printed")
    transport: Literal["file", "ipc", "nccl", "adapter"] = Field("file", description="how new weights reach vLLM")
    weights_dir: str = Field("/dev/shm", description="folder for file and adapter; shared with servers elsewhere")
    temperature: float = Field(1.0, ge=0, description="softmax temperature")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus mass")
    max_slots: int = Field(512, ge=2, description="sequences the engine holds at once")
    max_length: int = Field(1024, ge=16, description="tokens of a sequence, prompt included")


class RolloutConfig(Section):
    """How episodes are played."""

    prompts: int = Field(32, ge=1, description="tasks per step")
    group: int = Field(8, ge=1, description="trajectories per task (G)")
    policy: Literal["group", "entropy_tree", "expand_tree", "random_tree"] = Field(
        "group", description="where trajectories branch"
    )
    policy_options: dict[str, Any] = Field(default_factory=dict, description="options of the policy; docs/rollouts.md")
    task_budget: dict[str, float] = Field(default_factory=dict, description="most tokens, calls, seconds of a task")
    step_budget: dict[str, float] = Field(default_factory=dict, description="the same, of a whole step")
    max_tokens: int = Field(256, ge=1, description="policy tokens per trajectory")
    max_live: int = Field(512, ge=1, description="episodes in flight at once")
    max_calls: int = Field(512, ge=1, description="tool calls at work at once")
    deadline: float = Field(120.0, gt=0, description="seconds per episode")
    stall: float = Field(30.0, gt=0, description="seconds in one place after which a trajectory is reported as stuck")
    retries: int = Field(1, ge=0, description="new attempts at a trajectory whose environment failed")
    max_failures: float = Field(0.2, ge=0, le=1, description="share of failed episodes in a step that stops the run")


class SandboxConfig(Section):
    """Where tools run the code that a policy wrote."""

    backend: Literal["local", "docker", "remote"] = Field("local", description="whose sessions; see agentrl doctor")
    url: str = Field("", description="remote: the server's address; docker: the engine's, empty: DOCKER_HOST")
    max_sessions: int = Field(1024, ge=1, description="sessions open at once; then opening waits, forks are refused")


class TrainConfig(Section):
    """The optimisation."""

    steps: int = Field(100, ge=1, description="optimizer steps")
    lr: float = Field(1e-6, gt=0, description="peak learning rate")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.0, ge=0, le=1, description="share of the steps, at the end, over which lr falls to a tenth")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    beta2: float = Field(0.99, gt=0, lt=1, description="AdamW's second-moment decay")
    minibatches: int = Field(1, ge=1, description="optimizer steps per batch of rollouts")
    staleness: Literal[0, 1] = Field(0, description="1: play the next batch during the update, with a correction")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm at which to clip")
    micro_tokens: int = Field(16384, ge=1, description="unique tokens per forward pass; gradients accumulate over them")
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, slower")
    max_gap: float = Field(0.05, gt=0, description="largest mean |sampler - learner| log-prob gap before the run stops")
    min_entropy: float = Field(0.0, ge=0, description="stop where the entropy stays below, in nats; 0: off")
    min_informative: float = Field(0.0, ge=0, le=1, description="stop where fewer groups have two rewards; 0: off")
    patience: int = Field(5, ge=1, description="steps in a row after which those two stop the run")
    checkpoint_every: int = Field(20, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="checkpoints kept")


class SFTConfig(Section):
    """The warm start on demonstrations."""

    demonstrations: int = Field(1500, ge=1, description="episodes of the scripted expert to record")
    guess_fraction: float = Field(0.0, ge=0, le=1, description="share of demonstrations that answer without tools")
    steps: int = Field(100, ge=1, description="optimizer steps")
    batch: int = Field(64, ge=1, description="demonstrations per step")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for training from nothing")
    lr: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of Muon's matrices")
    warmup: int = Field(10, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.4, ge=0, le=1, description="share of the steps, at the end, over which the rate falls")


class EvalConfig(Section):
    """The evaluation."""

    split: Literal["train", "test"] = Field("test", description="which tasks")
    tasks: int = Field(100, ge=1, description="number of tasks, taken in order")
    samples: int = Field(8, ge=1, description="trajectories per task")
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 2, 4, 8), min_length=1, description="values of k in pass@k")
    threshold: float = Field(1.0, description="reward from which a trajectory counts as solved")


class RunConfig(Section):
    """Everything a run needs."""

    env: str = Field("", description="environment: a registered name, file.py:Class or module:Class")
    env_options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the environment")
    seed: int = Field(0, ge=0, description="all randomness derives from it")
    out: str = Field("", description="run folder; empty: runs/ENV-DATE-TIME")
    policy: PolicyConfig = PolicyConfig()
    sampler: SamplerConfig = SamplerConfig()
    rollout: RolloutConfig = RolloutConfig()
    sandbox: SandboxConfig = SandboxConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    train: TrainConfig = TrainConfig()
    sft: SFTConfig = SFTConfig()
    eval: EvalConfig = EvalConfig()


class _Sources(BaseSettings, RunConfig):
    """``RunConfig`` as pydantic-settings reads it from files and the environment."""

    model_config = SettingsConfigDict(extra="ignore", env_prefix="AGENTRL_", env_nested_delimiter="__")


def load_config(file: str | Mapping[str, Any] | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A configuration from a TOML file, ``AGENTRL_*`` variables and dotted overrides; later ones win.

    Args:
        file: path of a TOML file, or its tables where it has been read, or None.
        overrides: ``{"train.lr": "1e-4"}``; strings are converted to the key's type.

    Raises:
        ConfigError: a file that cannot be read or a value of the wrong type or range.
        UnknownName: an unknown key or algorithm, with the nearest valid name.
    """
    tree: dict[str, Any] = _read_toml(file) if isinstance(file, str) else copy.deepcopy(dict(file or {}))
    for key, value in leaves(_read_environment()):
        _put(tree, key, value)
    for key, value in (overrides or {}).items():
        _put(tree, key, value)
    for key, _ in leaves(tree):
        if key not in known_keys():
            raise UnknownName("configuration key", key, known_keys())
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = (
            f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors(include_url=False)
        )
        raise ConfigError("invalid configuration: " + "; ".join(lines)) from error
    if config.sandbox.backend == "remote" and not config.sandbox.url:
        raise ConfigError("sandbox.backend is remote, so sandbox.url is needed: the address that the server printed.")
    if config.sandbox.backend == "local" and config.sandbox.url:
        raise ConfigError(f"sandbox.url is {config.sandbox.url!r}, but sandbox.backend is local: expected no url.")
    if config.algorithm.overlong_buffer > config.rollout.max_tokens:
        raise ConfigError(
            f"algorithm.overlong_buffer is {config.algorithm.overlong_buffer}: expected at most rollout.max_tokens, "
            f"which is {config.rollout.max_tokens}."
        )
    _check_sampler(config)
    if config.train.staleness:
        _check_staleness(config)
    return config


def _check_sampler(config: RunConfig) -> None:
    """Refuse keys of one engine that were set for another."""
    sampler, backend = config.sampler, config.sampler.backend
    if backend == "vllm_server" and not sampler.urls:
        raise ConfigError("sampler.backend is vllm_server, so sampler.urls is needed: what agentrl serve printed.")
    if backend != "vllm_server" and sampler.urls:
        raise ConfigError(f"sampler.urls is set, but sampler.backend is {backend}: expected vllm_server, or no urls.")
    if backend != "vllm" and sampler.options:
        where = "; a server takes them as flags: agentrl serve --vllm.NAME VALUE" if backend == "vllm_server" else ""
        raise ConfigError(f"sampler.options are arguments of vllm's engine, but sampler.backend is {backend}{where}.")
    if backend == "hf" and sampler.transport != "file":
        raise ConfigError(f"sampler.transport is {sampler.transport}, but sampler.backend is hf, which needs none.")
    if sampler.transport == "adapter" and not config.policy.lora_rank:
        raise ConfigError("sampler.transport is adapter, but policy.lora_rank is 0: there are no adapters to send.")
    if sampler.transport == "adapter" and config.policy.lora_rank > LORA_RANKS[-1]:
        raise ConfigError(
            f"policy.lora_rank is {config.policy.lora_rank}, vLLM takes adapters up to {LORA_RANKS[-1]}: lower it, or "
            "let sampler.transport be file, which sends merged weights."
        )
    if sampler.transport == "ipc" and backend != "vllm":
        raise ConfigError("sampler.transport is ipc, for an engine on the learner's GPU: expected backend vllm.")
    if config.train.staleness and sampler.options.get("enable_sleep_mode"):
        raise ConfigError(
            "sampler.options.enable_sleep_mode gives the GPU to the learner during the update, but train.staleness is "
            "1: the next batch is played then. Set one of them to 0 or false."
        )


def _check_staleness(config: RunConfig) -> None:
    """Refuse to learn from older rollouts what the loss would take for the newest."""
    algorithm, every = config.algorithm, config.train.checkpoint_every
    if algorithm.surrogate not in OWN_CORRECTION:
        if algorithm.correction == "none":
            raise ConfigError(
                'train.staleness is 1, so rollouts are one update old, but algorithm.correction is "none": expected a '
                'correction of that, as "token_tis" (truncated importance sampling), "sequence_tis" or "decoupled" '
                '(decoupled PPO), with algorithm.old_logprobs "learner"; or set train.staleness to 0.'
            )
        if algorithm.old_logprobs == "sampler":
            raise ConfigError(
                f"train.staleness is 1 and algorithm.correction {algorithm.correction!r}, which weighs the learner's "
                'old log-probs against the sampler\'s, but algorithm.old_logprobs is "sampler": set it to "learner".'
            )
    if every == 1:
        raise ConfigError(
            "train.staleness is 1, but train.checkpoint_every is 1, and nothing is played ahead of a checkpoint: no "
            "step would overlap. Expected checkpoints less often, or train.staleness 0."
        )


def parse_flags(words: Sequence[str]) -> tuple[str | None, dict[str, Any]]:
    """``@ file.toml --a.b value --c.d=value`` as (file, overrides); a bare ``--flag`` means true."""
    file: str | None = None
    overrides: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("@"):
            file = word[1:] or (rest.pop(0) if rest else None)
            if file is None:
                raise ConfigError("expected a file name after '@', as in: agentrl train ENV @ config.toml")
        elif word.startswith("--"):
            key, given, value = word[2:].partition("=")
            if not given:
                value = rest.pop(0) if rest and not rest[0].startswith(("--", "@")) else "true"
            overrides[key.replace("-", "_")] = _value(value)
        else:
            raise ConfigError(f"unexpected argument {word!r}: expected '@ file.toml' or '--key value'.")
    return file, overrides


def known_keys() -> list[str]:
    """All dotted keys."""
    return list(_keys(RunConfig))


def describe_keys() -> Iterator[tuple[str, str, str]]:
    """(key, default, meaning) of every key, for the reference in the docs and ``agentrl train --help``."""
    default = RunConfig()
    for key in known_keys():
        owner: Any = default
        *path, last = key.split(".")
        for part in path:
            owner = getattr(owner, part)
        yield key, json.dumps(getattr(owner, last)), type(owner).model_fields[last].description or ""


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _keys(info.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested sections; a table of options or of a budget is one value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and not name.endswith(("options", "budget")):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _read_toml(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise ConfigError(f"cannot read the configuration {file}: no such file.")
    try:
        return TomlConfigSettingsSource(_Sources, toml_file=Path(file))()
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {file}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}.") from error


def _read_environment() -> dict[str, Any]:
    """What the ``AGENTRL_*`` variables say; those without ``__`` that are no key of the top level are not ours."""
    known = ["AGENTRL_" + key.upper().replace(".", "__") for key in known_keys()]
    for name in map(str.upper, os.environ):
        ours = name.startswith("AGENTRL_") and "__" in name and not name.startswith("AGENTRL_ENV_OPTIONS__")
        if ours and name not in known:
            raise UnknownName("environment variable", name, known)
    try:
        return EnvSettingsSource(_Sources)()
    except SettingsError as error:
        raise ConfigError(f"{error}: expected JSON, as in AGENTRL_EVAL__K='[1, 2]', got {error.__cause__}.") from error


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{key}: {part!r} is a value, not a section.")
    tree[last] = copy.deepcopy(value)


def _value(text: str) -> Any:
    """JSON where it is JSON (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
