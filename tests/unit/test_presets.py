"""The presets of configs/models are the real shapes, and open as dummies."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from granite_ray.checkpoint import QUICKSTART_PATH, open_checkpoint
from granite_ray.config import ModelConfig
from granite_ray.errors import ConfigError
from granite_ray.model.architecture import read_architecture
from granite_ray.model.weights import count_parameters as count_our_parameters

PRESETS_PATH = Path(__file__).parents[2] / "configs" / "models"
ROW = re.compile(r"\| `([\w.-]+)` \| .* \| ([\d.]+) / ([\d.]+) \| (\d+)K \|")
FAMILY = {
    *("granite-3.1-2b", "granite-3.1-8b", "granite-3.1-1b-a400m", "granite-3.1-3b-a800m"),
    *("granite-4.0-350m", "granite-4.0-h-350m", "granite-4.0-1b", "granite-4.0-h-1b"),
    *("granite-4.0-micro", "granite-4.0-h-micro", "granite-4.0-h-tiny", "granite-4.0-h-small"),
}
COUNTED_ON_THE_HUB = {
    "granite-3.1-2b": 2_533_531_648,
    "granite-3.1-3b-a800m": 3_298_793_472,
    "granite-4.0-1b": 1_631_750_144,
    "granite-4.0-micro": 3_402_836_480,
}


def table() -> list[tuple[str, str, str, int]]:
    """Name, billions of parameters, of active ones, and context of each row of the README."""
    rows = ROW.findall((PRESETS_PATH / "README.md").read_text())
    return [(name, total, active, int(context) * 1024) for name, total, active, context in rows]


def read_preset(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((PRESETS_PATH / name / "config.json").read_text())
    return config


def count_parameters(name: str) -> tuple[int, int]:
    """All parameters, and those that a token meets, as transformers builds the model."""
    config = AutoConfig.from_pretrained(PRESETS_PATH / name)
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    idle = (
        experts - experts * config.num_experts_per_tok // config.num_local_experts if experts else 0
    )
    total = sum(sizes.values())
    return total, total - idle - sizes["model.embed_tokens.weight"]


def billions(number: int, like: str) -> str:
    """`number` in billions, with as many digits as `like` has."""
    return f"{number / 1e9:.{len(like.partition('.')[2])}f}"


def test_the_whole_family_has_a_preset_and_a_row() -> None:
    assert {path.parent.name for path in PRESETS_PATH.glob("*/config.json")} == FAMILY
    assert {name for name, *_ in table()} == FAMILY


@pytest.mark.parametrize(("name", "total", "active", "context"), table())
def test_a_preset_has_the_parameters_and_context_of_its_row(
    name: str, total: str, active: str, context: int
) -> None:
    found_total, found_active = count_parameters(name)
    assert billions(found_total, total) == total
    assert billions(found_active, active) == active
    assert read_preset(name)["max_position_embeddings"] == context


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_our_own_model_has_the_parameters_that_transformers_gives_it(name: str) -> None:
    ours = count_our_parameters(read_architecture(read_preset(name)))
    assert ours == count_parameters(name)[0]


@pytest.mark.parametrize(("name", "number"), COUNTED_ON_THE_HUB.items())
def test_a_preset_has_the_parameters_that_the_hub_counts(name: str, number: int) -> None:
    assert count_parameters(name)[0] == number


@pytest.mark.parametrize("name", sorted(FAMILY))
def test_a_preset_opens_as_a_dummy_and_in_no_other_way(name: str) -> None:
    path = str(PRESETS_PATH / name)
    checkpoint = open_checkpoint(ModelConfig(path=path, load_format="dummy"))
    assert (checkpoint.path, checkpoint.name) == (path, name)
    assert checkpoint.tokenizer_path == str(QUICKSTART_PATH)
    assert checkpoint.max_model_len == read_preset(name)["max_position_embeddings"]
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        open_checkpoint(ModelConfig(path=path))
