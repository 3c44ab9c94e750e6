"""Tokenizers whose tokens are cut otherwise than Granite's, as files that both libraries read."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.tiny import END_OF_TEXT, TRAINING_TEXT, write_tokenizer

RECORDS = "\n".join(
    json.dumps(record, ensure_ascii=False, separators=(",", ":"))
    for record in (
        {"name": "The fox.", "tags": ["The dog", "a \\ b", 'say "no"'], "place": {"city": "東京"}},
        {"name": None, "tags": [], "place": None, "note": "so it lasts"},
        {"name": "\n\t", "tags": ["🙂🙃", "e\u0301"], "place": {"city": None}, "note": ""},
    )
)


def write_granite(folder: Path) -> Path:
    """Granite's own form: a word, a number or a run of punctuation is a token at most."""
    write_tokenizer(folder)
    return folder / "tokenizer.json"


def write_unbounded(folder: Path) -> Path:
    """Tokens of bytes that know no boundary: one can close a string and open the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, folder, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def write_pieces(folder: Path) -> Path:
    """Tokens of characters, spaces written as a sign, and single bytes for what is not known."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _train(tokenizer, folder, byte_tokens=["<unk>", *byte_tokens])


VOCABULARIES: dict[str, Callable[[Path], Path]] = {
    "granite": write_granite,
    "unbounded": write_unbounded,
    "pieces": write_pieces,
}


def _train(
    tokenizer: Tokenizer,
    folder: Path,
    initial_alphabet: list[str] | None = None,
    byte_tokens: list[str] | None = None,
) -> Path:
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*(byte_tokens or []), END_OF_TEXT],
        initial_alphabet=initial_alphabet or [],
        show_progress=False,
    )
    lines = [*TRAINING_TEXT.splitlines(), *RECORDS.splitlines() * 4]
    tokenizer.train_from_iterator(lines, trainer)
    path = folder / "tokenizer.json"
    definition = json.loads(tokenizer.to_str())
    if byte_tokens:  # plain tokens of the vocabulary, as a sentencepiece model has them
        kept = [one for one in definition["added_tokens"] if one["content"] not in byte_tokens[1:]]
        definition["added_tokens"] = kept
    path.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    return path
