"""Packing is an optimisation only: random forests give the log-probs, losses and gradients of plain rows."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.learner._old_pack import ATTENTION, Trajectory, flatten, micro_batches, pack, target_logprobs
from agentrl.types import Leaf, Node, Outcome, RolloutTree, StopReason, Task

VOCABULARY = 448


@st.composite
def forests(draw):
    """Trajectories grown as a tree: some branch off an earlier one, some repeat it, some begin anew."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(["wide", "deep", "mixed", "single", "tiny"]))
    count = {"wide": 10, "deep": 6, "mixed": 7, "single": 1, "tiny": 3}[shape]
    spans = {"wide": 3, "deep": 8, "mixed": 5, "single": 5, "tiny": 1}[shape]
    vocabulary = draw(st.sampled_from([2, 5, VOCABULARY]))  # few tokens: siblings meet by chance
    forest: list[Trajectory] = []
    for _ in range(draw(st.integers(1, count))):
        ids, policy = [], []
        if forest and rng.random() < 0.8:
            trunk = rng.choice(forest)
            cut = rng.choice([len(trunk.token_ids), rng.randint(1, len(trunk.token_ids))])
            ids, policy = list(trunk.token_ids[:cut]), list(trunk.policy[:cut])
        for _ in range(rng.randint(0 if ids else 1, spans)):
            length = rng.choice([1, 1, 2, 3, 7, 20 if shape == "deep" else 5])
            ids += [rng.randrange(vocabulary) for _ in range(length)]
            policy += [rng.random() < 0.6] * length
        old = tuple(rng.uniform(-5, 0) if own else 0.0 for own in policy)
        forest.append(Trajectory(tuple(ids), tuple(policy), old, rng.uniform(-2, 2)))
    return forest


def flat_logprobs(model, trajectory, temperature):
    """[T] of one row through transformers' own attention; 0 where the policy did not write."""
    ids = torch.tensor([trajectory.token_ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
    picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return torch.cat([picked.new_zeros(1), picked]) * torch.tensor(trajectory.policy)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def weigh(logprobs, trajectory):
    """A loss that treats every token differently, so that a mix-up cannot cancel out."""
    weights = trajectory.advantage * torch.cos(torch.arange(logprobs.shape[0]) * 0.7 + trajectory.advantage)
    return (weights * logprobs * torch.tensor(trajectory.policy)).sum()


def packed_loss(model, forest, temperature):
    logprobs = target_logprobs(model, pack(forest), temperature)
    return sum(weigh(row[: len(t.token_ids)], t) for row, t in zip(logprobs, forest, strict=True))


@pytest.fixture(scope="module")
def models(random_model):
    """(packed, plain) in fp32, and the same in float64."""
    pairs = {}
    for dtype in (torch.float32, torch.float64):
        packed, plain = (copy.deepcopy(random_model).to(dtype).train() for _ in range(2))
        packed.set_attn_implementation(ATTENTION)
        plain.set_attn_implementation("sdpa")
        pairs[dtype] = packed, plain
    return pairs


def relative(found, expected):
    """Largest difference over the largest magnitude, over all parameters together."""
    scale = max(float(g.abs().max()) for g in expected.values())
    return max(float((found[n] - g).abs().max()) for n, g in expected.items()) / max(scale, 1e-3)


@settings(max_examples=40)
@given(forests(), st.sampled_from([1.0, 0.7]))
def test_loss_and_gradients_are_those_of_flat_rows(models, forest, temperature):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):  # the models' norms stay in fp32
        packed, plain = models[dtype]
        rows = [flat_logprobs(plain, t, temperature) for t in forest]
        expected = sum(weigh(row, t) for row, t in zip(rows, forest, strict=True))
        batch = pack(forest)
        logprobs = target_logprobs(packed, batch, temperature)
        for row, flat, trajectory in zip(logprobs, rows, forest, strict=True):
            length = len(trajectory.token_ids)
            assert torch.allclose(row[1:length], flat[1:].float(), atol=2e-5)
            assert not row[length:].any()
        assert float(packed_loss(packed, forest, temperature).detach()) == pytest.approx(
            float(expected.detach()), rel=1e-5, abs=1e-4
        )
        found = gradients(packed, packed_loss(packed, forest, temperature))
        assert relative(found, gradients(plain, expected)) < tolerance


@settings(max_examples=15)
@given(forests(), st.integers(1, 120))
def test_micro_batches_of_any_size_add_up(models, forest, max_tokens):
    packed, _ = models[torch.float32]
    whole = gradients(packed, packed_loss(packed, forest, 1.0))
    packed.zero_grad(set_to_none=True)
    for part in micro_batches(forest, max_tokens):
        loss = packed_loss(packed, part, 1.0)
        if loss.requires_grad:
            loss.backward()
    total = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in packed.named_parameters()}
    assert relative(total, whole) < 1e-5


@given(forests(), st.integers(1, 60))
def test_micro_batches_keep_order_and_limit(forest, max_tokens):
    parts = list(micro_batches(forest, max_tokens))
    assert [t for part in parts for t in part] == forest
    for part in parts:
        assert part
        assert len(part) == 1 or pack(part).token_ids.shape[1] <= max_tokens


@given(forests())
def test_every_unique_token_stands_once(forest):
    batch = pack(forest)
    prefixes = {t.token_ids[: n + 1] for t in forest for n in range(len(t.token_ids))}
    assert batch.token_ids.shape == batch.position_ids.shape == (1, len(prefixes))
    targets = {t.token_ids[: n + 1] for t in forest for n in range(1, len(t.token_ids)) if t.policy[n]}
    assert batch.target_ids.shape == batch.parent_index.shape == (len(targets),)
    assert batch.mask.sum() == sum(sum(t.policy[1:]) for t in forest)
    ids, positions = batch.token_ids[0], batch.position_ids[0]
    flat = torch.cat([block.flatten() for block in batch.blocks])
    assert torch.equal(flat[batch.first], torch.arange(len(prefixes)))
    for row, trajectory in enumerate(forest):
        for depth, own in enumerate(trajectory.policy):
            assert bool(batch.mask[row, depth]) == (own and depth > 0)
            if own and depth:
                target = batch.gather[row, depth]
                assert batch.target_ids[target] == trajectory.token_ids[depth]
                parent = batch.parent_index[target]
                assert (ids[parent], positions[parent]) == (trajectory.token_ids[depth - 1], depth - 1)
                assert batch.old_logprobs[row, depth] == pytest.approx(trajectory.old_logprobs[depth], rel=1e-6)


@given(forests())
def test_an_output_is_taken_from_a_real_place_never_from_padding(forest):
    """A row's padding repeats its last token and would attend to it twice."""
    batch = pack(forest)
    lengths = sorted((len(t.token_ids) for t in forest), reverse=True)
    real = torch.cat(
        [(torch.arange(b.shape[1]) < torch.tensor(take(lengths, len(b)))[:, None]).flatten() for b in batch.blocks]
    )
    assert real[batch.first].all()
    padding = sum(b.numel() for b in batch.blocks) - sum(len(t.token_ids) for t in forest)
    assert padding * 4 <= sum(b.numel() for b in batch.blocks), "at most a quarter"


def take(lengths, count):
    taken, lengths[:count] = lengths[:count], []
    return taken


def test_an_output_is_taken_from_a_real_place_in_a_large_batch_too():
    """So large that torch splits the work between threads, whose order nothing may hang on."""
    rng = random.Random(0)
    long = tuple(rng.randrange(VOCABULARY) for _ in range(400))
    forest = [
        Trajectory(long[: 300 + n % 101], (True,) * (300 + n % 101), (0.0,) * (300 + n % 101)) for n in range(300)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for _ in range(3):
            test_an_output_is_taken_from_a_real_place_never_from_padding.hypothesis.inner_test(forest)
    finally:
        torch.set_num_threads(threads)


def test_the_first_token_of_a_branch_is_supervised(models):
    """Two siblings part at once after a shared prompt; both first tokens hang on the prompt's last hidden state."""
    prompt = (5, 6, 7)
    forest = [Trajectory((*prompt, n), (False, False, False, True), (0.0, 0.0, 0.0, -1.0), 1.0) for n in (8, 9)]
    batch = pack(forest)
    assert batch.token_ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.parent_index.tolist() == [2, 2]
    packed, plain = models[torch.float32]
    logprobs = target_logprobs(packed, batch)
    expected = plain(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[[8, 9]]
    assert torch.allclose(logprobs[:, 3], expected, atol=1e-6)


def test_temperature_zero_is_scored_untempered_as_the_sampler_does(models):
    forest = [Trajectory((1, 2, 3), (False, True, True), (0.0, -1.0, -1.0))]
    packed, _ = models[torch.float32]
    batch = pack(forest)
    assert torch.equal(target_logprobs(packed, batch, 0.0), target_logprobs(packed, batch, 1.0))


# -- from trees -------------------------------------------------------------------------------------------------------


def tree(*, last, outcome, reward=1.0):
    nodes = (
        Node(-1, "prompt", (1, 2)),
        Node(0, "policy", (3, 4), (-0.5, -0.25), (1.0, 1.0), (0, 0), stop_reason=StopReason.STOP),
        Node(1, "tool", (5,)),
        *last,
    )
    return RolloutTree(Task("t"), nodes, (Leaf(len(nodes) - 1, reward, outcome),))


ANSWER = Node(2, "policy", (6,), (-0.125,), (1.0,), (0,), stop_reason=StopReason.STOP)
CUT = Node(2, "policy", (6,), (-0.125,), (1.0,), (0,), stop_reason=StopReason.LENGTH)


def test_flatten_marks_what_the_policy_wrote():
    found = tree(last=(ANSWER,), outcome=Outcome.ANSWERED)
    assert flatten(found, found.leaves[0], 0.5) == Trajectory(
        (1, 2, 3, 4, 5, 6),
        (False, False, True, True, False, True),
        (0.0, 0.0, -0.5, -0.25, 0.0, -0.125),
        0.5,
        False,
    )


@pytest.mark.parametrize(
    ("last", "outcome", "truncated"),
    [
        ((CUT,), Outcome.LENGTH, True),
        ((), Outcome.LENGTH, True),  # the budget was used up by the tool's result: no room for another turn
        ((), Outcome.TURN_LIMIT, False),
    ],
)
def test_what_the_token_budget_cut_off_is_truncated(last, outcome, truncated):
    found = tree(last=last, outcome=outcome)
    assert flatten(found, found.leaves[0]).truncated is truncated
