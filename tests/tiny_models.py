"""Tiny Granite checkpoints in the real Hugging Face format, with seeded random weights."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from granite_ray.engine.reference.loading import fill_randomly
from tests.tiny import END_OF_TEXT, write_tokenizer

KINDS = ("granite", "granitemoe", "granitemoehybrid")

SHARED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    # All away from 1, so that a forgotten one shows; mild enough that greedy text varies.
    "embedding_multiplier": 0.5,
    "residual_multiplier": 0.9,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.5,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def write_checkpoint(
    folder: Path, kind: str, *, chat: bool = True, dtype: torch.dtype = torch.float32
) -> Path:
    """Write config, safetensors and tokenizer of one architecture; `kind` is one of KINDS."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, chat=chat)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos_token_id = tokenizer.token_to_id(END_OF_TEXT)
    tokens = {
        # Real checkpoints pad the vocabulary too.
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": tokenizer.token_to_id("<|pad|>"),
    }
    disable_progress_bar()
    with torch.random.fork_rng():
        model = _make(kind, SHARED | tokens).to(dtype)
    fill_randomly(model, seed=7)
    model.save_pretrained(folder)
    return folder


def _make(kind: str, values: dict[str, Any]) -> Any:
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**values))
    if kind == "granitemoe":
        return GraniteMoeForCausalLM(GraniteMoeConfig(**values, **EXPERTS))
    if kind == "granitemoehybrid":
        config = GraniteMoeHybridConfig(
            **values,
            **EXPERTS,
            layer_types=["mamba", "attention", "mamba", "attention"],
            shared_intermediate_size=48,
            position_embedding_type=None,
            mamba_n_heads=8,
            mamba_d_head=16,
            mamba_d_state=16,
            mamba_chunk_size=32,
        )
        return GraniteMoeHybridForCausalLM(config)
    raise ValueError(f"kind is {kind!r}; choose one of {KINDS}")
