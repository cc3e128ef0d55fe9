"""What ``vllm_endpoint`` and ``vllm_server`` say to each other: JSON lines, and prints of what both must agree on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from agentrl.sampler.board import Cells
from agentrl.types import SamplingParams, StopReason

WIRE = 1
"""Version of all this; both sides must have the same."""
TOKEN_VARIABLE = "AGENTRL_SERVER_TOKEN"
"""Environment variable with the token, for the server and for its clients."""
BEAT_SECONDS = 10.0
"""A server that has nothing else to say sends an empty line this often, so that silence means that it is gone."""


class Piece(NamedTuple):
    """Some tokens of an answer.

    Attributes:
        place: how many tokens of this answer came before.
        cells: the tokens, one or more.
        reason: why the answer ends here; None where it does not.
    """

    place: int
    cells: Cells
    reason: StopReason | None


class WireError(Exception):
    """A line that is none of ours."""


def encode_piece(piece: Piece) -> bytes:
    """One line."""
    row = [piece.place, *piece.cells, None if piece.reason is None else piece.reason.value]
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"


def decode_line(line: bytes) -> Piece | dict[str, Any]:
    """A piece; or an object: an error, or the answer to anything but a request for tokens.

    Raises:
        WireError: it is neither.
    """
    try:
        found = json.loads(line)
        if isinstance(found, dict):
            return found
        place, ids, logprobs, entropies, versions, reason = found
        cells = Cells(*(list(column) for column in (ids, logprobs, entropies, versions)))
        lengths = {len(column) for column in cells}
        whole = all(type(value) is int for value in (place, *cells.token_ids, *cells.versions))
        real = all(type(value) is float and not math.isnan(value) for value in (*cells.logprobs, *cells.entropies))
        if len(lengths) != 1 or 0 in lengths or not whole or not real:
            raise WireError(f"a row of other parts: {line[:200]!r}")
        return Piece(place, cells, None if reason is None else StopReason(reason))
    except (ValueError, TypeError) as error:
        raise WireError(f"{line[:200]!r} ({error})") from error


def encode_params(params: SamplingParams) -> dict[str, Any]:
    """As JSON can hold it."""
    return asdict(params)


def decode_params(data: Mapping[str, Any]) -> SamplingParams:
    """Back again.

    Raises:
        TypeError: other fields.
    """
    tuples = {name: tuple(data[name]) for name in ("stop_ids", "stop_strings") if name in data}
    return SamplingParams(**{**data, **tuples})


def print_shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    """Of a policy's parameters, their names and shapes."""
    rows = sorted((name, list(shape)) for name, shape in shapes.items())
    return f"{len(rows)} parameters, {sum(math.prod(shape) for _, shape in rows)} numbers, {_digest(rows)}"


def print_tokenizer(tokenizer: Any) -> str:
    """Of its vocabulary; two that agree in it give the same ids the same text."""
    rows = sorted(tokenizer.get_vocab().items())
    return f"{len(rows)} tokens, {_digest(rows)}"


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]
