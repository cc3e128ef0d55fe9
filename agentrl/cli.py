"""The ``agentrl`` command.

Errors are printed without a traceback: exit status 2 for what the user can mend, 3 for a run that had to stop.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from agentrl import __version__, registry
from agentrl.config import RunConfig, describe_keys, load_config, parse_flags
from agentrl.errors import AgentRLError, ConfigError, IsolationUnavailable, TrainingError, UnknownName, UserError

USAGE = """\
agentrl: train and evaluate tool-using language models

  agentrl demo                    train a tiny policy from nothing on two CPU cores, and prove that it got better
  agentrl list                    list the environments and the tools
  agentrl sft ENV --policy DIR    warm-start on the environment's demonstrations; without --policy, a new tiny policy
  agentrl train ENV --policy DIR  train with group rollouts
  agentrl algorithms [NAME]       the algorithms for --algorithm.name; with a name, its formula, choices and source
  agentrl eval ENV --policy P     pass@k with intervals; P is a Hugging Face folder or an OpenAI-compatible base URL
  agentrl compare @ FILE          train the methods of FILE on several seeds at the same budget, and compare them
  agentrl replay RUN              the rollouts of a run; with --rollout, grows one again and shows the first difference
  agentrl new NAME                write a new environment folder with its test
  agentrl check ENV               the conformance kit
  agentrl keys                    every configuration key with its default
  agentrl doctor                  what isolation this machine gives, by doing, and what each sandbox backend needs
  agentrl sandbox serve           lend this machine's sandbox to others, over HTTP with a token
  agentrl serve MODEL             a vLLM server to sample from, for --sampler.backend vllm_server

ENV is a registered name, a folder here with an ENV, file.py:Class or module:Class.
Configuration: @ file.toml, then AGENTRL_SECTION__KEY variables, then --section.key value.

  --out DIR        run folder (train, sft, demo, compare, which needs it); default runs/ENV-DATE-TIME
  --resume         go on with the run in --out (train)
  --dry-run        check everything and print the configuration, then stop (train)
  --compare P      a second policy on the same tasks, and their paired difference (eval)
  --rollout ID     STEP/INDEX or STEP/TASK_ID (replay)
  --recorded-tokens  replay with the recorded tokens, where the weights of then are gone (replay)
  --live           run the tools again instead of answering from the record (replay)
  --json FILE      write the result as JSON (eval, check, replay)
  --short          every part of the demo in about a minute (demo)

sandbox serve takes --host 127.0.0.1, --port 8421 (0: any free one), --certfile and --keyfile for TLS, --token-file
(default: the variable AGENTRL_SANDBOX_TOKEN, else a new token is printed), --max-sessions 512 and --max-calls 1024 of
one client, and --idle-seconds 600, after which the sessions of a silent client are closed.

serve takes --host 127.0.0.1, --port 8000 (0: any free one), --max-slots 256, --max-length 1024,
--tensor-parallel-size 1, --dtype, --transport file (adapter, ipc, nccl), --token-file (default: the variable
AGENTRL_SERVER_TOKEN, else a new token is printed), and any option of `vllm serve` as --vllm.OPTION value.
"""

OPTIONS = {"policy", "out", "resume", "dry_run", "compare", "json", "short", "rollout", "recorded_tokens", "live"}
"""Flags that are not configuration keys."""

VALUED = {"policy", "out", "compare", "json", "rollout"}
"""Those of them that need a value."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the ``agentrl`` command."""
    # OpenMP's threads spin while they wait, and by default so long that beside a busy process a step takes four times
    # as long; a short spin costs nothing on an idle machine (docs/performance.md). Read when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if words[0] == "--version":
        print(f"agentrl {__version__}")
        return
    ended: list[int] = []

    def end(number: int, _: Any) -> None:
        ended.append(number)
        os.kill(os.getpid(), signal.SIGINT)  # asyncio's way out of Ctrl-C is a clean one

    # A background job of a script ignores SIGINT, and asyncio with it: there SIGTERM ends at once, as it would.
    gently = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    gently = gently and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if gently else None
    try:
        if words[0] not in COMMANDS:
            raise UnknownName("command", words[0], COMMANDS)
        if "--help" in words or "-h" in words:
            print(USAGE)
            return
        COMMANDS[words[0]](words[1:])
    except (UserError, IsolationUnavailable) as error:
        sys.exit(_fail(error, 2))
    except (TrainingError, AgentRLError) as error:
        sys.exit(_fail(error, 3))
    except BrokenPipeError:  # `agentrl keys | head`; what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(_fail(f"disk full: {error}. Free some space, or choose another folder with --out.", 2))
    except KeyboardInterrupt:
        hints = {
            "train": f"; go on with: agentrl train --resume --out {_folder(words)}",
            "compare": "; go on with the same command, which does not repeat what is done",
        }
        sys.exit(_fail(f"interrupted{hints.get(words[0], '')}", 128 + (ended or [signal.SIGINT])[0]))
    finally:
        if gently:
            signal.signal(signal.SIGTERM, before)


def _folder(words: list[str]) -> str:
    return words[words.index("--out") + 1] if "--out" in words[:-1] else "DIR (in runs/, the newest)"


def _fail(error: object, status: int) -> int:
    print(f"agentrl: {error}", file=sys.stderr)
    return status


class Arguments:
    """Words after the command: positional ones, options of the command, and the configuration.

    Raises:
        UserError: an argument too many or too few, or an option that the command does not take.
    """

    def __init__(
        self, words: list[str], positional: str | None, options: set[str], *, configured: bool = True, file: bool = True
    ) -> None:
        self.name = ""
        if positional is not None:
            if not words or words[0].startswith(("-", "@")):
                raise UserError(f"expected {positional} after the command; see agentrl --help.")
            self.name, words = words[0], words[1:]
        self.file, flags = parse_flags(words)
        self.options = {key: flags.pop(key) for key in list(flags) if key in OPTIONS}
        refused = sorted(self.options.keys() - options)
        refused += [] if configured else sorted(flags)
        if refused:
            raise UserError(f"--{refused[0].replace('_', '-')} does not go with this command; see agentrl --help.")
        empty = [key for key in sorted(self.options.keys() & VALUED) if self.options[key] is True]
        if empty:
            raise UserError(f"--{empty[0]} needs a value; see agentrl --help.")
        if self.file is not None and not (configured and file):
            raise UserError(f"@ {self.file} does not go with this command; see agentrl --help.")
        self.overrides = flags

    def config(self, **fixed: Any) -> RunConfig:
        """The run's configuration; ``fixed`` wins."""
        return load_config(self.file, self.overrides | {k.replace("__", "."): v for k, v in fixed.items() if v})

    def out(self, config: RunConfig, kind: str) -> Path:
        """The run folder."""
        default = f"runs/{kind}-{datetime.now():%Y%m%d-%H%M%S}"
        return Path(str(self.options.get("out") or config.out or default))


def _demo(words: list[str]) -> None:
    from agentrl.demo import demo_config, run_demo

    arguments = Arguments(words, None, {"out", "short"}, file=False)
    config = demo_config(arguments.overrides, bool(arguments.options.get("short")))
    run_demo(config, arguments.out(config, "demo"))


def _list(words: list[str]) -> None:
    Arguments(words, None, set(), configured=False)
    kinds: tuple[registry.Kind, ...] = ("envs", "tools")
    for kind in kinds:
        print(f"{kind}:")
        for name in registry.names(kind):
            summary = (registry.load(kind, name).__doc__ or "").strip().splitlines()
            print(f"  {name:<16}{summary[0] if summary else ''}")


def _sft(words: list[str]) -> None:
    from agentrl.run import run_sft

    arguments = Arguments(words, "an environment", {"policy", "out"})
    config = arguments.config(env=arguments.name, policy__path=arguments.options.get("policy"))
    run_sft(config, arguments.out(config, "sft"))


def _train(words: list[str]) -> None:
    from agentrl.run import dry_run, run_train

    resume = "--resume" in words
    named = bool(words) and not words[0].startswith(("-", "@"))
    arguments = Arguments(words, "an environment" if named or not resume else None, _TRAIN_OPTIONS, file=not resume)
    if resume:
        if "out" not in arguments.options:
            raise ConfigError("--resume needs --out DIR, the folder of the run to go on with.")
        asked = {"env": arguments.name, "policy.path": arguments.options.get("policy")}
        overrides = arguments.overrides | {key: value for key, value in asked.items() if value}
        run_train(None, Path(str(arguments.options["out"])), overrides=overrides)
        return
    config = arguments.config(env=arguments.name, policy__path=arguments.options.get("policy"))
    if arguments.options.get("dry_run"):
        dry_run(config)
        return
    run_train(config, arguments.out(config, Path(arguments.name.split(":")[0]).stem), toml=arguments.file)


_TRAIN_OPTIONS = {"policy", "out", "resume", "dry_run"}


def _eval(words: list[str]) -> None:
    from agentrl.run import run_eval

    arguments = Arguments(words, "an environment", {"policy", "compare", "json"})
    policy = str(arguments.options.get("policy") or "")
    config = arguments.config(env=arguments.name)
    policies = [policy or config.policy.path, str(arguments.options.get("compare") or "")]
    if not policies[0]:
        raise ConfigError("no policy: expected --policy DIR or --policy http://host:port/v1.")
    target = arguments.options.get("json")
    run_eval(config, [p for p in policies if p], Path(str(target)) if target else None)


def _compare(words: list[str]) -> None:
    from agentrl.run import run_compare

    arguments = Arguments(words, None, {"policy", "out"})
    if arguments.file is None:
        raise ConfigError("expected @ file.toml with a table [compare]; docs/comparison.md shows one.")
    if "out" not in arguments.options:
        raise ConfigError("compare needs --out DIR; the same command with the same DIR goes on where it was stopped.")
    policy = arguments.options.get("policy")
    overrides = arguments.overrides | ({"policy.path": policy} if policy else {})
    run_compare(arguments.file, overrides, Path(str(arguments.options["out"])))


def _replay(words: list[str]) -> None:
    from agentrl.run import run_replay

    arguments = Arguments(words, "a run folder", _REPLAY_OPTIONS, configured=False)
    rollout, target = (str(arguments.options.get(name) or "") for name in ("rollout", "json"))
    if not rollout and arguments.options:
        raise UserError("expected --rollout STEP/INDEX; without it and without other options, the rollouts are listed.")
    modes = {name: bool(arguments.options.get(name)) for name in ("recorded_tokens", "live")}
    if not run_replay(Path(arguments.name), rollout, Path(target) if target else None, **modes):
        sys.exit(1)


_REPLAY_OPTIONS = {"rollout", "recorded_tokens", "live", "json"}


def _new(words: list[str]) -> None:
    from agentrl.scaffold import new_env

    arguments = Arguments(words, "a name", set(), configured=False)
    for path in new_env(arguments.name, Path.cwd()):
        print(f"wrote {path}")


def _check(words: list[str]) -> None:
    from agentrl.run import run_check

    arguments = Arguments(words, "an environment", {"json"})
    target = arguments.options.get("json")
    if not run_check(arguments.config(env=arguments.name), Path(str(target)) if target else None):
        sys.exit(1)


def _keys(words: list[str]) -> None:
    Arguments(words, None, set(), configured=False)
    for key, default, meaning in describe_keys():
        print(f"{key:<31} {default:<28}{meaning}")


def _algorithms(words: list[str]) -> None:
    from agentrl.presets import PRESETS, describe, summaries

    named = bool(words) and not words[0].startswith("-")
    name = Arguments(words, "a name" if named else None, set(), configured=False).name
    if name and name not in PRESETS:
        raise UnknownName("algorithm", name, PRESETS)
    print(describe(name) if name else "\n".join(f"{each:<24}{summary}" for each, summary in summaries().items()))


def _doctor(words: list[str]) -> None:
    import asyncio

    from agentrl.doctor import examine, profile_names

    Arguments(words, None, set(), configured=False)

    async def report() -> bool:
        usable = True
        async for finding in examine():
            print(f"{finding.backend:<8}{finding.what:<12}{finding.state:<12}{finding.detail}", flush=True)
            usable = usable and finding.state != "missing"
        print(f"profiles: {profile_names()}")
        return usable

    if not asyncio.run(report()):
        sys.exit(1)


def _sandbox(words: list[str]) -> None:
    from agentrl.sandbox.serve import read_options, run

    if not words:
        raise UserError("expected a command after agentrl sandbox, as in: agentrl sandbox serve")
    if words[0] != "serve":
        raise UnknownName("command after agentrl sandbox:", words[0], ["serve"])
    file, flags = parse_flags(words[1:])
    if file is not None:
        raise UserError(f"@ {file} does not go with this command; see agentrl --help.")
    run(read_options(flags))


def _serve(words: list[str]) -> None:
    from agentrl.serve import read_options, run

    if not words or words[0].startswith(("-", "@")):
        raise UserError("expected a model's folder after the command; see agentrl --help.")
    file, flags = parse_flags(words[1:])
    if file is not None:
        raise UserError(f"@ {file} does not go with this command; see agentrl --help.")
    sys.exit(run(read_options(words[0], flags)))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "demo": _demo,
    "list": _list,
    "sft": _sft,
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "replay": _replay,
    "new": _new,
    "check": _check,
    "keys": _keys,
    "algorithms": _algorithms,
    "doctor": _doctor,
    "sandbox": _sandbox,
    "serve": _serve,
}

if __name__ == "__main__":
    main()
