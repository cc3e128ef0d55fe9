"""The first process of a container of the docker backend: takes sandbox calls from its standard input.

Answers go to standard output, complaints to standard error. Its only argument is the profile, as JSON. It ends with
its input, and the container with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import asdict

from agentrl.sandbox.base import Limits, Profile
from agentrl.sandbox.local import LocalSandbox
from agentrl.sandbox.stream import serve_stream


def encode(profile: Profile) -> str:
    """The argument for ``profile``."""
    return json.dumps(asdict(profile))


def decode(text: str) -> Profile:
    """The profile that ``encode`` wrote."""
    fields = json.loads(text)
    limits, packages, preload = Limits(**fields["limits"]), tuple(fields["packages"]), tuple(fields["preload"])
    return Profile(fields["name"], packages, preload, limits, fields["image"])


def main() -> None:
    """Serve until nobody is left who could ask."""
    answers = os.dup(1)
    os.dup2(2, 1)  # a stray print is a complaint
    asyncio.run(serve_stream(0, answers, LocalSandbox(decode(sys.argv[1]))))


if __name__ == "__main__":
    main()
