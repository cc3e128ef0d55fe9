"""Trees of several branching levels: a step's gradient is that of the flattened leaves, credit by credit.

The reference below knows nothing of the learner: it walks every root-to-leaf path by itself, runs it as a flat row
through the model's own attention and writes PPO's clipped loss out token by token, in float64.
"""

from __future__ import annotations

import copy
import random
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from forests import gradients, relative
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from agentrl.config import load_config
from agentrl.learner.experience import experience
from agentrl.learner.step import Learner
from agentrl.types import Leaf, Message, Node, Outcome, RolloutTree, Task

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.fixture
def model(monkeypatch):
    """In float64 throughout: transformers' norms would round to fp32, here and in the reference at other places."""
    torch.manual_seed(0)
    monkeypatch.setattr(
        Qwen3RMSNorm,
        "forward",
        lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt(),
    )
    setting = Qwen3Config(vocab_size=31, num_hidden_layers=2, initializer_range=0.3, **SIZES)
    return Qwen3ForCausalLM(setting).double()


def grown(seed, temper=0.5):
    """Two roots from the prompt, each branching at up to three tool results; uneven, with rewards that differ."""
    rng = random.Random(seed)
    nodes, leaves = [Node(-1, "prompt", (1, 2, 3), messages=(Message("user", "go"),))], []

    def add(parent, author, size):
        ids = tuple(rng.randrange(3, 31) for _ in range(size))
        # Old log-probs around those of a random policy, exact in fp32, so that some ratios are clipped on either side.
        old = tuple(-3.5 + round(rng.gauss(0, temper) * 64) / 64 for _ in ids)
        said = (Message("tool", f"result {rng.randrange(2)}"),) if author == "tool" else ()
        spans = (old, (1.0,) * size, (0,) * size) if author == "policy" else ((), (), ())
        nodes.append(Node(parent, author, ids, *spans, said))
        return len(nodes) - 1

    def grow(parent, depth, name):
        turn = add(parent, "policy", rng.randint(1, 4))
        if depth == 0:
            leaves.append(Leaf(turn, rng.randrange(5) / 4, Outcome.ANSWERED, name=name))
            return
        result = add(turn, "tool", 2)
        for branch in range(rng.choice([1, 2, 3])):
            grow(result, depth - 1, (*name, depth, branch))

    for root in range(2):
        grow(0, 3, (root,))
    leaves.append(Leaf(nodes[leaves[0].node].parent, 0.75, Outcome.ANSWERED, name=(0, 9)))  # an inner node
    return RolloutTree(Task(f"tree {seed}"), tuple(nodes), tuple(leaves))


def normalized(rewards):
    spread = stdev(rewards) if len(rewards) > 1 else 0.0
    return [(r - fmean(rewards)) / (spread + 1e-6) if max(rewards) > min(rewards) else 0.0 for r in rewards]


def of_leaves(tree, by_tree):
    """GRPO's advantage of each leaf, in its task or in what began from one root."""
    keys = [leaf.name[0] if by_tree else 0 for leaf in tree.leaves]
    found = [0.0] * len(keys)
    for key in set(keys):
        members = [i for i, k in enumerate(keys) if k == key]
        for i, advantage in zip(members, normalized([tree.leaves[i].reward for i in members]), strict=True):
            found[i] = advantage
    return found


CREDITS = {
    "arpo": lambda inter, intra: inter,
    "arpo_hard": lambda inter, intra: inter,
    "tree_grpo": lambda inter, intra: [a + b for a, b in zip(inter, intra, strict=True)],
    "tree_grpo_inter": lambda inter, intra: inter,
    "tree_grpo_intra": lambda inter, intra: intra,
}


def reference_loss(model, trees, name):
    """Mean over all tokens of all leaves, a shared token once for each leaf below it."""
    total, count = 0.0, 0
    for tree in trees:
        paths = [list(reversed([*climb(tree, leaf.node)])) for leaf in tree.leaves]
        own = CREDITS[name](of_leaves(tree, by_tree=False), of_leaves(tree, by_tree=True))
        for path, mine in zip(paths, own, strict=True):
            ids = [token for n in path for token in tree.nodes[n].token_ids]
            table = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            place = 0
            for n in path:
                node = tree.nodes[n]
                below = [a for a, other in zip(own, paths, strict=True) if n in other]
                a = float(torch.tensor(fmean(below) if name == "arpo_hard" else mine, dtype=torch.float32))
                for token, old in zip(node.token_ids, node.logprobs or (None,) * len(node.token_ids), strict=True):
                    if old is not None:
                        rho = (table[place - 1, token] - old).exp()
                        gain = torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a)
                        total = total - (gain.clamp(min=2.0 * a) if "tree" in name and a < 0 else gain)
                        count += 1
                    place += 1
    return total / count


def climb(tree, index):
    while index >= 0:
        yield index
        index = tree.nodes[index].parent


def setting(name, **changes):
    fixed = {"rollout.policy": "expand_tree", "train.max_gap": 1e9, "algorithm.name": name, "algorithm.kl_coef": 0.0}
    if "tree" in name:
        fixed["algorithm.dual_clip"] = 2.0  # not 3, since advantages are in fp32, where only doubling is exact
    return load_config(None, fixed | changes)


@pytest.mark.parametrize("name", CREDITS)
@pytest.mark.parametrize("micro", [16, 10_000])
def test_the_gradient_is_that_of_the_flattened_leaves(model, name, micro):
    trees = [grown(seed) for seed in range(2)]
    learner = Learner(copy.deepcopy(model), setting(name, **{"train.micro_tokens": micro}))
    part = learner.prepare(experience(trees))[0]
    metrics = learner.accumulate(part)
    found = {n: p.grad.clone() for n, p in learner.model.named_parameters()}
    loss = reference_loss(model, trees, name)
    expected = gradients(model, loss)
    assert metrics["loss"] == pytest.approx(float(loss.detach()), rel=1e-9)
    assert relative(found, expected) < 1e-9
    assert 0 < metrics["clip_ratio/low_mean"] < 1
    assert 0 < metrics["clip_ratio/high_mean"] < 1
    assert metrics["num_tokens/unique"] < metrics["num_tokens/flat"] / 1.5 or micro == 16


@pytest.mark.parametrize("name", ["arpo_hard", "tree_grpo_intra"])
def test_the_reference_tells_credits_apart(model, name):
    """So the test above can fail: off policy, hard and soft credit differ, and so do trees and tasks."""
    trees = [grown(seed) for seed in range(3)]
    one, two = (gradients(model, reference_loss(model, trees, other)) for other in ("arpo", name))
    assert relative(one, two) > 1e-2


def test_on_policy_hard_credit_has_the_gradient_of_soft_credit(model):
    """With a mean over tokens, also where a leaf was cut off and is left out: it has no say in the others' credit."""
    trees = []
    for seed in range(3):
        tree = grown(seed)
        leaves = (replace(tree.leaves[0], outcome=Outcome.LENGTH), *tree.leaves[1:])
        trees.append(replace(tree, leaves=leaves))
    found = []
    for name in ("arpo", "arpo_hard"):
        changes = {"algorithm.old_logprobs": "learner", "algorithm.overlong_filter": True}
        learner = Learner(copy.deepcopy(model), setting(name, **changes))
        learner.accumulate(learner.prepare(experience(trees))[0])
        found.append({n: p.grad.clone() for n, p in learner.model.named_parameters()})
    assert relative(*found) < 1e-6
