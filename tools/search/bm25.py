"""BM25 (Robertson et al. 1994; Lucene's variant, as bm25s computes it) over a corpus held in memory."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agentrl.errors import TaskError

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus; its title is indexed with it, so that a title counts twice where the text repeats it."""

    id: str
    title: str
    text: str


class Bm25Index:
    """An index that is built once and only read afterwards.

    Scores are sums of a few precomputed columns: about 20 us a query over 48 documents, which is why nothing is cached.

    Args:
        documents: at least one.
        k1: saturation of a term's frequency (default Anserini's 0.9).
        b: how far a document's length counts, 0 to 1 (default Anserini's 0.4).

    Raises:
        TaskError: no documents, or none with a word in it.
    """

    def __init__(self, documents: Sequence[Document], *, k1: float = 0.9, b: float = 0.4) -> None:
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG, whatever the application wants
        tokens = [words(f"{document.title} {document.text}") for document in documents]
        if not any(tokens):
            raise TaskError(f"search: expected a corpus with words in it, got {len(documents)} documents without any.")
        self.documents = tuple(documents)
        self._bm25: Any = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._bm25.index(tokens, show_progress=False)

    def rank(self, query: str, topk: int) -> list[Document]:
        """The ``topk`` best documents that share a word with ``query``; equal scores in the corpus's order."""
        known = [word for word in words(query) if word in self._bm25.vocab_dict]
        if not known or topk < 1:
            return []
        scores: npt.NDArray[np.float32] = self._bm25.get_scores(known)
        candidates = np.flatnonzero(scores > 0)
        if len(candidates) > topk:
            # argpartition alone would break ties at the boundary arbitrarily: keep all that reach the last place.
            last = np.partition(scores[candidates], len(candidates) - topk)[len(candidates) - topk]
            candidates = candidates[scores[candidates] >= last]
        order = candidates[np.argsort(-scores[candidates], kind="stable")][:topk]
        return [self.documents[i] for i in order]

    async def search(self, query: str, topk: int) -> Sequence[str]:
        """Texts of the best documents."""
        return [document.text for document in self.rank(query, topk)]

    async def acquire(self) -> None:
        """Nothing is bound to an episode."""

    async def release(self) -> None:
        """Nothing is bound to an episode."""


@lru_cache(maxsize=16)
def load_index(corpus: Path) -> Bm25Index:
    """The index of a corpus, built on first use and shared from then on.

    Raises:
        TaskError: a corpus that is missing, empty or of another form; names file and line.
    """
    return Bm25Index(read_corpus(corpus))


def read_corpus(corpus: Path) -> list[Document]:
    """The documents of a folder (``.txt`` and ``.md``, by path) or a JSONL file (in its order).

    Raises:
        TaskError: a corpus that is missing, empty or of another form; names file and line.
    """
    if corpus.is_dir():
        files = sorted(path for path in corpus.rglob("*") if path.suffix in (".txt", ".md"))
        documents = [Document(str(f.relative_to(corpus)), f.stem, f.read_text(encoding="utf-8").strip()) for f in files]
    elif corpus.is_file():
        lines = corpus.read_text(encoding="utf-8").splitlines()
        documents = [_read_line(f"{corpus}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
    else:
        raise TaskError(f"{corpus}: no such corpus; expected a folder of .txt and .md files, or a JSONL file.")
    if not documents:
        raise TaskError(f"{corpus}: an empty corpus; expected .txt or .md files in a folder, or lines in a JSONL file.")
    return documents


def words(text: str) -> list[str]:
    """Lower-cased words and numbers."""
    return _WORD.findall(text.lower())


def read_document(where: str, row: Any) -> Document:
    """A document from a record.

    Raises:
        TaskError: not of the form ``{"id", "title", "text"}``; names ``where``.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
        raise TaskError(f'{where}: expected {{"id": ..., "title": ..., "text": ...}}, got {str(row)[:80]!r}.')
    return Document(str(row.get("id", where)), str(row.get("title", "")), row["text"])


def _read_line(where: str, line: str) -> Document:
    try:
        return read_document(where, json.loads(line))
    except json.JSONDecodeError as error:
        raise TaskError(
            f'{where}: expected {{"id": ..., "title": ..., "text": ...}}, got something that is not JSON: {error}.'
        ) from error
