"""Make the embedded checkpoint's weights: random ones, in the real Granite MoE format.

Run it as `python -m granite_ray.quickstart.make_checkpoint`. The same seed gives the same bytes.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, GraniteMoeConfig, GraniteMoeForCausalLM

from granite_ray.quickstart.make_tokenizer import CHECKPOINT_PATH, CONTEXT_LENGTH, VOCAB_SIZE

SEED = 20

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Write config, weights and generation config beside the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=CHECKPOINT_PATH)
    parser.add_argument("--out", type=Path, default=CHECKPOINT_PATH)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    model = random_model(architecture(arguments.tokenizer), SEED)
    model.save_pretrained(arguments.out)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d random parameters, seed %d → %s", num_parameters, SEED, arguments.out)


def architecture(tokenizer_path: Path) -> GraniteMoeConfig:
    """Return the smallest architecture that still has every part of a Granite MoE model.

    No multiplier is 1, so that an implementation that forgets one disagrees with the reference.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    return GraniteMoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=True,
        embedding_multiplier=0.5,
        residual_multiplier=0.9,
        attention_multiplier=0.125,
        logits_scaling=0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def random_model(config: GraniteMoeConfig, seed: int) -> GraniteMoeForCausalLM:
    """Return a model whose weights are drawn from the seed.

    With a tied head, usual small weights make a model repeat its last token for ever. Matrices of
    twice the usual size, and a small embedding multiplier, make greedy text vary.
    """
    model: GraniteMoeForCausalLM = GraniteMoeForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # the others are norms, which stay 1
                std = 2.0 / parameter.shape[-1] ** 0.5
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * std)
    return model.bfloat16()


if __name__ == "__main__":
    main()
