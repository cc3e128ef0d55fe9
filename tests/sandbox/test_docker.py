"""The docker backend on a real engine; `make test-docker` brings one. What needs none is in test_container.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from agentrl.errors import ConfigError, SandboxError, SessionClosed, UnknownName, UserError
from agentrl.sandbox import ExecStatus, Limits, Profile
from agentrl.sandbox.docker import OVERHEAD_BYTES, DockerSandbox
from agentrl.sandbox.engine import OWNER_LABEL, Engine, Specification, seccomp_profile
from agentrl.sandbox.profile import folder

pytestmark = pytest.mark.docker

IMAGE = "agentrl-sandbox-python"
SECCOMP = seccomp_profile((folder("python") / "seccomp.json").read_text())
MIB = 1024 * 1024
LOST = (ExecStatus.MEMORY, ExecStatus.KILLED)
"""How a cell ends that the kernel killed; the zygote suspects a parent that was being forked a moment ago."""
DOCKERD = Path(__file__).parents[2] / "sandboxes" / "dockerd.sh"


@pytest.fixture
def engine():
    made = Engine()
    yield made
    made.close()


@pytest.fixture
def containers(engine):
    """Lists the containers of one manager, this process by default; in the end none may be left."""

    def find(manager: int = os.getpid()):
        return engine._api.containers(all=True, filters={"label": f"{OWNER_LABEL}={manager}"})

    yield find
    assert not find()


@pytest.fixture
async def sandbox(containers):
    async with DockerSandbox() as made:
        yield made


async def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        await asyncio.sleep(0.02)


# --- one container per tree


async def test_a_tree_lives_in_one_container_and_takes_it_with_it(sandbox, containers):
    root = await sandbox.open(seed=3)
    await root.exec("x = [1]\nopen('f', 'w').write('root')")
    left, right = await root.fork(), await root.fork(rng="derive", branch=7)
    deeper = await left.fork()
    assert len(containers()) == 1
    await deeper.exec("x.append(2)")
    assert (await deeper.exec("x, open('f').read()")).output == "([1, 2], 'root')\n"
    assert (await right.exec("x")).output == "[1]\n"
    assert (right.rng, root.rng, root.seed) == ("derive", "seeded", 3)
    for session in (root, left, deeper):
        await session.close()
        await session.close()
    assert len(containers()) == 1
    assert (await right.exec("x")).output == "[1]\n"
    await right.close()
    assert not containers()


async def test_eight_trees_at_the_same_time(sandbox, containers):
    async def tree(number):
        root = await sandbox.open(seed=number)
        await root.exec(f"x = {number}")
        forks = [await root.fork() for _ in range(3)]
        return [(await fork.exec("x + 10")).output for fork in forks]

    assert await asyncio.gather(*map(tree, range(8))) == [[f"{number + 10}\n"] * 3 for number in range(8)]
    assert len(containers()) == 8
    await sandbox.close()
    assert not containers()


async def test_calls_take_milliseconds(sandbox):
    session = await sandbox.open()

    async def median(call, number):
        seconds = []
        for _ in range(number):
            began = time.perf_counter()
            await call()
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    assert await median(lambda: session.exec("1 + 1"), 100) < 0.02  # a `docker exec` takes 100 ms
    forks = []

    async def fork():
        forks.append(await session.fork())

    assert await median(fork, 10) < 0.1


async def test_closing_the_sandbox_ends_everything(containers):
    sandbox = DockerSandbox()
    sessions = [await sandbox.open() for _ in range(2)]
    running = asyncio.create_task(sessions[0].exec("import time; time.sleep(60)", 60.0))
    await asyncio.sleep(0.1)
    await sandbox.close()
    await sandbox.close()
    with pytest.raises(SandboxError, match="closed meanwhile"):
        await running
    assert not containers()
    with pytest.raises(SandboxError, match="closed"):
        await sessions[1].exec("1")
    with pytest.raises(SandboxError, match="make another one"):
        await sandbox.open()


async def test_no_descriptor_and_no_thread_is_left(containers):
    def open_ones():
        return len(os.listdir("/proc/self/fd"))

    async with DockerSandbox() as first:
        await first.open()
    before = open_ones()
    for _ in range(3):
        async with DockerSandbox() as sandbox:
            session = await sandbox.open()
            await session.fork()
    await until(lambda: open_ones() <= before)
    await until(lambda: not any("agentrl-docker" in thread.name for thread in threading.enumerate()))


@pytest.mark.parametrize("after", [0.0, 0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
async def test_a_cancelled_open_leaves_no_container(containers, after):
    sandbox = DockerSandbox()
    await (await sandbox.open()).close()
    tasks = [asyncio.create_task(sandbox.open()) for _ in range(2)]
    await asyncio.sleep(after)
    for task in tasks:
        task.cancel()
    opened = await asyncio.gather(*tasks, return_exceptions=True)
    for session in opened:
        if not isinstance(session, BaseException):
            await session.close()
    await until(lambda: not containers())
    await sandbox.close()


@pytest.mark.parametrize("after", [0.0, 0.005, 0.02])
async def test_a_cancelled_first_open_leaves_no_connection(containers, after):
    async with DockerSandbox() as first:
        await first.open()
    before = len(os.listdir("/proc/self/fd"))
    async with DockerSandbox() as sandbox:
        task = asyncio.create_task(sandbox.open())
        await asyncio.sleep(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await (await sandbox.open()).exec("1")).output == "1\n"
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_manager_that_is_killed_leaves_no_container(containers):
    program = """
        import asyncio
        from agentrl.sandbox.docker import DockerSandbox

        async def main():
            sandbox = DockerSandbox()
            session = await sandbox.open()
            other = await (await sandbox.open()).fork()
            busy = asyncio.create_task(session.exec("while True: pass", 60.0))
            await asyncio.sleep(0.05)
            print("ready", flush=True)
            await busy

        asyncio.run(main())
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as manager:
        assert manager.stdout.readline() == b"ready\n"
        assert len(containers(manager.pid)) == 2
        manager.send_signal(signal.SIGKILL)
        end = time.monotonic() + 10
        while containers(manager.pid) and time.monotonic() < end:
            time.sleep(0.02)
        assert not containers(manager.pid)


async def test_what_a_killed_manager_created_and_did_not_start_is_removed_later(engine, monkeypatch):
    name = "agentrl-test-unstarted"
    with contextlib.suppress(Exception):
        engine._api.remove_container(name, force=True)
    engine._api.create_container_from_config(engine._configuration(specification()), name)
    engine.remove_unstarted()
    assert engine._api.inspect_container(name)  # somebody may be about to start it
    monkeypatch.setattr("agentrl.sandbox.engine._UNSTARTED_SECONDS", -5.0)
    async with DockerSandbox() as sandbox:
        await sandbox.open()
        assert not engine._api.containers(all=True, filters={"name": name})


# --- failures


async def test_a_container_that_is_killed_is_an_infrastructure_failure(sandbox, engine, containers):
    session = await sandbox.open()
    fork = await session.fork()
    cell = asyncio.create_task(fork.exec("import time; time.sleep(60)", 60.0))
    await asyncio.sleep(0.1)
    engine._api.kill(containers()[0]["Id"])
    with pytest.raises(SandboxError, match=r"container agentrl-\S+ was killed"):
        await cell
    with pytest.raises(SandboxError):
        await fork.exec("1")
    with pytest.raises(SandboxError, match="was killed"):
        await session.get_file("x")
    await fork.close()
    await session.close()
    other = await sandbox.open()
    assert (await other.exec("1")).output == "1\n"


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # docker forgets sockets that do not connect
async def test_an_engine_that_is_stopped_in_mid_call_is_an_infrastructure_failure():
    if os.geteuid() != 0:
        pytest.skip("a second engine needs root")
    script = f"{sys.executable} -m agentrl.sandboxes.python.build >&2 && echo $DOCKER_HOST && cat"
    with subprocess.Popen(  # noqa: ASYNC220
        [DOCKERD, "bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=DOCKERD.parents[1]
    ) as helper:
        url = await asyncio.to_thread(helper.stdout.readline)
        sandbox = DockerSandbox(engine=url.decode().strip())
        try:
            session = await sandbox.open()
            cell = asyncio.create_task(session.exec("import time; time.sleep(60)", 60.0))
            await asyncio.sleep(0.1)
            helper.stdin.close()
            with pytest.raises(SandboxError, match="container"):
                await cell
            await asyncio.to_thread(helper.wait, 30)
            with pytest.raises(SandboxError, match="the Docker engine"):
                await sandbox.open()
        finally:
            with contextlib.suppress(SandboxError):
                await sandbox.close()


async def test_a_missing_image_says_how_to_build_it(containers):
    async with DockerSandbox(image="agentrl-no-such-image") as sandbox:
        with pytest.raises(UserError, match=r"no sandbox image 'agentrl-no-such-image'.*sandboxes\.python\.build"):
            await sandbox.open()


async def test_an_image_of_another_version_is_refused(monkeypatch, containers):
    monkeypatch.setattr("agentrl.sandbox.image.fingerprint", lambda packages: "0" * 16)
    async with DockerSandbox() as sandbox:
        with pytest.raises(UserError, match=r"another version of agentrl.*build it again.*sandboxes\.python\.build"):
            await sandbox.open()


async def test_an_image_for_other_packages_is_refused(containers):
    async with DockerSandbox(Profile("python", packages=("numpy", "rich"), image=IMAGE)) as sandbox:
        with pytest.raises(UserError, match="for other packages"):
            await sandbox.open()


async def test_what_does_not_start_says_what_it_said(engine, monkeypatch, containers):
    monkeypatch.setattr("agentrl.sandbox.inside.encode", lambda profile: "{}")
    async with DockerSandbox() as sandbox:
        with pytest.raises(SandboxError, match=r"ended with exit status 1; it said: Traceback(.|\n)*KeyError"):
            await sandbox.open()
        await until(lambda: not containers())


async def test_bad_arguments(sandbox):
    with pytest.raises(UnknownName, match="python"):
        await sandbox.open("pyhton")
    with pytest.raises(ConfigError, match="has no container image"):
        await sandbox.open(Profile("bare"))
    with pytest.raises(ConfigError, match="integer"):
        await sandbox.open(seed="1")


# --- the container's walls


def specification(memory_bytes: int = 256 * MIB, processes: int = 64) -> Specification:
    return Specification(IMAGE, ("{}",), SECCOMP, memory_bytes, processes)


async def test_the_engine_confirms_the_hardening(engine, containers):
    async with DockerSandbox(memory_bytes=1024 * MIB, processes=200) as sandbox:
        await sandbox.open()
        found = engine._api.inspect_container(containers()[0]["Id"])
        host = found["HostConfig"]
        assert (host["Memory"], host["MemorySwap"], host["PidsLimit"]) == (1024 * MIB, 1024 * MIB, 200)
        assert (host["CapDrop"], host["CapAdd"], host["Privileged"]) == (["ALL"], None, False)
        assert (host["ReadonlyRootfs"], host["NetworkMode"], host["IpcMode"]) == (True, "none", "none")
        assert (host["AutoRemove"], host["Binds"], host["Devices"], host["PidMode"]) == (True, None, None, "")
        assert host["SecurityOpt"][:2] == ["no-new-privileges", f"seccomp={SECCOMP}"]
        assert (found["Config"]["User"], found["Mounts"], host["LogConfig"]["Type"]) == ("65534:65534", [], "none")
        assert found["State"]["OOMKilled"] is False


PROBE = """
import ctypes, errno, json, os, platform, socket
libc = ctypes.CDLL(None, use_errno=True)
def fails(number, *arguments):
    return errno.errorcode[ctypes.get_errno()] if libc.syscall(number, *arguments) < 0 else "allowed"
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
def raises(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "allowed"
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
same = {"io_uring_setup": 425, "clone3": 435}
numbers = {"x86_64": {"bpf": 321, "ptrace": 101, "keyctl": 250, "perf_event_open": 298, "userfaultfd": 323,
    "reboot": 169, "init_module": 175, "open_by_handle_at": 304, "process_vm_readv": 310, "chroot": 161}}
numbers = same | numbers.get(platform.machine(), {})
print(json.dumps({
    "calls": {name: fails(number, 0, 0, 0, 0, 0, 0) for name, number in numbers.items()},
    "user": os.getresuid() + os.getresgid() + tuple(os.getgroups()),
    "status": {name: status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp")},
    "mount": raises(lambda: call(libc.mount(b"x", b"/tmp", b"tmpfs", 0, None))),
    "socket": raises(lambda: socket.socket(socket.AF_INET)),
    "unix": raises(lambda: socket.socket(socket.AF_UNIX)),
    "interfaces": open("/proc/net/dev").read().count(":"),
    "write": {path: raises(lambda: open(path + "/x", "w")) for path in ("/", "/usr", "/etc", "/work", "/dev", "/proc")},
    "sysctl": raises(lambda: open("/proc/sys/kernel/core_pattern", "w")),
    "shm": os.path.exists("/dev/shm"),
    "cgroup": raises(lambda: open("/sys/fs/cgroup/memory/memory.limit_in_bytes", "w")),
}))
"""


def run_inside(engine, code: str, memory_bytes: int = 256 * MIB, processes: int = 64) -> tuple[int, str]:
    """Exit status and output of ``code`` as the first process of a container as hardened as those of sessions."""
    configuration = engine._configuration(specification(memory_bytes, processes))
    configuration |= {"Entrypoint": ["/usr/local/bin/python3", "-I"], "Cmd": ["-c", code], "OpenStdin": False}
    configuration["HostConfig"] |= {"AutoRemove": False, "LogConfig": {"Type": "json-file"}}
    created = engine._api.create_container_from_config(configuration, f"agentrl-test-{os.urandom(4).hex()}")["Id"]
    try:
        engine._api.start(created)
        code = engine._api.wait(created)["StatusCode"]
        return code, engine._api.logs(created).decode()
    finally:
        engine._api.remove_container(created, force=True)


def test_the_walls_hold_from_inside_the_container(engine):
    code, output = run_inside(engine, PROBE)
    assert code == 0, output
    found = json.loads(output)
    assert found["calls"].pop("clone3") == "ENOSYS"
    assert set(found["calls"].values()) == {"EPERM"}
    assert set(found["user"]) == {65534}
    capabilities = {name: value for name, value in found["status"].items() if name.startswith("Cap")}
    assert {int(value, 16) for value in capabilities.values()} == {0}
    assert (found["status"]["NoNewPrivs"], found["status"]["Seccomp"]) == ("1", "2")
    assert (found["socket"], found["unix"], found["mount"]) == ("EPERM", "EPERM", "EPERM")
    assert found["interfaces"] == 1  # the loopback device, down
    assert found["write"].pop("/dev") in ("EACCES", "EROFS")
    assert found["write"].pop("/proc") in ("EACCES", "ENOENT", "EPERM")
    assert set(found["write"].values()) <= {"EROFS", "EACCES"}
    assert found["sysctl"] in ("EROFS", "EACCES")
    assert found["cgroup"] in ("EROFS", "EACCES", "ENOENT")
    assert not found["shm"]


def test_memory_is_capped_for_the_container_as_a_whole(engine):
    code, _ = run_inside(engine, "x = [b'x' * 2**20 for _ in range(400)]", memory_bytes=128 * MIB)
    assert code == 137
    code, _ = run_inside(engine, "x = [b'x' * 2**20 for _ in range(400)]", memory_bytes=1024 * MIB)
    assert code == 0


def test_processes_are_capped_for_the_container_as_a_whole(engine):
    code = """
import os, time
made = 0
try:
    for _ in range(500):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        made += 1
except OSError as error:
    print(made, error.errno)
"""
    exit_status, output = run_inside(engine, code, processes=64)
    assert (exit_status, output) == (0, "63 11\n")


def test_the_engine_says_that_a_container_was_out_of_memory(engine):
    configuration = engine._configuration(specification(memory_bytes=64 * MIB))
    configuration |= {"Entrypoint": ["/usr/local/bin/python3", "-I"], "Cmd": ["-c", "x = b'x' * 10**9"]}
    name = f"agentrl-test-{os.urandom(4).hex()}"
    engine._api.create_container_from_config(configuration, name)
    engine._api.start(name)
    engine._api.wait(name)
    death = engine.death(name)
    assert death.out_of_memory
    assert "memory limit" in death.how
    engine.remove(name)
    engine.remove(name)


async def test_sessions_that_fill_the_container_lose_their_state_but_not_the_container(containers):
    limits = Limits()
    async with DockerSandbox(memory_bytes=limits.memory_bytes + OVERHEAD_BYTES) as sandbox:
        root = await sandbox.open()
        await root.exec("x = 1")
        forks = [await root.fork() for _ in range(4)]
        hog = "y = [b'y' * 2**20 for _ in range(330)]; import time; time.sleep(0.5); len(y)"
        results = await asyncio.gather(*(fork.exec(hog, 20.0) for fork in forks))
        assert {result.status for result in results} <= {ExecStatus.OK, *LOST}, results
        assert any(result.status in LOST for result in results)
        for fork, result in zip(forks, results, strict=True):
            again = await fork.exec("len(y)")
            if result.status is ExecStatus.OK:
                assert again.output == "330\n"
                continue
            assert not result.state_kept
            assert result.status is ExecStatus.KILLED or "was full" in result.error
            assert (again.status, again.state_kept) == (ExecStatus.KILLED, False)
            with pytest.raises(FileNotFoundError, match="lost"):
                await fork.get_file("x")
            with pytest.raises(SessionClosed):
                await fork.fork()
            await fork.close()
        assert len(containers()) == 1
        last = await root.fork()
        assert (await last.exec("x")).output == "1\n"


async def test_a_session_in_a_container_has_the_walls_of_any_session(sandbox):
    session = await sandbox.open()
    code = "import os\nos.getpid(), os.path.exists('/proc/self'), os.path.exists('/etc'), len(os.listdir('/packages'))"
    assert (await session.exec(code)).output == "(1, False, False, 2)\n"
    assert (await session.exec("import agentrl")).error.endswith("ModuleNotFoundError: No module named 'agentrl'")
    assert "PermissionError" in (await session.exec("import socket; socket.socket()")).error
    assert (await session.exec("import numpy; int(numpy.arange(4).sum())")).output == "6\n"
