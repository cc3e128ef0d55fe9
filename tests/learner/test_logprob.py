"""Packing is an optimisation only: log-probs, entropies, losses and gradients are those of flat rows."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import transformers
from forests import Rows, SmallModel, forests, gradients, relative, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from agentrl.errors import ConfigError
from agentrl.learner import attention, logprob
from agentrl.learner import pack as packing
from agentrl.learner.attention import ATTENTION
from agentrl.learner.logprob import check_packable, hidden_states, target_logprobs
from agentrl.learner.pack import micro_batches, pack

SIZES = st.sampled_from([(128, 48, 48), (4, 5, 10**9), (2, 0, 10**9), (7, 12, 1)])


def sizes_of(square, family, worth):
    """The forest cut and shared differently, so that small ones take every path."""
    return mock.patch.multiple(attention, SQUARE=square, FAMILY=family), mock.patch.object(packing, "WORTH", worth)


def weights(mask, seed):
    """A weight for every token, so that a mix-up cannot cancel out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask


def flat_scores(logits_of, rows, temperature):
    """[L, T] log-probs and entropies, row by row; 0 where masked."""
    found = []
    for i, row in enumerate(rows.lists()):
        table = (logits_of(row) / temperature).log_softmax(-1)
        own = rows.mask[i, 1 : len(row)]
        picked = table[:-1].gather(1, torch.tensor(row[1:], dtype=torch.long)[:, None])[:, 0]
        spread = -(table.exp() * table).sum(-1)[:-1]
        pad = (1, rows.mask.shape[1] - len(row))
        found.append(torch.stack([torch.nn.functional.pad(x * own, pad) for x in (picked, spread)]))
    return torch.stack(found, dim=1)


@pytest.fixture(scope="module")
def small():
    return SmallModel()


@settings(max_examples=60)
@given(forests(), SIZES, st.sampled_from([1.0, 0.7]), st.sampled_from([2**25, 120]))
def test_loss_and_gradients_are_those_of_flat_rows_to_the_last_digits(small, rows, sizes, temperature, chunk):
    """In float64, with log-probs and entropies in the loss, in one chunk of logits and in many."""
    cut, share = sizes_of(*sizes)
    with cut, share, mock.patch.object(logprob, "CHUNK", chunk):
        logprobs, entropies = target_logprobs(small, pack(*rows), temperature, entropy=True)
        loss = (weights(rows.mask, 1) * logprobs + weights(rows.mask, 2) * entropies).sum()
        found = gradients(small, loss)
    expected = flat_scores(small.flat_logits, rows, temperature)
    assert torch.allclose(torch.stack([logprobs, entropies]), expected, atol=1e-10)
    wanted = (weights(rows.mask, 1) * expected[0] + weights(rows.mask, 2) * expected[1]).sum()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-9, abs=1e-9)
    assert relative(found, gradients(small, wanted)) < 1e-9


@settings(max_examples=30)
@given(forests(), st.integers(1, 100))
def test_micro_batches_of_any_size_add_up(small, rows, max_tokens):
    weight = weights(rows.mask, 1)
    whole = gradients(small, (weight * target_logprobs(small, pack(*rows))[0]).sum())
    small.zero_grad(set_to_none=True)
    for part in micro_batches(rows.token_ids, rows.lengths, max_tokens):
        loss = (weight[part] * target_logprobs(small, pack(*(x[part] for x in rows)))[0]).sum()
        if loss.requires_grad:
            loss.backward()
    total = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in small.named_parameters()}
    assert relative(total, whole) < 1e-9


CASES = {
    "a single leaf": [[1, 2, 3, 4]],
    "a single token": [[1]],
    "duplicates": [[1, 2, 3], [1, 2, 3], [1, 2, 3]],
    "a prefix of another": [[1, 2, 3, 4, 5], [1, 2, 3], [1, 2]],
    "wide": [[1, 2, 3, n] for n in range(30)],
    "deep": [[1, *[2] * n, 3, n] for n in range(25)],
    "strangers": [[n, n + 1, n + 2] for n in range(8)],
    "long": [[*[1] * 150, n, *[2] * 60] for n in range(3)],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("masked", ["nothing", "one row", "all"])
def test_forests_of_every_shape(small, case, masked):
    rows = rows_of(CASES[case])
    if masked != "nothing":
        rows.mask[0 if masked == "one row" else slice(None)] = False
    logprobs, entropies = target_logprobs(small, pack(*rows), entropy=True)
    expected = flat_scores(small.flat_logits, rows, 1.0)
    assert torch.allclose(torch.stack([logprobs, entropies]), expected, atol=1e-12)
    assert bool((torch.stack([logprobs, entropies])[:, ~rows.mask] == 0).all())
    loss, wanted = (logprobs * weights(rows.mask, 3)).sum(), (expected[0] * weights(rows.mask, 3)).sum()
    assert relative(gradients(small, loss), gradients(small, wanted)) < 1e-9


TINY = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def build(name, dtype=torch.float32, **changed):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **TINY | HEADS | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | changed
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


@pytest.fixture(scope="module", params=["Qwen2", "Qwen3", "Llama", "Llama without groups"])
def pair(request):
    """(packed, flat) of the same weights."""
    name, _, ungrouped = request.param.partition(" ")
    extra = {"num_key_value_heads": 4} if ungrouped else {}
    packed = build(name, head_dim=8, **extra).train()
    flat = copy.deepcopy(packed)
    packed.set_attn_implementation(ATTENTION)
    flat.set_attn_implementation("sdpa")
    return packed, flat


@settings(max_examples=15)
@given(forests(), SIZES, st.sampled_from([1.0, 0.7]))
def test_transformers_models_agree_with_their_own_attention(pair, rows, sizes, temperature):
    packed, flat = pair
    cut, share = sizes_of(*sizes)
    with cut, share:
        logprobs, _ = target_logprobs(packed, pack(*rows), temperature)
        found = gradients(packed, (weights(rows.mask, 1) * logprobs).sum())
    expected = flat_scores(lambda ids: flat(torch.tensor([ids]), use_cache=False).logits[0], rows, temperature)[0]
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert relative(found, gradients(flat, (weights(rows.mask, 1) * expected).sum())) < 1e-5


def test_hidden_states_are_the_decoders(pair):
    packed, flat = pair
    rows = rows_of([[1, 2, 3, 4], [1, 2, 5]])
    batch = pack(*rows)
    found = hidden_states(packed, batch)
    for i, row in enumerate(rows.lists()):
        expected = flat.get_decoder()(torch.tensor([row]), use_cache=False).last_hidden_state[0]
        parents = batch.parent_index[batch.gather[i, 1 : len(row)]]
        assert torch.allclose(found[parents], expected[:-1], atol=1e-5)


def test_the_first_token_of_a_branch_is_supervised(small):
    """Two siblings part at once after a shared prompt; both first tokens hang on the prompt's last hidden state."""
    rows = rows_of([[5, 6, 7, 8], [5, 6, 7, 9]], [[False] * 3 + [True]] * 2)
    batch = pack(*rows)
    assert batch.parent_index.tolist() == [2, 2]
    expected = small.flat_logits([5, 6, 7])[-1].log_softmax(-1)[[8, 9]]
    assert torch.allclose(target_logprobs(small, batch)[0][:, 3], expected, atol=1e-12)


# -- chunks of logits -------------------------------------------------------------------------------------------------


class Counting(torch.nn.Linear):
    """A head that remembers how many logits it was asked for at a time."""

    def forward(self, x):
        self.asked = [*getattr(self, "asked", []), x.shape[0] * self.out_features]
        return super().forward(x)


def test_no_more_logits_at_a_time_than_a_chunk():
    model = SmallModel()
    model.head = Counting(16, 40, dtype=torch.float64)
    rows = rows_of([[n, *range(n, n + 9)] for n in range(20)])
    with mock.patch.object(logprob, "CHUNK", 1000):
        logprobs, entropies = target_logprobs(model, pack(*rows), entropy=True)
        made = len(model.head.asked)
        (logprobs.sum() + entropies.sum()).backward()
    assert made == 8  # 180 targets, 25 at a time
    assert max(model.head.asked) == 1000
    assert len(model.head.asked) == 2 * made, "made again in the backward pass, not kept"


def test_without_gradients_logits_are_made_once():
    model = SmallModel()
    model.head = Counting(16, 40, dtype=torch.float64)
    rows = rows_of([[n, *range(n, n + 9)] for n in range(20)])
    with mock.patch.object(logprob, "CHUNK", 1000), torch.no_grad():
        found, none = target_logprobs(model, pack(*rows))
    assert none is None
    assert len(model.head.asked) == 8
    assert torch.allclose(found, flat_scores(model.flat_logits, rows, 1.0)[0], atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_of_half_precision_are_scored_in_fp32(dtype):
    model = build("Qwen3", dtype, head_dim=8)
    model.set_attn_implementation(ATTENTION)
    batch = pack(*rows_of([[1, 2, 3], [1, 4]]))
    logprobs, entropies = target_logprobs(model, batch, entropy=True)
    assert logprobs.dtype == entropies.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    logits = model.get_output_embeddings()(hidden_states(model, batch)[batch.parent_index]).to(logprobs.dtype)
    expected = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
    assert torch.allclose(logprobs[batch.mask], expected[batch.gather[batch.mask]], atol=1e-6)


def test_temperature_zero_is_scored_untempered_as_the_sampler_does(small):
    batch = pack(*rows_of([[1, 2, 3]]))
    assert torch.equal(target_logprobs(small, batch, 0.0)[0], target_logprobs(small, batch, 1.0)[0])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 with transformers 5.23
def test_adapters_on_the_head_take_part():
    peft = pytest.importorskip("peft")
    model = build("Qwen3", head_dim=8)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    adapted.set_attn_implementation(ATTENTION)
    rows = rows_of([[1, 2, 3, 4], [1, 2, 5]])
    with mock.patch.object(logprob, "CHUNK", 80):
        logprobs, _ = target_logprobs(adapted, pack(*rows))
        logprobs.sum().backward()
    found = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.requires_grad}
    assert any("lm_head" in name for name in found)
    adapted.zero_grad(set_to_none=True)
    adapted.set_attn_implementation("sdpa")
    expected = flat_scores(lambda ids: adapted(torch.tensor([ids]), use_cache=False).logits[0], rows, 1.0)[0]
    expected.sum().backward()
    assert torch.allclose(logprobs, expected, atol=1e-5)
    assert relative(found, {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}) < 1e-5


# -- which models fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama"])
def test_models_that_fit_pass_and_are_left_as_they_were(name, dtype):
    model = build(name, dtype).train()
    model.get_decoder().layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    implementation = model.config._attn_implementation
    check_packable(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == implementation != ATTENTION
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("Mistral", {"sliding_window": 4096}, "slides over the last 4096 tokens"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_attention"),
        ("Gemma2", {"head_dim": 8}, "sliding_attention"),
        ("Mamba", {}, "linear_attention"),
        ("Bloom", {"n_head": 4}, "AttentionInterface"),
        ("Llama", {"attention_dropout": 0.1}, "set attention_dropout to 0"),
        ("Cohere", {"logit_scale": 0.06}, "log-probs differ"),  # scales logits behind its output embedding
    ],
)
def test_models_that_do_not_fit_are_refused_by_name(name, changed, reason):
    with pytest.raises(ConfigError, match=rf"(?s){name}ForCausalLM cannot be trained on trees: .*{reason}"):
        check_packable(build(name, **changed))


def peaked(dtype, factor):
    """A model whose logits are ``factor`` times as large; its weights are such that context matters already."""
    model = build("Qwen3", dtype, head_dim=8, initializer_range=0.2)
    with torch.no_grad():
        model.model.norm.weight.mul_(factor)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_very_peaked_logits_are_no_misfit(dtype):
    """They are rounded at their own size: 4,000 in bf16 is a multiple of 16."""
    model = peaked(dtype, 1000)
    assert float(model(torch.tensor([[1, 2, 3]])).logits.detach().abs().max()) > 1000
    check_packable(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1, 1000])
@pytest.mark.parametrize("wrong", ["mask", "positions"])
def test_the_proof_notices_what_the_configuration_does_not_say(wrong, factor, dtype):
    """A model that attends to the whole batch, or counts positions by itself."""
    model = peaked(dtype, factor)
    decoder = model.get_decoder()
    forward = decoder.forward

    def lenient(**kwargs):
        if "tree" in kwargs and wrong == "positions":
            kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        if "tree" in kwargs and wrong == "mask":
            total = kwargs["input_ids"].shape[1]
            kwargs["tree"] = mock.Mock(plan=attention.partition(torch.full((total,), total).numpy()))
        return forward(**kwargs)

    with mock.patch.object(decoder, "forward", lenient), pytest.raises(ConfigError, match="log-probs differ by"):
        check_packable(model)


def test_a_model_that_fails_on_a_packed_text_is_refused_with_its_error():
    model = build("Qwen3", head_dim=8)

    def broken(**kwargs):
        raise ValueError("no such keyword: tree")

    with mock.patch.object(model.get_decoder(), "forward", broken), pytest.raises(ConfigError, match="no such keyword"):
        check_packable(model)


def test_scores_of_nothing_are_zero(small):
    rows = Rows(torch.tensor([[1, 2]]), torch.tensor([2]), torch.zeros(1, 2, dtype=torch.bool))
    logprobs, entropies = target_logprobs(small, pack(*rows), entropy=True)
    assert logprobs.tolist() == entropies.tolist() == [[0.0, 0.0]]
    assert logprobs.dtype == torch.float64
