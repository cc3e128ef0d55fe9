"""The frames between a manager and a session: a JSON object and raw bytes, both with their length in front.

Used on both sides of the wall, so it imports nothing but the standard library. Nothing here is ever unpickled, and a
reader says beforehand how much it is willing to take.
"""

from __future__ import annotations

import json
import struct
from typing import Any

HEADER = struct.Struct("!II")
HEAD_BYTES = 256 * 1024
"""Longest JSON part of a frame."""


MEMORY, ANCESTOR = "memory", "a session that it was forked from"
"""Reasons of the zygote's for a session's end, where it knows better than the exit code."""


_dumps = json.JSONEncoder(check_circular=False).encode  # nothing here is circular, and looking takes its time
_loads = json.JSONDecoder().decode


class ProtocolError(Exception):
    """The other side sent something that is not a frame."""


def encode(head: dict[str, Any], body: bytes = b"") -> bytes:
    """One frame: the two lengths, the JSON object, the raw bytes."""
    text = _dumps(head).encode()
    return HEADER.pack(len(text), len(body)) + text + body


def frame_length(header: bytes | bytearray, max_body: int) -> tuple[int, int]:
    """Lengths of the JSON object and of the raw bytes, from the first ``HEADER.size`` bytes of a frame.

    Raises:
        ProtocolError: one of them is above its cap.
    """
    head, body = HEADER.unpack_from(header)
    if head > HEAD_BYTES or body > max_body:
        raise ProtocolError(f"a frame of {head} + {body} bytes; the caps are {HEAD_BYTES} + {max_body}")
    return head, body


def decode_head(text: bytes) -> dict[str, Any]:
    """The JSON object of a frame.

    Raises:
        ProtocolError: it is not one.
    """
    try:
        head = _loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"a frame that is not JSON: {error}") from error
    if not isinstance(head, dict):
        raise ProtocolError(f"a frame that holds a {type(head).__name__} instead of an object")
    return head
