"""The embedded engine: what it saves, which models it takes, and how it fails."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
import torch
import transformers

from agentrl.errors import SamplerError, UserError
from agentrl.sampler import hf, slots
from agentrl.sampler.hf import HFSampler
from agentrl.types import SamplingParams

PROMPT = tuple(range(30, 71))
SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
async def make_sampler(make_model):
    """Samplers that need no ``await`` to be made, closed at the end."""
    made = []

    def make(model=None, tokenizer=None, **options):
        options = {"max_slots": 48, "max_length": 160} | options
        made.append(HFSampler(make_model() if model is None else model, tokenizer, **options))
        return made[-1]

    yield make
    for sampler in made:
        await sampler.close()


@pytest.fixture
def sampler(make_sampler):
    return make_sampler()


def build(name, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    return getattr(transformers, f"{name}ForCausalLM")(config)


async def group(sampler, prompt, size=8, tokens=6):
    return await asyncio.gather(*(sampler.sample(prompt, SamplingParams(tokens, seed=seed)) for seed in range(size)))


# -- what is computed only once ---------------------------------------------------------------------------------------


async def test_the_prompt_of_a_group_is_computed_once(sampler):
    await group(sampler, PROMPT)
    assert sampler.prompt_tokens == 8 * 41
    assert sampler.reused_tokens == 7 * 40, "all but the last token, which gives the first logits"
    assert sampler.generated_tokens == 8 * 6


async def test_what_prompts_have_in_common_is_computed_once(sampler):
    one, other = [*PROMPT[:32], 1, 2, 3], [*PROMPT[:32], 4, 5, 6]
    await sampler.sample(one, SamplingParams(2))
    await sampler.sample(other, SamplingParams(2))
    assert sampler.reused_tokens == 32


async def test_a_next_turn_computes_only_what_is_new(sampler):
    first = await sampler.sample(PROMPT, SamplingParams(10))
    before = sampler.reused_tokens
    await sampler.sample([*PROMPT, *first.token_ids, 5, 6, 7], SamplingParams(10))
    assert sampler.reused_tokens - before == 41 + 9, "the last sampled token was never fed to the model"


async def test_a_group_that_waits_for_its_prompt_computes_it_once_in_chunks(sampler, monkeypatch):
    rows = []
    forward = sampler._forward
    monkeypatch.setattr(hf, "MAX_ROWS", 16)
    monkeypatch.setattr(sampler, "_forward", lambda chunks: rows.append(chunks) or forward(chunks))
    await group(sampler, PROMPT)
    assert sampler.reused_tokens == 7 * 40
    assert max(sum(len(c.token_ids) for c in chunks) for chunks in rows) <= 16
    written = Counter((c.slot, c.start + i) for chunks in rows for c in chunks for i in range(len(c.token_ids)))
    assert set(written.values()) == {1}


@pytest.mark.parametrize("rows", [3, 16, 50])
async def test_chunked_prompts_have_the_same_bits(make_sampler, monkeypatch, same, rows):
    prompts = [PROMPT[:n] for n in (41, 40, 3, 17)] + [tuple(range(100, 190))]
    whole = make_sampler()
    expected = [await whole.sample(prompt, SamplingParams(8, seed=1)) for prompt in prompts]
    monkeypatch.setattr(hf, "MAX_ROWS", rows)
    chunked = make_sampler()
    same(await asyncio.gather(*(chunked.sample(prompt, SamplingParams(8, seed=1)) for prompt in prompts)), expected)


@pytest.mark.parametrize("rows", [40, 144])
async def test_so_have_long_ones(make_sampler, monkeypatch, same, exact, rows):
    """BLAS sums over many keys in an order that depends on their number."""
    prompts = [[(7 * i + n) % 448 for i in range(n)] for n in (190, 250, 330, 490)]
    whole = make_sampler(max_length=512)
    assert whole.deterministic or not exact
    expected = [await whole.sample(prompt, SamplingParams(8, seed=1)) for prompt in prompts]
    monkeypatch.setattr(hf, "MAX_ROWS", rows)
    chunked = make_sampler(max_length=512)
    same(await asyncio.gather(*(chunked.sample(prompt, SamplingParams(8, seed=1)) for prompt in prompts)), expected)


async def test_slots_are_neither_lost_nor_given_twice(make_sampler):
    sampler = make_sampler(max_slots=5)
    jobs = [
        asyncio.create_task(sampler.sample([*PROMPT[: n % 40 + 1], n], SamplingParams(1 + n % 7, seed=n)))
        for n in range(40)
    ]
    for job in jobs[::3]:
        await asyncio.sleep(0)
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)
    await sampler.sample(PROMPT, SamplingParams(1))
    await sampler.close()
    assert not [*sampler._running, *sampler._waiting, *sampler._by_slot]
    assert sorted([*sampler._free, *sampler._idle]) == list(range(5))


# -- failing ----------------------------------------------------------------------------------------------------------


async def test_a_failure_in_the_engine_reaches_everybody(sampler, monkeypatch):
    def explode(chunks):
        raise RuntimeError("out of memory")

    alive = asyncio.create_task(sampler.sample(PROMPT, SamplingParams(100)))
    await asyncio.sleep(0.01)
    monkeypatch.setattr(sampler, "_forward", explode)
    jobs = [alive, *(asyncio.create_task(sampler.sample(PROMPT, SamplingParams(2))) for _ in range(3))]
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*jobs, return_exceptions=True)
        assert [type(e) for e in ended] == [SamplerError] * 4
        assert "RuntimeError('out of memory')" in str(ended[0])
        assert isinstance(ended[0].__cause__, RuntimeError)
        for late in (sampler.sample(PROMPT, SamplingParams(2)), sampler.update_weights({}, 1)):
            with pytest.raises(SamplerError, match="out of memory"):
                await late
        with pytest.raises(SamplerError, match="out of memory"):
            [event async for event in sampler.stream(PROMPT, SamplingParams(2))]


async def test_what_arrives_during_the_failing_step_is_told_too(sampler, monkeypatch):
    entered, go = threading.Event(), threading.Event()

    def explode(chunks):
        entered.set()
        go.wait(5)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(sampler, "_forward", explode)
    first = asyncio.create_task(sampler.sample(PROMPT, SamplingParams(2)))
    await asyncio.to_thread(entered.wait)
    second = asyncio.create_task(sampler.sample(PROMPT, SamplingParams(2)))
    update = asyncio.create_task(sampler.update_weights({}, 1))
    await asyncio.sleep(0)
    go.set()
    async with asyncio.timeout(5):
        ended = await asyncio.gather(first, second, update, return_exceptions=True)
    assert [type(e) for e in ended] == [SamplerError] * 3
    assert all("out of memory" in str(e) for e in ended)


async def test_weights_that_fail_half_way_end_the_engine(sampler, make_model):
    class Poisoned(torch.Tensor):
        """Has the right shape and cannot be read."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.Tensor.copy_:
                raise RuntimeError("device lost")
            return super().__torch_function__(func, types, args, kwargs or {})

    source = {name: p.detach() for name, p in make_model().named_parameters()}
    last = list(source)[-1]
    source[last] = source[last].clone().as_subclass(Poisoned)
    async with asyncio.timeout(5):
        with pytest.raises(SamplerError, match="device lost"):
            await sampler.update_weights(source, 1)
        with pytest.raises(SamplerError, match="device lost"):
            await sampler.sample(PROMPT, SamplingParams(2))


def test_a_loop_that_ended_early_does_not_stop_the_engine(make_model):
    sampler = HFSampler(make_model(), max_slots=4, max_length=256)

    async def leave():
        task = asyncio.ensure_future(sampler.sample(PROMPT, SamplingParams(150)))
        await asyncio.sleep(0.01)
        sampler._post(lambda: None)
        task.add_done_callback(lambda t: t.cancelled() or t.exception())

    asyncio.run(leave())
    done = asyncio.run(sampler.sample(PROMPT, SamplingParams(2)))
    assert len(done.token_ids) == 2
    asyncio.run(sampler.close())
    assert not sampler._thread.is_alive()


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"num_key_value_heads": 4}),
        ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
        ("Mistral", {"sliding_window": None}),
        ("Mistral", {"sliding_window": 128}),
    ],
)
async def test_families_of_models(same, exact, name, changes):
    model = build(name, **changes)
    with torch.inference_mode():
        plain = model.eval()(torch.tensor([[*PROMPT]])).logits[0, -1].log_softmax(-1)
    sampler = HFSampler(model, max_slots=16, max_length=128)
    try:
        assert sampler.deterministic or not exact
        alone = await sampler.sample(PROMPT, SamplingParams(12, seed=0))
        assert alone.logprobs[0] == pytest.approx(float(plain[alone.token_ids[0]]), abs=1e-5)
        await sampler.update_weights(dict(model.named_parameters()), 1)  # nothing to reuse
        jobs = [sampler.sample(range(n, 2 * n + 1), SamplingParams(20, seed=n)) for n in (3, 20, 50)]
        done, *_ = await asyncio.gather(sampler.sample(PROMPT, SamplingParams(12, seed=0)), *jobs)
        same((done.token_ids, done.logprobs), (alone.token_ids, alone.logprobs))
    finally:
        await sampler.close()


@pytest.mark.parametrize("sizes", [(203, 72), (199, 50), (511, 96), (1000, 36)])
async def test_odd_sizes_keep_their_bits_or_promise_none(sizes):
    """Where rows are no multiple of a vector register, the last ones may take another road through the processor."""
    vocabulary, width = sizes
    model = build("Llama", vocab_size=vocabulary, intermediate_size=width)
    sampler = HFSampler(model, max_slots=64, max_length=128)
    params = [SamplingParams(9, 0.7, seed=n) for n in range(12)]
    alone = [await sampler.sample(PROMPT[: 3 * n + 5], p) for n, p in enumerate(params)]
    await sampler.update_weights(dict(model.named_parameters()), 0)  # nothing to reuse
    jobs = (sampler.sample(PROMPT[: 3 * n + 5], p) for n, p in enumerate(params))
    assert (await asyncio.gather(*jobs) == alone) or not sampler.deterministic
    await sampler.close()


async def test_a_mixture_of_experts_is_sampled_but_promised_no_bits():
    """An expert sees as many rows as chose it, so its matrix products depend on the batch."""
    model = build("Qwen3Moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    sampler = HFSampler(model, max_slots=16, max_length=128)
    done = await sampler.sample(PROMPT, SamplingParams(12))
    assert not sampler.deterministic
    assert len(done.token_ids) == 12
    await sampler.close()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Mamba", {}, "MambaForCausalLM cannot be sampled by the embedded engine"),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "BloomForCausalLM cannot be sampled"),
        ("Cohere", {}, "CohereForCausalLM cannot be sampled .* differ from its own"),
        ("Mistral", {"sliding_window": 64}, "MistralForCausalLM attends only to the last 64 tokens"),
    ],
)
def test_models_with_another_attention_are_refused_by_name(name, changes, message):
    with pytest.raises(UserError, match=message):
        HFSampler(build(name, **changes), max_slots=16, max_length=100)


def test_more_length_than_positions_is_refused(make_model):
    with pytest.raises(UserError, match=r"sampler.max_length is 513, but Qwen3ForCausalLM has 512 positions"):
        HFSampler(make_model(), max_length=513)


@pytest.mark.parametrize("length", [2, 12, 16, 17, 22, 25])
async def test_short_lengths_can_be_proved_too(make_sampler, exact, length):
    assert make_sampler(max_slots=2, max_length=length).deterministic or not exact


@pytest.mark.parametrize("weakness", [{}, {"ROWS": 1}, {"QUERY_ROWS": 1}, {"KEYS": 10**6}])
@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (3, 1), (5, 5)])
async def test_what_is_promised_holds(monkeypatch, weakness, heads, shared):
    """However the engine lays out its rows, on whatever processor: the proof fails or the bits are equal."""
    for name, value in weakness.items():
        monkeypatch.setattr(slots, name, value)
    model = build(
        "Llama",
        hidden_size=16 * heads,
        intermediate_size=50,
        vocab_size=211,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        max_position_embeddings=512,
    )
    sampler = HFSampler(model, max_slots=32, max_length=400)
    prompts = [[(11 * i + n) % 211 for i in range(n)] for n in (1, 2, 9, 40, 130, 191, 230, 300, 340)]
    alone = []
    for n, prompt in enumerate(prompts):
        alone.append(await sampler.sample(prompt, SamplingParams(9, seed=n)))
    await sampler.update_weights(dict(model.named_parameters()), 0)  # nothing to reuse
    jobs = [sampler.sample(prompt[:-1], SamplingParams(1)) for prompt in prompts[1:]]
    await asyncio.gather(*jobs)  # now the last token of each prompt is computed by itself
    together = await asyncio.gather(*(sampler.sample(p, SamplingParams(9, seed=n)) for n, p in enumerate(prompts)))
    await sampler.close()
    assert together == alone or not sampler.deterministic
