"""What fits on a GPU, against counts by hand."""

import json

import pytest
import torch

from granite_ray.config import EngineConfig
from granite_ray.engine.fitting import Fit, fit_groups
from granite_ray.model.architecture import read_architecture
from granite_ray.model.state import allocate_state
from tests.family import PRESETS
from tests.unit.engine.test_sizing import num_bytes

GIB = 1024**3


def fit(name: str, gpu_gib: float, max_model_len: int = 4096, **engine: int) -> list[Fit]:
    architecture = read_architecture(json.loads((PRESETS / name / "config.json").read_text()))
    config = EngineConfig(**engine)
    return list(fit_groups(architecture, config, max_model_len, "bfloat16", int(gpu_gib * GIB)))


def test_h_small_is_divided_as_counted_by_hand() -> None:
    """An expert has 3 matrices of 4096 by 768 in each of 40 layers."""
    one, two, *_ = fits = fit("granite-4.0-h-small", 80)
    per_expert = 40 * 3 * 4096 * 768
    assert one.num_parameters / 1e9 == pytest.approx(32.2, abs=0.05)
    assert one.num_parameters - two.num_parameters == 36 * per_expert
    assert [found.num_experts for found in fits[:8]] == [72, 36, 24, 18, 15, 12, 11, 9]
    assert one.weight_bytes == 2 * one.num_parameters
    assert two.cache_bytes == pytest.approx(0.8 * (80 * GIB - two.weight_bytes), abs=1)


def test_what_fits_leaves_room_for_the_cache_that_is_told() -> None:
    for gpu_gib in (24, 40, 80):
        fits = fit("granite-4.0-h-small", gpu_gib, 32_768)
        smallest = next(found.num_ranks for found in fits if found.cache is not None)
        assert all((found.cache is None) == (found.num_ranks < smallest) for found in fits)
        found = fits[smallest - 1]
        assert found.cache
        assert found.num_cache_tokens == found.cache.num_blocks * 16 >= 32_768
        state = allocate_state(
            read_architecture(
                json.loads((PRESETS / "granite-4.0-h-small" / "config.json").read_text())
            ),
            *(found.cache.num_blocks, 16, found.cache.num_slots),
            torch.bfloat16,
            torch.device("meta"),
        )
        assert found.weight_bytes + num_bytes(state) <= gpu_gib * GIB


def test_a_dense_model_has_one_rank_and_may_not_fit() -> None:
    [found] = fit("granite-3.1-8b", 80)
    assert found.cache
    assert found.num_experts == 0
    [found] = fit("granite-3.1-8b", 10)
    assert (found.cache, found.cache_bytes) == (None, 0)
