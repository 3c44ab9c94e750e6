"""`model.path` → a folder that is safe and whole enough to run, and the facts the job needs of it.

Everything that can be wrong with a checkpoint is found here, before anything starts. Weights are
only looked at from outside: shapes and loading belong to the engines.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from granite_ray.config import ModelConfig
from granite_ray.errors import ConfigError
from granite_ray.tokenizer import (
    TOKENIZER_FILES,
    Tokenizer,
    load_tokenizer,
    read_checkpoint_json,
)

SUPPORTED_MODEL_TYPES = ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid")
QUICKSTART_PATH = Path(__file__).parent / "quickstart" / "checkpoint"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "*.txt"]

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""

NUM_SAMPLES = 16
SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the job knows of the checkpoint that it runs.

    `name` goes into every row. `identity` is what of it can change an answer, for the fingerprint.
    `tokenizer_path` is the folder itself, or the embedded one where a dummy has no tokenizer.
    """

    path: str
    tokenizer_path: str
    name: str
    config: Mapping[str, Any]
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    identity: Mapping[str, Any]


def open_checkpoint(model: ModelConfig, *, weights_needed: bool = True) -> Checkpoint:
    """Find the checkpoint that `model.path` names, downloading it if need be, and check it.

    Args:
        model: The config's model section.
        weights_needed: False for a backend that runs without weights.

    Raises:
        ConfigError: It cannot be had, or it is not one that we run.
    """
    weights_needed = weights_needed and model.load_format == "auto"
    folder, name, revision = _locate(model.path, weights_needed)
    config = _read_config(folder, model.path)
    tokenizer_folder = _choose_tokenizer_folder(folder, model)
    tokenizer = load_tokenizer(str(tokenizer_folder))
    _check_vocabulary(tokenizer, config, model.path)
    weights = _identify_weights(folder, model.path) if weights_needed else None
    return Checkpoint(
        path=str(folder),
        tokenizer_path=str(tokenizer_folder),
        name=name,
        config=config,
        max_model_len=_choose_max_model_len(model, config),
        eos_token_ids=tokenizer.eos_token_ids,
        identity={
            "eos_token_ids": list(tokenizer.eos_token_ids),
            "files": _digest_files(folder, ("config.json",))
            | _digest_files(tokenizer_folder, TOKENIZER_FILES),
            "revision": revision,
            "weights": weights,
        },
    )


# locate ──────────────────────────────────────────────────────────────────────────────────────────


def _locate(path: str, weights_needed: bool) -> tuple[Path, str, str | None]:
    """Return the folder, the name for the rows, and the revision if the hub gave it."""
    if path == "quickstart":
        return QUICKSTART_PATH, path, None
    folder = Path(path).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return folder, folder.name, None
    if not HUB_ID.fullmatch(path):
        raise ConfigError(
            f"model.path {path!r} is not a folder. Name a checkpoint's folder, a hub id such as "
            "ibm-granite/granite-4.0-h-tiny, or quickstart."
        )
    folder = _download(path, weights_needed)
    return folder, path, folder.name


def _download(hub_id: str, weights_needed: bool) -> Path:
    patterns = [*HUB_FILES, "*.safetensors"] if weights_needed else HUB_FILES
    try:
        # Only files at the top: some repositories keep other formats in folders.
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model.path {hub_id!r} is no folder here, and the hub did not give it: {reason} "
            f"Check the spelling; log in where it is private (`hf auth login`); or fetch it where "
            f"there is a network (`hf download {hub_id}`) and name its folder."
        ) from error


# check ───────────────────────────────────────────────────────────────────────────────────────────


def _read_config(folder: Path, path: str) -> dict[str, Any]:
    config = read_checkpoint_json(folder, "config.json")
    if config is None:
        found = "the folder is there" if folder.is_dir() else f"{folder} is missing"
        raise ConfigError(
            f"model.path {path!r} has no config.json ({found}). Name the folder of a checkpoint in "
            "the hub's format."
        )
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.path {path!r} is a {model_type!r} checkpoint. Choose one of the types "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}."
        )
    settings = read_checkpoint_json(folder, "tokenizer_config.json") or {}
    if "auto_map" in config or "auto_map" in settings:
        raise ConfigError(
            f"model.path {path!r} asks to run code of its own (auto_map), which is never done. "
            "Choose a checkpoint without it; Granite's need none."
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(
            f"model.path {path!r} is quantized (quantization_config), which is not supported. "
            "Choose the checkpoint in bfloat16."
        )
    return config


def _choose_tokenizer_folder(folder: Path, model: ModelConfig) -> Path:
    """Return the folder whose tokenizer is used.

    Random weights give no text worth the name, so shapes alone are enough to try them: the
    embedded tokenizer, smaller than any real one, stands in.
    """
    has_none = not any((folder / name).is_file() for name in TOKENIZER_FILES)
    return QUICKSTART_PATH if model.load_format == "dummy" and has_none else folder


def _check_vocabulary(tokenizer: Tokenizer, config: Mapping[str, Any], path: str) -> None:
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.path {path!r}: its tokenizer has {tokenizer.vocab_size} tokens, and vocab_size "
            f"in config.json is {vocab_size}. Take both from the same checkpoint."
        )


def _choose_max_model_len(model: ModelConfig, config: Mapping[str, Any]) -> int:
    longest = config.get("max_position_embeddings")
    if not isinstance(longest, int) or longest < 1:
        raise ConfigError(
            f"model.path {model.path!r}: max_position_embeddings in config.json is {longest!r}. "
            "It must tell the longest context in tokens."
        )
    if model.max_model_len is not None and model.max_model_len > longest:
        raise ConfigError(
            f"model.max_model_len is {model.max_model_len}, more than the {longest} tokens of "
            f"model.path {model.path!r}. Choose at most {longest}."
        )
    return model.max_model_len or longest


# identify ────────────────────────────────────────────────────────────────────────────────────────


def _digest_files(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    present = [folder / name for name in names if (folder / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in present}


def _identify_weights(folder: Path, path: str) -> dict[str, str]:
    """Return a digest of each weights file, having checked that it is whole."""
    present = sorted(file.name for file in folder.glob("*.safetensors"))
    if not present:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES)
        found = f"only {', '.join(pickled)}, which can run code when loaded" if pickled else "none"
        raise ConfigError(
            f"model.path {path!r} needs weights in safetensors files and has {found}. Convert them "
            "with save_pretrained, or try the job without (engine.backend: fake)."
        )
    index = read_checkpoint_json(folder, INDEX_FILE)
    names = present if index is None else sorted(set(index.get("weight_map", {}).values()))
    missing = [name for name in names if name not in present]
    if missing or not names:
        raise ConfigError(
            f"model.path {path!r}: {INDEX_FILE} names {', '.join(missing) or 'no file'}"
            f"{', which is missing' if missing else ''}. Download the checkpoint again."
        )
    return {name: _digest_weights(folder / name) for name in names}


def _digest_weights(file: Path) -> str:
    """Digest size, header and samples: other weights in the same shapes differ in the samples."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = stream.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
        data_bytes = _data_bytes(header)
        if data_bytes is None or 8 + header_bytes + data_bytes != size:
            raise ConfigError(
                f"model.path: {file} is not a whole safetensors file ({size} bytes). "
                "Download it again."
            )
        digest = hashlib.sha256(f"{size}\n".encode() + header)
        for index in range(NUM_SAMPLES):
            stream.seek(8 + header_bytes + data_bytes * index // NUM_SAMPLES)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _data_bytes(header: bytes) -> int | None:
    """Return how many bytes of tensors follow a safetensors header, None if it is not one."""
    try:
        tensors = json.loads(header)
        ends = [
            entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"
        ]
        return int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
