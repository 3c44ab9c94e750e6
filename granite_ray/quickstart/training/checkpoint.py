"""The network as a checkpoint in the real `granitemoe` format, beside its tokenizer."""

import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers import GenerationConfig, GraniteMoeConfig

from granite_ray.quickstart.make_tokenizer import CONTEXT_LENGTH
from granite_ray.quickstart.training.network import Network
from granite_ray.tokenizer import TOKENIZER_FILES, Tokenizer


def architecture(tokenizer: Tokenizer) -> GraniteMoeConfig:
    """Return the embedded model's shapes; no multiplier is 1, so that none can be forgotten."""
    end = tokenizer.eos_token_ids[0]
    return GraniteMoeConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=384,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        embedding_multiplier=6.0,
        residual_multiplier=0.3,
        attention_multiplier=0.125,
        logits_scaling=2.0,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=1,
        dtype="bfloat16",
        architectures=["GraniteMoeForCausalLM"],
    )


def write_checkpoint(network: Network, tokenizer: Tokenizer, path: Path) -> None:
    """Write config, weights and tokenizer as transformers' `save_pretrained` would."""
    path.mkdir(parents=True, exist_ok=True)
    config = network.config
    config.save_pretrained(path)
    GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    ).save_pretrained(path)
    save_file(network.checkpoint(), path / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        source = Path(tokenizer.checkpoint_path) / name
        if source.exists() and source.resolve() != (path / name).resolve():
            shutil.copyfile(source, path / name)
