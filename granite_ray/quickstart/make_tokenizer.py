"""Make the embedded checkpoint's tokenizer: what is trained on → `checkpoint/tokenizer.json`.

Run it as `python -m granite_ray.quickstart.make_tokenizer --lists … --changelogs …`; README.md says
how to fill the folders. Its chat template is written by hand and lies beside it.
"""

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer

from granite_ray.quickstart.changelogs import ChangelogEntry, is_trained_on, read_changelogs
from granite_ray.quickstart.packages import Package, is_held_out, name_digest, read_packages

CHECKPOINT_PATH = Path(__file__).parent / "checkpoint"
VOCAB_SIZE = 6_144
CONTEXT_LENGTH = 2_048
NUM_ENTRIES = 20_000
MAX_ENTRY_LENGTH = 1_000
"""Characters: long entries list names without end."""

END_OF_TEXT = "<|end_of_text|>"
PAD = "<|pad|>"
# Granite 3 and 4 list more (notebooks, commits, plug-ins); these are the ones that prompts use.
CONTROL_TOKENS = (
    END_OF_TEXT,
    PAD,
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|tool_call|>",
    "<fim_prefix>",
    "<fim_middle>",
    "<fim_suffix>",
    "<fim_pad>",
    "<tools>",
    "</tools>",
    "<documents>",
    "</documents>",
)
# One token each, but part of an answer's text: Granite 4 does not mark them as special, so that
# decoding keeps them. A tokenizer must still be told not to read them out of a document.
ANSWER_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the tokenizer and write it as a checkpoint has it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lists", type=Path, required=True, help="folder of apt's lists")
    parser.add_argument("--changelogs", type=Path, required=True, help="folder of changelogs")
    parser.add_argument("--out", type=Path, default=CHECKPOINT_PATH)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    entries, _ = read_changelogs(arguments.changelogs)
    texts = training_texts(read_packages(arguments.lists), entries)
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    write_tokenizer(tokenizer, arguments.out)
    logger.info(
        "%d tokens from %d texts → %s", tokenizer.get_vocab_size(), len(texts), arguments.out
    )


def training_texts(packages: Sequence[Package], entries: Sequence[ChangelogEntry]) -> list[str]:
    """Return texts of what is not held out, each once, in order; of changelogs a fixed lot."""
    training = [package for package in packages if not is_held_out(package.name)]
    lot = sorted(filter(is_trained_on, entries), key=lambda entry: name_digest(entry.text))
    descriptions = {f"{package.synopsis}\n{package.text}" for package in training}
    return sorted(descriptions | {entry.text[:MAX_ENTRY_LENGTH] for entry in lot[:NUM_ENTRIES]})


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = digits_then_bytes()
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(ANSWER_TOKENS),
        special_tokens=[AddedToken(token, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not given to the trainer, which would mark them special too.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ANSWER_TOKENS])
    return tokenizer


def digits_then_bytes() -> PreTokenizer:
    """Return Granite's way to part a text before BPE."""
    return PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def write_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json` and the config that transformers reads beside it."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_LENGTH,
        "pad_token": PAD,
        "padding_side": "left",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    text = json.dumps(config, indent=2)
    (path / "tokenizer_config.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
