"""What a training was, in figures: what the model card tells of it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from granite_ray.quickstart.training.data import Data
from granite_ray.quickstart.training.network import Network
from granite_ray.quickstart.training.run import Training

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of one training; `num_active` are the parameters that work on a token."""

    num_parameters: int
    num_active: int
    num_packages: int
    num_entries: int
    num_labels: int
    num_held_out_packages: int
    num_held_out_entries: int
    num_steps: int
    num_tokens: int
    seconds: float
    seed: int
    device: str


def summarize_training(training: Training, network: Network, data: Data) -> Summary:
    """Return the figures of a training that has ended."""
    shape = network.architecture
    of_experts = sum(
        weight.numel()
        for name, weight in network.named_parameters()
        if any(part in name for part in (".gates.", ".ups.", ".downs."))
    )
    num_parameters = sum(weight.numel() for weight in network.parameters())
    idle = of_experts * (1 - shape.num_experts_per_tok / shape.num_local_experts)
    return Summary(
        num_parameters=num_parameters,
        num_active=round(num_parameters - idle),
        num_packages=len(data.packages),
        num_entries=len(data.entries),
        num_labels=len(data.labels),
        num_held_out_packages=len(data.held_out_packages),
        num_held_out_entries=len(data.held_out_entries),
        num_steps=training.step,
        num_tokens=training.num_tokens,
        seconds=training.seconds,
        seed=training.identity.seed,
        device=_device_name(network.embedding.device),
    )


def write_summary(summary: Summary, work_path: Path) -> None:
    """Write the figures beside the training's log."""
    text = json.dumps(asdict(summary), indent=2)
    (work_path / SUMMARY_FILE).write_text(f"{text}\n", encoding="utf-8")


def read_summary(work_path: Path) -> Summary:
    """Read what `write_summary` wrote."""
    return Summary(**json.loads((work_path / SUMMARY_FILE).read_text(encoding="utf-8")))


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"
