"""Trees laid out flat: every leaf a row, shared tokens with one number."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from agentrl.errors import TrainingError
from agentrl.learner.experience import experience
from agentrl.types import Leaf, Message, Node, Outcome, RolloutTree, Task


def policy(parent, tokens):
    return Node(parent, "policy", tokens, tuple(-0.1 * t for t in tokens), tuple(0.01 * t for t in tokens))


def tool(parent, tokens, content):
    return Node(parent, "tool", tokens, messages=(Message("tool", content),))


def branched(rewards=(1.0, 0.0, 0.5)):
    """Prompt, a first turn, a result; a second turn that forks in its middle; and another chain from the prompt."""
    nodes = (
        Node(-1, "prompt", (1, 2), messages=(Message("user", "question"),)),
        policy(0, (3, 4)),
        tool(1, (5,), "result"),
        policy(2, (6,)),
        policy(3, (7, 8)),
        policy(3, (9,)),
        policy(0, (3,)),
    )
    outcomes = (Outcome.ANSWERED, Outcome.LENGTH, Outcome.ANSWERED)
    leaves = tuple(Leaf(n, r, o) for n, r, o in zip((4, 5, 6), rewards, outcomes, strict=True))
    return RolloutTree(Task("question"), nodes, leaves)


def test_a_path_is_a_row():
    flat = experience([branched()])
    assert flat.token_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 9, 0], [1, 2, 3, 0, 0, 0, 0, 0]]
    assert flat.lengths.tolist() == [8, 7, 3]
    assert flat.mask[0].tolist() == [False, False, True, True, False, True, True, True]
    assert flat.mask.sum(1).tolist() == [5, 4, 1]
    torch.testing.assert_close(flat.sampled_logprobs, -0.1 * flat.token_ids * flat.mask)
    torch.testing.assert_close(flat.entropies, 0.01 * flat.token_ids * flat.mask)
    assert flat.rewards.tolist() == [1.0, 0.0, 0.5]
    assert flat.truncated.tolist() == [False, True, False]


def test_a_branch_in_the_middle_of_a_turn_goes_on_with_it():
    flat = experience([branched()])
    assert flat.turn[0].tolist() == [-1, -1, 0, 0, -1, 1, 1, 1]
    assert flat.turn[1].tolist() == [-1, -1, 0, 0, -1, 1, 1, -1]
    assert flat.observations == (("question", "result"), ("question", "result"), ("question",))


def test_shared_tokens_have_one_number_and_equal_ones_do_not():
    flat = experience([branched(), branched()])
    first, second, alone = flat.token[:3].tolist()
    assert first[:6] == second[:6]
    assert first[6] != second[6]
    assert alone[2] != first[2], "another sample of the same token"
    assert set(flat.token[:3].flatten().tolist()).isdisjoint(set(flat.token[3:].flatten().tolist()) - {-1})


def test_groups_and_subtrees():
    flat = experience([branched(), branched()])
    assert flat.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert flat.subtree.tolist() == [1, 1, 6, 1, 1, 6]


def test_a_leaf_belongs_to_the_root_trajectory_that_its_name_begins_with():
    """A tree expanded at the prompt has leaves that share no token with it (Tree-GRPO)."""
    tree = branched()
    names = ((0,), (0, 1, 0), (0, 0, 1))
    leaves = tuple(replace(leaf, name=name) for leaf, name in zip(tree.leaves, names, strict=True))
    assert experience([replace(tree, leaves=leaves)]).subtree.tolist() == [0, 0, 0]


def test_what_the_sampler_did_not_report_is_not_zero():
    tree = branched()
    nodes = tuple(replace(n, entropies=()) if i == 1 else n for i, n in enumerate(tree.nodes))
    flat = experience([replace(tree, nodes=nodes)])
    assert flat.entropies[0].isnan().tolist() == [False, False, True, True, False, False, False, False]
    short = tuple(replace(n, entropies=(0.1,)) if i == 1 else n for i, n in enumerate(tree.nodes))
    with pytest.raises(TrainingError, match="node 1: 2 policy tokens and 1 entropies; expected one for each, or none"):
        experience([replace(tree, nodes=short)])


@pytest.mark.parametrize(
    ("node", "parent", "message"),
    [
        (6, 6, "node 6 goes to node 6 after 7 of the tree's 7 nodes"),
        (9, 0, "node 9 goes to node 9 after 0 of"),
        (-1, 0, "node -1 goes to node -1 after 0 of"),
        (6, 7, "node 6 goes to node 7 after 1 of"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(node, parent, message):
    tree = branched()
    nodes = (*tree.nodes[:6], replace(tree.nodes[6], parent=parent))
    with pytest.raises(TrainingError, match=message):
        experience([replace(tree, nodes=nodes, leaves=(Leaf(node, 1.0, Outcome.ANSWERED),))])


def test_a_tree_may_have_several_roots():
    """Tasks whose prompts differ between trajectories; a leaf may also be an inner node, or stand there twice."""
    one = branched()
    nodes = (*one.nodes, Node(-1, "prompt", (11,)), policy(7, (12, 13)))
    leaves = (*one.leaves, *(Leaf(n, 0.0, Outcome.ANSWERED) for n in (8, 8, 3)))
    flat = experience([replace(one, nodes=nodes, leaves=leaves)])
    assert flat.lengths.tolist() == [8, 7, 3, 3, 3, 6]
    assert flat.group.tolist() == [0] * 6
    assert flat.subtree.tolist() == [1, 1, 6, 8, 8, 1]
    assert flat.token[3].tolist() == flat.token[4].tolist()


def test_taking_rows_trims_the_padding():
    flat = experience([branched()])
    part = flat.take(torch.tensor([2]))
    assert part.token_ids.tolist() == [[1, 2, 3]]
    assert part.observations == (("question",),)
    assert len(flat.take(torch.tensor([], dtype=torch.int64))) == 0
    assert flat.describe(2) == {
        "token_ids": [1, 2, 3],
        "policy": [False, False, True],
        "old_logprobs": [0.0, 0.0, flat.sampled_logprobs[2, 2].item()],
        "reward": 0.5,
    }


def test_unscored_leaves_are_left_out():
    flat = experience([branched((1.0, None, 0.5))])
    assert flat.rewards.tolist() == [1.0, 0.5]
    assert len(experience([])) == 0
    assert experience([]).token_ids.shape == (0, 0)


def test_a_first_token_is_never_a_target():
    tree = RolloutTree(Task("x"), (policy(-1, (4, 5)),), (Leaf(0, 1.0, Outcome.ANSWERED),))
    flat = experience([tree])
    assert flat.mask.tolist() == [[False, True]]
    assert flat.turn.tolist() == [[-1, 0]]
