"""How does our engine's cost grow: with a document's length, with labels, with a record's fields?

    python benchmarks/growth.py [--layers 6] [--threads 2] [--plot FILE.svg] [--quick]

In the shapes of granite-3.1-1b-a400m, bfloat16, random weights, on the CPU, everything in one
process, each size twice in turns with the others; figures are the faster of the two. Documents are
random tokens: 8 at once, or as many as make 8,192 tokens where they are long. Labels are weighed
after 16 documents of 256 tokens. Records have fields of five kinds, are written for 16 documents of
256 tokens, and end by their grammar.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.plots import Panel, draw_speeds
from engines.workload import draw_token_ids, write_checkpoint

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.records import Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import load_tokenizer

MAX_MODEL_LEN = 33_000
DOCUMENT_TOKENS = (100, 300, 1_000, 3_000, 10_000, 32_000)
NUM_LABELS = (2, 10, 50, 200, 1_000)
NUM_FIELDS = (1, 4, 16, 64)
QUICK = (100, 300), (2, 10), (1, 4)
NUM_DOCUMENTS = 16
SHORT_TOKENS = 256
ANSWER_TOKENS = 16
TOKENS_AT_ONCE = 8_192
NUM_TRIES = 2


@dataclass(frozen=True, slots=True)
class Timing:
    """What documents took, and how many tokens were read and written for them."""

    num_documents: int
    num_tokens: int
    seconds: float

    @property
    def per_second(self) -> tuple[float, float]:
        return self.num_documents / self.seconds, self.num_tokens / self.seconds


class Growth:
    """Asks one engine for more and more."""

    def __init__(self, engine: Engine, vocab_size: int, encode: Callable[[str], list[int]]) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._encode = encode
        self._numbers = random.Random(3)

    def _prompt(self, num_tokens: int) -> Prompt:
        return Prompt(tuple(draw_token_ids(self._numbers, self._vocab_size, num_tokens)))

    async def read(self, num_tokens: int) -> Timing:
        """Read documents of a length, and answer each with a few tokens."""
        count = max(1, min(8, TOKENS_AT_ONCE // num_tokens))
        sampling = SamplingParams(ANSWER_TOKENS)
        asked = [self._engine.generate(self._prompt(num_tokens), sampling) for _ in range(count)]
        return await timed(asked, count * num_tokens)

    async def weigh(self, num_labels: int) -> Timing:
        """Weigh so many labels of two words each."""
        labels = [tuple(self._encode(f"topic {number:03d}")) for number in range(num_labels)]
        asked = [
            self._engine.score(self._prompt(SHORT_TOKENS), labels) for _ in range(NUM_DOCUMENTS)
        ]
        return await timed(asked, NUM_DOCUMENTS * SHORT_TOKENS)

    async def fill(self, num_fields: int) -> Timing:
        """Write records of so many fields."""
        grammar = Grammar(json.dumps(make_schema(num_fields)))
        sampling = SamplingParams(40 * num_fields + 20)
        asked = [
            self._engine.generate(self._prompt(SHORT_TOKENS), sampling, grammar)
            for _ in range(NUM_DOCUMENTS)
        ]
        return await timed(asked, NUM_DOCUMENTS * SHORT_TOKENS)


async def timed(asked: list[Awaitable[Any]], num_tokens: int) -> Timing:
    started = time.perf_counter()
    answers = await asyncio.gather(*asked)
    seconds = time.perf_counter() - started
    written = sum(getattr(answer, "num_completion_tokens", 0) for answer in answers)
    return Timing(len(asked), num_tokens + written, seconds)


def make_schema(num_fields: int) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"enum": ["one", "two", "three"]},
        {"type": "integer", "minimum": 0, "maximum": 9_999},
        {"type": "boolean"},
        {"type": "string", "maxLength": 16},
        {"type": ["string", "null"], "maxLength": 12},
    ]
    fields = {f"field_{number}": kinds[number % len(kinds)] for number in range(num_fields)}
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


async def measure(
    ask: Callable[[int], Awaitable[Timing]], sizes: tuple[int, ...]
) -> dict[int, Timing]:
    """Ask for every size in turns; return the faster try of each."""
    tries = [{size: await ask(size) for size in sizes} for _ in range(NUM_TRIES)]
    return {size: min((found[size] for found in tries), key=lambda t: t.seconds) for size in sizes}


def show(title: str, found: dict[int, Timing]) -> None:
    print(f"\n{title}\n{'size':>8}{'documents/s':>13}{'tokens/s':>10}{'tokens':>9}{'seconds':>9}")
    for size, timing in found.items():
        documents_per_s, tokens_per_s = timing.per_second
        print(
            f"{size:8,}{documents_per_s:13.2f}{tokens_per_s:10,.0f}{timing.num_tokens:9,}"
            f"{timing.seconds:9.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, help="of the 24 (default: 6)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--plot", type=Path, help="draw it to this file; needs matplotlib")
    parser.add_argument("--quick", action="store_true", help="only to see that it works: 2 layers")
    options = parser.parse_args()
    lengths, labels, fields = QUICK if options.quick else (DOCUMENT_TOKENS, NUM_LABELS, NUM_FIELDS)
    with tempfile.TemporaryDirectory() as name:
        config = write_checkpoint(Path(name), 2 if options.quick else options.layers)
        model = ModelConfig(path=name, max_model_len=MAX_MODEL_LEN)
        checkpoint = open_checkpoint(model)
        tokenizer = load_tokenizer(checkpoint.tokenizer_path)
        native = EngineConfig(backend="native", device="cpu")
        engine = make_engine(checkpoint, model, native, options.threads)
    growth = Growth(engine, config["vocab_size"], tokenizer.encode_text)
    asyncio.run(growth.read(SHORT_TOKENS))
    read = asyncio.run(measure(growth.read, lengths))
    show(f"document length, {ANSWER_TOKENS} tokens answered", read)
    weighed = asyncio.run(measure(growth.weigh, labels))
    show("labels", weighed)
    filled = asyncio.run(measure(growth.fill, fields))
    show("fields of a record", filled)
    engine.shutdown()
    if options.plot:
        panels = [
            ("tokens of a document", read),
            ("labels", weighed),
            ("fields of a record", filled),
        ]
        draw_speeds(options.plot, [panel(title, found) for title, found in panels])


def panel(title: str, found: dict[int, Timing]) -> Panel:
    speeds = [timing.per_second[1] for timing in found.values()]
    return Panel(title, title, list(found), {"ours": speeds})


if __name__ == "__main__":
    main()
