"""What copied strings (`x-copy`) cost beside the plain grammar, and beside the model's steps.

    python benchmarks/copy_masks.py [--quick]

Records are written for chunks of the embedded corpus: three copied strings, a list of two, and one
in the record's own words. Their tokens are given, so both schemas, with x-copy and without, go the
same way; a batch of 32 answers takes its masks together, as in the engine. The model is random, in
the embedded checkpoint's shape, with its own vocabulary and with one of Granite's size: merges
learnt from Python's standard library. All figures are CPU seconds of one process with one thread
for the model, so what else the machine does counts little.
"""

import argparse
import asyncio
import json
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from granite_ray.checkpoint import QUICKSTART_PATH, open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import make_engine
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.records import COPY_KEYWORD, Grammar, Prompt, SamplingParams

CORPUS = Path(QUICKSTART_PATH).parent / "corpus" / "packages.parquet"
BATCH_SIZE = 32
NUM_DECODE_STEPS = 32
GRANITE_VOCAB_SIZE = 100_352
END_OF_TEXT = "<|end_of_text|>"

STRING = {"type": ["string", "null"]}
WORDS = "a short sentence in the model's own words, about as long as these"


@dataclass(frozen=True)
class Costs:
    """CPU seconds of writing a batch of records, and of the first masks of its copied strings."""

    seconds: float
    num_steps: int
    first_s: float

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds / self.num_steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    is_quick = parser.parse_args().quick
    with tempfile.TemporaryDirectory() as name:
        large = write_checkpoint(Path(name), 8_000 if is_quick else GRANITE_VOCAB_SIZE)
        for path in (Path(QUICKSTART_PATH), large):
            report(path, (2_000,) if is_quick else (2_000, 8_000, 30_000))


def report(path: Path, chunk_sizes: Sequence[int]) -> None:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    end = tokenizer.token_to_id(END_OF_TEXT)
    compiler = GrammarCompiler(str(path / "tokenizer.json"), vocab_size, [end])
    started = time.process_time()
    compiler.matcher(Grammar(schema_text(is_copied=True), ""))
    print(f"\nvocabulary {vocab_size:,}: tables {time.process_time() - started:.2f} s, once")
    step_ms = measure_step(path)
    print(f"model, a step of {BATCH_SIZE}: {step_ms:.1f} ms")
    print("chunk, characters | plain masks, ms a step | with copies | first mask, ms | share")
    for num_characters in chunk_sizes:
        chunks = list(make_chunks(num_characters))
        answers = [encode_answer(chunk, index, tokenizer) for index, chunk in enumerate(chunks)]
        write(compiler, chunks, answers, is_copied=True)  # standings are looked at once a schema
        plain = write(compiler, chunks, answers, is_copied=False)
        copied = write(compiler, chunks, answers, is_copied=True)
        shares = [costs.step_ms / (costs.step_ms + step_ms) for costs in (plain, copied)]
        print(
            f"{num_characters:,} | {plain.step_ms:.2f} | {copied.step_ms:.2f} | "
            f"{1e3 * copied.first_s / len(chunks):.2f} | {shares[0]:.1%} → {shares[1]:.1%}"
        )


def write(
    compiler: GrammarCompiler, chunks: list[str], answers: list[list[int]], *, is_copied: bool
) -> Costs:
    """Write all answers together; a mask must allow what is written."""
    schema = schema_text(is_copied=is_copied)
    started = time.process_time()
    matchers = [compiler.matcher(Grammar(schema, chunk if is_copied else None)) for chunk in chunks]
    first_s = 0.0
    num_steps = max(map(len, answers))
    for place in range(num_steps):
        rows = [row for row, answer in enumerate(answers) if place < len(answer)]
        asked = time.process_time()
        masks = compiler.compute_masks([matchers[row] for row in rows])
        first_s = max(first_s, time.process_time() - asked)
        for mask, row in zip(masks, rows, strict=True):
            token_id = answers[row][place]
            assert mask[token_id // 8] >> token_id % 8 & 1
            matchers[row].consume(token_id)
    return Costs(time.process_time() - started, num_steps, first_s)


def schema_text(*, is_copied: bool) -> str:
    mark = {COPY_KEYWORD: True} if is_copied else {}
    span = {**STRING, **mark}
    items = {"type": "string", **mark}
    properties: dict[str, Any] = {"name": span, "place": span, "date": span}
    properties |= {"tags": {"type": "array", "items": items}, "note": STRING}
    required = list(properties)
    return json.dumps(
        {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    )


def make_chunks(num_characters: int) -> Iterator[str]:
    """Yield chunks that begin at different places of the corpus."""
    text = "\n\n".join(pq.read_table(CORPUS, columns=["text"])["text"].to_pylist())
    stride = (len(text) - num_characters) // BATCH_SIZE
    for index in range(BATCH_SIZE):
        yield text[index * stride : index * stride + num_characters]


def encode_answer(chunk: str, seed: int, tokenizer: Tokenizer) -> list[int]:
    """Write a record of a chunk as token ids, cut as the tokenizer cuts it."""
    numbers = Random(seed)
    words = chunk.split(" ")

    def span() -> str:
        length = numbers.randint(1, 6)
        start = numbers.randrange(len(words) - length)
        return " ".join(words[start : start + length]) or chunk[0]

    record = {"name": span(), "place": span(), "date": span(), "tags": [span(), span()]}
    answer = json.dumps({**record, "note": WORDS}, ensure_ascii=False, separators=(",", ":"))
    token_ids: list[int] = tokenizer.encode(answer, add_special_tokens=False).ids
    return token_ids


# model ───────────────────────────────────────────────────────────────────────────────────────────


def measure_step(path: Path) -> float:
    """Return the CPU milliseconds of one decode step of a whole batch, without grammars."""
    model = ModelConfig(path=str(path), load_format="dummy")
    checkpoint = open_checkpoint(model)
    config = EngineConfig(device="cpu", backend="native", max_num_seqs=BATCH_SIZE)
    engine = make_engine(checkpoint, model, config, num_threads=1)

    async def ask(num_tokens: int) -> None:
        prompts = [Prompt(tuple(range(20 + index, 84 + index))) for index in range(BATCH_SIZE)]
        sampling = SamplingParams(num_tokens)
        await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in prompts))

    def seconds(num_tokens: int) -> float:
        started = time.process_time()
        asyncio.run(ask(num_tokens))
        return time.process_time() - started

    try:
        seconds(2)
        found = [seconds(NUM_DECODE_STEPS + 1) - seconds(1) for _ in range(3)]
        return 1e3 * float(np.median(found)) / NUM_DECODE_STEPS
    finally:
        engine.shutdown()


def write_checkpoint(folder: Path, vocab_size: int) -> Path:
    """Write the embedded checkpoint's shape with another vocabulary; it has no weights."""
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(Path(QUICKSTART_PATH) / name, folder)
    config = json.loads((Path(QUICKSTART_PATH) / "config.json").read_text())
    config["vocab_size"] = vocab_size
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    sources = stdlib.rglob("*.py") if vocab_size == GRANITE_VOCAB_SIZE else stdlib.glob("*.py")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in sources)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    print(f"learnt {tokenizer.get_vocab_size():,} of {vocab_size:,} tokens")
    return folder


if __name__ == "__main__":
    main()
