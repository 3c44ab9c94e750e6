"""Our model against transformers' classes, in every way in which a step may be put together."""

import dataclasses
import itertools

import pytest
import torch

from granite_ray.model.granite import GraniteModel
from tests.forward_batches import Stepper, Turn
from tests.unit.model.conftest import Member

TOLERANCE = 3e-4
"""In units of the logits' standard deviation, in float32.

Both sides sum in other orders. Most tokens are within 1e-5; the worst of thousands, of small norm
somewhere, within 1.2e-4, which is as far as either is from the same model in float64.
"""
LENGTHS = (1, 2, 15, 16, 17, 31, 32, 33, 64, 100, 129, 255, 256, 257, 300, 513, 700)


@pytest.fixture(scope="module")
def model(member: Member) -> GraniteModel:
    return member.load()


def make_tokens(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_tokens,), generator=generator).tolist()


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < TOLERANCE * expected.std()


def test_a_prompt_gives_the_logits_of_the_reference(member: Member, model: GraniteModel) -> None:
    token_ids = make_tokens(90, seed=0)
    [logits] = Stepper(model).run(Turn(0, token_ids))
    expected = member.reference_logits(token_ids)
    assert logits.dtype == torch.float32
    assert_near(logits, expected)


def test_seventeen_sequences_in_pieces_give_the_logits_of_the_reference(
    member: Member, model: GraniteModel
) -> None:
    tokens = [make_tokens(num_tokens + 5, seed=num_tokens) for num_tokens in LENGTHS]
    stepper = Stepper(model)
    found: list[list[torch.Tensor]] = [[] for _ in tokens]
    # A step takes the next piece of every sequence that has one: first prefills, then prefills
    # beside decodes, a piece of more than one token of a sequence that has decoded, decodes only.
    pieces = [iter(cut(num_tokens)) for num_tokens in LENGTHS]
    for step in itertools.zip_longest(*pieces):
        turns = [
            Turn(seq_id, tokens[seq_id][slice(*piece)])
            for seq_id, piece in enumerate(step)
            if piece is not None
        ]
        for turn, logits in zip(turns, stepper.run(*turns), strict=True):
            found[turn.seq_id].append(logits)
    num_compared = 0
    for token_ids, logits in zip(tokens, found, strict=True):
        num_tokens = member.first_near_tie(token_ids)
        expected = member.reference_logits(token_ids)
        assert_near(torch.cat(logits)[:num_tokens], expected[:num_tokens])
        num_compared += num_tokens
    assert num_compared > 0.6 * sum(map(len, tokens))


def cut(num_tokens: int) -> list[tuple[int, int]]:
    """Cut a prompt at its half if it is long; then a decode, a piece of 3 tokens, a decode."""
    middle = [num_tokens // 2] if num_tokens > 60 else []
    ends = [*middle, *(num_tokens + more for more in (0, 1, 4, 5))]
    return list(itertools.pairwise([0, *ends]))


def test_greedy_text_is_that_of_the_reference_and_varies(
    member: Member, model: GraniteModel
) -> None:
    token_ids, stepper = make_tokens(20, seed=3), Stepper(model)
    new_ids = list(token_ids)
    for _ in range(30):
        [logits] = stepper.run(Turn(0, new_ids))
        new_ids = [int(logits[-1].argmax())]
        token_ids += new_ids
    expected = member.reference_logits(token_ids[:-1])[19:]
    assert token_ids[20:] == expected.argmax(dim=-1).tolist()
    assert len(set(token_ids[20:])) > 12, "a model that repeats itself proves nothing"


def test_each_path_of_a_trie_is_a_sequence_of_its_own(member: Member, model: GraniteModel) -> None:
    parents = (-1, 0, 0, 2, -1, 4, -1, 3, 3, 0, 5)
    prompt, nodes, other = make_tokens(77, seed=4), make_tokens(11, seed=5), make_tokens(30, seed=6)
    stepper = Stepper(model)
    stepper.run(Turn(0, prompt), Turn(1, other[:-1]))
    _, logits, _ = stepper.run(
        Turn(1, other[-1:]), Turn(0, nodes, parents), Turn(2, make_tokens(40, seed=7))
    )
    for node in range(len(nodes)):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        expected = member.reference_logits(prompt + [nodes[index] for index in path])
        assert_near(logits[node], expected[-1])
    [after] = stepper.run(Turn(0, nodes[:1]))
    assert_near(after, member.reference_logits(prompt + nodes[:1])[-1:])


def test_a_trie_over_nothing_cached_is_a_set_of_prompts(
    member: Member, model: GraniteModel
) -> None:
    [logits] = Stepper(model).run(Turn(0, [5, 6, 7], parents=(-1, 0, -1)))
    assert_near(logits[:2], member.reference_logits([5, 6]))
    assert_near(logits[2:], member.reference_logits([7]))


def test_only_wanted_logits_are_computed(model: GraniteModel) -> None:
    stepper = Stepper(model)
    batch = stepper.build_batch([Turn(0, make_tokens(50, seed=1)), Turn(1, make_tokens(9, seed=2))])
    everything = model(batch, stepper.state)
    wanted = torch.tensor([58, 3, 49])
    some = model(dataclasses.replace(batch, logits_indices_L=wanted), stepper.state)
    assert_near(some, everything[wanted])
    none = model(dataclasses.replace(batch, logits_indices_L=wanted[:0]), stepper.state)
    assert none.shape == (0, 256)


def test_a_step_shows_that_it_is_alive(model: GraniteModel) -> None:
    before = model.num_layers_run
    Stepper(model).run(Turn(0, [1, 2, 3]))
    assert model.num_layers_run == before + len(model.layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_near_to_float32_as_the_reference(
    member: Member, dtype: torch.dtype
) -> None:
    """Their errors are of one size: the weights round alike, and each step in much the same places.

    What is left for chance: roundings differ, and a near tie may choose another expert.
    """
    token_ids = make_tokens(200, seed=9)
    exact = member.reference_logits(token_ids)
    [logits] = Stepper(member.load(dtype)).run(Turn(0, token_ids))
    reference = type(member.reference).from_pretrained(member.path, dtype=dtype)
    with torch.inference_mode():
        expected = reference(torch.tensor([token_ids]), use_cache=False).logits[0].float()
    assert error(logits, exact) < 1.3 * error(expected, exact)


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The median over the tokens: a token with other experts is far off, on either side."""
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median())
