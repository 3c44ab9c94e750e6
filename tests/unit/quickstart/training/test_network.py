"""The network that is trained against transformers' class and our own, from one checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import GraniteMoeForCausalLM

from granite_ray.model.architecture import read_architecture
from granite_ray.model.weights import load_weights
from granite_ray.quickstart.training.batches import make_batch
from granite_ray.quickstart.training.checkpoint import write_checkpoint
from granite_ray.quickstart.training.groups import Group, Row
from granite_ray.quickstart.training.network import Network
from granite_ray.tokenizer import Tokenizer
from tests.forward_batches import Stepper, Turn
from tests.unit.quickstart.training.samples import make_network

TOLERANCE = 1e-4


def draw(num_tokens: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num_tokens,), generator=generator).tolist()


def make_row(num_tokens: int, seed: int) -> Row:
    return Row(draw(num_tokens, seed), [0.0] + [1.0] * (num_tokens - 1))


GROUPS = [
    Group("section", tuple(draw(9, 0)), [make_row(size, size) for size in (4, 17, 2, 30)]),
    Group("entry", tuple(draw(1, 1)), [make_row(12, 50)]),
    Group("synopsis", tuple(draw(20, 2)), [make_row(6, 60), make_row(6, 61)]),
]


@pytest.fixture(scope="module")
def network() -> Network:
    return make_network()


@pytest.fixture(scope="module")
def folder(
    network: Network, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(network, tokenizer, path)
    return path


@pytest.fixture
def reference(folder: Path) -> GraniteMoeForCausalLM:
    return GraniteMoeForCausalLM.from_pretrained(folder, dtype=torch.float32)


def losses_alone(model: GraniteMoeForCausalLM, groups: Sequence[Group]) -> torch.Tensor:
    """Cross-entropy of what is learnt, each row a sequence of its own."""
    losses = []
    for group in groups:
        for row in group.rows:
            token_ids = torch.tensor([*group.shared, *row.token_ids])
            logits = model(token_ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, token_ids[1:], reduction="none")
            losses.append(loss[len(group.shared) :])  # a row's first token is never learnt
    return torch.cat(losses)


def test_losses_of_rows_that_share_a_beginning_are_those_of_the_reference(
    network: Network, reference: GraniteMoeForCausalLM
):
    with torch.no_grad():
        losses, hits, _ = network(make_batch(GROUPS))
        expected = losses_alone(reference, GROUPS)
    assert (losses - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.1
    assert hits.shape == losses.shape


def test_rows_alone_have_the_losses_that_they_have_together(network: Network):
    alone = [
        Group(group.kind, group.shared[:1], [Row([*group.shared[1:], *row.token_ids], weights)])
        for group in GROUPS
        for row in group.rows
        for weights in [[0.0] * (len(group.shared) - 1) + row.weights]
    ]
    with torch.no_grad():
        together, hits, _ = network(make_batch(GROUPS))
        one_by_one = [network(make_batch([group])) for group in alone]
    assert (together - torch.cat([losses for losses, _, _ in one_by_one])).abs().max() < TOLERANCE
    assert torch.equal(hits, torch.cat([own for _, own, _ in one_by_one]))


def test_gradients_are_those_of_the_reference(network: Network, reference: GraniteMoeForCausalLM):
    network.zero_grad()
    losses, _, _ = network(make_batch(GROUPS))
    losses.sum().backward()
    losses_alone(reference, GROUPS).sum().backward()
    expected = {name: weight.grad for name, weight in reference.named_parameters()}
    width = network.config.intermediate_size
    ours = {
        "query": "self_attn.q_proj.weight",
        "key": "self_attn.k_proj.weight",
        "value": "self_attn.v_proj.weight",
        "out": "self_attn.o_proj.weight",
        "input_norm": "input_layernorm.weight",
        "expert_norm": "post_attention_layernorm.weight",
        "router": "block_sparse_moe.router.weight",
    }
    pairs = [
        (network.embedding.grad, expected["model.embed_tokens.weight"]),
        (network.norm.grad, expected["model.norm.weight"]),
    ]
    for index, layer in enumerate(network.layers):
        theirs = f"model.layers.{index}"
        pairs += [(getattr(layer, a).grad, expected[f"{theirs}.{b}"]) for a, b in ours.items()]
        gate_up = expected[f"{theirs}.block_sparse_moe.experts.gate_up_proj"]
        down = expected[f"{theirs}.block_sparse_moe.experts.down_proj"]
        for expert in range(network.config.num_local_experts):
            pairs += [
                (layer.gates[expert].grad, gate_up[expert, :width]),
                (layer.ups[expert].grad, gate_up[expert, width:]),
                (layer.downs[expert].grad, down[expert]),
            ]
    assert sum(found.numel() for found, _ in pairs) == sum(w.numel() for w in network.parameters())
    for found, wanted in pairs:
        assert wanted.abs().max() > 0
        assert (found - wanted).abs().max() < TOLERANCE * max(1.0, float(wanted.abs().max()))


def test_checkpoint_has_every_weight_of_the_format_and_no_other(folder: Path):
    _, told = GraniteMoeForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "granitemoe"
    assert config["dtype"] == "bfloat16"


def test_our_own_engine_reads_the_same_model(folder: Path, reference: GraniteMoeForCausalLM):
    architecture = read_architecture(json.loads((folder / "config.json").read_text()))
    model = load_weights(str(folder), architecture, dtype=torch.float32, device=torch.device("cpu"))
    token_ids = draw(40, seed=9)
    [logits] = Stepper(model).run(Turn(0, token_ids))
    with torch.no_grad():
        expected = reference(torch.tensor([token_ids])).logits[0]
    assert (logits - expected).abs().max() < TOLERANCE * max(1.0, float(expected.abs().max()))


# how evenly experts are used ─────────────────────────────────────────────────────────────────────


def unevenness(network: Network, liked: torch.Tensor) -> float:
    """Load-balancing term where token t has the router scores of row t of `liked`."""
    layer = network.layers[0]
    with torch.no_grad():
        layer.router.zero_()
        layer.router[:, : len(liked)] = liked.T
        tokens = torch.eye(network.config.hidden_size)[: len(liked)]
        return float(layer.consult(tokens, network.kernels)[1])


def test_load_balancing_term_is_one_for_even_use_and_grows_with_unevenness():
    network = make_network()
    even = torch.tensor([[9.0, 8, 0, 0], [0, 9, 8, 0], [0, 0, 9, 8], [8, 0, 0, 9]])
    assert unevenness(network, even) == pytest.approx(1, abs=1e-5)
    # Two of four experts do all the work, and each has half of the probability.
    assert unevenness(network, torch.tensor([[30.0, 30, 0, 0]] * 4)) == pytest.approx(2, abs=1e-5)
    assert 1.2 < unevenness(network, torch.tensor([[9.0, 8, 0, 0], [0, 9, 8, 0]] * 2)) < 2
