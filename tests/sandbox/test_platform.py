"""What happens on machines that are not like this one."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


@pytest.mark.parametrize(
    ("kind", "name"), [("net", "network namespace"), ("pid", "PID namespace"), ("user", "user namespace")]
)
def test_a_machine_that_does_not_give_a_namespace_is_refused(kind, name):
    program = f"""
        import asyncio, os
        from agentrl.errors import IsolationUnavailable
        from agentrl.sandbox import LocalSandbox, Profile, kernel

        user, group = os.geteuid(), os.getegid()
        kernel.unshare(kernel.CLONE_NEWUSER)
        for file, text in (("setgroups", "deny"), ("uid_map", f"0 {{user}} 1"), ("gid_map", f"0 {{group}} 1")):
            with open(f"/proc/self/{{file}}", "w") as table:
                table.write(text)
        with open("/proc/sys/user/max_{kind}_namespaces", "w") as limit:
            limit.write("0")

        async def main():
            try:
                await LocalSandbox(Profile("bare")).open()
            except IsolationUnavailable as error:
                print(error.missing)

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"{name} (No space left on device)" in done.stdout, done.stderr


def test_importing_it_loads_nothing_that_other_systems_lack():
    code = (
        "import sys, agentrl.sandbox\n"
        "inside = {'kernel', 'jail', 'zygote', 'runner', 'interpreter', 'seccomp', 'audit'}\n"
        "print([name for name in inside if f'agentrl.sandbox.{name}' in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
