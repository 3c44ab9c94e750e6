"""`engine.device` → a device that this machine has."""

import torch

from granite_ray.errors import ConfigError


def choose_device(wanted: str) -> torch.device:
    """Turn `engine.device` into a device that this machine has."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ConfigError(
            "engine.device is cuda, but torch finds no GPU where the engine runs. "
            "Use engine.device: cpu, or a node and a torch build with CUDA."
        )
    return torch.device("cuda" if has_cuda and wanted != "cpu" else "cpu")
