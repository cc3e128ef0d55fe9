from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.env import make_tool
from agentrl.errors import TaskError, UserError
from agentrl.tool import dispatch
from agentrl.tools import search
from agentrl.types import ToolCall

TEXTS = ["the cat sat", "the dog sat on the mat", "a cat and a dog", "cat cat cat", "nothing here"]
INDEX = search.Bm25Index([search.bm25.Document(str(i), "", text) for i, text in enumerate(TEXTS)])


def found(query, topk=10):
    return [document.id for document in INDEX.rank(query, topk)]


def test_ranking():
    assert found("cat")[0] == "3"
    assert set(found("cat")) == {"0", "2", "3"}
    assert found("CAT, dog!")[0] == "2"
    assert found("zebra") == []
    assert found("") == []
    assert found("cat", 0) == []


def test_equal_scores_come_in_the_order_of_the_corpus():
    twins = search.Bm25Index([search.bm25.Document(str(i), "", "same words") for i in range(20)])
    assert [d.id for d in twins.rank("words", 3)] == ["0", "1", "2"]


@given(st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1), st.integers(1, 5))
def test_a_shorter_list_is_the_beginning_of_a_longer_one(query, topk):
    texts = ["a b", "b c", "c d", "a a", "b", "d d a", "a b"]
    index = search.Bm25Index([search.bm25.Document(str(i), "", text) for i, text in enumerate(texts)])
    assert index.rank(" ".join(query), topk) == index.rank(" ".join(query), 7)[:topk]


def test_a_folder_and_a_jsonl_file_are_corpora(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("second")
    (folder / "a.txt").write_text("first\n")
    (folder / "deep" / "c.txt").write_text("third")
    (folder / "skipped.json").write_text("{}")
    assert [(d.id, d.text) for d in search.bm25.read_corpus(folder)] == [
        ("a.txt", "first"),
        ("b.md", "second"),
        ("deep/c.txt", "third"),
    ]
    lines = [{"id": 1, "title": "T", "text": "x"}, {"text": "y"}]
    (tmp_path / "c.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    assert [(d.id, d.title, d.text) for d in search.bm25.read_corpus(tmp_path / "c.jsonl")] == [
        ("1", "T", "x"),
        (f"{tmp_path}/c.jsonl:3", "", "y"),
    ]
    assert search.bm25.load_index(folder) is search.bm25.load_index(folder)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such corpus"),
        ("", "empty corpus"),
        ('{"text": "fine"}\n{broken', r"c\.jsonl:2: expected .* not JSON"),
        ('{"title": "no text"}', r"c\.jsonl:1: expected .* got"),
        ('{"text": "?!"}', "words in it"),
    ],
)
def test_unusable_corpora(tmp_path, text, said):
    if text is not None:
        (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(TaskError, match=said):
        search.bm25.load_index(tmp_path / "c.jsonl")


async def test_the_tool(tmp_path, capfd):
    (tmp_path / "one.txt").write_text("Paris is the capital.")
    (tmp_path / "two.txt").write_text("Rome is a capital too.")
    tool = make_tool("search", corpus=tmp_path, topk=2)
    await tool.start(0)
    assert [*tool.schema["function"]["parameters"]["properties"]] == ["query"]
    result = await dispatch({"search": tool}, ToolCall("a", "search", {"query": "capital Rome"}))
    assert result.content == "Rome is a capital too.\nParis is the capital."
    assert (await dispatch({"search": tool}, ToolCall("a", "search", {"query": "zebra"}))).content == "Nothing found."
    assert await (await tool.fork()).run("paris") == "Paris is the capital."
    await tool.close()
    await tool.close()
    assert capfd.readouterr() == ("", "")


def test_exactly_one_source():
    for arguments in ({}, {"corpus": "x", "url": "http://x"}):
        with pytest.raises(UserError, match="expected one of corpus, url and backend"):
            search.Search(**arguments)


def test_one_event_loop_after_another(tmp_path):
    (tmp_path / "one.txt").write_text("Paris")
    for _ in range(2):
        assert asyncio.run(search.Search(tmp_path).run("paris")) == "Paris"
