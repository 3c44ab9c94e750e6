"""A network that can copy from the first step, with heads that are set by hand.

Copying needs heads that are of no use without each other: some that tell each token what came just
before it, and one that looks for where the present token stood before and takes what followed
(arXiv 2209.11895). A training as short as this one does not find them by chance. Weights set so
that rough ones are there are trained on like all others.
"""

import math

import torch
import torch.nn.functional as F

from granite_ray.quickstart.training.network import Network

CONSTANT = 0.3
"""What every embedding has in its first place: a query and a key that depend on no token."""
SHARPNESS = 1.8
"""Weight of the constant in both: so large that one place gets most of the attention."""
NUM_LOOKING_BACK = 4
"""Heads of the first layer that see the token one, two, … places back: as many as stand between a
field's name and the first token of its value."""
NUM_QUICK, NUM_SLOW = 16, 16
"""Rotary frequencies that tell neighbours apart, and those that hardly turn within a text."""
SKETCH_GAIN = 1.5
MATCH_GAIN = 2.5
COPY_GAIN = 6.0
"""How loud the sketch of an earlier token is, the match of two sketches, and the copy."""


def set_copying_heads(network: Network, seed: int) -> None:
    """Set the first heads of the first layer, and the second's first; others keep what they have.

    A sketch is a random projection of a token's embedding to the size of a head. The first layer's
    heads write to each token sketches of those before it. The second layer's head compares the
    sketch of the present token with that of each token's predecessor, and adds what it finds in the
    direction of its embedding. Every embedding gets the constant.
    """
    width, theta = network.architecture.hidden_size, network.architecture.rope_theta
    assert theta, "its positions are encoded"
    first, second = network.layers[0], network.layers[1]
    size, num_sharing = first.head_size, first.num_heads // first.num_kv_heads
    half = size // 2
    generator = torch.Generator().manual_seed(seed)

    def projection() -> torch.Tensor:
        drawn = torch.randn(size, width, generator=generator) / math.sqrt(width)
        drawn[:, 0] = 0  # the constant is no part of what a token is
        return drawn

    sketches = [projection() for _ in range(math.ceil(NUM_LOOKING_BACK / num_sharing))]
    carriers = [F.normalize(projection(), dim=1) for _ in range(NUM_LOOKING_BACK)]
    copier = projection()
    frequencies = theta ** (-torch.arange(NUM_QUICK) / half)
    with torch.no_grad():
        network.embedding[:, 0] = CONSTANT
        for number, sketch in enumerate(sketches):
            key = slice(number * size, (number + 1) * size)
            first.key[key] = 0
            first.key[key][:NUM_QUICK, 0] = SHARPNESS
            first.value[key] = sketch
        for number, carrier in enumerate(carriers):
            query = slice(number * size, (number + 1) * size)
            # Each token further back is one turn of each frequency more: there the rotated query
            # meets the key.
            angles = (number + 1) * frequencies
            first.query[query] = 0
            first.query[query][:NUM_QUICK, 0] = SHARPNESS * angles.cos()
            first.query[query][half : half + NUM_QUICK, 0] = -SHARPNESS * angles.sin()
            first.out[:, query] = SKETCH_GAIN * math.sqrt(width / size) * carrier.T
        head = slice(0, size)
        for projected, weight in ((sketches[0], second.query), (carriers[0], second.key)):
            weight[head] = 0
            for number, start in enumerate((half - NUM_SLOW, size - NUM_SLOW)):
                part = projected[number * NUM_SLOW : (number + 1) * NUM_SLOW]
                weight[head][start : start + NUM_SLOW] = MATCH_GAIN * part
        second.value[head] = copier
        second.out[:, head] = COPY_GAIN * copier.T
