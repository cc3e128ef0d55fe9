"""What one process samples and another reads: a table in shared memory, a row a request, a cell a token.

vLLM samples in a process of its own, and a logits processor there has no way to send anything along with a token. So it
writes beside it: the token itself, its log-prob, the entropy, and the version of the weights. The engine's message that
a token exists comes after the cell was written, so a reader needs no lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

CELL = np.dtype([("token_id", "i4"), ("version", "i4"), ("logprob", "f4"), ("entropy", "f4")])


class Cells(NamedTuple):
    """Some tokens of a request, in order; all of one length."""

    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    versions: list[int]


class Board:
    """The table.

    Args:
        path: of the file, which ``create`` made; below /dev/shm it stays in memory.
        slots: rows: requests in flight.
        length: cells of a row: most tokens of a completion.
    """

    def __init__(self, path: str, slots: int, length: int) -> None:
        self.path, self.slots, self.length = path, slots, length
        self._cells: Any = np.asarray(np.memmap(path, CELL, "r+", 0, slots * length))

    @classmethod
    def create(cls, path: Path, slots: int, length: int) -> Board:
        """A new one; pages take memory when they are written to."""
        with path.open("xb") as file:
            file.truncate(slots * length * CELL.itemsize)
        return cls(str(path), slots, length)

    @property
    def arguments(self) -> dict[str, Any]:
        """What another process needs to open it."""
        return {"path": self.path, "slots": self.slots, "length": self.length}

    def write(self, cells: Any, version: int, columns: Sequence[Any]) -> None:
        """Write the ``cells`` [B], each ``slot * length + place``; ``columns``: token ids, log-probs and entropies."""
        written = np.empty(len(cells), CELL)
        written["token_id"], written["logprob"], written["entropy"] = columns
        written["version"] = version
        self._cells[cells] = written

    def read(self, slot: int, begin: int, end: int) -> Cells:
        """The cells of a row from ``begin`` up to ``end``."""
        cells = self._cells[slot * self.length + begin : slot * self.length + end]
        return Cells(*(cells[name].tolist() for name in ("token_id", "logprob", "entropy", "version")))
