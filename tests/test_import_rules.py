"""Who may import whom, as docs/design.md says; and what must start without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agentrl

PACKAGE = Path(agentrl.__file__).parent
CHECKOUT = PACKAGE.parent
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))
CONTENT = sorted(p for kind in ("envs", "tools") for p in (CHECKOUT / kind).rglob("*.py") if p.name != "make_corpus.py")

HEAVY = {"torch", "vllm"}
ENGINES = ("hf", "slots", "draw", "proof", "weights", "transport", "vllm", "vllm_engine", "vllm_worker", "vllm_server")
MAY_IMPORT_HEAVY = {f"sampler/{name}" for name in ENGINES} | {"warmstart"}

BASE = {"types", "errors"}
FOUNDATION = {
    "config",
    "presets",
    "registry",
    "seeds",
    "_content",
    "_durable",
    "_versions",
    "_stand_in",
    "_together",
    "_serving",
    "progress",
    "collapse",
}
# Layer by layer; a module may import its own layer and those before it.
LAYERS = [
    BASE,
    FOUNDATION,
    {
        "env",
        "tool",
        "tool_format",
        "rewards",
        "chat_template",
        "renderer",
        "sandbox",
        "data",
        "tasks",
        "tree_json",
        "tree_diff",
        "stats",
        "equal_cost",
        "tiny",
        "envs",
        "tools",
    },
    {"sandboxes", "sampler", "rollout", "gym", "demonstrations", "_scripted", "conformance", "learner", "scaffold"},
    {"assemble", "handover", "trace", "warmstart", "plot", "pytest_plugin"},
    {"train", "evaluate", "recorded", "replay", "preflight", "__init__"},
    {"compare", "compare_report"},
    {"run", "demo", "doctor", "serve"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The chat writer of sampler/openai is made into a scheduler where evaluate asks for it, and nowhere else.
EXCEPTIONS = {("sampler/openai", "assemble")}


def imports(path, *, top_only):
    """(imported module, whether it only serves type checkers) of each import in ``path``."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in tree.body if top_only else ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            by_parent = prefix in ("agentrl", ".")
            yield from (f"{prefix}.{alias.name}" for alias in node.names) if by_parent else (prefix,)


def own(module, *, top_only=False):
    """Modules of the library that ``module`` imports, as paths below the package."""
    for name in imports(PACKAGE / f"{module}.py", top_only=top_only):
        parts = name.split(".")
        if parts[0] == "agentrl":
            yield "/".join(parts[1:]) or "__init__"


@pytest.mark.parametrize("module", MODULES)
def test_the_direction_of_imports(module):
    here = LEVEL[module.split("/")[0]]
    for name in own(module):
        head = name.split("/")[0]
        if (module, head) not in EXCEPTIONS and head in LEVEL:
            assert LEVEL[head] <= here, f"{module} imports {name}, which stands above it"


def test_every_module_has_a_place():
    assert {module.split("/")[0] for module in MODULES} <= LEVEL.keys(), "add a new module to LAYERS"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("learner/")])
def test_the_learner_knows_only_types_errors_and_config(module):
    assert {name.split("/")[0] for name in own(module)} <= {"types", "errors", "config", "learner"}


@pytest.mark.parametrize("module", MODULES)
def test_torch_is_imported_late(module):
    if not module.startswith("learner/") and module not in MAY_IMPORT_HEAVY:
        heads = {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py", top_only=True)}
        assert not heads & (HEAVY | {"transformers"})


@pytest.mark.parametrize("module", MODULES)
def test_the_library_reaches_content_only_by_name(module):
    found = set(imports(PACKAGE / f"{module}.py", top_only=False))
    heads = tuple(f"agentrl.{kind}." for kind in ("envs", "tools", "sandboxes"))
    assert not [name for name in found if name.startswith((*heads, "envs", "tools", "."))]


@pytest.mark.parametrize("path", CONTENT, ids=lambda path: path.relative_to(CHECKOUT).as_posix())
def test_content_reaches_other_content_only_by_name(path):
    own_name = path.relative_to(CHECKOUT).parts[1].removesuffix(".py")
    for name in imports(path, top_only=False):
        parts = name.split(".")
        assert not name.startswith(("envs", "tools", "sandboxes", "tests", ".."))
        if parts[0] == "agentrl" and parts[1] in ("envs", "tools"):
            assert parts[2] == own_name


def test_there_are_no_circles_at_import():
    """Each module imports on its own, in a fresh interpreter, before any other."""
    code = "import importlib, sys; importlib.import_module(sys.argv[1])"
    light = ["agentrl.env", "agentrl.renderer", "agentrl.config", "agentrl.trace", "agentrl.rollout.scheduler"]
    for module in light:
        subprocess.run([sys.executable, "-c", code, module], check=True, capture_output=True)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["keys"], ["list"], ["train", "--help"]])
def test_commands_that_only_show_something_start_without_torch(words):
    code = (
        "import sys; from agentrl.cli import main; main(sys.argv[1:]); "
        "print('loaded:', sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    *shown, loaded = done.stdout.strip().splitlines()
    assert loaded == "loaded: []"
    assert shown
