"""Published rewards of search and tool-use agents, as functions of text.

An environment's ``reward`` calls them with ``transcript``, or with an answer alone::

    async def reward(self, task, episode):
        return deep_research_reward(transcript(task, episode), require_answer(task)).score

They take any text, in time linear in its length. What they read was written by the policy *and by its tools*: a page
that says ``<answer>`` counts as a second answer, and a policy can write ``<result>`` itself. Where that matters, judge
``episode.tool_results`` instead of text.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentrl.types import Episode, Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = ("yes", "no", "noanswer")

_SEARCH_TAGS = re.compile(r"<(/?)(think|search|information|answer)>")
_MAY_FOLLOW = {
    "": ("think",),
    "think": ("search", "answer"),
    "search": ("information",),
    "information": ("think",),
    "answer": (),
}


@dataclass(frozen=True, slots=True)
class Reward:
    """What a reward function found.

    Attributes:
        score: the reward.
        reason: why, in words.
        answer: the answer as it was read; empty where there was none to read.
        f1: ``f1_score`` of the answer; 0 where it was not judged.
    """

    score: float
    reason: str
    answer: str = ""
    f1: float = 0.0


# -- comparing answers ------------------------------------------------------------------------------------------------


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and repeated white space, in that order.

    SQuAD's normalisation (Rajpurkar et al. 2016, arXiv:1606.05250). An answer of articles alone ("A") becomes empty.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, targets: str | Sequence[str]) -> bool:
    """Whether ``prediction`` equals one of ``targets`` after ``normalize_answer``."""
    found = normalize_answer(prediction)
    return any(found == normalize_answer(target) for target in _several(targets))


def f1_score(prediction: str, targets: str | Sequence[str]) -> float:
    """Harmonic mean of precision and recall over words, after ``normalize_answer``; the best of ``targets``.

    SQuAD's F1 (arXiv:1606.05250) with HotpotQA's rule (arXiv:1809.09600): "yes", "no" and "noanswer" are right or
    wrong as a whole, so that "no" is not partly right where the target is "no one".

    Returns:
        In [0, 1].
    """
    return max((_f1(normalize_answer(prediction), normalize_answer(target)) for target in _several(targets)), default=0)


def _f1(found: str, wanted: str) -> float:
    if found != wanted and (found in _CLOSED_ANSWERS or wanted in _CLOSED_ANSWERS):
        return 0.0
    found_words, wanted_words = found.split(), wanted.split()
    common = (Counter(found_words) & Counter(wanted_words)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(found_words), common / len(wanted_words)
    return 2 * precision * recall / (precision + recall)


def _several(targets: str | Sequence[str]) -> Sequence[str]:
    return [targets] if isinstance(targets, str) else targets


# -- reading text -----------------------------------------------------------------------------------------------------


def transcript(task: Task, episode: Episode, *, result_tag: str = "result") -> str:
    """What follows the prompt as one text with tags, whatever tool format the policy was asked to write.

    A call is ``<name>first argument</name>`` and its result ``<result>...</result>`` right behind it. A call that
    could not be read keeps its opening tag only, so that it counts as a fault of form.

    Args:
        task: the task of the episode, which tells the prompt from what follows.
        episode: a finished episode.
        result_tag: "result" for ``deep_research_reward``, "information" for ``exact_match_format_reward``.
    """
    start = len(task.prompt) + (episode.messages[0] != task.prompt[0])  # after the environment's system message
    written = episode.messages[start:]
    results = {message.tool_call_id: message.content for message in written if message.role == "tool"}
    parts = []
    for message in written:
        if message.role == "assistant":
            parts.append(message.content)
            for call in message.tool_calls:
                body = str(next(iter(call.arguments.values()), ""))
                parts.append(f"<{call.name}>" if call.error else f"<{call.name}>{body}</{call.name}>")
                if call.id in results:
                    parts.append(f"<{result_tag}>{results[call.id]}</{result_tag}>")
    return "\n".join(part for part in parts if part)


def boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, braces balanced; None where it is not closed or has no brace.

    As in the MATH data set's evaluation (Hendrycks et al. 2021, arXiv:2103.03874), a ``\boxed `` followed by a space
    anywhere takes precedence: its content reaches to the next ``$``.
    """
    _, spaced, rest = text.rpartition("\\boxed ")
    if spaced:
        return rest.partition("$")[0]
    _, found, rest = text.rpartition("\\boxed")
    if not found or not rest.startswith("{"):
        return None
    depth = 0
    for brace in re.finditer(r"[{}]", rest):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return rest[1 : brace.start()]
    return None


def _blocks(text: str, tag: str) -> Iterator[str]:
    """What stands between ``<tag>`` and the nearest ``</tag>``, in order and without overlap.

    By hand, because the regular expression for it takes quadratic time on many opening tags without a closing one.
    """
    opening, closing, at = f"<{tag}>", f"</{tag}>", 0
    while (start := text.find(opening, at)) >= 0 and (end := text.find(closing, start)) >= 0:
        yield text[start + len(opening) : end]
        at = end + len(closing)


# -- ARPO -------------------------------------------------------------------------------------------------------------


def deep_research_reward(text: str, answer: str | Sequence[str], *, bonus: float = 0.1) -> Reward:
    r"""ARPO's reward (Dong et al. 2025, arXiv:2507.19849, section 3.3, as released; AEPO's too).

    -1 where the form is wrong; else the ``f1_score`` of the boxed answer, and ``bonus`` on top where it is above 0 and
    both tools were called.

    The form: ``<think>`` blocks, at least one, as many closed as opened; every ``<search>`` and ``<python>`` closed and
    then followed by a ``<result>`` block; one ``<answer>`` block, with a ``\boxed{...}`` in it.

    The released code gives the bonus for the two *closing* tags, wherever they stand, so that a policy earns it by
    mentioning them; here it takes calls.

    Args:
        text: what follows the prompt, tool results included; see ``transcript``.
        answer: the reference answer, or several of which the best counts.
        bonus: the paper's r_M, 0.1.

    Returns:
        -1, or in [0, 1 + bonus].
    """
    fault = _research_fault(text)
    if fault:
        return Reward(-1.0, fault)
    found = boxed(next(_blocks(text, "answer")))
    if found is None:
        return Reward(-1.0, "the last \\boxed{...} of the answer is not closed")
    f1 = f1_score(found, answer)
    if f1 == 0:
        return Reward(0.0, "well-formed, but no word of the answer is right", found)
    if "<search>" in text and "<python>" in text:
        return Reward(f1 + bonus, f"F1 {f1:.3f}, and both tools used", found, f1)
    return Reward(f1, f"F1 {f1:.3f}", found, f1)


def _research_fault(text: str) -> str | None:
    """What is wrong with the form of ``text``; None where nothing is."""
    if text.count("<think>") != text.count("</think>"):
        return "not every <think> is closed"
    if "<think>" not in text:
        return "no <think> block"
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return "not exactly one <answer> block"
    for tool in ("search", "python"):
        fault = _call_fault(text, tool)
        if fault:
            return fault
    answer = next(_blocks(text, "answer"), None)
    if answer is None:
        return "</answer> stands before <answer>"
    if "\\boxed{" not in answer or "}" not in answer:
        return "no \\boxed{...} in the answer"
    return None


def _call_fault(text: str, tool: str) -> str | None:
    """What is wrong with the calls of ``tool``; what a result contains is not looked at."""
    at = 0
    while (start := text.find(f"<{tool}>", at)) >= 0:
        end, result = text.find(f"</{tool}>", start), text.find("<result>", start)
        at = text.find("</result>", result) if result >= 0 else -1
        if min(end, result, at) < 0:
            return f"a <{tool}> call without its end or its <result>"
        if not end < result:
            return f"a <result> inside of a <{tool}> call"
    return None


# -- Search-R1 and Tree-GRPO ------------------------------------------------------------------------------------------


def exact_match_format_reward(
    text: str,
    targets: str | Sequence[str],
    *,
    structure_format_score: float = 0.2,
    final_format_score: float = 0.1,
    retrieval_score: float = 0.0,
    score: float = 1.0,
) -> Reward:
    """Exact match with partial credit for form, as Tree-GRPO (Ji et al. 2025, arXiv:2509.21240) uses it.

    It is Search-R1's (Jin et al. 2025, arXiv:2503.09516; the study of its terms is arXiv:2505.15117).

    ====================  ======================================================  ========================
    answer                sequence valid                                          not valid
    ====================  ======================================================  ========================
    right                 score                                                   score - structure_format
    wrong                 structure_format, + retrieval where a result names it   final_format
    none                  the same                                                0
    ====================  ======================================================  ========================

    Valid: ``<think>``, then ``<search>``, ``<information>`` and ``<think>`` any number of times, then ``<answer>``;
    every block closed, only white space between them, and nothing after.

    The released code reads prompt and response as one text, in which it takes the last ``<answer>`` block unless there
    is only one, which it supposes to be the prompt's example. So a prompt without an example makes every answer count
    as none, and one with two hands its own to a response without any. Here the prompt is not part of the text.

    Args:
        text: what follows the prompt, without special tokens; see ``transcript``.
        targets: the reference answers, any of which is right.
        structure_format_score: for a valid sequence, 0.2.
        final_format_score: for a wrong answer in a sequence that is not valid, 0.1.
        retrieval_score: for an ``<information>`` block that contains a target, 0.
        score: for a right answer, 1.
    """
    fault, answers = _sequence_fault(text), list(_blocks(text, "answer"))
    found = answers[-1].strip() if answers else ""
    f1 = f1_score(found, targets)
    if answers and exact_match(found, targets):
        if fault:
            return Reward(score - structure_format_score, f"right answer, but {fault}", found, f1)
        return Reward(score, "right answer", found, f1)
    verdict = "wrong answer" if answers else "no answer"
    if fault:
        return Reward(final_format_score if answers else 0.0, f"{verdict}, and {fault}", found, f1)
    if _retrieved(text, targets):
        return Reward(structure_format_score + retrieval_score, f"{verdict}, though a target was found", found, f1)
    return Reward(structure_format_score, verdict, found, f1)


def _sequence_fault(text: str) -> str | None:
    """Where ``text`` leaves the sequence of blocks; None where it does not."""
    last, inside, at = "", "", 0
    for tag in _SEARCH_TAGS.finditer(text):
        closing, name = tag.groups()
        if not inside and text[at : tag.start()].strip():
            return f"there is text outside of the blocks, before {tag.group()}"
        if name != inside if closing else inside or name not in _MAY_FOLLOW[last]:
            return f"{tag.group()} is out of place"
        last, inside, at = (name, "", tag.end()) if closing else (last, name, tag.end())
    if inside or last != "answer":
        return "it does not end with an answer"
    return "there is text after the answer" if text[at:].strip() else None


def _retrieved(text: str, targets: str | Sequence[str]) -> bool:
    results = [normalize_answer(block) for block in _blocks(text, "information")]
    return any(normalize_answer(target) in result for target in _several(targets) for result in results)
