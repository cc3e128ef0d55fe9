"""Is the sampler's policy the learner's? If not: which part of it would have to be an older one to explain that?

A probe (``agentrl.handover``) has the sampler write a few tokens. ``examine`` scores them with the learner, by the very
path that training takes, and holds the two against each other. How far apart may they be? As far as rounding takes
them, which is relative: a last digit of the largest logit in the dtype of the weights is one *rounding*, and a right
policy stays within ``TOLERANCE`` of them on average (``logprob.check_packable``, where both sides are the learner's
own). A sampler adds kernels of its own and batches of other shapes, but rounds the same numbers. In 16 bits adapters
cost one rounding more, because the sampler's weights are the rounded sum of what the learner keeps apart. Measured with
the hf sampler on random Qwen3 of 2 to 12 layers, logits up to 30, at temperatures 1 and 0.7: at most 0.03 of the bound
in fp32, 0.14 in bf16, 0.28 in bf16 with adapters; single tokens at most 1.7 times it.

Where they do not agree, ``interrogate`` puts the values that the sampler had before (``remember``) in the place of
some parameters, scores the same tokens again, and so on through everything that can go wrong with a hand-over. What
explains the sampler's log-probs is what happened. Every process does the same on its own shards; the parameters are
back, bit for bit, whatever happens on the way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from agentrl.learner import distributed
from agentrl.learner.experience import Experience, experience
from agentrl.learner.logprob import TOLERANCE
from agentrl.learner.lora import has_lora
from agentrl.learner.step import Learner
from agentrl.types import RolloutTree

LARGEST = 8.0
"""The largest difference of single tokens, and the mean one of entropies, may be this many times the mean's bound: the
errors of a token are those of sums over thousands of roundings, whose tails are short."""

UPDATE, ADAPTERS, TEMPERATURE = "update", "adapters", "temperature"

_LAYER = re.compile(r"(?:^|\.)(\w+\.\d+)\.(\w+)(\.[\w.]+)?$")


@dataclass(frozen=True, slots=True)
class Fit:
    """How near a policy comes to the sampler's, in nats.

    Attributes:
        mean: mean |difference| of the log-probs.
        largest: the largest.
        entropy: mean |difference| of the entropies; 0 where the sampler reports none.
        bound: what ``mean`` may be by the dtype of the weights.
    """

    mean: float
    largest: float
    entropy: float
    bound: float

    @property
    def agrees(self) -> bool:
        """Whether the log-probs are equal but for rounding."""
        return self.mean <= self.bound and self.largest <= LARGEST * self.bound

    @property
    def entropies_agree(self) -> bool:
        """The same of the entropies."""
        return self.entropy <= LARGEST * self.bound


@dataclass(frozen=True, slots=True)
class Examined:
    """What the learner makes of the sampler's tokens.

    Attributes:
        fit: how near the two are.
        moved: mean |difference| between the learner's log-probs of the anchor's tokens and those noted there.
        noted: the examined trees with the learner's log-probs in the place of the sampler's: an anchor for later.
    """

    fit: Fit
    moved: float
    noted: tuple[RolloutTree, ...]


@dataclass(frozen=True, slots=True)
class Suspect:
    """Something that may have gone wrong.

    Attributes:
        group: the parameters that are to blame, by a short name, or ``UPDATE``, ``ADAPTERS`` or ``TEMPERATURE``.
        says: what would have happened, in words.
        old: the parameters that would have their old values.
        temperature: what would have been sampled with; None: what was asked for.
        fit: how near it comes.
    """

    group: str
    says: str
    old: frozenset[str] = frozenset()
    temperature: float | None = None
    fit: Fit = Fit(math.inf, math.inf, math.inf, 0.0)


def remember(learner: Learner) -> None:
    """Keep the trained parameters, this process's part of them, in the memory of the CPU; all processes call it.

    It costs as many bytes as the parameters in training: with adapters those alone.
    """
    kept = learner.remembered
    for name, parameter in _trained(learner).items():
        if name in kept:
            kept[name].copy_(parameter)
        else:
            kept[name] = parameter.to("cpu", copy=True)


def examine(
    learner: Learner,
    trees: Sequence[RolloutTree],
    anchor: Sequence[RolloutTree] = (),
    *,
    temperature: float | None = None,
) -> Examined:
    """Score what the sampler wrote; all processes call it.

    Args:
        learner: this process's.
        trees: the sampler's, each a prompt and an answer.
        anchor: ``noted`` of an earlier policy, scored beside them.
        temperature: default: that of the configuration.
    """
    flat = experience(trees)
    with _largest_logit(learner) as seen:
        logprobs, entropies = learner.score(learner.model, flat, entropy=True, temperature=temperature)
    assert entropies is not None
    used = learner.config.sampler.temperature if temperature is None else temperature
    bound = _bound(learner, max(distributed.gather(float(seen))) / (used or 1.0), logprobs[flat.mask])
    gap = _gap(logprobs, flat)
    fit = Fit(float(gap.mean()), float(gap.max()), _entropy_gap(flat, entropies), bound)
    noted = tuple(_noting(tree, row[mask].tolist()) for tree, row, mask in zip(trees, logprobs, flat.mask, strict=True))
    moved = 0.0
    if anchor:  # by itself, so that its company changes no bit of what a resumed run scores without it
        then = experience(anchor)
        moved = float(_gap(learner.score(learner.model, then, temperature=temperature)[0], then).mean())
    return Examined(fit, moved, noted)


def interrogate(learner: Learner, trees: Sequence[RolloutTree]) -> tuple[Suspect, ...]:
    """Everything that could explain the log-probs of ``trees``, the likeliest first; all processes call it.

    What comes equally near by all that rounding lets one see stands in the order of ``suspects``: a simple story before
    one of two parts. It costs a forward pass for each: twice the groups and a few dozen.
    """
    with _swapping(learner) as wear:

        def judge(suspect: Suspect) -> Suspect:
            wear(suspect.old)
            with learner.model.disable_adapter() if suspect.group == ADAPTERS else nullcontext():
                return replace(suspect, fit=examine(learner, trees, temperature=suspect.temperature).fit)

        found = [judge(suspect) for suspect in suspects(learner)]
        groups = parameter_groups(learner)
        alone = [suspect for suspect in found if suspect.group in groups]
        if alone and not any(suspect.fit.agrees for suspect in found):
            nearest = min(alone, key=lambda suspect: suspect.fit.mean).group
            found += [judge(suspect) for suspect in _parts(nearest, groups[nearest])]
    # Of two different policies one is always a little nearer at some temperature, which says nothing.
    found = [suspect for suspect in found if suspect.group != TEMPERATURE or suspect.fit.agrees]
    best = min((suspect.fit.mean for suspect in found if math.isfinite(suspect.fit.mean)), default=math.inf)
    first = [suspect for suspect in found if suspect.fit.mean <= 1.5 * best + suspect.fit.bound / 50]
    return (*first, *sorted((s for s in found if s not in first), key=lambda suspect: suspect.fit.mean))


def suspects(learner: Learner) -> Iterator[Suspect]:
    """What could have gone wrong, simple things first; neighbours differ in few parameters."""
    if has_lora(learner.model):
        yield Suspect(ADAPTERS, "the adapters are ignored: the sampler has the policy that they were put into")
    asked = learner.config.sampler.temperature
    for value in sorted({n / 10 for n in range(1, 21)} | {asked * asked}):
        if value not in (0, asked):
            yield Suspect(TEMPERATURE, f"the log-probs are those of temperature {value:g}", temperature=value)
    if not learner.remembered:
        return
    groups = parameter_groups(learner)
    yield Suspect(UPDATE, "the update was lost: the sampler has the weights of before", frozenset(learner.remembered))
    for group, names in groups.items():
        yield Suspect(group, f"{group} of the sampler is that of before the update", frozenset(names))
    for kind, names in _kinds(learner.remembered).items():
        yield Suspect(kind, f"{kind} of the sampler is that of before the update", frozenset(names))
    listed = list(groups)
    for number, group in list(enumerate(listed))[1:-1]:
        old = frozenset(name for each in listed[number:] for name in groups[each])
        yield Suspect(group, f"the weights are half loaded: from {group} on they are those of before the update", old)
    for number, group in list(enumerate(listed))[1:-1]:
        old = frozenset(name for each in listed[: number + 1] for name in groups[each])
        yield Suspect(group, f"the weights are half loaded: up to {group} they are those of before the update", old)


def _parts(group: str, names: Sequence[str]) -> Iterator[Suspect]:
    """What may have happened within a group: its first or its last parameters were forgotten, or one of them."""
    count = len(names)
    ranges = (
        {(0, n) for n in range(1, count)} | {(n, count) for n in range(1, count)} | {(n, n + 1) for n in range(count)}
    )
    for begin, end in sorted(ranges):
        shown = ", ".join(name.removesuffix(".weight") for name in names[begin:end])
        yield Suspect(
            group, f"of {group}, {shown} of the sampler are those of before the update", frozenset(names[begin:end])
        )


def parameter_groups(learner: Learner) -> dict[str, list[str]]:
    """The trained parameters by the parts of the model that they belong to, in the order of ``named_parameters``.

    ``embedding``, ``layers.0.self_attn``, ``layers.0.mlp``, ``layers.0 norms``, ..., ``norm``, ``head``; one group
    ``embedding and head`` where they are tied.
    """
    model = learner.model
    embedding, head = (part().weight for part in (model.get_input_embeddings, model.get_output_embeddings))
    groups: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter is embedding:
            group = "embedding and head" if embedding is head else "embedding"
        elif parameter is head:
            group = "head"
        elif match := _LAYER.search(name):
            group = f"{match[1]} norms" if "norm" in match[2] else f"{match[1]}.{match[2]}"
        else:
            group = name.rpartition(".")[0].rpartition(".")[2] or name
        groups.setdefault(group, []).append(name)
    return groups


def _kinds(names: Iterable[str]) -> dict[str, list[str]]:
    """Parameters of all layers that belong together, as an engine that packs them may forget them together."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        if match := _LAYER.search(name):
            part = "norms" if "norm" in match[2] else match[2]
            kinds.setdefault(f"{part} of all layers", []).append(name)
            kinds.setdefault(f"{match[2]}{match[3] or ''} of all layers", []).append(name)
    return kinds


# -- scoring ----------------------------------------------------------------------------------------------------------


def _bound(learner: Learner, largest: float, logprobs: Tensor) -> float:
    """What ``Fit.mean`` may be: ``TOLERANCE`` roundings of the largest logit in the coarsest dtype of the weights."""
    dtype = max((p.dtype for p in learner.model.parameters()), key=lambda dtype: torch.finfo(dtype).eps)
    fine = torch.finfo(torch.float32).eps
    rounding = max(torch.finfo(dtype).eps, fine) * largest + fine * float(logprobs.abs().max())
    merged = 1.0 if has_lora(learner.model) and dtype.itemsize < 4 else 0.0
    return (TOLERANCE[dtype] + merged) * rounding


@contextmanager
def _largest_logit(learner: Learner) -> Iterator[Tensor]:
    """The largest |logit|, untempered, that the head gives meanwhile, [] float32."""
    seen = torch.zeros((), device=learner.device)

    def look(module: Any, inputs: Any, logits: Tensor) -> None:
        if logits.numel():
            torch.maximum(seen, logits.detach().abs().max().float(), out=seen)

    handle = learner.model.get_output_embeddings().register_forward_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def _gap(logprobs: Tensor, flat: Experience) -> Tensor:
    """|Difference| to those in ``flat``, of its policy tokens in a row."""
    return (logprobs - flat.sampled_logprobs)[flat.mask].abs()


def _entropy_gap(flat: Experience, entropies: Tensor) -> float:
    reported = flat.entropies[flat.mask]
    if bool(reported.isnan().all()):
        return 0.0
    return float((entropies[flat.mask] - reported).abs().mean())


def _noting(tree: RolloutTree, logprobs: Sequence[float]) -> RolloutTree:
    *above, answer = tree.nodes
    return replace(tree, nodes=(*above, replace(answer, logprobs=tuple(logprobs))))


# -- old values for new -----------------------------------------------------------------------------------------------


def _trained(learner: Learner) -> dict[str, Tensor]:
    """The parameters in training by name, live; of shards this process's."""
    named = ((name, p.detach()) for name, p in learner.model.named_parameters() if p.requires_grad)
    return {name: p.to_local() if isinstance(p, DTensor) else p for name, p in named}


@contextmanager
def _swapping(learner: Learner) -> Iterator[Any]:
    """Gives a function that lets the parameters it is told have their remembered values, and all others their own."""
    live, old = _trained(learner), learner.remembered
    own = {name: parameter.to("cpu", copy=True) for name, parameter in live.items()}
    worn: frozenset[str] = frozenset()

    def put(names: Iterable[str], values: Mapping[str, Tensor]) -> None:
        for name in names:
            live[name].copy_(values[name])

    def wear(names: frozenset[str]) -> None:
        nonlocal worn
        put(names - worn, old)
        put(worn - names, own)
        worn = names

    try:
        yield wear
    finally:
        put(live, own)
