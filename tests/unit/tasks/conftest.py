"""A tokenizer with a chat template and one without."""

import pytest

from granite_ray.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    write_tokenizer(folder)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def base_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("base")
    write_tokenizer(folder, chat=False)
    return load_tokenizer(str(folder))
