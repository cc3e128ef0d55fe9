"""Policies as Hugging Face folders, and the learner's state beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from agentrl.errors import RunFolderError, UserError
from agentrl.learner.step import Learner

STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"


def load_policy(folder: str | Path, device: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer, as saved by ``save_pretrained``.

    Args:
        folder: a Hugging Face folder.
        device: torch device; ``"auto"`` is cuda where there is one, else cpu.

    Raises:
        UserError: not such a folder, or its tokenizer has entries that the model has no rows for.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per file would break ours
    tokenizer = load_tokenizer(folder)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = AutoModelForCausalLM.from_pretrained(Path(folder)).to(where)
    except Exception as error:  # transformers, safetensors and torch raise many unrelated types
        raise UserError(f"policy {str(folder)!r} cannot be loaded: {error}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"policy {str(folder)!r}: the tokenizer has {len(tokenizer)} entries, the model {rows} rows; they do not "
            "belong together."
        )
    return model, tokenizer


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a policy.

    Raises:
        UserError: not a Hugging Face folder.
    """
    from transformers import AutoTokenizer

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(
            f"policy {str(folder)!r}: expected a Hugging Face folder with a config.json. Give --policy.path a folder "
            "written by save_pretrained; `agentrl demo` makes a tiny one."
        )
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and tokenizers raise many unrelated types
        raise UserError(f"the tokenizer of policy {str(folder)!r} cannot be loaded: {error}") from error


def save_checkpoint(folder: Path, learner: Learner, tokenizer: Any, state: dict[str, Any]) -> None:
    """Write policy, optimizer and ``state`` into ``folder``; the policy loads with ``from_pretrained``."""
    learner.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.save(learner.optimizer.state_dict(), folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(state | {"updates": learner.updates}))


def load_state(folder: Path, learner: Learner) -> dict[str, Any]:
    """Put the optimizer back and return what was saved as ``state``; the weights are loaded with ``load_policy``.

    Raises:
        RunFolderError: the optimizer's state does not fit the model.
    """
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    try:
        learner.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, weights_only=True))
    except ValueError as error:
        raise RunFolderError(f"{folder / OPTIMIZER} does not fit the policy: {error}") from error
    learner.updates = state["updates"]
    return state
