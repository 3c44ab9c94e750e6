"""Which memory the system was advised about, as it tells in /proc."""

import mmap
from pathlib import Path

import pytest
import torch

from granite_ray.model.pages import PAGE_BYTES, ask_for_large_pages

SMAPS = Path("/proc/self/smaps")
pytestmark = pytest.mark.skipif(
    not SMAPS.exists() or not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux"
)


def is_advised(address: int) -> bool:
    """Whether the mapping that holds an address is marked for large pages."""
    is_here = False
    for line in SMAPS.read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            start, end = (int(number, 16) for number in first.split("-"))
            is_here = start <= address < end
        elif is_here and first == "VmFlags:":
            return "hg" in rest
    raise AssertionError("no mapping holds it")


def test_large_tensors_are_advised_about_and_keep_their_values() -> None:
    # Mapped here: what an allocator gives may be advised about already.
    mapped = [mmap.mmap(-1, 16 * PAGE_BYTES) for _ in range(2)]
    large, other = (torch.frombuffer(memory, dtype=torch.uint8) for memory in mapped)
    middle = 8 * PAGE_BYTES
    assert not is_advised(large.data_ptr() + middle)
    ask_for_large_pages([large])
    large.fill_(7)
    assert is_advised(large.data_ptr() + middle)
    assert not is_advised(other.data_ptr() + middle)
    assert (large == 7).all()


def test_what_is_small_or_elsewhere_is_left_alone() -> None:
    small = torch.ones(100)
    ask_for_large_pages([small, torch.empty(10**9, device="meta"), torch.empty(0)])
    assert (small == 1).all()
