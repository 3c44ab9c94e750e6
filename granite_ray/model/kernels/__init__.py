"""What decode steps do most, in C, compiled once for each machine that can use it.

A step of few tokens takes as long as its weights take to be read, and torch reads them at a third
of the machine's rate (benchmarks/README.md). These kernels are for CPUs with AVX512-BF16 and a C
compiler; elsewhere and for other dtypes torch does the same, and it multiplies many tokens at once.

`GRANITE_RAY_CPU_KERNELS=off` leaves them out.
"""

from granite_ray.model.kernels.calls import CpuKernels, MambaParameters, PagedKeys
from granite_ray.model.kernels.compiled import MAX_TOKENS, ROWS_A_TASK, kernels_for, load_kernels

__all__ = [
    "MAX_TOKENS",
    "ROWS_A_TASK",
    "CpuKernels",
    "MambaParameters",
    "PagedKeys",
    "kernels_for",
    "load_kernels",
]
