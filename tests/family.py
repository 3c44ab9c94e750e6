"""A small random checkpoint of each row of the Granite family: a preset, reduced in size.

Layer mixture, ratio of heads, experts and their top-k, positions and tying are the preset's own.
Multipliers are not: with the real ones a random model repeats its last token for ever.
"""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from granite_ray.engine.reference.loading import fill_randomly
from tests.tiny import END_OF_TEXT, write_tokenizer
from tests.tiny_models import SHARED

PRESETS = Path(__file__).parent.parent / "configs" / "models"
FAMILY = tuple(sorted(path.parent.name for path in PRESETS.glob("*/config.json")))
HEAD_DIM = 16
MULTIPLIERS = {key: SHARED[key] for key in SHARED if "multiplier" in key or "scaling" in key}


def write_member(folder: Path, name: str, num_layers: int | None = None) -> Path:
    """Write a small checkpoint of the preset `name`, in float32, with at most `num_layers`."""
    config = reduce(json.loads((PRESETS / name / "config.json").read_text()), num_layers)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos_token_id = tokenizer.token_to_id(END_OF_TEXT)
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eos_token_id)
    config["vocab_size"] = -(-tokenizer.get_vocab_size() // 64) * 64
    (folder / "config.json").write_text(json.dumps(config))
    disable_progress_bar()
    with torch.random.fork_rng():
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    fill_randomly(model.float(), seed=7)
    model.save_pretrained(folder)
    return folder


def reduce(config: dict[str, Any], num_layers: int | None) -> dict[str, Any]:
    """The same model, small."""
    ratio = config["num_attention_heads"] // config["num_key_value_heads"]
    num_kv_heads = 1 if ratio > 2 else 2
    num_heads = ratio * num_kv_heads
    hidden_size = num_heads * HEAD_DIM
    num_layers = min(num_layers or 10**6, config["num_hidden_layers"])
    config |= MULTIPLIERS | {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "intermediate_size": 32 if config.get("num_local_experts") else 96,
        "max_position_embeddings": 2048,
        "torch_dtype": "float32",
    }
    if config["model_type"] == "granitemoehybrid":
        config |= {
            "layer_types": config["layer_types"][:num_layers],
            "shared_intermediate_size": 48,
            "mamba_d_head": HEAD_DIM,
            "mamba_d_state": 16,
            "mamba_n_heads": config["mamba_expand"] * hidden_size // HEAD_DIM,
            "mamba_chunk_size": 32,
        }
    return config
