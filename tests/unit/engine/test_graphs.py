"""Padded decodes on fixed buffers equal plain ones; here "capturing" is to call again."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from granite_ray.engine.graphs import DecodeGraphs
from granite_ray.engine.runner import Runner
from granite_ray.engine.sequence import ScheduledSequence, Sequence, StepPlan
from granite_ray.model.architecture import read_architecture
from granite_ray.model.granite import GraniteModel
from granite_ray.model.state import allocate_state
from granite_ray.model.weights import load_weights
from granite_ray.tokenizer import read_checkpoint_json
from tests.tiny_models import KINDS, write_checkpoint

BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS, MAX_BLOCKS = 16, 24, 6, 4


def attend_plainly(  # noqa: PLR0913 - the parameters of what it stands for
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """What `varlen_attn_out` is documented to do with a paged cache."""
    assert cu_seq_k is None
    assert window_size == (-1, 0)
    assert enable_gqa
    assert max_k >= int(seqused_k.max())
    for row, (start, stop) in enumerate(pairwise(cu_seq_q.tolist())):
        num_keys, num_queries = int(seqused_k[row]), stop - start
        assert num_queries <= max_q
        keys = key[block_table[row].long()].flatten(0, 1)[:num_keys]
        values = value[block_table[row].long()].flatten(0, 1)[:num_keys]
        group_size = query.shape[1] // key.shape[2]
        keys, values = (t.repeat_interleave(group_size, dim=1) for t in (keys, values))
        scores = torch.einsum("qha,kha->hqk", query[start:stop], keys) * scale
        is_seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        weights = scores.masked_fill(~is_seen, -torch.inf).softmax(dim=-1)
        out[start:stop] = torch.einsum("hqk,kha->qha", weights, values)


def make_runner(model: GraniteModel, *, has_graphs: bool) -> Runner:
    counts = NUM_BLOCKS + 1, BLOCK_SIZE, NUM_SLOTS + 1
    state = allocate_state(model.architecture, *counts, torch.float32, torch.device("cpu"))
    graphs = None
    if has_graphs:
        with torch.inference_mode():
            graphs = DecodeGraphs(
                model, state, NUM_SLOTS, MAX_BLOCKS, lambda step: step, attend_plainly
            )
    return Runner(model, state, BLOCK_SIZE, graphs)


def decode(runner: Runner, lengths: list[int], num_steps: int) -> list[torch.Tensor]:
    """Prefill sequences, then let one after the other end while the rest go on."""
    numbers = random.Random(1)
    blocks = list(range(NUM_BLOCKS))
    numbers.shuffle(blocks)
    sequences = []
    for slot, length in enumerate(lengths):
        token_ids = [numbers.randrange(20, 740) for _ in range(length)]
        sequence = Sequence(slot, token_ids, length, 64, state_slot=slot)
        sequence.block_table = [blocks.pop() for _ in range(MAX_BLOCKS)]
        sequences.append(sequence)
    found = [runner.run(StepPlan(tuple(ScheduledSequence(s, len(s.token_ids)) for s in sequences)))]
    for step in range(num_steps):
        for sequence in sequences:
            sequence.num_computed_tokens = len(sequence.token_ids)
            sequence.token_ids.append(numbers.randrange(20, 740))
        plan = StepPlan(tuple(ScheduledSequence(sequence, 1) for sequence in sequences))
        found.append(runner.run(plan).clone())
        if step % 3 == 2:
            sequences.pop(0)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_decodes_on_fixed_buffers_equal_plain_ones(kind: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, kind)
    architecture = read_architecture(read_checkpoint_json(folder, "config.json"))
    device = torch.device("cpu")
    model = load_weights(str(folder), architecture, dtype=torch.float32, device=device)
    lengths = [3, 17, 30, 1, 40]
    plain = decode(make_runner(model, has_graphs=False), lengths, 12)
    num_layers_before = model.num_layers_run
    fixed = decode(make_runner(model, has_graphs=True), lengths, 12)
    assert model.num_layers_run > num_layers_before
    for one, other in zip(fixed, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
