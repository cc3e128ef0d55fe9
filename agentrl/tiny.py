"""A tiny policy from nothing: tokenizer, chat template and a Qwen3 with random weights, as a Hugging Face folder.

It exists so that everything else can be tried on a laptop without a download. The tokenizer is a byte-level BPE
trained on the environment's own text. Digits stand apart, so that numbers can be copied digit by digit; a capitalised
word never merges with its neighbours, so that a name is the same token wherever it stands; everything else merges as
often as it occurs, so that the fixed phrases of prompts and tool calls cost few tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agentrl.errors import UserError
from agentrl.types import Message

PAD, BEGIN, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [PAD, BEGIN, END, "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
SPLIT = r"\d|[A-Z][a-z]+|[^A-Z\d]+|."

TEMPLATE = """\
{%- if tools or messages[0].role == 'system' -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}{{ '\n' if tools }}{% endif -%}
{%- if tools -%}
Tools:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
Call one as <tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call>{% endif %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}<|im_start|>user
{% endif -%}
<tool_response>
{{ message.content }}
</tool_response>{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% else %}{{ '\n' }}{% endif -%}
{%- elif message.role == 'assistant' -%}
<|im_start|>assistant
{{ message.content }}{% for call in message.tool_calls %}{{ '\n' if message.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% elif message.role == 'user' -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}"""
"""Hermes form: tools as JSON in the system turn, calls in <tool_call>, results in <tool_response> in a user turn."""


def build_tokenizer(texts: Iterable[str], vocab: int = 1024) -> Any:
    """A byte-level BPE with the Hermes chat template.

    Args:
        texts: what it will have to write and read.
        vocab: most entries, special tokens and the 256 bytes included.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=2
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD, padding_side="left")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def render_texts(conversations: Iterable[tuple[Sequence[Message], Sequence[dict[str, Any]]]]) -> list[str]:
    """Conversations with their tools as the template writes them, to train the tokenizer on."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    blank = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token=END)
    blank.chat_template = TEMPLATE
    return [
        blank.apply_chat_template([m.to_chat() for m in messages], tools=list(tools) or None, tokenize=False)
        for messages, tools in conversations
    ]


def build_model(tokenizer: Any, *, hidden: int = 128, layers: int = 3, context: int = 1024, seed: int = 0) -> Any:
    """A Qwen3 with random weights: about 0.7 M parameters at the defaults and 1,024 tokens of vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def save_policy(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder.

    Raises:
        UserError: the tokenizer has entries that the model has no rows for.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} entries and the model {rows} rows: they do not belong together."
        )
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar per file would break ours
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
