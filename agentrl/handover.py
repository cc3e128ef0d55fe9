"""From the learner to the sampler: new weights, and the proof that they arrived.

Weights that never reached the sampler are the most expensive bug of this trade: everything runs, and the policy learns
from answers of another one. So every hand-over ends with a probe. The sampler continues a few prompts, always the same,
through the very interface that rollouts use, with their temperature; the learner scores those tokens by the very path
that training takes; both have to say the same within the roundings of the dtype (``learner.suspects``). Where they do
not, the run stops and the message names what is to blame, found by trying what could have happened.

The prompts are long enough to fill blocks of a prefix cache, and are put there right before the weights change:
keys and values that an engine wrongly keeps show at once. At start-up the probe is made too, before the first rollout.

What a probe cannot see: an update that changes log-probs by less than rounding does. ``probe/moved`` says by how much
the policy has moved since the last hand-over that was proven, or the last checkpoint; ``probe/bound`` by how much two
equal policies may differ. A lost update shows where ``moved`` exceeds ``bound``. In bf16, at the learning rates of
policy gradients, that takes many updates, and a sampler that loses all of them is found when they add up to it: a
hand-over that could not be told from a lost one does not replace the weights that the sampler is suspected to have.
Where an engine can, ``update_weights`` itself checks the bytes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from agentrl._together import in_thread, together
from agentrl.config import RunConfig
from agentrl.errors import PolicyMismatch
from agentrl.learner import suspects
from agentrl.learner.leader import Leader
from agentrl.learner.suspects import Examined, Fit, Suspect
from agentrl.sampler.base import Sampler
from agentrl.seeds import derive_seed
from agentrl.types import Completion, Leaf, Node, Outcome, RolloutTree, SamplingParams, Task

Metrics = dict[str, float | None]

TOKENS = 8
"""Sampled after each prompt."""
LENGTHS = (3, 20, 60, 110, 160)
"""Tokens of the prompts, where the sampler takes so many. Blocks of a prefix cache have 8 (hf) to 128 (vLLM, CPU)."""

CAUSES = {
    suspects.UPDATE: "update_weights returned and the engine samples from the weights of before: look at its transport "
    "and at sampler.urls, which may name another server than the one that was updated.",
    suspects.ADAPTERS: "update_weights has to be given the merged weights, or the engine the adapters of this version.",
    suspects.TEMPERATURE: "The sampler has to report log-probs of the distribution that it sampled from, tempered by "
    "sampler.temperature.",
    "prefix cache": "prompts that it has never seen agree, those of the probe before do not: the engine keeps keys and "
    "values of the weights before. update_weights has to reset the prefix cache.",
    "version": "update_weights has to set the version that its tokens carry.",
    "entropies": "the log-probs agree, the entropies do not: they have to be those of the whole tempered distribution, "
    "in nats.",
}
"""What ``PolicyMismatch.group`` may say beside a group of parameters, and what to do about it."""

_RELOAD = "The engine did not load these parameters: look for names that it maps, fuses or ties in another way."
_LOOK = (
    "Check that the sampler was started from the learner's policy, with its tokenizer, in its dtype (policy.dtype) and "
    "with sampler.temperature, and that nobody else gives it weights."
)


class Handover:
    """Gives the learner's weights to the sampler, and proves that it has them.

    Args:
        sampler: whom rollouts ask. Nothing else should be asked of it meanwhile.
        leader: the learner.
        config: the run's configuration.

    Attributes:
        versions: those that the sampler has had, oldest first; the last one is the learner's.
        adapters: whether LoRA adapters alone are handed over; the sampler has none before the first time.
    """

    def __init__(self, sampler: Sampler, leader: Leader, config: RunConfig) -> None:
        self.sampler, self.leader = sampler, leader
        self.versions = [sampler.version]
        self.adapters = config.sampler.transport == "adapter"
        self._params = SamplingParams(TOKENS, config.sampler.temperature, config.sampler.top_p)
        self._prompts = self._draw("")
        self._proven: tuple[RolloutTree, ...] = ()
        self._latest: tuple[RolloutTree, ...] = ()

    async def __call__(self, version: int) -> Metrics:
        """Hand the weights over as ``version``, then ``probe``.

        Raises:
            SamplerError: the sampler does not take them.
            PolicyMismatch: it does not have them now; ``group`` is what is to blame.
        """
        began = time.perf_counter()
        await self._play(self._prompts, replace(self._params, max_tokens=1))  # into the prefix cache
        warmed = time.perf_counter() - began
        await self._send(version)
        if version != self.versions[-1]:
            self.versions.append(version)
        began = time.perf_counter()
        metrics = await self.probe()
        return metrics | {"time/probe": warmed + time.perf_counter() - began}

    async def _send(self, version: int) -> None:
        if not self.adapters:
            await self.sampler.update_weights(await in_thread(self.leader.weights), version)
            return
        with TemporaryDirectory(prefix="agentrl-") as folder:
            await in_thread(self.leader.save_adapter, Path(folder))
            await self.sampler.update_weights(Path(folder), version)

    async def probe(self) -> Metrics:
        """Compare the sampler with the learner as they are.

        Returns:
            ``probe/mean`` and ``probe/max``, differences of log-probs in nats; ``probe/bound``, what the mean may be;
            ``probe/moved``, the learner's own mean difference since the last hand-over that could be told from a lost
            one, or the last ``settle``; ``time/probe``, seconds.

        Raises:
            PolicyMismatch: they differ; ``group`` is what is to blame, ``sample`` the tokens.
        """
        began = time.perf_counter()
        trees = await self._play(self._prompts, self._params)
        found = await self._examine(trees, self._proven)
        if not found.fit.agrees:
            raise _with_sample(await self._explain(found.fit), trees, found)
        written = {version for tree in trees for node in tree.nodes for version in node.policy_version}
        if written != {self.versions[-1]} or self.sampler.version != self.versions[-1]:
            shown = ", ".join(map(str, sorted(written)))
            text = f"has the learner's weights but says they are version {self.sampler.version}, its tokens {shown}"
            raise _with_sample(_mismatch("version", f"{text}; expected {self.versions[-1]}"), trees, found)
        if not found.fit.entropies_agree:
            text = f"differs in its entropies by {found.fit.entropy:.3g} nats on average"
            raise _with_sample(_mismatch("entropies", text), trees, found)
        self._latest = found.noted
        # Had the weights been lost, the gap would be as large as ``moved``: so these are the new ones.
        if not self._proven or found.moved > 2 * found.fit.bound:
            await self.settle()
        return {
            "probe/mean": found.fit.mean,
            "probe/max": found.fit.largest,
            "probe/bound": found.fit.bound,
            "probe/moved": found.moved,
            "time/probe": time.perf_counter() - began,
        }

    async def settle(self) -> None:
        """Take the last probe as proof in any case; at a checkpoint, beyond which a resumed run knows nothing."""
        if self._proven is not self._latest:
            await in_thread(self.leader.run, suspects.remember)
            self._proven = self._latest

    async def _explain(self, fit: Fit) -> PolicyMismatch:
        """Why the sampler differs from the learner by ``fit``."""
        differs = (
            f"differs from the learner by {fit.mean:.3g} nats a token on average and {fit.largest:.3g} at most, "
            f"expected {fit.bound:.3g} and {suspects.LARGEST * fit.bound:.3g} by the dtype of the weights"
        )
        fresh = await self._play(self._draw(time.time_ns()), self._params)
        unseen = (await self._examine(fresh)).fit
        # Clearly so: what rounding hides by a hair is not healthy on other tokens.
        if unseen.agrees and unseen.mean < fit.mean / 2:
            return _mismatch("prefix cache", differs)
        ranked = await in_thread(self.leader.run, suspects.interrogate, fresh)
        if not ranked or not ranked[0].fit.mean < 0.8 * unseen.mean:
            return _mismatch("", f"{differs}. Nothing that was tried explains it")
        first = ranked[0]
        if not first.fit.agrees:
            near = f"This comes nearest: {first.says}; it leaves {first.fit.mean:.3g} and so is not all of it"
            return _mismatch(first.group, f"{differs}. {near}")
        others = [other.group for other in ranked[1:4] if _rivals(other, first)]
        also = f" (or {', '.join(others)}, which cannot be told from it)" if others else ""
        return _mismatch(first.group, f"{differs}. This explains it: {first.says}{also}")

    async def _examine(self, trees: Sequence[RolloutTree], anchor: Sequence[RolloutTree] = ()) -> Examined:
        return await in_thread(self.leader.run, suspects.examine, trees, anchor)

    async def _play(self, prompts: Sequence[tuple[int, ...]], params: SamplingParams) -> list[RolloutTree]:
        asked = (self.sampler.sample(prompt, replace(params, seed=seed)) for seed, prompt in enumerate(prompts))
        return [_tree(prompt, answer) for prompt, answer in zip(prompts, await together(*asked), strict=True)]

    def _draw(self, salt: int | str) -> list[tuple[int, ...]]:
        """A prompt of each length, of tokens from all of the vocabulary."""
        rng, tokens = random.Random(derive_seed("probe", salt)), range(self.leader.learner.vocabulary)
        longest = max(self.sampler.max_length - TOKENS, 1)
        return [tuple(rng.choices(tokens, k=min(length, longest))) for length in LENGTHS]


def _rivals(other: Suspect, first: Suspect) -> bool:
    """Whether ``other`` explains the tokens as well, and is another story."""
    equal = other.fit.mean <= 1.5 * first.fit.mean + first.fit.bound / 50
    return equal and other.fit.agrees and other.group != first.group


def _tree(prompt: tuple[int, ...], answer: Completion) -> RolloutTree:
    """As a rollout, which is what the learner scores."""
    written = Node(0, "policy", answer.token_ids, answer.logprobs, answer.entropies, answer.policy_version)
    return RolloutTree(Task("probe"), (Node(-1, "prompt", prompt), written), (Leaf(1, 0.0, Outcome.ANSWERED),))


def _mismatch(group: str, text: str) -> PolicyMismatch:
    advice = CAUSES.get(group, _RELOAD) if group else _LOOK
    error = PolicyMismatch(f"the sampler {text}. {advice[0].upper()}{advice[1:]}")
    error.group = group
    return error


def _with_sample(error: PolicyMismatch, trees: Sequence[RolloutTree], found: Examined) -> PolicyMismatch:
    error.sample = [
        {
            "prompt": tree.nodes[0].token_ids,
            "token_ids": tree.nodes[1].token_ids,
            "sampler": tree.nodes[1].logprobs,
            "learner": noted.nodes[1].logprobs,
            "policy_version": tree.nodes[1].policy_version,
        }
        for tree, noted in zip(trees, found.noted, strict=True)
    ]
    return error
