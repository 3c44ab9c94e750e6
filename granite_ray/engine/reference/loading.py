"""Checkpoint folder → model on its device, or the same shapes filled with random numbers.

Only safetensors are read, and no code of the checkpoint runs.
"""

import logging
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.devices import choose_device
from granite_ray.errors import ConfigError

DUMMY_SEED = 0
"""Fixed, so that every replica of a job gets the same random model."""

AUTO_MODEL: Any = AutoModelForCausalLM  # its type hints do not know what it returns

logger = logging.getLogger(__name__)


def load_model(checkpoint_path: str, model: ModelConfig, engine: EngineConfig) -> nn.Module:
    """Return the causal language model in evaluation mode.

    Raises:
        ConfigError: Where the device is missing or the weights do not make a whole model.
    """
    disable_progress_bar()  # a replica's output is a log, not a terminal
    device = choose_device(engine.device)
    dtype: Any = model.dtype if model.dtype == "auto" else getattr(torch, model.dtype)
    load = _dummy_model if model.load_format == "dummy" else _model_from_weights
    loaded: nn.Module = load(checkpoint_path, dtype).to(device).eval()
    logger.info("model loaded path=%s device=%s dtype=%s", checkpoint_path, device, loaded.dtype)
    return loaded


def _model_from_weights(checkpoint_path: str, dtype: Any) -> Any:
    try:
        loaded, told = AUTO_MODEL.from_pretrained(
            checkpoint_path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"model.path {checkpoint_path}: the weights cannot be loaded: {error}"
        ) from error
    # transformers fills what is missing with random numbers and only warns.
    missing = sorted(told["missing_keys"]) + sorted(str(key) for key in told["mismatched_keys"])
    if missing:
        raise ConfigError(
            f"model.path {checkpoint_path}: {len(missing)} tensors of the architecture are missing "
            f"or have another shape, the first is {missing[0]}. Fetch the checkpoint again."
        )
    return loaded


def _dummy_model(checkpoint_path: str, dtype: Any) -> Any:
    config = AutoConfig.from_pretrained(
        checkpoint_path, trust_remote_code=False, local_files_only=True
    )
    dtype = config.dtype if dtype == "auto" else dtype
    with torch.random.fork_rng():
        made = AUTO_MODEL.from_config(config, dtype=dtype, trust_remote_code=False)
    fill_randomly(made, DUMMY_SEED)
    return made


@torch.no_grad()
def fill_randomly(model: Any, seed: int) -> None:
    """Overwrite every matrix with seeded random numbers at a scale where greedy text varies.

    Layers must drown the token's own embedding: with default scales and a tied head, a random
    Granite model repeats its last token for ever.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if parameter.ndim < 2:  # norms, biases and Mamba's per-head vectors keep their start values
            continue
        std = 2 / parameter.shape[-1] ** 0.5
        if parameter is embeddings:
            std = 0.5 / model.config.embedding_multiplier
        values = torch.empty(parameter.shape).normal_(std=std, generator=generator)
        parameter.copy_(values)
