"""Hostile programs by theme: data, which ``test_hostile.py`` plays on every backend.

The ordinary user's interpreter imports this package too (``ordinary_user.py``), so it needs nothing but the standard
library and ``agentrl.sandbox``.
"""

from __future__ import annotations

from . import breaking, files, filling, forking, reaching, reading, staying, syscalls, usurping, writing
from .steps import Program

THEMES: dict[str, list[Program]] = {
    "reading": reading.PROGRAMS,
    "writing": writing.PROGRAMS,
    "reaching": reaching.PROGRAMS,
    "syscalls": syscalls.PROGRAMS,
    "filling": filling.PROGRAMS,
    "staying": staying.PROGRAMS,
    "breaking": breaking.PROGRAMS,
    "forking": forking.PROGRAMS,
    "usurping": usurping.PROGRAMS,
    "files": files.PROGRAMS,
}
PROGRAMS = {f"{theme}: {program.name}": program for theme, programs in THEMES.items() for program in programs}
"""Every program by its full name."""
