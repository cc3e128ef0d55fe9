"""What sharing is worth: one whole update on forests of many shapes, packed and flat, in time and memory.

Both updates hold the same weights, rows, loss (GRPO's clip, ``token-mean``) and optimizer (AdamW), and micro-batches of
at most ``BUDGET`` tokens. The flat one sends padded rows through transformers' own ``sdpa`` attention and makes logits
of policy tokens only, so it wastes nothing but what is shared. Used by ``learner.py``; as a program it runs one update
in a process of its own and prints how far it raised the memory, in MiB:

    python benchmarks/_sharing.py {tree,flat} CASE
    python benchmarks/_sharing.py {chunked,plain}    (log-probs of 4,096 targets, vocabulary 151,936)
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _bench import Row, Seconds, interleave, measure, ratio, typical
from torch import Tensor

from agentrl.learner.attention import ATTENTION
from agentrl.learner.logprob import target_logprobs
from agentrl.learner.loss import Scores, aggregate, token_log_ratio
from agentrl.learner.pack import TrainBatch, micro_batches, pack
from agentrl.learner.surrogate import clip

VOCABULARY, LENGTH, LEAVES = 4096, 512, 32
BUDGET = 8192
BOUND, UNSHARED_BOUND = 1.15, 1.03
"""Time over the share of unique tokens, where a token stands in 3 rows or more; and time where nothing is shared."""
TARGETS, LARGE_VOCABULARY = 4096, 151_936


@dataclass(frozen=True)
class Case:
    """A forest of ``LEAVES`` rows (or a few less) of ``LENGTH`` tokens.

    Attributes:
        levels: branchings between a prompt and a leaf.
        branching: children of each.
        prompt: the prompt's share of a row, of which nothing is trained; all else is the policy's.
        comb: instead of trees, one row shares a single token more than another, which is not worth sharing.
    """

    levels: int = 1
    branching: int = 1
    prompt: float = 0.5
    comb: bool = False

    @property
    def name(self) -> str:
        """As the table and the command line have it."""
        if self.comb:
            return "comb"
        return f"{self.levels} x {self.branching}, prompt {self.prompt:g}"

    def rows(self) -> tuple[Tensor, Tensor]:
        """Token ids and mask, [L, T]."""
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, VOCABULARY, generator=generator)
        begin = int(self.prompt * LENGTH)
        if self.comb:
            ids = draw((LEAVES, LENGTH))
            for row in range(LEAVES):
                ids[row, :row] = ids[-1, :row]
        else:
            cuts = [(LENGTH - begin) * level // self.levels for level in range(self.levels + 1)]
            ids = draw((max(LEAVES // self.branching**self.levels, 1), begin))
            for a, b in pairwise(cuts):
                ids = ids.repeat_interleave(self.branching, 0)
                ids = torch.cat([ids, draw((len(ids), b - a))], dim=1)
        return ids, (torch.arange(LENGTH) >= max(begin, 1)).expand(ids.shape)


CASES = [
    Case(),
    Case(comb=True),
    *(Case(1, b, p) for b, p in ((2, 0.5), (4, 0.75), (8, 0.75), (8, 0.9))),
    *(Case(2, b, p) for b, p in ((2, 0.5), (4, 0.5), (5, 0.75))),
    *(Case(3, b, p) for b, p in ((2, 0.5), (3, 0.25), (3, 0.5))),
    *(Case(4, 2, p) for p in (0.25, 0.5)),
]
MEMORY = [CASES[0], CASES[4], CASES[-1]]


def small_model(vocabulary: int = VOCABULARY) -> Any:
    """A Qwen3 with random weights, of 4.2 M parameters at the default vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    ).train()


class Update:
    """One optimizer step on a case; ``tree`` or flat."""

    def __init__(self, model: Any, case: Case, *, tree: bool) -> None:
        self.model, self.tree = model, tree
        model.set_attn_implementation(ATTENTION if tree else "sdpa")
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.ids, self.mask = case.rows()
        self.lengths = torch.full((len(self.ids),), LENGTH)
        self.advantages = torch.randn(self.ids.shape[0], 1, generator=torch.Generator().manual_seed(1))
        self.tokens = float(self.mask.sum())

    def __call__(self) -> None:
        """Forward, loss, backward, clipping, AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        for rows, logprobs in self._scored() if self.tree else self._scored_flat():
            mask = self.mask[rows]
            old = logprobs.detach() - 0.01
            scores = Scores(logprobs, old, self.advantages[rows].expand_as(mask), mask)
            per_token, _ = clip(token_log_ratio(logprobs, old, mask), scores, clip_low=0.2, clip_high=0.28)
            aggregate(per_token, mask, "token-mean", denominator=self.tokens).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def batches(self) -> Iterator[tuple[Tensor, TrainBatch]]:
        """Rows and what they are packed to."""
        for rows in micro_batches(self.ids, self.lengths, BUDGET):
            yield rows, pack(self.ids[rows], self.lengths[rows], self.mask[rows])

    def _scored(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows, batch in self.batches():
            yield rows, target_logprobs(self.model, batch)[0]

    def _scored_flat(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.arange(len(self.ids)).split(BUDGET // LENGTH):
            ids, mask = self.ids[rows], self.mask[rows]
            hidden = self.model.get_decoder()(ids, use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]
            logits = self.model.get_output_embeddings()(hidden)
            picked = logits.gather(1, ids[mask][:, None])[:, 0] - logits.logsumexp(-1)
            yield rows, torch.zeros(mask.shape).masked_scatter(mask, picked)


def sweep(rounds: int) -> tuple[list[Row], list[tuple[float, float]]]:
    """Time of all cases; the rows, and (share of unique tokens, time over flat's) of each."""
    rows, points = [], []
    model = small_model()
    for case in CASES:
        updates = {name: Update(copy.deepcopy(model), case, tree=name == "tree") for name in ("tree", "flat")}
        for warm_up in updates.values():
            warm_up()
        unique = sum(batch.token_ids.numel() for _, batch in updates["tree"].batches()) / updates["tree"].ids.numel()
        taken = interleave(rounds, {name: partial(measure, update) for name, update in updates.items()})
        time = ratio(taken["tree"], taken["flat"]).cpu
        points.append((unique, time))
        rows.append(_row(case, unique, time, taken["tree"]))
    return rows, points


def _row(case: Case, unique: float, time: float, taken: list[Seconds]) -> Row:
    label = f"sharing, {case.name}: unique {unique:.3f}, step {typical(taken).cpu:.2f} s, time / flat's, CPU"
    if unique > 0.999:
        return Row(label, time, "x", UNSHARED_BOUND)
    return Row(label, time, "x", round(BOUND * unique, 4) if unique <= 1 / 3 else None)


def memory() -> list[Row]:
    """Memory of some updates, and of log-probs at a large vocabulary; each in a process of its own."""
    rows = []
    for case in MEMORY:
        mib = {way: _raised(way, case.name) for way in ("tree", "flat")}
        rows += [Row(f"sharing, {case.name}: memory of the {way} update", x, "MiB") for way, x in mib.items()]
    mib = {way: _raised(way) for way in ("chunked", "plain")}
    rows += [Row(f"log-probs of {TARGETS} targets, {way}: memory", x, "MiB") for way, x in mib.items()]
    label = f"log-probs of {TARGETS} targets, vocabulary {LARGE_VOCABULARY}: memory, plain / chunked"
    return [*rows, Row(label, mib["plain"] / mib["chunked"], "x", 4.0, "higher")]


def _raised(*words: str) -> float:
    command = [sys.executable, __file__, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout)


def score_large(*, chunked: bool) -> None:
    """Log-probs and their gradient at the vocabulary of Qwen3, with a decoder that costs next to nothing."""
    model = small_model(LARGE_VOCABULARY)
    model.model.layers = model.model.layers[:1]
    ids = torch.randint(VOCABULARY, (TARGETS // LENGTH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if chunked:
        model.set_attn_implementation(ATTENTION)
        batch = pack(ids, torch.full((len(ids),), LENGTH + 1), mask)
        found = target_logprobs(model, batch)[0]
    else:
        model.set_attn_implementation("sdpa")
        logits = model(ids[:, :-1], use_cache=False).logits
        found = logits.log_softmax(-1).gather(2, ids[:, 1:, None])
    found.sum().backward()  # type: ignore[no-untyped-call]


def draw(points: list[tuple[float, float]], path: Path) -> None:
    """Time against tokens, both as a share of flat rows', with the bound."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 5), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color="#7F7F7F", linewidth=1, label="time = tokens")
        axes.plot([0, 1 / 3], [0, BOUND / 3], color="#D55E00", linestyle="--", label=f"bound, {BOUND:g} of it")
        axes.plot(
            [1], [UNSHARED_BOUND], "_", color="#D55E00", markersize=14, label=f"bound unshared, {UNSHARED_BOUND:g}"
        )
        axes.plot(*zip(*points, strict=True), "o", color="#0072B2", label="measured")
        axes.set(xlim=(0, 1.08), ylim=(0, 1.08), xlabel="unique tokens / tokens of flat rows")
        axes.set_ylabel("CPU time of an update / flat rows'")
        axes.set_title("What sharing saves in a learner step")
        axes.grid(color="#E6E6E6")
        axes.legend(frameon=False)
        figure.savefig(path, format="png")


def _status(name: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most; ``ru_maxrss`` would begin with the parent's."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        sys.exit(f"memory is read from /proc/self/status, which has no {name} here: run this on Linux")
    return int(found[1]) / 1024


def main() -> int:
    """Run one update and print how far it raised the memory over what the imports and the weights take."""
    way, *case = sys.argv[1:]
    torch.set_num_threads(1)
    if way in ("chunked", "plain"):
        work = partial(score_large, chunked=way == "chunked")
    else:
        work = Update(small_model(), next(c for c in CASES if c.name == case[0]), tree=way == "tree")
    small_model(8)  # imports what transformers imports lazily
    before = _status("VmRSS")
    work()
    print(_status("VmHWM") - before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
