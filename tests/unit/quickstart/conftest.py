import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from granite_ray.quickstart.make_corpus import CORPUS_PATH
from granite_ray.quickstart.make_tokenizer import CHECKPOINT_PATH


@pytest.fixture(scope="session")
def corpus() -> dict[str, list[str]]:
    return pq.read_table(CORPUS_PATH).to_pydict()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT_PATH / "tokenizer.json"))
