"""Config → a running engine. Torch is loaded only where the backend needs it."""

from collections.abc import Sequence
from typing import Protocol

from granite_ray.checkpoint import Checkpoint
from granite_ray.config import EngineConfig, ModelConfig
from granite_ray.engine.fake import FakeEngine
from granite_ray.engine.requests import OnToken
from granite_ray.errors import InfrastructureError
from granite_ray.parallel.place import RankPlace
from granite_ray.records import LLM, Completion, Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import load_tokenizer


class Engine(LLM, Protocol):
    """An `LLM` with a life: it counts what reached the model, and it ends.

    Interactive calls go before those that are not. `on_token` hears of each token of a completion
    as it is chosen.
    """

    num_calls: int
    """Calls of `generate` and `score` that reached the model."""

    @property
    def failure(self) -> InfrastructureError | None:
        """Why it answers no call any more, None while it does."""
        ...

    @property
    def num_steps(self) -> int:
        """Grows while the engine gets on with a call: calls in flight, no growth: it hangs."""
        ...

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens, of all calls so far, that were found computed."""
        ...

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None = None,
        *,
        is_interactive: bool = False,
        on_token: OnToken | None = None,
    ) -> Completion:
        """Continue `prompt`."""
        ...

    async def score(
        self,
        prompt: Prompt,
        choices: Sequence[tuple[int, ...]],
        *,
        is_interactive: bool = False,
    ) -> list[float]:
        """Return the log-probability of each choice right after `prompt`."""
        ...

    def shutdown(self) -> None:
        """End within a bounded time; whoever waits, and later calls, get InfrastructureError."""
        ...


def make_engine(
    checkpoint: Checkpoint,
    model: ModelConfig,
    engine: EngineConfig,
    num_threads: int | None = None,
    place: RankPlace | None = None,
) -> Engine:
    """Build the engine that `engine.backend` names.

    Args:
        checkpoint: What to load; its `max_model_len` bounds every request.
        model: How the weights are read.
        engine: How the engine runs.
        num_threads: CPU threads of this process; by default torch decides.
        place: This rank's place, where a replica has several; all its ranks are built at once.
    """
    tokenizer = load_tokenizer(checkpoint.tokenizer_path)
    if engine.backend == "fake":
        return FakeEngine(tokenizer, checkpoint.max_model_len, engine.fake_tokens_per_s)
    if engine.backend == "native":
        from granite_ray.engine.native import load_native_engine  # loads torch

        return load_native_engine(checkpoint, tokenizer, model, engine, num_threads, place)
    from granite_ray.engine.reference.core import load_reference_engine  # loads torch

    return load_reference_engine(checkpoint, tokenizer, model, engine, num_threads)
