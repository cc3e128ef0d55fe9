"""``agentrl replay``: a recorded tree grown again from its seeds, and the first thing that comes out otherwise.

Tokens are sampled again where the weights that wrote them are still there, else they are the recorded ones. Tools
answer from the record, for an index of today may not be that of then, or run again (``live``). Everything else is
computed again: rendering, parsing, rewards, decisions. docs/replay.md says what is compared when.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agentrl.assemble import env_factory, local_actors, make_renderer, sampling_params
from agentrl.config import RunConfig
from agentrl.env import ToolEnv
from agentrl.errors import UserError
from agentrl.recorded import Found, any_policy, changed_versions, find_weights
from agentrl.rollout.answers import Answers
from agentrl.rollout.follow import Follow
from agentrl.rollout.policies import POLICIES
from agentrl.rollout.record import Name, Record, Turn, dotted, turns, unfinished
from agentrl.rollout.scheduler import Scheduler
from agentrl.rollout.writer import TokenWriter
from agentrl.sampler.recorded import RecordedSampler
from agentrl.sandbox.shared import close_shared_sandboxes
from agentrl.tree_diff import Difference, describe, first_difference
from agentrl.types import ForkLevel, RolloutTree

TOLERANCE = 1e-4
"""Of log-probs and entropies, in nats, where the sampler does not give the same bits every time."""
PATIENCE = 10
"""By how much longer than ``rollout.deadline`` a trajectory may take: what was in time then shall not fail now."""

TOKENS = "tokens, log-probs and entropies are the record's own; all that follows from them was computed"
BITS = f"this sampler does not give the same bits every time: log-probs are compared within {TOLERANCE:g}"
CLOCK = "a budget of seconds may stop a call that is paid for: what the whole tree spent is not compared"
DRAWS = (
    "which states were drawn and which leaves were pruned is as recorded, and not compared: what was pruned is not in "
    "the record (--live plays it again, where no budget cut it)"
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a replay found.

    Attributes:
        rollout: which tree.
        difference: the first one; None: none.
        nodes: compared, of the record.
        tokens: in those.
        leaves: of the record.
        decisions: of the record.
        notes: what was not compared, or not in the strictest way.
        text: (recorded, now) around a different token.
    """

    rollout: str
    difference: Difference | None
    nodes: int
    tokens: int
    leaves: int
    decisions: int
    notes: tuple[str, ...]
    text: tuple[str, str] = ("", "")

    def to_json(self) -> dict[str, Any]:
        """As ``--json`` writes it."""
        return {"identical": self.difference is None, **asdict(self)}

    def lines(self) -> list[str]:
        """As it is printed."""
        notes = [f"note: {note}" for note in self.notes]
        if self.difference is None:
            counts = f"{self.nodes} nodes, {self.tokens} tokens, {self.leaves} leaves, {self.decisions} decisions"
            return [*notes, f"identical: {counts}"]
        return [*notes, *describe(self.difference, self.text)]


async def replay(found: Found, *, recorded_tokens: bool = False, live: bool = False) -> Verdict:
    """Grow ``found`` again and compare.

    Args:
        found: a recorded tree.
        recorded_tokens: take the recorded tokens, not those of the weights of then.
        live: run the tools again.

    Raises:
        UserError: the weights are not there any more, or there is no single version of them.
    """
    tree, limits = found.tree, found.config.rollout
    if not tree.leaves:
        raise UserError(f"rollout {found.rollout} has no leaves: the budget was spent before it began.")
    keeps, complete = POLICIES[limits.policy].keeps, not _failures(tree)
    # What was pruned is in no record: neither its tool results, nor where a budget cut it.
    follow = keeps and (not live or recorded_tokens or not complete or bool(limits.task_budget or limits.step_budget))
    timed = "seconds" in limits.task_budget or "seconds" in limits.step_budget
    record = Record.of(tree, keeps, pruned=keeps and not follow)
    written = list(turns(tree, keeps))
    answers = Answers({(turn.owner, turn.number): turn for turn in written}, keeps)
    config, version = _patient(found.config), next(iter(found.versions), 0)
    playing = _recording(config, any_policy(found), written) if recorded_tokens else None
    async with playing or _sampling(config, find_weights(found), version) as (scheduler, decode, deterministic):
        again = await scheduler.regrow(
            tree,
            record,
            policy=Follow(names=tuple(leaf.name for leaf in tree.leaves)) if follow else None,
            prepare=None if live else answers.prepare,
        )
    lost = _lost(tree) if recorded_tokens else set()
    difference = first_difference(
        tree,
        again,
        tolerance=0.0 if deterministic else TOLERANCE,
        unfinished={leaf.name for leaf in tree.leaves if unfinished(tree, leaf)},
        lost=lost,
        whole=complete and not follow and not record.hidden and not timed,
    )
    notes = [*changed_versions(found.run), *([] if live else _played_live(env_factory(found.config)()))]
    notes += [TOKENS] if recorded_tokens else [] if deterministic else [BITS]
    notes += [*([DRAWS] if follow else []), *([CLOCK] if timed else []), *_failures(tree)]
    notes += [f"leaf {dotted(name)} began in a turn that its parent never finished: not played" for name in lost]
    around = ((), ()) if difference is None else (difference.recorded_ids, difference.replayed_ids)
    tokens = sum(len(node.token_ids) for node in tree.nodes)
    counts = len(tree.nodes), tokens, len(tree.leaves), len(tree.decisions)
    return Verdict(found.rollout, difference, *counts, tuple(notes), (decode(around[0]), decode(around[1])))


def _patient(config: RunConfig) -> RunConfig:
    """``config`` for a replay: what was in time then shall not be late now, and what fails is a difference."""
    limits = config.rollout.model_copy(update={"deadline": config.rollout.deadline * PATIENCE, "retries": 0})
    return config.model_copy(update={"rollout": limits})


@asynccontextmanager
async def _sampling(config: RunConfig, weights: Path, version: int) -> AsyncIterator[tuple[Scheduler, Any, bool]]:
    """A scheduler, what makes text of tokens, and whether tokens come bit for bit; from the policy in ``weights``."""
    from agentrl.learner.checkpoint import load_policy

    model, tokenizer = load_policy(weights, config.policy.device, config.policy.dtype)
    async with local_actors(config, model, tokenizer, weights, version) as actors:
        yield actors.scheduler, _decoder(tokenizer), actors.sampler.deterministic


@asynccontextmanager
async def _recording(
    config: RunConfig, policy: Path, written: Sequence[Turn]
) -> AsyncIterator[tuple[Scheduler, Any, bool]]:
    """The same, from the record; ``policy`` is for its tokenizer."""
    from transformers import AutoConfig

    from agentrl.learner.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(policy)
    renderer, params = make_renderer(config, tokenizer), sampling_params(config)
    positions = getattr(AutoConfig.from_pretrained(policy), "max_position_embeddings", None)
    limit = config.sampler.max_length
    sampler = RecordedSampler(written, min(limit, positions or limit))
    try:
        yield (
            Scheduler(
                env_factory(config), lambda seed: TokenWriter(sampler, renderer, params, seed), config.rollout, params
            ),
            _decoder(tokenizer),
            True,
        )
    finally:
        await close_shared_sandboxes()


def _decoder(tokenizer: Any) -> Any:
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _failures(tree: RolloutTree) -> list[str]:
    """What of ``tree`` failed for reasons that need not come again."""
    failed = [leaf for leaf in tree.leaves if unfinished(tree, leaf)]
    notes = [f"leaf {dotted(leaf.name)} ended with {leaf.outcome}: compared as far as it got" for leaf in failed]
    counts = {
        "dropped": "branches that failed are not in the record, and were not begun again",
        "forks_failed": "forks that failed were not tried again",
        "retried": "attempts that failed before a root was played again are not in the record",
    }
    return notes + [f"{tree.spent[what]:.0f} {why}" for what, why in counts.items() if tree.spent.get(what)]


def _played_live(env: Any) -> list[str]:
    """What does not come from the record although tools answer from it."""
    if not isinstance(env, ToolEnv):
        return [f"{type(env).__name__} is no ToolEnv: it was played again live, not from the record"]
    tools = [made.name for made in env.make_tools() if made.fork_level is not ForkLevel.COPY]
    return [
        f"tool {name} has a state, and the policy's calls were answered without changing it; what the environment does "
        "with it by itself, in setup, step or reward, was done live. --live runs the calls"
        for name in tools
    ]


def _lost(tree: RolloutTree) -> set[Name]:
    """Leaves that began in a turn that their parent never finished: without its tokens, nothing starts them."""
    turns_of = {
        leaf.name: sum(node.author == "policy" for node in tree.path(leaf))
        for leaf in tree.leaves
        if unfinished(tree, leaf)
    }
    begun = [
        (*each.name, each.turn)
        for each in tree.decisions
        if each.granted and each.signal is not None and each.turn >= turns_of.get(each.name, each.turn + 1)
    ]
    return {leaf.name for leaf in tree.leaves if any(leaf.name[: len(name)] == name for name in begun)}
