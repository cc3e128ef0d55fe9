"""``agentrl new NAME``: a working environment to start from, and its test."""

from __future__ import annotations

import keyword
import sys
from pathlib import Path

from agentrl.errors import UserError

_ENVIRONMENT = '''\
"""``{name}``: say here what the policy has to do."""

from __future__ import annotations

import random
from collections.abc import Iterable

from agentrl import Episode, Message, Task, ToolCall, ToolEnv, require_answer


class {cls}(ToolEnv):
    """Count the letters of a word with the Python tool."""

    tools = ("python",)  # names that `agentrl list` shows, or your own functions, decorated with agentrl.tool
    max_turns = 4  # assistant messages; the episode ends without an answer after the last one

    def tasks(self, split: str) -> Iterable[Task]:
        """The same tasks in the same order every time; "train" and "test" must not share any."""
        for seed in range(2000) if split == "train" else range(2000, 2050):
            word = "".join(random.Random(seed).choices("aeiou", k=12))
            answer = str(word.count(word[0]))
            yield Task(f"How many letters {{word[0]}} are in {{word}}?", answer, metadata={{"word": word}})

    async def reward(self, task: Task, episode: Episode) -> float:
        """A finite number; episode.answer is None where the policy gave no answer."""
        return float(episode.answer == require_answer(task))

    def expert(self, task: Task, rng: random.Random) -> list[Message]:
        """What a skilled policy would write, turn by turn; `agentrl sft` learns from it."""
        word = task.metadata["word"]
        call = ToolCall("call_0_0", "python", {{"code": f"{{word!r}}.count({{word[0]!r}})"}})
        return [Message("assistant", "", (call,)), Message("assistant", require_answer(task))]


ENV = {cls}  # what `agentrl train {name}` finds
'''

_TEST = '''\
"""Tests of ``{name}``."""

from __future__ import annotations

import asyncio
from pathlib import Path

from agentrl import registry

FILE = Path(__file__).resolve().{where}
{cls} = registry.load("envs", f"{{FILE}}:{cls}")


def test_{name}_keeps_the_contract(env_conformance):
    asyncio.run(env_conformance({cls}))


def test_{name}_has_answers():
    assert all(task.answer for task in {cls}().tasks("train"))
'''


def new_env(name: str, folder: Path) -> list[Path]:
    """Write the environment ``name`` and its test below ``folder``.

    In a checkout of agentrl they go to ``envs/NAME/`` and ``tests/envs/``, where they are found by name; elsewhere both
    go to ``NAME/``.

    Args:
        name: a lower-case Python identifier.
        folder: the working directory.

    Returns:
        The files written: the environment, then its test.

    Raises:
        UserError: a name that cannot be a module's, or something that exists already.
    """
    if not (name.isidentifier() and name.isascii() and name == name.lower()) or keyword.iskeyword(name):
        raise UserError(f"cannot call an environment {name!r}: expected a lower-case Python name, as in word_count.")
    if name in sys.stdlib_module_names or name.startswith("_"):
        raise UserError(f"cannot call an environment {name!r}: that is taken by Python; choose another name.")
    checkout = (folder / "agentrl" / "_content.py").is_file() and (folder / "envs").is_dir()
    home = folder / "envs" / name if checkout else folder / name
    test = folder / "tests" / "envs" / f"test_{name}.py" if checkout else home / f"test_{name}.py"
    for path in (home, test):
        if path.exists():
            raise UserError(f"{path} exists already: choose another name, or move it away.")
    words = {
        "name": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "where": f'parents[2] / "envs" / "{name}" / "__init__.py"' if checkout else 'with_name("__init__.py")',
    }
    files = {home / "__init__.py": _ENVIRONMENT, test: _TEST}
    for path, template in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(template.format(**words), encoding="utf-8")
    return list(files)
