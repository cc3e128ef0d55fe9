"""Policies as Hugging Face folders, and the learner's state beside them.

==============================================  ======================================================================
``config.json  model.safetensors  tokenizer*``  the policy, whole and plain: adapters are merged in
``adapter/``                                    the adapters by themselves, as peft writes them
``learner.pt`` or ``learner/``                  moments, fp32 masters and the critic; of one process, or in shards
``trainer_state.json``                          counters and coefficients
==============================================  ======================================================================
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from transformers.utils import logging

from agentrl.errors import RunFolderError, UserError
from agentrl.learner import distributed
from agentrl.learner.lora import ADAPTER, has_lora, load_adapter, merged_weights, plain_model, save_adapter
from agentrl.learner.optimizer import check_fits
from agentrl.learner.step import Learner

T = TypeVar("T")

STATE, LEARNER, SHARDS = "trainer_state.json", "learner.pt", "learner"


def load_policy(folder: str | Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A model and its tokenizer, as saved by ``save_pretrained``.

    Args:
        folder: a Hugging Face folder.
        device: torch device; ``"auto"`` is cuda where there is one, else cpu.
        dtype: of the weights, ``"float32"`` or ``"bfloat16"``; ``"auto"`` is what they were saved in.

    Raises:
        UserError: not such a folder, or its tokenizer has entries that the model has no rows for.
    """
    from transformers import AutoModelForCausalLM

    logging.disable_progress_bar()  # a bar per file would break ours
    tokenizer = load_tokenizer(folder)
    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = AutoModelForCausalLM.from_pretrained(Path(folder), dtype=dtype).to(where)
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
    """Write policy, adapters, moments and ``state`` into ``folder``; the policy loads with ``from_pretrained``.

    The policy is whole and plain, adapters merged in. What only training needs is one file, or, of many processes, a
    folder to which each adds its shards; either can be read by any number of processes. All have to call it.

    Args:
        folder: exists, and is the same for all processes.
        learner: this process's.
        tokenizer: goes beside the policy.
        state: of the training loop, as JSON has it.
    """
    model = learner.model
    write_policy(model, folder)
    if has_lora(model):
        save_adapter(model, folder / ADAPTER)
    if distributed.world_size() == 1:
        torch.save(_tensors(learner), folder / LEARNER)
    else:
        save_shards(_tensors(learner), checkpoint_id=folder / SHARDS, process_group=distributed.control())
    if distributed.rank() == 0:
        tokenizer.save_pretrained(folder)
        (folder / STATE).write_text(json.dumps(state | {"learner": learner.state()}))


def write_policy(model: Any, folder: Path) -> None:
    """Write the policy as an ordinary Hugging Face folder, whatever adapters and shards it is in; all have to call it.

    Args:
        model: of a learner.
        folder: process 0 writes it.
    """
    logging.disable_progress_bar()  # a bar per file would break ours
    # Gathered weights of a large model would not fit beside its shards, so they leave the GPU one by one.
    weights = merged_weights(model, None if distributed.world_size() == 1 else "cpu")
    if distributed.rank() == 0:
        plain = plain_model(model)
        kept = plain.state_dict().keys()
        buffers = {name: buffer for name, buffer in plain.named_buffers() if name in kept}
        plain.save_pretrained(folder, state_dict=weights | buffers)


def load_state(folder: Path, learner: Learner) -> dict[str, Any]:
    """Put moments, masters, adapters and critic back and return what was saved as ``state``; all have to call it.

    The policy's own weights are loaded with ``load_policy``, before the learner is made: from ``folder``, or, where
    adapters are trained, from the policy that they were put into.

    Raises:
        RunFolderError: the state does not fit the model, cannot be read, or there is none.
    """
    state: dict[str, Any] = _read(folder / STATE, lambda path: json.loads(path.read_text()))
    if has_lora(learner.model):
        load_adapter(learner.model, folder / ADAPTER)
    own = _tensors(learner)
    if (folder / SHARDS).is_dir():
        saved: Mapping[str, Tensor] = _load_shards(folder / SHARDS, own)
    elif (folder / LEARNER).is_file():
        saved = _read(folder / LEARNER, partial(torch.load, weights_only=True, map_location="cpu", mmap=True))
        check_fits(_shapes(own), _shapes(saved))
    else:
        raise RunFolderError(f"{folder}: expected {LEARNER} or {SHARDS}/ beside {STATE}, found neither.")
    with torch.no_grad():
        for name, weight in _part(own, "critic").items():
            weight.copy_(distributed.laid_out_as(weight, saved[f"critic:{name}"]))
    learner.optimizer.load_state_dict(_part(saved, "optimizer"))
    learner.load_state(state.pop("learner"))
    return state


def _read(path: Path, read: Callable[[Path], T]) -> T:
    try:
        return read(path)
    except Exception as error:  # torch.load raises whatever its archives and pickles do
        raise RunFolderError(
            f"{path}: expected the state of a learner, but it cannot be read: {error}. The file is damaged or cut "
            "short: resume from an earlier checkpoint."
        ) from error


def _tensors(learner: Learner) -> dict[str, Tensor]:
    """What only training needs, live, by name."""
    critic = {} if learner.critic is None else dict(learner.critic.named_parameters())
    return {f"critic:{name}": parameter.detach() for name, parameter in critic.items()} | {
        f"optimizer:{name}": tensor for name, tensor in learner.optimizer.state_dict().items()
    }


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.partition(":")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{part}:")}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _load_shards(folder: Path, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Read into the live tensors ``own``, whatever number of processes wrote the shards; returns them."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    check_fits(_shapes(own), {name: e.size for name, e in saved.items() if isinstance(e, TensorStorageMetadata)})
    alone = distributed.world_size() == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant, alone
        load_shards(own, checkpoint_id=folder, no_dist=alone, process_group=None if alone else distributed.control())
    return own
