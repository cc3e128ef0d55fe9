"""What every sampler asks of a request before it takes it, and when a text ends one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agentrl.errors import SamplerError
from agentrl.types import SamplingParams


def check_request(
    token_ids: Sequence[int], params: SamplingParams, *, vocabulary: int, max_length: int, tokenizer: Any
) -> None:
    """Refuse what cannot be sampled.

    Args:
        token_ids: the prompt.
        params: the request's settings.
        vocabulary: rows of the model's embedding.
        max_length: most tokens, prompt and completion together.
        tokenizer: None where the sampler has none.

    Raises:
        SamplerError: saying what was expected and what came.
    """
    if not token_ids or len(token_ids) >= max_length:
        raise SamplerError(
            f"a prompt of {len(token_ids)} tokens cannot be continued: expected 1 to {max_length - 1} "
            "(sampler.max_length - 1)."
        )
    if not 0 <= min(token_ids) <= max(token_ids) < vocabulary:
        wrong = next(token for token in token_ids if not 0 <= token < vocabulary)
        raise SamplerError(
            f"token id {wrong} in the prompt: expected 0 to {vocabulary - 1}, the rows of the model. Its "
            "tokenizer belongs to another model."
        )
    if params.max_tokens < 1 or not 0 < params.top_p <= 1 or not params.temperature >= 0:
        raise SamplerError(f"expected max_tokens >= 1, 0 < top_p <= 1 and temperature >= 0, got {params}.")
    if params.stop_strings and tokenizer is None:
        raise SamplerError("stop_strings need a tokenizer: give the sampler one.")


def ends_with_stop(tokenizer: Any, generated: Sequence[int], stop_strings: Sequence[str]) -> bool:
    """Whether one of ``stop_strings`` is in the text of the last of the ``generated`` tokens."""
    if not stop_strings:
        return False
    window = max(len(stop.encode()) for stop in stop_strings)  # a token is a byte or more
    recent = list(generated[-window:])
    text = tokenizer.decode(recent, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return any(stop in text for stop in stop_strings)
