from __future__ import annotations

import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentrl.data import held_out, load_tasks, split_by_hash
from agentrl.errors import TaskError
from agentrl.types import Message, Task


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_jsonl_maps_columns_and_keeps_the_rest_as_metadata(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        {"q": "2+2?", "label": 4, "level": "easy"},
        "",
        {"q": [{"role": "system", "content": "s"}, {"role": "user", "content": "3+3?"}]},
    )
    first, second = load_tasks(file, prompt="q", answer="label")
    assert first.prompt == (Message("user", "2+2?"),)
    assert first.answer == "4"
    assert first.metadata == {"level": "easy"}
    assert [m.role for m in second.prompt] == ["system", "user"]
    assert second.answer is None


def test_limit_does_not_read_further(tmp_path):
    file = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"}, "not json")
    assert [t.prompt[0].content for t in load_tasks(file, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{broken", [":2", "JSON object per line", "{broken"]),
        ("[1, 2]", [":2", "JSON object", "[1, 2]"]),
        ('{"question": "x"}', [":2", "'prompt'", "columns question"]),
        ('{"prompt": ""}', [":2", "non-empty string", "''"]),
        ('{"prompt": [{"role": "boss", "content": "x"}]}', [":2", "boss"]),
        ('{"prompt": "x", "answer": ["y"]}', [":2", "'answer'", "['y']"]),
    ],
)
def test_errors_name_file_line_expected_and_got(tmp_path, line, parts):
    file = write(tmp_path / "bad.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(TaskError) as failure:
        load_tasks(file)
    assert all(part in str(failure.value) for part in ["bad.jsonl", *parts])


@pytest.mark.parametrize(
    ("name", "said"), [("none.jsonl", "no such file"), ("x.csv", ".jsonl or .parquet"), ("e.jsonl", "no tasks")]
)
def test_unusable_sources(tmp_path, name, said):
    (tmp_path / "e.jsonl").write_text("\n\n")
    with pytest.raises(TaskError, match=said):
        load_tasks(tmp_path / name)


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    chat = [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]
    parquet.write_table(pyarrow.table({"prompt": chat, "answer": [1, None], "n": [7, 8]}), tmp_path / "t.parquet")
    first, second = load_tasks(tmp_path / "t.parquet")
    assert (first.prompt, first.answer, first.metadata) == ((Message("user", "a"),), "1", {"n": 7})
    assert second.answer is None
    (tmp_path / "bad.parquet").write_bytes(b"PAR0")
    with pytest.raises(TaskError, match=r"bad\.parquet: expected a Parquet file"):
        load_tasks(tmp_path / "bad.parquet")


@pytest.mark.parametrize(("source", "package"), [("t.parquet", "pyarrow"), ("hf:a/b", "datasets")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, source, package):
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=rf"needs {package}.*agentrl\[datasets\]"):
        load_tasks(source if source.startswith("hf:") else tmp_path / source)


def test_hugging_face_names_data_set_config_and_split(monkeypatch):
    asked = []

    def load_dataset(path, config, split):
        asked.append((path, config, split))
        if split != "test":
            raise ValueError("Unknown split")
        return [{"question": "q", "answer": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_tasks("hf:openai/gsm8k/main", split="test", prompt="question")[0].answer == "a"
    load_tasks("hf:squad", split="test", prompt="question")
    assert asked == [("openai/gsm8k", "main", "test"), ("squad", None, "test")]
    with pytest.raises(TaskError, match=r"hf:squad: expected .* split 'dev'.*Unknown split"):
        load_tasks("hf:squad", split="dev", prompt="question")
    with pytest.raises(TaskError, match=r"hf:squad\[test\]: row 1: expected a column 'prompt'"):
        load_tasks("hf:squad", split="test")


@given(st.lists(st.text(min_size=1, max_size=5)), st.floats(0, 1))
def test_equal_prompts_fall_on_one_side(prompts, fraction):
    tasks = [Task(prompt, answer=str(i)) for i, prompt in enumerate(prompts)]
    train, test = split_by_hash(tasks, fraction)
    assert len(train) + len(test) == len(tasks)
    assert not {t.prompt for t in train} & {t.prompt for t in test}


def test_the_share_held_out_is_the_one_asked_for():
    held = sum(held_out(f"question {i}", 0.15) for i in range(10_000))
    assert 1300 < held < 1700
    with pytest.raises(TaskError, match="0 to 1"):
        split_by_hash([], 1.5)
