"""The requests, the checkpoint that answers them, and what answering them must cost."""

import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from engines.exchange import Measure, Request
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from granite_ray.checkpoint import QUICKSTART_PATH
from granite_ray.engine.reference.loading import fill_randomly

PRESETS = Path(__file__).parents[2] / "configs" / "models"
MOE = "granite-3.1-1b-a400m"
SEED = 1
END_TOKEN_ID = 0
BYTES_PER_WEIGHT = 2
RESIDUAL_MULTIPLIER = 1.0
"""With the real one a few random layers would only repeat their last token; speed is the same."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is asked.

    The first four are the workload's, in all. Of a prefill: prompts, and tokens of each. Of
    decodes: sequences, and the context of each before the first step.
    """

    num_requests: int
    num_prompt_tokens: int
    num_completion_tokens: int
    num_shared_tokens: int
    prefills: tuple[tuple[int, int], ...]
    decodes: tuple[tuple[int, int], ...]
    num_decode_steps: int


FULL = Size(32, 25_524, 2_178, 256, ((1, 2048), (8, 512)), ((1, 128), (8, 128), (32, 128)), 32)
QUICK = Size(4, 401, 29, 32, ((1, 64), (2, 48)), ((1, 16), (2, 16)), 4)
HYBRID = Size(8, 4_000, 400, 128, ((1, 2048), (8, 128)), ((8, 128),), 32)
"""For Mamba2 hybrids, of which transformers needs minutes for what others do in seconds."""
CURVES = Size(
    *(8, 4_000, 400, 128),
    prefills=tuple((1, 2**power) for power in range(7, 14)),
    decodes=(
        *((2**power, 128) for power in range(7)),
        *((8, 2**power) for power in range(8, 12)),
    ),
    num_decode_steps=48,
)
"""What is asked for a plot: each engine over the size of a batch and the length of a context."""

MIXED = (0.4, 1.6)
"""Lengths lie between these shares of their mean, any as likely as another."""


# requests ────────────────────────────────────────────────────────────────────────────────────────


def make_workload(size: Size, vocab_size: int, batch_size: int) -> Measure:
    """Make requests of mixed lengths that sum to what the size says."""
    numbers = random.Random(SEED)
    prompt_lens = draw_lengths(numbers, size.num_requests, size.num_prompt_tokens)
    completion_lens = draw_lengths(numbers, size.num_requests, size.num_completion_tokens)
    shared = draw_token_ids(numbers, vocab_size, size.num_shared_tokens)
    requests = [
        Request(shared + draw_token_ids(numbers, vocab_size, num_prompt - len(shared)), num_more)
        for num_prompt, num_more in zip(prompt_lens, completion_lens, strict=True)
    ]
    return Measure("workload", requests, size.num_shared_tokens, batch_size)


def make_measure(
    name: str,
    vocab_size: int,
    num_requests: int,
    num_prompt_tokens: int,
    num_completion_tokens: int,
) -> Measure:
    """Make requests of one length that share nothing, with each other or with other measures."""
    numbers = random.Random(name)
    requests = [
        Request(draw_token_ids(numbers, vocab_size, num_prompt_tokens), num_completion_tokens)
        for _ in range(num_requests)
    ]
    return Measure(name, requests, num_shared_tokens=0, batch_size=num_requests)


def draw_lengths(numbers: random.Random, count: int, total: int) -> list[int]:
    """Draw lengths around `total / count`, then move them one by one until they sum to `total`."""
    least, most = (int(total / count * share) for share in MIXED)
    lengths = [numbers.randint(least, most) for _ in range(count)]
    while missing := total - sum(lengths):
        index = numbers.randrange(count)
        moved = lengths[index] + (1 if missing > 0 else -1)
        lengths[index] = min(max(moved, least), most)
    return lengths


def draw_token_ids(numbers: random.Random, vocab_size: int, count: int) -> list[int]:
    return [numbers.randrange(END_TOKEN_ID + 1, vocab_size) for _ in range(count)]


# checkpoint ──────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def write_checkpoint(folder: Path, num_layers: int, preset: str = MOE) -> dict[str, Any]:
    """Write the preset with random weights and the embedded tokenizer; return its config.

    The end token's embedding, which is its row of the head too, is zero: its logit is never the
    largest, so no greedy completion ends early, whatever an engine lets one switch off.
    """
    values = json.loads((PRESETS / preset / "config.json").read_text())
    values |= {"num_hidden_layers": num_layers, "residual_multiplier": RESIDUAL_MULTIPLIER}
    # The embedded tokenizer, which stands in for each model's own, has no more than 6,144 tokens.
    values |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), END_TOKEN_ID)
    if "layer_types" in values:
        values["layer_types"] = values["layer_types"][:num_layers]
    config = AutoConfig.for_model(**values)
    assert config.tie_word_embeddings
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fill_randomly(model, SEED)
    model.get_input_embeddings().weight[END_TOKEN_ID] = 0
    disable_progress_bar()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QUICKSTART_PATH / name, folder)
    return dict(json.loads((folder / "config.json").read_text()))


# cost ────────────────────────────────────────────────────────────────────────────────────────────


def count_flops(config: Mapping[str, Any], measure: Measure) -> int:
    """Count additions and multiplications: shared tokens once, the head once a completion token.

    The last completion token is not computed: nothing follows it.
    """
    mixers = layer_types(config)
    per_key = 4 * config["hidden_size"]  # scores and sum of values, over all heads of a layer
    # The state decays, takes a token in, and is read.
    per_state = 6 * inner_size(config) * config.get("mamba_d_state", 0)
    per_token = 2 * layer_weights(config, config["num_experts_per_tok"])
    per_token += mixers.count("mamba") * per_state
    spans = [(0, measure.num_shared_tokens)]
    num_logits = 0
    for request in measure.requests:
        stop = len(request.token_ids) + request.num_completion_tokens - 1
        spans.append((measure.num_shared_tokens, stop))
        num_logits += request.num_completion_tokens
    num_tokens = sum(stop - start for start, stop in spans)
    num_keys = sum(stop * (stop + 1) // 2 - start * (start + 1) // 2 for start, stop in spans)
    attended = mixers.count("attention") * num_keys * per_key
    return int(num_tokens * per_token) + attended + num_logits * 2 * head_weights(config)


def weight_bytes(config: Mapping[str, Any], num_tokens: int) -> int:
    """Return the bytes of all weights that so many tokens meet in one step, experts by chance."""
    num_experts, num_chosen = config["num_local_experts"], config["num_experts_per_tok"]
    num_met = num_experts * (1 - (1 - num_chosen / num_experts) ** num_tokens)
    return int(BYTES_PER_WEIGHT * (layer_weights(config, num_met) + head_weights(config)))


def layer_weights(config: Mapping[str, Any], num_experts: float) -> float:
    """Count the weights of all layers that tokens meet which meet so many experts."""
    hidden_size, mixers = config["hidden_size"], layer_types(config)
    head_size = hidden_size // config["num_attention_heads"]
    num_heads = 2 * (config["num_attention_heads"] + config["num_key_value_heads"])
    attention = hidden_size * head_size * num_heads
    inner, groups = inner_size(config), config.get("mamba_n_groups", 0)
    projected = 3 * inner + 2 * groups * config.get("mamba_d_state", 0)
    mamba = hidden_size * (projected + config.get("mamba_n_heads", 0))
    router = hidden_size * config["num_local_experts"]
    expert = 3 * hidden_size * config["intermediate_size"]
    shared = 3 * hidden_size * config.get("shared_intermediate_size", 0)
    others = len(mixers) * (router + num_experts * expert + shared)
    return mixers.count("attention") * attention + mixers.count("mamba") * mamba + others


def layer_types(config: Mapping[str, Any]) -> list[str]:
    return list(config.get("layer_types", ["attention"] * config["num_hidden_layers"]))


def inner_size(config: Mapping[str, Any]) -> int:
    return int(config.get("mamba_expand", 0) * config["hidden_size"])


def head_weights(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"] * config["vocab_size"])
