"""Weights on their way to a sampler: what belongs to a policy, whether it is all there, and files to carry it in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from agentrl.errors import SamplerError

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every parameter of a policy, by the names of transformers."""

ADAPTER_CONFIG = "adapter_config.json"


def check_weights(source: Mapping[str, Any], expected: Shapes) -> None:
    """Refuse weights of another policy before any of them is loaded.

    Args:
        source: name -> tensor, or shape.
        expected: what the policy consists of.

    Raises:
        SamplerError: a parameter is missing, unknown, of another shape or no tensor.
    """
    if expected.keys() != source.keys():
        missing, unknown = sorted(expected.keys() - source.keys()), sorted(source.keys() - expected.keys())
        raise SamplerError(f"the weights do not fit: missing {missing[:3]}, unknown {unknown[:3]}.")
    for name, shape in expected.items():
        value = source[name]
        found = tuple(value.shape) if isinstance(value, Tensor) else value
        if found != shape:
            came = found if isinstance(found, tuple) else type(found).__name__
            raise SamplerError(f"{name}: expected a tensor of shape {shape}, got {came}.")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder.

    Raises:
        SamplerError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SamplerError(f"{folder} holds no weights: expected *.safetensors there, as save_pretrained writes them.")
    return files


def file_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """The shapes in ``files``, from their headers.

    Raises:
        SamplerError: a file that cannot be read.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    return shapes


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a Hugging Face folder.

    Raises:
        SamplerError: there are none, or a file cannot be read.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            weights |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    return weights


def write_weights(source: Mapping[str, Tensor], path: Path) -> None:
    """Write ``source`` to ``path``, where it appears when it is complete.

    Raises:
        SamplerError: no room for it.
    """
    part = path.with_suffix(".part")
    try:
        save_file({name: value.detach().contiguous().cpu() for name, value in source.items()}, part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        size = sum(value.numel() * value.element_size() for value in source.values()) / 2**20
        raise SamplerError(
            f"cannot write {size:.0f} MiB of weights to {path.parent}: {error}. Expected room for twice that there; "
            "name another folder with sampler.weights_dir."
        ) from error


def _unreadable(path: Path, error: Exception) -> SamplerError:
    return SamplerError(f"{path} is not a whole safetensors file: {error}")
