"""What a job's checkpoint needs of GPUs, in words and numbers; nothing is loaded or started.

The engine below loads torch, for shapes alone: `granite-ray plan` imports this when it is asked.
"""

from rich.console import Group
from rich.table import Table
from rich.text import Text

from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import JobConfig
from granite_ray.engine.fitting import Fit, fit_groups
from granite_ray.model.architecture import read_architecture

GIB = 1024**3
NUM_SHOWN = 3
"""Groups shown from the smallest that fits on, each twice as large as the one before."""


def plan_ranks(config: JobConfig, gpu_gib: float) -> tuple[str, list[Fit]]:
    """Fit the job's checkpoint on GPUs of a size.

    Returns:
        The name of its number format, and a fit for each size of a group.

    Raises:
        ConfigError: If the checkpoint cannot be had, or is not one that we run.
    """
    checkpoint = open_checkpoint(config.model, weights_needed=False)
    architecture = read_architecture(checkpoint.config)
    dtype = architecture.dtype if config.model.dtype == "auto" else config.model.dtype
    fits = fit_groups(
        architecture,
        config.engine,
        checkpoint.max_model_len,
        dtype,
        int(gpu_gib * GIB),
    )
    return dtype, list(fits)


def plan_view(config: JobConfig, gpu_gib: float) -> Group:
    """Show what fits, for a terminal."""
    dtype, fits = plan_ranks(config, gpu_gib)
    smallest = next((fit.num_ranks for fit in fits if fit.cache is not None), None)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("ranks", "experts", "parameters", "weights", "cache", "cached tokens", "at once"):
        table.add_column(name, justify="right")
    for fit in fits:
        if fit.num_ranks in _shown(smallest, config.engine.expert_parallel_size):
            table.add_row(*_cells(fit))
    if smallest is None:
        verdict = (
            f"No group fits on GPUs of {gpu_gib:g} GiB. Take larger ones, or lower "
            "model.max_model_len."
        )
    else:
        verdict = f"The smallest group that fits: engine.expert_parallel_size: {smallest}"
    name = config.model.path.rstrip("/").rpartition("/")[2]
    title = f"{name}, {dtype}, on GPUs of {gpu_gib:g} GiB; what one rank holds:"
    return Group(Text(title), Text(), table, Text(), Text(verdict))


def _shown(smallest: int | None, configured: int) -> set[int]:
    first = smallest or 1
    return {1, configured, *(first * 2**index for index in range(NUM_SHOWN))}


def _cells(fit: Fit) -> list[str]:
    start = [
        f"{fit.num_ranks}",
        f"{fit.num_experts}",
        f"{fit.num_parameters / 1e9:.2f} billion",
        f"{fit.weight_bytes / GIB:.1f} GiB",
        f"{fit.cache_bytes / GIB:.1f} GiB",
    ]
    if fit.cache is None:
        return [*start, "does not fit", ""]
    tokens = f"{fit.num_cache_tokens:,}" if fit.num_cache_tokens else "no attention"
    return [*start, tokens, f"{fit.cache.max_num_seqs}"]
