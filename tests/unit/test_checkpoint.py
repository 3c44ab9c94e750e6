import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from granite_ray.checkpoint import (
    QUICKSTART_PATH,
    SUPPORTED_MODEL_TYPES,
    Checkpoint,
    open_checkpoint,
)
from granite_ray.config import ModelConfig
from granite_ray.errors import ConfigError
from granite_ray.tokenizer import TOKENIZER_FILES
from tests.tiny import write_tokenizer

WEIGHTS = "model.safetensors"


def write_checkpoint(folder: Path, **changes: object) -> Path:
    write_tokenizer(folder)
    config = {"model_type": "granitemoe", "vocab_size": 1000, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({"a": np.arange(100_000, dtype=np.float32)}, folder / WEIGHTS, {"format": "pt"})
    return folder


def open_folder(folder: Path, *, weights_needed: bool = True, **model: object) -> Checkpoint:
    return open_checkpoint(
        ModelConfig.model_validate({"path": str(folder), **model}), weights_needed=weights_needed
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "granite-tiny")


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_a_whole_checkpoint_opens_and_tells_its_facts(tmp_path: Path, model_type: str) -> None:
    folder = write_checkpoint(tmp_path / "mine", model_type=model_type)
    checkpoint = open_folder(folder)
    assert (checkpoint.path, checkpoint.name) == (str(folder), "mine")
    assert checkpoint.config["model_type"] == model_type
    assert checkpoint.max_model_len == 4096
    assert checkpoint.eos_token_ids == (0,)
    assert pickle.loads(pickle.dumps(checkpoint)) == checkpoint


def test_a_shorter_context_can_be_chosen_and_a_longer_one_is_refused(folder: Path) -> None:
    assert open_folder(folder, max_model_len=512).max_model_len == 512
    with pytest.raises(ConfigError, match=r"model\.max_model_len is 4097, more than the 4096"):
        open_folder(folder, max_model_len=4097)


# identity ────────────────────────────────────────────────────────────────────────────────────────


def test_the_identity_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    copy = write_checkpoint(tmp_path / "copy")
    assert open_folder(copy).identity == open_folder(folder).identity
    json.dumps(open_folder(folder).identity)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_changed_file_changes_the_identity(folder: Path, name: str) -> None:
    before = open_folder(folder).identity
    (folder / name).write_text((folder / name).read_text() + "\n")
    assert open_folder(folder).identity != before


def test_other_end_tokens_change_the_identity(folder: Path) -> None:
    before = open_folder(folder).identity
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    assert open_folder(folder).identity != before


def test_other_weights_in_the_same_shapes_change_the_identity(folder: Path) -> None:
    before = open_folder(folder).identity
    trained = np.arange(100_000, dtype=np.float32) * 1.001
    save_file({"a": trained}, folder / WEIGHTS, {"format": "pt"})
    assert open_folder(folder).identity != before


def test_files_beside_the_checkpoint_do_not_change_its_identity(folder: Path) -> None:
    before = open_folder(folder).identity
    (folder / "README.md").write_text("hello")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    assert open_folder(folder).identity == before


# dummies ─────────────────────────────────────────────────────────────────────────────────────────


def remove_tokenizer(folder: Path, *names: str) -> None:
    for name in names or TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def test_a_dummy_without_tokenizer_takes_the_embedded_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "mine", vocab_size=49155)
    own = open_folder(folder, load_format="dummy")
    remove_tokenizer(folder)
    checkpoint = open_folder(folder, load_format="dummy")
    assert (own.tokenizer_path, checkpoint.tokenizer_path) == (str(folder), str(QUICKSTART_PATH))
    assert checkpoint.path == own.path
    embedded = open_checkpoint(ModelConfig(path="quickstart"))
    assert checkpoint.eos_token_ids == embedded.eos_token_ids
    files, own_files = checkpoint.identity["files"], own.identity["files"]
    assert files == embedded.identity["files"] | {"config.json": own_files["config.json"]}
    assert files["tokenizer.json"] != own_files["tokenizer.json"]


@pytest.mark.parametrize("names", [["tokenizer.json"], ["tokenizer.json", "chat_template.jinja"]])
def test_a_dummy_with_half_a_tokenizer_is_refused(folder: Path, names: list[str]) -> None:
    remove_tokenizer(folder, *names)
    with pytest.raises(ConfigError, match=r"granite-tiny.* has no tokenizer\.json"):
        open_folder(folder, load_format="dummy")


def test_no_other_checkpoint_goes_without_a_tokenizer(folder: Path) -> None:
    remove_tokenizer(folder)
    for weights_needed in (True, False):
        with pytest.raises(ConfigError, match=r"granite-tiny.* has no tokenizer\.json"):
            open_folder(folder, weights_needed=weights_needed)


def test_a_dummy_whose_vocabulary_is_too_small_for_the_embedded_tokenizer_is_refused(
    folder: Path,
) -> None:
    remove_tokenizer(folder)
    with pytest.raises(ConfigError, match=r"tokenizer has 6.* vocab_size in config\.json is 1000"):
        open_folder(folder, load_format="dummy")


# refusals ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "'llama' checkpoint.*granitemoehybrid"),
        ({"model_type": None}, "None checkpoint"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"vocab_size": 500}, "tokenizer has 7.. tokens, and vocab_size in config.json is 500"),
    ],
)
def test_a_config_that_we_do_not_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = write_checkpoint(tmp_path / "mine", **changes)
    with pytest.raises(ConfigError, match=rf"model\.path .*mine.*{message}"):
        open_folder(folder)


def test_code_named_by_the_tokenizer_is_refused(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {}}))
    with pytest.raises(ConfigError, match="auto_map"):
        open_folder(folder)


@pytest.mark.parametrize("path", ["nowhere", "/no/such/folder", "./a/b/c"])
def test_a_path_that_is_no_folder_is_refused(path: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .* is not a folder.*hub id.*quickstart"):
        open_checkpoint(ModelConfig(path=path))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path .* has no config\.json"):
        open_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused_by_name(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        open_folder(folder)


def test_weights_are_asked_for_only_where_they_are_needed(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="needs weights in safetensors files and has none"):
        open_folder(folder)
    assert open_folder(folder, load_format="dummy").identity["weights"] is None
    assert open_folder(folder, weights_needed=False).identity["weights"] is None


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin, which can run code"):
        open_folder(folder)


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize("end", [0, 5, 40, -1])
def test_weights_that_were_cut_off_are_refused_by_name(folder: Path, end: int) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a whole safetensors file"):
        open_folder(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
        _header(b"[]"),
        _header(b"{}") + b"more",
        _header(b'{"a": {}}'),
        _header(b'{"a": {"data_offsets": ["x", "y"]}}'),
        _header(b"[" * 100_000),
    ],
    ids=range(7),
)
def test_a_file_that_is_no_safetensors_is_refused_by_name(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a whole safetensors file"):
        open_folder(folder)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_an_index_says_which_files_are_the_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    save_file({"b": np.zeros(3)}, folder / "adapter.safetensors")
    write_index(folder, {"a": "model-00001-of-00001.safetensors"})
    assert list(open_folder(folder).identity["weights"]) == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "../model.safetensors"])
def test_an_index_that_names_a_missing_file_is_refused(folder: Path, name: str) -> None:
    write_index(folder, {"a": WEIGHTS, "b": name})
    with pytest.raises(ConfigError, match=rf"index\.json names {name}, which is missing"):
        open_folder(folder)


def test_an_empty_index_is_refused(folder: Path) -> None:
    write_index(folder, {})
    with pytest.raises(ConfigError, match="names no file"):
        open_folder(folder)


# hub ─────────────────────────────────────────────────────────────────────────────────────────────

OPEN_FROM_HUB = """
from granite_ray.checkpoint import open_checkpoint
from granite_ray.config import ModelConfig
from granite_ray.errors import ConfigError
try:
    checkpoint = open_checkpoint(ModelConfig(path="someone/granite-test"))
    print(checkpoint.name, checkpoint.identity["revision"], checkpoint.path)
except ConfigError as error:
    print("REFUSED", error)
"""


def open_offline(home: Path) -> str:
    """Open a hub id in a process of its own: the hub's client reads its settings when imported."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_FROM_HUB],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_hub_id_that_cannot_be_had_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    message = open_offline(tmp_path)
    assert message.startswith("REFUSED model.path 'someone/granite-test' is no folder here")
    assert "hf auth login" in message
    assert "hf download someone/granite-test" in message


def test_a_hub_id_that_was_fetched_before_opens_with_its_revision(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--granite-test"
    revision = "0123456789" * 4
    write_checkpoint(repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    name, found, path = open_offline(tmp_path).split()
    assert (name, found) == ("someone/granite-test", revision)
    assert Path(path).samefile(repository / "snapshots" / revision)
