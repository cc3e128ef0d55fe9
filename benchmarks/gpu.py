"""On a GPU: rollouts against plain ``LLM.generate``, weights on every road, the learner against the GPU's peak.

The model has the shape of Qwen3-0.6B and random weights, in bf16, so nothing is downloaded; ``--model DIR`` takes
another one. What is not here is said, and the exit status is 0.

- ``rollouts``: groups and entropy trees through our sampler, as a run plays them, with prompts that nobody has seen;
  turns have 32 to 256 tokens. Then vLLM by itself gets the very same requests, prompts and lengths, all at once, which
  no agent could ask at once: an upper bound. It draws neither log-probs nor entropies.
- ``weights``: seconds of ``update_weights``, and how many times as long as its bytes take by the bandwidth that was
  measured before, host to device for ``file`` and device to device for the others. ``nccl`` needs a second GPU.
- ``learner``: forward and backward over a forest, MFU by 6 N operations a unique token and attention (``_flops.py``),
  and FlexAttention against torch's own attention: with the mask written out, and over rows that share nothing.

    python benchmarks/gpu.py [--only rollouts weights learner] [--model DIR] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _bench import Row, parser, report
from _forest import learner_rows, timed
from _turns import POLICIES, Field, Request

from agentrl.config import load_config
from agentrl.learner.leader import Leader
from agentrl.learner.step import Learner
from agentrl.sampler.vllm import VLLMSampler
from agentrl.sampler.vllm_engine import engine_environment

PARTS = ("rollouts", "weights", "learner")
TASKS, LEAVES = 32, 8
SLOTS, LENGTH, SHARE = 256, 2048, 0.4
RANK = 32
COPIED = 1 << 30


def missing() -> str | None:
    """What these measurements lack here."""
    if not torch.cuda.is_available():
        return "torch finds no GPU here"
    if importlib.util.find_spec("vllm") is None:
        return 'vLLM is not installed; pip install "agentrl[vllm]"'
    return None


def machine() -> list[str]:
    """What the figures belong to."""
    import vllm

    found = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    memory = f"{found.total_memory / 1e9:.1f} GB, {torch.cuda.device_count()} here"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, vLLM {vllm.__version__}"
    return [f"{found.name}, {memory}, driver {driver}, {versions}"]


def random_model() -> Any:
    """The shape of Qwen3-0.6B."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        made = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151_936,
                hidden_size=1024,
                intermediate_size=3072,
                num_hidden_layers=28,
                num_attention_heads=16,
                num_key_value_heads=8,
                head_dim=128,
                max_position_embeddings=40_960,
                tie_word_embeddings=True,
            )
        )
    return made.bfloat16()


def free() -> None:
    """What nothing refers to any more goes back to the GPU, for engines in other processes."""
    gc.collect()
    torch.cuda.empty_cache()


# -- rollouts ---------------------------------------------------------------------------------------------------------


async def our_rollouts(folder: Path, rounds: int) -> dict[str, list[tuple[float, list[Request]]]]:
    """Seconds and requests of every round, by policy; the policies take turns."""
    sampler = await VLLMSampler.start(
        folder, max_slots=SLOTS, max_length=LENGTH, options={"gpu_memory_utilization": SHARE}
    )
    grown: dict[str, list[tuple[float, list[Request]]]] = {name: [] for name in POLICIES}
    try:
        field = Field(sampler, TASKS, LEAVES)
        for turn in range(rounds + 1):
            for name, rows in grown.items():
                began = time.perf_counter()
                requests = await field.grow(name, turn)
                if turn:  # the first one warms up
                    rows.append((time.perf_counter() - began, requests))
    finally:
        await sampler.close()
    return grown


def plain(folder: Path, batches: Sequence[Sequence[Request]]) -> list[float]:
    """Seconds that vLLM takes for each batch of requests by itself."""
    from vllm import LLM, SamplingParams, TokensPrompt

    with engine_environment("file"):
        llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            max_model_len=LENGTH,
            max_num_seqs=SLOTS,
            gpu_memory_utilization=SHARE,
            generation_config="vllm",
        )
    taken = []
    for batch in (batches[0], *batches):  # the first one warms up
        prompts = [TokensPrompt(prompt_token_ids=list(each.prompt)) for each in batch]
        params = [
            SamplingParams(temperature=1.0, max_tokens=each.tokens, ignore_eos=True, detokenize=False) for each in batch
        ]
        llm.reset_prefix_cache()
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        taken.append(time.perf_counter() - began)
        if sum(len(output.outputs[0].token_ids) for output in outputs) != sum(each.tokens for each in batch):
            sys.exit("LLM.generate did not write as many tokens as it was asked for: this is not the same work")
    llm.llm_engine.engine_core.shutdown()
    return taken[1:]


def rollout_rows(folder: Path, model: Any, rounds: int) -> list[Row]:
    """Tokens per second of ours and of vLLM's own."""
    grown = asyncio.run(our_rollouts(folder, rounds))
    free()
    seconds = iter(plain(folder, [requests for found in grown.values() for _, requests in found]))
    rows = []
    for name, found in grown.items():
        tokens = [sum(each.tokens for each in requests) for _, requests in found]
        direct = [next(seconds) for _ in found]
        ours = median(count / taken for count, (taken, _) in zip(tokens, found, strict=True))
        theirs = median(count / taken for count, taken in zip(tokens, direct, strict=True))
        share = median(taken / (own[0]) for taken, own in zip(direct, found, strict=True))
        label = f"{name}, {TASKS} x {LEAVES} leaves"
        rows.append(Row(f"{label}: generated", ours, "tok/s"))
        rows.append(Row(f"{label}: LLM.generate, same requests at once", theirs, "tok/s"))
        rows.append(Row(f"{label}: ours", share, "x LLM.generate"))
    return rows


# -- weights ----------------------------------------------------------------------------------------------------------


def bandwidths(rounds: int) -> dict[str, float]:
    """Bytes a second of copies from the host's pinned memory and on the device, which reads and writes each byte."""
    here = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    sources = {
        "host to device": torch.empty(COPIED, dtype=torch.uint8, pin_memory=True),
        "device to device": torch.empty_like(here),
    }
    return {
        name: COPIED / timed(lambda source=source: here.copy_(source, non_blocking=True), rounds)  # type: ignore[misc]
        for name, source in sources.items()
    }


async def update_seconds(folder: Path, learner: Learner, transport: Any, rounds: int) -> float:
    """Of an update on one road, from the call to its return; the first one, which may have to connect, is left out."""
    options: dict[str, Any] = {"gpu_memory_utilization": SHARE, "enforce_eager": True}
    if transport == "adapter":
        options["max_lora_rank"] = RANK
    sampler = await VLLMSampler.start(folder, max_slots=SLOTS, max_length=LENGTH, transport=transport, options=options)
    leader, taken = Leader(learner), []
    try:
        with tempfile.TemporaryDirectory() as adapters:
            source: Any = leader.weights()
            if transport == "adapter":
                leader.save_adapter(Path(adapters))
                source = Path(adapters)
            for turn in range(rounds + 1):
                torch.cuda.synchronize()
                began = time.perf_counter()
                await sampler.update_weights(source, turn + 1)
                if turn:
                    taken.append(time.perf_counter() - began)
    finally:
        await sampler.close()
    return median(taken)


def weight_rows(folder: Path, model: Any, rounds: int) -> list[Row]:
    """Every road that this machine has."""
    speeds = bandwidths(rounds)
    rows = [Row(f"copy of 1 GiB, {name}", speed / 1e9, "GB/s") for name, speed in speeds.items()]
    roads = {"file": "host to device", "ipc": "device to device"}
    if torch.cuda.device_count() > 1:
        roads["nccl"] = "device to device"
    size = sum(value.numel() * value.element_size() for value in model.parameters())
    for road, way in roads.items():
        free()
        placed = model.to("cuda:1") if road == "nccl" else model  # the engine takes the first GPU
        seconds = asyncio.run(update_seconds(folder, Learner(placed, load_config()), road, rounds))
        rows.append(Row(f"update of {size / 1e9:.2f} GB by {road}", seconds, "s"))
        rows.append(Row(f"update by {road}, over its bytes {way}", seconds * speeds[way] / size, "x"))
    free()
    if importlib.util.find_spec("peft") is not None:
        learner = Learner(model.to("cuda:0"), load_config(None, {"policy.lora_rank": RANK}))
        rows.append(
            Row(f"update by adapter, rank {RANK}", asyncio.run(update_seconds(folder, learner, "adapter", rounds)), "s")
        )
    return rows


def measure(part: str, folder: Path, model: Any, rounds: int) -> list[Row]:
    if part == "learner":
        return learner_rows(model, rounds)
    return (rollout_rows if part == "rollouts" else weight_rows)(folder, model, rounds)


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    made = parser(__doc__, rounds=3)
    made.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help=f"what to measure ({' '.join(PARTS)})")
    made.add_argument("--model", type=Path, help="a Hugging Face folder, in bf16; default: Qwen3-0.6B's shape, random")
    return made.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(words)
    if (why := missing()) is not None:
        print(f"benchmarks/gpu.py was not run: {why}.")
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or Path(temporary)
        for part in options.only:
            if options.model is None:
                model = random_model()
            else:
                from transformers import AutoModelForCausalLM

                model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
            if options.model is None and not any(folder.iterdir()):
                model.save_pretrained(folder)
            rows += measure(part, folder, model, options.rounds)
            del model
            free()
    return report("one GPU, bf16", rows, options, machine())


if __name__ == "__main__":
    sys.exit(main())
