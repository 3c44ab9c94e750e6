"""A small byte-level tokenizer of Granite's form, for every test that needs one.

Trained on the spot from a short text, always the same. It splits digits one by one, knows Granite's
control tokens (the tool tokens not marked special, as in Granite 4), and has a chat template with
system, tools and documents turns.
"""

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|end_of_text|>"

SPECIAL_TOKENS = (
    END_OF_TEXT,
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<|pad|>",
    "<|unk|>",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|tool_call|>",
)
TOOL_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

MAX_VOCAB_SIZE = 900

TRAINING_TEXT = """\
The quick brown fox jumps over the lazy dog, and the dog does not mind.
A granite is a coarse rock; it cools slowly, deep in the earth, and it lasts.
# Install
This package provides a small library for reading and writing archives. It can list, extract and
create files, and it checks every file that it writes. See the documentation for details.
## Usage
Summarize the document in one short paragraph. Answer with a label: science, sports, news, other.
The company was founded in 1998 by three people in Vienna. Its revenue was 12.5 million in 2024.
Please contact the maintainer at info@example.org before the end of the year.
{"name": "Ada", "age": 36, "tags": ["math", "engine"], "address": {"city": "London", "zip": null}}
{"title": "Report", "date": "2024-05-01", "total": 1234.56, "paid": true, "items": []}
def add(first, second):
    return first + second
Der Hund läuft über die Straße. Où est la bibliothèque? El niño comió la manzana.
東京は日本の首都です。今日は良い天気ですね。 你好世界。 Привет, мир. مرحبا بالعالم
"""

CHAT_TEMPLATE = """\
{%- macro turn(role, content) -%}
<|start_of_role|>{{ role }}<|end_of_role|>{{ content }}<|end_of_text|>
{% endmacro -%}
{%- if messages and messages[0].role == "system" -%}
    {%- set system = messages[0].content -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = "You are a helpful assistant." -%}
    {%- set turns = messages -%}
{%- endif -%}
{{- turn("system", system) -}}
{%- if tools -%}
    {{- turn("available_tools", tools | tojson(indent=4)) -}}
{%- endif -%}
{%- if documents -%}
    {%- set listed = namespace(text="") -%}
    {%- for document in documents -%}
        {%- set listed.text = listed.text ~ "Document " ~ loop.index ~ "\\n"
            ~ (document.title ~ "\\n" if document.title else "") ~ document.text -%}
        {%- if not loop.last -%}
            {%- set listed.text = listed.text ~ "\\n\\n" -%}
        {%- endif -%}
    {%- endfor -%}
    {{- turn("documents", listed.text) -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message.role not in ["user", "assistant", "tool", "system"] -%}
        {{- raise_exception("unknown role") -}}
    {%- endif -%}
    {{- turn(message.role, message.content) -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|start_of_role|>assistant<|end_of_role|>" -}}
{%- endif -%}
"""


def write_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """Write a tokenizer's files into `folder`; without `chat` it is that of a base checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": "<|unk|>",
        "pad_token": "<|pad|>",
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    if chat:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


@functools.cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TOOL_TOKENS])
    return tokenizer.to_str()
