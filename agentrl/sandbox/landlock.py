"""Landlock, a second wall where the kernel has it (Linux 5.19; see landlock(7)).

It says some of what the other walls say once more, by another mechanism: nothing is executed, no device, socket or
pipe gets a name, there is no TCP, and no signal and no abstract socket reaches anybody outside. What may be written is
left to the mounts: a rule about /work would not hold for the folder that a fork mounts there, as rules are tied to
what was there when they were made.

Runs inside the zygote, so it imports nothing but the standard library and its neighbours.
"""

from __future__ import annotations

import os
import struct

from agentrl.sandbox import kernel

_EXECUTE, _MAKE_CHAR, _MAKE_SOCKET, _MAKE_PIPE, _MAKE_BLOCK, _REFER = (1 << bit for bit in (0, 6, 9, 10, 11, 13))
_TCP = 0b11
_SCOPES = 0b11
_WITH_REFER, _WITH_NETWORK, _WITH_SCOPES = 2, 4, 6


def version() -> int:
    """The version of the kernel's interface; 0 where there is none."""
    try:
        return kernel.landlock_version()
    except OSError:
        return 0


def ruleset() -> int:
    """The rules as a descriptor for ``kernel.landlock_restrict``; -1 where the kernel has none, or too old ones."""
    latest = version()
    if latest < _WITH_REFER:  # it would forbid to move files between folders, and could not be told otherwise
        return -1
    files = _EXECUTE | _MAKE_CHAR | _MAKE_SOCKET | _MAKE_PIPE | _MAKE_BLOCK | _REFER
    words = [files, *([_TCP] if latest >= _WITH_NETWORK else []), *([_SCOPES] if latest >= _WITH_SCOPES else [])]
    rules = kernel.landlock_create(struct.pack(f"={len(words)}Q", *words))
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        kernel.landlock_add(rules, struct.pack("=Qi", _REFER, root))
    finally:
        os.close(root)
    return rules
