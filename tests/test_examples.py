from __future__ import annotations

import dataclasses
import math
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from chat_templates import FAMILIES, make_tokenizer
from recipe_memory import GPU, QWEN3, needs, table

from agentrl import preflight, registry
from agentrl.cli import main
from agentrl.config import load_config
from agentrl.errors import ConfigError, UnknownName
from agentrl.learner.optimizer import Optimizer
from agentrl.preflight import check_learner, check_sampler
from agentrl.sampler.weights import file_shapes, weight_files
from agentrl.tiny import build_model

ROOT = Path(__file__).parents[1]
RECIPES = [
    file for file in sorted((ROOT / "examples").glob("*.toml")) if "compare" not in tomllib.loads(file.read_text())
]
"""Those of ``agentrl compare`` are read in test_compare.py."""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A tiny Qwen3 with the template, the tokens and the files of its family."""
    folder = tmp_path_factory.mktemp("qwen3")
    model = build_model(make_tokenizer(FAMILIES["qwen3"], folder), hidden=64, layers=4, context=16384)
    model.bfloat16().save_pretrained(folder)
    make_tokenizer(FAMILIES["qwen3"], folder)  # its generation_config.json, in the place of the model's
    return folder


async def test_the_example_environment_keeps_the_contract(env_conformance):
    await env_conformance(registry.load("envs", f"{ROOT / 'examples' / 'adder.py'}:Adder"))


def test_the_example_configuration_is_valid():
    config = load_config(str(ROOT / "examples" / "grpo.toml"))
    assert (config.algorithm.name, config.algorithm.aggregation) == ("grpo", "seq-mean-token-mean")


def test_the_readme_shows_the_example():
    readme, example = (ROOT / "README.md").read_text(), (ROOT / "examples" / "adder.py").read_text()
    code = re.search(r"```python\nfrom agentrl import Task, ToolEnv\n\n(.*?)```", readme, re.DOTALL)
    assert code is not None

    def plain(line: str) -> str:
        return re.sub(r"\s+#.*| -> [^:]+(?=:)|: (Task|Episode|str)\b", "", line).strip()

    shown = [plain(line) for line in code[1].splitlines() if line.strip()]
    assert set(shown) <= {plain(line) for line in example.splitlines()}


# -- recipes ----------------------------------------------------------------------------------------------------------


def commands(file):
    """The commands in the comment at the head of ``file``, without their beginning ``NAME=VALUE`` words."""
    head = re.match(r"(#.*\n)+", file.read_text())[0]
    lines = re.sub(r"\\\n# *", "", head).splitlines()
    found = [re.search(r"(?:^#|:)\s*(?:\w+=\S+ )*((?:agentrl|torchrun) .*)", line) for line in lines]
    return [match[1].split(" #")[0].split() for match in found if match]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_dry_run_of_every_recipe_passes_here(file, stand_in, capsys, monkeypatch):
    """The very command of its comment, but for the policy."""
    monkeypatch.chdir(ROOT)
    (command,) = [words for words in commands(file) if "--dry-run" in words]
    place = command.index("--policy") + 1
    command[place] = str(stand_in)
    main(command[1:])
    shown = capsys.readouterr().out
    assert "\nsampler: " in shown
    assert "\nok: " in shown


@pytest.mark.parametrize("file", [f for f in RECIPES if f.stem in QWEN3], ids=lambda file: file.stem)
def test_the_commands_of_a_recipe_belong_together(file):
    config, words = load_config(str(file)), commands(file)
    by_name = {name: [each for each in words if name in each] for name in ("train", "eval", "serve", "--dry-run")}
    assert all(f"examples/{file.name}" in each for each in words if "@" in each)
    (evaluating,) = by_name["eval"]
    checkpoint = Path(evaluating[evaluating.index("--policy") + 1])
    training = next(each for each in by_name["train"] if "--out" in each)
    assert checkpoint.parents[1] == Path(training[training.index("--out") + 1])
    assert checkpoint.name == f"step_{config.train.steps:06d}"
    assert len({each[each.index("train") + 1] for each in by_name["train"]} | {evaluating[2]}) == 1, "one environment"
    for serving in by_name["serve"]:
        flags = dict(zip(serving[3::2], serving[4::2], strict=True))
        assert int(flags["--max-length"]) >= config.sampler.max_length
        assert flags["--transport"] == config.sampler.transport
        assert [f"http://127.0.0.1:{flags['--port']}"] == list(config.sampler.urls)
    assert bool(by_name["serve"]) == (config.sampler.backend == "vllm_server")


# -- their memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN3)
def test_the_parameters_that_the_table_rests_on_are_the_models(name):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    shape = QWEN3[name]
    with torch.device("meta"):
        model = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=shape.vocabulary,
                hidden_size=shape.hidden,
                intermediate_size=shape.inner,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.groups,
                head_dim=shape.size,
                tie_word_embeddings=shape.tied,
            )
        )
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    inside = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.adapters(32) == 32 * sum(m.in_features + m.out_features for m in inside)


def test_the_bytes_of_a_parameter_are_the_optimizers():
    model = torch.nn.Linear(64, 64, bias=False).bfloat16()
    optimizer = Optimizer({"policy": model.named_parameters()})
    model.weight.grad = torch.ones_like(model.weight)
    state = [tensor for name, tensor in optimizer.state_dict().items() if not name.endswith("/step")]
    held = [model.weight, model.weight.grad, *state]
    optimizer.collect()
    held.append(optimizer._masters["policy.weight"].grad)
    total = sum(tensor.numel() * tensor.element_size() for tensor in held)
    full = needs(ROOT / "examples")["qwen3_1.7b"]
    assert total / model.weight.numel() == (full.weights + full.state) / QWEN3["qwen3_1.7b"].parameters == 20


def test_every_recipe_fits_its_gpus():
    for name, need in needs(ROOT / "examples").items():
        config = load_config(str(ROOT / "examples" / f"{name}.toml"))
        assert need.most < GPU, name
        full = config.sampler.max_length
        assert need.cached > 32 * full, f"{name}: the engine holds few sequences"


def test_the_documents_table_is_the_computed_one():
    assert "\n".join(table(ROOT / "examples")) in (ROOT / "docs" / "recipes.md").read_text()


# -- what a dry run says of the sampler -------------------------------------------------------------------------------

SIZE = 3 << 30


def said(**changes):
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return "\n".join(check_sampler(load_config(None, keys), SIZE))


VLLM = {"sampler__backend": "vllm"}
SERVER = {"sampler__backend": "vllm_server", "sampler__urls": ["http://a:8000", "http://b:8000/"]}


def test_a_dry_run_says_how_weights_will_travel(monkeypatch, tmp_path):
    monkeypatch.delenv("AGENTRL_SERVER_TOKEN", raising=False)
    monkeypatch.setattr(preflight, "_has_gpu", lambda: False)
    assert said() == "sampler: hf, in this process; weights are copied to it."
    there = {"sampler__weights_dir": str(tmp_path)}
    by_file = said(**VLLM, **there, sampler__options={"enable_sleep_mode": True})
    assert "vLLM on this machine, asleep during the update. It was not started." in by_file
    assert f"3.00 GiB by a file in {tmp_path}." in by_file
    assert "this machine has no GPU, without which there is no enable_sleep_mode" in by_file
    assert "no GPU" not in said(**VLLM, **there)
    over_http = said(**SERVER, sampler__transport="nccl")
    assert "vLLM on http://a:8000, http://b:8000/. No server was asked" in over_http
    assert "AGENTRL_SERVER_TOKEN is not set here" in over_http
    assert "this machine has no GPU, without which there is no nccl" in over_http
    monkeypatch.setenv("AGENTRL_SERVER_TOKEN", "x" * 20)
    assert "not set" not in said(**SERVER, **there)
    adapters = {"policy__lora_rank": 8, "sampler__transport": "adapter"}
    assert f"LoRA adapters of rank 8 alone, by a folder in {tmp_path}" in said(**VLLM, **there, **adapters)
    monkeypatch.setattr(preflight, "_has_gpu", lambda: True)
    assert "no GPU" not in said(**VLLM, sampler__transport="ipc")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (VLLM | {"sampler__options": {"max_num_seqs": 8}}, "max_num_seqs is agentrl's own to set"),
        (VLLM | {"sampler__transport": "nccl"}, 'expected policy.device = "cuda:1"'),
        (VLLM | {"sampler__weights_dir": "/nowhere"}, "/nowhere is no folder"),
        (SERVER | {"sampler__urls": ["localhost:8000"]}, "'localhost:8000' in sampler.urls is no url"),
        (SERVER | {"sampler__urls": ["http://a:8000", "http://a:8000/"]}, "names http://a:8000 twice"),
    ],
)
def test_a_dry_run_refuses_what_the_engine_or_the_road_would(changes, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        said(**changes)


@pytest.mark.parametrize(("changes", "times"), [(VLLM, 1), (SERVER, 2)])
def test_a_dry_run_looks_for_room_for_the_weights(changes, times, tmp_path, monkeypatch):
    """A server's last file stays while the next one is written."""
    free = times * SIZE
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: dataclasses.make_dataclass("Disk", ["free"])(free))
    there = {"sampler__weights_dir": str(tmp_path)}
    assert "by a file" in said(**changes, **there)
    free -= 1
    with pytest.raises(ConfigError, match=f"expected {3 * times}.00 GiB: choose another folder with sampler.weights"):
        said(**changes, **there)


def test_the_names_of_options_are_vllms(monkeypatch):
    """Where vLLM can be imported. Of it only the record of its arguments is read."""
    options = VLLM | {"sampler__options": {"gpu_memory_utilisation": 0.4}}
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    assert "the names in sampler.options were not checked" in said(**options)
    arguments = type(sys)("vllm.engine.arg_utils")
    arguments.AsyncEngineArgs = dataclasses.make_dataclass("AsyncEngineArgs", [("gpu_memory_utilization", float, 0.9)])
    for name in ("vllm", "vllm.engine"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, arguments.__name__, arguments)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UnknownName, match=r"sampler.options: 'gpu_memory_utilisation': did you mean 'gpu_memory_util"):
        said(**options)
    assert "vLLM knows the names" in said(**VLLM, sampler__options={"gpu_memory_utilization": 0.4})


def test_a_dry_run_makes_no_moments_for_all_layers(stand_in, monkeypatch):
    made = []

    def record(self, groups, **settings):
        made.append([name for name, _ in dict(groups)["policy"]])

    monkeypatch.setattr(Optimizer, "__init__", record)
    config = load_config(None, {"policy.path": str(stand_in)})
    size = check_learner(config)
    shapes = file_shapes(weight_files(stand_in))
    assert size == 2 * sum(math.prod(shape) for shape in shapes.values())
    assert {name.split(".")[2] for name in made[0] if ".layers." in name} == {"0", "1"}
