"""A bag of words finds the telling ones, and a network that it is set into guesses what it does."""

import random

import pytest
import torch

from granite_ray.quickstart.training import bag as bags
from granite_ray.quickstart.training.bag import (
    Bag,
    BagLesson,
    learn_bag,
    set_bag_heads,
    share_right,
)
from granite_ray.quickstart.training.batches import make_batch
from granite_ray.quickstart.training.data import Data
from granite_ray.quickstart.training.groups import Group, Row
from granite_ray.quickstart.training.lessons import bag_lessons
from granite_ray.quickstart.training.network import Network
from granite_ray.tokenizer import Tokenizer
from tests.unit.quickstart.training.samples import SECTIONS, make_network

LABELS = (250, 251, 252, 253)
NUM_FILLERS = 150


def make_lesson(lot: random.Random) -> BagLesson:
    """Mostly words that tell nothing; those from 160 on tell the label, ten for each."""
    number = lot.randrange(len(LABELS))
    told = [160 + 10 * number + lot.randrange(10) for _ in range(lot.randint(2, 4))]
    text = told + [lot.randrange(NUM_FILLERS) for _ in range(lot.randint(5, 40))]
    lot.shuffle(text)
    return BagLesson(text, LABELS[number], [200 + number])


@pytest.fixture(scope="module")
def held_out() -> list[BagLesson]:
    lot = random.Random(2)
    return [make_lesson(lot) for _ in range(100)]


@pytest.fixture(scope="module")
def network() -> Network:
    return make_network(num_hidden_layers=3, hidden_size=96, attention_multiplier=0.125)


@pytest.fixture(scope="module")
def bag(network: Network) -> Bag:
    lot = random.Random(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bags, "BATCH_TEXTS", 16)
        return learn_bag(network, [make_lesson(lot) for _ in range(2_000)], seed=4)


def test_bag_names_labels_by_their_words_and_passes_over_the_others(
    bag: Bag, held_out: list[BagLesson]
):
    assert share_right(bag, held_out) > 0.95
    read = torch.nn.functional.normalize(bag.embedding_VC, dim=1)
    salience = (read @ bag.salience_HC.T).mean(1)
    assert salience[160:200].min() > salience[:NUM_FILLERS].mean()


def test_bag_learns_the_same_from_the_same_seed(network: Network):
    lessons = [make_lesson(random.Random(number)) for number in range(20)]
    first, again, other = (learn_bag(network, lessons, seed) for seed in (1, 1, 2))
    assert torch.equal(first.embedding_VC, again.embedding_VC)
    assert torch.equal(first.out_CE, again.out_CE)
    assert not torch.equal(first.embedding_VC, other.embedding_VC)


def test_network_guesses_what_the_bag_does_before_it_is_trained(
    network: Network, bag: Bag, held_out: list[BagLesson]
):
    right = torch.tensor([LABELS.index(lesson.label) for lesson in held_out])
    before = losses(network, held_out).argmin(1)
    set_bag_heads(network, bag)
    after = losses(network, held_out).argmin(1)
    assert (before == right).float().mean() < 0.5
    assert (after == right).float().mean() > 0.8


def losses(network: Network, lessons: list[BagLesson]) -> torch.Tensor:
    """Cross-entropy of each label after each text."""
    rows = [
        Row([*lesson.text, label], [0.0] * len(lesson.text) + [1.0])
        for lesson in lessons
        for label in LABELS
    ]
    with torch.no_grad():
        return network(make_batch([Group("section", (1,), rows)]))[0].view(-1, len(LABELS))


def test_lessons_for_the_bag_are_sections_and_synopses(data: Data, tokenizer: Tokenizer):
    firsts = {tokenizer.encode_text(section)[0] for section in SECTIONS}
    own = bag_lessons(data.packages, tokenizer)
    assert len(own) == len(data.packages)
    assert {lesson.label for lesson in own} == firsts
    for lesson in own:
        name = tokenizer.decode(list(lesson.synopsis)).removesuffix(" in short")
        assert name in tokenizer.decode(list(lesson.text))
