"""The compiled FlexAttention kernel: against torch's own attention with the same mask, in fp32 and bf16, values and
gradients; against the CPU's rectangles; and a model's log-probs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from engine_on_gpu import NEEDS_GPU
from forests import rows_of
from torch.nn.attention.flex_attention import BlockMask

from agentrl.learner.attention import ATTENTION, attend, plan_attention
from agentrl.learner.logprob import check_packable, target_logprobs
from agentrl.learner.pack import pack
from agentrl.tiny import build_model

pytestmark = NEEDS_GPU


def forest(answers, prompt, answer):
    return rows_of([[*range(prompt), *[500 + i] * (answer + 3 * i)] for i in range(answers)])


@pytest.mark.parametrize("shape", [(2, 3, 2), (8, 300, 100), (5, 77, 200), (3, 1000, 400)])
@pytest.mark.parametrize("groups", [4, 2])
def test_the_kernel_agrees_with_the_rectangles(shape, groups):
    """Several sizes, since the kernel is compiled once for all of them."""
    end = pack(*forest(*shape)).subtree_end.numpy()
    generator = torch.Generator().manual_seed(0)
    cpu = [torch.randn(1, h, len(end), 32, generator=generator).requires_grad_() for h in (4, groups, groups)]
    gpu = [x.detach().cuda().requires_grad_() for x in cpu]
    plan = plan_attention(end, "cuda")
    assert isinstance(plan, BlockMask)
    weights = torch.randn(1, 4, len(end), 32, generator=generator)
    results = []
    for tensors, how in ((cpu, plan_attention(end, "cpu")), (gpu, plan)):
        out = attend(*tensors, how, 0.2)
        results.append([out, *torch.autograd.grad(out, tensors, weights.to(out.device))])
    for expected, found in zip(*results, strict=True):
        # The kernel may multiply in TF32, of 10 bits.
        assert torch.allclose(found.cpu(), expected, atol=5e-3 * float(expected.abs().max()))


def attended(tensors, weights, attention):
    """Output and gradients, in fp64 on the CPU."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(*leaves)
    return [x.detach().cpu().double() for x in (out, *torch.autograd.grad(out, leaves, weights.to(out)))]


def masked(subtree_end, scale):
    """torch's own attention with the mask written out: what it computes needs no trust in ours."""
    places = torch.arange(len(subtree_end))
    seen = (places[None, :] <= places[:, None]) & (places[:, None] < subtree_end[None, :])

    def attention(query, key, value):
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen.to(query.device), scale=scale)

    return attention


def off(found, expected):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]


def compare_with_sdpa(device, dtype, shape, groups, size=64):
    """Relative errors of output and gradients against fp64: ours, and those of torch's attention in ``dtype``."""
    end = pack(*forest(*shape)).subtree_end
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, h, len(end), size, generator=generator) for h in (8, groups, groups)]
    weights = torch.randn(1, 8, len(end), size, generator=generator)
    scale, plan = size**-0.5, plan_attention(end.numpy(), device)
    rounded = [x.to(dtype) for x in made]
    exact = attended([x.double() for x in rounded], weights.to(dtype), masked(end, scale))
    there = [x.to(device) for x in rounded]
    ours = attended(there, weights.to(dtype), lambda q, k, v: attend(q, k, v, plan, scale))
    theirs = attended(there, weights.to(dtype), masked(end, scale))
    return off(ours, exact), off(theirs, exact)


@pytest.mark.parametrize("shape", [(8, 300, 100), (3, 1000, 400)])
@pytest.mark.parametrize("groups", [8, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_agrees_with_sdpa(dtype, groups, shape):
    """As near to fp64 as torch's own attention in the same dtype, or as TF32 (fp32) and a bf16 result can be."""
    ours, theirs = compare_with_sdpa("cuda", dtype, shape, groups)
    print(f"ours {[f'{x:.1e}' for x in ours]}, SDPA {[f'{x:.1e}' for x in theirs]}")
    floor = 2e-3 if dtype == torch.float32 else 8e-3
    assert all(a <= max(2 * b, floor) for a, b in zip(ours, theirs, strict=True))


def test_a_model_on_the_gpu_gives_the_log_probs_of_the_cpu(tokenizer):
    cpu = build_model(tokenizer, hidden=64, layers=2, context=512, seed=1)
    gpu = copy.deepcopy(cpu).cuda()
    check_packable(gpu)
    rows = rows_of([[*range(100), *[200 + i] * 50] for i in range(4)])
    found = []
    for model, device in ((cpu, "cpu"), (gpu, "cuda")):
        model.set_attn_implementation(ATTENTION)
        logprobs, _ = target_logprobs(model, pack(*rows, device))
        logprobs.sum().backward()
        found.append((logprobs, model.get_input_embeddings().weight.grad))
    for expected, measured in zip(*found, strict=True):
        assert torch.allclose(measured.cpu(), expected, atol=5e-3 * float(expected.abs().max()))
