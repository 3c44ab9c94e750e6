import random

import torch

from granite_ray.quickstart.training.batches import make_batch
from granite_ray.quickstart.training.checkpoint import architecture
from granite_ray.quickstart.training.induction import set_copying_heads
from granite_ray.quickstart.training.lessons import Lessons
from granite_ray.quickstart.training.network import Network
from granite_ray.tokenizer import Tokenizer


def test_a_network_with_heads_that_copy_expects_what_followed_before(
    tokenizer: Tokenizer, lessons: Lessons
):
    network = Network(architecture(tokenizer), 1, dtype=torch.float32, is_compiled=False)
    lot = random.Random(2)
    batch = make_batch([lessons.group("copy", 0, lot) for _ in range(3)])
    losses = {}
    with torch.no_grad():
        for name in ("drawn", "set"):
            losses[name] = network(batch)[0].mean()
            set_copying_heads(network, 3)
    # Before, a token expects itself; a training spends its first hundreds of steps on that.
    assert losses["drawn"] > 15
    assert losses["set"] < 9
