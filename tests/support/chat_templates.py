"""Chat templates in the manner of the model families: their marks and their treatment of history, our words.

``make_tokenizer`` writes tokenizer files with such a template and reads them back, as a policy's folder would be.
"""

# ruff: noqa: RUF001 -- the bars of DeepSeek's marks are full-width

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from agentrl.tiny import TEMPLATE as HERMES

# Words, numbers, marks and line ends stand apart, as in the families' own tokenizers.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = "double the number and tell me what came back assistant user system name arguments parameters tool result " * 4

CHATML_TOOLS = """\
{%- if tools %}<|im_start|>system
Functions:
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}<|im_end|>
{% endif %}"""

CHATML_RESULT = """\
{%- elif m.role == 'tool' %}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}"""

QWEN3 = (
    CHATML_TOOLS
    + """\
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- set said = m.content %}
    {%- if '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set said = said.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.asked and (loop.last or thought) %}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- said }}
    {%- for call in m.tool_calls %}
        {{- '\\n' if said or not loop.first }}
        {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
"""
    + CHATML_RESULT
    + """\
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
)

# The thinking-only models: the prompt opens the thought.
QWEN3_OPENED = QWEN3.replace(
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}",
    "{{- '<think>\\n' }}",
)

QWEN3_CODER = (
    CHATML_TOOLS
    + """\
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
    {{- '<|im_start|>assistant' }}
    {%- if m.content %}{{- '\\n' + m.content + '\\n' }}{%- endif %}
    {%- for call in m.tool_calls %}
        {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for key, value in call.function.arguments.items() %}
            {{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
"""
    + CHATML_RESULT
    + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

LLAMA3 = """\
{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>system<|end_header_id|>\\n\\nFunctions:' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for m in messages %}
{%- if m.tool_calls %}
    {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call a turn') }}{%- endif %}
    {%- set call = m.tool_calls[0].function %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
    {{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
    {{- '<|eom_id|>' if builtin_tools is defined else '<|eot_id|>' }}
{%- elif m.role == 'tool' %}
    {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- else %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

MISTRAL_QUESTION = """\
{%- for m in messages %}
{%- if m.role == 'user' %}
    {%- if tools and loop.index0 == ns.shown %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}
    {{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}
"""  # noqa: E501

# Version 3: calls are a JSON list in which the template writes ids of nine letters; tools before the last question.
MISTRAL = (
    """\
{{- bos_token }}
{%- set ns = namespace(shown=0, turns=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
        {%- if (m.role == 'user') != (ns.turns % 2 == 0) %}{{- raise_exception('turns must alternate') }}{%- endif %}
        {%- set ns.turns = ns.turns + 1 %}
    {%- endif %}
    {%- if m.role == 'user' %}{%- set ns.shown = loop.index0 %}{%- endif %}
{%- endfor %}
"""
    + MISTRAL_QUESTION
    + """\
    {{- '[TOOL_CALLS] [' }}
    {%- for call in m.tool_calls %}
        {%- if call.id | length != 9 %}{{- raise_exception('ids have nine letters') }}{%- endif %}
        {{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
        {{- ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
    {%- endfor %}
    {{- ']' + eos_token }}
{%- elif m.role == 'tool' %}
    {%- if m.tool_call_id | length != 9 %}{{- raise_exception('ids have nine letters') }}{%- endif %}
    {{- '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}
    {{- ' ' + m.content + eos_token }}
{%- endif %}
{%- endfor %}"""
)

# Version 13: a name, [ARGS] and the arguments; tools at the beginning.
MISTRAL_NAMED = (
    "{{- bos_token }}{%- set ns = namespace(shown=0) %}"
    + MISTRAL_QUESTION
    + """\
    {{- m.content }}
    {%- for call in m.tool_calls %}
        {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- eos_token }}
{%- elif m.role == 'tool' %}
    {{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- else %}
    {{- m.content + eos_token }}
{%- endif %}
{%- endfor %}"""
)

# No token ends a turn: the mark of the next speaker does.
GLM = """\
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>\\nFunctions:' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
    {{- '<|user|>\\n' + m.content + ('/nothink' if enable_thinking is defined and not enable_thinking else '') }}
{%- elif m.role == 'assistant' %}
    {%- set thought = '' %}
    {%- set said = m.content %}
    {%- if '</think>' in said %}
        {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip() %}
        {%- set said = said.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|assistant|>\\n<think>' + (thought if loop.index0 > ns.asked else '') + '</think>' }}
    {%- if said.strip() %}{{- '\\n' + said.strip() }}{%- endif %}
    {%- for call in m.tool_calls %}
        {{- '\\n<tool_call>' + call.function.name + '\\n' }}
        {%- for key, value in call.function.arguments.items() %}
            {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' }}
            {{- (value if value is string else value | tojson) + '</arg_value>\\n' }}
        {%- endfor %}
        {{- '</tool_call>' }}
    {%- endfor %}
{%- elif m.role == 'tool' %}
    {%- if messages[loop.index0 - 1].role != 'tool' %}{{- '<|observation|>' }}{%- endif %}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' + ('\\n<think></think>' if enable_thinking is defined and not enable_thinking else '') }}
{%- endif %}"""

# Arguments are joined as text; results stand in the assistant's turn; history never shows that a thought was opened.
DEEPSEEK = """\
{{- bos_token }}
{%- for tool in tools or [] %}{{- tool | tojson }}{%- endfor %}
{%- set ns = namespace(asked=false, tool=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}
    {%- set ns.asked = true %}
    {%- set ns.tool = false %}
    {{- '<｜User｜>' + m.content }}
{%- elif m.tool_calls %}
    {%- if ns.asked %}{{- '<｜Assistant｜></think>' }}{%- endif %}
    {%- set ns.asked = false %}
    {{- m.content + '<｜tool▁calls▁begin｜>' }}
    {%- for call in m.tool_calls %}
        {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments }}
        {{- '<｜tool▁call▁end｜>' }}
    {%- endfor %}
    {{- '<｜tool▁calls▁end｜>' + eos_token }}
{%- elif m.role == 'tool' %}
    {%- set ns.tool = true %}
    {{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- else %}
    {%- if ns.asked %}{{- '<｜Assistant｜></think>' }}{%- endif %}
    {%- set ns.asked = false %}
    {{- (m.content if ns.tool else m.content.split('</think>')[-1]) + eos_token }}
    {%- set ns.tool = false %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}
    {{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}
{%- endif %}"""

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = (
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
)
BRACKETS = (
    *("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
SPEAKERS = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>")
BARS = (
    *("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
)


@dataclass(frozen=True)
class Family:
    """A family's template and the tokens that it needs; ``stops`` is ``eos_token_id`` of its generation config."""

    tool_format: str
    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    plain: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()


CALL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
THINK_TAGS = ("<think>", "</think>")
QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")
FAMILIES = {
    "hermes": Family("hermes", HERMES, CHATML, "<|im_end|>", plain=CALL_TAGS),
    "qwen3": Family("hermes", QWEN3, CHATML, "<|im_end|>", plain=CALL_TAGS + THINK_TAGS, stops=QWEN_STOPS),
    "qwen3_opened": Family("hermes", QWEN3_OPENED, CHATML, "<|im_end|>", plain=CALL_TAGS + THINK_TAGS),
    "qwen3_coder": Family("qwen3_coder", QWEN3_CODER, CHATML, "<|im_end|>", plain=CALL_TAGS),
    "llama3": Family(
        "llama3_json",
        LLAMA3,
        HEADERS,
        "<|eot_id|>",
        HEADERS[0],
        stops=("<|begin_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "mistral": Family("mistral", MISTRAL, BRACKETS, "</s>", "<s>"),
    "mistral_named": Family("mistral", MISTRAL_NAMED, (*BRACKETS, "[ARGS]"), "</s>", "<s>"),
    "glm45": Family(
        *("glm45", GLM, SPEAKERS, "<|endoftext|>", None, (*CALL_TAGS, *THINK_TAGS, "<arg_key>", "<arg_value>")),
        stops=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "deepseek": Family("deepseek_v31", DEEPSEEK, BARS, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>", THINK_TAGS),
}


def make_tokenizer(family: Family, folder: Path, *, generation_config: bool = True):
    """Write a small byte-level BPE with the family's tokens and template into ``folder``, and load it from there."""
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
        [WORDS], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    )
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=family.eos, bos_token=family.bos)
    made.add_tokens(list(family.special), special_tokens=True)
    made.add_tokens(list(family.plain))
    made.chat_template = family.template
    made.save_pretrained(folder)
    if family.stops and generation_config:
        ids = made.convert_tokens_to_ids(list(family.stops))
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return PreTrainedTokenizerFast.from_pretrained(folder)
