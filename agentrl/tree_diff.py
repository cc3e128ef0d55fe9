"""The first difference between a recorded tree and the same tree grown again.

Trajectories are compared along their paths, node by node, in the order of the leaves; then the decisions, then which
leaves there are, then what is shared and what was spent. Wall times are never compared.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentrl.types import Decision, Leaf, Node, RolloutTree

Name = tuple[int, ...]

CONTEXT = 8
"""Tokens shown before the first different one; half as many after it."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two trees part.

    Attributes:
        leaf: the trajectory, by its name; empty where it is the whole tree.
        what: the field that differs.
        recorded: its value in the record.
        replayed: its value now.
        node: index in the recorded tree; None where it is no node.
        author: of the node.
        turn: policy turns before the node or the decision.
        token: position in the node; None where it is no token.
        recorded_ids: the tokens around it in the record; empty where it is no token.
        replayed_ids: the tokens around it now.
        error: why the trajectory ended now, where it failed.
    """

    leaf: Name
    what: str
    recorded: Any
    replayed: Any
    node: int | None = None
    author: str = ""
    turn: int | None = None
    token: int | None = None
    recorded_ids: tuple[int, ...] = ()
    replayed_ids: tuple[int, ...] = ()
    error: str = ""


def first_difference(
    recorded: RolloutTree,
    replayed: RolloutTree,
    *,
    tolerance: float = 0.0,
    unfinished: Collection[Name] = (),
    lost: Collection[Name] = (),
    whole: bool = True,
) -> Difference | None:
    """The first difference, or None.

    Args:
        recorded: the one.
        replayed: the other.
        tolerance: of log-probs, entropies and the signals made of them.
        unfinished: recorded leaves that are compared as far as they got, because they failed there.
        lost: recorded leaves that could not be played again.
        whole: whether the record holds everything that was played, so that sharing and spending can be compared too.
    """
    return next(_differences(recorded, replayed, tolerance, set(unfinished), set(lost), whole), None)


def describe(difference: Difference, text: tuple[str, str]) -> list[str]:
    """``difference`` in lines for people.

    Args:
        difference: one.
        text: what ``recorded_ids`` and ``replayed_ids`` say.
    """
    where = [f"leaf {'.'.join(map(str, difference.leaf))}" if difference.leaf else "the tree"]
    if difference.turn is not None:
        where.append(f"turn {difference.turn}")
    if difference.node is not None:
        where.append(f"node {difference.node} ({difference.author})")
    if difference.token is not None:
        where.append(f"token {difference.token}")
    lines = [f"different: {difference.what}, at {', '.join(where)}"]
    sides = (difference.recorded, difference.recorded_ids), (difference.replayed, difference.replayed_ids)
    for title, (value, ids), words in zip(("recorded", "now"), sides, text, strict=True):
        around = f"  in {list(ids)}  {words!r}" if ids else ""
        lines.append(f"  {title:<9} {value}{around}")
    return lines + ([f"  {difference.error}"] if difference.error else [])


def _differences(
    recorded: RolloutTree,
    replayed: RolloutTree,
    tolerance: float,
    unfinished: set[Name],
    lost: set[Name],
    whole: bool,
) -> Iterator[Difference]:
    for what in ("temperature", "top_p"):
        if getattr(recorded, what) != getattr(replayed, what):
            yield Difference((), what, getattr(recorded, what), getattr(replayed, what))
    then, now = ({leaf.name: leaf for leaf in tree.leaves} for tree in (recorded, replayed))
    for name in then:
        if name in now:
            yield from _paths(recorded, then[name], replayed, now[name], tolerance, name in unfinished)
    yield from _decisions(recorded, replayed, tolerance, (then.keys() & now.keys()) - unfinished - lost)
    for name in sorted(then.keys() ^ now.keys()):
        if name not in lost:
            yield Difference(name, "leaf", name in then, name in now)
    if whole:
        parents, shared = ([node.parent for node in tree.nodes] for tree in (recorded, replayed))
        if parents != shared:
            yield Difference((), "parents of the nodes", parents, shared)
        if _spent(recorded) != _spent(replayed):
            yield Difference((), "spent", _spent(recorded), _spent(replayed))


def _paths(
    recorded: RolloutTree, then: Leaf, replayed: RolloutTree, now: Leaf, tolerance: float, unfinished: bool
) -> Iterator[Difference]:
    """What differs on the way to a leaf, and at its end."""
    here, there = _path(recorded, then), replayed.path(now)
    turn = 0
    for (index, node), other in zip(here, there, strict=False):
        yield from _nodes(node, other, tolerance, leaf=then.name, node=index, author=node.author, turn=turn)
        turn += node.author == "policy"
    error = _last_line(now.error)
    if len(here) > len(there) or (len(here) < len(there) and not unfinished):
        place = here[len(there)][0] if len(here) > len(there) else None
        more = here[len(there)][1] if len(here) > len(there) else there[len(here)]
        ids = more.token_ids[:CONTEXT]
        yield Difference(
            then.name, "number of nodes", len(here), len(there), place, more.author, turn,
            recorded_ids=ids if place is not None else (), replayed_ids=() if place is not None else ids, error=error,
        )  # fmt: skip
    if unfinished:
        return
    for what in ("outcome", "reward", "seed", "metrics"):
        one, two = getattr(then, what), getattr(now, what)
        if one != two:
            yield Difference(then.name, what, one, two, turn=turn, error=error)
    for old, new in _results(then.tool_results, now.tool_results):
        yield Difference(then.name, "tool result", old, new, turn=turn)


def _nodes(one: Node, two: Node, tolerance: float, **where: Any) -> Iterator[Difference]:
    if one.author != two.author:
        yield Difference(what="author", recorded=one.author, replayed=two.author, **where)
    place = _apart(one.token_ids, two.token_ids)
    if place is not None:
        around = slice(max(place - CONTEXT, 0), place + CONTEXT // 2 + 1)
        ids = [node.token_ids[place] if place < len(node.token_ids) else None for node in (one, two)]
        shown = one.token_ids[around], two.token_ids[around]
        where |= {"token": place, "recorded_ids": shown[0], "replayed_ids": shown[1]}
        yield Difference(what="token", recorded=ids[0], replayed=ids[1], **where)
    for what, column in (("log-prob", "logprobs"), ("entropy", "entropies"), ("policy version", "policy_version")):
        old, new = getattr(one, column), getattr(two, column)
        place = _apart(old, new, tolerance if what != "policy version" else 0.0)
        if place is not None:
            values = [row[place] if place < len(row) else None for row in (old, new)]
            yield Difference(what=what, recorded=values[0], replayed=values[1], **(where | {"token": place}))
    if one.stop_reason != two.stop_reason:
        yield Difference(what="stop reason", recorded=one.stop_reason, replayed=two.stop_reason, **where)
    if one.messages != two.messages:
        yield Difference(what="message", recorded=one.messages, replayed=two.messages, **where)
    for old, new in _results(one.tool_results, two.tool_results):
        yield Difference(what="tool result", recorded=old, replayed=new, **where)


def _decisions(
    recorded: RolloutTree, replayed: RolloutTree, tolerance: float, whole: set[Name]
) -> Iterator[Difference]:
    then, now = ({(each.name, each.turn): each for each in tree.decisions} for tree in (recorded, replayed))
    for name, turn in sorted(then.keys() | now.keys()):
        old, new = then.get((name, turn)), now.get((name, turn))
        if old is None or new is None:
            if name in whole:  # what failed may end in another place, and what is missing is told as such
                yield Difference(name, "decision", _shown(old), _shown(new), turn=turn)
            continue
        close = all(_close(getattr(old, what), getattr(new, what), tolerance) for what in ("signal", "draw"))
        if not close or (old.wanted, old.granted) != (new.wanted, new.granted):
            yield Difference(name, "decision", _shown(old), _shown(new), turn=turn, error=new.reason)


def _spent(tree: RolloutTree) -> dict[str, float]:
    return {name: count for name, count in tree.spent.items() if name != "seconds" and count}


def _path(tree: RolloutTree, leaf: Leaf) -> list[tuple[int, Node]]:
    """(index, node) from the root to ``leaf``."""
    places: list[int] = []
    index = leaf.node
    while index >= 0:
        places.append(index)
        index = tree.nodes[index].parent
    return [(place, tree.nodes[place]) for place in reversed(places)]


def _apart(one: Sequence[float], two: Sequence[float], tolerance: float = 0.0) -> int | None:
    """The first place where they differ; the end of the shorter one where it is the beginning of the other."""
    for place, (a, b) in enumerate(zip(one, two, strict=False)):
        if not _close(a, b, tolerance):
            return place
    return None if len(one) == len(two) else min(len(one), len(two))


def _close(one: float | None, two: float | None, tolerance: float) -> bool:
    if one is None or two is None:
        return one is two
    return abs(one - two) <= tolerance


def _results(one: Sequence[Any], two: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of results that differ in more than their seconds."""
    old, new = ([(r.call_id, r.name, r.content, r.error) for r in results] for results in (one, two))
    for place in range(max(len(old), len(new))):
        pair = old[place : place + 1], new[place : place + 1]
        if pair[0] != pair[1]:
            yield pair


def _shown(decision: Decision | None) -> Mapping[str, Any] | None:
    if decision is None:
        return None
    return {what: getattr(decision, what) for what in ("signal", "draw", "wanted", "granted")}


def _last_line(error: str | None) -> str:
    return error.strip().splitlines()[-1] if error else ""
