"""Generated problems: kinds of functions with numbers and letters to fill in, from one-liners to recursion.

Every kind is three texts with the same gaps. The source is both the expert's answer and, run here on each input, where
expected values come from, so that the two cannot disagree.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from string import Template, ascii_lowercase
from typing import Any

from agentrl.data import held_out
from agentrl.errors import UserError
from agentrl.types import Task

from .inside import to_json
from .rows import make_task

TEST_FRACTION = 0.2
EXAMPLES, HIDDEN = 2, 8
MOST_ALIKE = 2
"""Tests of a task that may expect the same value: else a constant would earn a good part of the reward."""

_ATTEMPTS = 5000
_SIGNS = "<>()[]*+-=/#"

Params = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of problems.

    Attributes:
        name: of the kind and of the function.
        level: 1 (one expression) to 4 (recursion and the like).
        signature: parameters and result.
        text: what the function does; ``$a`` is the value of the gap ``a``.
        source: the function.
        gaps: the values that each gap can take.
        draw: arguments for given gaps.
    """

    name: str
    level: int
    signature: str
    text: str
    source: str
    gaps: Mapping[str, Any]
    draw: Callable[[random.Random, Params], tuple[Any, ...]]

    def params(self) -> Iterator[dict[str, Any]]:
        """Every way of filling the gaps."""
        for values in product(*self.gaps.values()):
            yield dict(zip(self.gaps, values, strict=True))

    def write(self, params: Params) -> str:
        """The source with its gaps filled."""
        return Template(self.source).substitute(params)

    def task(self, params: Params) -> Task:
        """The task with these gaps; equal gaps give equal tasks."""
        identifier = "-".join((self.name, *map(str, params.values())))
        source = self.write(params)
        cases = self._cases(random.Random(identifier), params, source)
        middle = sorted(cases, key=lambda case: len(json.dumps(case)))[HIDDEN // 2 :][:EXAMPLES]
        row = {
            "function": self.name,
            "examples": middle,  # neither empty nor long
            "tests": [case for case in cases if case not in middle],
            "solution": source,
            "kind": self.name,
            "level": self.level,
        }
        text = f"Write this Python function.\ndef {self.name}{self.signature}\n{Template(self.text).substitute(params)}"
        return make_task(f"unit_tests: {identifier}", text, row, identifier)

    def _cases(self, rng: random.Random, params: Params, source: str) -> list[list[Any]]:
        """Different inputs, whose results are different enough, with these results."""
        defined: dict[str, Any] = {}
        exec(source, defined)
        cases: dict[str, list[Any]] = {}
        seen: Counter[str] = Counter()
        for _ in range(_ATTEMPTS):
            arguments = self.draw(rng, params)
            given, expected = [to_json(a) for a in arguments], to_json(defined[self.name](*arguments))
            key, result = json.dumps(given), json.dumps(expected)
            if key not in cases and seen[result] < MOST_ALIKE:
                cases[key] = [given, expected]
                seen[result] += 1
            if len(cases) == EXAMPLES + HIDDEN:
                return list(cases.values())
        raise UserError(f"unit_tests: {source!r} gives too few different results; widen what is drawn for it.")


def _integers(rng: random.Random, low: int, high: int, most: int) -> list[int]:
    return [rng.randrange(low, high) for _ in range(rng.randrange(most + 1))]


def _word(rng: random.Random, most: int, letters: str = ascii_lowercase) -> str:
    return "".join(rng.choices(letters, k=rng.randrange(most + 1)))


def _words(rng: random.Random, count: int, most: int) -> list[str]:
    return [_word(rng, most) for _ in range(rng.randrange(count + 1))]


def _nested(rng: random.Random, depth: int) -> list[Any]:
    size = rng.randrange(4)
    return [_nested(rng, depth - 1) if depth and rng.random() < 0.4 else rng.randrange(20) for _ in range(size)]


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "affine",
            1,
            "(x: int) -> int",
            "Return x times $a, plus $b.",
            "def affine(x):\n    return x * $a + $b",
            {"a": range(2, 10), "b": range(1, 21)},
            lambda rng, p: (rng.randrange(-50, 51),),
        ),
        Kind(
            "clamp",
            1,
            "(x: int) -> int",
            "Return x, but at least $low and at most $high.",
            "def clamp(x):\n    return max($low, min(x, $high))",
            {"low": range(10), "high": range(20, 40)},
            lambda rng, p: (rng.randrange(p["low"] - 9, p["high"] + 10),),
        ),
        Kind(
            "surround",
            1,
            "(text: str) -> str",
            "Return text between $left and $right.",
            'def surround(text):\n    return "$left" + text + "$right"',
            {"left": _SIGNS, "right": _SIGNS},
            lambda rng, p: (_word(rng, 6),),
        ),
        Kind(
            "scale",
            1,
            "(items: list[int]) -> list[int]",
            "Return a list of each item times $a, less $b.",
            "def scale(items):\n    return [i * $a - $b for i in items]",
            {"a": range(2, 10), "b": range(1, 21)},
            lambda rng, p: (_integers(rng, -20, 21, 5),),
        ),
        Kind(
            "count",
            2,
            "(text: str) -> int",
            "Return how often the letter $c is in text, times $a.",
            'def count(text):\n    return text.count("$c") * $a',
            {"c": ascii_lowercase, "a": range(2, 8)},
            lambda rng, p: (_word(rng, 20, p["c"] * 3 + "aeinst"),),
        ),
        Kind(
            "keep",
            2,
            "(items: list[int]) -> list[int]",
            "Return the items above $low that can be divided by $a, in their order.",
            "def keep(items):\n    return [i for i in items if i > $low and i % $a == 0]",
            {"low": range(30), "a": range(2, 6)},
            lambda rng, p: (_integers(rng, 0, 61, 12),),
        ),
        Kind(
            "every",
            2,
            "(text: str) -> str",
            "Return the characters of text at $start, $start + $step, $start + 2 * $step and so on, counted from 0.",
            "def every(text):\n    return text[$start::$step]",
            {"start": range(10), "step": range(2, 8)},
            lambda rng, p: (_word(rng, 30),),
        ),
        Kind(
            "rotate",
            2,
            "(items: list[int]) -> list[int]",
            "Move the first $a items to the end, then return the first $b items of that.",
            "def rotate(items):\n    return (items[$a:] + items[:$a])[:$b]",
            {"a": range(1, 8), "b": range(2, 9)},
            lambda rng, p: (_integers(rng, 0, 30, 12),),
        ),
        Kind(
            "average",
            2,
            "(items: list[int]) -> float",
            "Return the mean of the items that are at least $low; 0.0 where there is none.",
            "def average(items):\n    kept = [i for i in items if i >= $low]\n"
            "    return sum(kept) / len(kept) if kept else 0.0",
            {"low": range(60)},
            lambda rng, p: (_integers(rng, 0, 100, 8),),
        ),
        Kind(
            "shift",
            3,
            "(text: str) -> str",
            "Shift each lowercase letter of text $a places on in the alphabet, z being followed by a. Leave the rest.",
            "def shift(text):\n"
            '    return "".join(chr((ord(c) - 97 + $a) % 26 + 97) if "a" <= c <= "z" else c for c in text)',
            {"a": range(1, 26)},
            lambda rng, p: (_word(rng, 12, ascii_lowercase + " .A"),),
        ),
        Kind(
            "tally",
            3,
            "(text: str) -> dict[str, int]",
            "Return how often each character occurs in text, of those that occur at least $a times and are not $c.",
            "def tally(text):\n    counts = {}\n    for c in text:\n        counts[c] = counts.get(c, 0) + 1\n"
            '    return {c: n for c, n in counts.items() if n >= $a and c != "$c"}',
            {"a": range(1, 4), "c": ascii_lowercase},
            lambda rng, p: (_word(rng, 14, "aeost" + p["c"]),),
        ),
        Kind(
            "group",
            3,
            "(words: list[str]) -> dict[int, list[str]]",
            "Group the words of at least $a letters by their length: the lengths with their words, each cut to $b.",
            "def group(words):\n    groups = {}\n    for word in words:\n        if len(word) >= $a:\n"
            "            groups.setdefault(len(word), []).append(word[:$b])\n    return groups",
            {"a": range(1, 6), "b": range(1, 9)},
            lambda rng, p: (_words(rng, 6, 9),),
        ),
        Kind(
            "span",
            3,
            "(items: list[int]) -> tuple[int, int] | None",
            "Return the smallest and the largest of the items above $low; None where there is none.",
            "def span(items):\n    kept = [i for i in items if i > $low]\n"
            "    return (min(kept), max(kept)) if kept else None",
            {"low": range(-20, 40)},
            lambda rng, p: (_integers(rng, -40, 100, 7),),
        ),
        Kind(
            "common",
            3,
            "(left: list[int], right: list[int]) -> set[int]",
            "Return the set of the numbers above $low that are in both lists, each times $a.",
            "def common(left, right):\n    return {i * $a for i in left if i in right and i > $low}",
            {"low": range(10), "a": range(2, 9)},
            lambda rng, p: (_integers(rng, 0, 20, 12), _integers(rng, 0, 20, 12)),
        ),
        Kind(
            "turn",
            3,
            "(rows: list[list[int]]) -> list[list[int]]",
            "Turn the matrix clockwise by a quarter and add $a to each number.",
            "def turn(rows):\n    return [[i + $a for i in column] for column in zip(*rows[::-1])]",
            {"a": range(1, 41)},
            lambda rng, p: _matrix(rng),
        ),
        Kind(
            "series",
            4,
            "(n: int) -> int",
            "s(0) is $a, s(1) is $b, each next one is $p times the last plus $q times the one before. Return s(n).",
            "def series(n):\n    a, b = $a, $b\n"
            "    for _ in range(n):\n        a, b = b, $p * b + $q * a\n    return a",
            {"a": range(4), "b": range(1, 5), "p": range(1, 4), "q": range(1, 4)},
            lambda rng, p: (rng.randrange(120),),
        ),
        Kind(
            "nested",
            4,
            "(items: list) -> int",
            "Add up the numbers in a list of numbers and such lists. Each counts plus $b, and $a times as much with "
            "every list around it but the outermost.",
            "def nested(items):\n    return sum($a * nested(i) if isinstance(i, list) else i + $b for i in items)",
            {"a": range(2, 8), "b": range(1, 11)},
            lambda rng, p: (_nested(rng, 3),),
        ),
        Kind(
            "digits",
            4,
            "(n: int) -> list[int]",
            "Return the digits of n, which is not negative, in base $base, the highest first.",
            "def digits(n):\n    return [*digits(n // $base), n % $base] if n >= $base else [n]",
            {"base": [*range(2, 10), *range(11, 60)]},
            lambda rng, p: (rng.randrange(p["base"] ** rng.randrange(1, 8)),),
        ),
        Kind(
            "ways",
            4,
            "(n: int) -> int",
            "Return in how many ways n is a sum of numbers that are each $a, $b or $c; another order is another way.",
            "def ways(n):\n    found = [1]\n    for i in range(1, n + 1):\n"
            "        found.append(sum(found[i - k] for k in ($a, $b, $c) if k <= i))\n    return found[n]",
            {"a": (1, 2, 3), "b": (4, 5, 6, 7), "c": (8, 9, 10, 11)},
            lambda rng, p: (rng.randrange(90),),
        ),
    )
}


def _matrix(rng: random.Random) -> tuple[list[list[int]]]:
    height, width = rng.randrange(1, 4), rng.randrange(1, 4)
    return ([[rng.randrange(50) for _ in range(width)] for _ in range(height)],)


@lru_cache(maxsize=16)
def generate(kinds: tuple[str, ...], test: bool, count: int) -> tuple[Task, ...]:
    """The kinds in turn as long as each lasts, in a fixed random order, at most ``count`` tasks.

    Which split a problem belongs to hangs on its kind and its gaps alone.
    """
    pools = []
    for name in kinds:
        kind = KINDS[name]
        pool = [p for p in kind.params() if held_out(f"{name} {sorted(p.items())}", TEST_FRACTION) is test]
        random.Random(f"unit_tests {name}").shuffle(pool)
        pools.append((kind, pool))
    longest = max(len(pool) for _, pool in pools)
    turns = [(kind, pool[place]) for place in range(longest) for kind, pool in pools if place < len(pool)]
    return tuple(kind.task(params) for kind, params in turns[:count])


def guess(name: str, rng: random.Random) -> str:
    """A function of the right form with gaps filled from nowhere."""
    kind = KINDS[name]
    return kind.write({gap: rng.choice(values) for gap, values in kind.gaps.items()})
