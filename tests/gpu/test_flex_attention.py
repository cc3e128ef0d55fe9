"""The compiled FlexAttention kernel against the CPU's rectangles: values, gradients, and a model's log-probs."""

from __future__ import annotations

import copy

import pytest
import torch
from forests import rows_of
from torch.nn.attention.flex_attention import BlockMask

from agentrl.learner.attention import ATTENTION, attend, plan_attention
from agentrl.learner.logprob import check_packable, target_logprobs
from agentrl.learner.pack import pack
from agentrl.tiny import build_model

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's kernel and its gradients need a GPU"),
    pytest.mark.timeout(600),  # the first call compiles
    pytest.mark.filterwarnings("default"),  # the compiler's own
]


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
