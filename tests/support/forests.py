"""Random rows that share beginnings, and a small transformer in float64 to score them packed and flat."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

from agentrl.learner.attention import attend

VOCABULARY = 40


class Rows(NamedTuple):
    """What ``pack`` takes: ids [L, T] with rubbish in the padding, lengths [L], mask [L, T]."""

    token_ids: torch.Tensor
    lengths: torch.Tensor
    mask: torch.Tensor

    def lists(self):
        return [row[:length].tolist() for row, length in zip(self.token_ids, self.lengths.tolist(), strict=True)]


def rows_of(lists, mask=None):
    """Rows of lists of ids; ``mask`` is a list of flags for each, default: all of them policy tokens."""
    width = max(len(row) for row in lists)
    ids = torch.full((len(lists), width), -7)
    flags = torch.ones(len(lists), width, dtype=torch.bool)
    for i, row in enumerate(lists):
        ids[i, : len(row)] = torch.tensor(row)
        if mask is not None:
            flags[i, : len(row)] = torch.tensor(mask[i])
    return Rows(ids, torch.tensor([len(row) for row in lists]), flags)


@st.composite
def forests(draw):
    """Rows grown as a tree: some branch off an earlier one, some repeat it or go on from it, some begin anew."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    shape = draw(st.sampled_from(["wide", "deep", "mixed", "single", "tiny"]))
    count = {"wide": 12, "deep": 8, "mixed": 8, "single": 1, "tiny": 4}[shape]
    spans = {"wide": 3, "deep": 8, "mixed": 5, "single": 6, "tiny": 1}[shape]
    vocabulary = draw(st.sampled_from([2, 5, VOCABULARY]))  # few tokens: siblings meet by chance
    policy = draw(st.sampled_from([0.0, 0.6, 1.0]))
    grown, flags = [], []
    for _ in range(draw(st.integers(1, count))):
        ids = []
        if grown and rng.random() < 0.8:
            trunk = rng.choice(grown)
            ids = trunk[: rng.choice([len(trunk), rng.randint(1, len(trunk))])]
        for _ in range(rng.randint(0 if ids else 1, spans)):
            length = rng.choice([1, 1, 2, 3, 7, 20 if shape == "deep" else 5])
            ids = [*ids, *(rng.randrange(vocabulary) for _ in range(length))]
        grown.append(ids)
        flags.append([rng.random() < policy for _ in ids])
    return rows_of(grown, flags)


class SmallModel(nn.Module):
    """Embedding and learnt positions, two layers of grouped attention and an MLP, a head; all of it in float64.

    transformers' own models keep their norms and rotations in fp32, which hides errors below 1e-7.
    """

    def __init__(self, width=16, heads=4, groups=2, positions=256):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape):
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5)

        self.heads, self.groups = heads, groups
        self.embedding, self.positions = weight(VOCABULARY, width), weight(positions, width)
        size = width // heads * groups
        self.layers = nn.ModuleList(
            nn.ParameterDict(
                {"q": weight(width, width), "k": weight(size, width), "v": weight(size, width)}
                | {"o": weight(width, width), "up": weight(2 * width, width), "down": weight(width, 2 * width)}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, VOCABULARY, dtype=torch.float64)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCABULARY))

    def get_decoder(self):
        return self.decode

    def get_output_embeddings(self):
        return self.head

    def decode(self, input_ids, position_ids, use_cache=False, tree=None):
        x = self.embedding[input_ids] + self.positions[position_ids]
        for layer in self.layers:
            q, k, v = ((x @ layer[n].T).unflatten(-1, (-1, x.shape[-1] // self.heads)).transpose(1, 2) for n in "qkv")
            if tree is None:
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
            else:
                out = attend(q, k, v, tree.plan, 1.0)
            x = x + out.transpose(1, 2).flatten(2) @ layer["o"].T
            x = x + torch.tanh(x @ layer["up"].T) @ layer["down"].T
        return SimpleNamespace(last_hidden_state=x)

    def flat_logits(self, ids):
        """[t, V] of one row, through plain causal attention."""
        hidden = self.decode(torch.tensor([ids]), torch.arange(len(ids))[None]).last_hidden_state[0]
        return self.head(hidden)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    if loss.requires_grad:
        loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def relative(found, expected):
    """Norm of the difference over the norm of ``expected``, all parameters together; 0 where both are 0."""
    off = sum(float((found[n] - g).square().sum()) for n, g in expected.items()) ** 0.5
    size = sum(float(g.square().sum()) for g in expected.values()) ** 0.5
    return off / size if size else off
