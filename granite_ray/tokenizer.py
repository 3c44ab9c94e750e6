"""Text ↔ token ids and chat turns → text, from a checkpoint's own files.

It uses `tokenizers` and a sandboxed Jinja, not transformers, which would load torch. What a prompt
is made of is decided in `tasks`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import tokenizers
from jinja2 import Template, TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from granite_ray.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
"""All that decides how text becomes token ids."""

PROMPT_DATE = datetime(2025, 1, 1)
"""What `strftime_now` of a template shows: with a clock, answers would depend on the day."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


class Tokenizer:
    """One checkpoint's tokenizer and chat template. Pickling stores the folder's path only.

    Control tokens are all tokens that the checkpoint adds to its vocabulary of plain text, such as
    `<|start_of_role|>` or `<tool_call>`.
    """

    def __init__(
        self,
        checkpoint_path: str,
        definition: Mapping[str, Any],
        templates: Mapping[str, Template],
        named_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.checkpoint_path = checkpoint_path
        self.eos_token_ids = eos_token_ids
        self._templates = templates
        self._named_tokens = named_tokens
        self._full = _build(definition)
        self._plain = _build(_without_control_tokens(definition))
        self.control_token_ids = frozenset(self._full.get_added_tokens_decoder())
        self.vocab_size = 1 + max(self._full.get_vocab(with_added_tokens=True).values())

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return load_tokenizer, (self.checkpoint_path,)

    @property
    def tokenizer_json(self) -> str:
        """Path of the tokenizer's definition."""
        return str(Path(self.checkpoint_path) / "tokenizer.json")

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint is one to chat with; a base checkpoint has no template."""
        return bool(self._templates)

    def encode_text(self, text: str) -> list[int]:
        """Encode a document's text: a control token written in it is plain text like any other."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts as `encode_text` does, faster than one by one."""
        encodings = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_with_offsets(self, text: str) -> tokenizers.Encoding:
        """Encode as `encode_text` does; `offsets` of the return are (start, end) of each token.

        They count code points. Tokens that share the bytes of one code point share its offsets.
        """
        return self._plain.encode(text, add_special_tokens=False)

    def encode_template(self, text: str) -> list[int]:
        """Encode text of a template, in which control tokens count as such."""
        return self._full.encode(text, add_special_tokens=False).ids

    def count(self, text: str) -> int:
        """Count the tokens of a document's text."""
        return len(self.encode_text(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn token ids into text, without the tokens that the checkpoint marks special.

        Tokens such as `<tool_call>`, which answers may contain, are not marked and stay. Bytes that
        are not UTF-8 become U+FFFD.
        """
        return self._full.decode(list(token_ids), skip_special_tokens=True)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Render chat turns by the checkpoint's own template, for `encode_template`.

        Raises:
            ConfigError: The template refuses these turns.
        """
        assert self.has_chat_template, "a base checkpoint has no chat template"
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates[name]
        try:
            return template.render(
                **self._named_tokens,
                messages=[_without_nulls(message) for message in messages],
                documents=documents,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError) as error:
            raise ConfigError(
                f"model.path {self.checkpoint_path!r}: its chat template refuses this prompt: "
                f"{error}. Check task.system_prompt, task.examples and task.tools."
            ) from error


def load_tokenizer(checkpoint_path: str) -> Tokenizer:
    """Read the tokenizer and chat template of a checkpoint folder.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    folder = Path(checkpoint_path)
    definition = read_checkpoint_json(folder, "tokenizer.json")
    if definition is None:
        raise ConfigError(
            f"model.path {checkpoint_path!r} has no tokenizer.json. Save it there with "
            "transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…)."
        )
    settings = read_checkpoint_json(folder, "tokenizer_config.json") or {}
    named_tokens = {
        name: _content(settings[name]) for name in NAMED_TOKENS if settings.get(name) is not None
    }
    eos_token_ids = _find_eos_token_ids(folder, definition, named_tokens.get("eos_token"))
    templates = _compile_templates(folder, _find_templates(folder, settings))
    try:
        return Tokenizer(checkpoint_path, definition, templates, named_tokens, eos_token_ids)
    except Exception as error:  # tokenizers raises no narrower type
        raise ConfigError(
            f"model.path {checkpoint_path!r}: its tokenizer.json cannot be used: {error}. "
            "Download or save it again."
        ) from error


def read_checkpoint_json(folder: Path, name: str) -> dict[str, Any] | None:
    """Return the JSON object in a checkpoint's file, or None where there is no such file."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"model.path: {path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"model.path: {path} holds no JSON object.")
    return found


def make_template_environment() -> ImmutableSandboxedEnvironment:
    """Return the Jinja environment that chat templates are written for, without a clock."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = PROMPT_DATE.strftime
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _build(definition: Mapping[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _without_control_tokens(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Return the definition of a tokenizer that cannot produce a control token.

    Their names leave the model's vocabulary too, so that no merge can arrive at one. The
    post-processor goes because it trims offsets.
    """
    names = {token["content"] for token in definition["added_tokens"]}
    model = dict(definition["model"])
    model["vocab"] = {name: index for name, index in model["vocab"].items() if name not in names}
    model["merges"] = [merge for merge in model["merges"] if names.isdisjoint(_merged(merge))]
    return {**definition, "added_tokens": [], "model": model, "post_processor": None}


def _merged(merge: str | Sequence[str]) -> tuple[str, str, str]:
    """Return the two tokens of a merge, which older files write as one string, and their sum."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second, first + second


def _find_eos_token_ids(
    folder: Path, definition: Mapping[str, Any], eos_token: str | None
) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        found = (read_checkpoint_json(folder, name) or {}).get("eos_token_id")
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    ids = [token["id"] for token in definition["added_tokens"] if token["content"] == eos_token]
    if not ids:
        raise ConfigError(
            f"model.path {str(folder)!r} names no end-of-text token. Set eos_token_id in its "
            "config.json."
        )
    return tuple(ids)


def _find_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name: one named `default`, or several, or none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {"default": path.read_text(encoding="utf-8")}
    found = read_checkpoint_json(folder, "chat_template.json") or settings
    template = found.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return {} if template is None else {"default": template}


def _compile_templates(folder: Path, templates: Mapping[str, str]) -> dict[str, Template]:
    environment = make_template_environment()
    if templates and "default" not in templates:
        raise ConfigError(
            f"model.path {str(folder)!r} has the chat templates {sorted(templates)} and none named "
            "default. Rename the one to use."
        )
    try:
        return {name: environment.from_string(text) for name, text in templates.items()}
    except TemplateError as error:
        raise ConfigError(
            f"model.path {str(folder)!r}: its chat template is not valid Jinja: {error}."
        ) from error


def _content(token: str | Mapping[str, Any]) -> str:
    """A named token is written as its text, or as an object that also says how it is matched."""
    return token if isinstance(token, str) else str(token["content"])


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    """A null field would be rendered as `None` by templates that only look for absence."""
    return {name: value for name, value in message.items() if value is not None}
