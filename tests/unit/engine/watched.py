"""Native engines built by hand around a runner that can be held, counted and broken."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.engine.cache import Cache
from granite_ray.engine.front import EngineFront
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.lockstep import LockstepCore
from granite_ray.engine.native import NativeCore
from granite_ray.engine.runner import Runner
from granite_ray.engine.scheduler import Scheduler, SchedulerLimits
from granite_ray.engine.sequence import StepPlan
from granite_ray.model.architecture import read_architecture
from granite_ray.model.state import ModelState, allocate_state
from granite_ray.model.weights import load_weights
from granite_ray.parallel.experts import GroupDispatcher
from granite_ray.parallel.groups import Group
from granite_ray.records import Prompt, SamplingParams
from granite_ray.tokenizer import load_tokenizer

BLOCK_SIZE = 16
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sizes:
    """What a native engine is built with."""

    num_blocks: int = 256
    num_slots: int = 24
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 4096
    max_num_branch_tokens: int = 512


def make_runner(
    checkpoint: Checkpoint, sizes: Sizes, group: Group | None = None
) -> tuple[Runner, ModelState]:
    """A checkpoint in float32 with its memory, which is full of NaN; of a group, one rank's."""
    architecture = read_architecture(checkpoint.config)
    dispatcher = group and GroupDispatcher(group, architecture.num_local_experts, CPU)
    model = load_weights(
        checkpoint.path, architecture, dtype=torch.float32, device=CPU, dispatcher=dispatcher
    )
    num_slots = sizes.num_slots if "mamba" in architecture.layer_types else 0
    state = allocate_state(
        architecture, sizes.num_blocks, BLOCK_SIZE, num_slots, torch.float32, CPU
    )
    fill_with_nan(state)
    return Runner(model, state, BLOCK_SIZE), state


def fill_with_nan(state: ModelState) -> None:
    """Make memory what it may be at first: nothing that may count."""
    for tensors in (state.key_caches, state.value_caches, state.conv_states, state.ssm_states):
        for tensor in tensors:
            tensor.fill_(torch.nan)


@dataclass
class WatchedRunner:
    """A runner that can be held, and that fails as told.

    `breaks` says of a step's number of tokens whether it fails; `late` steps have run by then, so
    that what they write is written. Step number `pause_at` waits until `may_step` is set.
    """

    runner: Runner
    error: BaseException | None = None
    breaks: Callable[[int], bool] = lambda _: False
    late: bool = False
    pause_at: int = -1
    token_counts: list[int] = field(default_factory=list)
    seq_ids: list[tuple[int, ...]] = field(default_factory=list)
    preempted: set[int] = field(default_factory=set)
    is_entered: threading.Event = field(default_factory=threading.Event)
    may_step: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.may_step.set()

    @property
    def num_steps(self) -> int:
        return self.runner.num_steps

    def run_empty(self) -> None:
        self.runner.run_empty()

    def run(self, plan: StepPlan) -> torch.Tensor:
        if len(self.token_counts) == self.pause_at:
            self.may_step.clear()
        self.is_entered.set()
        self.may_step.wait(20)
        num_tokens = sum(item.num_tokens for item in plan.scheduled)
        self.token_counts.append(num_tokens)
        sequences = [item.sequence for item in plan.scheduled]
        self.seq_ids.append(tuple(sequence.seq_id for sequence in sequences))
        self.preempted |= {one.seq_id for one in sequences if one.num_preemptions}
        is_broken = self.error is not None and self.breaks(num_tokens)
        if is_broken and self.late:
            self.runner.run(plan)
        if is_broken:
            raise self.error
        return self.runner.run(plan)

    async def hold(self, engine: EngineFront) -> asyncio.Task:
        """Hold the engine in a request of its own, so that what follows waits together."""
        self.may_step.clear()
        plug = asyncio.create_task(engine.generate(Prompt((30,)), SamplingParams(1)))
        await asyncio.to_thread(self.is_entered.wait, 20)
        return plug

    async def gather(self, engine: EngineFront, calls: Sequence[Any]) -> list[Any]:
        """Let coroutines wait together, then go; return their answers or errors."""
        plug = await self.hold(engine)
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)
        self.may_step.set()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
        await asyncio.gather(plug, return_exceptions=True)
        return answers


def start_native(
    checkpoint: Checkpoint,
    runner: Runner | WatchedRunner,
    sizes: Sizes,
    group: Group | None = None,
) -> tuple[EngineFront, Scheduler]:
    """An engine around a runner, and the scheduler inside; with a group, one rank's."""
    architecture = read_architecture(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.path)
    grammars = GrammarCompiler(
        tokenizer.tokenizer_json, architecture.vocab_size, tokenizer.eos_token_ids
    )
    has_state = "mamba" in architecture.layer_types
    limits = SchedulerLimits(
        sizes.max_num_seqs, sizes.max_num_batched_tokens, sizes.max_num_branch_tokens
    )
    cache = Cache(sizes.num_blocks, BLOCK_SIZE, sizes.num_slots, has_state)
    scheduler = Scheduler(limits, cache)
    core: Any = NativeCore(runner, scheduler, tokenizer, grammars, retries_steps=group is None)
    if group is not None:
        core = LockstepCore(core, group)
    return EngineFront(core, tokenizer, grammars, checkpoint.max_model_len), scheduler
