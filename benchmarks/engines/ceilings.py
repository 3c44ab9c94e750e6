"""What this machine can do at best: multiply large bfloat16 matrices, and read memory."""

from collections.abc import Callable

import torch
from engines.exchange import choose_clock, read_assignment, write_result

from granite_ray.model.pages import ask_for_large_pages

GEMM_SIZE = 4096
READ_BYTES = 2**30
NUM_TRIES = 5


def main() -> None:
    assignment = read_assignment()
    torch.set_num_threads(assignment.num_threads)
    clock = choose_clock(assignment)
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).bfloat16()
    product = torch.empty_like(a)
    numbers = torch.empty(READ_BYTES // 4)
    ask_for_large_pages([numbers])
    numbers.fill_(1)
    write_result(
        {
            "flops_per_s": 2 * GEMM_SIZE**3 / fastest(clock, lambda: torch.mm(a, b, out=product)),
            "read_bytes_per_s": READ_BYTES / fastest(clock, numbers.sum),
        }
    )


def fastest(clock: Callable[[], float], act: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(NUM_TRIES):
        started = clock()
        act()
        seconds.append(clock() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
