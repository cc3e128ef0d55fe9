from __future__ import annotations

import os
import subprocess
import sys

import pytest

from agentrl import registry
from agentrl.conformance import check_env
from agentrl.errors import UserError
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.scaffold import new_env


async def test_a_new_environment_passes_the_check_out_of_the_box(tmp_path):
    environment, test = new_env("word_count", tmp_path)
    assert environment == tmp_path / "word_count" / "__init__.py"
    assert test == tmp_path / "word_count" / "test_word_count.py"
    try:
        checks = await check_env(registry.load("envs", f"{environment}:WordCount"))
    finally:
        await close_shared_sandboxes()
    assert all(check.ok for check in checks), checks
    assert "expert 1, wrong answer 0" in next(check.detail for check in checks if check.name == "reward")


def test_its_own_test_passes_for_a_user_without_our_settings(tmp_path):
    new_env("mine", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "mine"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_in_a_checkout_it_goes_where_names_are_found(tmp_path):
    (tmp_path / "agentrl").mkdir()
    (tmp_path / "agentrl" / "_content.py").touch()
    (tmp_path / "envs").mkdir()
    environment, test = new_env("mine", tmp_path)
    assert environment == tmp_path / "envs" / "mine" / "__init__.py"
    assert test == tmp_path / "tests" / "envs" / "test_mine.py"
    assert 'parents[2] / "envs" / "mine" / "__init__.py"' in test.read_text()
    assert "ENV = Mine" in environment.read_text()


@pytest.mark.parametrize("name", ["", "Mine", "my-env", "2nd", "class", "json", "_mine", "a/b", "../up", "naïve"])
def test_names_that_cannot_be(tmp_path, name):
    with pytest.raises(UserError, match="cannot call an environment"):
        new_env(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    new_env("mine", tmp_path)
    with pytest.raises(UserError, match="exists already"):
        new_env("mine", tmp_path)


def test_the_written_files_are_clean(tmp_path):
    new_env("mine", tmp_path)
    ruff = [sys.executable, "-m", "ruff"]
    config = ["--config", "line-length = 120", "--no-cache", str(tmp_path)]
    for command in ([*ruff, "check", "--select", "E,F,W,UP,B,SIM", *config], [*ruff, "format", "--check", *config]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
