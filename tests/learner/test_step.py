"""The optimizer step: what it checks before it moves the weights, and what it moves them by."""

from __future__ import annotations

import asyncio
import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from agentrl.config import load_config
from agentrl.errors import ConfigError, NonFiniteError, PolicyMismatch, TrainingError
from agentrl.learner.experience import experience
from agentrl.learner.step import Learner
from agentrl.presets import PRESETS
from agentrl.sampler.hf import HFSampler
from agentrl.types import Leaf, Message, Node, Outcome, RolloutTree, SamplingParams, StopReason, Task

GAP = "sampling/sampling_logp_difference/mean"


def config(**changes):
    base = {"rollout.max_tokens": 32, "sampler.max_length": 256, "train.lr": 1e-3, "train.warmup": 0}
    return load_config(None, base | {key.replace("__", "."): value for key, value in changes.items()})


async def sample_groups(model, renderer, temperature, groups=3, size=4):
    """Groups with rewards 0, 1, 0, 1, ..., sampled by the embedded sampler."""
    sampler = HFSampler(copy.deepcopy(model), max_slots=64, max_length=256)
    trees = []
    for number in range(groups):
        prompt = renderer.prompt([Message("user", f"double {number}")])
        params = [SamplingParams(24, temperature, seed=100 * number + i) for i in range(size)]
        nodes, leaves = [Node(-1, "prompt", prompt)], []
        for i, done in enumerate(await asyncio.gather(*(sampler.sample(prompt, p) for p in params))):
            nodes.append(Node(0, "policy", done.token_ids, done.logprobs, done.entropies, done.policy_version))
            leaves.append(Leaf(i + 1, float(i % 2), Outcome.ANSWERED))
        trees.append(RolloutTree(Task(f"double {number}"), tuple(nodes), tuple(leaves), temperature))
    await sampler.close()
    return trees


@pytest.fixture(scope="module")
def trees(random_model, renderer):
    """Fresh samples of ``random_model`` by temperature."""
    return {t: asyncio.run(sample_groups(random_model, renderer, t)) for t in (1.0, 0.7)}


def weights(learner):
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def accumulate(learner, trees):
    """Metrics of the loss as it is now, without an update."""
    return learner.accumulate(learner.prepare(experience(trees))[0])


def prepared(trees, setting, model):
    return Learner(model, setting).prepare(experience(trees))[0]


def token_mean_loss(part, mask=None):
    """What the loss on policy has to be: minus the mean advantage over the tokens."""
    mask = part.scores.mask if mask is None else mask
    return -float((part.scores.advantages * mask).sum() / mask.sum())


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gap_of_fresh_samples_is_rounding(make_model, trees, temperature):
    learner = Learner(make_model(), config(sampler__temperature=temperature))
    metrics = learner.step(trees[temperature])
    assert 0 < metrics[GAP] < 2e-6
    assert metrics["sampling/sampling_logp_difference/max"] < 1e-5


def test_a_temperature_that_did_not_sample_is_noticed(make_model, trees):
    with pytest.raises(PolicyMismatch, match="temperature"):
        Learner(make_model(), config(sampler__temperature=0.7, train__max_gap=1e-4)).step(trees[1.0])


def test_samples_of_other_weights_are_refused_and_nothing_moves(make_model, trees):
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    learner = Learner(model, config())
    before = weights(learner)
    with pytest.raises(
        PolicyMismatch, match=r"mean \|log-prob difference\| is .* expected at most 0.05 \(train.max_gap\)"
    ):
        learner.step(trees[1.0])
    assert same(weights(learner), before)
    assert learner.updates == 0


def test_a_step_moves_towards_what_was_rewarded(make_model, trees):
    learner = Learner(make_model(), config(algorithm__name="grpo"))
    metrics = learner.step(trees[1.0])
    assert learner.updates == 1
    assert metrics["grad_norm"] > 0
    after = accumulate(learner, trees[1.0])
    assert after["loss"] < metrics["loss"] - 1e-3
    assert after["clip_ratio/region_mean"] >= 0


@pytest.mark.parametrize("broken", ["nan logprob", "logprob of -inf", "weights", "gradient"])
@pytest.mark.parametrize("name", ["dapo", "rloo"])  # whose loss does not read the sampler's log-probs
def test_what_is_not_finite_stops_before_the_update_and_brings_its_sample(make_model, trees, broken, name):
    learner = Learner(make_model(), config(algorithm__name=name))
    batch = trees[1.0]
    if "logprob" in broken:
        nodes = list(batch[0].nodes)
        value = math.nan if "nan" in broken else -math.inf
        nodes[1] = replace(nodes[1], logprobs=(value, *nodes[1].logprobs[1:]))
        batch = [replace(batch[0], nodes=tuple(nodes)), *batch[1:]]
    elif broken == "weights":
        with torch.no_grad():
            learner.model.model.norm.weight[3] = math.nan
    else:
        learner.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = weights(learner)
    with pytest.raises(NonFiniteError, match="this update was not made") as failure:
        learner.step(batch)
    assert all(
        torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(weights(learner).values(), before.values(), strict=True)
    )
    assert learner.updates == 0
    sample = failure.value.sample
    assert sample
    assert sample[0].keys() == {"token_ids", "policy", "old_logprobs", "reward"}
    assert tuple(sample[0]["token_ids"][: len(batch[0].nodes[0].token_ids)]) == batch[0].nodes[0].token_ids


def test_the_learning_rate_warms_up_stays_and_decays(make_model):
    learner = Learner(make_model(), config(train__steps=20, train__warmup=4, train__decay=0.5, train__lr=1.0))
    rates = [learner.learning_rate(update) for update in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:11] == [1.0] * 7
    assert rates[19] == pytest.approx(0.1 + 0.9 / 10)
    assert all(a > b for a, b in pairwise(rates[10:]))
    flat = Learner(make_model(), config(train__steps=5, train__lr=1.0))
    assert [flat.learning_rate(update) for update in range(5)] == [1.0] * 5


def test_the_rate_of_a_step_is_the_one_of_its_update(make_model, trees):
    learner = Learner(make_model(), config(train__warmup=10, train__minibatches=2))
    metrics = learner.step(trees[1.0])
    assert metrics["learning_rate"] == pytest.approx((1e-4 + 2e-4) / 2)


def test_minibatches_are_that_many_updates_and_only_the_first_is_checked(make_model, trees):
    learner = Learner(make_model(), config(train__minibatches=3, train__lr=0.01, train__max_gap=1e-4))
    metrics = learner.step(trees[1.0])
    assert learner.updates == 3
    assert metrics[GAP] < 2e-6, "later minibatches are off-policy, which is no mismatch"
    assert abs(metrics["approx_kl"]) > 0


def test_one_batch_or_many_small_ones_give_the_same_step(make_model, trees):
    steps = {}
    for micro in (1, 70, 100_000):
        learner = Learner(make_model(), config(train__micro_tokens=micro))
        steps[micro] = learner.step(trees[1.0]), learner.weights()
    reference = steps[100_000]
    for metrics, moved in steps.values():
        # Adam's first step is the sign of the gradient: rounding turns the few that are nearly zero.
        close = [torch.isclose(moved[name], p, atol=1e-6).double().mean() for name, p in reference[1].items()]
        assert min(close) > 0.97
        counted = {k: v for k, v in metrics.items() if k not in ("num_tokens/unique", GAP)}
        assert counted == pytest.approx({k: reference[0][k] for k in counted}, rel=1e-3, abs=1e-6)


def test_the_first_loss_is_what_the_formula_says(make_model, trees):
    """On policy the ratio is 1, so the token-mean loss is minus the mean advantage over tokens."""
    setting = config(algorithm__name="dapo")
    found = Learner(make_model(), setting).step(trees[1.0])
    part = prepared(trees[1.0], setting, make_model())
    assert found["loss"] == pytest.approx(token_mean_loss(part), abs=1e-5)
    assert found["num_tokens/flat"] == part.flat.lengths.sum()
    assert found["num_tokens/unique"] < found["num_tokens/flat"]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_to_the_starting_policy(make_model, trees, estimator):
    setting = config(algorithm__kl_coef=0.5, algorithm__kl_estimator=estimator)
    learner = Learner(make_model(), setting)
    start = weights(learner)
    first = learner.step(trees[1.0])
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    second = accumulate(learner, trees[1.0])
    assert abs(second["kl"]) > 1e-6
    assert all(torch.equal(value, start[name]) for name, value in learner.reference.state_dict().items())
    if estimator != "k1":  # whose gradient is not 0 at the start, so that the first step goes elsewhere
        plain = Learner(make_model(), config())
        plain.step(trees[1.0])
        without = accumulate(plain, trees[1.0])
        assert second["loss"] - 0.5 * second["kl"] == pytest.approx(without["loss"], abs=1e-4)


def test_another_reference_can_be_given(make_model, trees):
    """A resumed run's model is not the starting policy."""
    other = make_model()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.1)
    learner = Learner(make_model(), config(algorithm__kl_coef=0.1), reference=other)
    assert learner.step(trees[1.0])["kl"] > 1e-4


def test_the_overlong_filter_takes_cut_trajectories_out_of_everything(make_model, trees):
    def cut(tree):
        leaves = [replace(leaf, outcome=Outcome.LENGTH) if i == 1 else leaf for i, leaf in enumerate(tree.leaves)]
        return replace(tree, leaves=tuple(leaves))

    batch = [cut(tree) for tree in trees[1.0]]
    kept = Learner(make_model(), config(algorithm__overlong_filter=False)).step(batch)
    filtered = Learner(make_model(), config(algorithm__overlong_filter=True)).step(batch)
    assert kept["loss"] != pytest.approx(filtered["loss"], abs=1e-3)
    part = prepared(batch, config(algorithm__overlong_filter=False), make_model())
    assert int(part.flat.truncated.sum()) == 3
    mask = part.flat.mask & ~part.flat.truncated[:, None]
    assert filtered["loss"] == pytest.approx(token_mean_loss(part, mask), abs=1e-5)


def test_the_soft_overlong_penalty_reaches_the_advantages(make_model, trees):
    tree = reward_all(trees[1.0][0], 1.0)
    nodes = list(tree.nodes)
    nodes[1] = replace(nodes[1], token_ids=nodes[1].token_ids[:4], logprobs=nodes[1].logprobs[:4], entropies=())
    batch = [replace(tree, nodes=tuple(nodes))]

    def advantages(buffer):
        part = prepared(batch, config(algorithm__overlong_buffer=buffer), make_model())
        return part.scores.advantages.abs().amax(-1) * part.scores.advantages.sum(-1).sign()

    assert advantages(8).tolist() == [0.0] * 4, "24 tokens of 32 are not in the last 8"
    punished = advantages(16)
    assert punished[0] > 0 > punished[1] == punished[2] == punished[3]


@pytest.mark.parametrize("top_p", [0.99, 0.5])
def test_training_below_full_mass_is_refused(make_model, top_p):
    with pytest.raises(ConfigError, match=f"sampler.top_p is {top_p}: training needs 1.0"):
        Learner(make_model(), config(sampler__top_p=top_p))


# -- batches with nothing in them -------------------------------------------------------------------------------------


def reward_all(tree, reward):
    return replace(tree, leaves=tuple(replace(leaf, reward=reward) for leaf in tree.leaves))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_equal_rewards_move_nothing(make_model, trees, name):
    """Nor does the momentum of earlier updates, or weight decay."""
    learner = Learner(make_model(), config(algorithm__name=name, train__weight_decay=0.1, train__max_gap=9.0))
    learner.step(trees[1.0])
    before = weights(learner)
    metrics = learner.step([reward_all(tree, 1.0) for tree in trees[1.0]])
    assert metrics["grad_norm"] == metrics["loss"] == 0.0
    assert same(weights(learner), before)


def test_everything_cut_off_moves_nothing(make_model, trees):
    cut = [
        replace(tree, leaves=tuple(replace(leaf, outcome=Outcome.LENGTH) for leaf in tree.leaves))
        for tree in trees[1.0]
    ]
    learner = Learner(make_model(), config(train__max_gap=9.0))
    learner.step(trees[1.0])
    before = weights(learner)
    assert learner.step(cut)["grad_norm"] == 0.0
    assert same(weights(learner), before)


@pytest.mark.parametrize("micro", [1, 10_000])
def test_trajectories_without_a_policy_token_are_harmless(make_model, trees, micro):
    """A prompt that fills the whole context leaves the policy no token to write."""
    mute = RolloutTree(
        Task("long"), (Node(-1, "prompt", (5, 6, 7)),), (Leaf(0, 0.0, Outcome.LENGTH), Leaf(0, 1.0, Outcome.LENGTH))
    )
    learner = Learner(make_model(), config(train__micro_tokens=micro))
    assert learner.step([mute, *trees[1.0]])["grad_norm"] > 0
    for changes in ({}, {"name": "gigpo"}, {"name": "reinforce_pp", "kl_target": 0.1}, {"entropy_target": 0.1}):
        alone = Learner(make_model(), config(**{f"algorithm__{key}": value for key, value in changes.items()}))
        before = weights(alone)
        assert alone.step([mute]) == {}, "nobody wrote anything"
        assert same(weights(alone), before)


def test_unscored_leaves_are_left_out(make_model, trees):
    tree = trees[1.0][0]
    failed = replace(tree, leaves=(replace(tree.leaves[0], reward=None, outcome=Outcome.ENV_FAILURE), *tree.leaves[1:]))
    assert Learner(make_model(), config()).step([failed])["num_trajectories"] == 3
    nothing = replace(tree, leaves=(Leaf(-1, None, Outcome.ENV_FAILURE),))
    assert Learner(make_model(), config()).step([nothing]) == {}


def test_stop_reasons_do_not_matter_to_the_learner(trees):
    """Only the leaf's outcome says that a trajectory was cut off."""
    tree = trees[1.0][0]
    nodes = tuple(replace(n, stop_reason=StopReason.LENGTH) if n.author == "policy" else n for n in tree.nodes)
    assert not experience([replace(tree, nodes=nodes)]).truncated.any()


def test_tokens_without_old_logprobs_are_refused(make_model, trees):
    tree = trees[1.0][0]
    nodes = list(tree.nodes)
    nodes[1] = replace(nodes[1], logprobs=())
    with pytest.raises(TrainingError, match=r"node 1: 24 policy tokens and 0 log-probs; expected one for each"):
        Learner(make_model(), config()).step([replace(tree, nodes=tuple(nodes))])


@pytest.mark.parametrize("changes", [{"name": "aepo"}, {"entropy_target": 0.2}])
def test_entropies_are_missed_where_they_are_read(make_model, trees, changes):
    tree = trees[1.0][0]
    nodes = list(tree.nodes)
    nodes[1] = replace(nodes[1], entropies=())
    batch = [replace(tree, nodes=tuple(nodes))]
    assert Learner(make_model(), config()).step(batch)["grad_norm"] > 0
    learner = Learner(make_model(), config(**{f"algorithm__{key}": value for key, value in changes.items()}))
    with pytest.raises(TrainingError, match="24 policy tokens have no finite entropy"):
        learner.step(batch)


@pytest.mark.parametrize("token", [448, -1])
def test_a_token_that_the_policy_does_not_know_is_refused(make_model, trees, token):
    """As where the sampler has another vocabulary; on a GPU the embedding would take the process with it."""
    tree = trees[1.0][0]
    nodes = (replace(tree.nodes[0], token_ids=(token, *tree.nodes[0].token_ids[1:])), *tree.nodes[1:])
    with pytest.raises(TrainingError, match=f"have a token {token}: expected 0 to 447, the rows of the policy's"):
        Learner(make_model(), config()).step([replace(tree, nodes=nodes)])


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_a_number_is_refused(make_model, trees, name, reward):
    setting = config(algorithm__name=name, rollout__policy="expand_tree")
    with pytest.raises(NonFiniteError, match=f"rewards: expected finite numbers, got {reward} at leaf"):
        Learner(make_model(), setting).step([reward_all(trees[1.0][0], reward)])
