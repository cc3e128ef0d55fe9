from __future__ import annotations

import errno
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentrl._durable import damage
from agentrl.errors import NonFiniteError, RunFolderError
from agentrl.trace import RunFolder, latest_checkpoint, read_metrics
from agentrl.types import Leaf, Message, Node, Outcome, RolloutTree, Task

CONFIG = {"seed": 3, "train": {"lr": 1e-4, "steps": 10}}


def tree(step: int) -> RolloutTree:
    prompt = Message("user", f"step {step}")
    nodes = (Node(-1, "prompt", (1, 2), messages=(prompt,)), Node(0, "policy", (step,), (-0.1,), (0.3,), (step,)))
    return RolloutTree(Task((prompt,), id=f"task-{step}"), nodes, (Leaf(1, 1.0, Outcome.ANSWERED),))


def do_step(folder: RunFolder, step: int, *, checkpoint: bool = True) -> None:
    """One step as the training loop saves it. The content depends on the step, so that a mix-up shows."""
    folder.write_rollouts(step, [tree(step)])
    folder.log_metrics(step, {"reward": step / 7})
    if checkpoint:
        with folder.checkpoint(step) as tmp:
            (tmp / "tokenizer").mkdir()
            for name in ("model.safetensors", "tokenizer/vocab.json"):
                (tmp / name).write_bytes(content(step, name))


def content(step: int, name: str) -> bytes:
    return random.Random(f"{step}{name}").randbytes(50_000)


def assert_consistent(folder: RunFolder) -> int:
    """Everything in a resumed folder ends with the same step; returns it (0 before the first checkpoint)."""
    step = folder.start.step if folder.start else 0
    if folder.start:
        for name in ("model.safetensors", "tokenizer/vocab.json"):
            assert (folder.start.path / name).read_bytes() == content(step, name)
    rows = read_metrics(folder.path)
    assert rows == [{"step": n, "reward": n / 7} for n in range(1, step + 1)]
    assert sorted(file.name for file in (folder.path / "rollouts").iterdir()) == [
        f"step_{n:06d}.jsonl" for n in range(1, step + 1)
    ]
    assert all(folder.read_rollouts(n) == [tree(n)] for n in range(1, step + 1))
    assert not list(folder.path.rglob(".tmp-*"))
    assert all(damage(kept) is None for kept in (folder.path / "checkpoints").glob("step_*"))
    return step


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    with RunFolder.create(tmp_path / "run", CONFIG) as made:
        yield made


# -- creating and resuming --------------------------------------------------------------------------------------------


def test_a_new_run_says_what_was_asked_for_and_what_it_ran_on(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "deep" / "run", CONFIG, toml="seed = 3\n", environment="arithmetic") as made:
        assert made.start is None
        assert made.latest_checkpoint() is None
    assert json.loads((made.path / "config.json").read_text()) == CONFIG
    assert (made.path / "config.toml").read_text() == "seed = 3\n"
    versions = json.loads((made.path / "versions.json").read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"].startswith("2.")
    assert set(versions) >= {"agentrl", "transformers", "numpy", "platform", "environment", "git_commit"}


def test_a_run_is_not_created_over_another(folder: RunFolder) -> None:
    folder.close()
    with pytest.raises(RunFolderError, match=r"holds a run already.*--resume.*--out"):
        RunFolder.create(folder.path, {})
    assert json.loads((folder.path / "config.json").read_text()) == CONFIG


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot make the run folder"):
        RunFolder.create(tmp_path / "file", {})


def test_only_a_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run to resume.*without --resume"):
        RunFolder.resume(tmp_path)
    assert not list(tmp_path.iterdir())


def test_resume_goes_back_to_the_last_checkpoint(folder: RunFolder) -> None:
    for step in (1, 2, 3, 4):
        do_step(folder, step, checkpoint=step == 2)
    folder.close()
    with RunFolder.resume(folder.path) as resumed:
        assert resumed.config == CONFIG
        assert assert_consistent(resumed) == 2
        do_step(resumed, 3)
    with RunFolder.resume(folder.path) as resumed:
        assert assert_consistent(resumed) == 3


def test_resume_before_the_first_checkpoint_starts_over(folder: RunFolder) -> None:
    do_step(folder, 1, checkpoint=False)
    folder.close()
    with RunFolder.resume(folder.path) as resumed:
        assert resumed.start is None
        assert assert_consistent(resumed) == 0
        do_step(resumed, 1)


def test_a_half_written_last_line_is_dropped(folder: RunFolder) -> None:
    do_step(folder, 1)
    folder.close()
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "rew')
    assert [row["step"] for row in read_metrics(folder.path)] == [1]
    with RunFolder.resume(folder.path) as resumed:
        assert assert_consistent(resumed) == 1


def test_damage_inside_of_the_metrics_is_named(folder: RunFolder) -> None:
    do_step(folder, 1)
    folder.close()
    file = folder.path / "metrics.jsonl"
    file.write_text("garbage\n" + file.read_text())
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 1 cannot be read.*garbage"):
        RunFolder.resume(folder.path)


def test_other_versions_on_resume_are_said(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.close()
    file = folder.path / "versions.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"torch": "1.0"}))
    with caplog.at_level(logging.WARNING), RunFolder.resume(folder.path):
        assert "torch 1.0 -> 2." in caplog.text


# -- the lock ---------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from agentrl.trace import RunFolder
folder = RunFolder.create(sys.argv[1], {})
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_naming_the_process(tmp_path: Path) -> None:
    with python(HOLD, tmp_path) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid}"):
            RunFolder.resume(tmp_path)
        with pytest.raises(RunFolderError, match=f"in use by process {holder.pid}"):
            RunFolder.create(tmp_path, {})
        holder.kill()
    with RunFolder.resume(tmp_path) as resumed:
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()}"):
            RunFolder.resume(resumed.path)


# -- metrics, failures ------------------------------------------------------------------------------------------------


def test_a_metric_is_on_the_disk_at_once(folder: RunFolder) -> None:
    folder.log_metrics(1, {"loss": 0.1 + 0.2, "kl": None, "note": "warm-up"})
    assert read_metrics(folder.path) == [{"step": 1, "loss": 0.1 + 0.2, "kl": None, "note": "warm-up"}]


def test_a_step_has_one_line(folder: RunFolder) -> None:
    folder.log_metrics(2, {"loss": 1.0})
    for step in (1, 2):
        with pytest.raises(RunFolderError, match=f"metrics of step {step} after those of step 2"):
            folder.log_metrics(step, {"loss": 1.0})


def test_a_metric_that_is_not_finite_is_refused_by_name(folder: RunFolder) -> None:
    with pytest.raises(NonFiniteError, match=r"step 1 are not finite: {'loss': nan}"):
        folder.log_metrics(1, {"loss": float("nan"), "reward": 1.0})
    assert read_metrics(folder.path) == []


def test_failures_keep_whatever_they_are_given(folder: RunFolder) -> None:
    payload: dict[Any, Any] = {
        "logprobs": (-0.5, float("nan"), float("-inf")),
        "error": ValueError("bad"),
        3: {"ok": True},
    }
    first = folder.save_failure("step 12: loss/../nan", payload)
    second = folder.save_failure("step 12: loss/../nan", payload)
    assert first != second
    assert {first.parent, second.parent} == {folder.path / "failures"}
    saved = json.loads(first.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert saved == {"logprobs": [-0.5, "nan", "-inf"], "error": "ValueError('bad')", "3": {"ok": True}}


def test_rollouts_of_a_step_not_done_are_named(folder: RunFolder) -> None:
    with pytest.raises(RunFolderError, match="no rollouts of step 9"):
        folder.read_rollouts(9)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {}, keep=2) as folder:
        for step in (1, 2, 3):
            do_step(folder, step)
        assert sorted(p.name for p in (folder.path / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
        newest = latest_checkpoint(folder.path)
        assert newest == folder.latest_checkpoint()
        assert newest is not None
        assert newest.step == 3


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="keep=0"):
        RunFolder.create(tmp_path / "run", {}, keep=0)


def test_a_step_is_saved_once(folder: RunFolder) -> None:
    do_step(folder, 1)
    with pytest.raises(RunFolderError, match=r"step_000001 exists"), folder.checkpoint(1):
        pytest.fail("entered")
    assert folder.latest_checkpoint() is not None


def test_a_checkpoint_that_fails_leaves_nothing(folder: RunFolder) -> None:
    do_step(folder, 1)
    with pytest.raises(ZeroDivisionError), folder.checkpoint(2) as tmp:  # noqa: PT012 -- the block is what is tested
        (tmp / "model").write_text("half")
        _ = 1 / 0
    assert [p.name for p in (folder.path / "checkpoints").iterdir()] == ["step_000001"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("model.safetensors", cut, "49999 bytes, not 50000"),
        ("model.safetensors", flip, "has changed"),
        ("tokenizer/vocab.json", Path.unlink, "vocab.json is missing"),
        ("COMPLETE", Path.unlink, "no COMPLETE"),
        ("COMPLETE", cut, "COMPLETE file cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_named(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, name: str, harm: Any, said: str
) -> None:
    do_step(folder, 1)
    do_step(folder, 2)
    folder.close()
    harm(folder.path / "checkpoints" / "step_000002" / name)
    if name == "COMPLETE" and harm is cut:
        cut(folder.path / "checkpoints" / "step_000002" / name)
    found = latest_checkpoint(folder.path)
    assert found is not None
    assert found.step == 1
    assert "step_000002 is skipped" in caplog.text
    assert said in caplog.text
    with RunFolder.resume(folder.path) as resumed:
        assert assert_consistent(resumed) == 1
        assert (folder.path / "checkpoints" / "damaged-step_000002").is_dir()
        do_step(resumed, 2)
    assert latest_checkpoint(folder.path) is not None


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_earlier_checkpoint(folder: RunFolder) -> None:
    """``/dev/full`` refuses every write with a real ENOSPC."""
    do_step(folder, 1)
    with pytest.raises(RunFolderError) as caught, folder.checkpoint(2) as tmp:  # noqa: PT012 -- the block is tested
        (tmp / "model.safetensors").write_bytes(content(2, "model.safetensors"))
        (tmp / "optimizer.pt").symlink_to("/dev/full")
        (tmp / "optimizer.pt").write_bytes(b"x" * 100)
    message = str(caught.value)
    for part in ("disk full while writing checkpoint step_000002", "MiB are left", "Free some space", "--resume"):
        assert part in message
    assert [p.name for p in (folder.path / "checkpoints").iterdir()] == ["step_000001"]
    do_step(folder, 2)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk_is_recognised_through_other_libraries(folder: RunFolder, error: Exception) -> None:
    with pytest.raises(RunFolderError, match="disk full"), folder.checkpoint(1):
        raise error


def test_another_os_error_is_not_called_a_full_disk(folder: RunFolder) -> None:
    with pytest.raises(PermissionError), folder.checkpoint(1):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_full_disk_leaves_no_part_of_a_line_or_a_file(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.log_metrics(1, {"reward": 1.0})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder.write_json("result.json", {"pass@1": 0.5})
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(RunFolderError, match=r"disk full while writing result\.json"):
            folder.write_json("result.json", {"pass@1": 0.9})
        with pytest.raises(RunFolderError, match="disk full while writing the metrics of step 2"):
            folder.log_metrics(2, {"reward": 2.0})
        with pytest.raises(RunFolderError, match="disk full while writing the rollouts of step 2"):
            folder.write_rollouts(2, [tree(2)])
    assert [row["step"] for row in read_metrics(folder.path)] == [1]
    assert not list((folder.path / "rollouts").iterdir())
    assert json.loads((folder.path / "result.json").read_text()) == {"pass@1": 0.5}
    folder.log_metrics(2, {"reward": 2.0})
    assert [row["step"] for row in read_metrics(folder.path)] == [1, 2]


# -- kill -9 ----------------------------------------------------------------------------------------------------------


def run_killed_at(path: Path, operation: int) -> bool:
    """Resume the run in a forked child, do two steps, and SIGKILL it before its n-th file operation.

    Returns whether it lived long enough to end by itself. Python announces opens, renames, removals and mkdirs to
    audit hooks; with the syncs, which it does not announce, each of them is a moment to die.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def count_down() -> None:
            nonlocal count
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, _: tuple[object, ...]) -> None:
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree"):
                count_down()

        sys.addaudithook(hook)
        os.fsync = lambda fd: count_down()
        try:
            folder = RunFolder.resume(path, keep=1)
            start = folder.start.step if folder.start else 0
            do_step(folder, start + 1)
            do_step(folder, start + 2)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return os.WIFEXITED(status)


def kill_before_every_operation(path: Path) -> None:
    done = 0
    for operation in range(1, 400):
        ended = run_killed_at(path, operation)
        with RunFolder.resume(path, keep=1) as resumed:
            step = assert_consistent(resumed)
        assert step >= done, "a durable checkpoint was lost"
        done = step
        if ended:
            break
    assert ended, "the steps have more file operations than this test visits"
    assert operation > 50
    assert done > 20


def python(code: str, *arguments: Path) -> subprocess.Popen[bytes]:
    """A Python process of its own that can import this file."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)


@pytest.mark.slow
def test_kill_before_any_file_operation_loses_at_most_the_step_in_hand(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, CONFIG).close()
    # In a process without threads, where fork is safe.
    code = "import pathlib, sys, test_trace; test_trace.kill_before_every_operation(pathlib.Path(sys.argv[1]))"
    with python(code, tmp_path) as worker:
        assert worker.wait() == 0, "see the traceback above"


WORK = """
import sys
from test_trace import do_step
from agentrl.trace import RunFolder
folder = RunFolder.resume(sys.argv[1])
step = folder.start.step if folder.start else 0
print("ready", flush=True)
while True:
    step += 1
    do_step(folder, step)
"""


def test_kill_at_random_moments_of_a_running_loop(tmp_path: Path) -> None:
    path, rng, done = tmp_path / "run", random.Random(0), 0
    RunFolder.create(path, CONFIG).close()
    for _ in range(5):
        with python(WORK, path) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.02, 0.1))
            worker.kill()
        with RunFolder.resume(path) as resumed:
            step = assert_consistent(resumed)
        assert step >= done
        done = step
    assert done > 0
