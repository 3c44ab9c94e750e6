"""How a checkpoint fits on GPUs of a size: what each rank of a group holds, and what is left."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from granite_ray.config import EngineConfig
from granite_ray.engine.sizing import CUDA_SHARE, CacheSize, fit_cache
from granite_ray.errors import ConfigError
from granite_ray.model.architecture import Architecture
from granite_ray.model.state import block_bytes
from granite_ray.model.weights import count_parameters
from granite_ray.parallel.place import divide_experts

LARGEST_GROUP = 64


@dataclass(frozen=True, slots=True)
class Fit:
    """What the largest rank of a group of `num_ranks` holds.

    Attributes:
        num_ranks: Ranks of one replica.
        num_experts: Experts of each layer.
        num_parameters: Numbers, tied ones once.
        weight_bytes: Bytes of them.
        cache_bytes: Left for keys, values and state, as the engine will take it.
        cache: What that holds, None where not even one sequence of the longest length.
        num_cache_tokens: Token positions in the cache; 0 where no layer has attention.
    """

    num_ranks: int
    num_experts: int
    num_parameters: int
    weight_bytes: int
    cache_bytes: int
    cache: CacheSize | None
    num_cache_tokens: int


def fit_groups(
    architecture: Architecture,
    engine: EngineConfig,
    max_model_len: int,
    dtype_name: str,
    gpu_bytes: int,
) -> Iterator[Fit]:
    """Fit groups of 1, 2, 3, … ranks, as many as there are experts, 64 at most.

    Args:
        architecture: The checkpoint's.
        engine: How the engine runs; `cache_gib` is left out, for it is what is asked here.
        max_model_len: Longest sequence, in tokens.
        dtype_name: That of weights, keys and values, such as `bfloat16`.
        gpu_bytes: Memory of one GPU, all of it free.
    """
    dtype: torch.dtype = getattr(torch, dtype_name)
    shared = count_parameters(architecture, range(0))
    per_expert = count_parameters(architecture, range(1)) - shared
    for num_ranks in range(1, min(max(architecture.num_local_experts, 1), LARGEST_GROUP) + 1):
        num_experts = len(divide_experts(architecture.num_local_experts, num_ranks)[0])
        num_parameters = shared + num_experts * per_expert
        weight_bytes = num_parameters * dtype.itemsize
        cache_bytes = max(0, math.floor((gpu_bytes - weight_bytes) * CUDA_SHARE))
        cache = None
        try:
            cache = fit_cache(architecture, engine, max_model_len, dtype, cache_bytes)
        except ConfigError:  # the caller says so in its own words
            num_tokens = 0
        else:
            has_attention = block_bytes(architecture, engine.block_size, dtype) > 0
            num_tokens = cache.num_blocks * engine.block_size if has_attention else 0
        yield Fit(
            num_ranks, num_experts, num_parameters, weight_bytes, cache_bytes, cache, num_tokens
        )
