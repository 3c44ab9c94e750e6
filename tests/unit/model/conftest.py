"""A small random checkpoint of every kind, read by our model and by transformers' own class."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from granite_ray.engine.reference.loading import fill_randomly
from granite_ray.model.architecture import Architecture, read_architecture
from granite_ray.model.granite import GraniteModel
from granite_ray.model.weights import load_weights
from tests.family import FAMILY, PRESETS, reduce

CPU = torch.device("cpu")
NEAR_TIE = 3e-5
"""Of two scores of experts: three times what float32 was seen to change them."""
# Few layers: rounding grows over layers, and with it the tolerance that every test would need.
HYBRID_LAYERS = ["mamba", "mamba", "attention", "mamba"]

# What no preset has.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoeshared": (
        "granite-3.1-1b-a400m",
        {"model_type": "granitemoeshared", "shared_intermediate_size": 48},
    ),
    "untied": ("granite-3.1-2b", {"tie_word_embeddings": False}),
    "wide-heads": ("granite-3.1-8b", {"head_dim": 24}),
    "mamba-only": ("granite-4.0-h-1b", {"layer_types": ["mamba"] * 2, "num_hidden_layers": 2}),
    "mamba-groups": ("granite-4.0-h-350m", {"mamba_n_groups": 3, "time_step_limit": [0.5, 2.0]}),
}


@dataclass(frozen=True)
class Member:
    """A checkpoint, and the model of it that transformers makes."""

    path: Path
    architecture: Architecture
    reference: Any

    def load(self, dtype: torch.dtype = torch.float32) -> GraniteModel:
        return load_weights(str(self.path), self.architecture, dtype=dtype, device=CPU)

    def reference_logits(self, token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            output = self.reference(torch.tensor([token_ids]), use_cache=False)
        logits: torch.Tensor = output.logits[0].float()
        return logits

    def first_near_tie(self, token_ids: list[int]) -> int:
        """The first token for which rounding may choose another expert, which changes much."""
        num_chosen = self.architecture.num_experts_per_tok
        if not num_chosen:
            return len(token_ids)
        with torch.inference_mode():
            output = self.reference(
                torch.tensor([token_ids]), use_cache=False, output_router_logits=True
            )
        first = len(token_ids)
        for scores in output.router_logits:
            highest = scores.topk(num_chosen + 1).values
            is_near = highest[:, -2] - highest[:, -1] < NEAR_TIE
            first = min([first, *is_near.nonzero().flatten().tolist()])
        return first


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # tiny matrices, shared cores


@pytest.fixture(scope="session", params=[*FAMILY, *VARIANTS])
def member(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Member:
    return make_member(tmp_path_factory.mktemp("member") / request.param, request.param)


def make_member(folder: Path, name: str) -> Member:
    folder.mkdir()
    config = small_config(name)
    (folder / "config.json").write_text(json.dumps(config))
    disable_progress_bar()
    with torch.random.fork_rng():
        made: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()
        fill_randomly(made, seed=7)
        torch.manual_seed(8)
        for vector in (parameter for parameter in made.parameters() if parameter.ndim < 2):
            vector.data += 0.3 * torch.randn_like(vector)  # a norm that is left out must show
    made.save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return Member(folder, read_architecture(config), reference)


def small_config(name: str) -> dict[str, Any]:
    preset, changes = VARIANTS.get(name, (name, {}))
    config = reduce(json.loads((PRESETS / preset / "config.json").read_text()), num_layers=3)
    if "layer_types" in config and "h-" in preset:
        config |= {"layer_types": HYBRID_LAYERS, "num_hidden_layers": len(HYBRID_LAYERS)}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return config | tokens | {"vocab_size": 256} | changes
