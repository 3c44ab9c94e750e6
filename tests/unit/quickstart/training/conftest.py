import pytest
import torch

from granite_ray.quickstart.make_tokenizer import CHECKPOINT_PATH
from granite_ray.quickstart.training.data import Data
from granite_ray.quickstart.training.lessons import Lessons
from granite_ray.tokenizer import Tokenizer, load_tokenizer
from tests.unit.quickstart.training.samples import SEED, make_data


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(str(CHECKPOINT_PATH))


@pytest.fixture(scope="session")
def data() -> Data:
    return make_data()


@pytest.fixture(scope="session")
def lessons(data: Data, tokenizer: Tokenizer) -> Lessons:
    return Lessons(data, tokenizer, SEED)
