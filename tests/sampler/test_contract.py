"""What every sampler promises. Each test runs against every backend of ``conftest.BACKENDS``."""

from __future__ import annotations

import asyncio
import math
import random

import pytest
import torch

from agentrl.errors import SamplerError
from agentrl.sampler.hf import HFSampler
from agentrl.types import Completion, SamplingParams, StopReason

PROMPT = tuple(range(30, 71))
FREE = SamplingParams(max_tokens=24, seed=3)


def references(model, prompt, done):
    """Log-probs and entropies of ``done`` from one plain forward pass, in float64 after the logits."""
    plain = type(model)(model.config).eval()
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    ids = torch.tensor([[*prompt, *done.token_ids]])
    with torch.inference_mode():
        logits = plain(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    full = torch.log_softmax(logits / (done.temperature or 1.0), dim=-1)
    logprobs, entropies = [], []
    for row, token in zip(full, done.token_ids, strict=True):
        entropies.append(-sum(p * math.log(p) for p in row.exp().tolist()))
        mass, kept = 0.0, []
        for probability, index in sorted(((p, -i) for i, p in enumerate(row.exp().tolist())), reverse=True):
            if mass >= done.top_p:
                break
            mass, kept = mass + probability, [*kept, -index]
        assert token in kept
        logprobs.append(row[token].item() - math.log(mass))
    return logprobs, entropies


def crowd(count, seed, vocab=448):
    """``count`` other requests: other lengths, some with the same beginning, other temperatures and limits."""
    rng = random.Random(seed)
    for number in range(count):
        length = rng.choice([1, 2, 7, 8, 9, 16, 31, 33, 64, 100])
        ids = [rng.randrange(vocab) for _ in range(length)]
        shared = rng.choice([0, 0, 5, 8, 24, len(PROMPT)])
        params = SamplingParams(
            rng.randrange(1, 40), rng.choice([0.0, 0.7, 1.0, 1.5]), rng.choice([1.0, 0.8]), seed=1000 * seed + number
        )
        yield [*PROMPT[:shared], *ids], params


async def test_ids_in_ids_out(make_sampler):
    done = await (await make_sampler()).sample(PROMPT, FREE)
    assert len(done.token_ids) == len(done.logprobs) == len(done.entropies) == len(done.policy_version) == 24
    assert done.stop_reason is StopReason.LENGTH
    assert all(isinstance(token, int) and 0 <= token < 448 for token in done.token_ids)
    assert all(isinstance(x, float) for x in (*done.logprobs, *done.entropies))
    assert set(done.policy_version) == {0}
    assert (done.temperature, done.top_p) == (1.0, 1.0)


async def test_a_stop_id_ends_the_completion_and_is_its_last_token(make_sampler, same):
    sampler = await make_sampler()
    free = await sampler.sample(PROMPT, FREE)
    stop = free.token_ids[10]
    first = free.token_ids.index(stop)
    cut = await sampler.sample(PROMPT, SamplingParams(24, seed=3, stop_ids=(stop, 447)))
    assert cut.token_ids == free.token_ids[: first + 1]
    same(cut.logprobs, free.logprobs[: first + 1])
    assert cut.stop_reason is StopReason.STOP
    last = await sampler.sample(PROMPT, SamplingParams(first + 1, seed=3, stop_ids=(stop,)))
    assert last.stop_reason is StopReason.STOP, "a stop id on the last allowed token is a stop"


async def test_limits_of_tokens_and_of_length(make_sampler):
    sampler = await make_sampler(max_length=50)
    one = await sampler.sample(PROMPT, SamplingParams(1, seed=3))
    assert (len(one.token_ids), one.stop_reason) == (1, StopReason.LENGTH)
    room = await sampler.sample(PROMPT, SamplingParams(1000, seed=3))
    assert (len(room.token_ids), room.stop_reason) == (50 - len(PROMPT), StopReason.LENGTH)
    brim = await sampler.sample(range(49), SamplingParams(1000))
    assert (len(brim.token_ids), brim.stop_reason) == (1, StopReason.LENGTH)


async def test_the_seed_is_all_the_randomness(make_sampler, same):
    sampler = await make_sampler()
    first = await sampler.sample(PROMPT, FREE)
    same(await sampler.sample(PROMPT, FREE), first)
    same(await (await make_sampler()).sample(PROMPT, FREE), first)
    others = [await sampler.sample(PROMPT, SamplingParams(24, seed=seed)) for seed in (4, 5, -1, 2**63 - 1)]
    assert len({first.token_ids, *(o.token_ids for o in others)}) == 5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.3, 0.5), (0.0, 1.0)])
async def test_logprobs_and_entropies_are_those_of_the_plain_model(make_sampler, make_model, temperature, top_p):
    model = make_model()
    done = await (await make_sampler(model)).sample(PROMPT, SamplingParams(40, temperature, top_p, seed=9))
    logprobs, entropies = references(make_model(), PROMPT, done)
    assert done.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert done.entropies == pytest.approx(entropies, abs=1e-5)
    assert (done.temperature, done.top_p) == (temperature, top_p)


async def test_greedy_takes_the_likeliest_token_whatever_the_seed(make_sampler, make_model):
    sampler = await make_sampler()
    done = await sampler.sample(PROMPT, SamplingParams(8, 0.0, seed=1))
    assert (await sampler.sample(PROMPT, SamplingParams(8, 0.0, 0.5, seed=2))).token_ids == done.token_ids
    plain = make_model().eval()
    ids = list(PROMPT)
    for token in done.token_ids:
        with torch.inference_mode():
            assert int(plain(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


async def test_samples_follow_the_distribution(make_sampler, make_model):
    sampler = await make_sampler()
    seeds = range(400)
    params = [SamplingParams(1, 0.3, seed=seed) for seed in seeds]
    drawn = [d.token_ids[0] for d in await asyncio.gather(*(sampler.sample(PROMPT, p) for p in params))]
    with torch.inference_mode():
        probs = (make_model().eval()(torch.tensor([PROMPT])).logits[0, -1] / 0.3).softmax(-1)
    top = int(probs.argmax())
    expected, spread = 400 * float(probs[top]), math.sqrt(400 * float(probs[top]))
    assert abs(drawn.count(top) - expected) < 4 * spread + 1


# -- bit for bit the same, whatever else is being sampled -------------------------------------------------------------


async def test_equal_bits_are_promised_wherever_the_processor_allows_them(
    make_sampler, processor, processor_keeps_bits
):
    """The tests below ask for them then; elsewhere for equal tokens and log-probs within 1e-4."""
    sampler = await make_sampler()
    if not isinstance(sampler, HFSampler):
        pytest.skip("vLLM's kernels are not ours, and nothing of the kind is promised for them")
    if not sampler.deterministic and not processor_keeps_bits:
        pytest.skip(f"{processor}: matrix products or attention round differently among few rows and many")
    assert sampler.deterministic, f"{processor} keeps the bits of a row among few and many, the engine does not"


@pytest.mark.parametrize("seed", range(3))
async def test_a_crowd_changes_nothing(make_sampler, seed, same):
    alone = await (await make_sampler()).sample(PROMPT, FREE)
    sampler = await make_sampler()
    jobs = [asyncio.create_task(sampler.sample(ids, params)) for ids, params in crowd(15, seed)]
    await asyncio.sleep(0.01 * seed)
    late = asyncio.create_task(sampler.sample(PROMPT, FREE))
    jobs += [asyncio.create_task(sampler.sample(ids, params)) for ids, params in crowd(15, seed + 10)]
    same(await late, alone)
    await asyncio.gather(*jobs)
    same(await sampler.sample(PROMPT, FREE), alone)  # after everybody left, from what they left behind


async def test_every_member_of_a_crowd_is_as_if_alone(make_sampler, same):
    requests = list(crowd(12, seed=5))
    alone = [await (await make_sampler(max_slots=4)).sample(ids, params) for ids, params in requests]
    sampler = await make_sampler()
    together = await asyncio.gather(*(sampler.sample(ids, params) for ids, params in requests))
    same(together, alone)


async def test_siblings_are_as_if_alone(make_sampler, same):
    params = [SamplingParams(16, seed=seed) for seed in range(8)]
    alone = [await (await make_sampler(max_slots=2)).sample(PROMPT, p) for p in params]
    sampler = await make_sampler()
    same(await asyncio.gather(*(sampler.sample(PROMPT, p) for p in params)), alone)


async def test_a_next_turn_is_as_if_sampled_from_the_start(make_sampler, same):
    sampler = await make_sampler()
    ids = list(PROMPT)
    for turn in range(4):
        jobs = [asyncio.create_task(sampler.sample(others, params)) for others, params in crowd(5, turn)]
        params = SamplingParams(10, seed=turn)
        done = await sampler.sample(ids, params)
        same(done, await (await make_sampler(max_slots=2)).sample(ids, params))
        ids += [*done.token_ids, 17, 18, 19]
        await asyncio.gather(*jobs)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
async def test_few_slots_only_take_longer(make_sampler, slots, same, exact):
    requests = list(crowd(10, seed=7))
    wide = await make_sampler()
    expected = await asyncio.gather(*(wide.sample(ids, params) for ids, params in requests))
    narrow = await make_sampler(max_slots=slots)
    assert narrow.deterministic or not exact
    for _ in range(2):
        same(await asyncio.gather(*(narrow.sample(ids, params) for ids, params in requests)), expected)


# -- streaming, cancelling, closing -----------------------------------------------------------------------------------


async def test_the_stream_is_the_sample(make_sampler, same):
    sampler = await make_sampler()
    done = await sampler.sample(PROMPT, FREE)
    events = [event async for event in sampler.stream(PROMPT, FREE)]
    assert tuple(e.token_id for e in events) == done.token_ids
    same(tuple(e.logprob for e in events), done.logprobs)
    same(tuple(e.entropy for e in events), done.entropies)
    assert [e.stop_reason for e in events] == [None] * 23 + [StopReason.LENGTH]


async def test_tokens_are_streamed_as_they_come(make_sampler):
    sampler = await make_sampler(max_length=512)
    stream = sampler.stream(PROMPT, SamplingParams(400))
    async for _ in stream:
        break
    short = await sampler.sample(PROMPT, SamplingParams(2))
    assert len(short.token_ids) == 2
    await stream.aclose()


async def test_a_cancelled_request_leaves_the_others_alone_and_frees_its_slot(make_sampler, same):
    alone = await (await make_sampler()).sample(PROMPT, FREE)
    sampler = await make_sampler(max_slots=2, max_length=512)
    kept = asyncio.create_task(sampler.sample(PROMPT, FREE))
    endless = asyncio.create_task(sampler.sample(range(50), SamplingParams(400)))
    waiting = asyncio.create_task(sampler.sample(range(60), SamplingParams(400)))
    await asyncio.sleep(0.02)
    waiting.cancel()
    endless.cancel()
    for task in (waiting, endless):
        with pytest.raises(asyncio.CancelledError):
            await task
    same(await kept, alone)
    again = await asyncio.gather(sampler.sample(PROMPT, FREE), sampler.sample(PROMPT, FREE))
    same(again, [alone, alone])


async def test_cancelling_at_any_moment_spoils_nothing(make_sampler, same):
    """Also half-way through a prompt, whose computed part must not pass for the whole."""
    sampler = await make_sampler(max_slots=6)
    expected = {}
    for ids, params in crowd(8, seed=11):
        expected[tuple(ids)] = params, await sampler.sample(ids, params)
    rng = random.Random(0)
    for _ in range(8):
        jobs = [asyncio.create_task(sampler.sample(ids, params)) for ids, (params, _) in expected.items()]
        await asyncio.sleep(rng.random() * 0.02)
        for job in rng.sample(jobs, 5):
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
    for ids, (params, done) in expected.items():
        same(await sampler.sample(ids, params), done)


async def test_leaving_a_stream_cancels_it(make_sampler):
    sampler = await make_sampler(max_slots=1, max_length=512)
    stream = sampler.stream(PROMPT, SamplingParams(450))
    async for event in stream:
        assert event.stop_reason is None
        break
    await stream.aclose()
    async with asyncio.timeout(2):
        assert len((await sampler.sample(PROMPT, SamplingParams(3))).token_ids) == 3


async def test_stop_strings(make_sampler, tokenizer):
    sampler = await make_sampler(tokenizer=tokenizer, max_length=400)
    free = await sampler.sample(PROMPT, SamplingParams(40, seed=3))
    text = tokenizer.decode(free.token_ids)
    wanted = text[len(text) // 2 : len(text) // 2 + 4]
    done = await sampler.sample(PROMPT, SamplingParams(40, seed=3, stop_strings=("never to be found", wanted)))
    assert done.token_ids == free.token_ids[: len(done.token_ids)]
    assert done.stop_reason is StopReason.STOP
    assert wanted in tokenizer.decode(done.token_ids)
    assert wanted not in tokenizer.decode(done.token_ids[:-1])


async def test_a_long_stop_string_is_found(make_sampler, tokenizer):
    sampler = await make_sampler(tokenizer=tokenizer, max_length=400)
    free = await sampler.sample(PROMPT, SamplingParams(80, 0.0))
    text = tokenizer.decode(free.token_ids)
    long = SamplingParams(80, 0.0, stop_strings=(text[: len(text) - 8],))
    assert (await sampler.sample(PROMPT, long)).stop_reason is StopReason.STOP


async def test_a_stop_string_in_the_prompt_does_not_count(make_sampler, tokenizer):
    sampler = await make_sampler(tokenizer=tokenizer)
    prompt = tokenizer("</double>", add_special_tokens=False)["input_ids"]
    done = await sampler.sample(prompt, SamplingParams(5, 0.0, stop_strings=("</double>",)))
    assert "</double>" in tokenizer.decode(done.token_ids) or done.stop_reason is StopReason.LENGTH


@pytest.mark.parametrize(
    ("ids", "params", "message"),
    [
        ((), FREE, "a prompt of 0 tokens"),
        (range(160), FREE, "a prompt of 160 tokens cannot be continued: expected 1 to 159"),
        (PROMPT, SamplingParams(0), "max_tokens >= 1"),
        (PROMPT, SamplingParams(1, -0.1), "temperature >= 0"),
        (PROMPT, SamplingParams(1, float("nan")), "temperature >= 0"),
        (PROMPT, SamplingParams(1, top_p=0.0), "0 < top_p"),
        (PROMPT, SamplingParams(1, top_p=1.1), "top_p <= 1"),
        (PROMPT, SamplingParams(1, stop_strings=("x",)), "tokenizer"),
        ((1, 448), FREE, "448"),
        ((-1, 3), FREE, "-1"),
    ],
)
async def test_impossible_requests_are_refused_and_harm_nobody(make_sampler, ids, params, message):
    sampler = await make_sampler()
    running = asyncio.create_task(sampler.sample(PROMPT, FREE))
    with pytest.raises(SamplerError, match=message):
        await sampler.sample(ids, params)
    assert len((await running).token_ids) == 24


async def test_close_fails_whoever_waits_and_whoever_comes(make_sampler):
    sampler = await make_sampler(max_slots=2, max_length=512)
    jobs = [asyncio.create_task(sampler.sample(PROMPT, SamplingParams(450, seed=i))) for i in range(5)]

    async def consume():
        return [event async for event in sampler.stream(PROMPT, SamplingParams(450))]

    jobs.append(asyncio.create_task(consume()))
    await asyncio.sleep(0.02)
    await sampler.close()
    await sampler.close()
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*jobs, return_exceptions=True)
    assert [type(error) for error in ended] == [SamplerError] * 6
    assert all("close" in str(error) for error in ended)
    with pytest.raises(SamplerError, match="closed"):
        await sampler.sample(PROMPT, FREE)
    with pytest.raises(SamplerError, match="closed"):
        await sampler.update_weights({}, 1)


async def test_requests_racing_with_close_all_end(make_sampler):
    sampler = await make_sampler(max_slots=2)

    async def ask(delay):
        await asyncio.sleep(delay)
        await sampler.sample(PROMPT, FREE)

    jobs = [asyncio.create_task(ask(i * 1e-4)) for i in range(60)]
    await asyncio.sleep(0.002)
    closing = asyncio.create_task(sampler.close())
    async with asyncio.timeout(5):
        ended = await asyncio.gather(*jobs, return_exceptions=True)
        await closing
    assert {type(e) for e in ended} <= {SamplerError, type(None)}


# -- new weights ------------------------------------------------------------------------------------------------------


def moved(model, scale=0.05, seed=0):
    """The parameters of ``model``, a little away from where they are."""
    torch.manual_seed(seed)
    return {name: p.detach() + scale * torch.randn_like(p) for name, p in model.named_parameters()}


async def test_new_weights_are_used_at_once_and_nothing_old_is(make_sampler, make_model, same):
    sampler = await make_sampler()
    before = await sampler.sample(PROMPT, FREE)
    model = make_model()
    model.load_state_dict(moved(model), strict=False)
    model.tie_weights()
    await sampler.update_weights(dict(model.named_parameters()), 7)
    after = await sampler.sample(PROMPT, FREE)
    assert (sampler.version, set(after.policy_version)) == (7, {7})
    assert after.logprobs != before.logprobs
    logprobs, _ = references(model, PROMPT, after)
    assert after.logprobs == pytest.approx(logprobs, abs=1e-5)
    same(after, await (await make_sampler(model, version=7)).sample(PROMPT, FREE))  # as of a sampler born with them


async def test_a_checkpoint_folder_is_a_source_too(make_sampler, make_model, tmp_path):
    sampler = await make_sampler()
    model = make_model()
    model.load_state_dict(moved(model), strict=False)
    model.tie_weights()
    with pytest.raises(SamplerError, match="holds no weights"):
        await sampler.update_weights(tmp_path, 1)
    model.save_pretrained(tmp_path)
    await sampler.update_weights(tmp_path, 2)
    done = await sampler.sample(PROMPT, FREE)
    logprobs, _ = references(model, PROMPT, done)
    assert done.logprobs == pytest.approx(logprobs, abs=1e-5)
    assert set(done.policy_version) == {2}
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(SamplerError, match="not a whole safetensors file"):
        await sampler.update_weights(tmp_path, 3)
    assert (await sampler.sample(PROMPT, FREE)).token_ids == done.token_ids


async def test_requests_in_flight_go_on_under_the_new_weights(make_sampler, make_model):
    sampler = await make_sampler(max_length=512)
    model = make_model()
    model.load_state_dict(moved(model), strict=False)
    model.tie_weights()
    beside = asyncio.create_task(sampler.sample(PROMPT[:9], SamplingParams(300, seed=2)))
    await asyncio.sleep(0)  # so that it is asked for first
    events = []
    async for event in sampler.stream(PROMPT, SamplingParams(300, seed=1)):
        events.append(event)
        if len(events) == 5:
            await sampler.update_weights(dict(model.named_parameters()), 1)
    ids, found, entropies, versions, _ = zip(*events, strict=True)
    done = Completion(ids, found, entropies, StopReason.LENGTH, versions)
    for prompt, one in ((PROMPT, done), (PROMPT[:9], await beside)):
        switch = one.policy_version.index(1)
        assert 0 < switch < 300
        assert one.policy_version == (0,) * switch + (1,) * (300 - switch)
        logprobs, _ = references(model, prompt, one)
        assert one.logprobs[switch:] == pytest.approx(logprobs[switch:], abs=1e-5)
        old, _ = references(make_model(), prompt, one)
        assert one.logprobs[:switch] == pytest.approx(old[:switch], abs=1e-5)


async def test_weights_that_do_not_fit_are_refused_and_nothing_is_loaded(make_sampler, make_model, same):
    sampler = await make_sampler()
    before = await sampler.sample(PROMPT, FREE)
    good = moved(make_model())
    last = list(good)[-1]
    wrong_shape = good | {last: torch.zeros(3)}
    missing = {name: value for name, value in good.items() if name != last}
    for source, message in (
        (wrong_shape, f"{last}: expected a tensor of shape"),
        (missing, f"missing \\['{last}'\\]"),
        (good | {"lora": torch.zeros(1)}, "unknown \\['lora'\\]"),
        (good | {last: None}, last),
    ):
        with pytest.raises(SamplerError, match=message):
            await sampler.update_weights(source, 1)
    assert sampler.version == 0
    same(await sampler.sample(PROMPT, FREE), before)
