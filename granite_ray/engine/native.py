"""Our own engine's core: schedule → build and forward → sample → append, step after step.

The scheduler knows integers, the runner tensors, continuations and weighings text and answers;
here they meet.
"""

import itertools
import logging
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.cache import Cache
from granite_ray.engine.canary import check_model, choose_shape
from granite_ray.engine.continuation import Continuation
from granite_ray.engine.devices import choose_device
from granite_ray.engine.front import Core, EngineFront
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.graphs import DecodeGraphs
from granite_ray.engine.group_canary import check_group
from granite_ray.engine.loading import Weights
from granite_ray.engine.lockstep import LockstepCore
from granite_ray.engine.requests import GenerateRequest, Request
from granite_ray.engine.runner import Runner, num_logits_rows
from granite_ray.engine.sampling import TokenMasks, choose_tokens, compute_masks, read_logprobs
from granite_ray.engine.scheduler import Scheduler, SchedulerLimits
from granite_ray.engine.sequence import ScheduledSequence, Sequence, StepPlan
from granite_ray.engine.sizing import CacheSize, cache_budget, size_cache
from granite_ray.engine.turns import Turns
from granite_ray.engine.weighing import Weighing
from granite_ray.errors import ConfigError
from granite_ray.model.attention_plan import can_read_blocks
from granite_ray.model.granite import GraniteModel
from granite_ray.model.state import allocate_state
from granite_ray.parallel.groups import Group
from granite_ray.parallel.place import RankPlace
from granite_ray.tokenizer import Tokenizer

MAX_BRANCH_TOKENS = 512
"""Bounds the logits of one step's branches: a token costs 0.4 MB at a vocabulary of 100,000."""

MIN_STEP_TOKENS = 64
"""A step of fewer tokens that device memory does not suffice for ends the engine."""

logger = logging.getLogger(__name__)


def load_native_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    model: ModelConfig,
    engine: EngineConfig,
    num_threads: int | None,
    place: RankPlace | None = None,
) -> EngineFront:
    """Load the checkpoint, size its cache, check what it computes, and start its engine.

    Args:
        checkpoint: What to load.
        tokenizer: That of the checkpoint.
        model: How the weights are read.
        engine: How the engine runs.
        num_threads: CPU threads of this process; by default torch decides.
        place: This rank's place in its replica, None where it is the only one. All ranks load at
            the same time.

    Raises:
        ConfigError: The weights, the device or the memory do not do.
        InfrastructureError: The model computes wrongly here, or another rank does not come.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    group = None if place is None else Group(place)
    weights = Weights(checkpoint, model, choose_device(engine.device))
    loaded = weights.load(group)
    architecture, weight = loaded.architecture, loaded.norm.weight
    longest = checkpoint.max_model_len
    budget = cache_budget(engine, weight.device, num_threads)
    size = size_cache(architecture, engine, longest, weight.dtype, budget)
    runner = _make_runner(loaded, size, engine, longest)
    shape = choose_shape(size, engine.block_size, longest, architecture.vocab_size)
    if group is not None:
        group.join(weight.device)
        check_group(runner, group, weights.load_layer, shape)
    check_model(runner, shape)
    has_state = "mamba" in architecture.layer_types
    scheduler = Scheduler(
        SchedulerLimits(size.max_num_seqs, engine.max_num_batched_tokens, MAX_BRANCH_TOKENS),
        Cache(size.num_blocks, engine.block_size, size.num_slots, has_state),
    )
    grammars = GrammarCompiler(
        tokenizer.tokenizer_json, architecture.vocab_size, tokenizer.eos_token_ids
    )
    core: Core = NativeCore(runner, scheduler, tokenizer, grammars, retries_steps=group is None)
    if group is not None:
        core = LockstepCore(core, group)
    return EngineFront(core, tokenizer, grammars, longest)


def _make_runner(
    model: GraniteModel, size: CacheSize, engine: EngineConfig, max_model_len: int
) -> Runner:
    weight = model.norm.weight
    # One block and one slot more than the cache gives out: padding is written there.
    counts = size.num_blocks + 1, engine.block_size, size.num_slots + 1
    state = allocate_state(model.architecture, *counts, weight.dtype, weight.device)
    graphs = None
    if weight.is_cuda:
        reads_blocks = all(can_read_blocks(cache) for cache in state.key_caches)
        if not reads_blocks:
            logger.warning("attention copies blocks; engine.block_size: 256 may be read in place")
        if engine.cuda_graphs and not reads_blocks:
            raise ConfigError(
                f"engine.cuda_graphs needs a cache that attention reads in place, and "
                f"engine.block_size is {engine.block_size} with {weight.dtype}. Set "
                "engine.block_size: 256 and model.dtype: bfloat16, or leave cuda_graphs out."
            )
        if engine.cuda_graphs:
            max_num_blocks = -(-max_model_len // engine.block_size)
            graphs = DecodeGraphs(model, state, size.max_num_seqs, max_num_blocks)
    return Runner(model, state, engine.block_size, graphs)


class NativeCore:
    """Continuous batching over one model; see `Core` for what its methods promise.

    Args:
        retries_steps: Whether a step that device memory does not suffice for is made in smaller
            ones; not where other ranks wait in the midst of it.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        grammars: GrammarCompiler,
        *,
        retries_steps: bool = True,
    ) -> None:
        self._retries_steps = retries_steps
        self._runner = runner
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._seq_ids = itertools.count()
        self._continuations: dict[Sequence, Continuation] = {}
        self._weighings: dict[Sequence, Weighing] = {}
        self._masking = ThreadPoolExecutor(1, "masks")
        self._turns = Turns()

    @property
    def num_steps(self) -> int:
        """Layers run so far."""
        return self._runner.num_steps

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens so far that were found in the cache."""
        return self._scheduler.num_cached_tokens

    @property
    def has_work(self) -> bool:
        """Whether a sequence is not finished."""
        return self._scheduler.has_work

    def add(self, request: Request) -> None:
        """Make a sequence of a request and let it wait its turn."""
        prompt = request.prompt
        sequence = Sequence(
            seq_id=next(self._seq_ids),
            token_ids=list(prompt.token_ids),
            num_prompt_tokens=len(prompt.token_ids),
            max_num_tokens=len(prompt.token_ids),
            junctions=prompt.junctions,
            is_interactive=request.is_interactive,
        )
        if isinstance(request, GenerateRequest):
            continuation = self._start(request)
            sequence.max_num_tokens += request.sampling.max_tokens
            sequence.token_ids += continuation.take_forced_tokens()
            if continuation.is_finished:  # the grammar allows one answer only
                return
            self._continuations[sequence] = continuation
        else:
            weighing = Weighing(request)
            sequence.is_scoring = True
            sequence.branches = tuple(branch.token_ids for branch in weighing.branches)
            self._weighings[sequence] = weighing
        self._scheduler.add(sequence)

    def step(self) -> None:
        """Compute one step and give what it brings to sequences and callers."""
        self._drop_abandoned()
        plan = self._scheduler.schedule(prefers_interactive=self._turns.are_interactive_only)
        if not plan.scheduled:
            self._runner.run_empty()
            return
        started = time.perf_counter()
        self._compute(plan)
        self._turns.note(plan, time.perf_counter() - started)

    def _compute(self, plan: StepPlan) -> None:
        # Known only now: `complete` moves the sequences on.
        takers = [(item, num_logits_rows(item)) for item in plan.scheduled if item.needs_logits]
        sampled = [item.sequence for item in plan.scheduled if _is_sampled(item)]
        continuations = [self._continuations[sequence] for sequence in sampled]
        masks = self._masking.submit(compute_masks, continuations, self._grammars)
        logits = self._run(plan)  # the masks are computed meanwhile
        if logits is None:
            return
        self._scheduler.complete(plan)
        rows = self._weigh(takers, logits)
        if rows:
            self._sample(sampled, logits[rows], masks.result())

    def close(self) -> None:
        """End the thread that computes masks."""
        self._masking.shutdown()

    def _run(self, plan: StepPlan) -> torch.Tensor | None:
        """Run a step; None where device memory does not suffice, and smaller steps may do."""
        try:
            return self._runner.run(plan)
        except torch.OutOfMemoryError:
            num_tokens = sum(item.num_tokens for item in plan.scheduled)
            if not self._retries_steps or num_tokens < MIN_STEP_TOKENS:
                raise
            logger.warning("out of device memory, halving steps num_seqs=%d", len(plan.scheduled))
        # Outside of `except`: its traceback would keep the failed step's tensors alive.
        self._scheduler.give_up_step()
        torch.cuda.empty_cache()
        return None

    def _sample(self, sequences: list[Sequence], logits: torch.Tensor, masks: TokenMasks) -> None:
        """Let sequences grow by a token each, and by those that their grammars then force."""
        continuations = [self._continuations[sequence] for sequence in sequences]
        token_ids = choose_tokens(logits, continuations, masks)
        logprobs = read_logprobs(logits, token_ids, continuations)
        for sequence, continuation, token_id, logprob in zip(
            sequences, continuations, token_ids, logprobs, strict=True
        ):
            continuation.num_cached_tokens = sequence.num_cached_tokens
            continuation.append(token_id, logprob)
            sequence.token_ids += [token_id, *continuation.take_forced_tokens()]
            if continuation.is_finished:
                self._finish(sequence)

    def _drop_abandoned(self) -> None:
        """Let go of sequences whose callers no longer wait."""
        for sequence, answer in list((self._continuations | self._weighings).items()):
            if answer.request.future.done():
                self._finish(sequence)

    def _weigh(
        self, takers: list[tuple[ScheduledSequence, int]], logits: torch.Tensor
    ) -> list[int]:
        """Give scoring sequences their rows of logits; return the rows of the others."""
        rows, start = [], 0
        for item, num_rows in takers:
            if item.sequence.is_scoring:
                self._read(item, logits[start : start + num_rows])
            else:
                rows.append(start)
            start += num_rows
        return rows

    def _read(self, item: ScheduledSequence, logits: torch.Tensor) -> None:
        sequence, weighing = item.sequence, self._weighings[item.sequence]
        num_scored = sequence.num_scored_branches
        if item.branches:
            done = weighing.branches[num_scored - len(item.branches) : num_scored]
            weighing.read_branches(done, logits)
        else:
            weighing.read_prompt(logits[0])
        if num_scored == len(sequence.branches):
            weighing.finish()
            self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._scheduler.finish(sequence)
        self._continuations.pop(sequence, None)
        self._weighings.pop(sequence, None)

    def _start(self, request: GenerateRequest) -> Continuation:
        grammar = request.grammar
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        return Continuation(request, self._tokenizer, matcher)


def _is_sampled(item: ScheduledSequence) -> bool:
    return item.needs_logits and not item.sequence.is_scoring
