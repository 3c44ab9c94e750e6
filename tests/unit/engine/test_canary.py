"""The look at a model before it is trusted: right ones pass, broken roads are refused."""

import asyncio
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from granite_ray.checkpoint import Checkpoint, open_checkpoint
from granite_ray.config import ModelConfig
from granite_ray.engine.canary import check_model, choose_shape
from granite_ray.engine.factory import Engine
from granite_ray.engine.runner import Runner
from granite_ray.engine.sizing import CacheSize
from granite_ray.errors import InfrastructureError
from granite_ray.model.architecture import read_architecture
from granite_ray.model.batch import ForwardBatch
from granite_ray.model.granite import GraniteModel
from granite_ray.model.state import ModelState, allocate_state
from granite_ray.model.weights import load_weights
from granite_ray.records import Prompt, SamplingParams
from tests.family import write_member
from tests.unit.engine.watched import fill_with_nan

SIZE = CacheSize(num_blocks=32, num_slots=8, max_num_seqs=8)
SMALLEST = CacheSize(num_blocks=3, num_slots=1, max_num_seqs=1)
BLOCK_SIZE = 16
CPU = torch.device("cpu")

Spoil = Callable[[ForwardBatch, ModelState], ForwardBatch]


@dataclass
class SpoiledModel:
    """A model that gets another batch than the one it is given, or gives other logits."""

    model: GraniteModel
    spoil: Spoil = lambda batch, _: batch
    spoil_logits: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.model.parameters()

    def __call__(self, batch: ForwardBatch, state: ModelState) -> torch.Tensor:
        return self.spoil_logits(self.model(self.spoil(batch, state), state))


@dataclass
class Checked:
    """A checkpoint's model, to be checked whole or spoiled."""

    checkpoint: Checkpoint
    dtype: torch.dtype = torch.float32
    size: CacheSize = SIZE
    block_size: int = BLOCK_SIZE
    max_model_len: int = 2048

    def __post_init__(self) -> None:
        self.architecture = read_architecture(self.checkpoint.config)
        path = self.checkpoint.path
        self.model = load_weights(path, self.architecture, dtype=self.dtype, device=CPU)

    def check(self, model: GraniteModel | SpoiledModel) -> None:
        counts = self.size.num_blocks, self.block_size, self.size.num_slots
        state = allocate_state(self.architecture, *counts, self.dtype, CPU)
        fill_with_nan(state)
        runner = Runner(model, state, self.block_size)
        vocab_size = self.architecture.vocab_size
        check_model(
            runner, choose_shape(self.size, self.block_size, self.max_model_len, vocab_size)
        )


# right models ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_right_model_passes_in_every_dtype(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    checked = Checked(checkpoint, dtype)
    checked.check(checked.model)


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_a_right_model_passes_with_blocks_of_any_size(
    checkpoint: Checkpoint, block_size: int
) -> None:
    checked = Checked(checkpoint, size=replace(SIZE, num_blocks=60), block_size=block_size)
    checked.check(checked.model)


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 5, 17, 47, 48])
def test_a_context_shorter_than_the_prompts_is_checked_in_full(
    checkpoint: Checkpoint, max_model_len: int
) -> None:
    checked = Checked(checkpoint, size=SMALLEST, max_model_len=max_model_len)
    checked.check(checked.model)


def test_an_engine_for_a_few_tokens_starts_and_answers(
    checkpoint: Checkpoint, start_engine: Callable[..., Engine]
) -> None:
    engine = start_engine(dataclasses.replace(checkpoint, max_model_len=3))
    answer = asyncio.run(engine.generate(Prompt((30, 31)), SamplingParams(1)))
    assert answer.num_completion_tokens + (answer.finish_reason == "stop") == 1


def test_rounding_that_chooses_other_experts_for_one_prompt_is_no_reason_to_refuse(
    tmp_path: Path,
) -> None:
    path = write_member(tmp_path, "granite-3.1-1b-a400m", num_layers=11)
    for dtype in (torch.float16, torch.bfloat16):
        checked = Checked(open_checkpoint(ModelConfig(path=str(path))), dtype)
        checked.check(checked.model)


# broken ones ─────────────────────────────────────────────────────────────────────────────────────


def is_decode(batch: ForwardBatch) -> bool:
    return batch.num_decodes == len(batch.segments)


def is_continued(batch: ForwardBatch) -> bool:
    return batch.segments[0].num_cached_tokens > 0


def blocks_of_the_neighbour(batch: ForwardBatch, _: ModelState) -> ForwardBatch:
    if not is_continued(batch):
        return batch
    return replace(batch, block_tables_SB=batch.block_tables_SB.roll(1, dims=0))


def blocks_out_of_order(batch: ForwardBatch, _: ModelState) -> ForwardBatch:
    """The first and the second are swapped where they are read."""
    tables = batch.block_tables_SB
    if not is_decode(batch) or tables.shape[1] < 2:
        return batch
    return replace(batch, block_tables_SB=tables[:, [1, 0, *range(2, tables.shape[1])]])


def written_one_place_late(batch: ForwardBatch, _: ModelState) -> ForwardBatch:
    if not is_decode(batch):
        return batch
    return replace(batch, slot_mapping_T=batch.slot_mapping_T - 1)


def keys_forgotten_between_steps(batch: ForwardBatch, state: ModelState) -> ForwardBatch:
    if is_continued(batch):
        for cache in state.key_caches:
            cache.zero_()
    return batch


def late_positions(batch: ForwardBatch, _: ModelState) -> ForwardBatch:
    """Off by one, and only from the second decode in a row on."""
    if not is_decode(batch) or batch.segments[0].num_cached_tokens <= 32:
        return batch
    return replace(batch, positions_T=batch.positions_T + 1)


class StateStays:
    """After a decode, the state is again what it was before."""

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, ...] = ()

    def __call__(self, batch: ForwardBatch, state: ModelState) -> ForwardBatch:
        states = *state.conv_states, *state.ssm_states
        for tensor, kept in zip(states, self.kept, strict=False):
            tensor.copy_(kept)
        self.kept = tuple(tensor.clone() for tensor in states) if is_decode(batch) else ()
        return batch


def state_starts_anew(batch: ForwardBatch, state: ModelState) -> ForwardBatch:
    if is_continued(batch) and not is_decode(batch):
        for tensor in (*state.conv_states, *state.ssm_states):
            tensor.zero_()
    return batch


def window_forgotten(batch: ForwardBatch, state: ModelState) -> ForwardBatch:
    if is_decode(batch):
        for tensor in state.conv_states:
            tensor[..., 0] = 0
    return batch


def slot_of_the_neighbour(batch: ForwardBatch, _: ModelState) -> ForwardBatch:
    if not is_decode(batch):
        return batch
    return replace(batch, state_slots_S=batch.state_slots_S.roll(1))


ATTENTION = {
    "blocks of the neighbour": blocks_of_the_neighbour,
    "blocks out of order": blocks_out_of_order,
    "written one place late": written_one_place_late,
    "keys forgotten between steps": keys_forgotten_between_steps,
}
MAMBA = {
    "state stays": StateStays(),
    "state starts anew": state_starts_anew,
    "window forgotten": window_forgotten,
    "slot of the neighbour": slot_of_the_neighbour,
}
REFUSAL = (
    r"check at start failed: logits computed (in pieces|token by token after a prefill) are .* "
    r"limit for float32.*model\.dtype: float32 or engine\.backend: transformers"
)


@pytest.mark.parametrize("spoil", ATTENTION.values(), ids=ATTENTION)
def test_a_broken_cache_is_refused(checkpoint: Checkpoint, spoil: Spoil) -> None:
    checked = Checked(checkpoint)
    with pytest.raises(InfrastructureError, match=REFUSAL):
        checked.check(SpoiledModel(checked.model, spoil))


@pytest.mark.parametrize("spoil", MAMBA.values(), ids=MAMBA)
def test_a_broken_state_is_refused(checkpoints: dict[str, Checkpoint], spoil: Spoil) -> None:
    checked = Checked(checkpoints["granitemoehybrid"])
    with pytest.raises(InfrastructureError, match=REFUSAL):
        checked.check(SpoiledModel(checked.model, spoil))


@pytest.mark.parametrize("kind", ["granite", "granitemoe"])
def test_positions_that_go_wrong_among_decodes_alone_are_refused(
    checkpoints: dict[str, Checkpoint], kind: str
) -> None:
    checked = Checked(checkpoints[kind])
    with pytest.raises(InfrastructureError, match="computed token by token after a prefill are"):
        checked.check(SpoiledModel(checked.model, late_positions))


@pytest.mark.parametrize("size", [SIZE, SMALLEST])
def test_logits_that_are_no_numbers_are_refused(moe: Checkpoint, size: CacheSize) -> None:
    checked = Checked(moe, size=size)
    model = SpoiledModel(checked.model, spoil_logits=lambda logits: logits * torch.nan)
    with pytest.raises(InfrastructureError, match=r"in pieces are nan from"):
        checked.check(model)


def test_a_road_that_fails_for_one_prompt_only_gives_no_number_there_and_is_refused(
    moe: Checkpoint,
) -> None:
    def spoil_first(logits: torch.Tensor) -> torch.Tensor:
        logits[:1] = torch.nan
        return logits

    checked = Checked(moe)
    with pytest.raises(InfrastructureError, match="nan"):
        checked.check(SpoiledModel(checked.model, spoil_logits=spoil_first))
