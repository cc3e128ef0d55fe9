"""Environments and tools by name, by file and by module."""

from __future__ import annotations

import pytest

from agentrl import registry
from agentrl.errors import UnknownName, UserError


def test_content_is_found_by_name():
    assert {"arithmetic", "gazetteer", "notebook"} <= set(registry.names("envs"))
    assert {"python", "search"} <= set(registry.names("tools"))
    assert registry.load("envs", "arithmetic").__module__ == "agentrl.envs.arithmetic"
    assert registry.make("arithmetic", digits=1).digits == 1


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("envs", "arithmetik", "unknown environment 'arithmetik': did you mean 'arithmetic'?"),
        ("tools", "pyton", "unknown tool 'pyton': did you mean 'python'?"),
        ("envs", "../arithmetic", "unknown environment"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(kind, name, message):
    with pytest.raises(UnknownName, match=message.replace("?", r"\?")):
        registry.load(kind, name)


def test_code_by_path(tmp_path):
    (tmp_path / "mine.py").write_text("class Env:\n    def __init__(self, x=1):\n        self.x = x\n")
    assert registry.make(f"{tmp_path}/mine.py:Env", x=3).x == 3
    assert registry.load("envs", "agentrl.env:ToolEnv").__name__ == "ToolEnv"
    with pytest.raises(UnknownName, match="did you mean 'Env'"):
        registry.load("envs", f"{tmp_path}/mine.py:Enw")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("no/such.py:Env", "no such file"), ("no_such_module:Env", "cannot import"), (":Env", "cannot import ''")],
)
def test_code_that_is_not_there(spec, message):
    with pytest.raises(UserError, match=message):
        registry.load("envs", spec)


def test_options_that_an_environment_does_not_take():
    with pytest.raises(UserError, match=r"'arithmetic' does not take \{'hops': 2\}"):
        registry.make("arithmetic", hops=2)
