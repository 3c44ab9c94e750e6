"""Static batches over a transformers model: each is taken from its prompts to its last token."""

import logging
from typing import Any

import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.continuation import Continuation
from granite_ray.engine.front import EngineFront
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.reference.decoding import finish_sequences
from granite_ray.engine.reference.loading import load_model
from granite_ray.engine.reference.scoring import score_choices
from granite_ray.engine.requests import (
    GenerateRequest,
    Request,
    ScoreRequest,
    settle,
    take_batch,
)
from granite_ray.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def load_reference_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    model: ModelConfig,
    engine: EngineConfig,
    num_threads: int | None,
) -> EngineFront:
    """Load the checkpoint and start its engine."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    loaded = load_model(checkpoint.path, model, engine)
    return start_reference_engine(loaded, tokenizer, checkpoint.max_model_len, engine)


def start_reference_engine(
    model: Any, tokenizer: Tokenizer, max_model_len: int, engine: EngineConfig
) -> EngineFront:
    """Start an engine around a model that is loaded."""
    grammars = GrammarCompiler(
        tokenizer.tokenizer_json, model.config.vocab_size, tokenizer.eos_token_ids
    )
    core = ReferenceCore(model, tokenizer, grammars, engine)
    return EngineFront(core, tokenizer, grammars, max_model_len)


class ReferenceCore:
    """One static batch a step; see `Core` for what its methods promise."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, grammars: GrammarCompiler, config: EngineConfig
    ) -> None:
        self.num_steps = 0
        self.num_cached_tokens = 0  # every prompt is computed from its start
        for layer in model.model.layers:  # a whole forward pass may take minutes on a CPU
            layer.register_forward_pre_hook(self._count_step)
        self._model = model
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._config = config
        self._waiting: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether a request waits."""
        return bool(self._waiting)

    def add(self, request: Request) -> None:
        """Let a request wait for its batch."""
        self._waiting.append(request)

    def step(self) -> None:
        """Answer a batch; where device memory does not suffice, once more in two halves."""
        batch = self._take_batch()
        try:
            self._forward(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            logger.warning("out of device memory, halving the batch num_seqs=%d", len(batch))
        else:
            return
        # Outside of `except`: its traceback would keep the failed step's tensors alive.
        torch.cuda.empty_cache()
        middle = len(batch) // 2
        for half in (batch[:middle], batch[middle:]):
            self._forward([request for request in half if not request.future.done()])

    def close(self) -> None:
        """Hold nothing that would have to be let go of."""

    def _take_batch(self) -> list[Request]:
        config = self._config
        self._waiting = [request for request in self._waiting if not request.future.done()]
        batch = take_batch(self._waiting, config.max_num_seqs, config.max_num_batched_tokens)
        chosen = set(map(id, batch))
        self._waiting = [request for request in self._waiting if id(request) not in chosen]
        return batch

    def _forward(self, batch: list[Request]) -> None:
        """Run one kind of request through the model and answer it."""
        generates = [request for request in batch if isinstance(request, GenerateRequest)]
        scores = [request for request in batch if isinstance(request, ScoreRequest)]
        if generates:
            sequences = [self._start(request) for request in generates]
            finish_sequences(self._model, self._grammars, sequences)
        if scores:
            answers = score_choices(self._model, scores, self._config)
            for request, answer in zip(scores, answers, strict=True):
                settle(request.future, answer)

    def _start(self, request: GenerateRequest) -> Continuation:
        grammar = request.grammar
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        return Continuation(request, self._tokenizer, matcher)

    def _count_step(self, *_: object) -> None:
        self.num_steps += 1
