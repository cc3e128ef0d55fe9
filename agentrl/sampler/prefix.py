"""Which slot already holds the beginning of a prompt.

Prompts are hashed in blocks; a block's hash covers everything before it. The index only proposes: the caller's tokens
are compared with the slot's before anything is reused, so a hash collision costs time and never correctness.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

BLOCK = 8
"""Tokens per block; at most this many tokens of a possible reuse are missed."""


class PrefixIndex:
    """Block hash -> slots whose tokens begin with those blocks."""

    def __init__(self) -> None:
        self._slots: dict[int, set[int]] = {}
        self._blocks: dict[int, list[int]] = {}
        self._tokens: dict[int, list[int]] = {}

    def put(self, slot: int, tokens: Sequence[int]) -> None:
        """``slot`` now holds (or, within this step, will hold) ``tokens``."""
        known = self._blocks.setdefault(slot, [])
        self._tokens[slot] = list(tokens)
        for i, key in enumerate(_hashes(tokens)):
            if i >= len(known):
                known.append(key)
                self._slots.setdefault(key, set()).add(slot)

    def drop(self, slot: int) -> None:
        """Forget ``slot``."""
        self._tokens.pop(slot, None)
        for key in self._blocks.pop(slot, ()):
            self._slots[key].discard(slot)
            if not self._slots[key]:
                del self._slots[key]

    def clear(self) -> None:
        """Forget everything: the weights have changed."""
        self._slots.clear()
        self._blocks.clear()
        self._tokens.clear()

    def find(self, tokens: Sequence[int]) -> list[tuple[int, int]]:
        """(slot, shared tokens) of the slots that share the most blocks with ``tokens``, longest first."""
        best: set[int] = set()
        for key in _hashes(tokens):
            if key not in self._slots:
                break
            best = self._slots[key]
        shared = [(slot, _common(self._tokens[slot], tokens)) for slot in best]
        return sorted(shared, key=lambda pair: (-pair[1], pair[0]))


def _hashes(tokens: Sequence[int]) -> Iterator[int]:
    key = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        key = hash((key, *tokens[end - BLOCK : end]))
        yield key


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    limit = min(len(a), len(b))
    if list(a[:limit]) == list(b[:limit]):
        return limit
    return next(i for i in range(limit) if a[i] != b[i])
