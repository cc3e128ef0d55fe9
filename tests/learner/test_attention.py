"""Tree attention is dense attention under the ancestor mask, in value and gradient, however the pairs are cut."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forests import forests, rows_of
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from agentrl.errors import ConfigError
from agentrl.learner import attention
from agentrl.learner.attention import ATTENTION, Partition, attend, block_mask, partition, plan_attention
from agentrl.learner.pack import pack

CUTS = st.sampled_from([(128, 48), (2, 0), (4, 5), (7, 12)])


def cut(sizes):
    return mock.patch.multiple(attention, SQUARE=sizes[0], FAMILY=sizes[1])


def visible(subtree_end):
    """[N, N] which key each query sees."""
    n = np.arange(len(subtree_end))
    return (n[None] <= n[:, None]) & (n[:, None] < np.asarray(subtree_end)[None])


def rectangles(plan):
    """Every single rectangle with the pairs it covers, [queries, keys] bool."""
    squares = [(r, np.tril(np.ones((r.queries, r.keys), bool))[None].repeat(r.number, 0)) for r in plan.causal]
    squares += [(r, (m == 0)[:, 0].numpy()) for r, m in zip(plan.families, plan.masks, strict=True)]
    squares += [(r, np.ones((r.number, r.queries, r.keys), bool)) for r in plan.dense]
    for r, covered in squares:
        for i in range(r.number):
            yield r.query + i * r.stride, r.key + i * r.stride, covered[i]


@given(forests(), CUTS)
def test_the_rectangles_cover_every_visible_pair_once(rows, sizes):
    end = pack(*rows).subtree_end.numpy()
    with cut(sizes):
        plan = partition(end)
    covered = np.zeros((len(end), len(end)), int)
    for query, key, pairs in rectangles(plan):
        covered[query : query + pairs.shape[0], key : key + pairs.shape[1]] += pairs
    assert np.array_equal(covered, visible(end))
    assert len({r.query for r in (*plan.causal, *plan.families)}) == len((*plan.causal, *plan.families))


def inputs(total, dtype, heads=4, groups=2, size=8, seed=0):
    """Queries, keys and values as transformers hands them over: [1, H, N, D], in memory [1, N, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, total, count, size) for count in (heads, groups, groups)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in made]


def worst(found, expected):
    return max(float((a.detach().double() - b.detach()).abs().max()) for a, b in zip(found, expected, strict=True))


@given(forests(), CUTS, st.sampled_from([(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 0.1)]))
def test_values_and_gradients_are_those_of_dense_attention(rows, sizes, precision):
    dtype, tolerance = precision
    end = pack(*rows).subtree_end.numpy()
    with cut(sizes):
        plan = partition(end)
    given_, exact = inputs(len(end), dtype), inputs(len(end), dtype)
    out = attend(*given_, plan, 0.3)
    exact = [x.detach().double().requires_grad_() for x in exact]
    seen = torch.from_numpy(visible(end))
    expected = F.scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.3, enable_gqa=True)
    assert out.dtype == dtype
    weights = torch.cos(torch.arange(out.numel()).view(out.shape) * 0.7)
    found = torch.autograd.grad(out, given_, weights.to(dtype))
    assert all(g.dtype == dtype for g in found)
    wanted = torch.autograd.grad(expected, exact, weights.to(dtype).double())
    assert worst([out, *found], [expected, *wanted]) < tolerance


def test_long_rows_and_prompts_are_right_at_the_sizes_in_use():
    """Several squares in a segment, a prompt over many answers, batches of equal answers beside ragged ones."""
    prompt = list(range(300))
    answers = [[1000 + 200 * i + j for j in range(150 if i < 4 else 150 - 13 * i)] for i in range(8)]
    rows = rows_of([*([*prompt, *answer] for answer in answers), *([5000 + i] * 257 for i in range(3))])
    end = pack(*rows).subtree_end.numpy()
    plan = plan_attention(end, "cpu")
    assert isinstance(plan, Partition)
    given_ = inputs(len(end), torch.float64)
    exact = [x.detach().clone().requires_grad_() for x in given_]
    out = attend(*given_, plan, 0.3)
    seen = torch.from_numpy(visible(end))
    expected = F.scaled_dot_product_attention(*exact, attn_mask=seen, scale=0.3, enable_gqa=True)
    weights = torch.cos(torch.arange(out.numel()).view(out.shape) * 0.7).double()
    found = [out, *torch.autograd.grad(out, given_, weights)]
    assert worst(found, [expected, *torch.autograd.grad(expected, exact, weights)]) < 1e-12


def test_inputs_of_another_memory_layout_give_the_same():
    end = pack(*rows_of([[1, 2, 3, 4], [1, 2, 5]])).subtree_end.numpy()
    given_ = inputs(len(end), torch.float64)
    turned = [x.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for x in given_]
    assert all(x.stride(-1) != 1 for x in turned)
    results = []
    for tensors in (given_, turned):
        out = attend(*tensors, partition(end), 0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert worst(*results) < 1e-14


def test_a_group_costs_few_calls_and_few_pairs():
    """8 answers of 64 tokens after a prompt of 256: what is computed is a fifth of what flat rows compute."""
    rows = rows_of([[*range(256), *range(1000 + 64 * i, 1064 + 64 * i)] for i in range(8)])
    plan = plan_attention(pack(*rows).subtree_end.numpy(), "cpu")
    assert plan.causal == ((0, 128, 0, 128, 2, 128), (256, 64, 256, 64, 8, 64))[::-1]
    assert plan.dense == ((128, 128, 0, 128, 1, 0), (256, 512, 0, 256, 1, 0))
    assert not plan.families
    computed = sum(pairs.size for *_, pairs in rectangles(plan))
    assert computed < 8 * 320 * 320 / 3.5


def test_equal_trees_go_through_the_kernel_together():
    prompts = [list(range(1000 * g, 1000 * g + 100)) for g in range(4)]
    rows = rows_of([[*prompt, *[prompt[0] + 200 + a] * 100] for prompt in prompts for a in range(3)])
    plan = plan_attention(pack(*rows).subtree_end.numpy(), "cpu")
    assert [(r.queries, r.keys, r.number) for r in plan.dense] == [(300, 100, 4)]
    assert [(r.queries, r.number) for r in plan.causal] == [(100, 16)]


def test_a_deep_tree_needs_no_recursion():
    """2,000 branchings below one another, each with a leaf of one token."""
    end = np.array([x for n in range(2000) for x in (4000, 2 * n + 2)])
    pairs = sum(pairs.sum() for *_, pairs in rectangles(partition(end)))
    assert pairs == visible(end).sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [3, 60, 150])
def test_flex_attention_sees_the_same_pairs(length, monkeypatch):
    """Its forward pass, uncompiled; the compiled kernel and its gradients need a GPU (tests/gpu)."""
    monkeypatch.setattr(attention, "_flex", lambda: flex_attention)
    rows = rows_of([[1, *[2] * length], [1, *[2] * (length // 2), 3, 3], [1, 4], [5] * length])
    end = pack(*rows).subtree_end
    tensors = [x.detach() for x in inputs(len(end), torch.float32)]
    found = attend(*tensors, block_mask(end), 0.3)
    assert torch.allclose(found, attend(*tensors, partition(end.numpy()), 0.3), atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"tree": None, "softcap": 50.0}, "Strange uses softcap"),
        ({"tree": None, "s_aux": torch.ones(4)}, "Strange uses s_aux"),
        ({"tree": None, "sliding_window": 64}, "Strange uses sliding_window"),
        ({"tree": None, "dropout": 0.1}, "Strange uses attention_dropout"),
        ({}, "Strange does not pass its keywords"),
    ],
)
def test_attention_that_would_be_ignored_is_refused(kwargs, message):
    from transformers import AttentionInterface

    module = type("Strange", (torch.nn.Module,), {})()
    with pytest.raises(ConfigError, match=message):
        AttentionInterface()[ATTENTION](module, *inputs(3, torch.float32), None, **kwargs)


def test_transformers_finds_it_by_name():
    from transformers import AttentionInterface

    end = pack(*rows_of([[1, 2, 3], [1, 4]])).subtree_end.numpy()
    tensors, plan = inputs(len(end), torch.float64), partition(end)
    function = AttentionInterface()[ATTENTION]
    out, weights = function(torch.nn.Module(), *tensors, None, scaling=0.2, tree=SimpleNamespace(plan=plan))
    assert weights is None
    assert torch.equal(out, attend(*tensors, plan, 0.2).transpose(1, 2))
