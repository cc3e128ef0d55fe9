"""Writes ``corpus.jsonl``: 48 invented towns. Run ``python envs/gazetteer/make_corpus.py`` to write it again.

The gazetteer has many editions: the same towns, other facts. Edition 0 is bundled and is what tests are asked about;
the editions to train on are computed when they are needed. So no fact of a test can be known by heart.

The wording is short and fixed, names are one capitalised word and numbers have two digits, so that a policy of under a
million parameters can learn to read it within minutes.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TOWNS = 48
SEED = 1
PATH = Path(__file__).with_name("corpus.jsonl")

_ONSETS = (*"bdfghklmnprstvz", "br", "dr", "gr", "kr", "st", "tr")
_VOWELS = (*"aeiou",)
_MIDDLES = (*"lmnrst", "nd", "rk", "st", "th")
_ENDINGS = ("a", "en", "o", "ia", "ek", "um")


def make_names(rng: random.Random, count: int) -> list[str]:
    """Pronounceable names, none of them the beginning of another."""
    names: list[str] = []
    while len(names) < count:
        parts = (rng.choice(_ONSETS), rng.choice(_VOWELS), rng.choice(_MIDDLES), rng.choice(_ENDINGS))
        name = "".join(parts).capitalize()
        if not any(name.startswith(other) or other.startswith(name) for other in names):
            names.append(name)
    return names


def make_corpus(edition: int = 0) -> list[dict[str, Any]]:
    """One record a town: ``id``, ``title``, ``text`` and the facts in it (people in thousands, metres)."""
    names, count = make_names(random.Random(SEED), TOWNS), TOWNS
    rng = random.Random(f"edition {edition}")
    facts = {name: (rng.randrange(10, 100), rng.randrange(10, 100)) for name in names}
    ring = rng.sample(names, count)
    twins = {name: ring[(place + 1) % count] for place, name in enumerate(ring)}
    records = []
    for number, name in enumerate(names):
        people, high = facts[name]
        text = f"{name}: {people} thousand people, {high} m high, twin town {twins[name]}."
        columns = {"people": people, "high": high, "twin": twins[name]}
        records.append({"id": f"town-{number:02}", "title": name, "text": text, **columns})
    return records


if __name__ == "__main__":
    PATH.write_text("".join(json.dumps(record) + "\n" for record in make_corpus()), encoding="utf-8")
