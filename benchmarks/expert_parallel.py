"""What does it cost to divide the experts over ranks: step time, bytes, memory, imbalance?

    python benchmarks/expert_parallel.py [--layers 4] [--repeats 5]

Steps of a model in the shapes of granite-3.1-1b-a400m, a few layers, bfloat16, random weights, on
1, 2 and 4 processes with one thread each. Then a model of the step's time, fed with what one rank
takes and with what the link does by itself, is held against these steps; and it is asked about
H-Small on H100 GPUs, which this machine does not have.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_model import (
    Device,
    Link,
    Shape,
    bytes_sent,
    exchange_s,
    experts_s,
    shared_s,
)

from granite_ray.engine.canary import PromptShape, make_prompts
from granite_ray.engine.runner import Runner
from granite_ray.engine.sequence import ScheduledSequence, StepPlan
from granite_ray.model.architecture import Architecture, read_architecture
from granite_ray.model.state import allocate_state
from granite_ray.model.weights import count_parameters, dummy_model, load_weights
from granite_ray.parallel.experts import GroupDispatcher
from granite_ray.parallel.groups import Group, open_meeting
from granite_ray.parallel.place import RankPlace, divide_experts

PRESETS = Path(__file__).parent.parent / "configs" / "models"
HOST = "127.0.0.1"
BLOCK_SIZE = 16
SEQUENCE_TOKENS = 64
SIZES = (1, 2, 4)
TOKENS = (16, 128, 1024)
SKEWS = (0.0, 0.25, 0.5, 1.0)
CPU = torch.device("cpu")
TIMEOUT_S = 600.0


class SkewedDispatcher(GroupDispatcher):
    """Moves a share of all choices to the experts of rank 0."""

    skew = 0.0

    def dispatch(self, x_TD, expert_ids_TK, weights_TK, buffers):  # type: ignore[no-untyped-def]
        is_moved = torch.rand(expert_ids_TK.shape) < self.skew
        first_TK = expert_ids_TK % len(
            divide_experts(len(self._rank_of_expert), self._group.size)[0]
        )
        moved_TK = first_TK.where(is_moved, expert_ids_TK)
        return super().dispatch(x_TD, moved_TK, weights_TK, buffers)


# one rank ────────────────────────────────────────────────────────────────────────────────────────


def measure_rank(place: RankPlace, config: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Run steps together with the other ranks; return seconds, bytes and what the link does."""
    torch.set_num_threads(1)
    architecture = read_architecture(config)
    group = Group(place)
    dispatcher = SkewedDispatcher(group, architecture.num_local_experts, CPU)
    model = dummy_model(architecture, torch.bfloat16, CPU, 0, dispatcher)
    group.join(CPU)
    found: dict[str, Any] = {"link": _measure_link(group, architecture, repeats)}
    for num_tokens in TOKENS:
        step = _make_step(model, architecture, num_tokens)
        for skew in SKEWS if num_tokens == max(TOKENS) and group.size > 1 else (0.0,):
            dispatcher.skew = skew
            found[f"{num_tokens} {skew}"] = _time_together(group, step, repeats)
    return found


def _make_step(
    model: Any, architecture: Architecture, num_tokens: int
) -> Callable[[], torch.Tensor]:
    num_prompts = max(1, num_tokens // SEQUENCE_TOKENS)
    length = num_tokens // num_prompts
    num_blocks = num_prompts * -(-length // BLOCK_SIZE)
    state = allocate_state(architecture, num_blocks, BLOCK_SIZE, 0, torch.bfloat16, CPU)
    runner = Runner(model, state, BLOCK_SIZE)
    shape = PromptShape(num_prompts, length, BLOCK_SIZE, architecture.vocab_size)
    prompts = make_prompts(shape, range(num_prompts))
    plan = StepPlan(tuple(ScheduledSequence(prompt, length) for prompt in prompts))
    return lambda: runner.run(plan)


def _time_together(
    group: Group, step: Callable[[], torch.Tensor], repeats: int
) -> tuple[float, float]:
    """Return the median of seconds, and the bytes sent, of a step that all ranks begin at once."""
    seconds, sent = [], []
    for _ in range(repeats + 1):
        group.agree(0)
        before, started = group.num_bytes_sent, time.perf_counter()
        step()
        group.agree(0)  # the slowest counts
        seconds.append(time.perf_counter() - started)
        sent.append(group.num_bytes_sent - before)
    return statistics.median(seconds[1:]), sent[-1]


def _measure_link(group: Group, architecture: Architecture, repeats: int) -> tuple[float, float]:
    """Return bytes a second that a rank sends, and seconds of an exchange of next to nothing."""
    rows = 2048 // group.size
    counts = [rows] * group.size
    large = torch.zeros(rows * group.size, architecture.hidden_size, dtype=torch.bfloat16)
    small, received = torch.zeros(group.size, 2), torch.empty_like(large)
    seconds = {}
    for name, tensor, split in (("large", large, counts), ("small", small, [1] * group.size)):
        into = received if name == "large" else torch.empty_like(small)
        timed = [
            _time_together(group, lambda: group.exchange(tensor, into, split, split), 1)[0]  # noqa: B023
            for _ in range(4 * repeats)
        ]
        seconds[name] = statistics.median(timed)
    sent = large.nbytes * (group.size - 1) / group.size
    return sent / max(1e-9, seconds["large"] - seconds["small"]), seconds["small"]


def measure_memory(place: RankPlace, folder: str, config: dict[str, Any]) -> tuple[int, int]:
    """Load a rank's weights from files; return their bytes and the most memory it took for them."""
    torch.set_num_threads(1)
    architecture = read_architecture(config)
    dispatcher = GroupDispatcher(Group(place), architecture.num_local_experts, CPU)
    before, peak, is_done = _private_bytes(), [0], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.002):
            peak[0] = max(peak[0], _private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_weights(
        folder, architecture, dtype=torch.bfloat16, device=CPU, dispatcher=dispatcher
    )
    is_done.set()
    watcher.join()
    return sum(p.nbytes for p in model.parameters()), max(peak[0], _private_bytes()) - before


def _private_bytes() -> int:
    """Memory of this process alone, files that it looks into left out."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


# all ranks ───────────────────────────────────────────────────────────────────────────────────────


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in `size` processes that can form a group; return what each returns."""
    store, port = open_meeting(HOST, TIMEOUT_S)
    places = [
        RankPlace(rank, size, HOST, (HOST, port), TIMEOUT_S, TIMEOUT_S) for rank in range(size)
    ]
    with multiprocessing.get_context("spawn").Pool(size) as pool:
        found = pool.starmap(function, [(place, *arguments) for place in places], chunksize=1)
    del store
    return found


def small_config(num_layers: int) -> dict[str, Any]:
    config = json.loads((PRESETS / "granite-3.1-1b-a400m" / "config.json").read_text())
    return config | {"num_hidden_layers": num_layers}


def write_weights(folder: str, config: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    (Path(folder) / "config.json").write_text(json.dumps(config))
    made = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    made.save_pretrained(folder)


def print_memory(config: dict[str, Any]) -> None:
    print("\nloading: ranks, MiB of weights of the largest rank, MiB that it took at most")
    with tempfile.TemporaryDirectory() as folder:
        write_weights(folder, config)
        for size in SIZES:
            found = run_ranks(size, measure_memory, folder, config)
            weights, peak = (max(column) / 1024**2 for column in zip(*found, strict=True))
            print(f"{size:5} {weights:8.0f} {peak:8.0f}")


def print_steps(config: dict[str, Any], repeats: int) -> None:
    shape, cores = Shape.of(config), os.cpu_count() or 1
    measured = {size: run_ranks(size, measure_rank, config, repeats)[0] for size in SIZES}
    print("\nsteps: tokens a rank, ranks, ms, MiB sent a rank (counted by hand), ms by the model")
    for num_tokens in TOKENS:
        alone = measured[1][f"{num_tokens} 0.0"][0]
        for size in SIZES:
            seconds, sent = measured[size][f"{num_tokens} 0.0"]
            link = Link(*measured[size]["link"])
            by_hand = shape.num_layers * bytes_sent(shape, size, num_tokens) if size > 1 else 0.0
            # More ranks than cores take turns.
            expected = alone * max(1.0, size / cores) + exchange_s(shape, size, num_tokens, link)
            print(
                f"{num_tokens:6} {size:3} {1e3 * seconds:9.1f} {sent / 1024**2:8.2f} "
                f"({by_hand / 1024**2:.2f}) {1e3 * expected:9.1f}"
            )
    print("\nimbalance: share of choices moved to rank 0, times as long as an even step")
    for size in SIZES[1:]:
        even = measured[size][f"{max(TOKENS)} 0.0"][0]
        for skew in SKEWS:
            seconds = measured[size][f"{max(TOKENS)} {skew}"][0]
            print(f"{size:3} ranks {skew:5.0%} {seconds / even:6.2f}")
    for size in SIZES[1:]:
        rate, latency = measured[size]["link"]
        print(f"link of {size} ranks: {rate / 1e9:.2f} GB/s a rank, {1e6 * latency:.0f} µs")


# other machines ──────────────────────────────────────────────────────────────────────────────────

H100 = Device(flops_per_s=0.5 * 989e12, memory_bytes_per_s=0.7 * 3.35e12)
LINKS = {
    "NVLink": Link(bytes_per_s=0.7 * 450e9, latency_s=50e-6),
    "400 Gb/s network": Link(bytes_per_s=0.7 * 50e9, latency_s=100e-6),
}


def print_predictions() -> None:
    config = json.loads((PRESETS / "granite-4.0-h-small" / "config.json").read_text())
    shape = Shape.of(config)
    shared = count_parameters(read_architecture(config), range(0))
    print("\nH-Small: tokens a rank, ranks, link, ms, of it exchange, tokens/s of all ranks")
    for num_tokens in (64, 4096):
        for size in (1, 2, 4, 8):
            for name, link in LINKS.items() if size > 1 else [("", replace(LINKS["NVLink"]))]:
                apart = exchange_s(shape, size, num_tokens, link)
                together = experts_s(shape, size, num_tokens, H100)
                total = together + shared_s(shared, num_tokens, H100) + apart
                rate = size * num_tokens / total
                print(
                    f"{num_tokens:6} {size:3} {name:17} {1e3 * total:8.1f} {apart / total:6.0%} "
                    f"{rate:12,.0f}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    config = small_config(arguments.layers)
    print_predictions()
    print_memory(config)
    print_steps(config, arguments.repeats)


if __name__ == "__main__":
    main()
