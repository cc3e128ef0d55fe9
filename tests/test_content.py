"""Content folders are reachable as ``agentrl.envs`` and never as top-level packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agentrl import registry


@pytest.mark.parametrize("kind", ["envs", "tools"])
def test_every_name_loads(kind):
    assert registry.names(kind)
    for name in registry.names(kind):
        assert callable(registry.load(kind, name))


def test_content_is_no_top_level_package():
    for kind in ("envs", "tools"):
        for name in registry.names(kind):
            registry.load(kind, name)
    assert not {"envs", "tools", "sandboxes"} & {name.partition(".")[0] for name in sys.modules}


def test_an_environment_starts_without_torch_or_transformers():
    code = (
        "import sys, agentrl; env = agentrl.make('arithmetic'); next(iter(env.tasks('train'))); "
        "print(sorted({'torch', 'transformers', 'bm25s'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
