"""Policies from folders, and the learner's state beside them."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from fixed_rollouts import fixed_rollouts
from transformers import AutoModelForCausalLM

from agentrl.config import load_config
from agentrl.errors import RunFolderError, UserError
from agentrl.learner.checkpoint import LEARNER, STATE, load_policy, load_state, load_tokenizer, save_checkpoint
from agentrl.learner.step import Learner
from agentrl.tiny import build_model, save_policy

CASES = {
    "all weights": {},
    "bf16": {"policy.dtype": "bfloat16"},
    "adapters": {"policy.lora_rank": 4},
    "critic": {"algorithm.name": "ppo"},
    "adaptive KL": {"algorithm.kl_coef": 0.1, "algorithm.kl_target": 1e-3},
}
"""Learners that differ in what has to be saved."""


def config(case):
    return load_config(None, {"train.max_gap": 1e9, "train.lr": 1e-3, "train.warmup": 5} | CASES[case])


def moved(model, case="all weights"):
    """A learner two steps on its way."""
    if case == "bf16":  # but not the frequencies of the positions, which from_pretrained keeps in fp32
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    learner = Learner(model, config(case))
    for seed in (1, 2):
        learner.step(fixed_rollouts(seed))
    return learner


def resumed(folder, case, start):
    """Another learner, as a run that was stopped would make it from ``folder``; ``start`` is the first policy."""
    setting = config(case)
    model = start if setting.policy.lora_rank else load_policy(folder, dtype=setting.policy.dtype)[0]
    learner = Learner(model, setting, reference=start)
    return learner, load_state(folder, learner)


def everything(learner):
    """All numbers that a learner has, by name."""
    critic = {} if learner.critic is None else dict(learner.critic.named_parameters())
    return dict(learner.model.named_parameters()) | critic | learner.optimizer.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_learner_goes_on_bit_for_bit(make_model, tokenizer, tmp_path, case):
    learner = moved(make_model(), case)
    save_checkpoint(tmp_path, learner, tokenizer, {"step": 2, "cursor": 5})
    again, state = resumed(tmp_path, case, make_model())
    assert state == {"step": 2, "cursor": 5}
    assert again.state() == learner.state()
    assert learner.step(fixed_rollouts(3)) == again.step(fixed_rollouts(3))
    one, two = everything(learner), everything(again)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("lost", ["moments", "counters"])
def test_what_is_saved_is_needed(make_model, tokenizer, tmp_path, lost):
    """So the test above can fail: without its moments or counters the learner goes elsewhere."""
    learner = moved(make_model(), "adaptive KL")
    save_checkpoint(tmp_path, learner, tokenizer, {})
    if lost == "moments":
        saved = torch.load(tmp_path / LEARNER)
        torch.save({name: torch.zeros_like(tensor) for name, tensor in saved.items()}, tmp_path / LEARNER)
    else:
        fresh = Learner(make_model(), learner.config).state()
        assert fresh != learner.state()
        (tmp_path / STATE).write_text(json.dumps({"learner": fresh}))
    again, _ = resumed(tmp_path, "adaptive KL", make_model())
    learner.step(fixed_rollouts(3))
    again.step(fixed_rollouts(3))
    assert not all(torch.equal(a, b) for a, b in zip(learner.model.parameters(), again.model.parameters(), strict=True))


@pytest.mark.parametrize("case", ["bf16", "adapters"])
def test_the_saved_policy_is_what_the_sampler_has(make_model, tokenizer, tmp_path, case):
    learner = moved(make_model(), case)
    save_checkpoint(tmp_path, learner, tokenizer, {})
    expected = learner.weights()
    for loaded in (load_policy(tmp_path)[0], AutoModelForCausalLM.from_pretrained(tmp_path)):
        found = dict(loaded.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
        assert all(found[name].dtype == weight.dtype for name, weight in expected.items())


def test_a_state_of_another_policy_is_refused(make_model, tokenizer, tmp_path):
    save_checkpoint(tmp_path, moved(make_model()), tokenizer, {"step": 2})
    other = Learner(build_model(tokenizer, hidden=64, layers=3), load_config())
    with pytest.raises(RunFolderError, match=r"does not fit the policy: missing .*layers\.2"):
        load_state(tmp_path, other)
    (tmp_path / LEARNER).unlink()
    with pytest.raises(RunFolderError, match=r"expected learner\.pt or learner/ beside trainer_state\.json"):
        load_state(tmp_path, other)


@pytest.mark.parametrize("name", [LEARNER, STATE])
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_state_that_was_cut_short_is_refused(make_model, tokenizer, tmp_path, name, left):
    save_checkpoint(tmp_path, moved(make_model()), tokenizer, {"step": 2})
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(left * len(whole))])
    again = Learner(make_model(), config("all weights"))
    with pytest.raises(RunFolderError, match=rf"(?s){name}: expected the state of a learner, .* damaged or cut short"):
        load_state(tmp_path, again)


def test_the_dtype_of_a_policy_can_be_chosen(policy_folder):
    assert next(load_policy(policy_folder)[0].parameters()).dtype == torch.float32, "as saved"
    assert next(load_policy(policy_folder, dtype="bfloat16")[0].parameters()).dtype == torch.bfloat16


def test_a_policy_and_its_tokenizer_come_back(make_model, tokenizer, tmp_path):
    model = make_model()
    save_policy(model, tokenizer, tmp_path / "deep" / "policy")
    loaded, found = load_policy(tmp_path / "deep" / "policy", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert next(loaded.parameters()).dtype == torch.float32
    assert (found.chat_template, found.eos_token_id) == (tokenizer.chat_template, tokenizer.eos_token_id)
    assert found("double 7")["input_ids"] == tokenizer("double 7")["input_ids"]


def test_folders_that_are_no_policy(policy_folder, tmp_path):
    for load in (load_policy, load_tokenizer):
        with pytest.raises(UserError, match=r"expected a Hugging Face folder with a config\.json"):
            load(tmp_path)
    cut = tmp_path / "cut"
    shutil.copytree(policy_folder, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(cut)
    (cut / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer of policy .* cannot be loaded"):
        load_policy(cut)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(policy_folder, "no such device")


def test_a_tokenizer_with_more_entries_than_rows_is_refused(make_model, tokenizer, tmp_path):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<one>", "<more>"])
    with pytest.raises(UserError, match="450 entries and the model 448 rows"):
        save_policy(make_model(), larger, tmp_path)
    make_model().save_pretrained(tmp_path)
    larger.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="450 entries, the model 448 rows"):
        load_policy(tmp_path)
