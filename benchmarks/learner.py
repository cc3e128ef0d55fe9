"""One learner step: is it TRL's, number for number, and what does it cost beside TRL's?

With ``--peer`` (``trl_peer.py``) and ``--peer-python`` (a Python that has TRL 1.16, which is not imported here) TRL
trains a tiny Qwen3 in processes of its own and dumps the weights, batch, loss and gradients of its first step:

1. ``gradients against TRL``: norm of the difference over the norm of TRL's gradient, all parameters together, and the
   worst parameter on its own. ``loss against TRL``: difference over the mean size of the terms it sums up, |advantage|;
   the loss itself is 0 up to rounding, since a group's advantages cancel at ratio 1.
2. ``step / TRL's``: CPU time of our whole ``Learner.step`` (flattening, advantages, packing, forward, loss, checks,
   backward, clipping, AdamW) over TRL's forward, backward and optimizer phases, without its generation, scoring and
   logging. TRL's process and our steps take turns; each turn gives one ratio of medians.

Always measured: ``step / flat's``, ours over the same loss on unshared rows with transformers' own attention in this
process, and the gradients of the two against each other. A prompt is shared by 8 answers, so a batch with long prompts
has few unique tokens (``unique tokens / all``).

With ``--sharing`` also what sharing saves by the shape of the forest, in time and memory, and the memory of log-probs
at a large vocabulary (``_sharing.py``; about ten minutes more). ``--plot`` draws its times.

    python benchmarks/learner.py [--peer ../shared/bench/trl_peer.py --peer-python DIR/bin/python]
                                 [--prompts 64 448] [--sharing [--plot FILE]] [--threads 1] [--rounds 3]
                                 [--json FILE] [--check]
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _sharing
import torch
import torch.nn.functional as F
from _bench import Row, Seconds, interleave, measure, parser, ratio, report, tiny_qwen3, typical
from torch import Tensor

from agentrl.config import RunConfig, load_config
from agentrl.learner.experience import Experience, experience
from agentrl.learner.loss import Scores, aggregate, token_log_ratio
from agentrl.learner.step import Learner, Prepared
from agentrl.learner.surrogate import clip
from agentrl.types import Leaf, Node, Outcome, RolloutTree, Task

ANSWERS, GROUP, NEW = 64, 8, 64
STEPS = 3
"""Our steps in a turn, and TRL's, whose first one is a warm-up and not counted."""
MICRO = {64: 64, 448: 16}
"""Rows of a micro-batch for TRL and the flat computation: what is fastest for them on a CPU."""


@dataclass(frozen=True)
class Trajectory:
    """One row.

    Attributes:
        token_ids: [T].
        policy: [T] whether the policy wrote the token.
        old_logprobs: [T], 0 where it did not.
        advantage: of all its tokens.
    """

    token_ids: tuple[int, ...]
    policy: tuple[bool, ...]
    old_logprobs: tuple[float, ...]
    advantage: float


@dataclass(frozen=True)
class Problem:
    """A model and a batch, with TRL's loss and gradients where TRL made it."""

    model: Any
    trajectories: list[Trajectory]
    config: RunConfig
    loss: float | None = None
    gradients: dict[str, Tensor] | None = None


def settings(**changed: Any) -> RunConfig:
    """TRL's: DAPO's loss over all policy tokens, clip 0.2, AdamW (0.9, 0.999), no filters; lr as TRL's first step."""
    fixed = {"train.beta2": 0.999, "train.lr": 1e-4, "train.warmup": 0, "algorithm.clip_high": 0.2}
    # The batch stays while the weights move, so the gap between sampler and learner grows; here that is no fault.
    return load_config(None, fixed | {"algorithm.overlong_filter": False, "train.max_gap": 1e9} | changed)


def random_problem(prompt: int) -> Problem:
    """Random tokens and rewards in the shape of TRL's batch."""
    model = tiny_qwen3()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, 1000, (ANSWERS // GROUP, prompt), generator=generator).repeat_interleave(GROUP, 0)
    answers = torch.randint(1, 1000, (ANSWERS, NEW), generator=generator)
    rewards = torch.randn(ANSWERS // GROUP, GROUP, generator=generator)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, keepdim=True)).flatten()
    rows = zip(prompts.tolist(), answers.tolist(), advantages.tolist(), strict=True)
    return Problem(model, on_policy(model, [trajectory(*row) for row in rows]), settings())


def dumped_problem(file: Path) -> Problem:
    """What ``trl_peer.py --dump`` wrote."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    dump = torch.load(file, weights_only=True)
    model = Qwen3ForCausalLM(Qwen3Config(**dump["config"]))
    model.load_state_dict(dump["weights"])
    batch, arguments = dump["batch"], dump["args"]
    if (arguments["loss_type"], arguments["beta"]) != ("dapo", 0.0):
        sys.exit(f"expected a dump of the dapo loss without KL, got {arguments}")
    prompts, answers = (unpadded(batch[f"{side}_ids"], batch[f"{side}_mask"]) for side in ("prompt", "completion"))
    rows = zip(prompts, answers, batch["advantages"].tolist(), strict=True)
    high = arguments["epsilon"] if arguments["epsilon_high"] is None else arguments["epsilon_high"]
    clips = {"algorithm.clip_low": arguments["epsilon"], "algorithm.clip_high": high}
    config = settings(**clips, **{"train.max_grad_norm": arguments["max_grad_norm"]})
    return Problem(
        model, on_policy(model, [trajectory(*row) for row in rows]), config, sum(dump["losses"]), dump["grads"]
    )


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]


def trajectory(prompt: list[int], answer: list[int], advantage: float) -> Trajectory:
    own = (False,) * len(prompt) + (True,) * len(answer)
    return Trajectory((*prompt, *answer), own, (0.0,) * len(own), advantage)


def on_policy(model: Any, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """With the model's own log-probs as the old ones, as TRL has it in the first step after sampling."""
    learner = Learner(copy.deepcopy(model), settings())
    found, _ = learner.score(learner.model, experience(trees_of(trajectories)))
    return [replace(t, old_logprobs=tuple(found[i, : len(t.token_ids)].tolist())) for i, t in enumerate(trajectories)]


def trees_of(trajectories: Sequence[Trajectory]) -> list[RolloutTree]:
    """Groups as the rollout engine delivers them; advantages become rewards, which normalising leaves as they are."""
    trees = []
    for begin in range(0, len(trajectories), GROUP):
        group = trajectories[begin : begin + GROUP]
        prompt = group[0].policy.index(True)
        nodes = [Node(-1, "prompt", group[0].token_ids[:prompt])]
        nodes += [Node(0, "policy", t.token_ids[prompt:], t.old_logprobs[prompt:]) for t in group]
        leaves = tuple(Leaf(1 + i, t.advantage, Outcome.ANSWERED) for i, t in enumerate(group))
        trees.append(RolloutTree(Task("benchmark"), tuple(nodes), leaves))
    return trees


class Flat:
    """The same step on unshared rows: transformers' own attention, micro-batches, our published loss formula."""

    def __init__(self, problem: Problem, micro: int) -> None:
        self.model, self.config, self.micro = copy.deepcopy(problem.model).train(), problem.config, micro
        self.model.set_attn_implementation("sdpa")
        self.rows = problem.trajectories
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0)

    def accumulate(self) -> float:
        """Add the gradient; the loss."""
        tokens = sum(sum(t.policy) for t in self.rows)
        return sum(self._part(self.rows[i : i + self.micro], tokens) for i in range(0, len(self.rows), self.micro))

    def _part(self, rows: Sequence[Trajectory], tokens: int) -> float:
        ids = torch.tensor([t.token_ids for t in rows])
        begin = rows[0].policy.index(True)
        hidden = self.model.get_decoder()(ids, use_cache=False).last_hidden_state[:, begin - 1 : -1]
        logp = F.log_softmax(self.model.get_output_embeddings()(hidden), -1)
        logp = logp.gather(-1, ids[:, begin:, None])[..., 0]
        old = torch.tensor([t.old_logprobs[begin:] for t in rows])
        mask = torch.ones_like(logp, dtype=torch.bool)
        algorithm = self.config.algorithm
        advantages = torch.tensor([t.advantage for t in rows])[:, None].expand_as(mask)
        scores = Scores(logp, old, advantages, mask)
        per_token, _ = clip(
            token_log_ratio(logp, old, mask), scores, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high
        )
        loss = aggregate(per_token, mask, "token-mean", denominator=tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def step(self) -> None:
        """One whole update."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulate()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
        self.optimizer.step()


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[float, float]:
    """Relative distance of the gradients: of all parameters together, and the largest of a single one."""
    if ours.keys() != theirs.keys():
        sys.exit(f"gradients of different parameters: {sorted(ours.keys() ^ theirs.keys())}")
    off = {name: float((ours[name] - theirs[name]).norm()) for name in ours}
    size = {name: float(theirs[name].norm()) for name in ours}
    total = sum(x * x for x in off.values()) ** 0.5 / sum(x * x for x in size.values()) ** 0.5
    return total, max(off[name] / size[name] for name in ours)


def given(learner: Learner, trajectories: Sequence[Trajectory]) -> Prepared:
    """The batch with exactly the advantages of ``trajectories``."""
    flat: Experience = experience(trees_of(trajectories))
    prepared, _ = learner.prepare(flat)
    advantages = torch.tensor([t.advantage for t in trajectories])[:, None] * flat.mask
    return replace(prepared, scores=replace(prepared.scores, advantages=advantages))


def equality(problem: Problem, flat: Flat, label: str) -> list[Row]:
    """Loss and gradients of the given advantages and log-probs, through ``Learner.accumulate``."""
    learner = Learner(copy.deepcopy(problem.model), problem.config)
    metrics = learner.accumulate(given(learner, problem.trajectories))
    torch.nn.utils.clip_grad_norm_(learner.model.parameters(), problem.config.train.max_grad_norm)
    ours = gradients(learner.model)
    sizes = [(abs(t.advantage), sum(t.policy)) for t in problem.trajectories]
    scale = sum(a * tokens for a, tokens in sizes) / sum(tokens for _, tokens in sizes)
    flat_loss = flat.accumulate()
    torch.nn.utils.clip_grad_norm_(flat.model.parameters(), problem.config.train.max_grad_norm)
    peers = [("flat", flat_loss, gradients(flat.model))]
    if problem.loss is not None and problem.gradients is not None:
        peers.insert(0, ("TRL", problem.loss, problem.gradients))
    rows = [Row(f"{label}: unique tokens / all", metrics["num_tokens/unique"] / metrics["num_tokens/flat"], "x")]
    for name, loss, theirs in peers:
        total, worst = distance(ours, theirs)
        rows.append(Row(f"{label}: gradients against {name}", total, "relative", 1e-5))
        rows.append(Row(f"{label}: gradients against {name}, worst parameter", worst, "relative", 1e-5))
        rows.append(Row(f"{label}: loss against {name}", abs(metrics["loss"] - loss) / scale, "relative", 1e-5))
    return rows


class Peer:
    """``trl_peer.py`` in its own Python."""

    def __init__(self, options: argparse.Namespace, prompt: int, folder: Path) -> None:
        self.dump, self.out, self.folder = folder / f"dump_{prompt}.pt", folder / f"trl_{prompt}.jsonl", folder
        self.words = [str(options.peer_python), str(options.peer.resolve()), "--threads", str(options.threads)]
        self.words += ["--steps", str(STEPS), "--prompt-len", str(prompt), "--micro", str(MICRO.get(prompt, 16))]

    def run(self, *more: str) -> Seconds:
        """Train for ``STEPS`` steps; the median seconds of forward, backward and optimizer."""
        command = [*self.words, "--out", str(self.out), *more]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            sys.exit(f"the peer failed: {' '.join(command)}\n{done.stderr[-2000:]}")
        row = json.loads(self.out.read_text().splitlines()[-1])
        return Seconds(*(row[clock]["fwd_bwd"] + row[clock]["optim"] for clock in ("cpu_med", "wall_med")))


def compare(options: argparse.Namespace, prompt: int, folder: Path) -> list[Row]:
    """All rows of one prompt length."""
    label = f"prompt {prompt}"
    peer = Peer(options, prompt, folder) if options.peer_python is not None else None
    if peer is not None:
        peer.run("--dump", str(peer.dump))
    problem = random_problem(prompt) if peer is None else dumped_problem(peer.dump)
    flat = Flat(problem, MICRO.get(prompt, 16))
    rows = equality(problem, flat, label)
    learner = Learner(copy.deepcopy(problem.model), problem.config)
    trees = trees_of(problem.trajectories)
    contestants: dict[str, Callable[[], Seconds]] = {
        "flat": lambda: measure(flat.step),
        "ours": lambda: typical([measure(lambda: learner.step(trees)) for _ in range(STEPS)]),
    }
    for warm_up in contestants.values():
        warm_up()
    if peer is not None:
        contestants["TRL"] = peer.run
    taken = interleave(options.rounds, contestants)
    # A prompt of 448 is where sharing has to show: at least 1.5 times as fast.
    for name, target in (("TRL", 0.667 if prompt >= 448 else 0.8), ("flat", None)):
        if name in taken:
            rows.append(Row(f"{label}: step / {name}'s, CPU", ratio(taken["ours"], taken[name]).cpu, "x", target))
    rows += [Row(f"{label}: {name}, CPU", typical(seconds).cpu, "s") for name, seconds in taken.items()]
    return rows


def main() -> int:
    words = parser(__doc__, rounds=3)
    default = Path(__file__).resolve().parents[2] / "shared" / "bench" / "trl_peer.py"
    words.add_argument("--peer", type=Path, default=default, help=f"trl_peer.py ({default})")
    words.add_argument("--peer-python", type=Path, help="the Python that has trl==1.16.0; without it TRL is left out")
    words.add_argument("--threads", type=int, default=1, help="threads of torch, ours and TRL's (1)")
    words.add_argument("--prompts", type=int, nargs="*", default=[64, 448], help="prompt lengths, in tokens (64 448)")
    words.add_argument("--sharing", action="store_true", help="sweep the shape of the forest")
    words.add_argument("--plot", type=Path, help="where the sweep's PNG goes, as docs/learner_sharing.png")
    options = words.parse_args()
    notes = []
    if options.peer_python is None or not options.peer.is_file():
        why = "no --peer-python was given" if options.peer_python is None else f"there is no {options.peer}"
        notes.append(f"TRL was not measured: {why}. The rows compare with the flat computation in this process only.")
        options.peer_python = None
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for prompt in options.prompts for row in compare(options, prompt, Path(folder))]
    if options.sharing or options.plot is not None:
        swept, points = _sharing.sweep(options.rounds)
        rows += swept + _sharing.memory()
        if options.plot is not None:
            _sharing.draw(points, options.plot)
    return report(f"one learner step, {ANSWERS} answers in groups of {GROUP}", rows, options, notes)


if __name__ == "__main__":
    sys.exit(main())
