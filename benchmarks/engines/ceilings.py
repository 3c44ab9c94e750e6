"""What this machine can do at best: multiply large bfloat16 matrices, and read memory."""

import time
from collections.abc import Callable

import torch
from engines.exchange import read_assignment, write_result

GEMM_SIZE = 4096
READ_BYTES = 2**30
NUM_TRIES = 5


def main() -> None:
    torch.set_num_threads(read_assignment().num_threads)
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).bfloat16()
    product = torch.empty_like(a)
    numbers = torch.ones(READ_BYTES // 4)
    write_result(
        {
            "flops_per_s": 2 * GEMM_SIZE**3 / fastest(lambda: torch.mm(a, b, out=product)),
            "read_bytes_per_s": READ_BYTES / fastest(numbers.sum),
        }
    )


def fastest(act: Callable[[], torch.Tensor]) -> float:
    seconds = []
    for _ in range(NUM_TRIES):
        started = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
