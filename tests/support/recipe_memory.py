"""What a recipe in ``examples/`` needs of each GPU, in bytes, by arithmetic: the table in docs/recipes.md.

Written from the shapes of the model and the keys of the recipe; nothing here was measured. ``python
tests/support/recipe_memory.py`` prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agentrl.config import RunConfig, load_config
from agentrl.learner.logprob import CHUNK

GPU = 80e9
"""Bytes: what is called an 80 GB GPU has a little more."""
OTHERS = 3e9
"""Taken for contexts of CUDA, nccl's buffers and what an allocator cannot use: an assumption, not a measurement."""
ENGINE_WORK = 3e9
"""Likewise, of the engine's share: activations, CUDA graphs, and what drawing a token of each slot needs."""
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Shape:
    """A Qwen3, from the ``config.json`` of its folder."""

    hidden: int
    inner: int
    layers: int
    heads: int
    tied: bool
    groups: int = 8
    size: int = 128
    vocabulary: int = 151_936

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices: q, k, v, o, gate, up, down."""
        query, key = self.heads * self.size, self.groups * self.size
        ends = [(self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden)]
        return [*ends, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    @property
    def layer(self) -> int:
        """Parameters of a layer: matrices, two norms of the width and two of a head."""
        return sum(a * b for a, b in self.linear) + 2 * self.hidden + 2 * self.size

    @property
    def outside(self) -> int:
        """Parameters outside of the layers: embedding, head where it is its own, last norm."""
        return (1 if self.tied else 2) * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer + self.outside

    @property
    def cache(self) -> int:
        """Bytes of keys and values of a token, bf16."""
        return 2 * self.layers * self.groups * self.size * BF16

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters beside all matrices of all layers."""
        return self.layers * sum(rank * (a + b) for a, b in self.linear)

    def activations(self, tokens: int) -> float:
        """Bytes of a forward and backward pass that recomputes its layers.

        Kept: the input of each layer. Of the layer in work, and its gradients once more: about 6 tensors of the width,
        4 of the queries', 6 of the keys' and 4 of the MLP's. Of the head: a chunk of logits in bf16 and three in fp32.
        """
        query, key = self.heads * self.size, self.groups * self.size
        inside = 6 * self.hidden + 4 * query + 6 * key + 4 * self.inner
        return BF16 * tokens * (self.layers * self.hidden + 2 * inside) + CHUNK * (BF16 + 3 * FP32)


QWEN3 = {
    "qwen3_0.6b": Shape(1024, 3072, 28, 16, True),
    "qwen3_1.7b": Shape(2048, 6144, 28, 16, True),
    "qwen3_4b_lora": Shape(2560, 9728, 36, 32, True),
    "qwen3_8b": Shape(4096, 12288, 36, 32, False),
}
PLACES = {"qwen3_8b": {"learners": 6, "engines": 2, "share": 0.92}}  # vLLM 0.32's default for gpu_memory_utilization
ONE = {"learners": 1, "engines": 1, "share": None}


@dataclass(frozen=True)
class Need:
    """Bytes of one GPU, but for ``cached``.

    Attributes:
        weights: the learner's, in bf16.
        state: fp32 masters and gradients, 16-bit gradients before they are collected, two moments.
        activations: see ``Shape``; for a sharded learner also the layers and matrices that are whole meanwhile.
        handover: whole weights on the GPU of process 0, where the learner is sharded.
        engine: the engine's share; its weights are in it.
        cached: tokens of keys and values that the rest of the share holds, on all GPUs of the engine together.
        shared: whether learner and engine are on one GPU.
    """

    weights: float
    state: float
    activations: float
    handover: float
    engine: float
    cached: int
    shared: bool

    @property
    def learner(self) -> float:
        """The most that the learner needs at once: gradients are gone when weights are handed over."""
        return self.weights + self.state + max(self.activations, self.handover)

    @property
    def most(self) -> float:
        """On the fullest GPU, with an engine that does not sleep."""
        return OTHERS + (self.learner + self.engine if self.shared else max(self.learner, self.engine))


def need(shape: Shape, config: RunConfig, *, learners: int = 1, engines: int = 1, share: float | None = None) -> Need:
    """What ``config`` needs for a model of ``shape``.

    Args:
        shape: of the model.
        config: the recipe.
        learners: GPUs of the learner.
        engines: GPUs of the engine.
        share: of each of them that is the engine's; default: ``gpu_memory_utilization`` in the recipe.
    """
    share = config.sampler.options["gpu_memory_utilization"] if share is None else share
    rank, total = config.policy.lora_rank, shape.parameters
    # Bytes of a trained parameter, beside the weight: learner/optimizer.py.
    state = shape.adapters(rank) * (2 + 2) * FP32 if rank else total * (BF16 + FP32 + FP32 + 2 * FP32)
    activations = shape.activations(config.train.micro_tokens)
    if learners > 1:
        whole = shape.outside + 2 * shape.layer  # one at work, the next one on its way
        activations += whole * BF16 + shape.outside * (BF16 + FP32)  # and gradients, summed in fp32
    room = share * GPU - shape.parameters * BF16 / engines - ENGINE_WORK
    return Need(
        weights=total * BF16 / learners,
        state=state / learners,
        activations=activations,
        handover=float(total * BF16) if learners > 1 else 0.0,
        engine=share * GPU,
        cached=int(room * engines / shape.cache),
        shared=config.sampler.backend == "vllm",
    )


def needs(examples: Path) -> dict[str, Need]:
    """Of every recipe in ``examples``."""
    return {
        name: need(shape, load_config(str(examples / f"{name}.toml")), **PLACES.get(name, ONE))
        for name, shape in QWEN3.items()
    }


def table(examples: Path) -> list[str]:
    """The lines of the table in docs/recipes.md, GB (10^9 bytes) of a GPU."""
    titles = (
        "weights",
        "gradients, masters, moments",
        "activations",
        "engine's share",
        "in use at most",
        "tokens cached",
    )
    lines = [f"| recipe | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, found in needs(examples).items():
        sizes = found.weights, found.state, found.activations, found.engine, found.most
        cells = " | ".join(f"{size / 1e9:.1f}" for size in sizes)
        lines.append(f"| `{name}` | {cells} | {found.cached:,} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(Path(__file__).parents[2] / "examples")))
