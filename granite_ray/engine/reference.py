"""The three verbs on transformers: slow, plain, and the oracle for every other engine.

Callers wait on an event loop; one thread takes what waits, batch by batch, and runs the model.
"""

import asyncio
import logging
import threading
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.continuation import Continuation
from granite_ray.engine.decoding import finish_sequences
from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.loading import load_model
from granite_ray.engine.requests import (
    Future,
    GenerateRequest,
    Request,
    ScoreRequest,
    check_fits,
    fail,
    settle,
    take_batch,
)
from granite_ray.engine.scoring import score_choices
from granite_ray.errors import InfrastructureError
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import Tokenizer

GATHER_S = 0.005
"""A first request waits this long for company: task programs ask one after the other."""
SHUTDOWN_S = 10.0
"""How long `shutdown` waits for the step that is running."""

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


def load_reference_engine(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    model: ModelConfig,
    engine: EngineConfig,
    num_threads: int | None,
) -> "ReferenceEngine":
    """Load the checkpoint and start its engine."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    loaded = load_model(checkpoint.path, model, engine)
    return ReferenceEngine(loaded, tokenizer, checkpoint.max_model_len, engine)


class ReferenceEngine:
    """Static batches over a transformers model; see `LLM` for what its verbs promise."""

    def __init__(
        self, model: Any, tokenizer: Tokenizer, max_model_len: int, config: EngineConfig
    ) -> None:
        self.num_calls = 0
        self.num_steps = 0
        for layer in model.model.layers:  # a whole forward pass may take minutes on a CPU
            layer.register_forward_pre_hook(self._count_step)
        self._model = model
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._config = config
        self._grammars = GrammarCompiler(
            tokenizer.tokenizer_json, model.config.vocab_size, tokenizer.eos_token_ids
        )
        # `_changed` guards what both threads touch: the two lists and the error.
        self._changed = threading.Condition()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._error: InfrastructureError | None = None
        self._thread = threading.Thread(target=self._serve, name="reference-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, grammar: Grammar | None = None
    ) -> Completion:
        """Continue `prompt`; see `LLM`."""
        if grammar is not None:
            self._grammars.matcher(grammar)  # a schema that cannot be compiled fails here, alone
        request = GenerateRequest(prompt, sampling, grammar)
        return await self._answer(request, request.future)

    async def score(self, prompt: Prompt, choices: Sequence[tuple[int, ...]]) -> list[float]:
        """Return the log-probability of each choice right after `prompt`; see `LLM`."""
        request = ScoreRequest(prompt, choices)
        return await self._answer(request, request.future)

    def count(self, text: str) -> int:
        """Count the tokens of plain text; see `LLM`."""
        return self._tokenizer.count(text)

    def shutdown(self) -> None:
        """End the loop after the step that is running; whoever waits gets InfrastructureError."""
        self._stop(InfrastructureError("The engine was shut down."))
        self._thread.join(SHUTDOWN_S)
        if self._thread.is_alive():
            logger.warning("engine still in a step after shutdown waited_s=%s", SHUTDOWN_S)

    async def _answer(self, request: Request, future: Future[Answer]) -> Answer:
        check_fits(request.prompt, request.num_answer_tokens, self._max_model_len)
        with self._changed:
            if self._error is not None:
                raise _fresh(self._error)
            self.num_calls += 1
            self._waiting.append(request)
            self._changed.notify()
        return await asyncio.wrap_future(future)

    # Below here: the engine's own thread.

    def _serve(self) -> None:
        try:
            while self._take_batch():
                self._run(self._running)
        except Exception as error:  # whatever it was, all who wait must hear of it
            logger.exception("engine loop failed")
            failure = InfrastructureError(f"The engine's loop failed: {error!r}")
            failure.__cause__ = error
            self._stop(failure)

    def _take_batch(self) -> bool:
        """Wait for work and move it from waiting to running; False when the engine stops."""
        limits = self._config.max_num_seqs, self._config.max_num_batched_tokens
        with self._changed:
            self._running = []
            while not self._running:
                self._changed.wait_for(lambda: self._waiting or self._error)
                self._changed.wait_for(lambda: len(self._waiting) >= limits[0], timeout=GATHER_S)
                if self._error is not None:
                    return False
                self._waiting = [request for request in self._waiting if not request.future.done()]
                self._running = take_batch(self._waiting, *limits)
            chosen = set(map(id, self._running))
            self._waiting = [request for request in self._waiting if id(request) not in chosen]
        return True

    def _run(self, batch: list[Request]) -> None:
        """Answer a batch; where device memory does not suffice, once more in two halves."""
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

    def _forward(self, batch: list[Request]) -> None:
        """Run one kind of request through the model and answer it."""
        generates = [request for request in batch if isinstance(request, GenerateRequest)]
        scores = [request for request in batch if isinstance(request, ScoreRequest)]
        if generates:
            sequences = [self._new_sequence(request) for request in generates]
            finish_sequences(self._model, self._grammars, sequences)
        if scores:
            answers = score_choices(self._model, scores, self._config)
            for request, answer in zip(scores, answers, strict=True):
                settle(request.future, answer)

    def _count_step(self, *_: object) -> None:
        self.num_steps += 1

    def _new_sequence(self, request: GenerateRequest) -> Continuation:
        grammar = request.grammar
        matcher = None if grammar is None else self._grammars.matcher(grammar)
        return Continuation(request, self._tokenizer, matcher)

    def _stop(self, error: InfrastructureError) -> None:
        """Fail whoever waits and every later call, once and for good."""
        with self._changed:
            if self._error is None:
                self._error = error
            for request in [*self._running, *self._waiting]:
                fail(request.future, _fresh(self._error))
            self._waiting = []
            self._changed.notify_all()


def _fresh(error: InfrastructureError) -> InfrastructureError:
    """Copy an error, so that callers do not grow one traceback together."""
    twin = InfrastructureError(str(error))
    twin.__cause__ = error.__cause__
    return twin
