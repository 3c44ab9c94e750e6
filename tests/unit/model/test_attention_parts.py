"""What each token of a step sees, against softmax written out; and the road that CUDA takes."""

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from granite_ray.model.attention_parts import QUERY_BLOCK, Heads, VarlenPart
from granite_ray.model.attention_plan import can_read_blocks, plan_parts, varlen_part
from granite_ray.model.batch import ForwardBatch, Segment
from granite_ray.model.workspace import Workspace
from tests.unit.engine.test_graphs import attend_plainly

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE = 6, 2, 16, 0.3
BLOCK_SIZE, NUM_BLOCKS = 16, 256
SEGMENTS = (
    Segment(1, 40),
    Segment(1, 1),
    Segment(1, 0),
    Segment(70, 0),
    Segment(5, 30, parents=(-1, 0, 0, -1, 3)),
    Segment(2 * QUERY_BLOCK + 9, 100),
    Segment(3, 0, parents=(-1, -1, 0)),
    Segment(QUERY_BLOCK + 1, 0),
    Segment(17, 15),
)


def make_batch() -> ForwardBatch:
    free = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0)).tolist())
    tables, slots = [], []
    for segment in SEGMENTS:
        stop = segment.num_cached_tokens + segment.num_tokens
        table = list(itertools.islice(free, -(-stop // BLOCK_SIZE)))
        tables.append(table)
        for position in range(segment.num_cached_tokens, stop):
            slot = table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            slots.append(-1 if segment.parents else slot)
    width = max(map(len, tables))
    padded = [table + [0] * (width - len(table)) for table in tables]
    nothing = torch.empty(0, dtype=torch.int64)
    return ForwardBatch(
        segments=SEGMENTS,
        num_decodes=2,
        token_ids_T=torch.zeros(len(slots), dtype=torch.int64),
        positions_T=nothing,
        slot_mapping_T=torch.tensor(slots),
        block_tables_SB=torch.tensor(padded, dtype=torch.int32),
        state_slots_S=nothing,
        logits_indices_L=nothing,
    )


def make_heads(batch: ForwardBatch, dtype: torch.dtype) -> Heads:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    num_tokens = len(batch.token_ids_T)
    queries = draw(num_tokens, NUM_HEADS, HEAD_DIM).to(dtype)
    keys, values = (draw(num_tokens, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    caches = [draw(NUM_BLOCKS * BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    is_written = batch.slot_mapping_T >= 0
    for cache, new in zip(caches, (keys, values), strict=True):
        cache[batch.slot_mapping_T[is_written]] = new[is_written]
    paged = [cache.unflatten(0, (NUM_BLOCKS, BLOCK_SIZE)) for cache in caches]
    return Heads(queries, keys, values, *paged, SCALE)


def attend_token_by_token(batch: ForwardBatch, heads: Heads) -> torch.Tensor:
    """Each token by itself, in float64, over the keys that it may see."""
    rows, start = [], 0
    for segment, table in zip(batch.segments, batch.block_tables_SB.tolist(), strict=True):
        positions = range(segment.num_cached_tokens)
        slots = [table[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        for index in range(segment.num_tokens):
            own = list(range(index + 1))
            if segment.parents:
                own, node = [], index
                while node >= 0:
                    own.append(node)
                    node = segment.parents[node]
            own_rows = [start + node for node in own]
            rows.append(attend_one(heads, start + index, slots, own_rows))
        start += segment.num_tokens
    return torch.stack(rows)


def attend_one(heads: Heads, row: int, slots: list[int], own_rows: list[int]) -> torch.Tensor:
    group_size = NUM_HEADS // NUM_KV_HEADS
    keys, values = (
        torch.cat([cache.flatten(0, 1)[slots], own[own_rows]])
        .double()
        .repeat_interleave(group_size, dim=1)
        for cache, own in (
            (heads.key_cache, heads.keys_TGA),
            (heads.value_cache, heads.values_TGA),
        )
    )
    scores = (keys * heads.queries_THA[row].double()).sum(-1) * SCALE
    return (scores.softmax(dim=0)[..., None] * values).sum(0)


@pytest.fixture(scope="module")
def batch() -> ForwardBatch:
    return make_batch()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Outputs are means of numbers near 1: a rounding or two in the last place of each dtype.
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)],
    ids=["float32", "bfloat16", "float16"],
)
def test_every_token_sees_what_it_may(
    batch: ForwardBatch, dtype: torch.dtype, tolerance: float
) -> None:
    heads, workspace = make_heads(batch, dtype), Workspace()
    found = torch.full_like(heads.queries_THA, torch.nan)
    for part in plan_parts(batch, heads.key_cache):
        part.attend(heads, found, workspace)
    expected = attend_token_by_token(batch, heads)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_one_call_for_all_runs_sees_the_same(batch: ForwardBatch) -> None:
    heads, workspace = make_heads(batch, torch.float32), Workspace()
    found = torch.full_like(heads.queries_THA, torch.nan)
    parts = plan_parts(batch, heads.key_cache)
    num_tries = sum(bool(segment.parents) for segment in SEGMENTS)
    for part in (varlen_part(batch, attend_plainly), *parts[-num_tries:]):
        part.attend(heads, found, workspace)
    expected = attend_token_by_token(batch, heads)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "block_size", "expected"),
    [
        (torch.bfloat16, 256, True),
        (torch.float16, 512, True),
        (torch.bfloat16, 16, False),
        (torch.float32, 256, False),
    ],
)
def test_blocks_are_read_in_place_where_the_kernel_takes_them(
    dtype: torch.dtype, block_size: int, *, expected: bool
) -> None:
    shape = (8, block_size, NUM_KV_HEADS, HEAD_DIM)
    assert not can_read_blocks(torch.empty(shape, dtype=dtype))
    with FakeTensorMode():
        assert can_read_blocks(torch.empty(shape, dtype=dtype, device="cuda")) is expected


def test_the_kernel_gets_one_part_for_all_runs(batch: ForwardBatch) -> None:
    runs = dataclasses.replace(
        batch, segments=SEGMENTS[:4], block_tables_SB=batch.block_tables_SB[:4]
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        cache = torch.empty((8, 256, NUM_KV_HEADS, HEAD_DIM), dtype=torch.bfloat16, device="cuda")
        [part] = plan_parts(runs, cache)
    assert isinstance(part, VarlenPart)
