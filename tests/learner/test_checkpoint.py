"""Policies from folders, and the learner's state beside them."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch

from agentrl.config import load_config
from agentrl.errors import RunFolderError, UserError
from agentrl.learner.checkpoint import load_policy, load_state, load_tokenizer, save_checkpoint
from agentrl.learner.pack import Trajectory
from agentrl.learner.step import Learner
from agentrl.tiny import build_model, save_policy

FOREST = [Trajectory((1, 2, 3, 4 + n), (False, False, True, True), (0.0, 0.0, -1.0, -1.0), 1.0 - n) for n in range(3)]


def moved(model):
    """A learner two steps on its way."""
    learner = Learner(model, load_config(None, {"train.max_gap": 1e9, "train.lr": 1e-3}))
    for _ in range(2):
        learner._update(FOREST, check_gap=False)
    return learner


def test_a_learner_goes_on_bit_for_bit(make_model, tokenizer, tmp_path):
    learner = moved(make_model())
    save_checkpoint(tmp_path, learner, tokenizer, {"step": 2, "cursor": 5})
    model, _ = load_policy(tmp_path)
    again = Learner(model, learner.config)
    assert load_state(tmp_path, again) == {"step": 2, "cursor": 5, "updates": 2}
    first, second = (one._update(FOREST, check_gap=False) for one in (learner, again))
    assert first == second
    pairs = zip(learner.weights().items(), again.weights().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_state_of_another_policy_is_refused(make_model, tokenizer, tmp_path):
    save_checkpoint(tmp_path, moved(make_model()), tokenizer, {"step": 2})
    other = Learner(build_model(tokenizer, hidden=64, layers=3), load_config())
    with pytest.raises(RunFolderError, match="does not fit the policy"):
        load_state(tmp_path, other)


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
