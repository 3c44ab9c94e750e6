"""A checkpoint's safetensors → this rank's parameters, or the same shapes filled with noise.

Files are memory-mapped and each tensor is copied once, straight to where it belongs. Here is the
one map between the checkpoint's tensor names and ours.
"""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from granite_ray.errors import ConfigError
from granite_ray.model.architecture import Architecture
from granite_ray.model.granite import GraniteModel
from granite_ray.model.moe import MixtureOfExperts
from granite_ray.model.pages import ask_for_large_pages
from granite_ray.parallel.experts import Dispatcher, LocalDispatcher

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
MAX_NAMED = 3
"""Tensors that an error names of each kind."""

# Ours are stacked, row upon row, from these; all others have the checkpoint's own name.
STACKED: dict[str, tuple[str, ...]] = {
    "self_attn.qkv_proj.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
}
STACKED_IN_GRANITE: dict[str, tuple[str, ...]] = STACKED | {
    "shared_mlp.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "shared_mlp.output_linear.weight": ("mlp.down_proj.weight",),
}
EXPERTS = ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight")


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint, and where its rows from `first_row` on go."""

    name: str
    shape: tuple[int, ...]
    first_row: int
    target: torch.Tensor


def load_weights(
    checkpoint_path: str,
    architecture: Architecture,
    *,
    dtype: torch.dtype,
    device: torch.device,
    dispatcher: Dispatcher | None = None,
) -> GraniteModel:
    """Load a checkpoint's weights, of its experts only those of this rank.

    Raises:
        ConfigError: Naming tensors that are missing, unknown or of another shape.
    """
    with _making(dtype, device):
        model = GraniteModel(architecture, dispatcher)
    ask_for_large_pages(model.parameters())
    pieces = {piece.name: piece for piece in _pieces(model)}
    with ExitStack() as stack:
        try:
            files = _open_files(Path(checkpoint_path), stack)
            problems = _compare(pieces, files, is_tied=architecture.tie_word_embeddings)
            if not problems:
                _copy(pieces.values(), files)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            problems = [f"the weights cannot be read: {error}"]
    if problems:
        raise ConfigError(
            f"model.path {checkpoint_path}: {'; '.join(problems)}. Fetch the checkpoint again, and "
            "take config.json and weights from the same one."
        )
    return model.eval()


def load_layer(
    checkpoint_path: str,
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    layer_index: int,
) -> MixtureOfExperts:
    """Load all experts of one layer, and its router, of a checkpoint that `load_weights` took."""
    layer = _make_layer(architecture, dtype, device)
    prefix = f"model.{_prefix_of_experts(layer_index)}"
    pieces = [
        Piece(prefix + name, tuple(parameter.shape), 0, parameter)
        for name, parameter in layer.named_parameters()
    ]
    with ExitStack() as stack:
        _copy(pieces, _open_files(Path(checkpoint_path), stack))
    return layer


def count_parameters(architecture: Architecture, local_experts: range | None = None) -> int:
    """Return how many numbers a rank's model has, by default the whole one; tied ones once."""
    if local_experts is None:
        local_experts = range(architecture.num_local_experts)
    with _making(torch.bfloat16, torch.device("meta")):
        model = GraniteModel(architecture, LocalDispatcher(local_experts))
    return sum(parameter.numel() for parameter in model.parameters())


def _make_layer(
    architecture: Architecture, dtype: torch.dtype, device: torch.device
) -> MixtureOfExperts:
    whole = LocalDispatcher(range(architecture.num_local_experts))
    with _making(dtype, device):
        return MixtureOfExperts(architecture, whole).requires_grad_(False)


def _prefix_of_experts(layer_index: int) -> str:
    return f"layers.{layer_index}.block_sparse_moe."


@contextmanager
def _making(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Let modules make their parameters in this dtype, on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


# names ───────────────────────────────────────────────────────────────────────────────────────────


def _pieces(model: GraniteModel) -> Iterator[Piece]:
    """Say for each parameter what of the checkpoint it is made of."""
    architecture = model.architecture
    stacked = STACKED_IN_GRANITE if architecture.model_type == "granite" else STACKED
    for name, parameter in model.named_parameters():
        prefix, local_name = _split_name(name)
        if local_name in EXPERTS:
            shape = (architecture.num_local_experts, *parameter.shape[1:])
            yield Piece(prefix + local_name, shape, model.dispatcher.local_experts.start, parameter)
            continue
        sources = stacked.get(local_name, (local_name,))
        targets = parameter.split_with_sizes(_row_counts(architecture, local_name, len(parameter)))
        for source, target in zip(sources, targets, strict=True):
            yield Piece(prefix + source, tuple(target.shape), 0, target)


def _split_name(name: str) -> tuple[str, str]:
    """Split our name of a parameter into what tells its layer in the checkpoint, and the rest."""
    if name.startswith("layers."):
        _, layer_index, local_name = name.split(".", 2)
        return f"model.layers.{layer_index}.", local_name
    return ("" if name.startswith("lm_head.") else "model."), name


def _row_counts(architecture: Architecture, local_name: str, num_rows: int) -> list[int]:
    if local_name == "self_attn.qkv_proj.weight":
        num_kv_rows = architecture.num_key_value_heads * architecture.head_dim
        return [num_rows - 2 * num_kv_rows, num_kv_rows, num_kv_rows]
    if local_name == "shared_mlp.input_linear.weight" and architecture.model_type == "granite":
        return [num_rows // 2, num_rows // 2]
    return [num_rows]


# files ───────────────────────────────────────────────────────────────────────────────────────────


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Return for each tensor's name the memory-mapped file that has it."""
    index_path = folder / INDEX_FILE
    file_names = {WEIGHTS_FILE}
    if index_path.is_file():
        file_names = set(json.loads(index_path.read_bytes())["weight_map"].values())
    opened = [
        stack.enter_context(safe_open(folder / name, framework="pt")) for name in sorted(file_names)
    ]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a dict


def _compare(pieces: Mapping[str, Piece], files: Mapping[str, Any], *, is_tied: bool) -> list[str]:
    """Return in words what does not fit."""
    unknown = set(files) - set(pieces)
    if is_tied:  # some checkpoints write the embedding a second time
        unknown.discard("lm_head.weight")
    misshapen = [
        f"{name} {found} instead of {list(pieces[name].shape)}"
        for name in sorted(set(pieces) & set(files))
        if (found := files[name].get_slice(name).get_shape()) != list(pieces[name].shape)
    ]
    found = {
        "missing": sorted(set(pieces) - set(files)),
        "unknown": sorted(unknown),
        "of another shape": misshapen,
    }
    return [
        f"{len(names)} tensors are {what}: {', '.join(names[:MAX_NAMED])}"
        f"{', …' if len(names) > MAX_NAMED else ''}"
        for what, names in found.items()
        if names
    ]


def _copy(pieces: Iterable[Piece], files: Mapping[str, Any]) -> None:
    for piece in pieces:
        rows = slice(piece.first_row, piece.first_row + len(piece.target))
        piece.target.copy_(files[piece.name].get_slice(piece.name)[rows])


# noise ───────────────────────────────────────────────────────────────────────────────────────────

NUM_NOISE_VALUES = 1_048_573
"""A prime, so that no two rows of a matrix begin at the same place of the repeated noise."""


def dummy_model(
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    dispatcher: Dispatcher | None = None,
) -> GraniteModel:
    """Make a model of random numbers at a scale where greedy text varies.

    Layers must drown the token's own embedding: with usual scales and a tied head, a random
    Granite model repeats its last token for ever. The numbers repeat after `NUM_NOISE_VALUES`:
    drawing seven billion would take minutes. An expert's are the same on whatever rank it is.
    """
    with _making(dtype, device):
        model = GraniteModel(architecture, dispatcher)
    ask_for_large_pages(model.parameters())
    noise = _Noise(seed, device)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.copy_(_start_value(name.rpartition(".")[2], parameter))
            continue
        std = 2 / math.sqrt(parameter.shape[-1])
        if parameter is model.embed_tokens.weight:
            std = 0.5 / architecture.embedding_multiplier
        is_divided = _split_name(name)[1] in EXPERTS
        noise.fill(name, parameter, std, model.dispatcher.local_experts.start if is_divided else 0)
    return model.eval()


def dummy_layer(
    architecture: Architecture,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    layer_index: int,
) -> MixtureOfExperts:
    """Make all experts of one layer, and its router, as `dummy_model` makes them."""
    layer, noise = _make_layer(architecture, dtype, device), _Noise(seed, device)
    for name, parameter in layer.named_parameters():
        std = 2 / math.sqrt(parameter.shape[-1])
        noise.fill(_prefix_of_experts(layer_index) + name, parameter, std)
    return layer


class _Noise:
    """Random numbers for parameters by their names, each to be had without the others."""

    def __init__(self, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._values = torch.randn(NUM_NOISE_VALUES, generator=generator).to(device)

    def fill(self, name: str, parameter: torch.Tensor, std: float, first_row: int = 0) -> None:
        """Fill a parameter that begins at `first_row` of the whole one."""
        start = zlib.crc32(name.encode()) + first_row * parameter[:1].numel()
        noise = (self._values.roll(-(start % NUM_NOISE_VALUES)) * std).to(parameter.dtype)
        for part in torch.split(parameter.view(-1), len(noise)):
            part.copy_(noise[: len(part)])


def _start_value(kind: str, parameter: torch.Tensor) -> torch.Tensor:
    """Return what training would start from: norms, Mamba's biases and per-head vectors."""
    if kind == "A_log":
        return torch.arange(1, len(parameter) + 1).log()
    if kind == "bias":
        return torch.zeros(len(parameter))
    return torch.ones(len(parameter))
