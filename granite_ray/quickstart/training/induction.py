"""A network that can copy from the first step: one induction head, set by hand.

Copying needs two heads that are of no use without each other: one that tells each token what came
before it, and one that looks for where the present token stood before and takes what followed
(arXiv 2209.11895). A training as short as this one does not find the pair by chance. Weights set
so that a rough pair is there are trained on like all others.
"""

import math

import torch

from granite_ray.quickstart.training.network import Network

CONSTANT = 0.3
"""What every embedding has in its first place: a query and a key that depend on no token."""
SHARPNESS = 1.8
"""Weight of the constant in both: so large that the token before gets most of the attention."""
NUM_QUICK, NUM_SLOW = 16, 16
"""Rotary frequencies that tell neighbours apart, and those that hardly turn within a text."""
SKETCH_GAIN = 1.5
MATCH_GAIN = 2.5
COPY_GAIN = 6.0
"""How loud the sketch of a token's predecessor is, the match of two sketches, and the copy."""


def set_induction_head(network: Network, seed: int) -> None:
    """Set the first head of the first layer and of the second; the others keep what was drawn.

    A sketch is a random projection of a token's embedding to the size of a head. The first head
    writes each token's sketch to the one after it. The second compares the sketch of the present
    token with those, and adds what it finds in the direction of its embedding.
    """
    width, theta = network.architecture.hidden_size, network.architecture.rope_theta
    assert theta, "its positions are encoded"
    first, second = network.layers[0], network.layers[1]
    size = first.head_size
    half = size // 2
    head, slow = slice(0, size), slice(half - NUM_SLOW, half)
    generator = torch.Generator().manual_seed(seed)

    def projection() -> torch.Tensor:
        drawn = torch.randn(size, width, generator=generator) / math.sqrt(width)
        drawn[:, 0] = 0  # the constant is no part of what a token is
        return drawn

    sketch, carrier, copier = projection(), projection(), projection()
    carrier /= carrier.norm(dim=1, keepdim=True)
    # One token back is one turn of each frequency: there the rotated query meets the key.
    angles = theta ** (-torch.arange(NUM_QUICK) / half)
    with torch.no_grad():
        network.embedding[:, 0] = CONSTANT
        for weight in (first.query, first.key, second.query, second.key):
            weight[head] = 0
        first.query[:NUM_QUICK, 0] = SHARPNESS * angles.cos()
        first.query[half : half + NUM_QUICK, 0] = -SHARPNESS * angles.sin()
        first.key[:NUM_QUICK, 0] = SHARPNESS
        first.value[head] = sketch
        first.out[:, head] = SKETCH_GAIN * math.sqrt(width / size) * carrier.T
        for start, part in ((0, sketch[:NUM_SLOW]), (half, sketch[NUM_SLOW : 2 * NUM_SLOW])):
            second.query[start + slow.start : start + slow.stop] = MATCH_GAIN * part
        for start, part in ((0, carrier[:NUM_SLOW]), (half, carrier[NUM_SLOW : 2 * NUM_SLOW])):
            second.key[start + slow.start : start + slow.stop] = MATCH_GAIN * part
        second.value[head] = copier
        second.out[:, head] = COPY_GAIN * copier.T
