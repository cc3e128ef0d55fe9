"""Plays programs as whoever starts it: a name per line in, a list of what went wrong per line out, as JSON.

``test_hostile.py`` starts it as nobody, from a copy of this folder and of agentrl whose ``__init__.py`` is empty: that
user's Python need not have agentrl's dependencies, and the embedded sandbox needs none of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from agentrl.sandbox import LocalSandbox, Profile

from .stage import Stage, shorten_waits


async def main() -> None:
    shorten_waits()
    async with Stage(LocalSandbox(Profile("bare"))) as stage:
        _say({"user": os.getuid()})
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                wrong = await stage.play(json.loads(line))
            except Exception as error:
                wrong = [repr(error)]
            _say(wrong)
        _say(await stage.finish())


def _say(what: object) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
