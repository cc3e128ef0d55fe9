"""Adapters of the rewards' and the branching signal's reference cases: one function per ``fn`` of a case."""

from __future__ import annotations

from typing import Any

import torch
from reference_harness import Adapter, Case, Pair, Result, as_tensor

from agentrl.rewards import deep_research_reward, exact_match_format_reward
from agentrl.rollout.uncertainty import released_entropy
from agentrl.tool_format import Tags

DELIBERATE: dict[str, str] = {
    "closing tags alone": "ARPO gives the bonus for the texts </search> and </python>, wherever they stand; ours "
    "takes calls, because a policy could earn it by mentioning them",
    "the prompt's answers": "Tree-GRPO reads prompt and response as one text and supposes that the prompt has one "
    "<answer> block; where it has none or several, or is not marked as a chat's, answers are lost or taken from the "
    "prompt, and ours only reads the response",
    "stray tags": "ARPO searches the whole context backwards from the last closing tag; ours reads one turn, whose "
    "first opening tag begins the call, so that a turn without one is no call and tags inside of a call are its text",
}

ARPO_REASONS = {
    "bad format: <think> </think> not paired": "not every <think> is closed",
    "bad format: <think> or </think> not found": "no <think> block",
    "bad format: <answer> or </answer> not found": "not exactly one <answer> block",
    "bad format: search/result tags are incomplete": "a <search> call without its end or its <result>",
    "bad format: python/result tags are incomplete": "a <python> call without its end or its <result>",
    "bad format: search/result tags are nested in the wrong order": "a <result> inside of a <search> call",
    "bad format: python/result tags are nested in the wrong order": "a <result> inside of a <python> call",
    "bad format: <answer> must be before </answer>": "</answer> stands before <answer>",
    "bad format: answer is missing \\boxed{} format": "no \\boxed{...} in the answer",
    "find box error": "the last \\boxed{...} of the answer is not closed",
    "wrong answer but good format": "well-formed, but no word of the answer is right",
    "correct answer": "F1 ",
}


def arpo_reward(case: Case) -> Result:
    case.only()
    text, theirs = case.inputs["solution_str"], case.outputs
    ours = deep_research_reward(text, case.inputs["ground_truth"])
    assert ours.answer == theirs["answer"]
    (reason,) = {ours_said for said, ours_said in ARPO_REASONS.items() if theirs["reason"].startswith(said)}
    assert ours.reason.startswith(reason)
    both_closed = "</search>" in text and "</python>" in text
    both_called = "<search>" in text and "<python>" in text
    differs = torch.tensor(theirs["f1_score"] > 0 and both_closed != both_called)
    return {
        "score": Pair(as_tensor(ours.score), as_tensor(theirs["score"]), differs, "closing tags alone"),
        "f1": Pair(as_tensor(ours.f1), as_tensor(theirs["f1_score"])),
    }


def tree_grpo_reward(case: Case) -> Result:
    case.only("structure_format_score", "final_format_score", "retrieval_score")
    prompt, marked, response = case.inputs["solution_str"].partition("<|im_start|>assistant")
    ours = exact_match_format_reward(response if marked else prompt, case.inputs["target"], **case.params).score
    supposed = marked and prompt.count("<answer>") == prompt.count("</answer>") == 1
    differs = torch.tensor(not supposed and ours != case.outputs["score"])
    return {"score": Pair(as_tensor(ours), as_tensor(case.outputs["score"]), differs, "the prompt's answers")}


def arpo_entropy(case: Case) -> Result:
    case.only("vocab_size", "max_tokens")
    ours = released_entropy(
        case.inputs["top_logprobs_per_token"], case.params["vocab_size"], first_tokens=case.params["max_tokens"]
    )
    return {"entropy": Pair(as_tensor(ours), as_tensor(case.outputs["entropy"]))}


def arpo_call(case: Case) -> Result:
    """The last call of the context: sampling stops at a closing tag, so the last turn begins behind the one before."""
    case.only()
    text, tag, theirs = case.inputs["text"], case.inputs["tag"], case.outputs["content"]
    opening, closing = f"<{tag}>", f"</{tag}>"
    *before, last, _ = ["", *text.split(closing)] if closing in text else ["", ""]
    _, calls = Tags().parse(f"{last}{closing}" if before else "", [schema(tag)])
    ours = calls[0].arguments["text"] if calls else ""
    stray = bool(before) and last.count(opening) != 1 and ours != theirs
    return {"content": Pair(as_tensor(float(ours == theirs)), torch.tensor(1.0), torch.tensor(stray), "stray tags")}


def schema(name: str) -> dict[str, Any]:
    parameters = {"properties": {"text": {"type": "string"}}, "required": ["text"]}
    return {"function": {"name": name, "description": "", "parameters": parameters}}


ADAPTERS: dict[str, Adapter] = {
    "compute_score": arpo_reward,
    "compute_score_em": tree_grpo_reward,
    "_calc_entropy/ln(vocab)": arpo_entropy,
    "_extract_content": arpo_call,
}
