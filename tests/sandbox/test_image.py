"""What is in a container image, and what its seccomp profile lets through."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import tarfile

import pytest

from agentrl.errors import ConfigError
from agentrl.sandbox import image, kernel, profile, seccomp

build = importlib.import_module("agentrl.sandboxes.python.build")
RULES = json.loads((profile.folder("python") / "seccomp.json").read_text())
ALLOWED = {name for rule in RULES["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}


def test_an_image_holds_what_a_session_needs_of_this_library_and_no_more():
    files = image.library()
    names = {name.removeprefix("agentrl/").removesuffix(".py") for name in files}
    assert {"errors", "types", "sandbox/inside", "sandbox/zygote", "sandbox/audit", "sandbox/stream"} <= names
    assert not names & {"sandbox/docker", "sandbox/engine", "sandbox/remote", "sandbox/serve", "train", "env"}
    assert files["agentrl/__init__.py"] == files["agentrl/sandbox/__init__.py"] == b""


@pytest.mark.parametrize("module", ["agentrl.sandbox.inside", "agentrl.sandbox.zygote"])
def test_it_can_be_imported_with_nothing_but_the_standard_library(tmp_path, module):
    for name, content in image.library().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(tmp_path)!r}); import {module}"]
    subprocess.run(command, check=True, timeout=30)


def test_a_fingerprint_changes_with_the_library_and_the_packages(monkeypatch):
    before = image.fingerprint(("numpy",))
    assert before == image.fingerprint(("numpy",)) != image.fingerprint(("numpy", "rich"))
    assert image.fingerprint(("a", "b")) == image.fingerprint(("b", "a"))
    changed = image.library() | {"agentrl/sandbox/jail.py": b"pass"}
    monkeypatch.setattr(image, "library", lambda: changed)
    assert image.fingerprint(("numpy",)) != before


def test_an_archive_has_the_interpreter_its_libraries_and_the_packages():
    stream = io.BytesIO()
    build.write(stream, ["numpy"])
    stream.seek(0)
    with tarfile.open(fileobj=stream) as archive:
        entries = {entry.name.rstrip("/"): entry for entry in archive}
    library = build.LIBRARY
    assert entries["usr/local/bin/python3"].mode == 0o755
    assert entries["tmp"].mode == 0o1777
    for name in ("os.py", "site-packages/numpy/__init__.py", "site-packages/agentrl/sandbox/inside.py"):
        assert f"{library}/{name}" in entries
    cached = f"{library}/__pycache__/os.{sys.implementation.cache_tag}.pyc"
    assert cached in entries
    assert any(name.rpartition("/")[2].startswith(("libc.so", "libc.musl")) for name in entries)
    assert not any("site-packages/numpy/tests" in name or "/test/" in name for name in entries)
    assert {entry.uid for entry in entries.values()} == {0}
    assert not any(entry.mode & 0o022 for name, entry in entries.items() if name != "tmp")
    assert not any(name.endswith(("bin/sh", "bin/bash")) for name in entries)


def test_a_package_that_is_not_installed_cannot_be_put_into_an_image():
    with pytest.raises(ConfigError, match="'agentrl_no_such_package' is not installed"):
        build.write(io.BytesIO(), ["agentrl_no_such_package"])


def test_a_context_has_all_that_the_dockerfile_copies(tmp_path):
    build.write_context(tmp_path / "context", "python")
    written = {str(path.relative_to(tmp_path / "context")) for path in (tmp_path / "context").rglob("*.py")}
    assert written == set(image.library())
    text = (tmp_path / "context" / "Dockerfile").read_text()
    assert f"ARG CONTENT={image.fingerprint(('numpy',))}\n" in text
    assert f"LABEL {image.LABEL}=${{CONTENT}}" in text
    assert f"ENTRYPOINT {json.dumps(build.ENTRYPOINT)}" in text


def test_the_containers_filter_lets_through_what_a_sessions_own_filter_does():
    sessions = {*seccomp.allowed_numbers("x86_64"), *seccomp.allowed_numbers("aarch64"), *seccomp.CHECKED}
    assert sessions <= ALLOWED
    beyond = ALLOWED - sessions
    assert beyond <= {
        *("execve", "landlock_add_rule", "landlock_create_ruleset", "landlock_restrict_self", "mount", "mount_setattr"),
        *("pidfd_getfd", "pidfd_open", "pidfd_send_signal", "pivot_root", "seccomp", "sethostname", "setns"),
        *("setsockopt", "umount2"),
    }


def test_the_containers_filter_lets_through_what_the_walls_are_made_of():
    assert set(kernel._NR) <= ALLOWED


STOPPED = """io_uring_setup bpf ptrace socket connect keyctl add_key perf_event_open userfaultfd mknod mknodat reboot
    init_module finit_module kexec_load open_by_handle_at process_vm_readv process_vm_writev memfd_create shmget msgget
    semget chroot setuid settimeofday clock_settime syslog acct quotactl iopl ioperm swapon"""


@pytest.mark.parametrize("name", STOPPED.split())
def test_the_containers_filter_stops_what_nobody_in_it_needs(name):
    assert RULES["defaultAction"] == "SCMP_ACT_ERRNO"
    assert name not in ALLOWED
