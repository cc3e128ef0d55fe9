"""The filter, run instruction by instruction as the kernel would: also for the architecture that this is not."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from agentrl.sandbox import seccomp
from agentrl.sandbox.kernel import FORK_FLAGS

ALLOW, KILL, ASK = 0x7FFF_0000, 0x8000_0000, 0x7FC0_0000
DENY, ABSENT, NO_TERMINAL = (0x0005_0000 | code for code in (errno.EPERM, errno.ENOSYS, errno.ENOTTY))
ABI = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}
I386, ARM = 0x4000_0003, 0x4000_0028
MACHINES = sorted(ABI)


def _halves(values):
    return (value >> shift & 0xFFFF_FFFF for value in values for shift in (0, 32))


def verdict(machine: str, number: int, *arguments: int, abi: int | None = None) -> int:
    """What the filter says to a call (classic BPF: load, compare, jump, return)."""
    words = {0: number, 4: ABI[machine] if abi is None else abi}
    words |= {16 + 4 * i: half for i, half in enumerate(_halves((*arguments, 0, 0, 0)))}
    program = seccomp.instructions(machine)
    accumulator = position = 0
    while True:
        code, if_true, if_false, constant = program[position]
        position += 1
        if code == 0x20:
            accumulator = words[constant]
        elif code == 0x06:
            return constant
        else:
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}[
                code
            ]
            position += if_true if holds else if_false


@pytest.mark.parametrize("machine", MACHINES)
def test_exactly_the_listed_calls_are_allowed_whatever_their_arguments(machine):
    allowed = set(seccomp.allowed_numbers(machine).values())
    column = MACHINES[::-1].index(machine)
    checked = {numbers[column] for numbers in seccomp.CHECKED.values()}
    for number in set(range(700)) - checked:
        expected = ALLOW if number in allowed else DENY if number < 424 else ABSENT
        assert verdict(machine, number, 0xFFFF_FFFF, 0xFFFF_FFFF) == expected, number


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_decide(machine):
    column = MACHINES[::-1].index(machine)
    clone, ioctl, prctl, fcntl, socketpair, setrlimit, prlimit, unshare, getsockopt = (
        numbers[column] for numbers in seccomp.CHECKED.values()
    )
    assert verdict(machine, clone, 0x003D_0F00) == ALLOW  # pthread_create
    for flag in (0x2_0000, 0x200_0000, 0x400_0000, 0x800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000):
        assert verdict(machine, clone, 0x11 | flag) == DENY
    assert verdict(machine, ioctl, 1, 0x5401) == ALLOW  # isatty
    assert verdict(machine, ioctl, 1, 0x5412) == NO_TERMINAL  # TIOCSTI
    assert verdict(machine, prctl, 15) == ALLOW  # the name of a thread
    assert [verdict(machine, prctl, option) for option in (1, 4, 8, 22, 38)] == [DENY] * 5
    assert verdict(machine, fcntl, 3, 2) == ALLOW
    assert verdict(machine, fcntl, 3, 1031) == DENY
    assert [verdict(machine, socketpair, family) for family in (1, 2, 16)] == [ALLOW, DENY, DENY]
    assert [verdict(machine, setrlimit, kind) for kind in (4, 6, 7)] == [DENY, DENY, ALLOW]
    assert [verdict(machine, prlimit, 0, kind, 0) for kind in (4, 6, 7)] == [ALLOW] * 3  # reading
    for pointer in (0x1000, 0x7_0000_0000, 0xFFFF_FFFF_0000_0000):
        assert [verdict(machine, prlimit, 0, kind, pointer) for kind in (4, 6, 7)] == [DENY, DENY, ALLOW]
    assert [verdict(machine, clone, flags) for flags in (FORK_FLAGS, FORK_FLAGS | 17)] == [ASK, DENY]
    assert [verdict(machine, getsockopt, 3, 1, option) for option in (3, 39, 77)] == [ALLOW, ALLOW, DENY]
    assert [verdict(machine, unshare, flags) for flags in (0, 0x1000_0000)] == [ASK, DENY]


def test_another_abi_kills():
    assert verdict("x86_64", 0x4000_0000 | 39) == KILL
    assert verdict("x86_64", 0xFFFF_FFFF) == KILL
    assert verdict("x86_64", 1, abi=I386) == KILL
    assert verdict("aarch64", 64, abi=ARM) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_the_filter_is_small(machine):
    program, length = seccomp.assemble(machine)
    assert length < 300
    assert len(program.raw) - 1 == 8 * length


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_the_numbers_are_the_kernels(machine, header):
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"{path} (linux-libc-dev) is not installed")
    text = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text())
    known = {"newfstatat" if name == "fstatat" else name: int(number) for name, number in text}
    column = MACHINES[::-1].index(machine)
    ours = seccomp.allowed_numbers(machine) | {name: numbers[column] for name, numbers in seccomp.CHECKED.items()}
    newer = {"fchmodat2": 452}
    assert {name: known.get(name, newer.get(name)) for name in ours} == ours
