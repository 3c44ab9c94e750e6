"""Large memory pages for what every step reads: the processor looks up fewer addresses."""

import ctypes
import mmap
from collections.abc import Iterable

import torch

PAGE_BYTES = 2**21
"""Of a large page on x86-64, and on ARM with pages of 4 KiB."""


def ask_for_large_pages(tensors: Iterable[torch.Tensor]) -> None:
    """Tell the system that these tensors, not written yet, are best kept in large pages.

    Only advice: where the system takes none, or the tensors are on a device, nothing changes.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None:
        return
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            continue
        start = -(-tensor.data_ptr() // PAGE_BYTES) * PAGE_BYTES
        end = (tensor.data_ptr() + tensor.nbytes) // PAGE_BYTES * PAGE_BYTES
        if start < end:
            advise(start, end - start, advice)
