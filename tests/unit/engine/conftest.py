"""Tiny checkpoints, one of each kind, and engines over them that are shut down afterwards."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.factory import Engine, make_engine
from granite_ray.engine.front import EngineFront
from granite_ray.engine.reference.core import start_reference_engine
from granite_ray.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_models import KINDS, write_checkpoint


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny matrices, shared cores


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        kind: open_checkpoint(ModelConfig(path=str(write_checkpoint(folder / kind, kind))))
        for kind in KINDS
    }


@pytest.fixture(scope="session", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    return checkpoints[request.param]


@pytest.fixture(scope="session")
def moe(checkpoints: dict[str, Checkpoint]) -> Checkpoint:
    """Any checkpoint, where the kind does not matter."""
    return checkpoints["granitemoe"]


@pytest.fixture(scope="session")
def tokenizer(moe: Checkpoint) -> Tokenizer:
    return load_tokenizer(moe.path)


@pytest.fixture(params=["native", "transformers"])
def backend(request: pytest.FixtureRequest) -> str:
    """The engines that run a model: what is true of one must be true of the other."""
    return str(request.param)


@pytest.fixture
def start_engine(backend: str) -> Iterator[Callable[..., Engine]]:
    """Start engines; keywords are those of `EngineConfig`."""
    started = []

    def start(checkpoint: Checkpoint, model: ModelConfig | None = None, **values: Any) -> Engine:
        config = EngineConfig(**{"device": "cpu", "backend": backend, **values})
        started.append(make_engine(checkpoint, model or ModelConfig(), config))
        return started[-1]

    yield start
    for engine in started:
        engine.shutdown()


@pytest.fixture
def start_around() -> Iterator[Callable[..., EngineFront]]:
    """Start a reference engine around any model object."""
    started = []

    def start(model: Any, checkpoint: Checkpoint, **values: Any) -> EngineFront:
        tokenizer = load_tokenizer(checkpoint.path)
        config = EngineConfig(**values)
        started.append(start_reference_engine(model, tokenizer, checkpoint.max_model_len, config))
        return started[-1]

    yield start
    for engine in started:
        engine.shutdown()


def load_plain(path: str | Path) -> Any:
    """Load the model as any user of transformers would."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
