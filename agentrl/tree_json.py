"""A ``RolloutTree`` as JSON and back, without loss.

Floats are written with ``repr``'s digits, so every log-prob comes back bit for bit. Arrays stay flat lists: one node
holds only the tokens that it adds, and its ``author`` is the loss mask of all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from agentrl.errors import NonFiniteError, TaskError
from agentrl.types import Decision, Leaf, Message, Node, Outcome, RolloutTree, StopReason, Task, ToolCall, ToolResult


def dump_tree(tree: RolloutTree) -> str:
    """``tree`` on one line of strict JSON.

    Raises:
        NonFiniteError: a log-prob, an entropy or another number is NaN or infinite.
        TaskError: the task's metadata or a call's arguments hold something that JSON cannot.
    """
    try:
        return json.dumps(tree_to_json(tree), allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise NonFiniteError(
            f"rollout of task {tree.task.id} holds a number that is not finite ({error}). Expected finite log-probs, "
            "entropies, rewards and seconds; a reward that could not be given is None."
        ) from error
    except TypeError as error:
        raise TaskError(
            f"rollout of task {tree.task.id} cannot be saved: {error}. Task.metadata and tool arguments may hold "
            "only what JSON holds: strings, numbers, booleans, None, lists, and dictionaries with string keys."
        ) from error


def load_tree(line: str) -> RolloutTree:
    """The inverse of ``dump_tree``."""
    return tree_from_json(json.loads(line))


def tree_to_json(tree: RolloutTree) -> dict[str, Any]:
    """``tree`` as dictionaries, lists, strings and numbers, in the records' own field names."""
    return {
        "task": {
            "id": tree.task.id,
            "prompt": [_message_to_json(message) for message in tree.task.prompt],
            "answer": tree.task.answer,
            "metadata": dict(tree.task.metadata),
        },
        "temperature": tree.temperature,
        "top_p": tree.top_p,
        "nodes": [_node_to_json(node) for node in tree.nodes],
        "leaves": [_leaf_to_json(leaf) for leaf in tree.leaves],
        "seed": tree.seed,
        "copy": tree.copy,
        "decisions": [asdict(decision) for decision in tree.decisions],
        "spent": dict(tree.spent),
    }


def tree_from_json(data: Mapping[str, Any]) -> RolloutTree:
    """The inverse of ``tree_to_json``; tuples inside of metadata and arguments come back as lists."""
    task = data["task"]
    return RolloutTree(
        task=Task(
            prompt=tuple(_message_from_json(message) for message in task["prompt"]),
            answer=task["answer"],
            id=task["id"],
            metadata=task["metadata"],
        ),
        nodes=tuple(_node_from_json(node) for node in data["nodes"]),
        leaves=tuple(
            Leaf(
                **{
                    **leaf,
                    "outcome": Outcome(leaf["outcome"]),
                    "name": tuple(leaf["name"]),
                    "tool_results": tuple(ToolResult(**result) for result in leaf.get("tool_results", ())),
                }
            )
            for leaf in data["leaves"]
        ),
        temperature=data["temperature"],
        top_p=data["top_p"],
        seed=data["seed"],
        copy=data["copy"],
        decisions=tuple(Decision(**{**each, "name": tuple(each["name"])}) for each in data["decisions"]),
        spent=data["spent"],
    )


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "parent": node.parent,
        "author": node.author,
        "token_ids": list(node.token_ids),
        "logprobs": list(node.logprobs),
        "entropies": list(node.entropies),
        "policy_version": list(node.policy_version),
        "messages": [_message_to_json(message) for message in node.messages],
        "tool_results": [asdict(result) for result in node.tool_results],
        "stop_reason": node.stop_reason,
    }


def _node_from_json(data: Mapping[str, Any]) -> Node:
    return Node(
        parent=data["parent"],
        author=data["author"],
        token_ids=tuple(data["token_ids"]),
        logprobs=tuple(data["logprobs"]),
        entropies=tuple(data["entropies"]),
        policy_version=tuple(data["policy_version"]),
        messages=tuple(_message_from_json(message) for message in data["messages"]),
        tool_results=tuple(ToolResult(**result) for result in data["tool_results"]),
        stop_reason=None if data["stop_reason"] is None else StopReason(data["stop_reason"]),
    )


def _leaf_to_json(leaf: Leaf) -> dict[str, Any]:
    return {
        "node": leaf.node,
        "reward": leaf.reward,
        "outcome": leaf.outcome,
        "seed": leaf.seed,
        "error": leaf.error,
        "seconds": leaf.seconds,
        "metrics": dict(leaf.metrics),
        "name": list(leaf.name),
        "tool_results": [asdict(result) for result in leaf.tool_results],
    }


def _message_to_json(message: Message) -> dict[str, Any]:
    calls = [
        {"id": call.id, "name": call.name, "arguments": dict(call.arguments), "error": call.error}
        for call in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": message.content,
        "tool_calls": calls,
        "tool_call_id": message.tool_call_id,
    }


def _message_from_json(data: Mapping[str, Any]) -> Message:
    calls = tuple(ToolCall(**call) for call in data["tool_calls"])
    return Message(data["role"], data["content"], calls, data["tool_call_id"])
