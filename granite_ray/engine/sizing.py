"""How much memory there is, and how many blocks and state slots it makes."""

import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from granite_ray.config import EngineConfig
from granite_ray.errors import ConfigError
from granite_ray.model.architecture import Architecture
from granite_ray.model.state import block_bytes, slot_bytes

GIB = 1024**3
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where a container sees its own limits (control groups, version 2)."""
CUDA_SHARE = 0.8
"""Of what is free on a GPU after the weights; the rest is for the tensors of a step."""
CPU_SHARE = 0.5
"""Of what is free on this machine, times the share of its cores: other replicas live there too."""
SNAPSHOT_SHARE = 0.5
"""Most of the memory that state slots may take; the rest is for keys and values."""
NUM_SNAPSHOTS = 16
"""State slots for snapshots, beside one for each running sequence."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheSize:
    """What the cache holds: blocks, state slots, and sequences that may run at once."""

    num_blocks: int
    num_slots: int
    max_num_seqs: int


def size_cache(
    architecture: Architecture,
    engine: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    budget_bytes: int,
) -> CacheSize:
    """Divide a budget as `fit_cache` does, and say what came out.

    Raises:
        ConfigError: If not even one sequence of the longest length fits.
    """
    size = fit_cache(architecture, engine, max_model_len, dtype, budget_bytes)
    bytes_per_slot = slot_bytes(architecture, dtype)
    if size.max_num_seqs < engine.max_num_seqs:
        logger.warning(
            "memory bounds the running sequences max_num_seqs=%d wanted=%d state_mib=%.1f",
            *(size.max_num_seqs, engine.max_num_seqs, bytes_per_slot / 1024**2),
        )
    logger.info(
        "cache sized blocks=%d block_size=%d tokens=%d kv_gib=%.2f state_slots=%d state_gib=%.2f "
        "max_num_seqs=%d budget_gib=%.2f",
        *(size.num_blocks, engine.block_size, size.num_blocks * engine.block_size),
        size.num_blocks * block_bytes(architecture, engine.block_size, dtype) / GIB,
        *(size.num_slots, size.num_slots * bytes_per_slot / GIB),
        *(size.max_num_seqs, budget_bytes / GIB),
    )
    return size


def fit_cache(
    architecture: Architecture,
    engine: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    budget_bytes: int,
) -> CacheSize:
    """Divide a budget: blocks of one sequence, slots for those that run and snapshots, more blocks.

    No more than all running sequences can come to need, twice over for prefixes that stay.

    Raises:
        ConfigError: If not even one sequence of the longest length fits.
    """
    bytes_per_block = block_bytes(architecture, engine.block_size, dtype)
    blocks_per_seq = -(-max_model_len // engine.block_size)
    bytes_per_seq = blocks_per_seq * bytes_per_block
    most_for_slots = min(int(budget_bytes * SNAPSHOT_SHARE), budget_bytes - bytes_per_seq)
    slots, max_num_seqs = _size_slots(architecture, engine, dtype, most_for_slots)
    left = budget_bytes - slots * slot_bytes(architecture, dtype)
    num_blocks = 2 * max_num_seqs * blocks_per_seq
    if bytes_per_block:
        num_blocks = min(num_blocks, left // bytes_per_block)
    if num_blocks < blocks_per_seq or max_num_seqs < 1:
        needed_bytes = bytes_per_seq + 2 * slot_bytes(architecture, dtype)
        raise _refusal(max_model_len, needed_bytes, budget_bytes)
    return CacheSize(num_blocks, slots, max_num_seqs)


def _refusal(max_model_len: int, needed_bytes: int, budget_bytes: int) -> ConfigError:
    needed_gib = math.ceil(100 * needed_bytes / GIB) / 100  # up: as much will do
    return ConfigError(
        f"model.max_model_len is {max_model_len}: one sequence of that length needs "
        f"{needed_gib:.2f} GiB for its keys, values and state, and the engine has "
        f"{budget_bytes / GIB:.2f} GiB. Lower model.max_model_len (and chunking.max_tokens), "
        "raise engine.cache_gib, or take a larger device."
    )


def _size_slots(
    architecture: Architecture, engine: EngineConfig, dtype: torch.dtype, most_bytes: int
) -> tuple[int, int]:
    """Return the number of state slots and of sequences that may run at once."""
    each = slot_bytes(architecture, dtype)
    if not each:
        return 0, engine.max_num_seqs
    num_slots = min(engine.max_num_seqs + NUM_SNAPSHOTS, max(most_bytes, 0) // each)
    num_snapshots = min(NUM_SNAPSHOTS, num_slots // 3)
    return num_slots, min(engine.max_num_seqs, num_slots - num_snapshots)


def cache_budget(engine: EngineConfig, device: torch.device, num_threads: int | None) -> int:
    """Return the bytes that cache and state may take: as configured, or a share of what is free."""
    if engine.cache_gib is not None:
        return int(engine.cache_gib * GIB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    num_cores = os.cpu_count() or 1
    share = CPU_SHARE * min(1.0, (num_threads or num_cores) / num_cores)
    return int(free_memory_bytes() * share)


def free_memory_bytes(control_group: Path = CONTROL_GROUP) -> int:
    """Return the memory that this process may still take: of the machine, or of its container."""
    free: int = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # no control group, or its limit is "max"
        limit = int((control_group / "memory.max").read_text())
        used = int((control_group / "memory.current").read_text())
        lines = (control_group / "memory.stat").read_text().splitlines()
        reclaimable = int(dict(line.split() for line in lines)["inactive_file"])
        free = min(free, limit - used + reclaimable)
    return max(free, 0)
