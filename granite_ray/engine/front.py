"""The verbs that task programs await, in front of a loop that runs the model in one thread.

Requests come in from event loops; the thread hands them to a core and lets it step. Knows nothing
of tensors, nor of how a core works.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from granite_ray.engine.grammar import GrammarCompiler
from granite_ray.engine.requests import (
    Future,
    GenerateRequest,
    OnToken,
    Request,
    ScoreRequest,
    check_fits,
    fail,
)
from granite_ray.errors import InfrastructureError
from granite_ray.records import Completion, Grammar, Prompt, SamplingParams
from granite_ray.tokenizer import Tokenizer

GATHER_S = 0.005
"""A first request waits this long for company: task programs ask one after the other."""
SHUTDOWN_S = 10.0
"""How long `shutdown` waits for the step that is running."""

Answer = TypeVar("Answer")
logger = logging.getLogger(__name__)


class Core(Protocol):
    """What runs the model. Called from one thread; it settles the futures of its requests."""

    @property
    def num_steps(self) -> int:
        """Grows while a step goes on, so that a hanging one can be told from a long one."""
        ...

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens so far that were found computed."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a request that was added is not settled yet."""
        ...

    def add(self, request: Request) -> None:
        """Take a request in. Its future is done early where the caller no longer waits."""
        ...

    def step(self) -> None:
        """Bring some requests forward."""
        ...

    def close(self) -> None:
        """Let go of what would outlive the last step; none follows."""
        ...


class EngineFront:
    """An `Engine` around a core; see `LLM` for what its verbs promise."""

    def __init__(
        self, core: Core, tokenizer: Tokenizer, grammars: GrammarCompiler, max_model_len: int
    ) -> None:
        self.num_calls = 0
        self._core = core
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._max_model_len = max_model_len
        # `_changed` guards what both sides touch: the inbox, the unsettled and the error.
        self._changed = threading.Condition()
        self._inbox: list[Request] = []
        self._unsettled: set[Request] = set()
        self._error: InfrastructureError | None = None
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> InfrastructureError | None:
        """Why it answers no call any more, None while it does."""
        return self._error

    @property
    def num_steps(self) -> int:
        """Grows while the engine gets on with a call."""
        return self._core.num_steps

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens, of all calls so far, that were found computed."""
        return self._core.num_cached_tokens

    async def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        grammar: Grammar | None = None,
        *,
        is_interactive: bool = False,
        on_token: OnToken | None = None,
    ) -> Completion:
        """Continue `prompt`; see `LLM`. An interactive request goes before those that are not.

        `on_token` hears of each token while the rest is still to come.
        """
        if grammar is not None:
            self._grammars.matcher(grammar)  # a schema that cannot be compiled fails here, alone
        request = GenerateRequest(prompt, sampling, grammar, is_interactive, on_token)
        return await self._answer(request, request.future)

    async def score(
        self,
        prompt: Prompt,
        choices: Sequence[tuple[int, ...]],
        *,
        is_interactive: bool = False,
    ) -> list[float]:
        """Return the log-probability of each choice right after `prompt`; see `LLM`."""
        request = ScoreRequest(prompt, choices, is_interactive=is_interactive)
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
            self._inbox.append(request)
            self._unsettled.add(request)
            self._changed.notify()
        future.add_done_callback(lambda _: self._forget(request))
        return await asyncio.wrap_future(future)

    def _forget(self, request: Request) -> None:
        with self._changed:
            self._unsettled.discard(request)

    def _stop(self, error: InfrastructureError) -> None:
        """Fail whoever waits and every later call, once and for good."""
        with self._changed:
            if self._error is None:
                self._error = error
            left = list(self._unsettled)
            self._changed.notify_all()
        for request in left:  # outside of the lock, which settling a future takes again
            fail(request.future, _fresh(self._error))

    # Below here: the engine's own thread.

    def _serve(self) -> None:
        try:
            while self._take_in():
                self._core.step()
        except BaseException as error:  # all who wait must hear of it, be it a library's panic
            logger.exception("engine loop failed")
            failure = InfrastructureError(f"The engine's loop failed: {error!r}")
            failure.__cause__ = error
            self._stop(failure)
        finally:
            self._core.close()

    def _take_in(self) -> bool:
        """Hand what came in to the core; wait where there is nothing to do. False at the end."""
        with self._changed:
            if not self._core.has_work:
                self._wait_until(lambda: bool(self._inbox))
                self._changed.wait_for(lambda: self._error is not None, timeout=GATHER_S)
            if self._error is not None:
                return False
            arrived, self._inbox = self._inbox, []
        for request in arrived:
            self._core.add(request)
        return True

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        self._changed.wait_for(lambda: is_so() or self._error is not None)


def _fresh(error: InfrastructureError) -> InfrastructureError:
    """Copy an error, so that callers do not grow one traceback together."""
    twin = InfrastructureError(str(error))
    twin.__cause__ = error.__cause__
    return twin
