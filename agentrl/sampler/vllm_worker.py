"""What runs inside of vLLM's engine process: our way of drawing a token, and the loading of weights.

vLLM computes logits; the token is drawn by ``draw.draw``, the very function of the embedded sampler. So log-probs are
those of the distribution that was sampled from, entropies are exact, random numbers depend on (seed, position) alone,
and the same weights and seeds give the same tokens with either engine. vLLM's own top log-probs would give the entropy
of some of the vocabulary, at many times the cost (measured in docs/performance.md).

The drawn token is handed to vLLM with a logit of infinity, so its own sampler has nothing to decide.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from agentrl.sampler.board import Board
from agentrl.sampler.draw import Manner, draw, streams, uniforms
from agentrl.sampler.vllm_engine import KEY


class _Weights:
    """The version of the weights in this process, which has one engine."""

    version = 0


@dataclass(slots=True)
class _Row:
    """A request in the batch: its tokens, a list that vLLM extends, its row of the board, and how it is sampled."""

    tokens: Sequence[int]
    slot: int
    seed: int
    temperature: float
    top_p: float
    start: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """What stays the same as long as the same requests are in the batch; arrays have an entry for each of ours.

    Attributes:
        rows: ours.
        indices: their rows of the logits.
        contiguous: whether these are the first ones, in order.
        manner: how they are drawn.
        streams: of their random numbers.
        starts: the random number that their first token takes.
        cells: of the board, for their first token.
    """

    rows: list[_Row]
    indices: Tensor
    contiguous: bool
    manner: Manner
    streams: Any
    starts: Any
    cells: Any

    @classmethod
    def of(cls, rows: Mapping[int, _Row], length: int, device: torch.device) -> _Batch:
        """Of the requests by their row of the logits."""
        ours = list(rows.values())
        return cls(
            ours,
            torch.tensor(list(rows), device=device),
            list(rows) == list(range(len(rows))),
            Manner.of([row.temperature for row in ours], [row.top_p for row in ours], device),
            streams([row.seed for row in ours]),
            np.array([row.start for row in ours]),
            np.array([row.slot * length for row in ours]),
        )


class Drawing(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of every request of ours; rows of other clients of the engine are left to vLLM."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        ours = vllm_config.additional_config[KEY]
        self._board = Board(**ours["board"])
        threading.Thread(target=_end_with, args=(ours["owner"],), name="agentrl-owner", daemon=True).start()
        self._device = device
        self._rows: dict[int, _Row] = {}
        self._batch: _Batch | None = None

    def is_argmax_invariant(self) -> bool:
        """False: it decides which token is the likeliest, and wants logits before any temperature."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests through the batch in the order that vLLM prescribes: removed, added, moved."""
        if batch_update is None:
            return
        self._batch = None
        for index in batch_update.removed:
            self._rows.pop(index, None)
        for index, params, _, tokens in batch_update.added:
            self._rows.pop(index, None)
            given = (params.extra_args or {}).get(KEY)
            if given is not None:
                self._rows[index] = _Row(tokens, *given)
        for one, two, direction in batch_update.moved:
            moved, other = self._rows.pop(one, None), self._rows.pop(two, None)
            if moved is not None:
                self._rows[two] = moved
            if other is not None and direction is MoveDirectionality.SWAP:
                self._rows[one] = other

    def apply(self, logits: Tensor) -> Tensor:
        """[B, V] fp32 logits in, and out with infinity for the drawn token."""
        if not self._rows:
            return logits
        if self._batch is None:
            self._batch = _Batch.of(self._rows, self._board.length, self._device)
        batch = self._batch
        ours = logits if batch.contiguous and len(batch.rows) == len(logits) else logits[batch.indices]
        counts = np.array([len(row.tokens) for row in batch.rows])
        drawn = draw(ours, batch.manner, uniforms(batch.streams, batch.starts + counts))
        self._board.write(batch.cells + counts, _Weights.version, [column.cpu().numpy() for column in drawn])
        logits[batch.indices, drawn.token_ids] = float("inf")
        return logits


class Extension:
    """Methods that vLLM's workers gain, called by ``collective_rpc``; they take what JSON can hold."""

    reload_weights: Any
    model_runner: Any

    def agentrl_load(self, files: list[str], version: int) -> int:
        """Load the weights in safetensors ``files`` and count them as ``version``; returns how many tensors came."""
        count = 0
        with ExitStack() as stack:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]

            def weights() -> Any:
                nonlocal count
                for file in opened:
                    for name in file.keys():  # noqa: SIM118 -- no mapping, though it has keys
                        count += 1
                        yield name, file.get_tensor(name)

            self.reload_weights(weights_iterator=weights())
        _pack_tied_heads(self.model_runner.get_model())
        _Weights.version = version
        return count

    def agentrl_version(self, version: int) -> None:
        """Count the weights in use as ``version``."""
        _Weights.version = version


def _end_with(owner: int) -> None:
    """End this process when ``owner`` has ended: after a kill -9 nobody else would, and the GPU would stay full."""
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel without pidfd, or an owner that cannot be seen from here
        return
    select.select([descriptor], [], [])
    os._exit(1)


def _pack_tied_heads(model: torch.nn.Module) -> None:
    """Pack the output layers anew: on the CPU vLLM computes with a copy, and a reload forgets that of a tied one."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)
