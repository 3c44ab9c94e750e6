"""How a budget becomes blocks, state slots and running sequences; and how much memory there is."""

import json
import os
import re
from pathlib import Path

import psutil
import pytest
import torch

from granite_ray.config import EngineConfig
from granite_ray.engine.sizing import (
    CPU_SHARE,
    GIB,
    NUM_SNAPSHOTS,
    CacheSize,
    cache_budget,
    free_memory_bytes,
    size_cache,
)
from granite_ray.errors import ConfigError
from granite_ray.model.architecture import Architecture, read_architecture
from granite_ray.model.state import ModelState, allocate_state, block_bytes, slot_bytes
from tests.family import PRESETS

CPU = torch.device("cpu")
ALL_MAMBA = "granite-4.0-h-tiny without attention"


def architecture_of(name: str) -> Architecture:
    """A real one, from its preset."""
    preset = name.split()[0]
    config = json.loads((PRESETS / preset / "config.json").read_text())
    if name == ALL_MAMBA:
        config["layer_types"] = ["mamba"] * config["num_hidden_layers"]
    return read_architecture(config)


def size(name: str, budget_gib: float, max_model_len: int, **values: int) -> CacheSize:
    engine = EngineConfig(**values)
    budget = int(budget_gib * GIB)
    return size_cache(architecture_of(name), engine, max_model_len, torch.bfloat16, budget)


def num_bytes(state: ModelState) -> int:
    tensors = [*state.key_caches, *state.value_caches, *state.conv_states, *state.ssm_states]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


# blocks and slots ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "kv_bytes", "state_mb"),
    [
        ("granite-3.1-2b", 81_920, 0),
        ("granite-3.1-8b", 163_840, 0),
        ("granite-3.1-1b-a400m", 49_152, 0),
        ("granite-4.0-350m", 28_672, 0),
        ("granite-4.0-h-350m", 4_096, 22.3),
        ("granite-4.0-h-tiny", 8_192, 57.3),
        ("granite-4.0-h-small", 16_384, 152.8),
    ],
)
def test_a_token_and_a_state_take_what_was_counted_by_hand(
    name: str, kv_bytes: int, state_mb: float
) -> None:
    architecture = architecture_of(name)
    assert block_bytes(architecture, 16, torch.bfloat16) == 16 * kv_bytes
    assert slot_bytes(architecture, torch.bfloat16) / 1e6 == pytest.approx(state_mb, abs=0.5)


@pytest.mark.parametrize("name", ["granite-3.1-2b", "granite-4.0-h-tiny", ALL_MAMBA])
@pytest.mark.parametrize("budget_gib", [0.5, 3.0, 50.0])
def test_what_is_allocated_stays_within_the_budget_and_uses_it(
    name: str, budget_gib: float
) -> None:
    architecture = architecture_of(name)
    found = size(name, budget_gib, 2048)
    state = allocate_state(
        architecture, found.num_blocks, 16, found.num_slots, torch.bfloat16, torch.device("meta")
    )
    assert num_bytes(state) <= budget_gib * GIB
    if found.num_blocks < 2 * found.max_num_seqs * 128:
        one_more = block_bytes(architecture, 16, torch.bfloat16)
        assert num_bytes(state) + one_more > budget_gib * GIB


def test_attention_alone_needs_no_slots_and_runs_as_many_as_configured() -> None:
    found = size("granite-3.1-2b", 1.0, 4096, max_num_seqs=100)
    assert found == CacheSize(GIB // (16 * 81_920), 0, 100)


def test_blocks_are_no_more_than_all_sequences_can_fill_twice() -> None:
    assert size("granite-3.1-2b", 500.0, 1000, max_num_seqs=4).num_blocks == 2 * 4 * 63
    assert size(ALL_MAMBA, 500.0, 1000, max_num_seqs=4).num_blocks == 2 * 4 * 63


def test_a_hybrid_with_room_has_a_slot_for_each_sequence_and_for_snapshots() -> None:
    found = size("granite-4.0-h-tiny", 50.0, 4096, max_num_seqs=32)
    assert (found.num_slots, found.max_num_seqs) == (32 + NUM_SNAPSHOTS, 32)


def test_a_hybrid_with_little_memory_runs_fewer_sequences_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = [size("granite-4.0-h-tiny", gib, 2048) for gib in (0.2, 1.0, 2.0, 4.0, 20.0)]
    running = [found.max_num_seqs for found in sizes]
    assert running == sorted(running)
    assert 1 <= running[0] < running[1] < running[2] < running[3] < running[4] == 64
    for found in sizes:
        num_snapshots = found.num_slots - found.max_num_seqs
        assert num_snapshots == min(NUM_SNAPSHOTS, found.num_slots // 3)
    warned = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 4
    assert f"max_num_seqs={running[0]} wanted=64" in warned[0].getMessage()


# refusal ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["granite-3.1-2b", "granite-4.0-h-350m", "granite-4.0-h-tiny", ALL_MAMBA]
)
@pytest.mark.parametrize("max_model_len", [1, 100, 4096, 131_072])
def test_the_refusal_names_what_would_do(name: str, max_model_len: int) -> None:
    with pytest.raises(ConfigError) as refused:
        size(name, 1e-6, max_model_len)
    message = str(refused.value)
    assert f"model.max_model_len is {max_model_len}" in message
    assert "Lower model.max_model_len" in message
    assert "engine.cache_gib" in message
    found = re.search(r"needs ([\d.]+) GiB .* has 0\.00 GiB", message)
    assert found
    enough = size(name, float(found[1]), max_model_len)
    assert enough.max_num_seqs >= 1
    assert enough.num_blocks * 16 >= max_model_len
    with pytest.raises(ConfigError):
        size(name, float(found[1]) / 2 - 0.01, max_model_len)


def test_a_long_context_takes_the_memory_that_slots_could_have_had() -> None:
    """Keys and values of one 128K sequence take 1 GiB on H-Tiny, a slot 55 MiB."""
    found = size("granite-4.0-h-tiny", 1.2, 131_072)
    assert found.num_blocks >= 131_072 // 16
    assert 1 <= found.max_num_seqs <= 3


# how much there is ───────────────────────────────────────────────────────────────────────────────


def test_the_budget_is_what_is_configured() -> None:
    assert cache_budget(EngineConfig(cache_gib=1.5), CPU, None) == 1.5 * GIB


def test_the_budget_on_a_cpu_follows_the_share_of_cores() -> None:
    num_cores = os.cpu_count() or 1
    free = psutil.virtual_memory().available
    whole, one = (cache_budget(EngineConfig(), CPU, threads) for threads in (None, 1))
    assert 0 < whole <= CPU_SHARE * free * 1.2
    assert one == pytest.approx(whole / num_cores, rel=0.2)


def write_group(folder: Path, limit: str, used: int, reclaimable: int) -> Path:
    """The files of a control group, version 2."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon 123\nfile 456\nactive_file 7\ninactive_file {reclaimable}\nslab 8\n"
    )
    return folder


def test_a_containers_limit_is_honoured(tmp_path: Path) -> None:
    group = write_group(tmp_path, "50000000", 30_000_000, 12_000_000)
    assert free_memory_bytes(group) == 32_000_000, "the page cache can be had back"


def test_a_container_beyond_its_limit_has_nothing_left(tmp_path: Path) -> None:
    group = write_group(tmp_path, "50000000", 60_000_000, 1_000_000)
    assert free_memory_bytes(group) == 0


@pytest.mark.parametrize("limit", ["max", str(2**60)])
def test_without_a_limit_the_machine_bounds_the_memory(tmp_path: Path, limit: str) -> None:
    group = write_group(tmp_path, limit, 1, 1)
    for folder in (group, tmp_path / "missing"):
        available = psutil.virtual_memory().available
        assert free_memory_bytes(folder) == pytest.approx(available, rel=0.2)
