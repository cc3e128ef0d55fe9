from __future__ import annotations

import re
from pathlib import Path

from agentrl import registry
from agentrl.config import load_config

ROOT = Path(__file__).parents[1]


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
